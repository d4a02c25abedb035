"""One row of the study as a real training run, and its measurement afterwards. Knows no table and no page."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from study_measure import Measurement, measure_student, measure_teacher
from study_rows import FAMILIES, FROZEN_POLICY, METHODS, PACE, STUDY_KEYS, Preset, Row, settings_of
from study_scores import totals
from study_worlds import WorldShards, make_world

from afd.config import RunConfig
from afd.config_file import load_config
from afd.models.encoders import QUICKSTART_ASSETS, student_path
from afd.models.student import CausalStudent
from afd.models.weights import load_student, save_student
from afd.train.builders import prepare_student
from afd.train.commit import list_commits
from afd.train.restore import load_commit, resolve_commit

ROOT = Path(__file__).resolve().parent.parent
FRAME_WISE_BASE = QUICKSTART_ASSETS.parent / "frame_wise" / "student.safetensors"
_JSONS = {"student": "configs/zero3.json", "discriminator": "configs/zero2_discriminator.json"}
_SCORE_RATE = 6e-4  # of what only DMD has: the critic, and its real score's own training


class Interrupted(Exception):
    """The study was asked to stop."""


@dataclass(frozen=True)
class Choice:
    """A student's learning rate, its number of updates, and which average of its weights is measured."""

    learning_rate: float
    updates: int
    average: str = "ema"


