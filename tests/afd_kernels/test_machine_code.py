"""Lane 2: the kernels' sm_90 machine code at Wan-1.3B sizes, compiled here, no GPU needed.

Gates: 16-byte loads and stores for every stream, no spills (LDL, STL), bounded shared memory and registers, never an
empty kernel.
"""

from typing import Any

import pytest
import torch

from afd_kernels.dispatch import is_interpreting
from afd_kernels.launching import row_warps
from afd_kernels.testing import MAX_SHARED_BYTES, MachineCode, compile_for_gpu

pytestmark = pytest.mark.skipif(is_interpreting(), reason="TRITON_INTERPRET=1: nothing is compiled")

WIDTH, BLOCK = 1536, 2048
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SMALL = ("times_ptr", "partial_ptr", "w_ptr", "loss_ptr", "scalars_ptr", "grad_loss_ptr", "cos_ptr", "sin_ptr")
WEIGHTS = ("weight_ptr", "q_weight_ptr", "k_weight_ptr", "shift_ptr", "scale_ptr", "gate_ptr")
FLOATS = ("eps", "nft_beta", "prior_weight", "advantage_clip", "numel")
LOSS_TILE = {"ROWS": 1, "COLUMNS": 1024}
LOSS = {**LOSS_TILE, "HAS_OLD": True, "HAS_NOISE": True, "HAS_REF": True, "IS_ADAPTIVE": True}
CURRENT = {**LOSS_TILE, "HAS_OLD": False, "HAS_NOISE": False, "HAS_REF": False, "IS_ADAPTIVE": False}
NO_POINTERS = {"old_ptr": None, "noise_ptr": None, "ref_ptr": None}
ROW = {"WIDTH": WIDTH, "BLOCK": BLOCK}
HEADS = {**ROW, "HEAD_DIM": 128}
# module, kernel, constants, 16-byte loads and stores of a bf16 element stream (per thread and step), most registers
KERNELS = {
    "loss": ("nft_loss", "nft_loss_sums_kernel", LOSS, 5, 0, 96),
    "loss_current": ("nft_loss", "nft_loss_sums_kernel", {**CURRENT, **NO_POINTERS}, 2, 0, 64),
    "loss_backward": ("nft_loss", "nft_loss_backward_kernel", LOSS, 5, 1, 64),
    "noising": ("noising", "add_noise_and_target_kernel", {**LOSS_TILE, "NOISE": 0}, 2, 2, 48),
    "noising_philox": ("noising", "add_noise_and_target_kernel", {**LOSS_TILE, "NOISE": 1, "eps_ptr": None}, 1, 2, 64),
    "rope": ("rope_qk_norm", "rope_qk_norm_kernel", HEADS, 4, 4, 96),
    "rope_backward": ("rope_qk_norm", "rope_qk_norm_backward_kernel", HEADS, 4, 2, 128),
    "adaln": ("adaln", "adaln_modulate_kernel", ROW, 2, 2, 96),
    "adaln_backward": ("adaln", "adaln_modulate_backward_kernel", ROW, 4, 2, 128),
    "gate": ("adaln", "gated_residual_kernel", ROW, 4, 2, 64),
    "gate_backward": ("adaln", "gated_residual_backward_kernel", ROW, 4, 2, 96),
}


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_kernel(name: str, element: str, capability: int = 90) -> MachineCode:
    """Compile with aligned pointers and strides; modulations, weights and tables are float32."""
    import importlib

    module, kernel_name, constants, *_ = KERNELS[name]
    kernel: Any = getattr(importlib.import_module(f"afd_kernels.{module}_triton"), kernel_name)
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            continue
        if argument.endswith("_ptr"):
            signature[argument] = "*fp32" if argument in SMALL + WEIGHTS else f"*{element}"
        elif argument in FLOATS:
            signature[argument] = "fp32"
        else:
            signature[argument] = "i64" if argument in ("seed", "counter_offset") else "i32"
    aligned = [x for x in signature if x.endswith("_ptr") or "_stride_" in x or x == "row_size"]
    warps = row_warps(BLOCK, DTYPES[element]) if "BLOCK" in constants else 4
    return compile_for_gpu(kernel, signature, constants, divisible=aligned, num_warps=warps, capability=capability)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("element", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_kernel_is_vectorised_and_does_not_spill(name, element):
    *_, loads, stores, max_registers = KERNELS[name]
    code = compile_kernel(name, element)
    assert code.count("EXIT") > 0, "empty kernel"
    assert code.count("LDL", "STL") == 0, f"spills: {code.opcodes}"
    assert code.shared_bytes <= MAX_SHARED_BYTES[90]
    assert code.count_wide("LDG", 128) >= loads, code.opcodes
    assert code.count_wide("STG", 128) >= stores, code.opcodes
    assert code.count_wide("LDG", 64) == code.count_wide("LDG", 16) == 0, f"narrow loads: {code.opcodes}"
    assert code.registers <= max_registers, code.registers


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 100, 120])
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_is_vectorised_and_does_not_spill_on_other_devices(name, capability):
    *_, loads, stores, _ = KERNELS[name]
    code = compile_kernel(name, "bf16", capability)
    assert code.count("EXIT") > 0, "empty kernel"
    assert code.count("LDL", "STL") == 0, f"spills: {code.opcodes}"
    assert code.shared_bytes <= MAX_SHARED_BYTES[capability]
    assert code.count_wide("LDG", 128) >= loads, code.opcodes
    assert code.count_wide("STG", 128) >= stores, code.opcodes


def test_compile_for_gpu_names_wrong_arguments():
    from afd_kernels.nft_loss_triton import nft_loss_backward_kernel

    with pytest.raises(ValueError, match="mismatch in"):
        compile_for_gpu(nft_loss_backward_kernel, {"x_ptr": "*fp32"}, {})
