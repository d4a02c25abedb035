"""Bytes one rank needs, by part, for each phase of a step; the largest phase decides.

Follows what DeepSpeed 0.19.8 allocates (runtime/zero/stage3.py, stage_1_and_2.py) and what our step keeps. Of the
longest step (`afd.planning.passes`). A timed phase may have several peaks, each a phase here (`Memory.timed`).
Measured peaks of real steps of every objective on the CPU agree to 10 % (tests/afd/planning/test_measured.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from afd.planning.activations import (
    backbone_saved_bytes,
    backbone_slope_bytes,
    backward_workspace_bytes,
    discriminator_saved_bytes,
    discriminator_slope_bytes,
    forward_workspace_bytes,
    saved_bytes,
)
from afd.planning.operations import student_layout, video_grid
from afd.planning.parameters import adapted_weights
from afd.planning.workload import EngineSettings, Learner, Workload

GIB = 2**30
_MASTER, _MOMENTS, _AVERAGE = 4, 8, 4  # bytes per trained parameter
_AVERAGES = "averages (old, ema, reference)"
_PEAKS = {
    "discriminator": ("discriminator", "decoding"),
    "critic": ("critic", "critic optimizer"),
    "update": ("velocities", "slope", "update", "backward end", "optimizer"),
}
"""Phases here by the phases that the objectives' timers know, where there are several."""
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

    def timed(self, phase: str) -> int:
        """Bytes allocated at the peak of a phase that the objective's timer knows; 0 for one that is not planned."""
        return max((self.at(each) for each in _PEAKS.get(phase, (phase,)) if each in self.phases), default=0)

    @property
    def peak(self) -> int:
        """Bytes allocated at the peak of the step."""
        return self.at(self.peak_phase)


def plan_memory(work: Workload) -> Memory:
    """Bytes by part for a workload."""
    work = work.longest
    held, host = _held(work)
    phases: dict[str, dict[str, int]] = {}
    if work.passes.num_times:
        phases["rollout"] = _rollout(work)
    if work.discriminator is not None:
        phases["discriminator"] = _discriminator(work, work.discriminator)
    if work.critic is not None:
        clips = {"rollouts, noise, states": _clips(work, work.passes.most_times + 5)}
        phases["critic"] = _training(work, work.critic) | clips
        phases["critic optimizer"] = _optimizer(work, work.critic) | clips
    update, guide = _update_clips(work), _gathered_guide(work)
    phases["update"] = _training(work, work.learner) | {"lagging passes beside v": _lagging(work)} | guide | update
    frozen = _kept_frozen_blocks(work)
    if frozen:
        parts = {"frozen blocks not released": frozen}
        phases["backward end"] = _training(work, work.learner) | parts | guide | update
    if work.vlm is not None:
        phases["decoding"] = {
            "decoding (estimate)": work.vlm.decoding_bytes,
            "rollouts and pairs": _clips(work, 1) + _shown(work),
        }
    if work.passes.lagging:
        phases["velocities"] = _velocities(work)
    if work.passes.guide is not None:
        phases["slope"] = _slope(work) | guide | update
    phases["optimizer"] = _optimizer(work, work.learner) | guide | update
    if work.uses_vae and work.vlm is None:  # else the one that decodes for the VLM
        host = host | {"VAE (decodes samples on the host)": _VAE_PARAMETERS * 4}
    return Memory(held, phases, host)


def _shards(work: Workload, engine: EngineSettings, stage: int) -> int:
    return work.num_gpus if engine.stage >= stage else 1


def _held(work: Workload) -> tuple[dict[str, int], dict[str, int]]:
    """What stays, on the device and on the host: both learners with all that is theirs, discriminator, real score."""
    held, host = _states(work, work.learner)
    if work.critic is not None:
        for place, parts in zip((held, host), _states(work, work.critic), strict=True):
            place["real score (float32)"] = parts.pop(_AVERAGES, 0)
            place["critic (weights, gradients, optimizer, bucket)"] = sum(parts.values())
    held["discriminator (weights, optimizer)"] = _discriminator_states(work)
    held["decoder of what a VLM is shown"] = work.vlm.decoder_bytes if work.vlm is not None else 0
    return held, {name: size for name, size in host.items() if size}


