"""What the study runs: families, methods, worlds, and the table of rows of each preset. Starts nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

FAMILIES = {"chunk_wise": "configs/chunk_wise.yaml", "frame_wise": "configs/frame_wise.yaml"}
"""A Self-Forcing-like student, three frames at a time, and a Causal-Forcing-like one, frame by frame with more steps
for the first frame."""

METHODS = {
    "sft": ("objective=sft", "rollout.group_size=2"),  # twice as many different videos a step cost nothing
    "gan": ("objective=gan",),
    "dmd": ("objective=dmd", "dmd.critic_steps=2"),
    "afd": ("objective=afd",),
}
"""Overrides of each method."""
PACE = {"sft": 1, "gan": 1, "dmd": 2, "afd": 1}
"""Steps to a student update: a DMD step moves the student every second time."""

_LIKE_THE_BASE = tuple(
    f"teacher.physics.{pair}" for pair in ("supersample=3", "soft_edge=0", "shading=false", "noise=0", "crf=4")
)
WORLDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "20_videos": ("teacher.num_prompts=20",),
    "2000_videos": ("teacher.num_prompts=1000", "teacher.videos_per_prompt=2"),
    "no_mismatch": _LIKE_THE_BASE,
    "frame_rate": (*_LIKE_THE_BASE, "teacher.physics.fps=10"),
    "codec": (*_LIKE_THE_BASE, "teacher.physics.crf=38"),
    "one_video_a_prompt": ("teacher.physics.spread=0",),
    "half_spread": ("teacher.physics.spread=0.5",),
    "long": ("video.num_frames=36", "teacher.physics.duration_s=4.5"),
    "weak_gravity": ("teacher.physics.gravity=0.33",),
}
"""Teachers that differ from the quick start's in one thing each. `no_mismatch` draws balls as the base student's own
videos do; `frame_rate` and `codec` add one fault to that, and the default world adds another renderer."""

FROZEN_POLICY = "averages.old_policy_decay=1"
_TERMINAL, _FOUR_STEPS = "nft.time_sampling=terminal", "rollout.steps=[1000, 750, 500, 250]"
ABLATIONS = {
    "frozen D": ("discriminator.lr_scale=0",),
    "off-policy": (FROZEN_POLICY,),
    "terminal only": (_TERMINAL,),
    "current policy": ("rollout.policy=current",),
    "plain loss": ("nft.variant=plain",),
    "min-max": ("nft.normalise_by=minmax",),
    "GAN loss for D": ("discriminator.loss=gan",),
    "four steps": (_FOUR_STEPS,),
    "four steps terminal only": (_FOUR_STEPS, _TERMINAL),
}
"""What is taken from AFD. The last two: credit where the last denoising step is a quarter of them, not half."""
_CELL_OF = {"four steps": "steps a chunk 4", "four steps terminal only": "steps a chunk 4"}
"""Label -> the regime whose base student it is compared with, of the first family; the others' is the default."""
D_LR = {"low": 0.2, "x2": 2.0, "high": 10.0}
"""Multiples of the discriminator's learning rate once the student moves; 1 is the main table's AFD, 0 the frozen D."""

_AFTER_SFT = "after SFT"
BEYOND = {
    "coupled 0.5": ("nft.noise_coupling=0.5",),
    "coupled 0.9": ("nft.noise_coupling=0.9",),
    "uniform times": ("nft.time_sampling=uniform",),
    "logit-normal times": ("nft.time_sampling=logit_normal",),
    "groups of 2": ("rollout.group_size=2",),
    "groups of 16": ("rollout.group_size=16",),
    "backbone D": ("discriminator.kind=backbone",),
    "two windows": ("discriminator.clip_frames=6", "discriminator.num_clips=2"),
    "clip 2": ("nft.advantage_clip=2",),
    "clip 1": ("nft.advantage_clip=1",),
    _AFTER_SFT: (),
}
"""What could make AFD better and is not in the paper."""
_IN_BOTH_FAMILIES = (_AFTER_SFT, "clip 2", "clip 1", "groups of 16")

STUDY_KEYS = ("learning_rate", "budget")
"""Overrides that the study reads itself (`Row.own`): the student's rate, and a multiple of the search's updates."""

