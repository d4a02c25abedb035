"""The live teacher: a process beside the training that asks for prompts that are in no shard, and writes parts.

Its own process, not a thread, so that decoding and encoding never hold the step's interpreter, and so that it may be
killed at any moment: what a source paid for is in its journal, and a part appears whole or not at all. It ends with
the training (end of file on its standard input). How the parts are mixed in is afd.data.live_loader's.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from afd.config import RunConfig
from afd.config_file import dump_config, load_config
from afd.data.live_loader import LiveLoader, LiveRules, part_folder
from afd.data.loader import ShardLoader, build_loader, iterate
from afd.data.schema import Reject, Sample
from afd.data.writer import DATASET_FILE, write_shards
from afd.device import checked_device
from afd.distributed import World
from afd.preparation import shard_places
from afd.preparation.decoding import decode_clip
from afd.preparation.encoding import ClipEncoder
from afd.preparation.intake import hash_split, prompt_key, take_census
from afd.teachers.base import SourceReject, SourceVideo, VideoRequest, VideoSource
from afd.teachers.physics import PhysicsTeacher, training_prompts
from afd.teachers.sources import GeneratedSource, open_source

LOG_FILE = "live.log"
ARRIVALS_FILE = "live_arrivals.jsonl"
REJECTS_FILE = "rejects.jsonl"
_END_S = 5.0
_LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

logger = logging.getLogger(__name__)


def live_folder(config: RunConfig) -> Path:
    """Where the parts are."""
    return config.teacher.live.cache or config.output_dir / "data" / "live"


def build_train_loader(config: RunConfig, *, batch_size_per_rank: int, world: World) -> ShardLoader | LiveLoader:
    """The loader of a run's training shards, with live parts mixed in where `teacher.live.enabled` says so.

    Raises:
        ValueError: as `build_loader`.
    """
    folder, remote = shard_places(config)[0]
    base = build_loader(
        folder,
        batch_size_per_rank=batch_size_per_rank,
        world_size=world.size,
        rank=world.rank,
        seed=config.seed,
        shuffle=config.data.shuffle,
        shuffle_block=config.data.shuffle_block,
        remote=remote,
        cache_limit=config.data.cache_limit,
        verify=config.data.verify,
    )
    live = config.teacher.live
    if not live.enabled:
        return base.read_ahead(config.data.read_ahead)
    loader = LiveLoader(
        base,
        live_folder(config),
        config.output_dir / ARRIVALS_FILE,
        LiveRules(live.check_every, live.max_wait_s, live.share),
        batch_size_per_rank=batch_size_per_rank,
        world_size=world.size,
        rank=world.rank,
        seed=config.seed,
    )
    return loader.read_ahead(config.data.read_ahead)


class LiveTeacher:
    """Runs `fetch` in a process of its own while the context is open; does nothing unless enabled and main.

    Raises:
        ValueError: on entry, if the source cannot be opened (a missing key, file or folder).
    """

    def __init__(self, config: RunConfig, *, is_main: bool) -> None:
        self._config, self._is_active = config, is_main and config.teacher.live.enabled
        self._process: subprocess.Popen[bytes] | None = None
        self._log = config.output_dir / LOG_FILE

    def __enter__(self) -> LiveTeacher:
        if self._is_active:
            live_source(self._config)
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        process = self._process
        if process is None:
            return
        self._process = None
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _start(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        settings = self._log.with_name("live.yaml")
        settings.write_text(dump_config(self._config))
        environment = {name: value for name, value in os.environ.items() if name not in _LAUNCH_VARIABLES}
        path = os.pathsep.join(folder for folder in sys.path if folder)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "afd.live", str(settings)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},  # the cores are the step's
                start_new_session=True,
            )
        threading.Thread(target=self._tell, args=(self._process,), daemon=True).start()

    def _tell(self, process: subprocess.Popen[bytes]) -> None:
        """Log how the process ended, unless we ended it: training goes on with the parts there are."""
        code = process.wait()
        if self._process is None:
            return
        if code:
            lines = self._log.read_bytes()[-2000:].decode("utf-8", "replace").splitlines() or ["no message"]
            logger.error("the live teacher ended with code %d (%s): %s", code, self._log, lines[-1])
        else:
            logger.info("the live teacher has no more prompts")


def live_source(config: RunConfig) -> VideoSource:
    """The source that is asked during training; the built-in world answers further prompts of its own.

    Raises:
        ValueError: the source cannot be opened.
    """
    teacher = config.teacher
    if teacher.kind != "physics":
        return open_source(config)
    count = teacher.num_prompts + (teacher.live.max_videos or teacher.num_prompts)
    world = PhysicsTeacher(teacher.physics)
    prompts = training_prompts(count, field="teacher.num_prompts + teacher.live.max_videos")
    requests = [VideoRequest(prompt, seed, world.source_id(prompt, seed)) for seed, prompt in enumerate(prompts)]
    return GeneratedSource(world, requests, teacher="physics", version=world.version)


def fetch(config: RunConfig, source: VideoSource) -> int:
    """Ask for every prompt that is in no shard, and write parts until the source ends; returns the new samples.

    Raises:
        ValueError: the source ends in an error, or the parts that are there were made with other settings.
    """
    cache, live = live_folder(config), config.teacher.live
    cache.mkdir(parents=True, exist_ok=True)
    settings = _settings(config)
    num_parts, known_ids = _read_parts(cache, settings)
    limits = (config.data.cache_limit, None)
    known = {
        prompt_key(sample)
        for (folder, remote), limit in zip(shard_places(config), limits, strict=True)
        for sample in iterate(folder, remote=remote, cache_limit=limit)
    }
    is_heldout = _heldout_rule(config, source)
    room = None if live.max_videos is None else live.max_videos - len(known_ids)

    def wanted(request: VideoRequest) -> bool:
        nonlocal room
        if prompt_key(request) in known or request.source_id in known_ids or is_heldout(request):
            return False
        if room is not None and room <= 0:
            return False
        room = None if room is None else room - 1
        return True

    encoder = ClipEncoder(config, device=checked_device(live.device, "teacher.live.device"))
    samples: list[Sample] = []
    num_new = 0
    for outcome in source.videos(wanted):
        sample = _encode(encoder, outcome) if isinstance(outcome, SourceVideo) else outcome
        if not isinstance(sample, Sample):
            _append_reject(cache / REJECTS_FILE, sample)
            continue
        samples.append(sample)
        num_new += 1
        if len(samples) == live.samples_per_part:
            write_shards(samples, part_folder(cache, num_parts), metadata=settings)
            logger.info("part %d: %d samples", num_parts, len(samples))
            num_parts, samples = num_parts + 1, []
    if samples:
        write_shards(samples, part_folder(cache, num_parts), metadata=settings)
    return num_new


def _encode(encoder: ClipEncoder, video: SourceVideo) -> Sample | Reject:
    clip = decode_clip(video, encoder.clip_format)
    return Reject(video.source_id, clip) if isinstance(clip, str) else encoder.encode([(video, clip)])[0]


def _heldout_rule(config: RunConfig, source: VideoSource) -> Callable[[VideoRequest], bool]:
    """Whether preparation would hold a request's prompt out: such a prompt must never be trained on."""
    if config.teacher.kind == "physics":  # its training prompts are never held out
        return lambda request: False
    split_of = hash_split(config.prepare.heldout_fraction, take_census(source))
    return lambda request: split_of(request) == "heldout"


