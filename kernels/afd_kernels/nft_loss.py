"""Negative-aware flow-matching loss (DiffusionNFT) with an optional prior: the public function."""

import torch
from torch import Tensor

from afd_kernels.dispatch import check_dtype, check_shape, check_tensor, check_times, resolve_impl
from afd_kernels.nft_loss_reference import NFTLossConstants, nft_loss_reference

VARIANTS = ("plain", "adaptive")


def nft_loss(
    v: Tensor,
    v_old: Tensor | None,
    v_target: Tensor | tuple[Tensor, Tensor],
    t: Tensor,
    w: Tensor,
    *,
    nft_beta: float,
    v_ref: Tensor | None = None,
    prior_weight: float = 0.0,
    is_prior_weighted: bool = True,
    variant: str = "adaptive",
    advantage_clip: float = 5.0,
    impl: str | None = None,
) -> Tensor:
    """Per-sample NFT loss plus prior: L = L_NFT + prior_weight * L_prior; the gradient flows to v only.

    v+ = (1 - beta) v_old + beta v and v- = (1 + beta) v_old - beta v. With <.> the mean over one sample's C F H W:
    plain:    L_NFT = w <|v+ - v*|^2> + (1 - w) <|v- - v*|^2>
    adaptive: L_NFT = (c / beta) (w <|t (v+ - v*)|^2> / m+ + (1 - w) <|t (v- - v*)|^2> / m-),
              m+- = max(<|t (v+- - v*)|>, 1e-5) detached (x0 space: x0+- - x0 = t (v* - v+-), x_t is never read)
    L_prior = w <|v - v_ref|^2>, or without w when `is_prior_weighted` is False.

    Args:
        v: [N, C, F, H, W] velocity of the student being trained.
        v_old: same shape and dtype, old policy; None means stopgrad(v) ("current"), and nothing is read for it.
        v_target: v* = eps - x0, same shape and dtype; or the pair (x0, eps), subtracted in float32.
        t: [N] or [N, F] in [0, 1].
        w: [N] optimality weights in [0, 1].
        nft_beta: > 0.
        v_ref: frozen initial student's velocity, same shape and dtype; needed when prior_weight > 0, else not read.
        prior_weight: lambda >= 0.
        is_prior_weighted: multiply the prior by w (AFD) or not (DiffusionNFT).
        variant: "plain" or "adaptive".
        advantage_clip: c, the factor of the adaptive variant only.
        impl: "reference", "triton" or None (by device).
    Returns:
        [N] float32 (float64 for float64 inputs).
    Raises:
        ValueError: shapes, dtypes, devices or constants do not fit; another input than v requires a gradient.
    Source: arXiv 2509.16117; NVlabs/DiffusionNFT scripts/train_nft_sd3.py (adaptive weights, floor, c); arXiv
        2605.26105 (prior).
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    if not nft_beta > 0:
        raise ValueError(f"nft_beta must be > 0, got {nft_beta}")
    if not prior_weight >= 0:
        raise ValueError(f"prior_weight must be >= 0, got {prior_weight}")
    if prior_weight > 0 and v_ref is None:
        raise ValueError(f"v_ref must be given when prior_weight > 0, got None with prior_weight {prior_weight}")
    check_tensor("v", v, "N C F H W")
    times = check_times(t, v)
    check_shape("w", check_tensor("w", w, "N", v), [v.shape[0]])
    targets = _check_targets(v_target, v)
    reference = v_ref if prior_weight > 0 else None
    for name, value in (("v_old", v_old), ("v_ref", reference)):
        if value is not None:
            _check_like(name, value, v)
    _refuse_gradients({"v_old": v_old, "v_ref": reference, "t": t, "w": w})
    constants = NFTLossConstants(
        nft_beta=float(nft_beta),
        prior_weight=float(prior_weight),
        is_prior_weighted=is_prior_weighted,
        is_adaptive=variant == "adaptive",
        advantage_clip=float(advantage_clip),
    )
    if resolve_impl("nft_loss", impl, v) == "reference":
        return nft_loss_reference(v, v_old, targets, times, w, reference, constants)
    from afd_kernels.nft_loss_triton import nft_loss_triton

    return nft_loss_triton(v, v_old, targets, times, w, reference, constants)


def _check_targets(v_target: Tensor | tuple[Tensor, Tensor], v: Tensor) -> tuple[Tensor, ...]:
    """Return (v_target,) or (x0, eps), checked."""
    names = ("v_target",) if isinstance(v_target, Tensor) else ("x0", "eps")
    values = (v_target,) if isinstance(v_target, Tensor) else tuple(v_target)
    if len(values) != len(names):
        raise ValueError(f"v_target must be a tensor or the pair (x0, eps), got {len(values)} tensors")
    for name, value in zip(names, values, strict=True):
        _check_like(name, value, v)
        _refuse_gradients({name: value})
    return values


def _check_like(name: str, value: Tensor, v: Tensor) -> None:
    check_tensor(name, value, "N C F H W", v)
    check_shape(name, value, v.shape)
    check_dtype(name, value, v.dtype)


def _refuse_gradients(tensors: dict[str, Tensor | None]) -> None:
    if not torch.is_grad_enabled():
        return
    for name, value in tensors.items():
        if value is not None and value.requires_grad:
            raise ValueError(f"{name} must not require a gradient (only v may), got requires_grad=True")
