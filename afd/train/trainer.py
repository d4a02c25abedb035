"""The run: a loop over steps that measures, saves, and leaves a report. The step itself is objectives.py's."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from afd.config import LRSchedule, RunConfig
from afd.config_file import dump_config
from afd.data.live_loader import LiveLoader
from afd.data.loader import read_all, to_batch
from afd.distributed import World, all_reduce_max
from afd.evaluation.heldout import HeldoutEvaluator, Summary, without_nan
from afd.evaluation.report import build_report
from afd.evaluation.samples import write_samples
from afd.live import build_train_loader
from afd.models.encoders import VideoCodec
from afd.models.weights.sources import CONFIG
from afd.preparation import shard_places
from afd.stopping import StopRequest, Watchdog
from afd.tracking import Tracker
from afd.train.averaging import ParameterAverage
from afd.train.checkpoint import load_checkpoint, save_checkpoint
from afd.train.dmd_objective import dmd_step
from afd.train.engines import gathered
from afd.train.gan_objective import gan_step
from afd.train.learning_rate import lr_factor, set_lr
from afd.train.objectives import Roles, StepTimer, afd_step, warmup_step
from afd.train.preflight import RunPlan
from afd.train.probe import DiscriminatorProbe, make_probe_set
from afd.train.sft_objective import sft_step
from afd.types import VideoBatch

logger = logging.getLogger(__name__)
_STEPS = {"afd": afd_step, "sft": sft_step, "gan": gan_step, "dmd": dmd_step}


class Trainer:
    """One run from its roles to its report; every method is called by all ranks."""

    def __init__(
        self,
        config: RunConfig,
        plan: RunPlan,
        roles: Roles,
        tracker: Tracker,
        *,
        codec: VideoCodec,
        world: World,
        stop: StopRequest | None = None,
    ) -> None:
        """codec: of the student's latents; stop: signals to heed between two steps, None heeds none."""
        self.config, self.plan, self.roles, self.tracker, self.world = config, plan, roles, tracker, world
        self.step = 0  # student steps done
        self.is_stopped = False
        self._stop = stop or StopRequest()
        self._watchdog = Watchdog(config.stopping.hang_after_s)
        self._warmup: list[dict[str, float]] = []  # the discriminator's steps before the student's first
        self._saved = (0, 0)  # (warm-up steps, steps) on disk
        self.evaluation: dict[str, Summary] = {}
        self.loader = build_train_loader(config, batch_size_per_rank=plan.prompts_per_rank, world=world)
        heldout_shards, heldout_remote = shard_places(config)[1]
        self.evaluator = HeldoutEvaluator(
            to_batch(read_all(heldout_shards, remote=heldout_remote, limit=config.evaluation.max_prompts)).to(
                world.device
            ),
            codec,
            config,
            world,
            rollout_batch=min(config.rollout.batch_size or plan.student_batch[1], plan.rollouts // plan.world_size),
        )
        self._samples: dict[str, np.ndarray] = {}
        self._probe: DiscriminatorProbe | None = None
        self._earlier_probe: Any = None  # read from a commit

    @property
    def _averages(self) -> dict[str, ParameterAverage]:
        return {"old": self.roles.old, "ema": self.roles.ema, "reference": self.roles.reference}

    @property
    def _fixed(self) -> dict[str, ParameterAverage]:
        """What objective dmd reads from its file at every start: no commit holds it."""
        return {} if self.roles.real_score is None else {"real_score": self.roles.real_score}

    @property
    def _engines(self) -> dict[str, Any]:
        """By role, those that the objective has."""
        roles = self.roles
        engines = {"student": roles.student, "discriminator": roles.discriminator, "critic": roles.critic}
        return {name: engine for name, engine in engines.items() if engine is not None}

    def run(self, facts: dict[str, Any], *, resume_from: Path | None = None) -> Path | None:
        """Train to the configured number of steps.

        Args:
            facts: where and with what the run is made; goes to run.json with the duration, unless nothing was left
                to do: then the finished run's own facts stay.
            resume_from: the verified commit to go on from; None starts at step 0.
        Returns:
            The report's path on rank 0; None also when the run was asked to stop: then `is_stopped` is True and
            what was done is committed.
        """
        started = time.perf_counter()
        if resume_from is not None:
            self._resume(resume_from)  # may refuse: what is there stays as it is
        first = self.step
        if self.world.is_main:
            (self.config.output_dir / CONFIG).write_text(dump_config(self.config))
        try:
            self._train()
        finally:
            self._watchdog.stop()
        if self._must_stop():
            self._save()
            return None
        if first:
            facts = {**facts, "resumed_at_step": first}
        facts = {**facts, "duration_s": round(time.perf_counter() - started, 1)}
        is_old_news = self.step == first and (self.config.output_dir / "run.json").is_file()
        return self._finish(None if is_old_news else facts)

    def _train(self) -> None:
        """Everything up to the last step, or to the boundary at which the run was asked to stop."""
        if "base" not in self.evaluation:
            self.evaluation["teacher"] = self.evaluator.evaluate_teacher()
            self.evaluation["base"] = self._evaluate(self.roles.reference)
        if self.step == 0 and self.config.has_discriminator:
            self._warm_up()
        self._start_probe()
        for step in self._steps(self.step, self.config.num_steps, "AFD"):
            metrics = self._train_step(step)
            self.step = step + 1
            self.tracker.log(self.step, metrics | self._probe_at_intervals() | self._evaluate_at_intervals())
            self._write_at_intervals()

    def _must_stop(self) -> bool:
        """Whether any rank was asked to stop: the same answer on all of them, because they ask at the same step."""
        if not self.is_stopped:
            asked = torch.tensor(int(self._stop.is_requested), device=self.world.device)
            self.is_stopped = bool(all_reduce_max(asked).item())
        return self.is_stopped

    def _warm_up(self) -> None:
        """Discriminator-only steps; their curve goes to warmup.jsonl, the student's steps start at 1 after them."""
        rows = self._warmup
        for step in self._steps(len(rows), self.config.discriminator.warmup_steps, "discriminator warm-up"):
            metrics = warmup_step(
                self.roles, self._next_batch(), self.config, step, world=self.world, timer=StepTimer()
            )
            rows.append({"step": step + 1, **_to_floats(metrics)})
        if self.world.is_main:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (self.config.output_dir / "warmup.jsonl").write_text(text)

    def _set_learning_rates(self, step: int) -> None:
        """The step's own; engines with a scheduler in their JSON and a constant schedule here are left alone."""
        section, num_steps = self.config.discriminator, self.config.num_steps
        if self.config.student.lr_schedule != LRSchedule():
            set_lr(self.roles.student, lr_factor(self.config.student.lr_schedule, step, num_steps))
        discriminator = self.roles.discriminator
        if discriminator is not None and (section.lr_scale != 1.0 or section.lr_schedule != LRSchedule()):
            set_lr(discriminator, section.lr_scale * lr_factor(section.lr_schedule, step, num_steps))

    def _train_step(self, step: int) -> dict[str, float]:
        timer = StepTimer()
        start = time.perf_counter()
        self._set_learning_rates(step)
        with timer.phase("data"):
            batch = self._next_batch()
        seeded_step = self.config.discriminator.warmup_steps + step
        one_step = _STEPS[self.config.objective]
        metrics = one_step(self.roles, batch, self.config, seeded_step, world=self.world, timer=timer)
        floats = _to_floats(metrics)  # the step's only device synchronisation for logging
        live = self.loader.metrics() if isinstance(self.loader, LiveLoader) else {}
        return {**floats, **live, **timer.seconds, "time/step_s": time.perf_counter() - start}

    def _next_batch(self) -> VideoBatch:
        return next(self.loader).to(self.world.device)

    def _evaluate_at_intervals(self) -> dict[str, float]:
        """Held-out means for the step's own record: one object per step in metrics.jsonl."""
        every = self.config.evaluation.every
        if not every or self.step % every or self.step == self.config.num_steps:
            return {}
        means = {name: value["mean"] for name, value in self._evaluate(self.roles.ema).items()}
        return {f"eval/{name}": mean for name, mean in means.items() if mean == mean}  # JSON has no NaN

    def _start_probe(self) -> None:
        """Make the probe set and measure it before the student's first step, unless that was done before a resume."""
        num_pairs, discriminator = self.config.discriminator.probe_pairs, self.roles.discriminator
        if not num_pairs or discriminator is None or self._must_stop():
            return
        pairs = make_probe_set(self.roles, self.evaluator, num_pairs=num_pairs, world=self.world)
        self._probe = DiscriminatorProbe(pairs, self._earlier_probe)
        if self._probe.first is None:
            self._probe.measure(discriminator, self.world.device)

    def _probe_at_intervals(self) -> dict[str, float]:
        """The discriminator on its probe set, after the first step and every few."""
        discriminator = self.roles.discriminator
        if self._probe is None or discriminator is None:
            return {}
        if self.step > 1 and self.step % self.config.discriminator.probe_every:
            return {}
        return self._probe.measure(discriminator, self.world.device)

    def _write_at_intervals(self) -> None:
        samples_every, commit_every = self.config.evaluation.samples_every, self.config.checkpoint.every
        is_last = self.step == self.config.num_steps
        if samples_every and self.step % samples_every == 0 and not is_last:
            self._write_samples()
        if is_last or (commit_every and self.step % commit_every == 0):
            self._save()

    def _evaluate(self, average: ParameterAverage) -> Summary:
        with average.applied(), gathered(self.roles.student) as student:
            return self.evaluator.evaluate(student)

    def _write_samples(self) -> None:
        """Teacher, base and student on the first held-out prompts; ranks sample the same clips, rank 0 writes them."""
        count = min(self.config.evaluation.num_samples, len(self.evaluator.batch.prompts))
        rows = [(row, 0) for row in range(count)]
        if not self._samples:
            self._samples["teacher"] = self.evaluator.decode(self.evaluator.batch.latents[:count])
            self._samples["base"] = self._sample(self.roles.reference, rows)
        self._samples["student"] = self._sample(self.roles.ema, rows)
        if self.world.is_main:
            folder = self.config.output_dir / "samples" / f"step_{self.step:06d}"
            prompts = list(self.evaluator.batch.prompts[:count])
            sheet = write_samples(folder, prompts, self._samples, fps=self.config.video.fps)
            self.tracker.log_artifact(sheet)

    def _sample(self, average: ParameterAverage, rows: list[tuple[int, int]]) -> np.ndarray:
        with average.applied(), gathered(self.roles.student) as student:
            return self.evaluator.decode(self.evaluator.sample(student, rows))

    def _save(self) -> None:
        """Commit what was done, unless it is on disk already."""
        now = (len(self._warmup), self.step)
        if now == self._saved:
            return
        state = {
            "loader": self.loader.state_dict(),
            "step": self.step,
            "evaluation": self.evaluation,
            "replay": self.roles.replay.state_dict(),
            "warmup": self._warmup if self.step == 0 else [],
            "probe": None if self._probe is None else self._probe.state_dict(),
        }
        save_checkpoint(
            self.config.output_dir / "checkpoints",
            self.step,
            engines=self._engines,
            averages=self._averages,
            state=state,
            config=dump_config(self.config),
            weights_metadata={"student_shape": self.plan.shape.model_dump_json()},
            fixed=self._fixed,
            keep=self.config.checkpoint.keep,
            replaces=self.step == self._saved[1] == 0,  # a warm-up that was stopped before
        )
        self._saved = now

    def _resume(self, commit: Path) -> None:
        restored = load_checkpoint(
            commit,
            engines=self._engines,
            averages=self._averages,
            is_verified=True,
            unread=("discriminator",),
            fixed=self._fixed,
        )
        self.loader.load_state_dict(restored.state["loader"])
        self.step = restored.state["step"]
        self.evaluation = restored.state["evaluation"]
        self.roles.replay.load_state_dict(restored.state["replay"])
        self._warmup = restored.state.get("warmup", [])  # absent in commits made before a warm-up could stop
        self._earlier_probe = restored.state.get("probe")  # absent in commits made before there was a probe
        self._saved = (len(self._warmup), self.step)
        if self.world.is_main:
            logger.info("resumed from %s at step %d", commit, self.step)

    def _finish(self, facts: dict[str, Any] | None) -> Path | None:
        """Final measurement, samples, evaluation.json, and the report."""
        self.evaluation["student"] = self._evaluate(self.roles.ema)
        self._write_samples()
        if not self.world.is_main:
            return None
        output = self.config.output_dir
        if facts is not None:
            (output / "run.json").write_text(json.dumps(facts, indent=2) + "\n")
        measured = {"step": self.step, "weights": "ema", **without_nan(self.evaluation)}
        (output / "evaluation.json").write_text(json.dumps(measured, indent=2) + "\n")
        report = build_report(output)
        for path in (output / "evaluation.json", report):
            self.tracker.log_artifact(path)
        return report

    def _steps(self, start: int, stop: int, label: str) -> Iterator[int]:
        """Steps with a progress bar, until one is asked to stop."""
        steps = range(start, stop)
        for step in tqdm(steps, initial=start, total=stop, desc=label, unit="step", disable=not self.world.is_main):
            self._watchdog.step()
            if self._must_stop():
                return
            yield step


def _to_floats(metrics: dict[str, Tensor]) -> dict[str, float]:
    values = torch.stack([value.float() for value in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))
