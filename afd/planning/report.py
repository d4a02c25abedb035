"""A plan in words and tables, for the terminal and the documentation."""

from __future__ import annotations

from afd.planning.hardware import ASSUMED
from afd.planning.memory import GIB, Memory
from afd.planning.passes import StepPasses
from afd.planning.plan import Plan, Remedy, gib
from afd.planning.workload import Workload

_VLM_NOTE = "discriminator.kind vlm: seconds of decoding are not counted; its activations and decoding are estimates"


def describe_plan(plan: Plan, *, price: float) -> str:
    """The text of `afd plan`: parameters, memory by part, work by phase, and what follows."""
    work, step, machine = plan.workload, plan.step, plan.machine
    lines = [
        f"# {machine.num_gpus} x {machine.gpu.name}, {machine.network.name}; every number is a prediction",
        _models_line(work),
        f"{work.rollouts} {'rollouts' if work.passes.num_times else 'noised teacher clips'} a step = "
        f"{work.rollouts // work.group_size} prompts x G {work.group_size}; per GPU {work.rollouts_per_gpu}, student's "
        f"micro batch {work.student.micro} x {work.student.accumulation}",
        step_line(work.passes),
        "",
        *memory_table(plan.memory),
        f"usable: {gib(machine.usable)} of {gib(machine.gpu.memory)} GiB: {'fits' if plan.fits else 'DOES NOT FIT'}",
        "",
        "| per GPU and step | TFLOP | recomputed | memory traffic, GB | sent, GB | compute, s | network, s | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, phase in step.phases.items():
        lines.append(
            f"| {name} | {phase.flops / 1e12:,.1f} | {(phase.flops - phase.model_flops) / 1e12:,.1f} | "
            f"{phase.memory_bytes / 1e9:,.1f} | {phase.sent_bytes / 1e9:,.2f} | {phase.compute_s:.2f} | "
            f"{phase.network_s:.2f} | {phase.seconds:.2f} |"
        )
    cost = step.cost(price)
    lines += [
        "",
        f"{step.seconds:.1f} s a step; MFU {step.mfu:.0%}; {step.tokens_per_second:,.0f} tokens/s; "
        f"{step.videos_per_day:,.0f} videos/day; $ {cost:,.0f} per 1000 steps at $ {price:.2f} per GPU-hour",
        f"assumed: {ASSUMED}",
        *([_VLM_NOTE] if work.vlm is not None else []),
    ]
    return "\n".join(lines)


def _models_line(work: Workload) -> str:
    count, others = work.parameters, []
    if work.discriminator is not None:
        others.append(f"; discriminator {work.discriminator_parameters.total:,}")
    if work.critic is not None:
        others.append(f"; critic and frozen real score {work.critic.parameters.total:,} each")
    return f"student {count.total:,} parameters, {count.trained:,} trained{''.join(others)}"


def step_line(passes: StepPasses) -> str:
    """What a step of this objective means where steps differ."""
    line = f"objective {passes.objective}"
    if not passes.is_truncated:
        return line
    line += f": a rollout ends after 1 to {passes.num_times} denoising steps, each as likely, which the update repeats"
    if passes.update_every > 1:
        line += f"; the student moves every {passes.update_every} steps"
    line += f". Seconds, traffic and cost are the mean step's ({passes.mean_times:.1f} denoising steps"
    return line + (f", 1/{passes.update_every} update" if passes.update_every > 1 else "") + "), memory the longest's"


def memory_table(memory: Memory) -> list[str]:
    """GiB per GPU by part, one column a phase; a Markdown table."""
    phases = list(memory.phases)
    lines = [f"| GiB per GPU | {' | '.join(phases)} | on the host |", "|---" * (len(phases) + 2) + "|"]
    for name in dict.fromkeys([*memory.held, *memory.host]):
        held, host = memory.held.get(name, 0), memory.host.get(name, 0)
        if held or host:
            cells = [_cell(held)] * len(phases)
            lines.append(f"| {name} | {' | '.join(cells)} | {_cell(host)} |")
    for name in dict.fromkeys(name for parts in memory.phases.values() for name in parts):
        sizes = [parts.get(name, 0) for parts in memory.phases.values()]
        if any(sizes):
            lines.append(f"| {name} | {' | '.join(_cell(size) for size in sizes)} | - |")
    totals = " | ".join(gib(memory.at(phase)) for phase in phases)
    return [*lines, f"| total | {totals} | {_cell(sum(memory.host.values()))} |"]


def _cell(size: int) -> str:
    return f"{size / GIB:.2f}" if size else "-"


def describe_remedies(found: list[Remedy]) -> str:
    """What to change, cheapest first."""
    if not found:
        return "no single change or pair of changes known here makes it fit: more GPUs, or fewer frames"
    lines = ["what makes it fit, cheapest first:"]
    for remedy in found[:6]:
        plan = remedy.plan
        lines.append(
            f"- {remedy.change}: peak {gib(plan.memory.peak)} GiB, {plan.step.seconds:.1f} s a step of "
            f"{plan.workload.rollouts} rollouts"
        )
    return "\n".join(lines)