def _states(work: Workload, learner: Learner) -> tuple[dict[str, int], dict[str, int]]:
    """Weights, optimizer, gradients, buckets and averages of a learner: on the device, on the host."""
    trained, engine = learner.parameters.trained, learner.engine
    weights = learner.weights * engine.width // _shards(work, engine, 3)
    held = {
        "student shards": weights,
        "second copy of the weights (hpZ)": learner.weights * engine.width // engine.hpz if engine.hpz > 1 else 0,
        "gradients": trained * engine.grad_width // work.num_gpus if engine.stage == 3 else 0,
        "optimizer (masters, moments)": trained * (_MASTER + _MOMENTS) // _shards(work, engine, 1),
        _AVERAGES: learner.averages * trained * _AVERAGE // _shards(work, engine, 3),
        "reduce bucket": engine.reduce_bucket * engine.width if engine.stage == 3 else 0,
    }
    host: dict[str, int] = {}
    if engine.offloads_optimizer:
        moved = ("gradients", "optimizer (masters, moments)", _AVERAGES)
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
    gradients = count.trained * engine.grad_width // work.num_gpus + engine.reduce_bucket * engine.width
    return weights + count.trained * (_MASTER + _MOMENTS) // shards + (gradients if engine.stage == 3 else 0)


def _clips(work: Workload, count: int) -> int:
    """`count` float32 latents of all clips of this rank's step."""
    channels, frames, height, width = work.latents
    return count * work.rollouts_per_gpu * channels * frames * height * width * 4


def _swap(work: Workload, learner: Learner) -> int:
    """A model's own weights, set aside while an average is applied."""
    return learner.parameters.trained * learner.engine.width // _shards(work, learner.engine, 3)


def _whole_weights(work: Workload, learner: Learner) -> int:
    """All weights gathered at once: nothing more where they are whole anyway."""
    gathers = learner.engine.stage == 3 and work.num_gpus > 1
    return learner.weights * learner.engine.width if gathers else 0


def _gathered_blocks(work: Workload, learner: Learner) -> int:
    """Whole blocks under ZeRO-3: the one that runs, its flat receive buffer, and what is prefetched."""
    engine, count = learner.engine, learner.parameters
    if engine.stage < 3 or work.num_gpus == 1:
        return 0
    block = count.block + count.adapter
    return (2 * block + min(engine.prefetch, count.total)) * engine.width


def _rollout(work: Workload) -> dict[str, int]:
    shape, engine, one = work.shape, work.student, work.training_pass(work.learner)
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
    return {
        "gathered student": _whole_weights(work, work.learner),
        "swapped-out weights": _swap(work, work.learner) if work.passes.has_old_pass else 0,
        "merged weights": _merged(work),
        "KV cache": (2 * shape.num_layers * tokens * shape.dim + prompt) * engine.width,
        "activations": working * engine.width,
        "rollouts and noise": _clips(work, work.passes.most_times + 3),
    }


def _merged(work: Workload) -> int:
    """Weights with the adapters merged in; gathered ZeRO-3 copies are written over instead."""
    if not work.merges_adapters or _whole_weights(work, work.learner):
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
    gradients = count * 4 // _shards(work, engine, 1)  # this rank's part, in float32
    if engine.stage < 3:
        gradients += count * engine.grad_width + _reduction_buckets(engine, count)
    return {
        "activations": saved,
        "gradients": gradients,
        "rollouts and pairs": _clips(work, 3 + work.clips_per_pair + _kept_noise(work)) + _shown(work),
    }


def _shown(work: Workload) -> int:
    """Frames of all teacher and student clips that a VLM is shown in a step."""
    return 2 * work.rollouts_per_gpu * work.vlm.shown_bytes if work.vlm is not None else 0


def _kept_noise(work: Workload) -> int:
    """Noise tensors of a clip that are kept for the update, which repeats the rollout."""
    return work.passes.most_times if work.passes.guide is not None else 0


def _update_clips(work: Workload) -> dict[str, int]:
    """Rollouts, states and targets; or rollouts, their noise, and what the guide compares them with."""
    count = 6 + work.passes.lagging if work.passes.guide is None else 4 + _kept_noise(work)
    return {"rollouts, states, velocities": _clips(work, count)}


