"""Time the fused operations against eager and compiled PyTorch: `python benchmarks/kernels.py --op all`.

Bandwidth counts the fewest bytes an operation can move, so a baseline that moves more shows a smaller share. All
implementations run in the same process on the same tensors, after their results were compared.
"""

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from measurement import (
    CPU_WARNING,
    Ceilings,
    Row,
    describe_commit,
    describe_device,
    describe_versions,
    measure_ceilings,
    peak_mib,
    print_table,
    time_us,
    write_results,
)
from torch import Tensor

from afd_kernels import (
    PhiloxNoise,
    adaln_modulate,
    add_noise_and_target,
    gated_residual,
    nft_loss,
    rope_3d_table,
    rope_qk_norm,
)
from afd_kernels.testing import relative_error

OPS = ("nft_loss", "noising", "noising_philox", "rope_qk_norm", "adaln_modulate", "gated_residual")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Largest accepted difference between two implementations, relative to the largest value (two roundings).
AGREEMENT = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3, torch.float32: 1e-5}


@dataclass(frozen=True)
class Size:
    """Problem size: latents [samples, C, F, H, W], tokens [1, F * H * W / 4, heads * head_dim]."""

    name: str
    samples: int
    channels: int
    frames: int
    height: int
    width: int
    heads: int
    head_dim: int

    @property
    def latents(self) -> tuple[int, int, int, int, int]:
        """[N, C, F, H, W]."""
        return self.samples, self.channels, self.frames, self.height, self.width

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, rows, columns of tokens (patch 1 x 2 x 2)."""
        return self.frames, self.height // 2, self.width // 2

    @property
    def tokens(self) -> int:
        """Tokens of one sample."""
        return self.grid[0] * self.grid[1] * self.grid[2]


SIZES = {
    "wan": Size("wan", 32, 16, 21, 60, 104, 12, 128),  # Wan2.1-1.3B: 32,760 tokens x 1536
    "tiny": Size("tiny", 2, 12, 15, 8, 8, 4, 24),
}


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    Attributes:
        op: name.
        shape: of the main tensor.
        call: the public function; impl ("triton" or "reference") -> outputs.
        leaves: tensors to differentiate; empty for forward-only operations.
        forward_bytes, backward_bytes: fewest bytes each pass can move.
        baseline: what "eager" and "compile" run instead of the reference, where one would write it differently.
    """

    op: str
    shape: tuple[int, ...]
    call: Callable[[str], Tensor | tuple[Tensor, ...]]
    leaves: tuple[Tensor, ...]
    forward_bytes: int
    backward_bytes: int
    baseline: Callable[[], Tensor | tuple[Tensor, ...]] | None = None


def make_nft_loss(size: Size, dtype: torch.dtype, device: torch.device) -> Case:
    """Adaptive loss with prior from (x0, eps): reads five streams forward, five backward, writes one."""
    v, v_old, x0, eps, v_ref = (torch.randn(size.latents, device=device, dtype=dtype) for _ in range(5))
    v.requires_grad_()
    t, w = torch.rand(size.samples, size.frames, device=device), torch.rand(size.samples, device=device)

    def call(impl: str) -> Tensor:
        return nft_loss(
            v, v_old, (x0, eps), t, w, nft_beta=0.1, v_ref=v_ref, prior_weight=1e-4, impl=impl
        )  # fmt: skip

    stream = v.numel() * v.element_size()
    return Case("nft_loss", size.latents, call, (v,), 5 * stream, 6 * stream)


