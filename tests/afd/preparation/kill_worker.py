"""Prepares a folder again and again, killed each time a few rows further, for test_pipeline.py.

The processes are forked from this one, which has imported everything: twenty fresh ones would take minutes.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from afd.config_file import load_config
from afd.preparation.encoding import ClipEncoder
from afd.preparation.pipeline import prepare

result, config_path, num_kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
config = load_config(config_path, [])
ClipEncoder(config)  # imports what is imported late
events = config.output_dir / "data" / ".train.work" / "events.jsonl"
draw = random.Random(5)


def size() -> int:
    return events.stat().st_size if events.exists() else 0


def run_and_kill(growth: int) -> bool:
    """Prepare in a child; kill it once the journal has grown; True if it was killed and not done before."""
    before, child = size(), os.fork()
    if child == 0:
        try:
            prepare(config)
        finally:
            os._exit(0)
    while size() - before < growth:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.0005)
    time.sleep(draw.random() * 0.004)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


kills = sum(run_and_kill(draw.randrange(1, 1500)) for _ in range(num_kills))
prepare(config)
data = config.output_dir / "data"
files = {str(path.relative_to(data)): path.read_bytes().hex() for path in sorted(data.rglob("*")) if path.is_file()}
shutil.rmtree(data)
prepare(config)
again = {str(path.relative_to(data)): path.read_bytes().hex() for path in sorted(data.rglob("*")) if path.is_file()}
result.write_text(json.dumps({"kills": kills, "killed": files, "whole": again}))