def _settings(config: RunConfig) -> dict[str, Any]:
    """What all parts of one cache share."""
    return {
        "live": True,
        "video": config.video.model_dump(mode="json"),
        "encoders": config.encoders.model_dump(mode="json"),
        "keep_video": config.prepare.keep_video,
    }


def _read_parts(cache: Path, settings: Mapping[str, Any]) -> tuple[int, set[str]]:
    """The number of parts there are, and the ids of their samples."""
    number, ids = 0, set()
    while (part_folder(cache, number) / DATASET_FILE).is_file():
        folder = part_folder(cache, number)
        made_with = json.loads((folder / DATASET_FILE).read_text(encoding="utf-8"))["metadata"]
        if made_with != settings:
            raise ValueError(
                f"{folder} was made with other video, encoders or keep_video settings: set teacher.live.cache"
            )
        ids |= {sample.source_id for sample in iterate(folder)}
        number += 1
    return number, ids


def _append_reject(path: Path, reject: Reject | SourceReject) -> None:
    logger.warning("rejected %s: %s", reject.source_id, reject.reason)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"source_id": reject.source_id, "reason": reject.reason}) + "\n")


def _end_with_parent() -> None:
    """End this process and its workers when the training's end of the pipe closes."""
    while os.read(0, 1024):  # not sys.stdin, whose lock a daemon thread must not hold when the interpreter ends
        pass
    os.killpg(os.getpgid(0), signal.SIGKILL)


def main(arguments: list[str]) -> int:
    """`python -m afd.live CONFIG`: what `LiveTeacher` starts, with the training at the other end of standard input."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    config = load_config(Path(arguments[0]))
    try:
        count = fetch(config, live_source(config))
    except (ValueError, OSError) as error:
        logger.error("%s", " ".join(str(error).split()))
        return 2
    logger.info("%d samples; the source has no more", count)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
