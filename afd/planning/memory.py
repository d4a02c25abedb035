"""Bytes one rank needs, by part, for each phase of a step; the largest phase decides.

Follows what DeepSpeed 0.19.8 allocates (runtime/zero/stage3.py, stage_1_and_2.py) and what our step keeps. Measured
peaks of real steps on the CPU agree to 10 % (tests/afd/planning/test_measured.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from afd.planning.activations import (
    backbone_saved_bytes,
    backward_workspace_bytes,
    discriminator_saved_bytes,
    saved_bytes,
)
from afd.planning.operations import student_layout
from afd.planning.parameters import adapted_weights
from afd.planning.workload import EngineSettings, Workload

GIB = 2**30
_MASTER, _MOMENTS, _AVERAGES = 4, 8, 12  # bytes per trained parameter; three float32 averages
_VAE_PARAMETERS = 126_892_531  # AutoencoderKLWan 2.1, float32


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        held: by part, all the time.
        phases: by phase, then by part, on top of `held`.
        host: on the node's host memory per rank, by part.
    """

    held: dict[str, int]
    phases: dict[str, dict[str, int]]
    host: dict[str, int]

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    def at(self, phase: str) -> int:
        """Bytes allocated at the peak of a phase."""
        return sum(self.held.values()) + sum(self.phases[phase].values())

    @property
    def peak(self) -> int:
        """Bytes allocated at the peak of the step."""
        return self.at(self.peak_phase)


def plan_memory(work: Workload) -> Memory:
    """Bytes by part for a workload."""
    held, host = _held(work)
    phases = {"rollout": _rollout(work)}
    if work.discriminator is not None:
        phases["discriminator"] = _discriminator(work, work.discriminator)
    phases["update"] = _update(work)
    if work.vlm is not None:
        clips = work.rollouts_per_gpu * _clip_elements(work) * 4
        phases["decoding"] = {
            "decoding (estimate)": work.vlm.decoding_bytes,
            "rollouts and pairs": clips + _shown(work),
        }
    if work.has_old_pass or work.has_prior_pass:
        phases["velocities"] = _velocities(work)
    phases["optimizer"] = _optimizer(work)
    if work.uses_vae and work.vlm is None:  # else the one that decodes for the VLM
        host = host | {"VAE (decodes samples on the host)": _VAE_PARAMETERS * 4}
    return Memory(held, phases, host)


def _shards(work: Workload, stage: int) -> int:
    return work.num_gpus if work.student.stage >= stage else 1


def _held(work: Workload) -> tuple[dict[str, int], dict[str, int]]:
    """What stays: weights, optimizer, gradients, buckets, averages, the discriminator."""
    count, engine = work.parameters, work.student
    trained = count.trained
    weights = work.weights * engine.width // _shards(work, 3)
    optimizer = trained * (_MASTER + _MOMENTS) // _shards(work, 1)
    gradients = trained * engine.grad_width // work.num_gpus if engine.stage == 3 else 0
    averages = trained * _AVERAGES // _shards(work, 3)
    held = {
        "student shards": weights,
        "second copy of the weights (hpZ)": work.weights * engine.width // engine.hpz if engine.hpz > 1 else 0,
        "gradients": gradients,
        "optimizer (masters, moments)": optimizer,
        "averages (old, ema, reference)": averages,
        "reduce bucket": engine.reduce_bucket * engine.width if engine.stage == 3 else 0,
        "discriminator (weights, optimizer)": _discriminator_states(work),
        "decoder of what a VLM is shown": work.vlm.decoder_bytes if work.vlm is not None else 0,
    }
    host: dict[str, int] = {}
    if engine.offloads_optimizer:
        moved = ("gradients", "optimizer (masters, moments)", "averages (old, ema, reference)")
        host = {name: held[name] for name in moved}
        held |= dict.fromkeys(moved, 0)
    if engine.offloads_weights:
        host["student shards"], held["student shards"] = weights, 0
    return held, host