@dataclass
class Study:
    """Where the study is written, what it has made so far, and who works for it.

    Attributes:
        preset: sizes.
        out: folder of everything.
        choices: (family, method) -> what the search chose.
        stop: set when the study was asked to stop.
        grounds: family -> the teacher and the base student on the validation prompts.
    """

    preset: Preset
    out: Path
    choices: dict[tuple[str, str], Choice] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)
    _worlds: dict[str, WorldShards] = field(default_factory=dict)
    _teachers: dict[str, Measurement] = field(default_factory=dict)
    grounds: dict[str, tuple[Measurement, dict[str, float]]] = field(default_factory=dict)
    _children: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _makers: defaultdict[str, threading.RLock] = field(default_factory=lambda: defaultdict(threading.RLock))

    def making(self, what: str) -> threading.RLock:
        """The lock under which something shared is made once."""
        with self._lock:
            return self._makers[what]

    def choice(self, family: str, method: str) -> Choice:
        """What to train a method with: its family's search, else another family's, else the preset's middle."""
        rates = self.preset.learning_rates
        default = Choice(rates[len(rates) // 2], self.preset.steps)
        found = [
            self.choices[key] for key in ((family, method), (self.preset.families[0], method)) if key in self.choices
        ]
        return found[0] if found else default

    def world(self, name: str) -> WorldShards:
        """A world's shards, made when first asked for."""
        with self.making(f"world {name}"):
            if name not in self._worlds:
                self._worlds[name] = make_world(name, self.preset, self.out)
            return self._worlds[name]

    def teacher(self, row: Row, config: RunConfig, device: str) -> Measurement:
        """The teacher's own held-out videos of a row's world, measured once."""
        with self.making(f"teacher {row.world}"):
            if row.world not in self._teachers:
                self._teachers[row.world] = measure_teacher(config, self.world(row.world).heldout, device=device)
            return self._teachers[row.world]

    def teacher_values(self, world: str) -> dict[str, float]:
        """What `teacher` measured of a world."""
        return self._teachers[world].values

    def stop_children(self) -> None:
        """Ask every training run to commit and end."""
        self.stop.set()
        with self._lock:
            for child in self._children:
                child.send_signal(signal.SIGTERM)

    def call(self, command: list[str], log: Path, *, gpu: int | None) -> None:
        """Run a command to its end with its output in a file.

        Raises:
            Interrupted: the study was asked to stop.
            RuntimeError: the command failed; names the log.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
        with log.open("ab") as output:
            with self._lock:
                if self.stop.is_set():
                    raise Interrupted
                child = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                )
                self._children.add(child)
            code = child.wait()
            with self._lock:
                self._children.discard(child)
        if self.stop.is_set():
            raise Interrupted
        if code:
            raise RuntimeError(f"{' '.join(command[1:3])} ended with {code}; see {log}")


def ensure_frame_wise_base(study: Study, *, gpu: int | None) -> Path:
    """The frame-wise base student: shipped, or made once by its command."""
    if FRAME_WISE_BASE.is_file():
        return FRAME_WISE_BASE
    folder = study.out / "frame_wise_base"
    with study.making("frame-wise base"):
        if not (folder / "student.safetensors").is_file():
            command = [sys.executable, "-m", "afd.cli", "pretrain", "--config", "configs/frame_wise_base.yaml"]
            study.call([*command, "--out", str(folder)], study.out / "frame_wise_base.log", gpu=gpu)
    return folder / "student.safetensors"


def ensure_real_score(study: Study, row: Row, *, gpu: int | None) -> Path:
    """DMD's real score in a row's world: a bidirectional model (one chunk) fine-tuned on the teacher's videos alone."""
    path = study.out / "real_score" / f"{row.world}.safetensors"
    with study.making(f"real score {row.world}"):
        if not path.is_file():
            _make_real_score(study, row, path, gpu=gpu)
    return path


def _make_real_score(study: Study, row: Row, path: Path, *, gpu: int | None) -> None:
    preset, shards, run = study.preset, study.world(row.world), path.with_suffix("")
    frames = load_config(Path(FAMILIES["chunk_wise"]), list(shards.overrides)).video.num_frames
    overrides = [
        *_data_overrides(shards, is_search=False), *METHODS["sft"], *shards.overrides, f"output_dir={run}",
        f"num_steps={preset.real_score_steps}", f"rollout.group_size={min(2, preset.group_size)}",
        f"student.chunk_frames={frames}", "nft.time_sampling=uniform", *_WATCHING, *preset.extra,
    ]  # fmt: skip
    command = train_command(Path(FAMILIES["chunk_wise"]), write_jsons(study, learning_rate=_SCORE_RATE), overrides)
    study.call(command, run.with_suffix(".log"), gpu=gpu)
    student, _ = load_commit(resolve_commit(run))
    save_student(student, path, dtype=torch.float32, note={"made_by": "benchmarks/study.py"})


_WATCHING = (
    "tracking.mlflow=false", "evaluation.seeds_per_prompt=1", "evaluation.samples_every=0", "evaluation.num_samples=1",
)  # fmt: skip


def _data_overrides(shards: WorldShards, *, is_search: bool) -> list[str]:
    """A run sees training prompts only: its own evaluation is on the validation part of them."""
    train = shards.search_train if is_search else shards.train
    return ["teacher.kind=shards", f"data.train_shards={train}", f"data.heldout_shards={shards.validation}"]


def write_jsons(study: Study, *, learning_rate: float) -> dict[str, Path]:
    """DeepSpeed JSONs of one student learning rate; the discriminator's is the file's own."""
    folder = study.out / "ds"
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, rate in (("student", learning_rate), ("critic", _SCORE_RATE), ("discriminator", None)):
        content = json.loads((ROOT / _JSONS["discriminator" if name == "discriminator" else "student"]).read_text())
        content["train_batch_size"] = study.preset.rollouts
        content["optimizer"]["params"]["lr"] = rate or content["optimizer"]["params"]["lr"]
        paths[name] = folder / (f"{name}_{rate:g}.json" if rate else f"{name}.json")
        temporary = paths[name].with_suffix(f".{threading.get_ident()}")
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        temporary.replace(paths[name])
    return paths


def train_command(config: Path, jsons: Mapping[str, Path], overrides: list[str]) -> list[str]:
    """The training command of one run."""
    first = [sys.executable, "launch/train.py", "--config", str(config), "--ds_config", str(jsons["student"])]
    return [*first, f"discriminator.ds_config={jsons['discriminator']}", *overrides]


@dataclass(frozen=True)
class Plan:
    """A row resolved: what is trained and how it is sampled.

    Attributes:
        config: YAML of its family.
        sampling: overrides that the measurement needs as well.
        training: the remaining overrides; empty for a base row.
        choice: learning rate and updates; None for a base row.
        run: fingerprint of what is trained.
        settings: fingerprint of that and of how it is measured.
    """

    config: Path
    sampling: list[str]
    training: list[str]
    choice: Choice | None
    run: str
    settings: str


def resolve(study: Study, row: Row, world_overrides: tuple[str, ...]) -> Plan:
    """What a row will run; touches nothing."""
    preset, own = study.preset, [each for each in row.overrides if each.partition("=")[0] not in STUDY_KEYS]
    sampling = [*world_overrides, *(each for each in own if each.startswith(("rollout.steps=", "student.")))]
    choice, training = None, list[str]()
    if row.method != "base":
        choice, extra = _of_moving_weights(row, _choice(study, row))
        steps = choice.updates * PACE[row.method]
        training = [
            f"rollout.group_size={preset.group_size}", *METHODS[row.method], *own, f"seed={row.seed}",
            f"num_steps={steps}", f"discriminator.warmup_steps={preset.warmup_steps}",
            "evaluation.every=0", *_commits(preset, row, steps), *_WATCHING, *preset.extra, *extra,
        ]  # fmt: skip
    trained = [*sampling, *training, str(choice and choice.learning_rate), str(row.after)]
    trained += [str((preset.rollouts, preset.search_prompts, preset.validation_prompts))]
    averages = preset.averages if row.table == "search" else (choice.average if choice else "",)
    measured = [*averages, str((preset.heldout_prompts, preset.seeds_per_prompt, preset.long_prompts))]
    prints = settings_of(row, trained), settings_of(row, [*trained, *measured])
    return Plan(Path(FAMILIES[row.family]), sampling, training, choice, *prints)


def _of_moving_weights(row: Row, choice: Choice) -> tuple[Choice, list[str]]:
    """A choice and further overrides. Where the old policy is frozen, `old` is no average of the row's student: the
    same decay under the name `ema` is measured in its place."""
    if choice.average != "old" or FROZEN_POLICY not in row.overrides:
        return choice, []
    decay = load_config(Path(FAMILIES[row.family])).averages.old_policy_decay
    return replace(choice, average="ema"), [f"averages.ema_decay={decay:g}"]


def _choice(study: Study, row: Row) -> Choice:
    if "learning_rate" in row.own:
        return Choice(row.own["learning_rate"], study.preset.steps)
    chosen = study.choice(row.family, row.method)
    return replace(chosen, updates=round(chosen.updates * row.own.get("budget", 1.0)))


def _commits(preset: Preset, row: Row, steps: int) -> tuple[str, ...]:
    """A search run keeps a commit at each of the preset's shares of its steps, another one what resuming takes."""
    if row.table != "search":
        return (f"checkpoint.every={max(1, steps // 3)}",)
    between = round(steps * (1 - (0.0, *preset.step_shares)[-2]))
    return f"checkpoint.every={between}", f"checkpoint.keep={max(2, len(preset.step_shares))}"


def run_folder(study: Study, row: Row, plan: Plan) -> Path:
    """Where a row's run is written: another setting is another folder."""
    return study.out / "runs" / f"{row.id}-{plan.run}"


def start_of(study: Study, row: Row, *, gpu: int | None) -> list[str]:
    """The override that says which student a row starts from; empty for the configuration's own."""
    if row.after is None:
        return [f"student.init_from={ensure_frame_wise_base(study, gpu=gpu)}"] if row.family == "frame_wise" else []
    found = sorted((study.out / "runs").glob(f"{row.after}-*"), key=lambda path: path.stat().st_mtime)
    commits = [commit for path in found for _, commit in list_commits(path / "checkpoints")[:1]]
    if not commits:
        raise RuntimeError(f"{row.id} goes on from {row.after}, which has not run: leave table main in --only")
    return [f"student.init_from={commits[-1]}"]


def train(study: Study, row: Row, plan: Plan, *, gpu: int | None) -> tuple[Path, float]:
    """The row's training run, resumed where it was; its folder and its seconds, start-up included unless it was there
    already."""
    folder = run_folder(study, row, plan)
    if (folder / "evaluation.json").is_file():
        return folder, float(json.loads((folder / "run.json").read_text())["duration_s"])
    assert plan.choice is not None
    shards = study.world(row.world)
    jsons = write_jsons(study, learning_rate=plan.choice.learning_rate)
    overrides = [
        *_data_overrides(shards, is_search=row.table == "search"), *plan.sampling, *plan.training,
        *start_of(study, row, gpu=gpu), f"output_dir={folder}",
    ]  # fmt: skip
    if row.method == "dmd":
        overrides += [f"dmd.real_score={ensure_real_score(study, row, gpu=gpu)}", f"dmd.ds_config={jsons['critic']}"]
    started = time.perf_counter()
    study.call(train_command(plan.config, jsons, overrides), folder.with_name(folder.name + ".log"), gpu=gpu)
    return folder, time.perf_counter() - started


def measure(study: Study, row: Row, plan: Plan, folder: Path | None, *, gpu: int | None) -> dict[str, float]:
    """The row's one look at the held-out prompts; also writes a few clips for the contact sheets."""
    device, config = _device(gpu), _sampler_config(study, row, plan, gpu=gpu)
    if folder is None:
        student = _base_student(config)
    else:
        assert plan.choice is not None
        student, _ = load_commit(resolve_commit(folder), average=plan.choice.average)
    shards, preset = study.world(row.world), study.preset
    teacher = study.teacher(row, config, device)
    found = measure_student(
        student, config, shards.heldout, teacher, seeds=preset.seeds_per_prompt, long_prompts=preset.long_prompts,
        device=device,
    )  # fmt: skip
    found.save_clips(study.out / "clips" / f"{row.id}.npz")
    teacher.save_clips(study.out / "clips" / "teacher" / f"{row.world}.npz")
    if folder is not None:
        for _, commit in list_commits(folder / "checkpoints")[1:]:
            shutil.rmtree(commit)
    return found.values


Look = tuple[int, str, dict[str, float]]


def look(study: Study, row: Row, plan: Plan, folder: Path, *, gpu: int | None) -> list[Look]:
    """A search run's commits on the validation prompts: (step, average, the two totals), oldest first."""
    device, config, shards = _device(gpu), _sampler_config(study, row, plan, gpu=gpu), study.world(row.world)
    how: dict[str, Any] = {"seeds": study.preset.seeds_per_prompt, "long_prompts": 0, "device": device}
    with study.making(f"ground {row.family}"):
        if row.family not in study.grounds:
            teacher = measure_teacher(config, shards.validation, device=device)
            base = measure_student(_base_student(config), config, shards.validation, teacher, **how)
            study.grounds[row.family] = teacher, base.values
    teacher, base = study.grounds[row.family]
    found = []
    for step, commit in reversed(list_commits(folder / "checkpoints")[: len(study.preset.step_shares)]):
        for average in study.preset.averages:
            student, _ = load_commit(commit, average=average)
            values = measure_student(student, config, shards.validation, teacher, **how).values
            found.append((step, average, totals(values, base, teacher.values)))
    return found


def _device(gpu: int | None) -> str:
    return "cpu" if gpu is None else f"cuda:{gpu}"


def _sampler_config(study: Study, row: Row, plan: Plan, *, gpu: int | None) -> RunConfig:
    """What a row's student samples with."""
    return load_config(plan.config, [*plan.sampling, *start_of(study, row, gpu=gpu)])


def _base_student(config: RunConfig) -> CausalStudent:
    student = load_student(student_path(config.student), config=config.student.model_dump())
    return prepare_student(student, config)


def describe_device(gpu: int | None) -> str:
    """What a row ran on."""
    return f"CPU, {os.cpu_count()} cores" if gpu is None else torch.cuda.get_device_name(gpu)


def commit_name() -> str:
    """This checkout's commit."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def as_cells(values: Mapping[str, float], names: tuple[str, ...]) -> dict[str, str]:
    """Numbers as they go into the CSV; what is undefined is empty."""
    known = {name: values.get(name, math.nan) for name in names}
    return {name: "" if math.isnan(value) else f"{value:.6g}" for name, value in known.items()}
