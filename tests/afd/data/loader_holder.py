"""A run that stays alive, for test_loader.py: prints two batches' ids, waits until asked, prints three more."""

import json
import sys
from pathlib import Path

from afd.data.loader import build_loader

loader = build_loader(Path(sys.argv[1]), batch_size_per_rank=4, world_size=1, rank=0, seed=3)
sys.stdout.write(json.dumps([next(loader).sample_ids.tolist() for _ in range(2)]) + "\n")
sys.stdout.flush()
sys.stdin.read(1)
sys.stdout.write(json.dumps([next(loader).sample_ids.tolist() for _ in range(3)]) + "\n")
