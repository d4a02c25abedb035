"""Frames, sizes and patches against transformers' own processors: PIL's runs here, the video one needs torchvision."""

import importlib
import itertools
import random
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from afd.models.vlm_frames import CLIP_MEAN, CLIP_STD, frame_indices, patchify, resize_frames, smart_size

BOUNDS = {"min_pixels": 128 * 28 * 28, "max_pixels": 200_704}


def random_frames(num: int, height: int, width: int) -> np.ndarray:
    """[num, height, width, 3] uint8: smooth shapes with noise, so that resizing has something to do."""
    rng = np.random.default_rng(height * width)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / (3 + i) + columns / (5 + 2 * i) + rng.uniform(0, 6)) for i in range(3 * num)]
    smooth = np.stack(waves, axis=-1).reshape(height, width, num, 3).transpose(2, 0, 1, 3)
    return np.clip(127 + 100 * smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)


def official_patches(frames: np.ndarray, processor: Any) -> tuple[torch.Tensor, list[int]]:
    """A video's patches from the official image processor: it repeats a frame in time, so pairs are put together."""
    out = processor([*frames], return_tensors="pt")
    grid = out["image_grid_thw"][0].tolist()
    patch = processor.patch_size
    images = out["pixel_values"].view(len(frames), grid[1] * grid[2], 3, 2, patch, patch)
    pairs = torch.stack([images[0::2, :, :, 0], images[1::2, :, :, 1]], dim=3)  # [T / 2, patches, 3, 2, p, p]
    return pairs.reshape(-1, 3 * 2 * patch * patch), [len(frames) // 2, grid[1], grid[2]]


def test_sizes_equal_the_official_rule() -> None:
    chooser = random.Random(0)
    for _ in range(500):
        height, width = chooser.randint(20, 2000), chooser.randint(20, 2000)
        bounds = chooser.choice([BOUNDS, {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}])
        factor = chooser.choice([8, 28, 32])
        assert smart_size(height, width, factor=factor, **bounds) == smart_resize(height, width, factor, **bounds)
    assert smart_size(480, 832, factor=28, **BOUNDS) == (336, 588), "Wan's frames as VideoAlign sees them"
    with pytest.raises(ValueError, match="within a factor of 200, got 10 x 2001"):
        smart_size(10, 2001, factor=28, **BOUNDS)


@pytest.mark.parametrize(("height", "width"), [(84, 112), (56, 56)])
def test_patches_equal_the_official_processor_where_nothing_is_resized(height: int, width: int) -> None:
    frames = random_frames(4, height, width)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 10**6})
    expected, grid = official_patches(frames, processor)
    clips = resize_frames(torch.from_numpy(frames)[None] / 255, (height, width))
    own = patchify(clips, patch=14, temporal=2, merge=2)
    assert grid == [2, height // 14, width // 14]
    torch.testing.assert_close(own, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(("height", "width"), [(96, 168), (31, 50), (130, 61)])
def test_resized_patches_are_within_a_grey_level_of_the_official_processor(height: int, width: int) -> None:
    frames = random_frames(2, height, width)
    bounds = {"min_pixels": 60 * 60, "max_pixels": 90 * 90}
    size = smart_size(height, width, factor=28, **bounds)
    assert size != (height, width)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 60 * 60, "longest_edge": 90 * 90})
    expected, grid = official_patches(frames, processor)
    assert grid[1:] == [size[0] // 14, size[1] // 14]
    own = patchify(resize_frames(torch.from_numpy(frames)[None] / 255, size), patch=14, temporal=2, merge=2)
    levels = (own - expected).abs() * min(CLIP_STD) * 255
    assert levels.max() < 1.2, "PIL rounds to levels after rows and after columns, we do not"
    assert levels.mean() < 0.35


@pytest.fixture
def video_processor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The official video processor's class. Its module imports torchvision, which only its resizing calls."""
    names = [
        "torchvision",
        "torchvision.transforms",
        "torchvision.transforms.v2",
        "torchvision.transforms.v2.functional",
    ]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, child in itertools.pairwise(names):
        monkeypatch.setattr(sys.modules[name], child.rpartition(".")[2], sys.modules[child], raising=False)
    name = "transformers.models.qwen2_vl.video_processing_qwen2_vl"
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    return module.Qwen2VLVideoProcessor


def test_patches_and_frame_counts_equal_the_official_video_processor(video_processor: Any) -> None:
    clips = torch.rand(3, 3, 6, 56, 84)
    normal = (clips - torch.tensor(CLIP_MEAN).view(1, 3, 1, 1, 1)) / torch.tensor(CLIP_STD).view(1, 3, 1, 1, 1)
    patches, *grid = video_processor.patchify(None, normal.transpose(1, 2).contiguous(), 14, 2, 2)
    assert grid == [3, 4, 6]
    torch.testing.assert_close(patchify(clips, patch=14, temporal=2, merge=2), patches.flatten(0, 1))

    processor = types.SimpleNamespace(num_frames=None, fps=None, temporal_patch_size=2, min_frames=4, max_frames=768)
    for frames, video_fps, fps in [(81, 16.0, 2.0), (81, 16.0, 4.0), (12, 8.0, 2.0), (61, 24.0, 1.0), (7, 8.0, 8.0)]:
        metadata = types.SimpleNamespace(total_num_frames=frames, fps=video_fps)
        official = video_processor.sample_frames(processor, metadata, fps=fps)
        own = frame_indices(frames, video_fps=video_fps, fps=fps, num_frames=None, multiple=2)
        assert len(own) - len(official) in (0, 2), "the official rule rounds down, VideoAlign's to the nearest"
        assert (own[0], own[-1]) == (0, frames - 1)


def test_frames_follow_videoaligns_rule() -> None:
    common: dict[str, Any] = {"fps": 2.0, "num_frames": None, "multiple": 2}
    wan = frame_indices(81, video_fps=16.0, **common)
    assert wan == (0, 9, 18, 27, 36, 44, 53, 62, 71, 80), "10.1 frames in 5 s, linspace(0, 80, 10) rounded"
    assert frame_indices(12, video_fps=8.0, **common) == (0, 4, 7, 11), "at least 4"
    assert frame_indices(3, video_fps=8.0, **common) == (0, 2), "no more than there are"
    assert frame_indices(12, video_fps=8.0, fps=2.0, num_frames=6, multiple=2) == (0, 2, 4, 7, 9, 11)
    for total, wanted in ((1, None), (5, 8), (5, 1)):
        with pytest.raises(ValueError, match=r"must show a multiple of 2 frames, at least 2 and at most the clip's"):
            frame_indices(total, video_fps=8.0, fps=2.0, num_frames=wanted, multiple=2)


def test_clips_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"T divisible by 2 and sides by 28, got \[1, 3, 3, 28, 28\]"):
        patchify(torch.zeros(1, 3, 3, 28, 28), patch=14, temporal=2, merge=2)
