"""The bf16 encoding, the row layout and the fingerprint."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from afd.data.schema import (
    BF16,
    COLUMNS,
    Sample,
    bf16_of_bits,
    decode_bf16,
    encode_bf16,
    from_row,
    load_streaming,
    settings_fingerprint,
    to_row,
)


def test_bf16_round_trip_is_exact_for_every_bit_pattern() -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    tensor = patterns.view(torch.bfloat16).reshape(2, 8, 64, 64)
    decoded = decode_bf16(encode_bf16(tensor))
    assert decoded.dtype == torch.bfloat16
    assert decoded.shape == tensor.shape
    assert torch.equal(decoded.view(torch.int16), tensor.view(torch.int16))


@pytest.mark.parametrize("shape", [(1,), (255, 3), (256, 1), (2, 65_536), (5, 1, 7)])
def test_bf16_keeps_any_shape(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).to(torch.bfloat16)
    assert torch.equal(decode_bf16(encode_bf16(tensor)), tensor)


def test_bf16_lies_in_a_row_as_mds_lays_out_its_bits() -> None:
    load_streaming()
    from streaming.base.format.mds.encodings import mds_decode, mds_encode

    for shape in [(3, 4), (2, 300), (1, 70_000)]:
        tensor = torch.randn(shape).to(torch.bfloat16)
        bits = tensor.view(torch.int16).numpy().view(np.uint16)
        assert encode_bf16(tensor) == mds_encode(BF16, bits)
        assert torch.equal(bf16_of_bits(mds_decode(BF16, encode_bf16(tensor))), tensor)


@pytest.mark.parametrize("shape", [(), (0, 3), (1,) * 9])
def test_tensors_that_mds_cannot_hold_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="1 to 8 axes and not empty"):
        encode_bf16(torch.zeros(shape, dtype=torch.bfloat16))


def test_bf16_accepts_views_and_copies_out_of_the_buffer() -> None:
    tensor = torch.randn(4, 6).to(torch.bfloat16)
    assert torch.equal(decode_bf16(encode_bf16(tensor.T[1:])), tensor.T[1:])
    decode_bf16(encode_bf16(tensor)).zero_()


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00", b"\x24" + b"\1" * 11, b"\x08\x01", b"\x04\x03\0\0\0\0\0", b"\x04\x01\0\0\0\0\0", b"\x04\x00"],
)
def test_broken_bf16_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="bf16 column"):
        decode_bf16(data)


def test_row_round_trip(sample: Callable[[int], Sample]) -> None:
    for i in (2, 3):
        row = to_row(sample(i))
        assert set(row) == set(COLUMNS)
        back, original = from_row(row), sample(i)
        assert torch.equal(back.latents, original.latents)
        assert torch.equal(back.prompt_embeds, original.prompt_embeds)
        assert (back.prompt, back.video_mp4, back.seed, back.fps) == (
            f"ball {i} → right",
            original.video_mp4,
            i * 2**40,
            10.0,
        )
        assert len(back.sha256) == 64


def test_malformed_samples_are_named(sample: Callable[[int], Sample]) -> None:
    good = sample(1)
    changes = {
        r"latents must be floating \[C, F, H, W\], got torch.bfloat16 \[5, 7, 2\]": {"latents": good.latents[0]},
        r"prompt_embeds must be floating \[L, D\], got torch.int64": {"prompt_embeds": torch.ones(2, 3).long()},
        "latents must be finite": {"latents": good.latents * float("nan")},
        "prompt must not be empty": {"prompt": ""},
    }
    for text, change in changes.items():
        with pytest.raises(ValueError, match=text + r".*\(sample 'physics/1'\)"):
            to_row(dataclasses.replace(good, **change))


def test_fingerprint_follows_the_settings_only() -> None:
    first = settings_fingerprint({"a": 1, "b": {"c": 2.5}})
    assert first == settings_fingerprint({"b": {"c": 2.5}, "a": 1})
    assert first != settings_fingerprint({"a": 1, "b": {"c": 2.6}})
    for bad in ({"a": float("nan")}, {"a": torch.ones(1)}):
        with pytest.raises(ValueError, match="settings must be plain JSON"):
            settings_fingerprint(bad)


def test_the_door_to_streaming_is_idempotent() -> None:
    assert load_streaming() is load_streaming()


@pytest.mark.slow
def test_importing_the_package_does_not_import_streaming() -> None:
    modules = ", ".join(f"afd.data.{name}" for name in ("schema", "writer", "loader", "integrity", "video"))
    code = f"import sys, {modules}; assert 'streaming' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