REGIMES: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "teacher videos": {"20": ("20_videos", ()), "200": ("default", ()), "2000": ("2000_videos", ())},
    "steps a chunk": {
        "1": ("default", ("rollout.steps=[1000]",)),
        "2": ("default", ()),
        "4": ("default", (_FOUR_STEPS,)),
    },
    "roll-out length": {"1 x": ("default", ()), "3 x": ("long", ())},
    "mismatch": {
        "none": ("no_mismatch", ()),
        "renderer": ("default", ()),
        "frame rate": ("frame_rate", ()),
        "codec": ("codec", ()),
    },
    "entropy": {"none": ("one_video_a_prompt", ()), "half": ("half_spread", ()), "whole": ("default", ())},
    "updates": {"1 x": ("default", ()), "3 x": ("default", ("budget=3",))},
    "teacher's gravity": {"0.33": ("weak_gravity", ()), "1": ("default", ())},
}
"""Axis -> value -> (world, further overrides); one thing is turned on at a time."""

TABLES = ("main", "ablations", "d_lr", "beyond", "regime")


@dataclass(frozen=True)
class Row:
    """One line of the study: one training run and one measurement on the held-out prompts.

    Attributes:
        table: of `TABLES`; or "search".
        family: of `FAMILIES`.
        method: of `METHODS`, or "base" (nothing is trained).
        label: what is special; the method's name where nothing is.
        world: of `WORLDS`.
        seed: of the run.
        overrides: beyond the method's and the world's.
        cell: rows of the same cell are compared with the same base student.
        after: id of the row whose student this one goes on from.
    """

    table: str
    family: str
    method: str
    label: str
    seed: int
    world: str = "default"
    overrides: tuple[str, ...] = ()
    cell: str = "default"
    after: str | None = None

    @property
    def id(self) -> str:
        """A name that is also a path."""
        words = (self.table, self.family, self.cell, self.label, f"seed_{self.seed}")
        return "/".join(word.replace(" ", "_").replace(".", "_") for word in words)

    @property
    def own(self) -> dict[str, float]:
        """Values of the overrides in `STUDY_KEYS`."""
        pairs = (each.partition("=") for each in self.overrides)
        return {name: float(value) for name, _, value in pairs if name in STUDY_KEYS}


@dataclass(frozen=True)
class Preset:
    """Sizes of everything, and which rows there are.

    Attributes:
        rollouts: N per step; `group_size` of them to a prompt.
        steps: student updates of every method at most; the search may choose fewer.
        warmup_steps: of the discriminator.
        learning_rates: of the student, tried for each method and family in `searched`.
        step_shares: of `steps`, at which the search looks: equally spaced, the last is 1.
        averages: of the student's weights, at which the search looks. In `paper` `ema` is of the last 100 updates and
            `old` of the last 10: the slow one is smooth, and lags behind what a student learned last.
        searched: families with a search of their own; the others take the first one's result.
        search_prompts, validation_prompts: training prompts that the search trains on, and judges by.
        heldout_prompts, seeds_per_prompt: clips of the one final measurement; `long_prompts` of three times the length.
        real_score_steps: supervised updates of DMD's real score.
        ablated_families: of the ablations and of part of what is beyond the paper; the rest is of the first family.
        extra: overrides of every run.
    """

    name: str
    rollouts: int
    group_size: int
    steps: int
    warmup_steps: int
    learning_rates: tuple[float, ...]
    step_shares: tuple[float, ...]
    averages: tuple[str, ...]
    searched: tuple[str, ...]
    search_prompts: int
    validation_prompts: int
    heldout_prompts: int
    seeds_per_prompt: int
    long_prompts: int
    real_score_steps: int
    seeds: tuple[int, ...]
    families: tuple[str, ...]
    methods: tuple[str, ...]
    ablations: tuple[str, ...]
    d_lr: tuple[str, ...]
    beyond: tuple[str, ...]
    regimes: tuple[tuple[str, str], ...]
    regime_methods: tuple[str, ...]
    regime_seeds: tuple[int, ...]
    extra: tuple[str, ...] = ()
    ablated_families: tuple[str, ...] = ("chunk_wise",)


_EVERY_REGIME = tuple(
    (axis, value) for axis, values in REGIMES.items() for value, (world, more) in values.items()
    if (world, more) != ("default", ())
)  # fmt: skip

