"""First-chunk latency and steady speed of a stream without an end, with and without decoding.

    python benchmarks/latency.py                                                  # the shipped student
    python benchmarks/latency.py --config configs/wan_1_3b_self_forcing.yaml --window 12 --sink 3

With --config: random weights of the configured shape in bfloat16 and a random VAE of Wan's real size on a GPU; without
a GPU a tiny model of the same structure, which shows that the code works and nothing about speed. Each setting streams
once cold and then `--repeats` times warm; half-way the prompt changes. Rows go to benchmarks/results/latency.csv.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measurement import CPU_WARNING, append_csv, describe_commit, describe_device, describe_versions
from torch import Tensor

from afd.config import RunConfig, StudentShape
from afd.config_file import load_config
from afd.models.encoders import QUICKSTART_ASSETS, VideoCodec, latent_shape, load_codec
from afd.models.student import CausalStudent
from afd.models.wan_vae import WanVAE
from afd.models.weights import load_student
from afd.rollout import SamplerTimes, sampler_times
from afd.sampling import StreamStatistics, stream_chunks
from afd.sampling.session import streaming_shape

RESULTS = Path(__file__).resolve().parent / "results" / "latency.csv"


@dataclass(frozen=True)
class Row:
    """One setting. Times in s and rates in video frames per second; medians over the warm streams.

    Attributes:
        size: `shipped`, `real` (random weights), or `tiny` for what a machine without a GPU runs of a configuration.
        first_chunk_cold_s: of the first stream in the process: allocation, compilation and warm-up included.
        first_chunk_s: from asking to decoded frames, the prompt's keys and values included; text encoding is not.
        prompt_change_s: the chunk that swaps the prompt, from asking to decoded frames.
        slowest_chunk_s: the slowest steady chunk of all warm streams.
        fps, fps_without_decoding: steady speed.
        real_time: fps over the configured playback rate.
        peak_gib: most GPU memory allocated; NaN on a CPU.
    """

    config: str
    size: str
    dtype: str
    codec: str
    pixels: str
    chunk_frames: int
    window_frames: int
    sink_frames: int
    steps: int
    chunks: int
    first_chunk_cold_s: float
    first_chunk_s: float
    prompt_change_s: float
    slowest_chunk_s: float
    fps: float
    fps_without_decoding: float
    real_time: float
    peak_gib: float
    device: str
    commit: str
    versions: str


@dataclass(frozen=True)
class Setting:
    """What is streamed."""

    student: CausalStudent
    codec: VideoCodec
    times: SamplerTimes
    latent_size: tuple[int, int]


def shipped(config: RunConfig, device: torch.device) -> Setting:
    """The shipped chunk-wise student and its codec."""
    student = load_student(QUICKSTART_ASSETS / "student.safetensors").to(device)
    size = latent_shape(config.encoders, config.video)[2:]
    return Setting(student, load_codec(config.encoders, device=device), sampler_times(config.rollout), size)


def random_setting(config: RunConfig, device: torch.device, folder: Path) -> Setting:
    """Random weights of a configuration's shape; on a CPU of its structure only.

    Raises:
        ValueError: the configuration leaves dimensions to a file.
    """
    from diffusers import AutoencoderKLWan

    given = config.student.given_shape
    if "num_layers" not in given or config.encoders.codec != "wan_vae":
        raise ValueError("the configuration must write the student's dimensions and take encoders.codec wan_vae")
    is_real = device.type == "cuda"
    small = {
        "num_layers": 2,
        "num_heads": 2,
        "head_dim": 12,
        "ffn_dim": 48,
        "freq_dim": 16,
        "text_len": 8,
        "text_dim": 32,
    }
    dimensions: dict[str, Any] = given if is_real else given | small
    student = random_student(StudentShape(**dimensions), device)
    size_of_vae: dict[str, Any] = {} if is_real else {"base_dim": 4, "num_res_blocks": 1}
    vae: Any = AutoencoderKLWan(**size_of_vae)
    vae.save_pretrained(folder)
    stride = vae.config.scale_factor_spatial
    size = (config.video.height // stride, config.video.width // stride) if is_real else (4, 8)
    codec = WanVAE(
        folder, device=device, dtype=getattr(torch, config.encoders.vae_dtype), tile=config.encoders.vae_tile
    )
    return Setting(student, codec, sampler_times(config.rollout), size)


def random_student(shape: StudentShape, device: torch.device) -> CausalStudent:
    """A student of a shape, initialised on its device; bfloat16 on a GPU."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        return CausalStudent(shape).to(dtype)


