"""The process group of a run: one frozen `World`, a few collectives, and generators seeded from integers.

Works under the `deepspeed` launcher, under torchrun, and as one plain process. It knows nothing of DeepSpeed,
which finds the process group initialised and uses it.
"""

import hashlib
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from afd.slurm import rank_variables

T = TypeVar("T")
LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_own_variables: dict[str, str] = {}
"""What a plain process added to its environment, until `close_world` takes it back."""


@dataclass(frozen=True)
class World:
    """Where this process stands: `rank` of `size` processes, `local_rank` on its host, and the device it uses."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one process that writes logs and manifests."""
        return self.rank == 0


def init_world(timeout_s: float = 1800.0, *, device: str | None = None, num_threads: int | None = None) -> World:
    """Join (or, as a plain process, found) the process group; a second call returns the same world.

    Args:
        timeout_s: how long a collective waits for a silent peer before the run dies; > 0.
        device: "cpu" or "cuda"; by default CUDA where there is one. "cpu" must be asked for before DeepSpeed is
            imported, because DeepSpeed picks its accelerator once.
        num_threads: CPU threads of this process; by default `threads_per_rank` decides.
    Raises:
        ValueError: timeout not positive, an unknown device, or only some of the launcher's variables are set.
    """
    if timeout_s <= 0:
        raise ValueError(f"timeout_s must be > 0 seconds, got {timeout_s}")
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ValueError("device 'cuda' was asked for, but torch sees no CUDA device")
    if device == "cpu" and has_cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    store = _complete_environment()
    rank, local_rank, size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    threads = threads_per_rank(os.environ, size) if num_threads is None else num_threads
    if threads is not None:
        torch.set_num_threads(threads)
    on_cuda = has_cuda and device != "cpu"
    if on_cuda:
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        place: dict[str, Any] = {} if store is None else {"store": store, "rank": rank, "world_size": size}
        dist.init_process_group("nccl" if on_cuda else "gloo", timeout=timedelta(seconds=timeout_s), **place)
    return World(rank, local_rank, size, torch.device("cuda", local_rank) if on_cuda else torch.device("cpu"))


def adopt_slurm_task() -> None:
    """Where srun itself started the ranks, set the variables a launcher would set; harmless anywhere else.

    Raises:
        ValueError: the step spans several nodes and MASTER_ADDR is not set.
    """
    os.environ.update(rank_variables(os.environ))


def set_timeouts(timeout_s: float) -> None:
    """Give every process group of this process one timeout; call it when all groups have been made.

    DeepSpeed and torch make groups with their own defaults (30 minutes for gloo, 10 for NCCL), whatever the first
    group was given.
    """
    if dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def _complete_environment() -> dist.Store | None:
    """Make a plain process look launched: the five variables a process group and DeepSpeed read.

    Returns:
        A plain process's own store, listening already: a port that was only found free can be taken before it is
        bound. None where a launcher set the variables.
    """
    adopt_slurm_task()
    present = [name for name in LAUNCH_VARIABLES if name in os.environ]
    missing = [name for name in LAUNCH_VARIABLES if name not in os.environ]
    if not missing:
        return None
    if "RANK" in present or os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            f"the launcher set {', '.join(present)} but not {', '.join(missing)}: "
            "start with `deepspeed`, with torchrun, or set all five"
        )
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, multi_tenant=True)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    _own_variables.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **place})
    os.environ.update(_own_variables)
    return store


