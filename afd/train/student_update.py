"""One optimizer step of the student: DiffusionNFT on its own noised rollouts, weighted by the discriminator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from afd.config import NFTSection, StudentShape
from afd.diffusion.flow_matching import add_noise, chunk_times
from afd.models.three_velocities import LaggingPass
from afd.rollout import SamplerTimes, chunk_spans
from afd.train.averaging import ParameterAverage
from afd.train.engines import Engine, gathered
from afd.train.student_step import step_student
from afd.types import NoisedStates, Rollout
from afd_kernels import add_noise_and_target, nft_loss


def make_noised_states(
    rollout: Rollout, generators: list[torch.Generator], section: NFTSection, *, times: SamplerTimes, shift: float,
    shape: StudentShape,
) -> NoisedStates:  # fmt: skip
    """The forward process on the student's own samples: one time per chunk, context as in the rollout.

    The noise is fresh, or coupled to the rollout's own: eps' = rho eps + sqrt(1 - rho^2) xi.

    Args:
        rollout: N clean samples.
        generators: one per row, so that a row's noise depends neither on ranks nor on batching.
        section: how times are drawn.
        times: the sampler's times.
        shift: the sampler's time shift.
        shape: the student's; tells the chunks.
    Raises:
        ValueError: coupled noise is asked for and the rollout did not keep its own.
    """
    x0 = rollout.latents
    lengths = [end - start for start, end in chunk_spans(shape, x0.shape[2])]
    uniforms = torch.stack([torch.rand(len(lengths), generator=g) for g in generators])
    t = chunk_times(
        uniforms,
        chunk_lengths=lengths,
        sampling=section.time_sampling,
        grid=times.times,
        first_grid=times.first_chunk_times,
        shift=shift,
    ).to(x0.device)  # [N, F]
    eps = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in generators]).to(x0)
    if section.noise_coupling:
        if rollout.noise is None:
            raise ValueError(f"rollout.noise must be kept for noise_coupling {section.noise_coupling}, got None")
        eps = section.noise_coupling * rollout.noise + math.sqrt(1 - section.noise_coupling**2) * eps
    x_t, v_target = add_noise_and_target(x0, eps, t)
    clean = x0
    if times.context_noise:
        context_eps = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in generators]).to(x0)
        clean = add_noise(x0, context_eps, torch.full_like(t, times.context_noise))
    return NoisedStates(x_t=x_t, v_target=v_target, t=t, clean=clean, context_noise=times.context_noise)


@torch.no_grad()
def velocities_of(
    engine: Engine, average: ParameterAverage | None, states: NoisedStates, prompt_embeds: Tensor, *, gathers_once: bool
) -> Tensor:
    """Velocity [N, C, F, H, W] of an average (or of the student itself) in the teacher-forcing layout, no gradient.

    Args:
        engine: the student's.
        average: whose weights; None for the student's own.
        states: N noised rollouts, taken a micro batch at a time.
        prompt_embeds: [N, L, D].
        gathers_once: under ZeRO-3, make all weights whole once for all micro batches (as in a rollout) instead of a
            block at a time for each of them.
    """
    with ExitStack() as stack:
        if average is not None:
            stack.enter_context(average.applied())
        student: Any = stack.enter_context(gathered(engine)) if gathers_once else engine
        parts = _micro_batches(engine, states, prompt_embeds)
        return torch.cat([student(*part, clean=clean, context_noise=states.context_noise) for *part, clean in parts])


def _micro_batches(
    engine: Engine, states: NoisedStates, prompt_embeds: Tensor
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    micro = engine.train_micro_batch_size_per_gpu()
    tensors = (states.x_t, states.t, prompt_embeds, states.clean)
    return list(zip(*(tensor.split(micro) for tensor in tensors), strict=True))


def update_student(
    engine: Engine,
    states: NoisedStates,
    prompt_embeds: Tensor,
    weight: Tensor,
    section: NFTSection,
    *,
    v_old: Tensor | None,
    v_ref: Tensor | None,
    beside: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Minimise L = L_NFT + lambda L_prior once over this rank's samples.

    Args:
        engine: the student's; its micro batch times accumulation is this rank's N.
        states: noised rollouts.
        prompt_embeds: [N, L, D].
        weight: [N] optimality weights in [0, 1].
        section: variant, nft_beta, prior weight, clip.
        v_old: [N, C, F, H, W] old policy's velocity; None takes stopgrad(v), or what is computed beside v.
        v_ref: [N, C, F, H, W] initial student's velocity; None where the prior weight is 0 or it is computed beside v.
        beside: "old", "reference" or both: roles that go through each block together with the student, so that ZeRO-3
            gathers it once for all (`LaggingPass`); needs adapters.
    Returns:
        `student/loss`, `student/flow_error` = mean |v - v*|^2, `student/old_deviation` = mean |v - v_old|^2,
        `student/prior` = mean |v - v_ref|^2, averaged over all ranks; `student/grad_norm` before clipping,
        `student/lr`, `student/skipped_steps`.
    """
    given = {"old": v_old, "reference": v_ref}
    known = {name: velocity for name, velocity in given.items() if velocity is not None}

    def loss_of(
        x_t: Tensor, t: Tensor, prompt: Tensor, clean: Tensor, v_target: Tensor, w: Tensor, *velocities: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        lagging = LaggingPass(beside) if beside else None
        v = engine(x_t, t, prompt, clean=clean, context_noise=states.context_noise, lagging=lagging)
        others = dict(zip(known, velocities, strict=True)) | (lagging.velocities if lagging is not None else {})
        old, ref = others.get("old"), others.get("reference")
        per_sample = nft_loss(
            v,
            old,
            v_target,
            t,
            w,
            nft_beta=section.nft_beta,
            v_ref=ref,
            prior_weight=section.prior_weight if ref is not None else 0.0,
            variant=section.variant,
            advantage_clip=section.advantage_clip,
        )
        with torch.no_grad():
            targets = {
                "flow_error": v_target,
                "old_deviation": v if old is None else old,
                "prior": v if ref is None else ref,
            }
            errors = {f"student/{name}": (v - target).float().square().mean() for name, target in targets.items()}
        return per_sample.mean(), errors

    inputs = (states.x_t, states.t, prompt_embeds, states.clean, states.v_target, weight, *known.values())
    return step_student(engine, inputs, loss_of)
