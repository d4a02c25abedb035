"""Files of every kind through Wan's VAE in batches, against diffusers' own encoder clip by clip."""

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import torch

from afd.config import RunConfig
from afd.data.inspection import inspect
from afd.data.loader import read_all
from afd.data.video import decode_video
from afd.preparation import prepare_shards, shard_folders
from afd.teachers.base import SourceVideo
from afd.teachers.physics import training_prompts

MEAN, STD = [0.5, -1.0, 0.0, 2.0], [2.0, 0.5, 1.0, 4.0]


def pictures(number: int) -> np.ndarray:
    """Six frames of blocks whose colours belong to the number."""
    coarse = np.random.default_rng(number).integers(0, 255, (6, 4, 6, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((1, 8, 8, 1), dtype=np.uint8))


def write_video(path: Path, codec: str, pix_fmt: str, frames: np.ndarray) -> None:
    with av.open(str(path), mode="w") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(8))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_every_kind(folder: Path) -> dict[str, str]:
    """One file of each kind, and two mp4 files of a further prompt; returns captions by name."""
    folder.mkdir()
    kinds = {"a.mp4": ("libx264", "yuv420p"), "b.webm": ("libvpx-vp9", "yuv420p"), "c.gif": ("gif", "rgb8")}
    kinds |= {"d.mkv": ("ffv1", "yuv444p"), "e.mov": ("libx264", "yuv420p"), "f.avi": ("mpeg4", "yuv420p")}
    for number, (name, (codec, pix_fmt)) in enumerate(kinds.items()):
        write_video(folder / name, codec, pix_fmt, pictures(number))
    (folder / "g").mkdir()
    for number, picture in enumerate(pictures(9)):
        cv2.imwrite(str(folder / "g" / f"{number:03}.png"), picture[..., ::-1])
    names = [*kinds, "g"]
    captions = dict(zip(names, training_prompts(len(names)), strict=True))
    rows = [{"file_name": name, "text": text} | ({"fps": 8} if name == "g" else {}) for name, text in captions.items()]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return captions


@pytest.mark.slow
def test_every_kind_of_file_goes_through_wans_vae(tmp_path: Path, config_for: Callable[..., RunConfig]) -> None:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae: Any = AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=MEAN, latents_std=STD).eval()
    vae.save_pretrained(tmp_path / "vae")
    captions = write_every_kind(tmp_path / "videos")
    config = config_for(
        tmp_path / "videos",
        "encoders.codec=wan_vae",
        f"encoders.vae_path={tmp_path / 'vae'}",
        "video.num_frames=2",
        "prepare.batch_size=3",
        "prepare.keep_video=codec",
        "prepare.crf=0",
        "prepare.heldout_fraction=0.3",
        "prepare.device=cpu",
    )
    prepare_shards(config)
    shards = shard_folders(config)
    assert all(inspect(folder).problems == () for folder in shards)
    samples = {sample.prompt: sample for folder in shards for sample in read_all(folder)}
    assert samples.keys() == set(captions.values())
    for name, caption in captions.items():
        path = tmp_path / "videos" / name
        data = SourceVideo(caption, 0, name, "folder", "", path=path, fps=8).read() if path.is_dir() else path
        frames = decode_video(data, num_frames=5, height=16, width=16, fps=8)
        pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None] * 2 - 1
        with torch.no_grad():
            raw = vae.encode(pixels).latent_dist.mode()[0]
        mean, std = (torch.tensor(each).view(4, 1, 1, 1) for each in (MEAN, STD))
        torch.testing.assert_close(samples[caption].latents.float(), (raw - mean) / std, rtol=1e-2, atol=1e-2)
        kept = samples[caption].video_mp4
        assert kept
        with torch.no_grad():
            seen = vae.decode((samples[caption].latents.float() * std + mean)[None]).sample[0]
        expected = (seen / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0).numpy()
        difference = decode_video(kept, num_frames=5, height=16, width=16, fps=8) - expected
        assert abs(difference @ [0.299, 0.587, 0.114]).mean() < 0.02  # H.264 keeps a colour for four pixels
