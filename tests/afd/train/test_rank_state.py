"""The random streams and plain values of one rank."""

import random

import numpy as np
import pytest
import torch

from afd.train.rank_state import check_plain, random_state, restore_random_state


def test_random_state_restores_every_stream() -> None:
    before = random_state()
    try:
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002 - the legacy global stream is what is tested
        saved = random_state()
        first = (torch.rand(2).tolist(), random.random(), np.random.rand(), random.gauss(0, 1))  # noqa: NPY002
        restore_random_state(saved)
        assert first == (torch.rand(2).tolist(), random.random(), np.random.rand(), random.gauss(0, 1))  # noqa: NPY002
    finally:
        restore_random_state(before)


def test_only_plain_values_pass() -> None:
    check_plain({"a": [1, 2.0, None, ("x", b"y", True)], 3: torch.zeros(2)}, "state")
    with pytest.raises(ValueError, match=r"state\['a'\]\[0\] must be a tensor or a plain Python value, got float64"):
        check_plain({"a": [np.float64(1)]}, "state")
    with pytest.raises(ValueError, match=r"state must be a tensor or a plain Python value, got set"):
        check_plain({1}, "state")