def _training(work: Workload, learner: Learner) -> dict[str, int]:
    """Forward and backward of one micro batch."""
    one, engine, count = work.training_pass(learner), learner.engine, learner.parameters
    full = engine.stage < 3
    gradients = count.trained * engine.grad_width if full else (count.adapter or count.block) * engine.width
    bucket = _reduction_buckets(engine, count.trained) if full else 0
    return {
        "gathered block": _gathered_blocks(work, learner),
        "gradients": gradients + bucket,
        "activations": saved_bytes(one, is_checkpointed=learner.is_checkpointed),
        "backward workspace": backward_workspace_bytes(one),
    }


def _kept_frozen_blocks(work: Workload) -> int:
    """What the end of the student's backward needs beyond its start. With adapters and recomputation under ZeRO-3,
    DeepSpeed keeps the frozen weights of every block that it gathered to recompute it until the backward is over; in
    return the block's input is gone."""
    learner, one = work.learner, work.training_pass(work.learner)
    if not (learner.is_checkpointed and learner.lora.rank) or not _whole_weights(work, learner):
        return 0
    kept = learner.parameters.block * learner.engine.width - one.tokens * learner.shape.dim * one.width
    return max(0, kept) * (learner.shape.num_layers - 1)


def _gathered_guide(work: Workload) -> dict[str, int]:
    """What is whole during the student's update: the discriminator's weights."""
    engine = work.discriminator
    if work.passes.guide is None or engine is None or engine.stage < 3 or work.num_gpus == 1:
        return {}
    return {"gathered discriminator": work.discriminator_parameters.total * engine.width}


def _slope(work: Workload) -> dict[str, int]:
    """The student's graph, kept, while its guide tells a micro batch's clips where to go."""
    engine, learner = work.student, work.learner
    scores = {} if work.critic is None else {
        "gathered critic or real score": _whole_weights(work, work.critic),
        "swapped-out critic": _swap(work, work.critic),
    }  # fmt: skip
    return scores | {
        "gathered block": _gathered_blocks(work, learner),
        "gradients": work.parameters.trained * engine.grad_width if engine.stage < 3 else 0,
        "activations": saved_bytes(work.training_pass(learner), is_checkpointed=learner.is_checkpointed),
        "guide's activations": max([_discriminator_slope(work), *map(forward_workspace_bytes, work.score_passes)]),
    }


def _discriminator_slope(work: Workload) -> int:
    """What the discriminator keeps for the gradient at the clips, and the gradients inside one of its blocks."""
    engine, clips, latents = work.discriminator, work.student.micro * work.windows[0], work.window_latents
    if engine is None:
        return 0
    shape = work.discriminator_shape if work.backbone is None else work.shape
    inside = clips * math.prod(video_grid(shape, latents)) * (shape.dim + shape.ffn_dim) * engine.width
    if work.backbone is not None:
        return inside + backbone_slope_bytes(work.shape, work.backbone, latents, batch=clips, width=engine.width)
    return inside + discriminator_slope_bytes(
        work.discriminator_shape, latents, batch=clips, text_len=work.shape.text_len, width=engine.width
    )


def _lagging(work: Workload) -> int:
    """Tokens of the roles beside v, and one block's forward without gradient."""
    one = work.training_pass(work.learner)
    if not work.lagging_beside:
        return 0
    return work.lagging_beside * one.tokens * work.shape.dim * one.width + forward_workspace_bytes(one)


def _optimizer(work: Workload, learner: Learner) -> dict[str, int]:
    """The step itself: this rank's gradients flattened and in float32, and what the optimizer makes of them."""
    engine, trained = learner.engine, learner.parameters.trained
    mine = trained // _shards(work, engine, 1)
    group = min(mine, engine.sub_group) if engine.stage == 3 else mine
    flat = group * (engine.grad_width + (4 if engine.grad_width < 4 else 0))
    temporaries = 0 if engine.is_fused or engine.offloads_optimizer else 2 * 4 * group
    return {"flattened gradients": 0 if engine.offloads_optimizer else flat, "optimizer workspace": temporaries}


def _velocities(work: Workload) -> dict[str, int]:
    """v_old and v_ref on their own, without gradient; beside v they are part of the update."""
    if work.lagging_beside:
        return {}
    return {
        "gathered student": _whole_weights(work, work.learner) if work.gathers_once else 0,
        "gathered block": 0 if work.gathers_once else _gathered_blocks(work, work.learner),
        "swapped-out weights": _swap(work, work.learner),
        "activations": forward_workspace_bytes(work.training_pass(work.learner)),
        "rollouts, states, velocities": _clips(work, 6),
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