PRESETS = {
    "paper": Preset(
        name="paper", rollouts=32, group_size=8, steps=240, warmup_steps=160,
        learning_rates=(6e-5, 2e-4, 6e-4), step_shares=(2 / 3, 1.0), averages=("ema", "old"),
        searched=("chunk_wise", "frame_wise"),
        search_prompts=160, validation_prompts=40, heldout_prompts=96, seeds_per_prompt=2, long_prompts=32,
        real_score_steps=600, seeds=(0, 1, 2), families=("chunk_wise", "frame_wise"),
        methods=("sft", "gan", "dmd", "afd"), ablations=tuple(ABLATIONS), d_lr=tuple(D_LR), beyond=tuple(BEYOND),
        regimes=_EVERY_REGIME, regime_methods=("sft", "gan", "dmd", "afd"), regime_seeds=(0,),
        ablated_families=("chunk_wise", "frame_wise"),
    ),
    "quick": Preset(
        name="quick", rollouts=8, group_size=4, steps=16, warmup_steps=12,
        learning_rates=(1e-4, 6e-4), step_shares=(0.5, 1.0), averages=("ema",), searched=("chunk_wise",),
        search_prompts=176, validation_prompts=24, heldout_prompts=48, seeds_per_prompt=1, long_prompts=12,
        real_score_steps=40, seeds=(0,), families=("chunk_wise", "frame_wise"),
        methods=("sft", "gan", "dmd", "afd"), ablations=("frozen D", "terminal only"), d_lr=("high",),
        beyond=("coupled 0.5",), regimes=(("teacher videos", "20"),), regime_methods=("sft", "afd"),
        regime_seeds=(0,), extra=("averages.ema_decay=0.9",),
    ),
    "micro": Preset(
        name="micro", rollouts=4, group_size=2, steps=2, warmup_steps=1,
        learning_rates=(6e-4,), step_shares=(1.0,), averages=("ema", "old"), searched=("chunk_wise",),
        search_prompts=12, validation_prompts=4, heldout_prompts=6, seeds_per_prompt=1, long_prompts=1,
        real_score_steps=2, seeds=(0,), families=("chunk_wise",), methods=("afd",), ablations=(), d_lr=(),
        beyond=(), regimes=(), regime_methods=(), regime_seeds=(), extra=("averages.ema_decay=0.5",),
    ),
}  # fmt: skip
"""`paper` takes an afternoon and more on two cores, `quick` minutes; `micro` is for the tests and measures nothing."""


def search_rows(preset: Preset, rows: Sequence[Row]) -> list[Row]:
    """One run for each learning rate of the families and methods that rows train; its steps are looked at on the way.
    Training prompts only."""
    wanted = {
        (row.family if row.family in preset.searched else preset.families[0], row.method)
        for row in rows
        if row.method != "base"
    }
    return [
        Row("search", family, method, f"{method} {rate:g}", _SEARCH_SEED, overrides=(f"learning_rate={rate}",))
        for family in preset.searched
        for rate in preset.learning_rates
        for method in preset.methods  # no two DMD runs side by side: the second would wait for the real score
        if (family, method) in wanted
    ]


_SEARCH_SEED = 1000


def build_rows(
    preset: Preset, only: tuple[str, ...] = TABLES, families: tuple[str, ...] = tuple(FAMILIES)
) -> list[Row]:
    """All rows in the order in which they run: no row comes before one that it goes on from.

    Args:
        preset: which rows there are.
        only: tables wanted, of `TABLES`.
        families: wanted, of `FAMILIES`.
    """
    rows: list[Row] = []
    if "main" in only:
        for family in preset.families:
            rows.append(Row("main", family, "base", "base", 0))
            rows += [Row("main", family, method, method, seed) for seed in preset.seeds for method in preset.methods]
    for table, labels, overrides_of in (
        ("ablations", preset.ablations, ABLATIONS),
        ("d_lr", preset.d_lr, {name: (f"discriminator.lr_scale={scale}",) for name, scale in D_LR.items()}),
        ("beyond", preset.beyond, BEYOND),
    ):
        for label in labels if table in only else ():
            in_both = label not in _CELL_OF if table == "ablations" else label in _IN_BOTH_FAMILIES
            for family in preset.ablated_families if in_both else preset.families[:1]:
                rows += [_of_afd(table, family, label, seed, overrides_of[label]) for seed in preset.seeds]
    for axis, value in preset.regimes if "regime" in only else ():
        world, more = REGIMES[axis][value]
        cell = f"{axis} {value}"
        rows.append(Row("regime", "chunk_wise", "base", "base", 0, world, more, cell))
        for seed in preset.regime_seeds:
            rows += [Row("regime", "chunk_wise", each, each, seed, world, more, cell) for each in preset.regime_methods]
    assert len({row.id for row in rows}) == len(rows)
    return [row for row in rows if row.family in families]


def _of_afd(table: str, family: str, label: str, seed: int, overrides: tuple[str, ...]) -> Row:
    after = Row("main", family, "sft", "sft", seed).id if label == _AFTER_SFT else None
    cell = _CELL_OF.get(label, "default")
    return Row(table, family, "afd", label, seed, overrides=overrides, cell=cell, after=after)


def settings_of(row: Row, overrides: list[str]) -> str:
    """Fingerprint of everything that a row's result depends on; a finished row counts only under the same one."""
    return hashlib.sha256("\n".join([FAMILIES[row.family], row.method, *overrides]).encode()).hexdigest()[:10]
