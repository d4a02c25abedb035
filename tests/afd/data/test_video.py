"""Decoding at another rate and size, and what is rejected."""

import struct
from pathlib import Path

import av
import numpy as np
import pytest

from afd.data.video import decode_video, encode_video

WANTED = {"num_frames": 15, "height": 32, "width": 32, "fps": 10.0}


def numbered(num_frames: int, height: int = 64, width: int = 64) -> np.ndarray:
    """Frames whose grey level is their number / 40."""
    return np.ones((num_frames, height, width, 3), np.float32) * np.arange(num_frames)[:, None, None, None] / 40


def numbers(frames: np.ndarray) -> np.ndarray:
    return frames.mean((1, 2, 3)) * 40


def test_24_fps_decoded_at_10_fps_shows_the_right_instants() -> None:
    frames = decode_video(encode_video(numbered(36), fps=24, crf=1), **WANTED)
    assert frames.shape == (15, 32, 32, 3)
    assert frames.dtype == np.float32
    np.testing.assert_allclose(numbers(frames), np.arange(15) * 2.4, atol=0.3)


def test_nearest_picks_whole_frames() -> None:
    frames = decode_video(encode_video(numbered(36), fps=24, crf=1), **WANTED, resample="nearest")
    np.testing.assert_allclose(numbers(frames), np.round(np.arange(15) * 2.4), atol=0.3)


def test_linear_keeps_the_centroid_of_a_moving_ball() -> None:
    x = np.arange(64) + 0.5
    centres = 10 + np.arange(36) * 1.2
    frames = np.exp(-0.5 * ((x[None, None, :] - centres[:, None, None]) ** 2 + (x[None, :, None] - 32) ** 2) / 9)
    decoded = decode_video(encode_video(np.repeat(frames[..., None], 3, 3), fps=24, crf=1), **WANTED)[..., 1]
    weight = np.clip(decoded - 0.05, 0, None)
    measured = (weight * (np.arange(32) + 0.5)).sum((1, 2)) / weight.sum((1, 2))
    np.testing.assert_allclose(measured, (10 + np.arange(15) * 2.4 * 1.2) / 2, atol=0.03)  # px of 32


def test_same_rate_and_size_comes_back_unchanged() -> None:
    frames = numbered(15, 32, 32)
    decoded = decode_video(encode_video(frames, fps=10, crf=0), **WANTED)
    np.testing.assert_allclose(decoded, frames, atol=2.5 / 255)


def test_higher_rate_than_the_source() -> None:
    decoded = decode_video(encode_video(numbered(12), fps=8, crf=1), num_frames=16, height=32, width=32, fps=16)
    np.testing.assert_allclose(numbers(decoded), np.arange(16) / 2, atol=0.3)


def test_area_resize_averages_and_crop_is_centred() -> None:
    frames = np.zeros((3, 16, 48, 3), np.float32)
    frames[:, :, 16:32] = np.indices((16, 16)).sum(0)[..., None] % 2  # a checkerboard in the centre third
    frames[:, :, :8] = 1.0
    decoded = decode_video(encode_video(frames, fps=10, crf=0), num_frames=3, height=4, width=4, fps=10)
    np.testing.assert_allclose(decoded, 0.5, atol=0.02)


def with_matrix(mp4: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """The mp4 with this display matrix, as phones write it: x' = a x + c y, y' = b x + d y."""
    start = mp4.index(b"tkhd") + 44
    return mp4[:start] + struct.pack(">9i", *(v << 16 for v in (a, b, 0, c, d, 0, 0, 0)), 1 << 30) + mp4[start + 36 :]


# The corners of the picture as `ffmpeg -i a.mp4 a.png` (autorotate) writes it: top, then bottom; "." is black.
@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), "RG B."),
        ((0, 1, -1, 0), "BR .G"),  # a phone held upright
        ((-1, 0, 0, -1), ".B GR"),
        ((0, -1, 1, 0), "G. RB"),
        ((-1, 0, 0, 1), "GR .B"),  # a mirrored selfie
        ((1, 0, 0, -1), "B. RG"),
        ((0, 1, 1, 0), "RB G."),
        ((0, -1, -1, 0), ".G BR"),
    ],
)
def test_videos_are_turned_as_players_show_them(matrix: tuple[int, int, int, int], shown: str) -> None:
    frames = np.zeros((3, 32, 64, 3), np.float32)
    frames[:, :8, :16, 0] = frames[:, :8, -16:, 1] = frames[:, -8:, :16, 2] = 1
    data = with_matrix(encode_video(frames, fps=10, crf=1), *matrix)
    height, width = (32, 64) if matrix[0] else (64, 32)
    decoded = decode_video(data, num_frames=3, height=height, width=width, fps=10)
    corners = decoded[1][np.ix_([3, -4], [3, -4])]
    seen = ["".join("RGB"[np.argmax(corner)] if corner.max() > 0.4 else "." for corner in row) for row in corners]
    assert " ".join(seen) == shown


