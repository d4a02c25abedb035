"""The pipeline teacher: any diffusers text-to-video pipeline saved in a folder, one worker process per device.

A video depends on (prompt, seed) and the settings alone, not on the device's number or the number of workers.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import multiprocessing
import os
import queue
import secrets
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from afd.stopping import ignore_stop_signals
from afd.teachers.base import FinishedVideo, SourceReject, SourceVideo, VideoRequest, accept_all, request_id
from afd.teachers.frames import encode_mp4
from afd.teachers.ordered import obtain_in_order
from afd.teachers.prompts import read_json


@dataclass(frozen=True)
class PipelineCall:
    """How the pipeline is loaded and called; the fields are those of `teacher.pipeline`."""

    num_frames: int = 81
    height: int = 480
    width: int = 832
    fps: int = 16
    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    negative_prompt: str = ""
    extra: Mapping[str, int | float | str | bool] = field(default_factory=dict)
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    vae_float32: bool = True
    offload: Literal["none", "model", "sequential"] = "none"
    crf: int = 12


class PipelineSource:
    """Every (prompt, seed) of a list, sampled by a local pipeline; finished videos are kept in `work_dir`.

    Args:
        folder: a saved diffusers pipeline.
        requests: gives the requests in order, made from this source's name and version; rejects are passed on.
        work_dir: `<source_id>.mp4` files; what is there is not sampled again.
        call: sizes, steps and precision.
        devices: one worker process each, e.g. ("cuda:0", "cuda:1").
        licence: tag of every video.
    Raises:
        ValueError: no saved pipeline, or a size that H.264 cannot hold.
    """

    def __init__(
        self,
        folder: Path,
        requests: Callable[[str, str], Iterable[VideoRequest | SourceReject]],
        *,
        work_dir: Path,
        call: PipelineCall,
        devices: Sequence[str],
        licence: str = "",
    ) -> None:
        if call.height % 2 or call.width % 2:
            raise ValueError(f"teacher.pipeline height and width must be even, got {call.height} x {call.width}")
        if not devices:
            raise ValueError("teacher.pipeline.devices must name one device at least")
        index = read_json(folder / "model_index.json", expected=dict)
        self._folder, self._work_dir, self._call = folder, work_dir, call
        self._devices, self._licence, self._make_requests = tuple(devices), licence, requests
        self.teacher = f"pipeline:{index.get('_class_name', 'unknown')}"
        self.version = _fingerprint(folder, call)

    def videos(self, wanted: Callable[[VideoRequest], bool] = accept_all) -> Generator[SourceVideo | SourceReject]:
        """Yield the wanted videos in the order of the requests, sampled on all devices at a time.

        Raises:
            ValueError: the pipeline cannot be loaded or called.
        """
        self._work_dir.mkdir(parents=True, exist_ok=True)
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        workers = [_Worker(device) for device in self._devices]
        for worker in workers:
            idle.put(worker)

        def obtain(request: VideoRequest) -> SourceVideo | SourceReject:
            target = self._work_dir / f"{request.source_id}.mp4"
            if not target.is_file():
                worker = idle.get()
                try:
                    problem = worker.make(self._folder, self._call, request, target)
                finally:
                    idle.put(worker)
                if problem:
                    return SourceReject(request.source_id, f"{problem} ({request.prompt[:60]!r})", is_final=False)
            return request.video(teacher=self.teacher, version=self.version, path=target, licence=self._licence)

        def stop() -> None:
            for worker in workers:
                worker.close()

        requests = self._make_requests(self.teacher, self.version)
        outcomes = obtain_in_order(requests, wanted, obtain, num_threads=len(workers), stop=stop)
        try:
            for outcome in outcomes:
                if outcome is not None:
                    yield outcome
        finally:
            outcomes.close()

    def generate(self, prompt: str, seed: int) -> FinishedVideo:
        """Sample one video in a worker process of the first device.

        Raises:
            ValueError: the pipeline cannot be loaded or called, or gave no finite video.
        """
        request = VideoRequest(prompt, seed, request_id(self.teacher, self.version, prompt, seed))
        target = self._work_dir / f"{request.source_id}.mp4"
        self._work_dir.mkdir(parents=True, exist_ok=True)
        worker = _Worker(self._devices[0])
        try:
            problem = None if target.is_file() else worker.make(self._folder, self._call, request, target)
        finally:
            worker.close()
        if problem:
            raise ValueError(f"{self.teacher}: {problem}")
        return FinishedVideo(prompt, seed, target.read_bytes(), request.source_id)


class _Worker:
    """One process that holds the pipeline on one device; started at the first video, again if it dies."""

    def __init__(self, device: str) -> None:
        self._device, self._pool, self._is_closed = device, None, False

    def make(self, folder: Path, call: PipelineCall, request: VideoRequest, target: Path) -> str | None:
        """Write one video; returns why there is none. A process that dies gets a second try."""
        for _ in range(2):
            if self._is_closed:
                return "the run ended"
            if self._pool is None:
                context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
                self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=ignore_stop_signals)
            try:
                settings = json.dumps(asdict(call), sort_keys=True)
                return self._pool.submit(
                    _make, str(folder), settings, self._device, request.prompt, request.seed, str(target)
                ).result()
            except BrokenProcessPool:
                self._pool.shutdown(wait=False)
                self._pool = None
        return f"its worker process on {self._device} died twice (out of memory?)"

    def close(self) -> None:
        """End the process after the video it is at."""
        self._is_closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def _make(folder: str, settings: str, device: str, prompt: str, seed: int, target: str) -> str | None:
    """In the worker: sample, encode, write whole. Returns why this one video failed.

    Raises:
        ValueError: the pipeline itself cannot be loaded or called.
    """
    call = PipelineCall(**json.loads(settings))
    pipeline = _load(folder, settings, device)
    try:
        frames = sample_frames(pipeline, call, prompt, seed)
    except RuntimeError as error:  # out of memory, among others
        return f"sampling failed on {device}: {' '.join(str(error).split())[:200]}"
    if frames.shape != (call.num_frames, call.height, call.width, 3):
        expected = [call.num_frames, call.height, call.width, 3]
        raise ValueError(f"the pipeline must give frames {expected}, got {list(frames.shape)}")
    if not np.isfinite(frames).all():
        return "the pipeline gave NaN or infinity"
    pictures = (np.clip(frames, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    temporary = Path(f"{target}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(encode_mp4(pictures, fps=call.fps, crf=call.crf))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return None


@functools.lru_cache(maxsize=1)
def _load(folder: str, settings: str, device: str) -> Any:
    """The pipeline on its device; once per worker process.

    Raises:
        ValueError: it cannot be loaded.
    """
    import torch
    from diffusers import DiffusionPipeline

    call = PipelineCall(**json.loads(settings))
    dtype = getattr(torch, call.dtype)
    # Local safetensors only: no download, no pickle, no code from the folder.
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    try:
        index = read_json(Path(folder, "model_index.json"), expected=dict)
        has_vae = call.vae_float32 and "vae" in index
        options["dtype"] = {"default": dtype, "vae": torch.float32} if has_vae else dtype
        pipeline = DiffusionPipeline.from_pretrained(folder, **options)
        if call.offload == "none":
            pipeline.to(device)
        elif call.offload == "model":
            pipeline.enable_model_cpu_offload(device=device)
        else:
            pipeline.enable_sequential_cpu_offload(device=device)
    except (OSError, ValueError, RuntimeError, ImportError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"teacher.pipeline.path {folder} cannot be loaded on {device}: {error}") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_frames(pipeline: Any, call: PipelineCall, prompt: str, seed: int) -> np.ndarray:
    """Call the pipeline: [F, H, W, 3] float in [0, 1].

    The noise is drawn on the CPU, so that every device gives the same video, from `noise_seed(prompt, seed)`.

    Raises:
        ValueError: the pipeline takes no prompt or no num_frames, or not what `extra` gives it.
    """
    import torch

    known = set(inspect.signature(pipeline.__call__).parameters)
    missing = {"prompt", "generator", "num_frames"} - known
    if missing:
        raise ValueError(f"{type(pipeline).__name__} is no text-to-video pipeline: it takes no {', '.join(missing)}")
    unknown = set(call.extra) - known
    if unknown:
        raise ValueError(f"teacher.pipeline.extra: {type(pipeline).__name__} takes no {', '.join(sorted(unknown))}")
    options = {
        "height": call.height,
        "width": call.width,
        "num_inference_steps": call.num_inference_steps,
        "guidance_scale": call.guidance_scale,
        "negative_prompt": call.negative_prompt,
        "output_type": "np",
    }
    generator = torch.Generator("cpu").manual_seed(noise_seed(prompt, seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(noise_seed(prompt, seed))
        result = pipeline(
            prompt=prompt,
            num_frames=call.num_frames,
            generator=generator,
            **{name: value for name, value in options.items() if name in known},
            **call.extra,
        )
    return np.asarray(result.frames[0])


def noise_seed(prompt: str, seed: int) -> int:
    """63 bits of sha256 over seed and prompt: two prompts with one seed do not share their noise."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()[:8], "big") >> 1


def _fingerprint(folder: Path, call: PipelineCall) -> str:
    """Names the weights (by their files' names and sizes, which is quick) and everything that decides a video."""
    digest = hashlib.sha256(json.dumps(asdict(call), sort_keys=True).encode())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"\n{path.relative_to(folder).as_posix()} {path.stat().st_size}".encode())
        if path.suffix == ".json" and path.stat().st_size < 1 << 20:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def default_devices() -> tuple[str, ...]:
    """Every visible GPU, or one CPU worker."""
    import torch

    return tuple(f"cuda:{i}" for i in range(torch.cuda.device_count())) or ("cpu",)
