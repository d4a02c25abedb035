"""Latents and prompts to what the VLM discriminator is called with: decoded frames and token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from afd.models.encoders import VideoCodec
from afd.models.vlm_frames import resize_frames

PADDING = -1  # of conditions, behind a text's last token


class PixelView:
    """(latents, prompts) -> (frames, tokens); teacher and student clips go through the same codec and resizing.

    Clips are decoded a few latent frames at a time, and only the frames that are shown are kept: memory does not grow
    with their length.
    """

    def __init__(
        self,
        codec: VideoCodec,
        tokenizer: Any,
        *,
        template: str,
        frames: tuple[int, ...],
        size: tuple[int, int],
        text_len: int,
        decode_clips: int,
        decode_frames: int,
    ) -> None:
        """Remember how.

        Args:
            codec: decodes latents to pixels.
            tokenizer: of the VLM.
            template: text with {video} and {prompt}; what follows {video} is tokenised here.
            frames: indices of the decoded frames that are shown, ascending.
            size: (height, width) they are resized to.
            text_len: tokens L of a condition.
            decode_clips: clips decoded together.
            decode_frames: latent frames decoded at a time.
        """
        self._codec, self._tokenizer = codec, tokenizer
        self._text = template.partition("{video}")[2]
        self._frames, self._size, self._text_len = frames, size, text_len
        self._decode_clips, self._decode_frames = decode_clips, decode_frames
        self._special = set(tokenizer.get_added_vocab())

    def __call__(self, latents: Tensor, prompts: Sequence[str], prompt_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """What the discriminator is shown.

        Args:
            latents: [N, C, F, H, W].
            prompts: N strings.
            prompt_embeds: not used: the VLM reads the words.
        Returns:
            clips [N, 3, T, height, width] float32 in [0, 1] on the latents' device, and conditions [N, L] int64 on the
            CPU, -1 behind the last token.
        Raises:
            ValueError: numbers of clips and prompts differ, or a prompt does not fit.
        """
        if len(prompts) != len(latents):
            raise ValueError(f"prompts must be one per clip, {len(latents)}, got {len(prompts)}")
        return self.decode(latents), self.tokenize(prompts)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, C, F, H, W] to clips [N, 3, T, height, width] float32 in [0, 1].

        Raises:
            ValueError: the clips are shorter than the last frame to show.
        """
        return torch.cat([self._decode_batch(part) for part in latents.split(self._decode_clips)])

    def _decode_batch(self, latents: Tensor) -> Tensor:
        decoder, first, shown = self._codec.new_decoder(), 0, []
        for chunk in latents.split(self._decode_frames, dim=2):
            pixels = decoder.decode(chunk)  # [n, k, rows, columns, 3]
            end = first + pixels.shape[1]
            wanted = [index - first for index in self._frames if first <= index < end]
            if wanted:
                shown.append(resize_frames(pixels[:, wanted], self._size))
            first = end
        if first <= self._frames[-1]:
            raise ValueError(f"clips must decode to more than {self._frames[-1]} frames, got {first}")
        return torch.cat(shown, dim=2)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [N, L] int64 of the template's text with each prompt, -1 behind the last one.

        Raises:
            ValueError: a prompt holds one of the model's special tokens, or its text is longer than L tokens.
        """
        rows = torch.full((len(prompts), self._text_len), PADDING, dtype=torch.int64)
        for row, prompt in zip(rows, prompts, strict=True):
            for token in self._special:
                if token in prompt:
                    raise ValueError(f"prompt must not hold the VLM's special token {token!r}: {prompt!r}")
            text = self._text.replace("{prompt}", prompt)
            ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) > self._text_len:
                raise ValueError(
                    f"prompt and template must have at most discriminator.vlm.text_len = {self._text_len} tokens, "
                    f"got {len(ids)} in {prompt!r}"
                )
            row[: len(ids)] = torch.tensor(ids)
        return rows
