"""The prompt, the events and the pace that the threads of a live stream share."""

import threading
import time

import pytest
import torch
from torch import Tensor

from afd.sampling.live import Broadcast, LivePrompt, Pace


def encode(prompt: str) -> Tensor:
    """One number per word; "cube" is unknown."""
    if "cube" in prompt:
        raise ValueError("unknown word 'cube'")
    return torch.full((1, 2, 3), float(len(prompt)))


def test_a_prompt_is_the_same_tensor_until_it_changes() -> None:
    prompt = LivePrompt(encode, "red")
    first = prompt()
    assert prompt() is first
    prompt.change("green")
    assert prompt.in_use == "red"  # until the stream asks
    assert torch.equal(prompt(), encode("green"))
    assert prompt.in_use == "green"
    with pytest.raises(ValueError, match="unknown word 'cube'"):
        prompt.change("cube")
    assert torch.equal(prompt(), encode("green"))


def test_a_viewer_gets_the_newest_event_and_all_that_follow() -> None:
    broadcast = Broadcast()
    broadcast.publish("chunk", {"index": 0})
    broadcast.publish("chunk", {"index": 1})
    viewer = broadcast.follow()
    assert next(viewer) == b'event: chunk\ndata: {"index": 1}\n\n'
    broadcast.publish("chunk", {"index": 2})
    broadcast.publish("end", {})
    broadcast.end()
    assert next(viewer) == b'event: chunk\ndata: {"index": 2}\n\nevent: end\ndata: {}\n\n'
    assert list(viewer) == []


def test_a_slow_viewer_misses_the_oldest_and_memory_is_bounded() -> None:
    broadcast = Broadcast()
    viewer = broadcast.follow()
    broadcast.publish("chunk", {"index": -1})
    next(viewer)
    for index in range(100):
        broadcast.publish("chunk", {"index": index})
    missed = next(viewer)
    assert missed.startswith(b'event: chunk\ndata: {"index": 84}')
    assert missed.count(b"event:") == 16


def test_viewers_are_counted_and_waited_for() -> None:
    broadcast = Broadcast()
    assert not broadcast.wait_for_viewers(True, timeout_s=0.01)
    viewer = broadcast.follow()
    broadcast.publish("chunk", {})
    next(viewer)
    assert broadcast.wait_for_viewers(True, timeout_s=0.01)
    viewer.close()
    assert broadcast.wait_for_viewers(False, timeout_s=0.01)
    threading.Timer(0.05, broadcast.end).start()
    assert list(broadcast.follow())[-1] == b": still here\n\n"  # ends when told, however idle


def test_the_pace_keeps_generation_a_little_ahead() -> None:
    pace = Pace(ahead_s=1.0)
    assert pace.wait_s(0.75) == 0.0
    assert pace.wait_s(0.75) == pytest.approx(0.5, abs=0.05)
    assert pace.wait_s(0.75) == pytest.approx(1.25, abs=0.05)  # had nobody waited
    slow = Pace(ahead_s=0.0)
    slow.wait_s(0.01)
    time.sleep(0.05)
    assert slow.wait_s(0.02) == pytest.approx(0.02, abs=0.01)  # what came late is not caught up with
