"""Frozen encoders between words, pixels and the student: text (UMT5 and alike) and video codecs.

Used at preparation time and to decode samples; never inside a training step. transformers and diffusers are imported
only when an encoder is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from afd.config import EncodersSection, VideoSection
from afd.models.dct_codec import DCTCodec

QUICKSTART_ASSETS = Path(__file__).resolve().parent.parent / "assets" / "quickstart"


class VideoCodec(Protocol):
    """Pixels [B, F, height, width, 3] in [0, 1] <-> latents [B, C, F', H, W]; teacher and student share one."""

    num_channels: int
    spatial_stride: int
    name: str

    def encode(self, video: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


class TextEncoder:
    """A tokenizer and a T5-family encoder from one folder; `encode` zero-pads behind the last token, as Wan does."""

    def __init__(self, folder: Path, *, text_len: int, device: torch.device | str = "cpu") -> None:
        """Load from a folder with tokenizer files, config.json and safetensors weights.

        Args:
            folder: as written by `save_pretrained` of tokenizer and encoder.
            text_len: tokens L of every embedding; longer prompts are refused.
            device: where the encoder runs.
        Raises:
            ValueError: the folder lacks config.json or a tokenizer.
        """
        from transformers import AutoTokenizer, UMT5EncoderModel

        for needed in ("config.json", "tokenizer_config.json"):
            if not (folder / needed).is_file():
                raise ValueError(f"text encoder folder {folder} must hold {needed}, which is missing")
        self.text_len = text_len
        self.name = folder.name
        self._device = torch.device(device)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = UMT5EncoderModel.from_pretrained(folder)
        self._model = model.eval().requires_grad_(False).to(self._device)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts: [B, text_len, D] float32, zero behind each prompt's last token.

        Raises:
            ValueError: a prompt is empty, longer than text_len tokens, or has a word the tokenizer does not know.
        """
        tokens = self._tokenizer(list(prompts), padding=True, return_tensors="pt").to(self._device)
        lengths = tokens["attention_mask"].sum(1).tolist()
        unknown = self._tokenizer.unk_token_id
        for prompt, length, ids in zip(prompts, lengths, tokens["input_ids"].tolist(), strict=True):
            if not 0 < length <= self.text_len:
                raise ValueError(f"prompt must have 1 to {self.text_len} tokens, got {length} in {prompt!r}")
            if unknown is not None and unknown in ids:
                word = prompt.split()[ids.index(unknown)] if len(prompt.split()) == length else prompt
                raise ValueError(f"prompt has a word this text encoder does not know: {word!r} in {prompt!r}")
        hidden = self._model(**tokens).last_hidden_state.float() * tokens["attention_mask"][..., None]
        out = hidden.new_zeros(len(prompts), self.text_len, hidden.shape[-1])
        out[:, : hidden.shape[1]] = hidden
        return out


def save_tiny_text_encoder(folder: Path, vocabulary: Sequence[str], *, text_dim: int, seed: int) -> None:
    """Write the quick start's text encoder: a word-level tokenizer and a frozen random one-layer UMT5.

    The files are ordinary transformers files, so the quick start takes the same path as a real UMT5.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    words = ["<pad>", "<unk>", *sorted(set(vocabulary))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(folder)
    config = UMT5Config(
        vocab_size=len(words), d_model=text_dim, d_kv=text_dim // 2, d_ff=2 * text_dim, num_layers=1, num_heads=2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UMT5EncoderModel(config)
        torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(folder)


class WanVAE:
    """diffusers' AutoencoderKLWan with its own latent normalisation, frame-major pixels in and out."""

    def __init__(self, folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Load from a diffusers folder (config.json + safetensors).

        Raises:
            ValueError: the folder has no config.json.
        """
        from diffusers import AutoencoderKLWan

        if not (folder / "config.json").is_file():
            raise ValueError(f"VAE folder {folder} must hold config.json, which is missing")
        vae: Any = AutoencoderKLWan.from_pretrained(folder, torch_dtype=dtype)
        self._vae = vae.eval().requires_grad_(False).to(device)
        config = vae.config
        self.num_channels: int = config.z_dim
        self.spatial_stride: int = config.scale_factor_spatial
        self.name = f"wan-vae-{folder.name}"
        shape = (1, -1, 1, 1, 1)
        self._mean = torch.tensor(config.latents_mean, device=device, dtype=dtype).view(shape)
        self._std = torch.tensor(config.latents_std, device=device, dtype=dtype).view(shape)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Pixels [B, 1 + 4 n, height, width, 3] in [0, 1] to latents [B, C, 1 + n, height / 8, width / 8]."""
        pixels = (video.permute(0, 4, 1, 2, 3) * 2 - 1).to(self._mean)
        return ((self._vae.encode(pixels).latent_dist.mode() - self._mean) / self._std).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, 1 + n, H, W] to pixels [B, 1 + 4 n, 8 H, 8 W, 3] in [0, 1]."""
        pixels = self._vae.decode(latents.to(self._mean) * self._std + self._mean).sample
        return (pixels.float().permute(0, 2, 3, 4, 1) / 2 + 0.5).clamp(0, 1)


_WAN_CHANNELS, _WAN_SPATIAL_STRIDE = 16, 8


def latent_shape(encoders: EncodersSection, video: VideoSection) -> tuple[int, int, int, int]:
    """(C, F, H, W) of a clip, without loading a codec.

    Raises:
        ValueError: height or width is not divisible by the codec's stride.
    """
    channels, stride = (
        (DCTCodec.num_channels, DCTCodec.spatial_stride)
        if encoders.codec == "dct"
        else (_WAN_CHANNELS, _WAN_SPATIAL_STRIDE)
    )
    if video.height % stride or video.width % stride:
        raise ValueError(
            f"video.height and video.width must be divisible by {stride} for codec {encoders.codec}, "
            f"got {video.height} x {video.width}"
        )
    return channels, video.num_frames, video.height // stride, video.width // stride


def text_encoder_folder(encoders: EncodersSection) -> Path:
    """The text encoder's folder, the shipped one by default."""
    return encoders.text_path or QUICKSTART_ASSETS / "text_encoder"


def load_codec(encoders: EncodersSection, *, device: torch.device | str = "cpu") -> VideoCodec:
    """The configured codec.

    Raises:
        ValueError: wan_vae without `vae_path`, or a folder without a VAE.
    """
    if encoders.codec == "dct":
        return DCTCodec()
    if encoders.vae_path is None:
        raise ValueError("encoders.vae_path must name an AutoencoderKLWan folder for codec wan_vae, got none")
    return WanVAE(encoders.vae_path, device=device)


def load_text_encoder(encoders: EncodersSection, *, device: torch.device | str = "cpu") -> TextEncoder:
    """The configured text encoder."""
    return TextEncoder(text_encoder_folder(encoders), text_len=encoders.text_len, device=device)
