"""One rank of test_averaging.py: averages over engines of each stage beside the formula on plain tensors."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afd.distributed import broadcast_object, close_world, init_world, seeded_generator
from afd.train.averaging import ParameterAverage
from afd.train.ds_config import load_ds_config
from afd.train.engines import build_engine, consolidated_weights, gathered

BATCH, DECAY = 16, 0.9

parser = argparse.ArgumentParser()
parser.add_argument("result", type=Path)
parser.add_argument("--local_rank", type=int)
options = parser.parse_args()
world = init_world(120)
mine = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)


def toy() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 7), nn.GELU(), nn.LayerNorm(7), nn.Linear(7, 3))
    layers[2].requires_grad_(False)
    return layers


def config_for(stage: int, bf16: bool = False) -> dict[str, Any]:
    config = load_ds_config(Path(__file__).parents[3] / "configs" / "zero3.json")
    config["train_batch_size"] = BATCH
    config["optimizer"]["params"]["lr"] = 0.01
    config["zero_optimization"]["stage"] = stage
    if bf16:
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    return config


def message(action: Any) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return "no error"


def functional(module: nn.Module, values: dict[str, Tensor], x: Tensor) -> Tensor:
    whole = {**{name: each.detach() for name, each in module.state_dict().items()}, **values}
    return torch.func.functional_call(module, whole, (x,))


def follow(stage: int) -> dict[str, Any]:
    """Train, average, and check what applied() changes and what it puts back."""
    engine = build_engine(toy(), config_for(stage))
    average = ParameterAverage(engine, decay=DECAY, name="ema")
    frozen = ParameterAverage(engine, decay=1.0, name="reference")
    shell, initial = toy(), {name: each.detach().clone() for name, each in toy().named_parameters()}
    expected = {name: each for name, each in initial.items() if not name.startswith("2.")}
    seen: dict[str, float] = {"applied": 0.0, "gathered": 0.0, "restored": 0.0, "formula": 0.0}
    moved = 0.0
    state = average.state_dict()
    for step in range(4):
        x = torch.randn(BATCH, 4, generator=seeded_generator(stage, step))
        engine.backward(engine(x[mine]).pow(2).mean())
        engine.step()
        average.update(step + 1)
        frozen.update(step + 1)
        weights = consolidated_weights(engine)
        with torch.no_grad():
            before = engine(x)
            with average.applied():
                averaged = engine(x)
            inside = averaged
            try:
                with average.applied(), gathered(engine) as module:
                    inside = module(x)
                    raise KeyError("a rollout failed")
            except KeyError:
                pass
            after = engine(x)
            with frozen.applied():
                reference = engine(x)
        state = average.state_dict()
        seen["restored"] = max(seen["restored"], (after - before).abs().max().item())
        if world.is_main:
            expected = {name: DECAY * each + (1 - DECAY) * weights[name] for name, each in expected.items()}
            assert state.keys() == expected.keys()
            seen["formula"] = max([seen["formula"]] + [(state[n] - expected[n]).abs().max().item() for n in expected])
            truth = functional(shell, state, x)
            seen["applied"] = max(seen["applied"], (averaged - truth).abs().max().item())
            seen["gathered"] = max(seen["gathered"], (inside - truth).abs().max().item())
            seen["reference"] = (reference - functional(shell, {}, x)).abs().max().item()
            moved = max(moved, (averaged - before).abs().max().item())
    live = consolidated_weights(engine)
    with average.applied():
        pass
    again = consolidated_weights(engine)
    bitwise = all(torch.equal(live[name], again[name]) for name in live)

    other = ParameterAverage(engine, decay=DECAY, name="copy")
    whole = broadcast_object(state)
    other.load_state_dict(whole)
    reloaded = other.state_dict()
    same = all(torch.equal(reloaded[name], state[name]) for name in state)
    wrong = dict(whole)
    wrong["0.bias"] = torch.zeros(9)

    def nested() -> None:
        with average.applied(), frozen.applied():
            pass

    def outside() -> None:
        with gathered(engine), average.applied():
            pass

    def update_inside() -> None:
        with average.applied():
            average.update(1)

    return {
        **seen,
        "moved": moved,
        "bitwise": bitwise,
        "reloaded": same,
        "nested": message(nested),
        "outside": message(outside),
        "update_inside": message(update_inside),
        "unknown": message(lambda: other.load_state_dict({**whole, "9.weight": torch.zeros(1)})),
        "shape": message(lambda: other.load_state_dict(wrong)),
    }


def bf16_average() -> dict[str, Any]:
    """The average follows the float32 masters; applied() rounds it to the bf16 shards and back."""
    engine = build_engine(toy(), config_for(3, bf16=True))
    average = ParameterAverage(engine, decay=0.5, name="ema")
    x = torch.randn(BATCH, 4, generator=seeded_generator(1)).bfloat16()
    engine.backward(engine(x[mine]).float().pow(2).mean())
    engine.step()
    average.update(1)
    with torch.no_grad():
        before = engine(x)
        with average.applied():
            averaged = engine(x)
        after = engine(x)
    return {
        "restored": torch.equal(before, after),
        "changed": not torch.equal(before, averaged),
        "dtype": sorted({str(each.dtype) for each in average.state_dict().values()}),
    }


persistent = config_for(3)
persistent["zero_optimization"]["stage3_param_persistence_threshold"] = 1000
result = {
    "stages": {str(stage): follow(stage) for stage in (0, 2, 3)},
    "bf16": bf16_average(),
    "persistent": message(lambda: ParameterAverage(build_engine(toy(), persistent), decay=0.5, name="ema")),
}
if world.is_main:
    options.result.write_text(json.dumps(result))
close_world()
