"""`afd sample`: videos from a checkpoint, finished or streamed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from afd.commands.options import non_negative_float, non_negative_int, port, positive_float, positive_int
from afd.config import RunConfig, StudentShape
from afd.config_file import ConfigError, first_problem, load_config

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from afd.models.student import CausalStudent
    from afd.sampling import StreamStatistics

_STREAM_ONLY = {
    "seconds": None,
    "then": [],
    "serve": None,
    "host": "127.0.0.1",
    "ahead": 1.0,
    "window": None,
    "sink": None,
}


def add_to(commands: Any) -> None:
    """Register the subcommands."""
    sample = commands.add_parser(
        "sample",
        help="generate a video from a checkpoint, or stream one without end",
        description="Without --checkpoint: the shipped chunk-wise base student of the built-in world.",
    )
    sample.add_argument(
        "--checkpoint", type=Path, help="a commit, a run's output folder, or student weights of any supported format"
    )
    sample.add_argument("--config", type=Path, help="for weights that are no commit; default the chunk-wise student's")
    sample.add_argument("--prompt", required=True)
    sample.add_argument("--image", type=Path, help="first frame to go on from")
    sample.add_argument("--last-image", type=Path, help="last frame to arrive at, beside --image")
    sample.add_argument("--out", type=Path, help="mp4 to write; needed unless --serve")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--weights", default="ema", help="of a commit: ema, old, reference (the base student) or raw")
    sample.add_argument("--scale", type=positive_int, default=8, help="enlarge tiny videos for watching")
    sample.add_argument("--device", help="cpu, cuda, cuda:1, ...; default cuda where there is one")
    sample.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the student")
    stream = sample.add_argument_group("streaming")
    stream.add_argument("--stream", action="store_true", help="write and show chunks as they are generated")
    stream.add_argument(
        "--seconds", type=positive_float, help="length of the video; default until Ctrl-C or the page's Stop"
    )
    stream.add_argument(
        "--then", nargs=2, action="append", metavar=("SECONDS", "PROMPT"), default=[], help="change the prompt there"
    )
    stream.add_argument("--serve", type=port, metavar="PORT", help="play live on a web page; 0 takes a free port")
    stream.add_argument("--host", default="127.0.0.1", help="address to serve on")
    stream.add_argument(
        "--ahead", type=non_negative_float, default=1.0, help="seconds generated ahead of playback with --serve"
    )
    stream.add_argument(
        "--window",
        type=positive_int,
        help="latent frames a query sees; default the student's, else its training's less the sink",
    )
    stream.add_argument(
        "--sink",
        type=non_negative_int,
        help="first latent frames that stay visible; default the student's, else none",
    )
    sample.set_defaults(run=_sample)


def _sample(arguments: argparse.Namespace) -> None:
    if not arguments.stream:
        given = [name for name, default in _STREAM_ONLY.items() if getattr(arguments, name) != default]
        if given:
            raise ConfigError(f"--{given[0]} needs --stream")
    out = arguments.out
    if out is None and (arguments.serve is None or not arguments.stream):
        raise ConfigError("--out must name the mp4 to write, got none")
    if out is not None and (out.suffix != ".mp4" or not out.parent.is_dir()):
        raise ConfigError(f"--out must name an .mp4 in an existing folder, got {out}")
    from afd.device import checked_device

    changes, images = _changes(arguments.then), _images(arguments)
    student, config = _load(arguments, len(images), checked_device(arguments.device, "--device"))
    if arguments.stream:
        _stream(arguments, student, config, changes, images)
        return
    from afd.sampling import sample_video

    assert out is not None
    sample_video(student, config, arguments.prompt, out, seed=arguments.seed, scale=arguments.scale, images=images)
    print(out)


def _images(arguments: argparse.Namespace) -> tuple[Image.Image, ...]:
    """The given pictures, read.

    Raises:
        ConfigError: a last one without a first, or a file that is no picture.
    """
    if arguments.last_image is not None and arguments.image is None:
        raise ConfigError("--last-image needs --image")
    from PIL import Image, UnidentifiedImageError

    pictures: list[Image.Image] = []
    for option, path in (("--image", arguments.image), ("--last-image", arguments.last_image)):
        if path is None:
            continue
        try:
            with Image.open(path) as file:
                pictures.append(file.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise ConfigError(f"{option} {path} must be a picture: {error}") from error
    return tuple(pictures)


def _load(arguments: argparse.Namespace, num_images: int, device: torch.device) -> tuple[CausalStudent, RunConfig]:
    """The student on its device and the configuration it runs with; what does not fit is refused first."""
    import torch

    from afd.config import configured_shape
    from afd.models.encoders import student_path
    from afd.models.weights import load_student, read_student_shape, stored_shape

    config = load_config(arguments.config) if arguments.config else RunConfig()
    path = arguments.checkpoint or student_path(config.student)
    if not path.exists():
        raise ConfigError(f"--checkpoint (or student.init_from) {path} does not exist")
    if path.is_file() or any((path / name).is_file() for name in ("config.json", "model_index.json")):
        given = config.student.model_dump()
        shape = read_student_shape(path, given)
        _check(arguments, config, shape, num_images)
        student = load_student(path, config=given, dtype=getattr(torch, arguments.dtype))
    else:
        from afd.models.weights.sources import CONFIG, STUDENT_WEIGHTS
        from afd.train.restore import load_commit, resolve_commit

        if arguments.config:
            raise ConfigError("--config must not be given for a commit, which has its own")
        commit, average = resolve_commit(path), None if arguments.weights == "raw" else arguments.weights
        config = load_config(commit / CONFIG)
        shape = configured_shape(stored_shape(commit / STUDENT_WEIGHTS), config.student)
        _check(arguments, config, shape, num_images)
        student, config = load_commit(commit, average=average)
    return student.eval().requires_grad_(False).to(device, getattr(torch, arguments.dtype)), config


def _check(arguments: argparse.Namespace, config: RunConfig, shape: StudentShape, num_images: int) -> None:
    from afd.sampling.checks import check_sampling

    check_sampling(config, shape, is_stream=arguments.stream, num_images=num_images)
    if arguments.stream:
        _streaming_shape(arguments, config, shape)


def _streaming_shape(arguments: argparse.Namespace, config: RunConfig, shape: StudentShape) -> StudentShape:
    """The shape to stream with.

    Raises:
        ConfigError: the window does not hold a chunk.
    """
    from afd.sampling.session import streaming_shape

    frames = config.video.num_frames
    try:
        return streaming_shape(shape, trained_frames=frames, window=arguments.window, sink=arguments.sink)
    except ValidationError as error:
        raise ConfigError(f"--window {arguments.window}: {': '.join(first_problem(error))}") from error


def _stream(
    arguments: argparse.Namespace,
    student: CausalStudent,
    config: RunConfig,
    changes: tuple[tuple[float, str], ...],
    images: tuple[Image.Image, ...],
) -> None:
    from afd.sampling.session import StreamRequest, run_stream

    student.shape = _streaming_shape(arguments, config, student.shape)
    request = StreamRequest(
        prompt=arguments.prompt,
        then=changes,
        seconds=arguments.seconds,
        out=arguments.out,
        port=arguments.serve,
        host=arguments.host,
        ahead_s=arguments.ahead,
        seed=arguments.seed,
        scale=arguments.scale,
        images=images,
    )
    statistics = run_stream(student, config, request, announce=lambda line: print(line, flush=True))
    print(describe(statistics))
    if arguments.out is not None and statistics.num_frames:
        print(arguments.out)


def _changes(pairs: list[list[str]]) -> tuple[tuple[float, str], ...]:
    """`--then SECONDS PROMPT` pairs, in the order of time."""
    changes = []
    for seconds, prompt in pairs:
        try:
            changes.append((non_negative_float(seconds), prompt))
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f"--then SECONDS PROMPT: the seconds {error}") from error
    return tuple(sorted(changes, key=lambda change: change[0]))


def describe(statistics: StreamStatistics) -> str:
    """Latency and speed in one line."""
    if statistics.first_chunk_s is None:
        return "stopped before the first chunk"
    text = f"{statistics.num_frames} frames, first chunk after {statistics.first_chunk_s:.3f} s"
    if statistics.fps is not None and statistics.fps_without_decoding is not None:
        text += f", then {statistics.fps:.1f} frames/s ({statistics.fps_without_decoding:.1f} without decoding)"
    return text
