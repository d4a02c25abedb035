"""Eager oracle of the NFT loss; differentiable by autograd, exact in float64."""

from dataclasses import dataclass

from torch import Tensor

from afd_kernels.dispatch import accumulation_dtype

ABS_FLOOR = 1e-5  # DiffusionNFT's clip of the adaptive weights


@dataclass(frozen=True)
class NFTLossConstants:
    """The scalars of the loss, see `afd_kernels.nft_loss.nft_loss`."""

    nft_beta: float
    prior_weight: float
    is_prior_weighted: bool
    is_adaptive: bool
    advantage_clip: float


def nft_loss_reference(
    v: Tensor,
    v_old: Tensor | None,
    targets: tuple[Tensor, ...],
    times: Tensor,
    w: Tensor,
    v_ref: Tensor | None,
    constants: NFTLossConstants,
) -> Tensor:
    """Per-sample loss [N]; arguments as checked by `nft_loss` (targets: (v_target,) or (x0, eps); times [N, F])."""
    dtype = accumulation_dtype(v.dtype)
    student = v.to(dtype)
    old = student.detach() if v_old is None else v_old.to(dtype)
    v_target = targets[0].to(dtype) if len(targets) == 1 else targets[1].to(dtype) - targets[0].to(dtype)
    weight = w.to(dtype)
    error = old - v_target
    step = constants.nft_beta * (student - old)
    positive, negative = error + step, error - step
    if constants.is_adaptive:
        scale = times.to(dtype)[:, None, :, None, None]
        positive, negative = scale * positive, scale * negative
        branch_scale = constants.advantage_clip / constants.nft_beta
        positive_weight = weight * branch_scale / _mean_abs(positive)
        negative_weight = (1 - weight) * branch_scale / _mean_abs(negative)
    else:
        positive_weight, negative_weight = weight, 1 - weight
    loss = positive_weight * _mean_square(positive) + negative_weight * _mean_square(negative)
    if v_ref is not None:
        prior = constants.prior_weight * _mean_square(student - v_ref.to(dtype))
        loss = loss + (weight * prior if constants.is_prior_weighted else prior)
    return loss


def _mean_square(x: Tensor) -> Tensor:
    return x.square().flatten(1).mean(1)


def _mean_abs(x: Tensor) -> Tensor:
    return x.detach().abs().flatten(1).mean(1).clamp_min(ABS_FLOOR)
