"""Lane 2: machine code of the attention kernels with the tiles that ship, compiled here, no GPU needed.

Gates on Hopper: tensor cores through wgmma only (HGMMA, never HMMA), tensor descriptors really load by TMA (UTMALDG)
where claimed, 16-byte asynchronous copies where not, warp specialization really moves registers (USETMAXREG), no
spills, shared memory within a block's. On the other devices: tensor cores, descriptors where claimed, no spills, shared
memory. One process per kernel: a failing compiler pass takes its process down.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from afd_kernels.attention_plans import Tiles, choose_plan, variants_of
from afd_kernels.dispatch import is_interpreting
from afd_kernels.testing import MAX_SHARED_BYTES, MachineCode, compile_for_gpu

pytestmark = pytest.mark.skipif(is_interpreting(), reason="TRITON_INTERPRET=1: nothing is compiled")
KERNELS = {
    "forward": ("block_causal_attention_kernels", "forward_kernel"),
    "key_value_grad": ("block_causal_attention_kernels", "key_value_grad_kernel"),
    "query_grad": ("block_causal_attention_kernels", "query_grad_kernel"),
    "delta": ("block_causal_attention_kernels", "delta_kernel"),
    "split": ("cached_attention_kernels", "split_kernel"),
    "join": ("cached_attention_kernels", "join_kernel"),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLOATS = ("stats", "lse", "parts")
# Kernel, variant, head dimension; the longest compilations of D = 64 repeat what D = 128 shows.
VARIANTS = [
    ("forward", "tma", 128),
    ("forward", "specialized", 128),
    ("forward", "pointer", 128),
    ("key_value_grad", "tma", 128),
    ("key_value_grad", "pointer", 128),
    ("query_grad", "tma", 128),
    ("query_grad", "pointer", 128),
    ("split", "tma", 128),
    *(pytest.param(kernel, variant, 64, marks=pytest.mark.slow) for kernel, variant in (
        ("forward", "tma"), ("forward", "specialized"), ("forward", "pointer"), ("key_value_grad", "tma"),
        ("key_value_grad", "pointer"), ("query_grad", "tma"), ("query_grad", "pointer"), ("split", "pointer"),
    )),
]  # fmt: skip


def tiles_of(kernel: str, variant: str, head_dim: int, dtype: str = "bf16", capability: int = 90) -> Tiles:
    if kernel in ("delta", "join"):
        return Tiles(0, 0, 4, 2)
    plan = choose_plan(head_dim, DTYPES[dtype], variant, capability)
    return getattr(plan, "cached" if kernel == "split" else kernel)


def compile_kernel(
    kernel: str, variant: str, head_dim: int, dtype: str = "bf16", ranges: int | None = None, capability: int = 90
) -> MachineCode:
    """Compile with 16-byte aligned pointers and strides, by default for three key ranges or two query ranges."""
    import importlib

    module, name = KERNELS[kernel]
    function = getattr(importlib.import_module(f"afd_kernels.{module}"), name)
    tiles = tiles_of(kernel, variant, head_dim, dtype, capability)
    constants = {
        "D": head_dim, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "GROUP": 8, "TMA": tiles.tma,
        "RANGES": ranges or (2 if kernel == "key_value_grad" else 3), "SPECIALIZE": tiles.specialize,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        "BLOCK": 64 if kernel == "delta" else 32, "SPLITS": 3,
    }  # fmt: skip
    constants = {key: value for key, value in constants.items() if key in function.arg_names}
    signature = {}
    for argument in function.arg_names:
        is_tensor = argument in ("q", "k", "v", "out", "grad", "dq", "dk", "dv", *FLOATS, "work")
        if argument in constants:
            continue
        if is_tensor:
            is_float = argument in FLOATS or (kernel == "split" and argument == "out")
            signature[argument] = "*i32" if argument == "work" else "*fp32" if is_float else f"*{dtype}"
        else:
            signature[argument] = "fp32" if argument.startswith("scale") else "i32"
    aligned = [x for x in signature if signature[x][0] == "*" or x.split("_")[-1] in ("batch", "head", "row")]
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "capability": capability}
    return compile_for_gpu(function, signature, constants, divisible=aligned, **options)


def compile_in_its_own_process(cache, *arguments) -> MachineCode:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, __file__, json.dumps(arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return MachineCode(**json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize(("kernel", "variant", "head_dim"), VARIANTS)
def test_attention_kernel_uses_what_it_claims(tmp_path, kernel, variant, head_dim):
    code = compile_in_its_own_process(tmp_path, kernel, variant, head_dim)
    tiles = tiles_of(kernel, variant, head_dim)
    assert code.count("HGMMA") > 0, code.opcodes
    assert code.count("HMMA") == 0, "mma.sync instead of wgmma"
    assert code.count("LDL", "STL") == 0, f"spills: {code.opcodes}"
    # More of them than products: the compiler waits for every single one.
    assert code.count("WARPGROUP") < code.count("HGMMA"), "wgmma one at a time"
    assert code.count("MUFU") > 0
    assert code.shared_bytes <= MAX_SHARED_BYTES[90]
    assert (code.count("UTMALDG") > 0) == tiles.tma, code.opcodes
    assert (code.count("USETMAXREG") > 0) == tiles.specialize, code.opcodes
    if not tiles.tma:
        asynchronous = sum(
            number for name, number in code.opcodes.items() if name.startswith("LDGSTS") and "128" in name
        )
        assert asynchronous > 0, code.opcodes
        assert code.count_wide("LDG", 128) > 0, code.opcodes


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward", "key_value_grad", "query_grad"])
@pytest.mark.parametrize(("head_dim", "dtype"), [(16, "fp32"), (128, "fp32"), (16, "bf16"), (128, "fp16")])
def test_every_plan_compiles_for_one_range(tmp_path, kernel, head_dim, dtype):
    code = compile_in_its_own_process(tmp_path, kernel, "tma", head_dim, dtype, 1)
    assert code.count("EXIT") > 0, "empty kernel"
    assert code.count("HGMMA", "HMMA", "FFMA") > 0
    assert code.shared_bytes <= MAX_SHARED_BYTES[90]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward", "key_value_grad", "query_grad", "split"])
@pytest.mark.parametrize(
    ("capability", "variant"),
    [(capability, variant) for capability in (80, 89, 100, 120) for variant in variants_of(capability)],
)
def test_shipped_tiles_fit_every_device(tmp_path, capability, variant, kernel):
    code = compile_in_its_own_process(tmp_path, kernel, variant, 128, "bf16", None, capability)
    assert code.count("UTCHMMA" if capability == 100 else "HMMA") > 0, f"no tensor cores: {code.opcodes}"
    assert code.count("LDL", "STL") == 0, f"spills: {code.opcodes}"
    assert code.shared_bytes <= MAX_SHARED_BYTES[capability]
    assert (code.count("UTMALDG") > 0) == (variant == "tma"), code.opcodes


@pytest.mark.parametrize("kernel", ["delta", "join"])
def test_row_kernels_are_vectorised_and_do_not_spill(tmp_path, kernel):
    code = compile_in_its_own_process(tmp_path, kernel, "pointer", 128)
    assert code.count("EXIT") > 0, "empty kernel"
    assert code.count("LDL", "STL") == 0, f"spills: {code.opcodes}"
    assert code.count_wide("LDG", 128) > 0, code.opcodes
    assert code.count("STG") > 0, code.opcodes


if __name__ == "__main__":
    code = compile_kernel(*json.loads(sys.argv[1]))
    sys.stdout.write("\n" + json.dumps(asdict(code)) + "\n")
