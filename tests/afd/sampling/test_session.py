"""Whole sessions on the shipped student, through the command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import afd
from afd.cli import main
from afd.config import RunConfig, StudentShape
from afd.models.encoders import QUICKSTART_ASSETS
from afd.models.weights import load_student, original_name
from afd.sampling.session import StreamRequest, _uninterrupted, num_chunks_of, run_stream, streaming_shape

RED, YELLOW = "a large red ball is dropped", "a large yellow ball is dropped"


def read(path: Path) -> np.ndarray:
    """All frames of a video, [F, H, W, 3] uint8."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_window_and_sink_default_to_the_students_then_to_its_training() -> None:
    shape = StudentShape(chunk_frames=3)
    for trained, sink, expected in [(12, None, (12, 0)), (12, 3, (9, 3)), (4, 3, (3, 3))]:
        streaming = streaming_shape(shape, trained_frames=trained, window=None, sink=sink)
        assert (streaming.window_frames, streaming.sink_frames) == expected
    streaming = streaming_shape(shape, trained_frames=12, window=6, sink=None)
    assert (streaming.window_frames, streaming.sink_frames) == (6, 0)
    own = StudentShape(chunk_frames=3, window_frames=6, sink_frames=1)
    streaming = streaming_shape(own, trained_frames=12, window=None, sink=None)
    assert (streaming.window_frames, streaming.sink_frames) == (6, 1)
    streaming = streaming_shape(own, trained_frames=12, window=9, sink=0)
    assert (streaming.window_frames, streaming.sink_frames) == (9, 0)
    with pytest.raises(ValueError, match="window_frames must hold a chunk of 3 frames, got 2"):
        streaming_shape(shape, trained_frames=12, window=2, sink=None)


@pytest.mark.parametrize(
    ("seconds", "stride", "chunks"),
    [(None, 1, None), (0.1, 1, 1), (1.5, 1, 4), (1.6, 1, 5), (9 / 8, 4, 1), (1.2, 4, 2), (21 / 8, 4, 2)],
)
def test_seconds_are_rounded_up_to_chunks(seconds: float | None, stride: int, chunks: int | None) -> None:
    shape = StudentShape(chunk_frames=3)
    assert num_chunks_of(seconds, fps=8, shape=shape, pixel_frames=lambda f: 1 + stride * (f - 1)) == chunks


def test_an_interrupt_finishes_the_file_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from afd.sampling import LiveVideoWriter

    student = load_student(QUICKSTART_ASSETS / "student.safetensors").requires_grad_(False)
    student.shape = streaming_shape(student.shape, trained_frames=12, window=None, sink=None)
    write = LiveVideoWriter.write

    def write_twice(writer: LiveVideoWriter, frames: np.ndarray) -> None:
        if writer.num_frames == 6:
            raise KeyboardInterrupt
        write(writer, frames)

    monkeypatch.setattr(LiveVideoWriter, "write", write_twice)
    statistics = run_stream(student, RunConfig(), StreamRequest(prompt=RED, out=tmp_path / "red.mp4"))
    assert statistics.num_frames == 9
    assert statistics.fps is not None
    assert read(tmp_path / "red.mp4").shape == (6, 16, 16, 3)


def test_the_command_streams_beyond_the_training_length_and_changes_the_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["sample", "--stream", "--prompt", RED, "--seconds", "3", "--seed", "1", "--scale", "2"]
    assert main([*common, "--out", str(tmp_path / "kept.mp4")]) == 0
    assert main([*common, "--then", "1.5", YELLOW, "--out", str(tmp_path / "changed.mp4")]) == 0
    output = capsys.readouterr().out
    assert "24 frames, first chunk after " in output
    kept, changed = read(tmp_path / "kept.mp4"), read(tmp_path / "changed.mp4")
    assert kept.shape == changed.shape == (24, 32, 32, 3)
    assert np.array_equal(kept[:12], changed[:12])
    # Yellow has as much green as red; a red ball has none.
    green = [video[15:].max(axis=(1, 2))[:, 1].mean() for video in (kept, changed)]
    assert green[0] < 110
    assert green[1] > 150


