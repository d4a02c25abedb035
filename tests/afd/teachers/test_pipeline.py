"""The pipeline teacher on a tiny random Wan saved on disk: what diffusers itself gives, for any number of workers."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import afd
from afd.config import PipelineSection, RunConfig, TeacherSection
from afd.data.video import decode_video
from afd.teachers.base import SourceReject, SourceVideo
from afd.teachers.pipeline import PipelineCall, PipelineSource, noise_seed, sample_frames
from afd.teachers.sources import open_source

TEXT = Path(afd.__file__).parent / "assets" / "quickstart" / "text_encoder"
SIZES: dict[str, Any] = {"num_frames": 5, "height": 32, "width": 48, "num_inference_steps": 2, "fps": 8, "crf": 4}


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> Path:
    """A WanPipeline of a few thousand random weights."""
    import torch
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import AutoTokenizer, UMT5EncoderModel

    folder = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    encoder = UMT5EncoderModel.from_pretrained(TEXT)
    sizes: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 1,
        "rope_max_seq_len": 32,
    }
    transformer = WanTransformer3DModel(text_dim=encoder.config.d_model, ffn_dim=32, freq_dim=32, **sizes)
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(TEXT),
        text_encoder=encoder,
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.save_pretrained(folder)
    return folder


def _config(wan: Path, folder: Path, prompts: list[str], devices: int, **options: Any) -> RunConfig:
    (folder / "prompts.txt").write_text("\n".join(prompts))
    section = PipelineSection(
        path=wan, devices=("cpu",) * devices, dtype="float32", work_dir=folder / "work", **(SIZES | options)
    )
    teacher = TeacherSection(kind="pipeline", prompts=folder / "prompts.txt", videos_per_prompt=2, pipeline=section)
    return RunConfig(teacher=teacher)


@pytest.mark.slow
def test_two_workers_give_what_one_gives_and_what_diffusers_gives(wan, tmp_path):
    prompts = ["a red ball", "a blue ball"]
    outcomes = {}
    for devices in (2, 1):
        folder = tmp_path / str(devices)
        folder.mkdir()
        outcomes[devices] = list(open_source(_config(wan, folder, prompts, devices)).videos())
    assert all(isinstance(outcome, SourceVideo) for outcome in outcomes[1])
    assert [(v.prompt, v.seed) for v in outcomes[1]] == [(p, s) for p in prompts for s in (0, 1)]
    assert [v.source_id for v in outcomes[1]] == [v.source_id for v in outcomes[2]]
    read = {devices: [video.read() for video in videos] for devices, videos in outcomes.items()}
    assert read[1] == read[2]
    assert len(set(read[1])) == 4
    assert outcomes[1][0].teacher == "pipeline:WanPipeline"

    import torch
    from diffusers import WanPipeline

    pipeline: Any = WanPipeline.from_pretrained(wan, dtype=torch.float32)
    expected = pipeline(
        prompt="a blue ball", negative_prompt="", num_frames=5, height=32, width=48, num_inference_steps=2,
        guidance_scale=5.0, output_type="np", generator=torch.Generator().manual_seed(noise_seed("a blue ball", 1)),
    ).frames[0]  # fmt: skip
    decoded = decode_video(read[1][3], num_frames=5, height=32, width=48, fps=8)
    assert np.abs(decoded - expected).mean() < 0.04  # H.264 halves the colours' resolution, and this is noise

    again = list(open_source(_config(wan, tmp_path / "1", prompts, 1)).videos())  # from the disk: no worker is started
    assert again == outcomes[1]
    call = PipelineCall(**SIZES, dtype="float32", extra={"flow_shift": 1})
    with pytest.raises(ValueError, match="WanPipeline takes no flow_shift"):
        sample_frames(pipeline, call, "x", 0)


@pytest.mark.slow
def test_bad_pipelines_and_dying_workers(wan, tmp_path, monkeypatch):
    broken = shutil.copytree(wan, tmp_path / "broken")
    (broken / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"teacher.pipeline.path .* cannot be loaded on cpu"):
        list(open_source(_config(broken, tmp_path, ["x"], 1)).videos())
    monkeypatch.setattr("afd.teachers.pipeline._make", _die)
    outcomes = list(open_source(_config(wan, tmp_path, ["x"], 1)).videos())
    assert [isinstance(outcome, SourceReject) and outcome.is_final for outcome in outcomes] == [False, False]
    assert "its worker process on cpu died twice" in getattr(outcomes[0], "reason", "")


def _die(*arguments) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_is_no_pipeline_is_said_at_once(tmp_path):
    call = PipelineCall()
    with pytest.raises(ValueError, match=r"model_index.json cannot be read"):
        PipelineSource(tmp_path, lambda *_: [], work_dir=tmp_path, call=call, devices=["cpu"])
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(ValueError, match=r"must be even, got 480 x 833"):
        PipelineSource(tmp_path, lambda *_: [], work_dir=tmp_path, call=PipelineCall(width=833), devices=["cpu"])
    versions = {
        PipelineSource(tmp_path, lambda *_: [], work_dir=tmp_path, call=changed, devices=["cpu"]).version
        for changed in (call, PipelineCall(num_inference_steps=4), PipelineCall(guidance_scale=1.0))
    }
    assert len(versions) == 3


def test_noise_belongs_to_prompt_and_seed():
    assert len({noise_seed(prompt, seed) for prompt in ("a", "b") for seed in (0, 1)}) == 4
    assert 0 <= noise_seed("a", 0) < 2**63