def stream_once(setting: Setting, prompts: list[Tensor], num_chunks: int) -> tuple[StreamStatistics, float]:
    """Statistics of a stream of `num_chunks`, and the time of its chunk with the new prompt, s."""
    asked = itertools.chain([prompts[0]] * (num_chunks // 2), itertools.repeat(prompts[1]))
    result, change_s = StreamStatistics(), float("nan")
    stream = stream_chunks(
        setting.student, setting.codec, lambda: next(asked), setting.times, latent_size=setting.latent_size, seed=0
    )
    for chunk in itertools.islice(stream, num_chunks):
        result.add(chunk)
        if chunk.index == num_chunks // 2:
            change_s = chunk.generate_s + chunk.decode_s
    return result, change_s


def measure(setting: Setting, config: RunConfig, arguments: argparse.Namespace, labels: dict[str, str]) -> Row:
    """Stream cold, then warm, and take medians."""
    student, shape = setting.student, setting.student.shape
    device = next(student.parameters()).device
    prompts = [
        torch.randn(1, shape.text_len, shape.text_dim, generator=torch.Generator().manual_seed(seed)).to(device)
        for seed in (0, 1)
    ]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    cold, _ = stream_once(setting, prompts, arguments.chunks)
    warm = [stream_once(setting, prompts, arguments.chunks) for _ in range(arguments.repeats)]
    rates = [(each.fps or 0.0, each.fps_without_decoding or 0.0) for each, _ in warm]
    fps, fps_without = (statistics.median(values) for values in zip(*rates, strict=True))
    height, width = (side * setting.codec.spatial_stride for side in setting.latent_size)
    assert shape.window_frames is not None
    return Row(
        **labels,
        dtype=str(next(student.parameters()).dtype).removeprefix("torch."),
        codec=setting.codec.name,
        pixels=f"{height}x{width}",
        chunk_frames=shape.chunk_frames,
        window_frames=shape.window_frames,
        sink_frames=shape.sink_frames,
        steps=len(setting.times.times),
        chunks=arguments.chunks,
        first_chunk_cold_s=cold.first_chunk_s or float("nan"),
        first_chunk_s=statistics.median(each.first_chunk_s or float("nan") for each, _ in warm),
        prompt_change_s=statistics.median(change_s for _, change_s in warm),
        slowest_chunk_s=max(each.peak_chunk_s for each, _ in warm),
        fps=fps,
        fps_without_decoding=fps_without,
        real_time=fps / config.video.fps,
        peak_gib=torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan"),
        device=describe_device(device),
        commit=describe_commit(),
        versions=describe_versions(),
    )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="random weights of this configuration's shape")
    parser.add_argument("--window", type=int, help="latent frames; default the student's, or its training's")
    parser.add_argument("--sink", type=int, help="latent frames; default the student's")
    parser.add_argument("--chunks", type=int, default=24, help="of each stream")
    parser.add_argument("--repeats", type=int, default=3, help="warm streams")
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV to append to")
    arguments = parser.parse_args(argv)
    if arguments.chunks < 4 or arguments.repeats < 1:
        parser.error(f"--chunks must be >= 4 and --repeats >= 1, got {arguments.chunks} and {arguments.repeats}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measure one setting and print it."""
    arguments = parse_arguments(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_config(arguments.config) if arguments.config else RunConfig()
    size = "shipped" if not arguments.config else "real" if device.type == "cuda" else "tiny"
    with tempfile.TemporaryDirectory(prefix="afd-streaming-") as folder:
        setting = (
            random_setting(config, device, Path(folder, "random")) if arguments.config else shipped(config, device)
        )
        setting.student.eval().requires_grad_(False).shape = streaming_shape(
            setting.student.shape,
            trained_frames=config.video.num_frames,
            window=arguments.window,
            sink=arguments.sink,
        )
        name = arguments.config.stem if arguments.config else "quickstart"
        row = measure(setting, config, arguments, {"config": name, "size": size})
    for key, value in asdict(row).items():
        print(f"{key:<22}{value:.4g}" if isinstance(value, float) else f"{key:<22}{value}")
    if device.type == "cpu":
        print(CPU_WARNING)
    record = {name: f"{v:.5g}" if isinstance(v, float) else v for name, v in asdict(row).items()}
    append_csv(arguments.results, [record])
    return 0


if __name__ == "__main__":
    sys.exit(main())
