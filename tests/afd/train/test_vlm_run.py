"""The quick start's student against a tiny random Qwen2-VL: whole runs, resumed runs, ranks, and what D learns."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from afd.config import DiscriminatorSection, EncodersSection, VideoSection, VLMSection
from afd.config_file import load_config
from afd.distributed import World, seeded_generator
from afd.models.dct_codec import DCTCodec
from afd.models.vlm_builder import build_pixel_view, build_vlm_discriminator, plan_vlm
from afd.train import discriminators
from afd.train.discriminator_update import score, update_discriminator
from afd.train.discriminator_view import show
from afd.train.discriminators import build_view
from afd.types import Rollout, VideoBatch

SMALL = {"min_pixels": 256, "max_pixels": 1024, "lora_rank": 4, "lora_alpha": 8}
WORKER = Path(__file__).parent / "objectives_worker.py"


def knobs_for(folder: Path) -> dict[str, str]:
    """Overrides for this discriminator; noise, penalty, smoothing and replay are all on."""
    small = {f"discriminator.vlm.{name}": str(value) for name, value in SMALL.items()}
    state = {"discriminator.replay_share": "0.5", "discriminator.vlm.vision": "lora"}
    return {"discriminator.kind": "vlm", "discriminator.vlm.path": str(folder), **small, **state}


def rows_of(output: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time")} for row in rows]


def test_view_decodes_with_the_codec_that_is_loaded_already(vlm_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[DCTCodec] = []

    def load(*_: object, **__: object) -> DCTCodec:
        loaded.append(DCTCodec())
        return loaded[-1]

    monkeypatch.setattr(discriminators, "load_codec", load)
    overrides = [f"{name}={value}" for name, value in knobs_for(vlm_folder).items()]
    config = load_config(WORKER.parents[3] / "configs" / "chunk_wise.yaml", overrides)
    here, codec = World(0, 0, 1, torch.device("cpu")), DCTCodec()
    build_view(config, here, codec=codec)
    assert not loaded, "the evaluator's serves both"
    build_view(config, here)
    assert len(loaded) == 1


@pytest.fixture
def vlm_run(tiny: Any, vlm_folder: Path) -> Any:
    fewer = {"evaluation.every": "0", "evaluation.num_samples": "1", "tracking.mlflow": "false"}
    return replace(tiny, knobs=tiny.knobs | knobs_for(vlm_folder) | fewer)


@pytest.mark.slow
def test_run_with_a_vlm_resumes_exactly_and_only_itself(vlm_run: Any, run: Any, tmp_path: Path) -> None:
    whole, stopped = (replace(vlm_run, output=tmp_path / name) for name in ("whole", "stopped"))
    for each, steps in ((whole, "3"), (stopped, "2"), (stopped, "3")):
        done = run(each.command(num_steps=steps))
        assert done.returncode == 0, done.stderr[-6000:]
    rows = rows_of(whole.output)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows == rows_of(stopped.output), "the resumed run goes on as if nothing had happened"
    assert all(0 <= row["discriminator/accuracy"] <= 1 and row["student/loss"] > 0 for row in rows)
    assert rows[-1]["rollout/score_std"] > 0, "D tells the rollouts apart"
    assert (whole.output / "report.html").is_file()

    engine = whole.output / "checkpoints" / "step_00000003" / "discriminator" / "engine"
    saved = torch.load(engine / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    assert {"score_token", "head.weight", "head.bias"} <= saved.keys()
    assert all(".lora_" in name for name in saved.keys() - {"score_token", "head.weight", "head.bias"})
    assert any(name.startswith("vlm.visual.") for name in saved)

    other = run(whole.command(num_steps="4", discriminator__vlm__fps="4"))
    assert other.returncode == 2
    assert other.stderr.strip().splitlines()[-1].startswith("error: output_dir")
    assert "another VLM" in other.stderr, "frozen weights are read again from where the configuration says"


class PlainEngine:
    """A discriminator with AdamW behind DeepSpeed's calls, in one process."""

    skipped_steps = 0

    def __init__(self, module: nn.Module, *, lr: float, micro: int) -> None:
        self.module, self._micro = module, micro
        self._trained = [each for each in module.parameters() if each.requires_grad]
        self._adam = torch.optim.AdamW(self._trained, lr=lr)

    def __call__(self, clips: Tensor, condition: Tensor) -> Tensor:
        return self.module(clips, condition)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self._grad_norm = float(nn.utils.clip_grad_norm_(self._trained, 1.0))
        self._adam.step()
        self._adam.zero_grad()

    def get_global_grad_norm(self) -> float:
        return self._grad_norm

    def get_lr(self) -> list[float]:
        return [group["lr"] for group in self._adam.param_groups]

    def train_micro_batch_size_per_gpu(self) -> int:
        return self._micro


def pairs_at(step: int) -> tuple[VideoBatch, Rollout]:
    """Four prompts; the teacher's clips are a little brighter than the student's."""
    ids = torch.arange(4) + 4 * step
    real, fake = (
        torch.stack([0.3 * torch.randn(12, 12, 4, 4, generator=seeded_generator(key, int(i))) for i in ids])
        for key in (1, 2)
    )
    real[:, 0] += 0.8  # the first coefficient of the codec is brightness
    prompts = tuple(f"clip {int(i) % 3}" for i in ids)
    embeds = torch.zeros(4, 1, 1)
    return VideoBatch(ids, prompts, real, embeds), Rollout(fake, embeds, ids, ids)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vlm_folder", "vlm25_folder"])
def test_discriminator_learns_to_tell_two_sets_apart(family: str, request: pytest.FixtureRequest) -> None:
    section = VLMSection(path=request.getfixturevalue(family), gradient_checkpointing=False, **SMALL)  # pyright: ignore[reportArgumentType]
    plan = plan_vlm(section, EncodersSection(), VideoSection())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        engine: Any = PlainEngine(build_vlm_discriminator(section, plan, dtype=torch.float32), lr=3e-3, micro=4)
    view = build_pixel_view(section, plan, DCTCodec())
    training = DiscriminatorSection(input_noise=0.02, label_smoothing=0.1, r1_weight=1e-4)
    losses: list[float] = []
    for step in range(40):
        generators = [seeded_generator(3, step, row) for row in range(4)]
        metrics = update_discriminator(engine, *show(view, *pairs_at(step)), training, generators)
        losses.append(metrics["discriminator/loss"].item())
    assert losses[0] == pytest.approx(0.6931, abs=1e-4), "a new head prefers nothing"
    assert sum(losses[-8:]) / 8 < 0.58, "with labels smoothed by 0.1 the least is 0.325"
    unseen = [show(view, *pairs_at(step)) for step in (100, 101, 102)]
    margins = [
        score(engine, teacher.latents, teacher.prompt_embeds) - score(engine, rollout.latents, rollout.prompt_embeds)
        for teacher, rollout in unseen
    ]
    assert (torch.cat(margins) > 0).sum() >= 11, "of 12"
