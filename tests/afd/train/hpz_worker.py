"""One rank of test_hpz.py: velocities of a student and of its frozen reference, before and after a training step."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from afd.config import StudentShape
from afd.distributed import close_world, init_world
from afd.models.student import CausalBlock, CausalStudent
from afd.train.averaging import ParameterAverage
from afd.train.engines import build_engine

parser = argparse.ArgumentParser()
parser.add_argument("result", type=Path)
parser.add_argument("--local_rank", type=int)
options = parser.parse_args()
world = init_world(600)

SHAPE = StudentShape(num_layers=2, num_heads=2, head_dim=12, ffn_dim=32, freq_dim=16)
DS: dict[str, Any] = {
    "train_batch_size": world.size,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "reduce_bucket_size": 100000,
        "zero_hpz_partition_size": world.size,
    },
}
torch.manual_seed(0)
engine = build_engine(CausalStudent(SHAPE), DS, leaf_modules=(CausalBlock,))
reference = ParameterAverage(engine, decay=1.0, name="reference")
inputs = (torch.randn(1, 12, 6, 4, 4), torch.rand(1, 6), torch.randn(1, 16, 32))


@torch.no_grad()
def velocity() -> torch.Tensor:
    return engine(*inputs)


first = velocity()
engine.backward(engine(*inputs).square().mean())
engine.step()
trained = velocity()  # leaves copies of the trained weights in the node
with reference.applied():
    frozen = velocity()
again = velocity()
if world.is_main:
    found = {
        "moved": (trained - first).abs().max().item(),
        "reference": (frozen - first).abs().max().item(),
        "restored": (again - trained).abs().max().item(),
    }
    options.result.write_text(json.dumps(found))
close_world()
