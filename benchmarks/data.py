"""How fast videos become shards and shards become batches, beside the disk's own speed, and whether memory stays flat.

    python benchmarks/data.py                      # 10,000 synthetic videos; a row in benchmarks/results/data.csv
    python benchmarks/data.py --videos 500 --workers 2

Makes a folder of small mp4 files with a metadata.jsonl, and sends it down the real path: `afd prepare` with the quick
start codec, text encoder and clip size, then the training loader: an epoch from a cold cache, then beside a fake step.
Then rows as large as Wan 1.3B's (8.4 MB), where the disk is what limits.
Memory is what this process and its decoders hold (anonymous pages; file pages are the kernel's, and shared), by the
samples done: 50 points in data_memory.csv, a straight line through those after the first fifth in data.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from measurement import append_csv, describe_commit

from afd.config_file import load_config
from afd.data.loader import ShardLoader, build_loader
from afd.data.schema import Sample
from afd.data.video import encode_video
from afd.data.writer import write_shards
from afd.preparation import prepare_shards
from afd.teachers.physics import training_prompts

RESULTS = Path(__file__).parent / "results"
_DISK_BYTES = 256 << 20
_NUM_PROMPTS = 500
# Rows of Wan 1.3B: latents of 81 frames of 480 x 832, 512 tokens of 4096.
_WAN_LATENTS, _WAN_EMBEDS, _NUM_WAN_ROWS, _WAN_BATCH = (16, 21, 60, 104), (512, 4096), 48, 4
_Points = list[tuple[int, float, float]]  # samples done, s, MiB


def main() -> None:
    """Run the three measurements and append one row to the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--videos", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--step_ms", type=float, default=100.0, help="length of the fake training step")
    parser.add_argument("--folder", type=Path, help="where to work; default a temporary folder on the disk")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="afd-data-", dir=options.folder) as work:
        row = _measure(Path(work), options)
    append_csv(RESULTS / "data.csv", [row])
    for name, value in row.items():
        print(f"{name:28} {value}")


