"""Seconds of a step from FLOPs, bytes and collectives; MFU, throughput and cost from the seconds.

A roofline with printed assumptions (`afd.planning.hardware`): a prediction, not a measurement. Of the mean step
(`afd.planning.passes`), by the phases of the objective's own timers; AFD's scoring is part of `discriminator`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from afd.config import BackboneSection
from afd.planning.communication import Transfer, plan_transfers
from afd.planning.hardware import ASSUMED, GPUS_PER_NODE, HOST_ADAM, PCIE, Efficiency, Gpu, Interconnect
from afd.planning.operations import (
    Attention,
    Operation,
    backbone_pass,
    discriminator_pass,
    forward_flops,
    rollout_passes,
    slope_pass,
    student_pass,
    training_flops,
)
from afd.planning.vlm import VLMPlan
from afd.planning.workload import EngineSettings, Learner, Workload

_ELEMENTWISE_FORWARD, _ELEMENTWISE_BACKWARD = 20, 40  # [tokens, dim] tensors read or written around the products


@dataclass(frozen=True)
class Phase:
    """One phase of a step on one rank.

    Attributes:
        flops: computed, recomputation included.
        model_flops: without recomputation.
        memory_bytes: read and written around the products.
        sent_bytes: that this rank sends.
        compute_s, network_s: seconds of either alone.
        seconds: of the phase, overlap taken into account.
    """

    flops: int
    model_flops: int
    memory_bytes: float
    sent_bytes: float
    compute_s: float
    network_s: float
    seconds: float


@dataclass(frozen=True)
class Step:
    """A whole step.

    Attributes:
        phases: by name.
        gpu: the accelerator.
        workload: what was planned.
    """

    phases: dict[str, Phase]
    gpu: Gpu
    workload: Workload

    @property
    def seconds(self) -> float:
        """Of one step."""
        return sum(phase.seconds for phase in self.phases.values())

    @property
    def mfu(self) -> float:
        """Model FLOPs (no recomputation) per second over the peak."""
        return sum(phase.model_flops for phase in self.phases.values()) / self.seconds / self.gpu.flops

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the clips that a step takes (rollouts; teacher clips for sft), over all ranks."""
        shape, (_, frames, height, width) = self.workload.shape, self.workload.latents
        clip = frames * (height // shape.patch_size[1]) * (width // shape.patch_size[2])
        return self.workload.rollouts * clip / self.seconds

    @property
    def videos_per_day(self) -> float:
        """Clips that steps take: rollouts, or teacher clips for sft."""
        return self.workload.rollouts / self.seconds * 86400

    def cost(self, price: float, steps: int = 1000) -> float:
        """$ of `steps` steps at `price` $ per GPU and hour."""
        return self.seconds * steps / 3600 * self.workload.num_gpus * price


def predict_step(
    work: Workload,
    gpu: Gpu,
    network: Interconnect,
    *,
    gpus_per_node: int = GPUS_PER_NODE,
    assumed: Efficiency = ASSUMED,
) -> Step:
    """Seconds of every phase of a step."""
    clock = Clock(work, gpu, network, gpus_per_node, assumed)
    loads = {
        "rollout": _rollout_work,
        "discriminator": _discriminator_work,
        "critic": _critic_work,
        "update": _update_work,
    }
    optimizers = {"update": clock.optimizer_seconds(work.learner) * work.passes.updates * work.passes.update_share}
    if work.critic is not None:
        optimizers["critic"] = clock.optimizer_seconds(work.critic)
    return Step(
        {
            name: clock.phase(*loads[name](work), transfers, extra_s=float(optimizers.get(name, 0.0)))
            for name, transfers in plan_transfers(work).items()
        },
        gpu,
        work,
    )


@dataclass(frozen=True)
class Load:
    """Work of a phase: operations with and without gradient, and bytes of memory traffic around them."""

    without_grad: list[Operation]
    with_grad: list[Operation]
    is_checkpointed: bool
    times: float


def _rollout_work(work: Workload) -> tuple[list[Load], float]:
    micro, lengths = min(work.rollout_batch, work.rollouts_per_gpu), work.passes.lengths
    count = work.rollouts_per_gpu / micro
    lora = None if work.merges_adapters else work.lora
    loads = [
        Load(
            rollout_passes(
                work.shape, work.latents, batch=micro, num_times=others, first_chunk_times=first, lora=lora
            ),
            [], False, count / len(lengths),
        )
        for first, others in lengths
    ]  # fmt: skip
    chunk, per_clip = work.shape.chunk_frames, math.prod(work.latents[1:])
    tokens = micro * per_clip // math.prod(work.shape.patch_size)
    passes = work.passes.mean_times + 1  # and the one that writes the cache
    forwards = -(-work.latents[1] // chunk) * passes
    weights = forwards * work.learner.weights * work.student.width
    cached = forwards * tokens * work.shape.dim * work.student.width * work.shape.num_layers  # half of it on average
    moved = passes * _elementwise(work.learner, tokens, _ELEMENTWISE_FORWARD) + weights + cached
    return loads, moved * count


def _elementwise(learner: Learner, tokens: int, tensors: float) -> float:
    return tensors * tokens * learner.shape.dim * learner.engine.width * learner.shape.num_layers


def _discriminator_work(work: Workload) -> tuple[list[Load], float]:
    engine, shape = work.discriminator, work.discriminator_shape
    if engine is None:
        return [], 0.0
    clips, text_len, latents = engine.micro * work.windows[0], work.shape.text_len, work.window_latents
    if work.vlm is not None:
        return _vlm_work(work, engine, work.vlm)
    if work.backbone is not None:
        return _backbone_work(work, engine, work.backbone, clips)
    train = discriminator_pass(shape, latents, batch=work.clips_per_pair * clips, text_len=text_len)
    judge = discriminator_pass(shape, latents, batch=clips, text_len=text_len)
    steps, judges = work.passes.discriminator_steps, engine.accumulation * work.passes.judges
    moved = _discriminator_elementwise(work, engine, clips)
    moved *= judges + 3 * work.clips_per_pair * steps * engine.accumulation
    return [Load([], train, False, engine.accumulation * steps), Load(judge, [], False, judges)], moved


def _discriminator_elementwise(work: Workload, engine: EngineSettings, clips: int) -> float:
    """Bytes around the products of one forward of a latent or backbone discriminator."""
    shape = work.discriminator_shape if work.backbone is None else work.shape
    tokens = clips * math.prod(work.window_latents[1:]) // math.prod(shape.patch_size)
    layers = work.discriminator_parameters.num_layers
    return tokens * shape.dim * engine.width * layers * _ELEMENTWISE_FORWARD


def _vlm_work(work: Workload, engine: EngineSettings, vlm: VLMPlan) -> tuple[list[Load], float]:
    steps, judges = work.passes.discriminator_steps, work.passes.judges
    pairs = work.clips_per_pair * engine.micro
    train = [vlm.operations(pairs, learns=learns) for learns in (False, True)]
    judge = [each for learns in (False, True) for each in vlm.operations(engine.micro, learns=learns)]
    per_clip = sum(each.tokens * each.dim * each.num_layers for each in vlm.towers) * engine.width
    moved = engine.accumulation * engine.micro * per_clip * _ELEMENTWISE_FORWARD
    moved *= judges + (3 + vlm.is_checkpointed) * work.clips_per_pair * steps
    return [
        Load(train[0], train[1], vlm.is_checkpointed, engine.accumulation * steps),
        Load(judge, [], False, engine.accumulation * judges),
    ], moved


def _backbone_work(
    work: Workload, engine: EngineSettings, section: BackboneSection, clips: int
) -> tuple[list[Load], float]:
    shape, latents = work.shape, work.window_latents
    pairs, steps = work.clips_per_pair * clips, work.passes.discriminator_steps
    frozen, heads = backbone_pass(shape, section, latents, batch=pairs)
    judge = [each for part in backbone_pass(shape, section, latents, batch=clips) for each in part]
    judges = engine.accumulation * work.passes.judges
    moved = _discriminator_elementwise(work, engine, clips)
    moved *= judges + work.clips_per_pair * steps * engine.accumulation
    return [Load(frozen, heads, False, engine.accumulation * steps), Load(judge, [], False, judges)], moved


def _critic_work(work: Workload) -> tuple[list[Load], float]:
    return _training_work(work, work.critic, forwards=0.0) if work.critic is not None else ([], 0.0)


def _update_work(work: Workload) -> tuple[list[Load], float]:
    """All updates of the student in a step, its guide's passes included."""
    passes, engine = work.passes, work.student
    loads, moved = _training_work(work, work.learner, forwards=float(passes.lagging + passes.repeats))
    guide, beside = _guide_work(work)
    share = float(passes.updates * passes.update_share)
    loads = [*loads, *(replace(each, times=each.times * engine.accumulation) for each in guide)]
    return [replace(each, times=each.times * share) for each in loads], share * (moved + engine.accumulation * beside)


def _training_work(work: Workload, learner: Learner, *, forwards: float) -> tuple[list[Load], float]:
    """One optimizer step of a velocity model, with `forwards` without gradient before each one with."""
    engine, times = learner.engine, learner.engine.accumulation
    operations = student_pass(
        learner.shape, work.latents, batch=engine.micro, lora=learner.lora, teacher_forcing=learner.teacher_forcing
    )
    tensors = _ELEMENTWISE_FORWARD * (forwards + 1 + learner.is_checkpointed) + _ELEMENTWISE_BACKWARD
    moved = times * _elementwise(learner, work.training_pass(learner).tokens, tensors)
    loads = [Load(operations, [], False, times * forwards), Load([], operations, learner.is_checkpointed, times)]
    return loads, moved


def _guide_work(work: Workload) -> tuple[list[Load], float]:
    """What tells a micro batch of the student's clips where to go: both scores' forwards; or the discriminator's, on
    the teacher's clips, and its gradient at the student's."""
    engine, micro = work.discriminator, work.student.micro
    if work.critic is not None:
        forward = student_pass(work.critic.shape, work.latents, batch=micro, teacher_forcing=False)
        passes = work.score_passes
        moved = len(passes) * _elementwise(work.critic, passes[0].tokens, _ELEMENTWISE_FORWARD)
        return [Load(forward, [], False, len(passes))], moved
    if work.passes.guide is None or engine is None:
        return [], 0.0
    clips, recomputes = micro * work.windows[0], False
    if work.backbone is not None:
        parts = backbone_pass(work.shape, work.backbone, work.window_latents, batch=clips)
        forward, recomputes = [each for part in parts for each in part], work.backbone.gradient_checkpointing
    else:
        text_len = work.shape.text_len
        forward = discriminator_pass(work.discriminator_shape, work.window_latents, batch=clips, text_len=text_len)
    moved = _discriminator_elementwise(work, engine, clips) * (4 + recomputes)
    return [Load(forward, slope_pass(forward), recomputes, 1)], moved


@dataclass(frozen=True)
class Clock:
    """Seconds of a workload's parts on a machine."""

    work: Workload
    gpu: Gpu
    network: Interconnect
    gpus_per_node: int
    assumed: Efficiency

    def phase(self, loads: list[Load], moved: float, transfers: list[Transfer], *, extra_s: float) -> Phase:
        flops = sum(load.times * _flops(load, load.is_checkpointed) for load in loads)
        model = sum(load.times * _flops(load, False) for load in loads)
        compute = sum(load.times * self._product_seconds(load) for load in loads)
        compute += moved / (self.gpu.bandwidth * self.assumed.memory)
        hidden = sum(self.transfer_seconds(each) for each in transfers if each.is_overlapped)
        open_s = sum(self.transfer_seconds(each) for each in transfers if not each.is_overlapped)
        waits = open_s + max(0.0, hidden - self.assumed.overlap * compute)
        sent = sum(each.sent(self.work.num_gpus) for each in transfers)
        return Phase(int(flops), int(model), moved, sent, compute, hidden + open_s, compute + waits + extra_s)

    def transfer_seconds(self, transfer: Transfer) -> float:
        """A ring through the nodes: every node takes the tensor in once through all its adapters together, and every
        rank once through NVLink; the slower of the two decides."""
        ranks = self.work.num_gpus
        within = min(ranks, self.gpus_per_node)
        local = transfer.sent(within if transfer.in_node else ranks) / (self.gpu.nvlink * self.assumed.network)
        nodes = -(-ranks // self.gpus_per_node)
        if transfer.in_node or nodes == 1:
            return local
        return max(local, transfer.sent(nodes) / (self.network.node_bandwidth * self.assumed.network))

    def optimizer_seconds(self, learner: Learner) -> float:
        """AdamW and the averages over this rank's shard, once."""
        engine = learner.engine
        mine = learner.parameters.trained / (self.work.num_gpus if engine.stage else 1)
        if engine.offloads_optimizer:
            return mine * ((4 + 2) / PCIE + 28 / HOST_ADAM)
        return mine * (30 + 8 * learner.averages) / (self.gpu.bandwidth * self.assumed.memory)

    def _product_seconds(self, load: Load) -> float:
        every = [*load.without_grad, *load.with_grad]
        attention = [each for each in every if isinstance(each, Attention)]
        forward = sum(each.forward for each in attention)
        again = sum(each.forward for each in load.with_grad if isinstance(each, Attention)) * load.is_checkpointed
        backward = sum(each.backward for each in load.with_grad if isinstance(each, Attention))
        products = _flops(load, load.is_checkpointed) - forward - again - backward
        rate = self.gpu.flops
        return (
            products / (rate * self.assumed.matmul)
            + (forward + again) / (rate * self.assumed.attention_forward)
            + backward / (rate * self.assumed.attention_backward)
        )


def _flops(load: Load, is_checkpointed: bool) -> int:
    return forward_flops(load.without_grad) + training_flops(load.with_grad, is_checkpointed=is_checkpointed)
