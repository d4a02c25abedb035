"""Writes samples without end, for test_writer.py to kill."""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from afd.data.schema import Sample
from afd.data.writer import write_shards


def samples() -> Iterator[Sample]:
    for i in itertools.count():
        if i == 50:
            sys.stdout.write("writing\n")
            sys.stdout.flush()
        yield Sample("a ball", torch.ones(2, 3, 4, 4), torch.ones(2, 3), None, f"endless/{i}", "physics", i, 10.0)


write_shards(samples(), Path(sys.argv[1]), metadata={}, shard_bytes=10_000)