def _measure(work: Path, options: argparse.Namespace) -> dict[str, object]:
    write_mb_s, read_mb_s = _disk_speed(work)
    print(f"disk: {write_mb_s:.0f} MB/s written, {read_mb_s:.0f} MB/s read; writing {options.videos} videos ...")
    _write_videos(work / "videos", options.videos)
    overrides = ["teacher.kind=folder", f"teacher.folder.path={work / 'videos'}", f"prepare.workers={options.workers}"]
    (work / "run.yaml").write_text(f"output_dir: {work / 'out'}\nprepare: {{shard_mib: 2, heldout_fraction: 0.01}}\n")
    config = load_config(work / "run.yaml", overrides)
    events = work / "out" / "data" / ".train.work" / "events.jsonl"
    with _memory(lambda: _last_number(events)) as memory:
        started = time.perf_counter()
        summaries = prepare_shards(config)
        prepare_s = time.perf_counter() - started
    loading, loading_memory = _load(summaries["train"].path, options)
    shutil.rmtree(work / "videos")
    append_csv(
        RESULTS / "data_memory.csv",
        [
            {"stage": stage, "videos": options.videos, "done": done, "seconds": round(at, 2), "mib": round(mib, 2)}
            for stage, points in (("prepare", memory), ("load", loading_memory))
            for done, at, mib in points[:: max(1, len(points) // 50)]
        ],
    )
    return {
        "commit": describe_commit(),
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "load_average": round(os.getloadavg()[0], 1),
        "videos": options.videos,
        "workers": options.workers,
        "prepare_videos_per_s": round(options.videos / prepare_s, 1),
        **_line(memory, "prepare"),
        **loading,
        **_line(loading_memory, "load"),
        **_load_wan_rows(work / "wan"),
        "disk_write_mb_per_s": round(write_mb_s, 1),
        "disk_read_mb_per_s": round(read_mb_s, 1),
    }


def _load(shards: Path, options: argparse.Namespace) -> tuple[dict[str, object], _Points]:
    """10,000 samples or more, from a cold page cache as fast as it goes, then 100 fake steps with reading ahead."""
    started = time.perf_counter()
    loader = build_loader(shards, batch_size_per_rank=options.batch, world_size=1, rank=0, seed=0)
    open_s = time.perf_counter() - started
    num_bytes = sum(shard.raw.size for shard in loader.record.shards) / loader.num_samples
    with _memory(lambda: loader.num_seen) as memory:
        samples_per_s = _empty_cache_and_read(
            loader, shards, max(options.videos, 10_000) // options.batch, options.batch
        )
    loader.read_ahead(2)
    next(loader)
    waits, started = [], time.perf_counter()
    for _ in range(100):
        time.sleep(options.step_ms / 1e3)
        asked = time.perf_counter()
        next(loader)
        waits.append(time.perf_counter() - asked)
    share = sum(waits) / (time.perf_counter() - started)
    loader.close()
    return {
        "load_open_s": round(open_s, 2),
        "load_samples_per_s": round(samples_per_s, 1),
        "load_mb_per_s": round(samples_per_s * num_bytes / 1e6, 2),
        "wait_share_of_step": round(share, 5),
        "step_ms": options.step_ms,
    }, memory


def _load_wan_rows(folder: Path) -> dict[str, object]:
    """One epoch of rows of Wan's size, from a cold page cache."""
    generator = torch.Generator().manual_seed(0)
    samples = (
        Sample(
            prompt=f"prompt {number}",
            latents=torch.randn(_WAN_LATENTS, generator=generator),
            prompt_embeds=torch.randn(_WAN_EMBEDS, generator=generator),
            video_mp4=None,
            source_id=str(number),
            teacher="noise",
            seed=number,
            fps=16.0,
        )
        for number in range(_NUM_WAN_ROWS)
    )
    write_shards(samples, folder, metadata={})
    loader = build_loader(folder, batch_size_per_rank=_WAN_BATCH, world_size=1, rank=0, seed=0)
    num_bytes = sum(shard.raw.size for shard in loader.record.shards) / loader.num_samples
    samples_per_s = _empty_cache_and_read(loader, folder, _NUM_WAN_ROWS // _WAN_BATCH, _WAN_BATCH)
    return {
        "load_wan_samples_per_s": round(samples_per_s, 1),
        "load_wan_mb_per_s": round(samples_per_s * num_bytes / 1e6, 1),
    }


def _empty_cache_and_read(loader: ShardLoader, shards: Path, num_batches: int, batch_size: int) -> float:
    """Samples per second."""
    for path in shards.glob("shard.*"):
        _forget(path)
    started = time.perf_counter()
    for _ in range(num_batches):
        next(loader)
    return num_batches * batch_size / (time.perf_counter() - started)


def _write_videos(folder: Path, count: int) -> None:
    """`count` different mp4 files of 13 frames, 32 x 32, with captions."""
    folder.mkdir()
    prompts, generator = training_prompts(_NUM_PROMPTS), np.random.default_rng(0)
    with (folder / "metadata.jsonl").open("w") as table:
        for number in range(count):
            coarse = generator.random((13, 4, 4, 3), dtype=np.float32)
            (folder / f"{number:06}.mp4").write_bytes(encode_video(np.kron(coarse, np.ones((1, 8, 8, 1))), fps=8))
            row = {"file_name": f"{number:06}.mp4", "caption": prompts[number % _NUM_PROMPTS]}
            table.write(json.dumps(row) + "\n")


def _disk_speed(folder: Path) -> tuple[float, float]:
    """MB/s of writing 256 MiB through fsync, and of reading them back from the disk."""
    path, block = folder / "speed", os.urandom(1 << 22)
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(_DISK_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    write_s = time.perf_counter() - started
    _forget(path)
    started = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 22):
            pass
    read_s = time.perf_counter() - started
    path.unlink()
    return _DISK_BYTES / 1e6 / write_s, _DISK_BYTES / 1e6 / read_s


def _forget(path: Path) -> None:
    """Ask the kernel to drop a file from its cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _memory(num_done: Callable[[], int]) -> Iterator[_Points]:
    """Collect (samples done, seconds, MiB) of this process and its children, from the first sample on."""
    points: _Points = []
    done, started = threading.Event(), time.perf_counter()

    def watch() -> None:
        while not done.wait(0.5 if len(points) > 20 else 0.1):
            if num := num_done():  # imports and networks are loaded before the first
                points.append((num, time.perf_counter() - started, _held_mib()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield points
    finally:
        done.set()
        watcher.join()


def _last_number(events: Path) -> int:
    """Requests that preparation has noted: the number in the last whole line of its journal, plus one."""
    try:
        with events.open("rb") as file:
            file.seek(max(0, events.stat().st_size - 2000))
            numbers = re.findall(rb'\n\{"n": (\d+)', file.read())
    except OSError:  # not begun, or finished
        return 0
    return int(numbers[-1]) + 1 if numbers else 0


def _held_mib() -> float:
    threads = [path.read_text().split() for path in Path(f"/proc/{os.getpid()}/task").glob("*/children")]
    total = 0
    for process in {str(os.getpid()), *(child for row in threads for child in row)}:
        rollup = Path(f"/proc/{process}/smaps_rollup")
        try:
            lines = rollup.read_text().splitlines()
        except OSError:  # a decoder that just ended
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "SwapPss:")))
    return total / 1024


def _line(points: _Points, stage: str) -> dict[str, object]:
    """Least squares through the points after the first fifth: level at its beginning and end, slope."""
    end = max(done for done, _, _ in points)
    part = [(done, mib) for done, _, mib in points if done >= end / 5]
    done, mib = np.array(part).T
    slope, level = np.polyfit(done, mib, 1)
    return {
        f"{stage}_mib_at_fifth": round(level + slope * end / 5, 1),
        f"{stage}_mib_at_end": round(level + slope * end, 1),
        f"{stage}_mib_per_1000": round(1000 * slope, 3),
        f"{stage}_mib_highest": round(max(mib), 1),
    }


if __name__ == "__main__":
    main()
