"""What scores are trained with: the discriminator's losses, and a generator's for the GAN objective.

The student's own loss, `nft_loss`, is a kernel: see `afd_kernels`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(
    teacher_scores: Tensor, student_scores: Tensor, *, temperature: float = 1.0, label_smoothing: float = 0.0
) -> Tensor:
    """Prompt-paired Bradley-Terry: -log sigmoid((D(x^T, y) - D(x^S, y)) / temperature), label-smoothed.

    With smoothing s the target probability "the teacher's video is preferred" is 1 - s instead of 1. At s = 0 the
    optimum of D / temperature is log p_T(x | y) / p_S(x | y) up to a constant per prompt.

    Args:
        teacher_scores: [N], row-paired with the student's by prompt.
        student_scores: [N].
        temperature: > 0.
        label_smoothing: in [0, 0.5).
    Returns:
        [], mean over the pairs.
    Raises:
        ValueError: shapes differ, or a knob is out of range.
    Source: arXiv 2605.26105, eq. of L_D.
    """
    if teacher_scores.shape != student_scores.shape:
        raise ValueError(
            f"teacher_scores must be {list(student_scores.shape)} like student_scores, got {list(teacher_scores.shape)}"
        )
    if temperature <= 0 or not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"temperature must be > 0 and label_smoothing in [0, 0.5), got {temperature} and {label_smoothing}"
        )
    margin = (teacher_scores - student_scores) / temperature
    return -((1 - label_smoothing) * F.logsigmoid(margin) + label_smoothing * F.logsigmoid(-margin)).mean()


def gan_discriminator_loss(teacher_scores: Tensor, student_scores: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Classify each clip alone: -log sigmoid(D(x^T, y)) - log sigmoid(-D(x^S, y)), one-sided smoothing on the teacher.

    At smoothing 0 the optimum is log p_T(x | y) / p_S(x | y), without a free constant: prompts are not paired.

    Args:
        teacher_scores, student_scores: [N] each.
        label_smoothing: in [0, 0.5): the teacher's target probability is 1 - label_smoothing.
    Returns:
        [], mean over the clips.
    Raises:
        ValueError: label_smoothing is out of range.
    Source: arXiv 1406.2661, eq. 1; one-sided smoothing arXiv 1606.03498, section 3.4.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    real = (1 - label_smoothing) * F.logsigmoid(teacher_scores) + label_smoothing * F.logsigmoid(-teacher_scores)
    return -real.mean() - F.logsigmoid(-student_scores).mean()


def non_saturating_loss(student_scores: Tensor) -> Tensor:
    """A generator's loss against `gan_discriminator_loss`: -log sigmoid(D(x^S, y)).

    Args:
        student_scores: [N].
    Returns:
        [], mean over the clips.
    Source: arXiv 1406.2661, section 3.
    """
    return -F.logsigmoid(student_scores).mean()
