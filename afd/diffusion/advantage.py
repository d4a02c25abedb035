"""From discriminator scores to optimality weights. All functions see the scores of *all* ranks, gathered."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Baseline = Literal["group", "batch"]
Normalisation = Literal["global_std", "group_std", "minmax"]


def group_advantage(scores: Tensor, *, group_size: int, baseline: Baseline = "group") -> Tensor:
    """Advantage r = D(x, y) - b(y) with the group's or the batch's mean score as baseline.

    Args:
        scores: [N] float32, the G rollouts of a prompt in consecutive rows.
        group_size: G; divides N.
        baseline: "group" (needs G > 1) or "batch".
    Returns:
        [N], mean zero within each group, or over the batch.
    Raises:
        ValueError: N is not a multiple of G, or the baseline is "group" with one rollout per prompt.
    Source: arXiv 2605.26105, section 3 (second-hand).
    """
    if scores.ndim != 1 or scores.numel() % group_size:
        raise ValueError(f"scores must be [N] with N a multiple of group_size = {group_size}, got {list(scores.shape)}")
    if baseline == "batch":
        return scores - scores.mean()
    if group_size == 1:
        raise ValueError("baseline 'group' needs group_size > 1 (every advantage would be zero), got 1")
    groups = scores.view(-1, group_size)
    return (groups - groups.mean(dim=1, keepdim=True)).flatten()


def normalise_advantage(advantage: Tensor, *, group_size: int, by: Normalisation, eps: float = 1e-4) -> Tensor:
    """Scale advantages to unit size.

    Args:
        advantage: [N] float32.
        group_size: G, read for "group_std".
        by: "global_std" divides by the standard deviation over the step (DiffusionNFT's default), "group_std" by the
            group's own; "minmax" maps the step's range onto [-1, 1].
        eps: added to the denominator.
    Returns:
        [N] float32; zeros where all advantages are equal.
    """
    if by == "minmax":
        low, high = advantage.min(), advantage.max()
        return (2 * advantage - high - low) / (high - low + eps)
    if by == "group_std":
        groups = advantage.view(-1, group_size)
        return (groups / (groups.std(dim=1, correction=0, keepdim=True) + eps)).flatten()
    return advantage / (advantage.std(correction=0) + eps)


def optimality_weight(advantage: Tensor, *, clip: float) -> Tensor:
    """Map advantages to NFT optimality weights: w = clamp(a, -clip, clip) / (2 clip) + 1/2.

    Args:
        advantage: [N] float32, normalised.
        clip: magnitude that saturates w; > 0.
    Returns:
        [N] float32 in [0, 1].
    Raises:
        ValueError: clip is not positive.
    Source: arXiv 2509.16117, eq. for r; DiffusionNFT scripts/train_nft_sd3.py.
    """
    if clip <= 0:
        raise ValueError(f"clip must be > 0, got {clip}")
    return advantage.clamp(-clip, clip) / (2 * clip) + 0.5
