"""The discriminator's loss. The student's, `nft_loss`, is a kernel: see `afd_kernels`."""

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
