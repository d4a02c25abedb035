"""One rank of test_distributed.py: tries every collective and writes what it got."""

import argparse
import json
from pathlib import Path

import torch

from afd.distributed import (
    all_reduce_max,
    all_reduce_mean,
    all_reduce_sum,
    broadcast_object,
    check_same_on_all_ranks,
    close_world,
    gather_cat,
    gather_objects,
    init_world,
)

parser = argparse.ArgumentParser()
parser.add_argument("result", type=Path)
parser.add_argument("--local_rank", type=int)
options = parser.parse_args()

world = init_world(60)
assert init_world(60) == world
rows = torch.arange(3.0 * (world.rank + 1)).reshape(world.rank + 1, 3) + 100 * world.rank  # [rank + 1, 3]
value = torch.tensor([1.0, 2.0], requires_grad=True) * (world.rank + 1)
check_same_on_all_ranks("the step plan", ["rollout", 3])
mismatch = ""
try:
    check_same_on_all_ranks("the step plan", ["rollout", world.rank])
except RuntimeError as error:
    mismatch = str(error)
result = {
    "size": world.size,
    "device": str(world.device),
    "sum": all_reduce_sum(value).tolist(),
    "mean": all_reduce_mean(value).tolist(),
    "max": all_reduce_max(value).tolist(),
    "value_after": value.tolist(),
    "rows": gather_cat(rows).tolist(),
    "empty": list(gather_cat(rows[: world.rank]).shape),
    "dtype": str(gather_cat(torch.tensor([world.rank], dtype=torch.bfloat16)).dtype),
    "objects": gather_objects({"rank": world.rank}),
    "broadcast": broadcast_object(f"from {world.rank}"),
    "mismatch": mismatch,
    "threads": torch.get_num_threads(),
}
if world.is_main:
    options.result.write_text(json.dumps(result))
close_world()
