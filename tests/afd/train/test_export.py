"""Students leave in diffusers' format and in the original names, and come back bit by bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from afd.cli import main
from afd.config import RunConfig, StudentShape
from afd.config_file import dump_config, load_config
from afd.models.lora import add_lora
from afd.models.student import CausalStudent
from afd.models.weights import diffusers_name, load_student, save_student
from afd.models.weights.exporting import export_diffusers
from afd.models.weights.loading import open_student
from afd.rollout import SamplerTimes, rollout, sampler_times
from afd.train.commit import list_files, persist_files, write_manifest
from afd.train.model_card import write_card
from afd.train.restore import load_commit

REFERENCE = Path(__file__).parents[2] / "data" / "self_forcing_tiny.safetensors"
TIMES = SamplerTimes((1.0, 0.9375, 0.625))
EVALUATED = {"base": {"sharpness": {"mean": 0.25, "sem": 0, "n": 2}}}
TOLERANCE = 2e-5  # float32, three steps and three chunks


def tiny(**changes: Any) -> CausalStudent:
    """A random student of Wan's structure."""
    shape = {"in_channels": 16, "out_channels": 16, "patch_size": (1, 2, 2), "num_layers": 2, "ffn_dim": 72}
    shape |= {"head_dim": 16, "text_len": 7, "text_dim": 20, "chunk_frames": 2}
    torch.manual_seed(0)
    student = CausalStudent(StudentShape(**shape | changes))
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1) / 2, std=0.2)
    return student.requires_grad_(False).eval()


def config_for(**student: Any) -> RunConfig:
    """A run's configuration with a three-step sampler."""
    rollout = {"steps": [1000, 750, 250], "shift": 5.0}
    return RunConfig.model_validate({"rollout": rollout, "student": student})


def write_commit(run: Path, student: CausalStudent, average: dict[str, Tensor], config: RunConfig) -> Path:
    """A commit as far as weights go, with its manifest, in a run that has been evaluated."""
    commit = run / "checkpoints" / "step_00000003"
    save_student(student, commit / "student.safetensors", dtype=torch.float32, note={})
    (commit / "averages").mkdir()
    save_file(average, commit / "averages" / "ema.safetensors")
    (commit / "config.yaml").write_text(dump_config(config))
    body = {"format": 1, "step": 3, "world_size": 1, "models": {}, "averages": ["ema"], "versions": {"torch": "2"}}
    write_manifest(commit, body | {"files": persist_files(commit, list_files(commit))})
    (commit.parent / "latest").write_text(commit.name)
    (run / "evaluation.json").write_text(json.dumps({"step": 3, "weights": "ema", **EVALUATED}))
    (run / "run.json").write_text(json.dumps({"commit": "abc123"}))
    return commit


