"""Frozen encoders between words, pixels and the student: text (UMT5 and alike) and video codecs.

Used at preparation time and to decode samples; never inside a training step. transformers and diffusers are imported
only when an encoder is loaded.
"""

from __future__ import annotations

import gc
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from afd.config import EncodersSection, StudentSection, StudentShape, VideoSection
from afd.models.dct_codec import DCTCodec
from afd.models.model_files import check_weights, config_of, model_and_companion
from afd.models.wan_vae import WanVAE, read_vae_config

QUICKSTART_ASSETS = Path(__file__).resolve().parent.parent / "assets" / "quickstart"


class ChunkDecoder(Protocol):
    """Decodes one stream of latents piece by piece; the pieces together equal the whole clip decoded at once."""

    def decode(self, latents: Tensor) -> Tensor: ...


class VideoCodec(Protocol):
    """Pixels [B, F, height, width, 3] in [0, 1] <-> latents [B, C, F', H, W]; teacher and student share one.

    `num_pixel_frames(F')` is F; `new_decoder()` starts a stream.
    """

    num_channels: int
    spatial_stride: int
    temporal_stride: int
    name: str

    def encode(self, video: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def new_decoder(self) -> ChunkDecoder: ...

    def num_pixel_frames(self, num_latent_frames: int) -> int: ...


class TextEncoder:
    """A tokenizer and a T5-family encoder from one folder; `encode` zero-pads behind the last token, as Wan does."""

    def __init__(
        self,
        folder: Path,
        *,
        text_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Load from a folder with tokenizer files, config.json and safetensors weights.

        Args:
            folder: see `text_encoder_folders`.
            text_len: tokens L of every embedding; longer prompts are refused.
            device: where the encoder runs.
            dtype: of its weights; Wan's UMT5-XXL is 11 GB in bfloat16, twice that in float32.
        Raises:
            ValueError: the folder lacks config.json, a tokenizer or weights, or holds no UMT5.
        """
        read_text_config(folder)
        from transformers import AutoTokenizer, UMT5EncoderModel

        model_folder, tokenizer_folder = text_encoder_folders(folder)
        self.text_len = text_len
        self.name = model_folder.name
        self._device = torch.device(device)
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        model: Any = UMT5EncoderModel.from_pretrained(model_folder, dtype=dtype)
        self._model = model.eval().requires_grad_(False).to(self._device)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts: [B, text_len, D] float32, zero behind each prompt's last token.

        Raises:
            ValueError: a prompt is empty, longer than text_len tokens, or has a word the tokenizer does not know.
        """
        tokens = self.tokenize(prompts)
        hidden = self._model(**tokens).last_hidden_state.float() * tokens["attention_mask"][..., None]
        out = hidden.new_zeros(len(prompts), self.text_len, hidden.shape[-1])
        out[:, : hidden.shape[1]] = hidden
        return out

    def tokenize(self, prompts: Sequence[str]) -> Any:
        """Token ids and mask of cleaned prompts, padded to the longest; checks what `encode` checks.

        Raises:
            ValueError: as `encode`.
        """
        prompts = [clean_prompt(prompt) for prompt in prompts]
        tokens = self._tokenizer(prompts, padding=True, return_tensors="pt").to(self._device)
        lengths = tokens["attention_mask"].sum(1).tolist()
        unknown = self._tokenizer.unk_token_id
        for prompt, length, ids in zip(prompts, lengths, tokens["input_ids"].tolist(), strict=True):
            if not 0 < length <= self.text_len:
                raise ValueError(f"prompt must have 1 to {self.text_len} tokens, got {length} in {prompt!r}")
            if unknown is not None and unknown in ids:
                word = prompt.split()[ids.index(unknown)] if len(prompt.split()) == length else prompt
                raise ValueError(f"prompt has a word this text encoder does not know: {word!r} in {prompt!r}")
        return tokens


def clean_prompt(prompt: str) -> str:
    """Wan's cleaning of a prompt: HTML entities (escaped twice, too) become characters, white space single blanks.

    Source: diffusers src/diffusers/pipelines/wan/pipeline_wan.py (the procedure, without its optional ftfy).
    """
    return " ".join(html.unescape(html.unescape(prompt)).split())


def text_encoder_folders(path: Path) -> tuple[Path, Path]:
    """(model folder, tokenizer folder): one folder for both, a diffusers pipeline, or its `text_encoder`."""
    return model_and_companion(path, model="text_encoder", companion="tokenizer", marker="tokenizer_config.json")


def read_text_config(path: Path) -> dict[str, Any]:
    """The text encoder's config.json, its folder checked to be complete; nothing is loaded.

    Raises:
        ValueError: the folder, its config, tokenizer or weights are missing, or it is no UMT5.
    """
    folder, tokenizer = text_encoder_folders(path)
    config = config_of(folder, owner="text encoder folder")
    if not (tokenizer / "tokenizer_config.json").is_file():
        raise ValueError(f"text encoder folder {folder} must hold tokenizer_config.json, which is missing")
    if config.get("model_type") != "umt5":
        raise ValueError(f"text encoder folder {folder} must hold a umt5 model, got {config.get('model_type')!r}")
    check_weights(folder, owner="text encoder folder")
    return config


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


_WAN_STRIDES = {"z_dim": 16, "scale_factor_spatial": 8}  # of the Wan 2.1 VAE, for planning without its files


def latent_shape(encoders: EncodersSection, video: VideoSection) -> tuple[int, int, int, int]:
    """(C, F, H, W) of a clip, without loading a codec; a VAE's numbers come from its config.json.

    Raises:
        ValueError: height or width is not divisible by the codec's stride, or the VAE's folder is not complete.
    """
    if encoders.codec == "dct":
        channels, stride = DCTCodec.num_channels, DCTCodec.spatial_stride
    else:
        config = _WAN_STRIDES if encoders.vae_path is None else _WAN_STRIDES | read_vae_config(encoders.vae_path)
        channels, stride = config["z_dim"], config["scale_factor_spatial"]
    if video.height % stride or video.width % stride:
        raise ValueError(
            f"video.height and video.width must be divisible by {stride} for codec {encoders.codec}, "
            f"got {video.height} x {video.width}"
        )
    return channels, video.num_frames, video.height // stride, video.width // stride


def check_encoders(encoders: EncodersSection, shape: StudentShape) -> None:
    """Both encoders are complete on disk and fit the student; reads config files only.

    Raises:
        ValueError: the first thing that is missing or does not fit.
    """
    channels = DCTCodec.num_channels
    if encoders.codec == "wan_vae":
        if encoders.vae_path is None:
            raise ValueError(_NO_VAE)
        channels = read_vae_config(encoders.vae_path)["z_dim"]
    if shape.out_channels != channels:
        raise ValueError(
            f"student out_channels must be {channels}, the latent channels of codec {encoders.codec}, "
            f"got {shape.out_channels}"
        )
    width = read_text_config(text_encoder_folder(encoders)).get("d_model")
    if shape.text_dim != width:
        raise ValueError(f"student text_dim must be {width}, the text encoder's width, got {shape.text_dim}")
    if encoders.text_len > shape.text_len:
        raise ValueError(
            f"encoders.text_len must be at most {shape.text_len}, the student's text_len, got {encoders.text_len}"
        )


def text_encoder_folder(encoders: EncodersSection) -> Path:
    """The text encoder's folder, the shipped one by default."""
    return encoders.text_path or QUICKSTART_ASSETS / "text_encoder"


def student_path(section: StudentSection) -> Path:
    """Where the student starts from: what the configuration names, else the shipped chunk-wise base student."""
    return section.init_from or QUICKSTART_ASSETS / "student.safetensors"


_NO_VAE = "encoders.vae_path must name an AutoencoderKLWan folder for codec wan_vae, got none"


def check_codec(encoders: EncodersSection) -> int:
    """Video frames per latent frame after the first, from config files only.

    Raises:
        ValueError: wan_vae without `vae_path`, or a folder without a VAE.
    """
    if encoders.codec == "dct":
        return DCTCodec.temporal_stride
    if encoders.vae_path is None:
        raise ValueError(_NO_VAE)
    return read_vae_config(encoders.vae_path).get("scale_factor_temporal", 4)


def load_codec(encoders: EncodersSection, *, device: torch.device | str = "cpu") -> VideoCodec:
    """The configured codec.

    Raises:
        ValueError: wan_vae without `vae_path`, or a folder without a VAE.
    """
    if encoders.codec == "dct":
        return DCTCodec()
    if encoders.vae_path is None:
        raise ValueError(_NO_VAE)
    dtype = getattr(torch, encoders.vae_dtype)
    return WanVAE(encoders.vae_path, device=device, dtype=dtype, tile=encoders.vae_tile)


def load_text_encoder(encoders: EncodersSection, *, device: torch.device | str = "cpu") -> TextEncoder:
    """The configured text encoder."""
    dtype = getattr(torch, encoders.text_dtype)
    return TextEncoder(text_encoder_folder(encoders), text_len=encoders.text_len, device=device, dtype=dtype)


def encode_prompts(
    encoders: EncodersSection, prompts: Sequence[str], *, device: torch.device | str = "cpu", batch_size: int = 32
) -> Tensor:
    """Embed prompts with an encoder that is loaded for it and freed again: [P, text_len, D] float32 on the device.

    Raises:
        ValueError: see `TextEncoder`.
    """
    text = load_text_encoder(encoders, device=device)
    parts = [text.encode(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]
    del text
    release_memory()
    return torch.cat(parts)


def release_memory() -> None:
    """Give the memory of encoders that are no longer referred to back to the device."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
