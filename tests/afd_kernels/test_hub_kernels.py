"""Kernels of the Hugging Face hub through its own `kernels` package, with a kernel of ours from a local folder.

`make test-slow` installs the package into .venv-hub, beside the environment: transformers and diffusers change what
they do where they find it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from afd_kernels.block_causal_attention_backends import HUB_KERNELS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / ".venv-hub"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PACKAGE.is_dir(), reason="make test-slow installs the package `kernels`"),
]
KERNEL = """
import torch
from torch.nn.functional import scaled_dot_product_attention


def flash_attn_func(q, k, v, {first}softmax_scale=None, causal=False{last}):
    assert not causal
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, scale=softmax_scale).transpose(1, 2)


def flash_attn_varlen_func(q, k, v, starts_q, starts_k, longest_q, longest_k, {first}softmax_scale=None, causal=False):
    out = [
        flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], softmax_scale=softmax_scale)[0]
        for a, b, c, d in zip(starts_q[:-1], starts_q[1:], starts_k[:-1], starts_k[1:])
    ]
    return torch.cat(out)
"""
ATTEND = """
import sys, torch
from afd_kernels import BlockCausalLayout, block_causal_attention

layout = BlockCausalLayout(4, 3, 2, window_frames=3, sink_frames=1, teacher_forcing=True)
q, k, v = (torch.randn(1, 2, layout.num_tokens, 8).bfloat16().requires_grad_() for _ in range(3))
results = []
for impl in (*sys.argv[1:], "reference"):
    out = block_causal_attention(q, k, v, layout, impl=impl)
    results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
for result in results[:-1]:
    for got, expected in zip(result, results[-1], strict=True):
        torch.testing.assert_close(got, expected, rtol=3e-2, atol=3e-2)
print("same")
"""


@pytest.fixture
def local_kernels(tmp_path):
    """LOCAL_KERNELS for both repositories, in the layout and with the metadata of a published kernel."""
    places = []
    for backend, (repository, version) in HUB_KERNELS.items():
        folder = tmp_path / backend / "build" / "torch-universal"
        folder.mkdir(parents=True)
        first, last = ("dropout_p=0.0, ", "") if backend == "hub2" else ("", ", num_splits=1")
        (folder / "__init__.py").write_text(KERNEL.format(first=first, last=last))
        name = repository.split("/")[1]
        metadata = {"id": f"{name}_{version}".replace("-", "_"), "name": name, "version": version}
        metadata |= {"license": "Apache-2.0", "python-depends": [], "backend": {"type": "cpu"}}
        (folder / "metadata.json").write_text(json.dumps(metadata))
        places.append(f"{repository}={tmp_path / backend}")
    return ":".join(places)


def attend(*impls: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(PACKAGE), str(ROOT / "kernels")])
    variables = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, "-c", ATTEND, *impls]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)


def test_the_real_package_loads_both_kernels_by_repository_and_version(local_kernels):
    impls = [f"{name}:{backend}" for name in ("chunks", "varlen") for backend in HUB_KERNELS]
    result = attend(*impls, LOCAL_KERNELS=local_kernels)
    assert result.stdout.endswith("same\n"), result.stderr[-3000:]


def test_a_kernel_that_cannot_be_downloaded_says_so(tmp_path):
    result = attend("chunks:hub3", HF_HOME=str(tmp_path))
    assert "ImportError: attention backend 'hub3' is installed but does not load: " in result.stderr
