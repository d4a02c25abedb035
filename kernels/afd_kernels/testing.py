"""Test support: bfloat16 in Triton's interpreter, and machine code compiled without a GPU.

Owns what tests of Triton kernels need on a CPU-only machine. Nothing in the product imports it. triton is imported
inside the functions, so that TRITON_INTERPRET can be set before its first import.
"""

import re
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Largest allowed error relative to the largest value of the float64 oracle, and factor over torch's own error.
ERROR_CAPS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
TORCH_ERROR_FACTOR = 1.5
# Shared memory of one block by compute capability (CUDA C++ programming guide, technical specifications).
MAX_SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """max |actual - oracle| / max |oracle| in float64; inf where `actual` is not finite.

    Args:
        actual: any shape and dtype.
        oracle: the same shape, float64.
    """
    if actual.shape != oracle.shape:
        raise ValueError(f"actual must have shape {list(oracle.shape)}, got {list(actual.shape)}")
    difference = (actual.detach().double() - oracle.detach()).abs().max().item()
    largest = max(oracle.detach().abs().max().item(), torch.finfo(torch.float64).tiny)
    return difference / largest if np.isfinite(difference) else float("inf")


def assert_close_to_oracle(name: str, actual: Tensor, eager: Tensor, oracle: Tensor) -> float:
    """Assert the gate on one tensor and return its relative error.

    The error is at most the dtype's cap, and at most 1.5 x the error of eager torch in the same dtype, or the noise of
    one rounding of the dtype (float32: 2.5e-7, two units in the last place) where torch happens to be luckier.

    Args:
        name: what the tensor is, for the message.
        actual: result under test.
        eager: the same from eager torch in the same dtype.
        oracle: the same in float64.
    """
    error, torch_error = relative_error(actual, oracle), relative_error(eager, oracle)
    noise = max(torch.finfo(actual.dtype).eps / 2, 2.5e-7)
    limit = min(ERROR_CAPS[actual.dtype], max(TORCH_ERROR_FACTOR * torch_error, noise))
    assert error <= limit, f"{name} {actual.dtype}: relative error {error:.3g} > {limit:.3g} (torch {torch_error:.3g})"
    return error