def make_noising(size: Size, dtype: torch.dtype, device: torch.device, *, is_philox: bool = False) -> Case:
    """State and target: two streams in (one with in-kernel noise), two out."""
    x0, given = (torch.randn(size.latents, device=device, dtype=dtype) for _ in range(2))
    t = torch.rand(size.samples, size.frames, device=device)
    eps = PhiloxNoise(1234) if is_philox else given

    def call(impl: str) -> tuple[Tensor, Tensor]:
        return add_noise_and_target(x0, eps, t, impl=impl)

    def draw_and_add() -> tuple[Tensor, Tensor]:
        # What one writes without a kernel: torch's generator, then the reference.
        return add_noise_and_target(x0, torch.randn_like(x0), t, impl="reference")

    stream = x0.numel() * x0.element_size()
    name, streams = ("noising_philox", 3) if is_philox else ("noising", 4)
    return Case(name, size.latents, call, (), streams * stream, 0, draw_and_add if is_philox else None)


def make_rope_qk_norm(size: Size, dtype: torch.dtype, device: torch.device) -> Case:
    """q and k in and out, angles once; backward reads q, k and two gradients and writes two."""
    width = size.heads * size.head_dim
    q, k = (torch.randn(1, size.tokens, width, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    q_weight, k_weight = (torch.rand(width, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    cos, sin = rope_3d_table(*size.grid, size.head_dim, device=device)

    def call(impl: str) -> tuple[Tensor, Tensor]:
        return rope_qk_norm(q, k, q_weight, k_weight, cos, sin, num_heads=size.heads, impl=impl)

    def real_valued(x: Tensor, weight: Tensor) -> Tensor:
        # torch.compile generates no code for complex numbers: the fair baseline is real-valued float32.
        wide = x.float()
        normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype).float() * weight.float()
        first, second = normed.view(1, -1, size.heads, size.head_dim // 2, 2).transpose(1, 2).unbind(-1)
        turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
        return turned.flatten(-2).to(x.dtype)

    stream, table = q.numel() * q.element_size(), 2 * cos.numel() * cos.element_size()
    return Case(
        "rope_qk_norm", (1, size.tokens, width), call, (q, k, q_weight, k_weight), 4 * stream + table,
        6 * stream + table, lambda: (real_valued(q, q_weight), real_valued(k, k_weight)),
    )  # fmt: skip


def make_adaln_modulate(size: Size, dtype: torch.dtype, device: torch.device) -> Case:
    """x in, out; backward reads x and the gradient and writes one; shift and scale are float32 per frame."""
    width = size.heads * size.head_dim
    x = torch.randn(1, size.tokens, width, device=device, dtype=dtype, requires_grad=True)
    shift, scale = (torch.randn(1, size.frames, width, device=device, requires_grad=True) for _ in range(2))

    def call(impl: str) -> Tensor:
        return adaln_modulate(x, shift, scale, impl=impl)

    stream, table = x.numel() * x.element_size(), shift.numel() * shift.element_size()
    return Case("adaln_modulate", tuple(x.shape), call, (x, shift, scale), 2 * (stream + table), 3 * (stream + table))


def make_gated_residual(size: Size, dtype: torch.dtype, device: torch.device) -> Case:
    """x, y in, one out; backward reads y and the gradient, writes dy (dx is the gradient itself)."""
    width = size.heads * size.head_dim
    x, y = (torch.randn(1, size.tokens, width, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    gate = torch.randn(1, size.frames, width, device=device, requires_grad=True)

    def call(impl: str) -> Tensor:
        return gated_residual(x, y, gate, impl=impl)

    stream, table = x.numel() * x.element_size(), gate.numel() * gate.element_size()
    return Case("gated_residual", tuple(x.shape), call, (x, y, gate), 3 * stream + table, 3 * stream + 2 * table)


def make_case(op: str, size: Size, dtype: torch.dtype, device: torch.device) -> Case:
    """Build the tensors of one operation."""
    if op == "noising_philox":
        return make_noising(size, dtype, device, is_philox=True)
    makers = {
        "nft_loss": make_nft_loss,
        "noising": make_noising,
        "rope_qk_norm": make_rope_qk_norm,
        "adaln_modulate": make_adaln_modulate,
        "gated_residual": make_gated_residual,
    }
    return makers[op](size, dtype, device)


def stages(case: Case, impl: str) -> Iterator[tuple[str, Callable[[], object], int]]:
    """(stage, function, fewest bytes) of one implementation."""
    baseline = case.baseline or functools.partial(case.call, "reference")
    if impl == "compile":
        run = torch.compile(baseline, dynamic=False)
    else:
        run = baseline if impl == "eager" else functools.partial(case.call, impl)

    def forward() -> object:
        with torch.no_grad():
            return run()

    yield "forward", forward, case.forward_bytes
    if case.leaves:
        outputs = case.call("reference")
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = [torch.randn_like(out) for out in outputs]

        def forward_backward() -> object:
            out = run()
            return torch.autograd.grad(out if isinstance(out, tuple) else (out,), case.leaves, gradients)

        yield "forward_backward", forward_backward, case.forward_bytes + case.backward_bytes


def check_agreement(case: Case, impls: Sequence[str], dtype: torch.dtype) -> None:
    """Raise unless triton and eager agree to two roundings (kernel noise and torch's noise differ by design)."""
    if "triton" not in impls:
        return
    with torch.no_grad():
        results = [case.call(impl) for impl in ("triton", "reference")]
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in results), strict=True)
    for got, wanted in pairs:
        error = relative_error(got, wanted.double())
        if error > AGREEMENT[dtype]:
            raise ValueError(f"{case.op}: triton must agree with eager to {AGREEMENT[dtype]:.1e}, got {error:.1e}")


def run_case(case: Case, size: Size, impls: Sequence[str], dtype: str, ceilings: Ceilings) -> Iterator[Row]:
    """Measure every implementation and stage of one case."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_agreement(case, impls, DTYPES[dtype])
    for impl in impls:
        for stage, function, fewest_bytes in stages(case, impl):
            median, low, high = time_us(function, device)
            rate = 1e-3 * fewest_bytes / median
            yield Row(
                op=case.op, stage=stage, size=size.name, shape="x".join(map(str, case.shape)), dtype=dtype, impl=impl,
                median_us=round(median, 2), p20_us=round(low, 2), p80_us=round(high, 2), gb_s=round(rate, 1),
                share_of_copy=round(rate / ceilings.copy_gb_s, 4), peak_mib=round(peak_mib(function, device), 1),
                device=describe_device(device), commit=describe_commit(), versions=describe_versions(),
            )  # fmt: skip


def main() -> None:
    """Parse arguments, measure, print, write CSV and plot."""
    parser = argparse.ArgumentParser(description="Time the fused operations against eager and compiled PyTorch.")
    parser.add_argument("--op", choices=("all", *OPS), default="all")
    parser.add_argument("--size", choices=("auto", *SIZES), default="auto", help="auto: both on a GPU, tiny on a CPU")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--impl", nargs="+", choices=("triton", "eager", "compile"), help="default: all on a GPU")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results on a GPU, outputs/benchmarks on a CPU")
    args = parser.parse_args()
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if is_cuda else "cpu")
    impls = args.impl or (["triton", "eager", "compile"] if is_cuda else ["eager"])
    sizes = list(SIZES) if args.size == "auto" and is_cuda else ["tiny"] if args.size == "auto" else [args.size]
    torch.manual_seed(0)
    ceilings = measure_ceilings(device)
    print(f"{describe_device(device)}; commit {describe_commit()}; {describe_versions()}")
    print(f"ceilings: copy {ceilings.copy_gb_s:.0f} GB/s, matmul {ceilings.matmul_tflop_s:.2f} TFLOP/s")
    if not is_cuda:
        print(CPU_WARNING)
    rows: list[Row] = []
    for size in (SIZES[name] for name in sizes):
        for op in OPS if args.op == "all" else (args.op,):
            rows += run_case(make_case(op, size, DTYPES[args.dtype], device), size, impls, args.dtype, ceilings)
            torch.compiler.reset()
    print_table(rows)
    default = Path("benchmarks/results" if is_cuda else "outputs/benchmarks")
    print("wrote", *write_results(rows, args.out or default, "kernels"))


if __name__ == "__main__":
    main()