def threads_per_rank(environment: Mapping[str, str], size: int) -> int | None:
    """Share this host's cores among its ranks: cores // local ranks, or None to leave a user's choice alone.

    The `deepspeed` launcher sets OMP_NUM_THREADS only with --bind_cores_to_rank, which is a choice and is kept.
    torchrun writes OMP_NUM_THREADS=1 by itself for more than one rank, so under torchrun a 1 counts as unset.

    Args:
        environment: the process's variables.
        size: ranks in the world; an upper bound of the local ranks where the launcher does not tell them.
    """
    chosen = environment.get("OMP_NUM_THREADS")
    written_by_torchrun = "TORCHELASTIC_RUN_ID" in environment and chosen == "1" and size > 1
    if chosen is not None and not written_by_torchrun:
        return None
    local_size = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or size)
    return max(1, len(os.sched_getaffinity(0)) // local_size)


def close_world() -> None:
    """Leave the process group, where there is one; call it last, so that the process can end.

    A plain process's environment is as it was before `init_world`: what it starts later is no rank of its world.
    DeepSpeed keeps references to its groups, so gloo's worker threads survive `destroy_process_group`. One that still
    lets go of its last tensor while the interpreter shuts down aborts the process ("terminate called without an
    active exception", pytorch/pytorch issue 190489): wait until all of them sleep.
    """
    while _own_variables:
        os.environ.pop(_own_variables.popitem()[0], None)
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    for _ in range(100):
        time.sleep(0.01)
        if not _has_busy_threads():
            return


def _has_busy_threads() -> bool:
    """True while a thread of this process other than the calling one runs or waits for a core (Linux)."""
    for task in Path("/proc/self/task").glob("*"):
        if int(task.name) == threading.get_native_id():
            continue
        try:
            state = (task / "stat").read_text().rpartition(") ")[2][:1]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state == "R":
            return True
    return False


def world_rank() -> int:
    """This process's rank; 0 before `init_world`."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of ranks; 1 before `init_world`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over the ranks as a new tensor of the same shape, without gradient."""
    return _reduced(tensor, dist.ReduceOp.SUM)


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Mean over the ranks as a new floating tensor of the same shape, without gradient."""
    return all_reduce_sum(tensor) / world_size()


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Maximum over the ranks as a new tensor of the same shape, without gradient."""
    return _reduced(tensor, dist.ReduceOp.MAX)


def _reduced(tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    result = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(result, op=operation)
    return result


def gather_cat(tensor: Tensor) -> Tensor:
    """Concatenate every rank's rows in rank order, on every rank, without gradient.

    Args:
        tensor: [n, ...]; n may differ between ranks, the other axes and the dtype may not.
    Returns:
        [sum of n, ...]
    Raises:
        ValueError: tensor has no first axis.
    """
    if tensor.ndim == 0:
        raise ValueError("gather_cat needs a tensor [n, ...], got a scalar")
    rows = tensor.detach().contiguous()
    if world_size() == 1:
        return rows.clone()
    count = torch.tensor([rows.shape[0]], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    sizes = [int(each.item()) for each in counts]
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])


def broadcast_object(value: T) -> T:
    """Give every rank rank 0's value; any picklable object."""
    if world_size() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def gather_objects(value: T) -> list[T]:
    """Collect one picklable object per rank, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def check_same_on_all_ranks(name: str, value: object) -> None:
    """Fail on every rank, instead of hanging later, where the ranks would not do the same work.

    Args:
        name: what is compared, for the message.
        value: anything whose `repr` tells it apart, such as a step's plan of forwards.
    Raises:
        RuntimeError: the ranks differ; names the first two that do.
    """
    values = gather_objects(repr(value))
    for rank, other in enumerate(values):
        if other != values[0]:
            raise RuntimeError(f"{name} must be the same on every rank: rank 0 has {values[0]}, rank {rank} {other}")


def seeded_generator(*keys: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Make a generator from integers such as (seed, step, rank): the same keys give the same stream everywhere.

    The seed is the first 63 bits of blake2b over the keys' decimal text, so neighbouring keys share nothing.

    Raises:
        ValueError: no key was given.
    """
    if not keys:
        raise ValueError("seeded_generator needs at least one integer key, got none")
    text = ",".join(str(int(key)) for key in keys)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    generator = torch.Generator(device=device)
    generator.manual_seed(int.from_bytes(digest, "little") >> 1)
    return generator
