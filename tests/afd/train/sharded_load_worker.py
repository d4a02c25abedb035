"""One rank of test_sharded_load.py: weights go straight into ZeRO-3 shards, and no rank ever holds the model."""

import argparse
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afd.config_file import load_config
from afd.distributed import close_world, gather_objects, init_world
from afd.models.student import CausalBlock, CausalStudent
from afd.models.weights import fill_student, open_student
from afd.models.weights.sources import LazyTensor, WeightSource
from afd.train.builders import prepare_student
from afd.train.ds_config import load_ds_config
from afd.train.engines import build_engine, build_sharded, consolidated_weights, gathered, write_shard

parser = argparse.ArgumentParser()
parser.add_argument("result", type=Path)
parser.add_argument("weights", type=Path)
parser.add_argument("dtype")
parser.add_argument("overrides", nargs="*")
parser.add_argument("--local_rank", type=int)
options = parser.parse_args()
world = init_world(120)

ds_config = load_ds_config(Path(__file__).parents[3] / "configs" / "zero3.json")
if options.dtype == "bfloat16":
    ds_config["bf16"] = {"enabled": True, "check_grad_overflow": True}
config = load_config(Path(__file__).parents[3] / "configs" / "chunk_wise.yaml", options.overrides)
live: list[int] = []


def live_bytes() -> int:
    """Bytes of all tensors made on this rank, each storage once."""
    storages = {}
    for each in gc.get_objects():
        if issubclass(type(each), Tensor):
            parts = [each, each.ds_tensor] if hasattr(each, "ds_tensor") else [each]
            storages |= {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parts if p.numel()}
    return sum(storages.values())


def shard_bytes(module: nn.Module) -> int:
    shards: list[Any] = [getattr(p, "ds_tensor", None) for p in module.parameters()]
    return sum(s.numel() * s.element_size() for s in shards if s is not None)


def watch_construction() -> Callable[[], None]:
    """Count what is alive whenever a linear layer is about to be made."""
    original = nn.Linear.__init__

    def watched(self: nn.Linear, *args: Any, **kwargs: Any) -> None:
        live.append(live_bytes())
        original(self, *args, **kwargs)

    nn.Linear.__init__ = watched
    return lambda: setattr(nn.Linear, "__init__", original)


file = open_student(options.weights, config.student.model_dump())
gc.collect()
gc.freeze()  # what exists by now is not counted, such as a .pt's mapped tensors: pages of a file
restore = watch_construction()
student = build_sharded(lambda: CausalStudent(file.shape), ds_config)
restore()
shards = shard_bytes(student)
peak_built = max(live)
largest = max(torch.Size(t.shape).numel() for t in file.source.tensors.values()) * 4
reads: list[weakref.ref[Tensor]] = []
alive_at_once: list[int] = []
live.clear()


def watched(tensor: LazyTensor) -> LazyTensor:
    def read() -> Tensor:
        value = tensor.read()
        if tensor.read() is not value:  # a .pt's mapped tensors always exist
            reads.append(weakref.ref(value))
        alive_at_once.append(sum(each() is not None for each in reads))
        live.append(live_bytes())
        return value

    return LazyTensor(tensor.shape, tensor.dtype, read)


source = WeightSource("watched", {name: watched(tensor) for name, tensor in file.source.tensors.items()})
fill_student(student, source, write_shard)
whole = [name for name, parameter in student.named_parameters() if parameter.data.numel()]
engine = build_engine(prepare_student(student, config), ds_config, leaf_modules=(CausalBlock,))
weights = consolidated_weights(engine)

# The sharded student computes what a whole one does.
generator = torch.Generator().manual_seed(5)
noisy = torch.randn(1, file.shape.in_channels, file.shape.chunk_frames, 2, 2, generator=generator)
prompt = torch.randn(1, file.shape.text_len, file.shape.text_dim, generator=generator)
with torch.no_grad():
    t = torch.full((1, file.shape.chunk_frames), 0.5)
    engine.eval()
    v = engine(noisy, t, prompt)
    with gathered(engine) as module:
        again = module(noisy, t, prompt)
largest_rank = max(max(each) for each in gather_objects([peak_built, max(live)]))
facts = {
    "ranks": world.size,
    "total": file.num_parameters * 4,
    "largest": largest,
    "shards": shards,
    "peak_built": peak_built,
    "peak_filled": max(live),
    "alive_at_once": max(alive_at_once),
    "reads": len(alive_at_once),
    "whole": whole,
    "velocity": v.float().tolist(),
    "same": torch.equal(v, again),
    "weights": {name: tensor.float().sum().item() for name, tensor in weights.items()},
    "dtypes": sorted({str(p.dtype) for p in student.parameters()}),
    "peak_any_rank": largest_rank,
}
if world.is_main:
    options.result.write_text(json.dumps(facts))
close_world()