def noise_for(times: SamplerTimes, frames: int) -> tuple[Tensor, Tensor]:
    """Noise of two videos and a prompt shorter than text_len."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, times.num_noises, 16, frames, 4, 6, generator=generator)
    return noise, torch.randn(2, 5, 20, generator=generator)


def sampled(folder: Path, noise: Tensor, prompt: Tensor) -> Tensor:
    """Latents of the exported pipeline, loaded as a stranger would."""
    from diffusers import DiffusionPipeline

    pipe: Any = DiffusionPipeline.from_pretrained(str(folder), custom_pipeline=str(folder), trust_remote_code=True)
    return pipe(prompt_embeds=prompt, noise=noise, output_type="latent").frames


@pytest.fixture(autouse=True)
def _modules_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers copies custom pipelines into a cache: not into the user's."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("hf")))


def export(source: Path, out: Path, *arguments: str) -> int:
    return main(["export", "--checkpoint", str(source), "--out", str(out), *arguments])


@pytest.mark.parametrize("which", ["average", "raw"])
def test_a_run_leaves_as_a_diffusers_folder_and_samples_alike(tmp_path: Path, which: str) -> None:
    from diffusers import WanTransformer3DModel

    student = tiny()
    averaged = {name: tensor + 0.01 for name, tensor in student.state_dict().items()}
    config = config_for()
    write_commit(tmp_path / "run", student, averaged, config)
    out = tmp_path / "out"
    assert export(tmp_path / "run", out, "--weights", which) == 0
    expected = averaged if which == "average" else student.state_dict()
    model = WanTransformer3DModel.from_pretrained(out)
    again = WanTransformer3DModel.from_pretrained(out, subfolder="transformer")
    back, part = load_student(out), load_student(out / "transformer")
    assert back.shape == student.shape
    for name, tensor in expected.items():
        for loaded in (model, again, back, part):
            assert torch.equal(loaded.state_dict()[name], tensor), name
    noise, prompt = noise_for(sampler_times(config.rollout), 6)
    ours = rollout(back.eval(), prompt, noise, sampler_times(config.rollout))
    torch.testing.assert_close(sampled(out, noise, prompt), ours, rtol=0, atol=TOLERANCE)
    card = (out / "README.md").read_text()
    for text in (
        "pipeline_tag: text-to-video",
        "- code: abc123",
        "| sharpness | 0.25 |" if which == "average" else "## Metrics\n\nThis commit was not evaluated.",
        "- training steps: 3",
        "shift: 5.0",
    ):
        assert text in card
    assert f"- which: {which}" in card
    assert not [file for file in out.rglob("*") if file.suffix in (".pt", ".bin", ".pkl")]


@pytest.mark.parametrize(
    ("evaluated", "weights", "num_steps", "is_shown"),
    [
        ({"step": 3, "weights": "ema"}, "average", 240, True),
        ({"step": 3, "weights": "ema"}, "raw", 240, False),
        ({"step": 4, "weights": "ema"}, "average", 3, False),
        ({}, "average", 3, True),  # made before the step was written beside it
        ({}, "raw", 3, False),
        ({}, "average", 4, False),
    ],
)
def test_the_card_shows_metrics_of_these_very_weights_only(
    tmp_path: Path, evaluated: dict[str, Any], weights: str, num_steps: int, is_shown: bool
) -> None:
    student = tiny()
    config = config_for().model_copy(update={"num_steps": num_steps})
    commit = write_commit(tmp_path / "run", student, student.state_dict(), config)
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps({**evaluated, **EVALUATED}))

    def card() -> str:
        return write_card(commit, student.shape, weights=weights, lora=None, config=config, commit=commit)

    table = "| held-out mean | base |\n|---|---|\n| sharpness | 0.25 |"
    expected = table if is_shown else "This commit was not evaluated."
    assert f"## Metrics\n\n{expected}\n\n## Configuration" in card()
    shutil.copytree(commit, commit.with_name("step_00000004"))
    assert ("| sharpness" in card()) == (is_shown and bool(evaluated)), "an older commit, of which nothing is known"


@pytest.mark.parametrize(
    ("shape", "times", "frames"),
    [
        ({"chunk_frames": 1, "window_frames": 2, "sink_frames": 1}, TIMES, 6),
        ({"chunk_frames": 3, "window_frames": 4, "sink_frames": 2}, TIMES, 12),
        (
            {"chunk_frames": 2, "first_chunk_frames": 1, "window_frames": 3},
            SamplerTimes((1.0, 0.5), (1.0, 0.7, 0.2)),
            7,
        ),
        ({"chunk_frames": 2, "numerics": "diffusers"}, SamplerTimes((1.0, 0.5), context_noise=0.1), 6),
    ],
)
def test_the_pipeline_follows_every_family(
    tmp_path: Path, shape: dict[str, Any], times: SamplerTimes, frames: int
) -> None:
    student = tiny(**shape)
    save_student(student, tmp_path / "s.safetensors", dtype=torch.float32, note={})
    file = open_student(tmp_path / "s.safetensors")
    first = times.first_chunk_times
    sampling = {
        "steps": [1000 * t for t in times.times],
        "first_chunk_steps": None if first is None else [1000 * t for t in first],
        "shift": 1.0,
        "context_noise": times.context_noise,
    }
    export_diffusers(
        file.source.tensors, file.shape, tmp_path / "out", sampling=sampling, card="", max_shard_bytes=20_000
    )
    assert len(list((tmp_path / "out" / "transformer").glob("*-of-*.safetensors"))) > 3
    noise, prompt = noise_for(times, frames)
    ours = rollout(student, prompt, noise, times)
    torch.testing.assert_close(sampled(tmp_path / "out", noise, prompt), ours, rtol=0, atol=TOLERANCE)


def lora_run(run: Path) -> CausalStudent:
    """A run that trained adapters; the student with its averaged ones."""
    student = tiny()
    add_lora(student, rank=3, alpha=6, targets=("to_q", "ffn.net.2"))
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape) / 10
    averaged = {name: p.detach() * 2 for name, p in student.named_parameters() if p.requires_grad}
    lora = {"rank": 3, "alpha": 6, "targets": ["to_q", "ffn.net.2"]}
    commit = write_commit(run, student, averaged, config_for(lora=lora))
    return load_commit(commit)[0]


def test_adapters_leave_merged_or_for_peft(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel
    from peft import PeftModel

    student = lora_run(tmp_path / "run")
    noise, prompt = noise_for(TIMES, 2)
    t = torch.full((2, 2), 0.5)
    expected = student(noise[:, 0], t, prompt)
    assert export(tmp_path / "run", tmp_path / "merged") == 0
    merged = load_student(tmp_path / "merged")
    torch.testing.assert_close(merged(noise[:, 0], t, prompt), expected, rtol=0, atol=TOLERANCE)
    assert export(tmp_path / "run", tmp_path / "separate", "--lora", "separate") == 0
    base = load_student(tmp_path / "separate")
    assert not torch.allclose(base(noise[:, 0], t, prompt), expected, atol=1e-3)
    transformer = WanTransformer3DModel.from_pretrained(tmp_path / "separate")
    adapted: Any = PeftModel.from_pretrained(transformer, str(tmp_path / "separate" / "lora")).merge_and_unload()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(adapted.state_dict()[name], tensor, rtol=0, atol=1e-6, msg=name)
    both = load_student(tmp_path / "separate" / "lora", config={"init_base": tmp_path / "separate"})
    for name, tensor in merged.state_dict().items():
        assert torch.equal(both.state_dict()[name], tensor), name
    assert "PeftModel" in (tmp_path / "separate" / "README.md").read_text()


def test_merging_into_a_wider_dtype_keeps_what_the_bases_would_round_away(tmp_path: Path) -> None:
    weight, generator = torch.ones(4, 4, dtype=torch.bfloat16), torch.Generator().manual_seed(0)
    down, up = (1e-2 * torch.randn(shape, generator=generator) for shape in ((2, 4), (4, 2)))
    student = tiny().bfloat16()
    tensors = dict(student.state_dict()) | {"blocks.0.attn1.to_q.weight": weight.repeat(8, 8)}
    down, up = down.repeat(1, 8), up.repeat(8, 1)
    tensors |= {"blocks.0.attn1.to_q.lora_A.default.weight": down, "blocks.0.attn1.to_q.lora_B.default.weight": up}
    save_file(tensors, tmp_path / "s.safetensors")
    fields = ("--student", "num_heads=2", "text_len=7", "chunk_frames=2", "init_lora_alpha=2")
    kept: dict[str, Tensor] = {}
    for dtype in ("keep", "float32"):
        out = tmp_path / f"{dtype}.safetensors"
        assert main(["convert", str(tmp_path / "s.safetensors"), "--out", str(out), "--dtype", dtype, *fields]) == 0
        kept[dtype] = load_file(out)["blocks.0.attn1.to_q.weight"]
    assert torch.equal(kept["keep"], weight.repeat(8, 8)), "updates of 1e-4 are below the grid at 1"
    torch.testing.assert_close(kept["float32"], 1 + up @ down, rtol=0, atol=1e-7)
    assert kept["float32"].dtype == torch.float32


def test_the_original_names_come_back_bit_by_bit(tmp_path: Path) -> None:
    original = {n[len("weight.") :]: w for n, w in load_file(REFERENCE).items() if n.startswith("weight.")}
    given = {f"model.{name}": tensor.bfloat16() for name, tensor in original.items()}
    torch.save({"generator_ema": given}, tmp_path / "theirs.pt")
    fields = ("--student", "num_heads=2", "text_len=8", "chunk_frames=1")
    assert main(["convert", str(tmp_path / "theirs.pt"), "--out", str(tmp_path / "ours.safetensors"), *fields]) == 0
    converted = load_file(tmp_path / "ours.safetensors")
    assert {name: tensor.dtype for name, tensor in converted.items()} == dict.fromkeys(converted, torch.bfloat16)
    shape = load_student(tmp_path / "ours.safetensors").shape
    assert (shape.num_heads, shape.text_len, shape.chunk_frames) == (2, 8, 1)
    assert export(tmp_path / "ours.safetensors", tmp_path / "back.pt", "--format", "original") == 0
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == {"generator", "generator_ema"}
    for state in back.values():
        assert state.keys() == given.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in given.items())
    assert (tmp_path / "back.pt").stat().st_size < 1.5 * (tmp_path / "theirs.pt").stat().st_size
    assert export(tmp_path / "back.pt", tmp_path / "back.safetensors", "--format", "original", *fields) == 0
    bare = load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(bare[name.removeprefix("model.")], tensor) for name, tensor in given.items())
    # Through a diffusers folder and back.
    family = tmp_path / "family.yaml"
    family.write_text(dump_config(load_config(Path("configs/chunk_wise.yaml"))))
    source = tmp_path / "ours.safetensors"
    assert export(source, tmp_path / "folder", "--config", str(family)) == 0
    assert export(tmp_path / "folder", tmp_path / "again.pt", "--format", "original") == 0
    again = torch.load(tmp_path / "again.pt", weights_only=True)["generator"]
    assert all(torch.equal(again[name], tensor) for name, tensor in given.items())
    for name in given:
        assert diffusers_name(name) in converted


@pytest.mark.parametrize("image", [{"image_dim": 12}, {"image_dim": 12, "image_tokens": 10}])
def test_image_to_video_students_go_round_bit_by_bit(tmp_path: Path, image: dict[str, int]) -> None:
    """A diffusers folder, the original's names, our safetensors, and the folder again."""
    from diffusers import WanTransformer3DModel

    student = tiny(in_channels=36, **image)
    save_student(student, tmp_path / "s.safetensors", dtype=torch.float32, note={})
    config = tmp_path / "family.yaml"
    config.write_text("rollout: {steps: [1000, 500], shift: 5.0}\n")
    fields = ("--student", "num_heads=2", "text_len=7", "chunk_frames=2")
    assert export(tmp_path / "s.safetensors", tmp_path / "one", "--config", str(config)) == 0
    assert export(tmp_path / "one", tmp_path / "o.pt", "--format", "original") == 0
    names = torch.load(tmp_path / "o.pt", weights_only=True)["generator"].keys()
    assert {"model.img_emb.proj.1.weight", "model.blocks.1.cross_attn.norm_k_img.weight"} <= names
    assert ("model.img_emb.emb_pos" in names) == ("image_tokens" in image)
    assert main(["convert", str(tmp_path / "o.pt"), "--out", str(tmp_path / "c.safetensors"), *fields]) == 0
    assert export(tmp_path / "c.safetensors", tmp_path / "two", "--config", str(config)) == 0
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "two").state_dict()
    assert loaded.keys() == student.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in student.state_dict().items())
    assert "pipeline_tag: image-to-video" in (tmp_path / "two" / "README.md").read_text()


