"""One of two ranks for test_distributed.py: the second falls silent in a group that torch made with its own timeout."""

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from afd.distributed import init_world, set_timeouts

parser = argparse.ArgumentParser()
parser.add_argument("result", type=Path)
options = parser.parse_args()

world = init_world(60)
group = dist.new_group(ranks=[0, 1])  # as DeepSpeed makes its own
set_timeouts(1.5)
dist.all_reduce(torch.ones(1), group=group)
if world.is_main:
    started, problem = time.monotonic(), ""
    try:
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError as error:
        problem = str(error)
    options.result.write_text(json.dumps({"seconds": time.monotonic() - started, "problem": problem}))
else:
    while not options.result.exists():  # alive, but does not take part
        time.sleep(0.05)
os._exit(0)  # a process group whose collective failed may abort the process when it is taken down
