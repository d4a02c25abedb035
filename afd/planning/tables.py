"""The tables of docs/planning.md and of the README, made by one command so that they cannot fall behind.

`afd plan --write_docs docs/planning.md` rewrites what stands between the markers; a test compares.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from afd.config_file import load_config
from afd.planning.hardware import GPUS, INTERCONNECTS
from afd.planning.plan import DSConfigs, Machine, Plan, gib, make_plan, planned_shape, remedies
from afd.planning.report import memory_table

_ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- begin: afd plan --write_docs -->", "<!-- end -->"
_CONFIGS = {"1.3B": "wan_1_3b_self_forcing.yaml", "14B": "wan_14b.yaml"}
_FULL = "student.lora.rank=0"
_GROUP = 8


def _ds(name: str, num_gpus: int) -> dict[str, Any]:
    """A shipped JSON for another number of GPUs: 8 rollouts a GPU (weak scaling)."""
    config = json.loads((_ROOT / "configs" / name).read_text())
    return config | {"train_batch_size": _GROUP * num_gpus}


def _plan(size: str, num_gpus: int, *overrides: str, offload: bool = False) -> tuple[Plan, Any]:
    config = load_config(_ROOT / "configs" / _CONFIGS[size], overrides)
    student = "zero3_offload.json" if offload else "zero3_h100_64.json" if num_gpus > 8 else "zero3_h100.json"
    pair: DSConfigs = (_ds(student, num_gpus), _ds("zero2_discriminator_h100.json", num_gpus))
    machine = Machine(GPUS["h100-80g"], INTERCONNECTS["ib-400"], num_gpus)
    shape = planned_shape(config)
    plan = make_plan(config, shape, pair, machine)
    return plan, (lambda: remedies(config, shape, pair, machine))


def scaling_table() -> list[str]:
    """1.3B and 14B, LoRA and full, on 8, 64 and 256 H100s."""
    lines = [
        "| student | trained | H100s | rollouts / step | peak, GiB | fits | s / step | MFU | tokens / s | "
        "videos / day | $ / 1000 steps |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for size in _CONFIGS:
        for trained, overrides in (("LoRA 256", ()), ("all", (_FULL,))):
            for num_gpus in (8, 64, 256):
                plan, _ = _plan(size, num_gpus, *overrides)
                step = plan.step
                lines.append(
                    f"| {size} | {trained} | {num_gpus} | {plan.workload.rollouts} | {gib(plan.memory.peak)} | "
                    f"{'yes' if plan.fits else 'no'} | {step.seconds:.0f} | {step.mfu:.0%} | "
                    f"{step.tokens_per_second:,.0f} | {step.videos_per_day:,.0f} | "
                    f"{step.cost(plan.machine.gpu.price):,.0f} |"
                )
    return lines


def readme_table() -> list[str]:
    """The README's short one: LoRA, as the configurations ship."""
    lines = ["| predicted, not measured | 8 H100s | 64 H100s | 256 H100s |", "|---|---|---|---|"]
    for size in _CONFIGS:
        cells = []
        for num_gpus in (8, 64, 256):
            plan, _ = _plan(size, num_gpus)
            cells.append(
                f"{plan.step.seconds:.0f} s for {plan.workload.rollouts} rollouts, {gib(plan.memory.peak)} GiB"
            )
        lines.append(f"| {size}, LoRA 256: s per step, peak per GPU | {' | '.join(cells)} |")
    return lines


def _cases() -> list[str]:
    lines: list[str] = []
    for title, size, num_gpus, overrides, offload in (
        ("14B, LoRA 256, on 8 x 80 GB", "14B", 8, (), False),
        ("14B, all weights, on 8 x 80 GB, optimizer on the host (`zero3_offload.json`)", "14B", 8, (_FULL,), True),
        ("14B, all weights, on 8 x 80 GB, nothing on the host", "14B", 8, (_FULL,), False),
        ("1.3B, all weights, on one 80 GB GPU", "1.3B", 1, (_FULL,), False),
    ):
        plan, changes = _plan(size, num_gpus, *overrides, offload=offload)
        verdict = "fits" if plan.fits else "does not fit"
        lines += ["", f"### {title}: {verdict}", "", *memory_table(plan.memory), ""]
        lines.append(
            f"{gib(plan.machine.usable)} GiB usable; {plan.step.seconds:.0f} s for {plan.workload.rollouts} rollouts."
        )
        if not plan.fits:
            lines += ["What makes it fit, cheapest first:", ""]
            lines += [f"- `{each.change}`: {gib(each.plan.memory.peak)} GiB" for each in changes()]
    return lines


def tables(path: Path) -> list[str]:
    """The lines between the markers of a file."""
    if path.name == "README.md":
        return readme_table()
    head = ["## 8, 64 and 256 H100s (predictions)", ""]
    return [*head, *scaling_table(), "", "## Three cases (predictions)", *_cases()]


def rewrite(path: Path) -> None:
    """Replace what stands between the markers of a file."""
    path.write_text(rewritten(path))


def rewritten(path: Path) -> str:
    """A file's text with fresh tables.

    Raises:
        ValueError: it has no markers.
    """
    text = path.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{path} must hold the markers {BEGIN} and {END}, got none")
    head, rest = text.split(BEGIN, 1)
    return f"{head}{BEGIN}\n" + "\n".join(tables(path)) + f"\n{END}{rest.split(END, 1)[1]}"
