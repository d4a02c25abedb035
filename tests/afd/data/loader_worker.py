"""One run of test_loader.py: takes batches, writes the global batches' sample ids and the loader's state."""

import argparse
import json
from pathlib import Path

from afd.data.loader import build_loader
from afd.distributed import close_world, gather_objects, init_world

parser = argparse.ArgumentParser()
parser.add_argument("result", type=Path)
parser.add_argument("shards", type=Path)
parser.add_argument("global_batch", type=int)
parser.add_argument("num_batches", type=int)
parser.add_argument("--state", type=Path)
parser.add_argument("--local_rank", type=int)
options = parser.parse_args()

world = init_world(60)
loader = build_loader(
    options.shards,
    batch_size_per_rank=options.global_batch // world.size,
    world_size=world.size,
    rank=world.rank,
    seed=3,
)
if options.state:
    loader.load_state_dict(json.loads(options.state.read_text()))
batches = []
for _ in range(options.num_batches):
    batch = next(loader)
    assert batch.prompts == tuple(f"ball {i} → right" for i in batch.sample_ids.tolist())
    batches.append([i for part in gather_objects(batch.sample_ids.tolist()) for i in part])
if world.is_main:
    options.result.write_text(json.dumps({"batches": batches, "state": loader.state_dict()}))
close_world()