def check_against_oracle(
    call: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, float]:
    """Compare impl="triton" with the float64 oracle: every output and every gradient, by name.

    Args:
        call: takes the inputs by name and `impl=`, returns one tensor or a tuple; inputs it closes over must not
            depend on the dtype.
        inputs: leaves, rounded to `dtype` first (the oracle sees the rounded values); those that require a gradient
            are differentiated against random cotangents.
        dtype: of the triton and eager runs.
        device: of both runs; the oracle stays on it too.
        seed: of the cotangents.
    Returns:
        relative error per output ("out0", ...) and gradient ("grad of x", ...).
    """

    def run(impl: str, run_dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        leaves = {name: value.detach().to(device, dtype).to(run_dtype) for name, value in inputs.items()}
        wanted = [name for name, value in inputs.items() if value.requires_grad]
        for name in wanted:
            leaves[name].requires_grad_()
        outputs = call(**leaves, impl=impl)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        cotangents = [
            torch.randn(out.shape, generator=generator).to(out.device, dtype).to(out.dtype) for out in outputs
        ]
        grads = torch.autograd.grad(outputs, [leaves[name] for name in wanted], cotangents) if wanted else ()
        named = {f"out{i}": out.detach() for i, out in enumerate(outputs)}
        return named | {f"grad of {name}": grad for name, grad in zip(wanted, grads, strict=True)}

    actual, eager, oracle = run("triton", dtype), run("reference", dtype), run("reference", torch.float64)
    return {name: assert_close_to_oracle(name, actual[name], eager[name], oracle[name]) for name in actual}


def poison_empty_tensors() -> Callable[[], None]:
    """Make torch.empty, empty_like and Tensor.new_empty return NaN until the returned function is called."""
    saved = (torch.empty, torch.empty_like, Tensor.new_empty)

    def poisoned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            out = function(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return call

    torch.empty, torch.empty_like, Tensor.new_empty = (poisoned(function) for function in saved)

    def restore() -> None:
        torch.empty, torch.empty_like, Tensor.new_empty = saved

    return restore


def _bf16_to_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _float_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16 bits, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def patch_interpreter_bf16() -> None:
    """Give Triton's interpreter real bfloat16: casts to nearest even, arithmetic and `tl.dot` in float32.

    Unpatched (triton 3.6 to 3.7) it works on the raw 16-bit patterns as integers and truncates casts. Idempotent.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "has_real_bf16", False):
        return
    handle, numpy_dtype = interpreter.TensorHandle, interpreter._get_np_dtype
    plain = {
        name: getattr(builder, name) for name in ("cast_impl", "binary_op", "unary_op", "ternary_op", "create_dot")
    }

    def is_bf16(value: Any) -> bool:
        return value.dtype.scalar == tl.bfloat16

    def widen(value: Any) -> Any:
        return handle(_bf16_to_float(value.data), tl.float32) if is_bf16(value) else value

    def narrow(value: Any) -> Any:
        return value if value.data.dtype == np.bool_ else handle(_float_to_bf16(value.data), tl.bfloat16)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar == tl.bfloat16:
            return src if is_bf16(src) else handle(_float_to_bf16(src.data.astype(np.float32)), tl.bfloat16)
        if is_bf16(src):
            return handle(_bf16_to_float(src.data).astype(numpy_dtype(dst_type)), dst_type.scalar)
        return plain["cast_impl"](self, src, dst_type)

    def elementwise(name: str, operands: int) -> Callable[..., Any]:
        def call(self: Any, *args: Any) -> Any:
            values, rest = args[:operands], args[operands:]
            if not is_bf16(values[-1]) or not isinstance(values[-1].data, np.ndarray) or rest[0] is np.where:
                return plain[name](self, *args)
            return narrow(plain[name](self, *(widen(value) for value in values), *rest))

        return call

    def create_dot(self: Any, a: Any, b: Any, d: Any, *args: Any) -> Any:
        return plain["create_dot"](self, widen(a), widen(b), d, *args)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        return plain["create_fp_to_fp"](self, src, dst_type, rounding_mode)

    for name, operands in (("binary_op", 2), ("unary_op", 1), ("ternary_op", 3)):
        setattr(builder, name, elementwise(name, operands))
    for replacement in (cast_impl, create_dot, create_fp_to_fp):
        setattr(builder, replacement.__name__, replacement)
    setattr(builder, "has_real_bf16", True)  # noqa: B010  (the class does not declare it)


@dataclass(frozen=True)
class MachineCode:
    """What one compiled kernel is made of.

    Attributes:
        opcodes: count per SASS opcode with its modifiers, e.g. {"LDG.E.128": 3}.
        registers: per thread.
        shared_bytes: per block.
        num_warps: threads per block / 32.
    """

    opcodes: Mapping[str, int]
    registers: int
    shared_bytes: int
    num_warps: int

    def count(self, *prefixes: str) -> int:
        """Number of instructions whose opcode starts with one of the prefixes (modifiers after a dot)."""
        return sum(
            number
            for opcode, number in self.opcodes.items()
            if any(opcode == prefix or opcode.startswith(prefix + ".") for prefix in prefixes)
        )

    def count_wide(self, opcode: str, bits: int) -> int:
        """Number of `opcode` instructions that move `bits` per thread, e.g. ("LDG", 128); 32 when none is named."""
        widths = [str(width) for width in (64, 128)]
        total = 0
        for name, number in self.opcodes.items():
            head, *modifiers = name.split(".")
            named = [int(part) for part in modifiers if part in widths]
            small = any(part in ("U8", "S8", "U16", "S16") for part in modifiers)
            if head == opcode and (named[0] if named else 16 if small else 32) == bits:
                total += number
        return total


def compile_for_gpu(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    divisible: Sequence[str] = (),
    num_warps: int = 4,
    num_stages: int = 2,
    capability: int = 90,
) -> MachineCode:
    """Compile a `@triton.jit` kernel for a GPU on a machine without one and read its machine code.

    Args:
        kernel: JITFunction (TRITON_INTERPRET must not be set).
        signature: Triton type per runtime argument, e.g. {"x_ptr": "*bf16", "numel": "i32"}.
        constexprs: value per tl.constexpr argument.
        divisible: runtime arguments known to be multiples of 16 (pointers: 16-byte aligned).
        num_warps, num_stages: launch options.
        capability: compute capability x 10 of the GPU.
    Raises:
        ValueError: the arguments named are not the kernel's.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    if set(names) != set(signature) | set(constexprs):
        wrong = sorted(set(names) ^ (set(signature) | set(constexprs)))
        raise ValueError(f"signature and constexprs must name the kernel's arguments, got a mismatch in {wrong}")
    types = {name: signature.get(name, "constexpr") for name in names}
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    return _read_machine_code(compiled.asm["cubin"], compiled.metadata.shared, num_warps)


def _read_machine_code(cubin: bytes, shared_bytes: int, num_warps: int) -> MachineCode:
    import tempfile

    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run_tool(tools / "cuobjdump", "-res-usage", file.name)
        sass = _run_tool(tools / "nvdisasm", "-c", file.name)
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)", sass, re.MULTILINE))
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, f"cuobjdump printed no register count: {usage}"
    return MachineCode(dict(opcodes), int(registers.group(1)), shared_bytes, num_warps)


def _run_tool(tool: Path, *args: str) -> str:
    return subprocess.run([str(tool), *args], check=True, capture_output=True, text=True).stdout
