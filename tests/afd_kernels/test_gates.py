"""The accuracy gate itself: it lets through what it should, and nothing else."""

import pytest
import torch

from afd_kernels.testing import ERROR_CAPS, assert_close_to_oracle, relative_error

ORACLE = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def off_by(error, dtype=torch.float32):
    """A tensor whose relative error against ORACLE is `error` of its largest value."""
    return (ORACLE + torch.tensor([0.0, 0.0, 2 * error], dtype=torch.float64)).to(dtype)


def test_the_caps_are_the_published_ones():
    assert {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3} == ERROR_CAPS


def test_never_more_than_half_again_torchs_own_error():
    assert_close_to_oracle("x", off_by(1.4e-6), off_by(1e-6), ORACLE)
    with pytest.raises(AssertionError, match=r"x torch\.float32: relative error 1\.\S+ > 1\.\S+ \(torch \S+\)"):
        assert_close_to_oracle("x", off_by(1.7e-6), off_by(1e-6), ORACLE)


def test_never_more_than_the_cap_however_bad_torch_is():
    with pytest.raises(AssertionError, match="> 2e-06"):
        assert_close_to_oracle("x", off_by(3e-6), off_by(1e-2), ORACLE)


def test_a_lucky_torch_leaves_one_rounding():
    assert_close_to_oracle("x", off_by(2e-7), ORACLE.float(), ORACLE)
    with pytest.raises(AssertionError):
        assert_close_to_oracle("x", off_by(6e-7), ORACLE.float(), ORACLE)


def test_a_value_that_was_never_written_fails():
    poisoned = ORACLE.float()
    poisoned[1] = torch.nan
    assert relative_error(poisoned, ORACLE) == float("inf")
    with pytest.raises(AssertionError):
        assert_close_to_oracle("x", poisoned, off_by(1e-6), ORACLE)
    with pytest.raises(ValueError, match=r"actual must have shape \[3\], got \[2\]"):
        relative_error(ORACLE[:2], ORACLE)