def test_a_commit_leaves_raw_and_averaged(tmp_path: Path) -> None:
    student = tiny()
    averaged = {name: tensor + 1 for name, tensor in student.state_dict().items()}
    write_commit(tmp_path / "run", student, averaged, config_for())
    assert export(tmp_path / "run", tmp_path / "o.pt", "--format", "original") == 0
    for key, expected in (("generator", student.state_dict()), ("generator_ema", averaged)):
        loaded = load_student(
            tmp_path / "o.pt",
            config={"num_heads": 2, "text_len": 7, "init_weights": "raw" if key == "generator" else "average"},
        )
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in expected.items())
    assert export(tmp_path / "run", tmp_path / "h", "--dtype", "bfloat16") == 0
    assert load_student(tmp_path / "h", dtype=torch.bfloat16).state_dict()["proj_out.bias"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "original", "--out", "x.zip"], "--out must end in .pt or .safetensors"),
        (["--out", "."], "must be a new or empty folder"),
        (["--lora", "separate"], "--lora separate needs adapters"),
        (["--components", "."], "must be a diffusers pipeline folder"),
        (["--student", "chunk_frames=0"], "chunk_frames"),
        (["--student", "num_layers=30"], "student.num_layers must be 2"),
        (["--student", "num_layers"], "override must read section.field=value, got 'student.num_layers'"),
    ],
)
def test_wrong_exports_are_refused(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_commit(tmp_path / "run", tiny(), dict(tiny().state_dict()), config_for())
    assert main(["export", "--checkpoint", "run", "--out", "new", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_damaged_commit_and_an_unknown_sampler_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = tiny()
    commit = write_commit(tmp_path / "run", student, dict(student.state_dict()), config_for())
    weights = commit / "averages" / "ema.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert export(tmp_path / "run", tmp_path / "out") == 2
    assert "is damaged: it is not what its manifest says" in capsys.readouterr().err
    save_student(student, tmp_path / "s.safetensors", dtype=torch.float32, note={})
    assert export(tmp_path / "s.safetensors", tmp_path / "out") == 2
    assert "--config must name the configuration whose sampler" in capsys.readouterr().err
