"""`afd sample --image`: a student goes on from a picture, as a file and as a stream."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from afd.cli import main
from afd.config import StudentShape
from afd.models.encoders import encode_prompts
from afd.models.image_encoder import condition_on
from afd.models.student import CausalStudent
from afd.models.wan_vae import WanVAE
from afd.models.weights import save_student
from afd.rollout import SamplerTimes, rollout
from afd.sampling.stream import stream_chunks, stream_noise

pytestmark = pytest.mark.slow  # importing diffusers takes seconds
SHAPE: dict[str, Any] = {"in_channels": 36, "out_channels": 16, "patch_size": (1, 2, 2), "image_dim": 12}
SHAPE |= {"num_layers": 2, "head_dim": 16, "ffn_dim": 72, "text_len": 7, "text_dim": 20, "chunk_frames": 1}
Sample = Callable[..., int]


@pytest.fixture
def sample(pipeline_folder: Path, tmp_path: Path) -> Sample:
    """`sample(*options, **shape)`: `afd sample` of a tiny student of that shape beside a tiny pipeline's encoders."""
    config = tmp_path / "run.yaml"
    config.write_text(
        f"""
encoders: {{codec: wan_vae, vae_path: {pipeline_folder}, text_path: {pipeline_folder}, text_len: 7,
  image_path: {pipeline_folder}}}
video: {{num_frames: 3, height: 32, width: 48, fps: 8}}
rollout: {{steps: [1000, 500]}}
"""
    )
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "first.png")

    def run(*options: str, **shape: Any) -> int:
        save_student(random_student(**shape), tmp_path / "s.safetensors", dtype=torch.float32, note={})
        fixed = ["--checkpoint", str(tmp_path / "s.safetensors"), "--config", str(config), "--prompt", "a red ball"]
        return main(["sample", *fixed, "--scale", "1", "--device", "cpu", *options])

    return run


def random_student(**shape: Any) -> CausalStudent:
    torch.manual_seed(0)
    student = CausalStudent(StudentShape(**SHAPE | shape))
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1) / 2, std=0.2)
    return student.requires_grad_(False).eval()


def frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_a_clip_goes_on_from_a_picture(sample: Sample, tmp_path: Path) -> None:
    picture = ("--image", str(tmp_path / "first.png"))
    assert sample("--out", str(tmp_path / "i.mp4"), *picture) == 0
    assert frames(tmp_path / "i.mp4").shape == (9, 32, 48, 3)
    both = (*picture, "--last-image", str(tmp_path / "first.png"))
    assert sample("--out", str(tmp_path / "b.mp4"), *both) == 0
    assert (frames(tmp_path / "b.mp4") != frames(tmp_path / "i.mp4")).any()
    text = {"in_channels": 16, "image_dim": None, "first_chunk_frames": 1, "chunk_frames": 2}
    assert sample("--out", str(tmp_path / "t.mp4"), *picture, **text) == 0
    assert frames(tmp_path / "t.mp4").shape == (9, 32, 48, 3)


def test_what_does_not_fit_is_one_line(sample: Sample, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = ("--out", str(tmp_path / "x.mp4")), ("--image", str(tmp_path / "first.png"))
    (tmp_path / "no.png").write_text("no picture")
    for options, shape, message in [
        (out, {}, "needs the video's first frame (and maybe its last) as images, got 0"),
        ((*out, "--image", str(tmp_path / "no.png")), {}, "must be a picture: cannot identify image file"),
        ((*out, "--last-image", str(tmp_path / "first.png")), {}, "--last-image needs --image"),
        ((*out, *picture), {"image_dim": 8}, "student image_dim must be 12, the image encoder's width, got 8"),
        ((*out, *picture, "--stream"), {}, "--seconds must be given to stream an image-to-video student"),
    ]:
        assert sample(*options, **shape) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1, error
        assert not (tmp_path / "x.mp4").exists()


def test_a_stream_with_an_image_is_the_rollout(sample: Sample, pipeline_folder: Path, tmp_path: Path) -> None:
    from afd.config import EncodersSection

    picture = str(tmp_path / "first.png")
    options = ("--stream", "--seconds", "1", "--window", "2", "--sink", "1", "--image", picture)
    assert sample("--out", str(tmp_path / "s.mp4"), *options) == 0
    assert frames(tmp_path / "s.mp4").shape == (9, 32, 48, 3)
    student, codec = random_student(window_frames=2, sink_frames=1), WanVAE(pipeline_folder)
    encoders = EncodersSection(
        codec="wan_vae", vae_path=pipeline_folder, text_path=pipeline_folder, image_path=pipeline_folder, text_len=7
    )
    embeds, times = encode_prompts(encoders, ["a red ball"]), SamplerTimes((1.0, 0.5))
    with Image.open(picture) as file:
        image, first = condition_on([file], student.shape, codec, encoders, size=(32, 48), num_latent_frames=3)
    assert first is None
    chunks = list(stream_chunks(student, None, embeds, times, latent_size=(4, 6), seed=1, num_chunks=3, image=image))
    noise = torch.cat([stream_noise(1, index, 1, 2, (16, 1, 4, 6)) for index in range(3)], dim=3)
    whole = rollout(student, embeds, noise, times, image=image)
    torch.testing.assert_close(torch.cat([chunk.latents for chunk in chunks], dim=2), whole, rtol=0, atol=1e-5)
