"""A small shard folder and its samples, for every test of this area."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from afd.data.schema import Sample
from afd.data.writer import write_shards

METADATA = {"codec": {"name": "dct", "block": 4}, "teacher": {"name": "physics", "gravity": 1.0}}
NUM_SAMPLES = 23


def make_sample(i: int) -> Sample:
    """Sample i of 23: odd sizes, some with a video, a prompt outside ASCII."""
    generator = torch.Generator().manual_seed(i)
    return Sample(
        prompt=f"ball {i} → right",
        latents=torch.randn(3, 5, 7, 2, generator=generator).to(torch.bfloat16),
        prompt_embeds=torch.randn(6, 9, generator=generator).to(torch.bfloat16),
        video_mp4=bytes([i]) * 50 if i % 2 else None,
        source_id=f"physics/{i}",
        teacher="physics",
        seed=i * 2**40,
        fps=10.0,
    )


@pytest.fixture(scope="session")
def sample() -> Callable[[int], Sample]:
    """`sample(i)`: the i-th sample of `shards`."""
    return make_sample


@pytest.fixture(scope="session")
def _pristine_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pristine") / "shards"
    summary = write_shards(map(make_sample, range(NUM_SAMPLES)), out, metadata=METADATA, shard_bytes=4000)
    assert summary.num_shards >= 4
    return summary.path


@pytest.fixture
def shards(_pristine_shards: Path, tmp_path: Path) -> Path:
    """A folder of its own with 23 samples in several shards."""
    return Path(shutil.copytree(_pristine_shards, tmp_path / "shards"))