def test_other_angles_are_rejected() -> None:
    data = with_matrix(encode_video(numbered(3), fps=10), 1, 1, -1, 1)
    with pytest.raises(ValueError, match="tilted: must be shown turned by a multiple of 90 degrees, got 45 clockwise"):
        decode_video(data, num_frames=3, height=4, width=4, fps=10, name="tilted")


def test_path_and_bytes_decode_alike(tmp_path: Path) -> None:
    data = encode_video(numbered(36), tmp_path / "a.mp4", fps=24)
    assert (tmp_path / "a.mp4").read_bytes() == data
    np.testing.assert_array_equal(decode_video(tmp_path / "a.mp4", **WANTED), decode_video(data, **WANTED))


def audio_only(path: Path) -> bytes:
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path.read_bytes()


def test_what_is_no_video_is_rejected_by_name_and_reason(tmp_path: Path) -> None:
    good = encode_video(numbered(36), fps=24)
    (tmp_path / "text.mp4").write_text("this is a text, not a video\n" * 50)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "cut.mp4").write_bytes(good[: len(good) // 3])
    audio_only(tmp_path / "audio.mp4")
    reasons = {
        "text.mp4": "cannot be decoded as a video",
        "empty.mp4": "empty file",
        "cut.mp4": "cannot be decoded as a video|no frame|too short",
        "audio.mp4": "no video stream, it holds audio",
        "absent.mp4": "no such file",
    }
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=rf"{name}: .*({reason})"):
            decode_video(tmp_path / name, **WANTED)
    with pytest.raises(ValueError, match="clip 7: empty file"):
        decode_video(b"", **WANTED, name="clip 7")


def test_too_short_is_rejected_not_padded() -> None:
    data = encode_video(numbered(33), fps=24)  # 1.375 s; frame 15 stands at 1.4 s
    with pytest.raises(ValueError, match=r"too short: 15 frames at 10 fps need more than 1\.400 s, got 1\.375 s"):
        decode_video(data, **WANTED)
    assert decode_video(encode_video(numbered(34), fps=24), **WANTED).shape[0] == 15


def test_encoding_pads_odd_sizes_enlarges_and_puts_the_index_first(tmp_path: Path) -> None:
    data = encode_video(numbered(3, 7, 5), fps=23.976, scale=3)
    assert data.index(b"moov") < data.index(b"mdat")
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.height, stream.width, stream.codec_context.pix_fmt) == (22, 16, "yuv420p")
        assert abs(float(stream.average_rate or 0) - 23.976) < 0.01


def test_encoding_is_repeatable() -> None:
    assert encode_video(numbered(9), fps=10) == encode_video(numbered(9), fps=10)


def test_bad_arguments_are_explained() -> None:
    with pytest.raises(ValueError, match=r"frames must be \[F, H, W, 3\]"):
        encode_video(np.zeros((3, 8, 8), np.float32), fps=10)
    with pytest.raises(ValueError, match="frames must be finite"):
        encode_video(np.full((3, 8, 8, 3), np.nan, np.float32), fps=10)
    with pytest.raises(ValueError, match="crf in"):
        encode_video(numbered(2), fps=10, crf=99)
    with pytest.raises(ValueError, match="must be > 0"):
        decode_video(b"x", num_frames=0, height=4, width=4, fps=10)
