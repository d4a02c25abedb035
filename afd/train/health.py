"""What must work before a run is worth starting, asked of every rank: GPUs, one collective, disk, shards."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from afd.config import RunConfig
from afd.data.store import ShardStore
from afd.distributed import World, all_reduce_sum, close_world, gather_objects, init_world
from afd.preparation import shard_places

_TIMEOUT_S = 120.0
_FREE_BYTES = 2**30
_NUM_FLOATS = 2**22  # 16 MiB: large enough to take the path that gradients take


def check_health(config: RunConfig, *, gpus_per_node: int) -> list[str]:
    """Check this rank and, with all others, one collective; collective.

    Args:
        config: the run's.
        gpus_per_node: GPUs that nvidia-smi must list on every node; 0 asks for none.
    Returns:
        What was found, one line per subject, on rank 0; empty on the others.
    Raises:
        ValueError: on every rank, with every rank's problems: host, what was expected, what came.
    """
    world = init_world(_TIMEOUT_S)
    try:
        lines = [_check_collective(world)]
        problems = [*_gpu_problems(gpus_per_node, world), *_disk_problems(config), *_shard_problems(config)]
        everywhere = gather_objects([f"{socket.gethostname()}: {problem}" for problem in problems])
        found = sorted({problem for rank in everywhere for problem in rank})
        if found:
            raise ValueError("; ".join(found))
        lines.append(f"disk: {shutil.disk_usage(_existing(config.output_dir)).free / 2**30:.1f} GiB free")
        lines.append(f"GPUs: {gpus_per_node} on each of {len(set(gather_objects(socket.gethostname())))} hosts")
        return lines if world.is_main else []
    finally:
        close_world()


def _check_collective(world: World) -> str:
    """Sum a vector over all ranks twice; the second time is the network's, the first includes connecting."""
    expected = world.size * (world.size + 1) / 2
    values = torch.full((_NUM_FLOATS,), float(world.rank + 1), device=world.device)
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        total = all_reduce_sum(values)
        seen = total.min().item(), total.max().item()
        seconds = time.perf_counter() - started
        if seen != (expected, expected):
            raise ValueError(f"all-reduce over {world.size} ranks must give {expected:g}, got {seen}")
    backend = dist.get_backend() if dist.is_initialized() else "none"
    size = values.numel() * values.element_size() / 2**20
    return f"all-reduce: {world.size} ranks, {backend}, {size:.0f} MiB in {seconds * 1e3:.1f} ms"


def _gpu_problems(expected: int, world: World) -> list[str]:
    if not expected:
        return []
    if world.device.type != "cuda":
        return [f"{expected} GPUs expected, but torch sees no CUDA device"]
    try:
        done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        return [f"nvidia-smi does not answer: {error}"]
    listed = [line for line in done.stdout.splitlines() if line.startswith("GPU ")]
    if done.returncode != 0 or len(listed) != expected:
        return [f"nvidia-smi must list {expected} GPUs, got {len(listed)} (exit code {done.returncode})"]
    return []


def _disk_problems(config: RunConfig) -> list[str]:
    folder = _existing(config.output_dir)
    problems = []
    free = shutil.disk_usage(folder).free
    if free < _FREE_BYTES:
        problems.append(f"{folder} must have {_FREE_BYTES / 2**30:g} GiB free, got {free / 2**30:.2f}")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".afd-health-") as file:
            file.write(b"0" * 4096)
            file.flush()
    except OSError as error:
        problems.append(f"{folder} cannot be written: {error.strerror}")
    return problems


def _shard_problems(config: RunConfig) -> list[str]:
    """Headers only: the shards themselves are verified when the run opens them. The built-in teacher makes its own."""
    if config.teacher.kind != "shards":
        return []
    problems = []
    for folder, remote in shard_places(config):
        try:
            record = ShardStore(folder, remote=remote).record
        except ValueError as error:
            problems.append(str(error))
            continue
        for shard in record.shards if remote is None else ():
            stored = shard.packed or shard.raw
            size = (record.path / stored.name).stat().st_size if (record.path / stored.name).is_file() else None
            if size != stored.size:
                problems.append(f"{record.path / stored.name} must have {stored.size} bytes, got {size}")
    return problems


def _existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    folder = folder.absolute()
    return next(each for each in (folder, *folder.parents) if each.is_dir())
