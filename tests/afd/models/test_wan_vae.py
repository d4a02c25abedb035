"""Wan's VAE: streams and tiles against diffusers' own whole-clip decode, on tiny random models of the real class."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from afd.config import EncodersSection, VideoSection
from afd.models.encoders import latent_shape
from afd.models.wan_vae import WanVAE, read_vae_config

pytestmark = pytest.mark.slow  # importing diffusers takes seconds

MEAN, STD = [0.5, -1.0, 0.0, 2.0], [2.0, 0.5, 1.0, 4.0]
WAN_2_1: dict[str, Any] = {"base_dim": 4, "z_dim": 4, "num_res_blocks": 1}
# Wan 2.2's VAE: residual blocks, pixels folded 2 x 2 into channels, stride 16.
WAN_2_2: dict[str, Any] = {
    **WAN_2_1,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
    "dim_mult": [1, 2, 2, 2],
    "decoder_base_dim": 4,
}


def save_vae(folder: Path, **config: Any) -> Any:
    """Write a random VAE with a latent normalisation of its own."""
    from diffusers import AutoencoderKLWan

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae: Any = AutoencoderKLWan(**config, latents_mean=MEAN, latents_std=STD).eval()
    vae.save_pretrained(folder)
    return vae


@pytest.fixture(scope="module", params=[WAN_2_1, WAN_2_2], ids=["wan 2.1", "wan 2.2"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A VAE's folder, and the VAE."""
    folder = tmp_path_factory.mktemp("vae")
    return folder, save_vae(folder, **request.param)


@torch.no_grad()
def whole_decode(vae: Any, latents: Tensor) -> Tensor:
    """diffusers' decode of normalised latents, as [B, F, height, width, 3] in [0, 1]."""
    shape = (1, -1, 1, 1, 1)
    raw = latents * latents.new_tensor(STD).view(shape) + latents.new_tensor(MEAN).view(shape)
    return (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunks", [[1, 1, 1, 1, 1], [3, 2], [1, 4], [2, 3]])
def test_a_stream_decodes_to_the_whole_clip(
    saved: tuple[Path, Any], dtype: torch.dtype, tolerance: float, chunks: list[int]
) -> None:
    folder, vae = saved
    codec = WanVAE(folder, dtype=dtype)
    latents = torch.randn(2, 4, sum(chunks), 2, 3, generator=torch.Generator().manual_seed(1), dtype=dtype)
    expected = whole_decode(vae.to(dtype), latents).float()
    decoder, other = codec.new_decoder(), codec.new_decoder()
    pieces = []
    for chunk in latents.split(chunks, dim=2):
        pieces.append(decoder.decode(chunk))
        other.decode(-chunk)  # another stream in between leaves this one alone
    assert [piece.shape[1] for piece in pieces] == [4 * chunks[0] - 3, *(4 * chunk for chunk in chunks[1:])]
    side = codec.spatial_stride
    assert torch.cat(pieces, 1).shape == (2, codec.num_pixel_frames(5), 2 * side, 3 * side, 3)
    # Pixels leave as float32, whatever the VAE computes in.
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=0, atol=max(tolerance, 1e-7))
    torch.testing.assert_close(codec.decode(latents), expected, rtol=0, atol=max(tolerance, 1e-7))


@pytest.mark.parametrize("size", [(4, 9), (11, 4), (7, 10)])
def test_tiles_blend_as_diffusers_blends_them(saved: tuple[Path, Any], size: tuple[int, int]) -> None:
    folder, vae = saved
    tile = 4 * WanVAE(folder).spatial_stride
    codec = WanVAE(folder, dtype=torch.float64, tile=tile)
    latents = torch.randn(1, 4, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    vae.to(torch.float64).enable_tiling(tile, tile, tile * 3 // 4, tile * 3 // 4)
    expected = whole_decode(vae, latents).float()
    vae.disable_tiling()
    decoder = codec.new_decoder()
    pieces = torch.cat([decoder.decode(chunk) for chunk in latents.split([2, 1], dim=2)], 1)
    assert pieces.shape == (1, 9, size[0] * codec.spatial_stride, size[1] * codec.spatial_stride, 3)
    torch.testing.assert_close(pieces, expected, rtol=0, atol=1e-7)
    assert not torch.allclose(pieces, whole_decode(vae, latents).float(), atol=1e-4)  # tiles really were taken


def test_a_frame_no_larger_than_the_tile_is_decoded_whole(saved: tuple[Path, Any]) -> None:
    folder, _ = saved
    whole = WanVAE(folder)
    tiled = WanVAE(folder, tile=4 * whole.spatial_stride)
    latents = torch.randn(1, 4, 2, 4, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(tiled.decode(latents), whole.decode(latents))


def test_encoding_normalises_by_the_config_and_takes_frame_major_pixels(saved: tuple[Path, Any]) -> None:
    folder, vae = saved
    codec = WanVAE(folder)
    side = codec.spatial_stride
    assert (codec.num_channels, codec.temporal_stride, codec.num_pixel_frames(2)) == (4, 4, 5)
    assert side == vae.config.scale_factor_spatial
    video = torch.rand(2, 5, 2 * side, 3 * side, 3, generator=torch.Generator().manual_seed(1))
    latents = codec.encode(video)
    assert latents.shape == (2, 4, 2, 2, 3)
    with torch.no_grad():
        raw = vae.float().encode(video.permute(0, 4, 1, 2, 3) * 2 - 1).latent_dist.mode()
    for channel in range(4):
        torch.testing.assert_close(latents[:, channel] * STD[channel] + MEAN[channel], raw[:, channel])
    with pytest.raises(ValueError, match=r"video must have 1 \+ 4 n frames with sides divisible by"):
        codec.encode(video[:, :4])


def test_the_latents_shape_comes_from_the_vaes_config(saved: tuple[Path, Any]) -> None:
    folder, vae = saved
    encoders = EncodersSection(codec="wan_vae", vae_path=folder)
    side = vae.config.scale_factor_spatial
    assert latent_shape(encoders, VideoSection(num_frames=6, height=32, width=64)) == (4, 6, 32 // side, 64 // side)


def test_a_pipelines_folder_is_accepted(tmp_path: Path) -> None:
    save_vae(tmp_path / "vae", **WAN_2_1)
    (tmp_path / "model_index.json").write_text("{}")
    assert WanVAE(tmp_path).name == "wan-vae-vae"


def test_an_incomplete_or_foreign_vae_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    with pytest.raises(ValueError, match=r"encoders\.vae_path .*vae must be a folder, which is missing"):
        read_vae_config(folder)
    save_vae(folder, **WAN_2_1)
    with pytest.raises(ValueError, match=r"encoders\.vae_tile must be a multiple of 32 pixels, got 40"):
        WanVAE(folder, tile=40)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "latents_std": None}))
    with pytest.raises(ValueError, match="must give latents_std for each of z_dim = 4, got none"):
        read_vae_config(folder)
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKL"}))
    with pytest.raises(ValueError, match="must hold an AutoencoderKLWan, got 'AutoencoderKL'"):
        read_vae_config(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must hold weights as \*\.safetensors, got none"):
        read_vae_config(folder)