def _discriminator_states(work: Workload) -> int:
    count, engine = work.discriminator_parameters, work.discriminator
    if engine is None:
        return 0
    shards = work.num_gpus if engine.stage >= 1 else 1
    weights = count.total * engine.width // (work.num_gpus if engine.stage == 3 else 1)
    return weights + count.trained * (_MASTER + _MOMENTS) // shards


def _clip_elements(work: Workload) -> int:
    channels, frames, height, width = work.latents
    return channels * frames * height * width


def _swap(work: Workload) -> int:
    """The student's own weights, set aside while an average is applied."""
    if not (work.has_old_pass or work.has_prior_pass):
        return 0
    return work.parameters.trained * work.student.width // _shards(work, 3)


def _whole_weights(work: Workload) -> int:
    """All weights gathered at once: nothing more where they are whole anyway."""
    gathers = work.student.stage == 3 and work.num_gpus > 1
    return work.weights * work.student.width if gathers else 0


def _gathered_blocks(work: Workload) -> int:
    """Whole blocks under ZeRO-3: the one that runs, its flat receive buffer, and what is prefetched."""
    engine, count = work.student, work.parameters
    if engine.stage < 3 or work.num_gpus == 1:
        return 0
    block = count.block + count.adapter
    return (2 * block + min(engine.prefetch, count.total)) * engine.width


def _rollout(work: Workload) -> dict[str, int]:
    shape, engine, one = work.shape, work.student, work.update_pass
    layout = student_layout(shape, work.latents, teacher_forcing=False)
    kept = layout.num_frames
    if shape.window_frames is not None:
        kept = min(kept, shape.window_frames + shape.sink_frames)
    batch = min(work.rollout_batch, work.rollouts_per_gpu)
    tokens = batch * kept * layout.tokens_per_frame
    chunk = batch * max(end - start for start, end in layout.chunk_spans) * layout.tokens_per_frame
    prompt = 2 * shape.num_layers * batch * shape.text_len * shape.dim
    float32 = 2 if engine.width == 2 and one.kernels == "fused" else 1
    working = chunk * (6 * shape.dim * float32 + 2 * shape.ffn_dim)
    clips = work.rollouts_per_gpu * _clip_elements(work) * 4
    return {
        "gathered student": _whole_weights(work),
        "swapped-out weights": _swap(work) if work.has_old_pass else 0,
        "merged weights": _merged(work),
        "KV cache": (2 * shape.num_layers * tokens * shape.dim + prompt) * engine.width,
        "activations": working * engine.width,
        "rollouts and noise": clips * (max(work.num_times) + 3),
    }


def _merged(work: Workload) -> int:
    """Weights with the adapters merged in; gathered ZeRO-3 copies are written over instead."""
    if not work.merges_adapters or _whole_weights(work):
        return 0
    return adapted_weights(work.shape, work.lora) * work.student.width


def _reduction_buckets(engine: EngineSettings, trained: int) -> int:
    """Bytes of gradients on their way: stages 1 and 2 allocate a bucket whole, however small the model is, and a second
    one when they overlap; stage 0 flattens what there is."""
    size = engine.reduce_bucket * (1 + engine.overlaps)
    return (size if engine.stage in (1, 2) else min(size, trained)) * engine.width


def _discriminator(work: Workload, engine: EngineSettings) -> dict[str, int]:
    count = work.discriminator_parameters.trained
    clips = work.clips_per_pair * engine.micro * work.windows[0]
    if work.vlm is not None:
        saved = work.vlm.saved_bytes(clips=clips, width=engine.width)
    elif work.backbone is None:
        saved = discriminator_saved_bytes(
            work.discriminator_shape, work.window_latents, batch=clips, text_len=work.shape.text_len,
            width=engine.width, kernels=work.kernels,
        )  # fmt: skip
    else:
        saved = backbone_saved_bytes(
            work.shape, work.backbone, work.window_latents, batch=clips, width=engine.width, kernels=work.kernels
        )
    pairs = work.rollouts_per_gpu * _clip_elements(work) * 4
    bucket = _reduction_buckets(engine, count)
    shards = work.num_gpus if engine.stage else 1
    gradients = count * engine.grad_width + bucket + count * 4 // shards  # the last: this rank's part, in float32
    return {
        "activations": saved,
        "gradients": gradients,
        "rollouts and pairs": pairs * (3 + work.clips_per_pair) + _shown(work),
    }


