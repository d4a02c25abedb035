"""Devices by name: the same refusal for every field and option that takes one."""

import pytest
import torch

from afd.device import checked_device


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """As many CUDA devices as the parameter says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)


@pytest.mark.parametrize(
    ("gpus", "text", "device"),
    [(0, None, "cpu"), (0, "cpu", "cpu"), (2, None, "cuda"), (2, "cuda", "cuda"), (2, "cuda:1", "cuda:1")],
    indirect=["gpus"],
)
def test_devices_that_are_there_are_taken(gpus: None, text: str | None, device: str) -> None:
    assert checked_device(text, "--device") == torch.device(device)


@pytest.mark.parametrize(
    ("gpus", "text", "expected"),
    [
        (2, "gpu", "cpu, cuda or cuda:N"),
        (2, "", "cpu, cuda or cuda:N"),
        (2, "meta", "cpu, cuda or cuda:N"),
        (2, "cuda:x", "cpu, cuda or cuda:N"),
        (2, "cuda:2", "cpu or one of the 2 CUDA devices that torch sees"),
        (0, "cuda", "cpu or one of the 0 CUDA devices that torch sees"),
    ],
    indirect=["gpus"],
)
def test_other_devices_are_refused_by_the_fields_name(gpus: None, text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^prepare\\.device must be {expected}, got '{text}'$"):
        checked_device(text, "prepare.device")
