"""The paper's kind of discriminator: Qwen2-VL or Qwen2.5-VL, a score token after the prompt, a scalar head on it.

Under causal attention a token sees what stands before it: VideoAlign's quality tokens, which precede the prompt, cannot
know it. Here the sequence is [chat head | video | prompt and question | score token | padding], so the score depends on
video and prompt, and padding cannot reach it. Made from files by vlm_weights.py, fed by vlm_view.py.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from afd.models.score_head import ScoreHead
from afd.models.vlm_frames import patchify
from afd.models.vlm_view import PADDING

Vision = Literal["frozen", "lora", "full"]
Positions = Literal["multimodal", "sequential"]


class VLMDiscriminator(nn.Module):
    """D(x, y): shown frames and token ids to one score per clip."""

    def __init__(self, vlm: nn.Module, *, prefix: list[int], positions: Positions, seconds_per_patch: float) -> None:
        """Wrap a model; the head starts at zero and the score token at the mean token.

        Args:
            vlm: transformers' Qwen2VLModel or Qwen2_5_VLModel (vision tower `visual`, `language_model`).
            prefix: token ids before the video.
            positions: see `VLMSection.positions`.
            seconds_per_patch: seconds of video between two temporal patches; Qwen2.5-VL's positions count them.
        """
        super().__init__()
        self.vlm: Any = vlm
        config = self.vlm.config
        self._patch = (config.vision_config.patch_size, config.vision_config.temporal_patch_size)
        self._merge: int = config.vision_config.spatial_merge_size
        self._before = [*prefix, config.vision_start_token_id]
        self._video, self._after = config.video_token_id, config.vision_end_token_id
        self._positions, self._seconds_per_patch = positions, seconds_per_patch
        embedding: Tensor = self.vlm.get_input_embeddings().weight
        self.score_token = nn.Parameter(embedding.detach().float().mean(dim=0).to(embedding.dtype))
        self.head = ScoreHead(embedding.shape[1], 1, dtype=embedding.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, clips: Tensor, condition: Tensor) -> Tensor:
        """Score clips.

        Args:
            clips: [N, 3, T, height, width] in [0, 1], any float dtype; noise may leave the range.
            condition: [N, L] int64 token ids behind the video, -1 behind the last one; best on the CPU.
        Returns:
            scores [N] float32; 0 for every clip before the first update of a new head.
        Raises:
            ValueError: shapes do not fit, or a text is empty.
        """
        condition = condition.cpu()
        lengths = (condition != PADDING).sum(dim=1)
        if condition.ndim != 2 or len(condition) != len(clips) or int(lengths.min()) == 0:
            raise ValueError(
                f"condition must be [N, L] with a text for each of {len(clips)} clips, got {list(condition.shape)}"
            )
        patch, temporal = self._patch
        dtype, device = self.score_token.dtype, clips.device
        patches = patchify(clips.float(), patch=patch, temporal=temporal, merge=self._merge).to(dtype)
        _, _, frames, height, width = clips.shape
        grid = torch.tensor([[frames // temporal, height // patch, width // patch]]).expand(len(clips), 3)
        video: Tensor = self.vlm.visual(patches, grid_thw=grid.to(device)).pooler_output  # [N video tokens, D]
        start, num_video = len(self._before), len(video) // len(clips)
        ids, is_video = self._token_ids(condition, lengths, num_video)
        at = start + num_video + 1 + lengths  # [N], place of the score token
        embeds: Tensor = self.vlm.get_input_embeddings()(ids.to(device)).clone()
        embeds[:, start : start + num_video] = video.view(len(clips), num_video, -1)
        rows = torch.arange(len(clips), device=device)
        embeds = embeds.index_put((rows, at.to(device)), self.score_token.expand(len(clips), -1))
        positions = self._position_ids(ids, is_video, grid).to(device)
        # No mask: attention is causal, and the score token stands before all padding.
        hidden = self.vlm.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False)
        scored: Tensor = hidden.last_hidden_state[rows, at.to(device)]  # [N, D]
        return self.head(scored).squeeze(-1).float()

    def _token_ids(self, condition: Tensor, lengths: Tensor, num_video: int) -> tuple[Tensor, Tensor]:
        """Ids [N, S] of the whole sequence, one place after the longest text included, and where the video is."""
        longest = int(lengths.max())
        text = condition[:, :longest].clamp(min=0)
        parts = (self._before, [self._video] * num_video, [self._after])
        start, video, end = (torch.tensor(part).expand(len(text), -1) for part in parts)
        last = torch.zeros(len(text), 1, dtype=torch.int64)
        ids = torch.cat([start, video, end, text, last], dim=1)
        is_video = torch.zeros_like(ids, dtype=torch.bool)
        is_video[:, len(self._before) : len(self._before) + num_video] = True
        return ids, is_video

    def _position_ids(self, ids: Tensor, is_video: Tensor, grid: Tensor) -> Tensor:
        """Rotary positions [3, N, S], by the model's own rule or one after the other; on the CPU."""
        if self._positions == "sequential":
            return torch.arange(ids.shape[1]).expand(3, *ids.shape)
        seconds = torch.full((len(ids),), self._seconds_per_patch)
        position_ids, _ = self.vlm.get_rope_index(
            ids, mm_token_type_ids=2 * is_video.long(), video_grid_thw=grid, second_per_grid_ts=seconds
        )
        return position_ids


def add_vlm_lora(vlm: nn.Module, *, rank: int, alpha: int, vision: Vision) -> None:
    """Freeze a VLM, then add adapters to the language model's linear layers and free the vision tower, in place.

    Args:
        vlm: as `VLMDiscriminator` takes it.
        rank, alpha: of the adapters; B starts at zero.
        vision: what becomes of the vision tower.
    """
    from peft import LoraConfig, inject_adapter_in_model

    parts = ("language_model.", "visual.") if vision == "lora" else ("language_model.",)
    names = [name for name, module in vlm.named_modules() if isinstance(module, nn.Linear) and name.startswith(parts)]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names), vlm)
    for name, parameter in vlm.named_parameters():
        is_trained = ".lora_" in name or (vision == "full" and name.startswith("visual."))
        parameter.requires_grad_(is_trained)
