"""Heads on features of a frozen copy of the student's backbone: what a video model already knows about motion, judged.

The copy holds the blocks up to the last tapped one and nothing behind it. It sees a clip as a bidirectional model
would: one chunk as long as the clip. The prompt reaches the features through the backbone's own cross-attention. Only
the heads are trained.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from afd.config import BackboneSection, StudentShape
from afd.models.score_head import ScoreHead
from afd.models.student import CausalStudent
from afd_kernels import BlockCausalLayout

_HEAD_WIDTH_OF_ATTENTION = 32  # channels per attention head in the pooling


def backbone_shape(student: StudentShape, layers: tuple[int, ...]) -> StudentShape:
    """The student's dimensions with the blocks up to the last tapped one, and no window to attend in."""
    return student.model_copy(update={"num_layers": max(layers) + 1, "window_frames": None, "sink_frames": 0})


class TapHead(nn.Module):
    """One layer's features to one score: normalise, mix neighbours in space and time, pool with learned queries.

    Args:
        dim: width of the features.
        width: channels inside; a multiple of 32.
        num_queries: learned queries, each of which gathers its own average of the clip.
    """

    def __init__(self, dim: int, *, width: int, num_queries: int) -> None:
        super().__init__()
        self.heads = width // _HEAD_WIDTH_OF_ATTENTION
        self.norm_in = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, width)
        self.mix = nn.Conv3d(width, width, kernel_size=3, padding=1)
        self.norm = nn.LayerNorm(width)
        self.keys_values = nn.Linear(width, 2 * width)
        self.queries = nn.Parameter(torch.randn(num_queries, width) / width**0.5)
        self.score = ScoreHead(num_queries * width, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, features: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Score features [N, frames * rows * columns, dim] of a token grid; [N] float32 or wider, 0 untrained."""
        x = self.project(self.norm_in(features))
        volume = x.transpose(1, 2).unflatten(2, grid)
        x = self.norm(x + F.silu(self.mix(volume)).flatten(2).transpose(1, 2))
        keys, values = self.keys_values(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        queries = self.queries.unflatten(-1, (self.heads, -1)).transpose(0, 1).expand(len(x), -1, -1, -1)
        pooled = F.scaled_dot_product_attention(queries, keys, values)  # [N, heads, num_queries, 32]
        return self.score(pooled.transpose(1, 2).flatten(1)).squeeze(-1)


class BackboneDiscriminator(nn.Module):
    """D(x, y): the mean of several heads' scores, each on another layer of a frozen backbone.

    Args:
        backbone: a student with exactly the blocks that are needed (`backbone_shape`); it is frozen here.
        layers: indices of the tapped blocks, ascending.
        section: the time that features are taken at, the heads' sizes, gradient checkpointing.
    """

    def __init__(self, backbone: CausalStudent, layers: tuple[int, ...], section: BackboneSection) -> None:
        super().__init__()
        assert backbone.shape.num_layers == max(layers) + 1
        self.backbone = backbone.requires_grad_(False)
        self.backbone.gradient_checkpointing = section.gradient_checkpointing
        del self.backbone.proj_out, self.backbone.scale_shift_table  # behind the last block
        self.layers, self.time = layers, section.time
        dim = backbone.shape.dim
        make = lambda: TapHead(dim, width=section.head_width, num_queries=section.num_queries)  # noqa: E731
        self.heads = nn.ModuleList([make() for _ in layers])

    def forward(self, latents: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Score clips.

        Args:
            latents: [N, C, F, H, W], any dtype: cast to the weights'. The gradient flows to them through the frozen
                blocks where they require one; else nothing of the backbone is kept for a backward pass.
            prompt_embeds: [N, L, D].
        Returns:
            scores [N] float32; 0 for every clip before the first update.
        Raises:
            ValueError: shapes do not fit the model.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and latents.requires_grad):
            features, grid = self.features(latents, prompt_embeds)
        scores = [head(each, grid) for head, each in zip(self.heads, features, strict=True)]
        return torch.stack(scores).mean(dim=0).float()

    def features(self, latents: Tensor, prompt_embeds: Tensor) -> tuple[list[Tensor], tuple[int, int, int]]:
        """Outputs [N, tokens, dim] of the tapped blocks, and the grid of tokens; arguments as for `forward`."""
        backbone = self.backbone
        t = torch.full((latents.shape[0], latents.shape[2]), self.time, device=latents.device)
        video = backbone.embed(latents, t, prompt_embeds)
        frames, rows, columns = video.grid
        whole = BlockCausalLayout(num_frames=frames, tokens_per_frame=rows * columns, chunk_frames=frames)
        inputs = (video.modulation, video.prompt, video.rope, whole, None, backbone.shape.attention_impl)
        x, kept = video.tokens, []
        for index, block in enumerate(backbone.blocks):
            if backbone.gradient_checkpointing and torch.is_grad_enabled():
                # Non-reentrant: the GAN objective asks for the clip's gradient alone (`torch.autograd.grad`).
                x = checkpoint(block, x, *inputs, use_reentrant=False)
            else:
                x = block(x, *inputs)
            assert isinstance(x, Tensor)
            if index in self.layers:
                kept.append(x)
        return kept, video.grid