def test_weights_of_another_format_are_sampled_with_a_configuration(tmp_path: Path) -> None:
    """A Self-Forcing style .pt of the shipped student gives the same video as the shipped file."""
    tensors = load_student(QUICKSTART_ASSETS / "student.safetensors").state_dict()
    torch.save({"generator_ema": {f"model.{original_name(name)}": t for name, t in tensors.items()}}, tmp_path / "a.pt")
    (tmp_path / "a.yaml").write_text("student: {num_heads: 2, text_len: 16, chunk_frames: 3}\n")
    common = ["sample", "--prompt", RED, "--seed", "1", "--scale", "1"]
    given = ["--checkpoint", str(tmp_path / "a.pt"), "--config", str(tmp_path / "a.yaml")]
    assert main([*common, "--out", str(tmp_path / "shipped.mp4")]) == 0
    assert main([*common, *given, "--out", str(tmp_path / "original.mp4")]) == 0
    assert np.array_equal(read(tmp_path / "shipped.mp4"), read(tmp_path / "original.mp4"))


def test_wrong_use_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "a.mp4")]
    cases = [
        ([*out, "--seconds", "3"], "--seconds needs --stream"),
        ([*out, "--serve", "0"], "--serve needs --stream"),
        (["--stream"], "--out must name the mp4 to write, got none"),
        ([*out, "--stream", "--then", "soon", "x"], "the seconds must be a finite number >= 0, got 'soon'"),
        ([*out, "--stream", "--then", "nan", "x"], "the seconds must be a finite number >= 0, got 'nan'"),
        ([*out, "--device", "foo"], "--device must be cpu, cuda or cuda:N, got 'foo'"),
        ([*out, "--device", "cuda:99"], "CUDA devices that torch sees, got 'cuda:99'"),
        (["--stream", "--out", "a.avi"], "--out must name an .mp4 in an existing folder, got a.avi"),
        (
            [*out, "--stream", "--window", "2"],
            "error: --window 2: window_frames must hold a chunk of 3 frames, got 2\n",
        ),
        ([*out, "--checkpoint", "no.pt", "--config", "configs/quickstart.yaml"], "no.pt does not exist"),
        ([*out, "--checkpoint", str(tmp_path)], "must be a commit, a checkpoints folder or a run's folder"),
    ]
    for arguments, message in cases:
        assert main(["sample", "--prompt", RED, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--seconds", ("inf", "nan", "0")),
        ("--serve", ("99999", "-1")),
        ("--window", ("0",)),
        ("--sink", ("-1",)),
        ("--ahead", ("nan",)),
        ("--scale", ("0",)),
    ],
)
def test_numbers_out_of_range_name_their_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, values: tuple[str, ...]
) -> None:
    for value in values:
        assert main(["sample", "--prompt", RED, "--stream", "--out", str(tmp_path / "a.mp4"), option, value]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith(f"error: argument {option}: must be a")


@pytest.mark.parametrize("seconds", [0.0, float("inf"), float("nan")])
def test_a_stream_of_no_length_or_without_end_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="--seconds must be a finite number > 0"):
        num_chunks_of(seconds, fps=8, shape=StudentShape(), pixel_frames=lambda frames: frames)


def test_ctrl_c_waits_for_the_chunk_in_hand() -> None:
    done = []

    def handle_a_chunk() -> None:
        with _uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("written")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        handle_a_chunk()
    assert done == ["written"]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_ctrl_c_ends_a_stream_without_an_end(tmp_path: Path) -> None:
    out, root = tmp_path / "a.mp4", Path(afd.__file__).parents[1]
    command = [sys.executable, "-m", "afd.cli", "sample", "--stream", "--prompt", RED, "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    # A shell's background job ignores Ctrl-C, and so would its children.
    hearing = ["env", "--default-signal=INT", *command]
    process = subprocess.Popen(hearing, env=environment, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not (out.exists() and out.stat().st_size > 4000):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.1)
    seen = len(read(out))  # while it is written
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert len(read(out)) >= seen > 0
    assert f"{len(read(out))} frames, first chunk after" in output
