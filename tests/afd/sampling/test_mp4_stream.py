"""The live mp4: readable at every moment, ordinary at the end."""

from pathlib import Path

import av
import numpy as np
import pytest

from afd.sampling import LiveVideoWriter


def moving_square(num_frames: int, *, start: int = 0) -> np.ndarray:
    """A bright square that moves one pixel a frame: [F, 32, 48, 3] uint8."""
    frames = np.full((num_frames, 32, 48, 3), 20, np.uint8)
    for index in range(num_frames):
        left = start + index
        frames[index, 8:20, left : left + 12] = 220
    return frames


def read(path: Path) -> np.ndarray:
    """All frames of a video, [F, H, W, 3] uint8."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def boxes(path: Path) -> list[bytes]:
    """Kinds of an mp4's top-level boxes, in order."""
    data, at, kinds = path.read_bytes(), 0, []
    while at < len(data):
        kinds.append(data[at + 4 : at + 8])
        at += int.from_bytes(data[at : at + 4], "big")
    return kinds


def test_the_file_plays_while_it_is_written_and_is_ordinary_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "live.mp4"
    expected = moving_square(9)
    with LiveVideoWriter(path, fps=8) as writer:
        for start in (0, 3, 6):
            writer.write(expected[start : start + 3])
            seen = read(path)
            assert len(seen) == start + 2  # all but the newest
            assert np.abs(seen.astype(int) - expected[: start + 2]).mean() < 3
        assert b"moof" in boxes(path)
    assert boxes(path)[:2] == [b"ftyp", b"moov"]
    assert b"moof" not in boxes(path)
    seen = read(path)
    assert np.abs(seen.astype(int) - expected).mean() < 3
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 8
    assert [file.name for file in tmp_path.iterdir()] == ["live.mp4"]


def test_an_interrupted_stream_is_finished(tmp_path: Path) -> None:
    def record() -> None:
        with LiveVideoWriter(str(tmp_path / "live.mp4"), fps=8, scale=2) as writer:
            writer.write(moving_square(2).astype(np.float32) / 255)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record()
    assert read(tmp_path / "live.mp4").shape == (2, 64, 96, 3)


def test_without_frames_there_is_no_file(tmp_path: Path) -> None:
    with LiveVideoWriter(tmp_path / "live.mp4", fps=8) as writer:
        pass
    writer.close()
    assert not (tmp_path / "live.mp4").exists()


def test_frames_of_another_size_and_a_wrong_rate_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fps must be > 0, got 0"):
        LiveVideoWriter(tmp_path / "live.mp4", fps=0)
    with LiveVideoWriter(tmp_path / "live.mp4", fps=8) as writer:
        writer.write(moving_square(1))
        with pytest.raises(ValueError, match="frames must be 32 x 48 like those before, got 16 x 48"):
            writer.write(moving_square(1)[:, :16])
        with pytest.raises(ValueError, match=r"frames must be \[F, H, W, 3\] with F > 0"):
            writer.write(moving_square(1)[0])
