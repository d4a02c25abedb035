"""The last layer of every discriminator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ScoreHead(nn.Linear):
    """One number per vector in float32: scores of one prompt's rollouts differ by less than bfloat16 keeps."""

    def forward(self, input: Tensor) -> Tensor:
        """Score vectors [..., D] of any dtype: [..., 1] float32, or float64 where the weights are."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return F.linear(input.to(wide), self.weight.to(wide), self.bias.to(wide))
