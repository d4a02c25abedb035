"""The choice of an implementation, and what importing the package costs."""

import logging
import subprocess
import sys

import pytest
import torch

from afd_kernels.dispatch import is_interpreting, resolve_impl


def test_cpu_tensors_run_the_reference():
    assert resolve_impl("an_operation", None, torch.zeros(1)) == "reference"


@pytest.mark.skipif(is_interpreting(), reason="the interpreter takes CPU tensors")
def test_triton_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match=r"impl='triton' needs CUDA tensors .* got cpu"):
        resolve_impl("an_operation", "triton", torch.zeros(1))


def test_triton_in_float64_is_refused():
    with pytest.raises(ValueError, match=r"impl='triton' takes float16, bfloat16 or float32, got torch\.float64"):
        resolve_impl("an_operation", "triton", torch.zeros(1, dtype=torch.float64))


def test_choice_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="afd_kernels.dispatch"):
        for _ in range(3):
            resolve_impl("logged_operation", None, torch.zeros(1))
    assert [record.getMessage() for record in caplog.records] == ["logged_operation runs impl=reference on cpu"]


def test_import_loads_no_triton_kernel():
    code = "import sys, afd_kernels; print([m for m in sys.modules if m == 'triton' or m.endswith('_triton')])"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"