def _shown(work: Workload) -> int:
    """Frames of all teacher and student clips that a VLM is shown in a step."""
    return 2 * work.rollouts_per_gpu * work.vlm.shown_bytes if work.vlm is not None else 0


def _update(work: Workload) -> dict[str, int]:
    one, engine, count = work.update_pass, work.student, work.parameters
    full = engine.stage < 3
    gradients = count.trained * engine.grad_width if full else (count.adapter or count.block) * engine.width
    bucket = _reduction_buckets(engine, count.trained) if full else 0
    states = 4 + work.has_old_pass + work.has_prior_pass
    return {
        "gathered block": _gathered_blocks(work),
        "gradients": gradients + bucket,
        "activations": saved_bytes(one, is_checkpointed=work.is_checkpointed),
        "backward workspace": backward_workspace_bytes(one),
        "lagging passes beside v": _lagging(work),
        "rollouts, states, velocities": work.rollouts_per_gpu * _clip_elements(work) * 4 * (states + 2),
    }


def _lagging(work: Workload) -> int:
    """Tokens of the roles beside v, and one block's forward without gradient."""
    if not work.lagging_beside:
        return 0
    one, shape = work.update_pass, work.shape
    float32 = 2 if one.width == 2 and one.kernels == "fused" else 1
    working = one.tokens * (6 * shape.dim * float32 + 2 * shape.ffn_dim)
    return (work.lagging_beside * one.tokens * shape.dim + working) * one.width


def _optimizer(work: Workload) -> dict[str, int]:
    """The step itself: this rank's gradients flattened and in float32, and what the optimizer makes of them."""
    engine, trained = work.student, work.parameters.trained
    mine = trained // _shards(work, 1)
    group = min(mine, engine.sub_group) if engine.stage == 3 else mine
    flat = group * (engine.grad_width + (4 if engine.grad_width < 4 else 0))
    temporaries = 0 if engine.is_fused or engine.offloads_optimizer else 2 * 4 * group
    clips = work.rollouts_per_gpu * _clip_elements(work) * 4 * 8
    where = {"flattened gradients": 0 if engine.offloads_optimizer else flat, "optimizer workspace": temporaries}
    return where | {"rollouts, states, velocities": clips}


def _velocities(work: Workload) -> dict[str, int]:
    """v_old and v_ref on their own, without gradient; beside v they are part of the update."""
    one, engine = work.update_pass, work.student
    if work.lagging_beside:
        return {}
    float32 = 2 if engine.width == 2 and one.kernels == "fused" else 1
    working = one.tokens * (6 * work.shape.dim * float32 + 2 * work.shape.ffn_dim) * engine.width
    return {
        "gathered student": _whole_weights(work) if work.gathers_once else 0,
        "gathered block": 0 if work.gathers_once else _gathered_blocks(work),
        "swapped-out weights": _swap(work),
        "activations": working,
        "rollouts, states, velocities": work.rollouts_per_gpu * _clip_elements(work) * 4 * 6,
    }


def describe_memory(memory: Memory) -> list[str]:
    """Lines of text: what is held, what each phase adds, and the peak, in MiB."""
    mib = 2**20

    def lines(parts: dict[str, int]) -> list[str]:
        return [f"  {name}: {size / mib:,.1f} MiB" for name, size in parts.items() if size]

    text = ["held:", *lines(memory.held)]
    for phase, parts in memory.phases.items():
        text += [f"{phase}, on top:", *lines(parts), f"  = {memory.at(phase) / mib:,.1f} MiB with what is held"]
    if memory.host:
        text += ["on the host, per rank:", *lines(memory.host)]
    return [*text, f"peak: {memory.peak / mib:,.1f} MiB, in the {memory.peak_phase} phase"]
