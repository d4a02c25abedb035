"""A folder of small videos with captions from the built-in world, and the configuration that prepares it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from afd.config import RunConfig
from afd.config_file import load_config
from afd.data.video import encode_video
from afd.teachers.physics import training_prompts

MakeFolder = Callable[..., Path]
MakeConfig = Callable[..., RunConfig]


def make_video(number: int, *, num_frames: int = 13, size: int = 16) -> bytes:
    """A video of its own for each number: 1.6 s of a gradient that drifts."""
    ramp = np.linspace(0, 1, size, dtype=np.float32)
    base = np.stack(np.broadcast_arrays(ramp[None, :], ramp[:, None], (number % 97) / 96), axis=-1)
    frames = np.stack([np.roll(base, i + number, axis=1) for i in range(num_frames)])
    return encode_video(frames, fps=8, crf=10)


def write_folder(folder: Path, num_videos: int, *, videos_per_prompt: int = 1) -> Path:
    """`num_videos` videos and metadata.jsonl."""
    folder.mkdir(parents=True)
    prompts = training_prompts(num_videos)
    rows = []
    for number in range(num_videos):
        (folder / f"{number:04}.mp4").write_bytes(make_video(number))
        rows.append({"file_name": f"{number:04}.mp4", "caption": prompts[number // videos_per_prompt]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def folder_config(videos: Path, out: Path, *overrides: str) -> RunConfig:
    """The quick start's student on a folder of videos."""
    path = out.parent / f"{out.name}.yaml"
    path.write_text(f"output_dir: {out}\n")
    return load_config(path, ["teacher.kind=folder", f"teacher.folder.path={videos}", "prepare.workers=0", *overrides])


@pytest.fixture
def folder_of_videos(tmp_path: Path) -> MakeFolder:
    """`folder_of_videos(n)`: a folder with n videos."""
    return lambda num_videos, **options: write_folder(tmp_path / "videos", num_videos, **options)


@pytest.fixture
def config_for(tmp_path: Path) -> MakeConfig:
    """`config_for(videos, *overrides)`: prepares into tmp_path / "out"."""
    return lambda videos, *overrides: folder_config(videos, tmp_path / "out", *overrides)


@pytest.fixture(scope="session")
def video() -> Callable[..., bytes]:
    """`video(i)`: an mp4 of its own for each i."""
    return make_video
