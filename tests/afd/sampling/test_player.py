"""The player over HTTP, without a browser; with one: tests/browser."""

import base64
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from afd.sampling import StreamedChunk, StreamStatistics
from afd.sampling.live import LivePrompt
from afd.sampling.player import Player, encode_images


def encode(prompt: str) -> Tensor:
    """Any words but "cube"."""
    if "cube" in prompt:
        raise ValueError("unknown word 'cube'")
    return torch.full((1, 2, 3), float(len(prompt)))


@pytest.fixture
def player() -> Iterator[Player]:
    """A running player on a free port."""
    with Player(LivePrompt(encode, "red"), title="tiny", fps=100.0, port=0) as running:
        yield running


def chunk(index: int) -> StreamedChunk:
    """Two grey frames, the second brighter."""
    frames = torch.full((1, 2, 4, 6, 3), 0.25)
    frames[:, 1] = 0.75
    return StreamedChunk(index, 2 * index, 2, frames, frames, 0, 0.3, 0.1, 0.4)


def get(player: Player, path: str) -> bytes:
    """A page's body."""
    with urllib.request.urlopen(player.url.rstrip("/") + path, timeout=5) as answer:
        return answer.read()


def post(
    player: Player, path: str, body: bytes, kind: str = "application/json", length: str | None = None
) -> tuple[int, dict[str, Any]]:
    """Status and JSON of a POST; `length` may lie about the body's."""
    headers = {"Content-Type": kind} | ({} if length is None else {"Content-Length": length})
    request = urllib.request.Request(player.url.rstrip("/") + path, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def decode(image: str) -> np.ndarray:
    """A picture as the page gets it: [H, W, 3] uint8 RGB."""
    pixels = cv2.imdecode(np.frombuffer(base64.b64decode(image), np.uint8), cv2.IMREAD_COLOR_RGB)
    assert pixels is not None
    return pixels


def test_the_page_is_served_and_loads_nothing_from_elsewhere(player: Player) -> None:
    page = get(player, "/").decode()
    assert "<canvas" in page
    assert "http:" not in page
    assert "https:" not in page
    assert json.loads(get(player, "/about")) == {"title": "tiny", "fps": 100.0, "prompt": "red"}
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(player, "/../secret")


def test_a_viewer_receives_chunks_with_frames_prompt_and_speed(player: Player) -> None:
    assert not player.broadcast.wait_for_viewers(True, timeout_s=0.05)
    received: list[dict[str, Any]] = []
    kinds: list[str] = []

    def watch() -> None:
        for event in get(player, "/events").decode().strip().split("\n\n"):
            if event.startswith("event: "):
                kind, data = event.split("\n")
                kinds.append(kind.removeprefix("event: "))
                received.append(json.loads(data.removeprefix("data: ")))

    viewer = threading.Thread(target=watch)
    viewer.start()
    assert player.wait_for_viewer()
    statistics = StreamStatistics()
    player.prompt()
    for index in range(2):
        statistics.add(chunk(index))
        assert player.show(chunk(index), statistics)
    player.__exit__(None, None, None)
    viewer.join(timeout=5)
    assert kinds == ["chunk", "chunk", "end"]
    assert [event.get("first_frame") for event in received] == [0, 2, None]
    assert received[1]["prompt"] == "red"
    assert received[1]["first_chunk_s"] == pytest.approx(0.4)
    assert received[1]["fps"] == pytest.approx(2 / 0.4)
    images = [decode(image) for image in received[0]["images"]]
    assert [(image.shape, int(image.min()), int(image.max())) for image in images] == [
        ((4, 6, 3), 64, 64),
        ((4, 6, 3), 191, 191),
    ]


def test_the_prompt_is_changed_and_a_bad_one_is_explained(player: Player) -> None:
    assert post(player, "/prompt", b'{"prompt": "a green ball"}') == (200, {})
    assert torch.equal(player.prompt(), encode("a green ball"))
    assert post(player, "/prompt", b'{"prompt": "a cube"}') == (400, {"error": "unknown word 'cube'"})
    assert post(player, "/prompt", b'{"prompt": 3}') == (400, {"error": "prompt must be a string, got 3"})
    assert post(player, "/prompt", b"[")[0] == 400
    assert post(player, "/prompt", b" " * 20000)[0] == 413
    for length in ("-1", "many", ""):
        assert post(player, "/prompt", b"{}", length=length)[0] == 413
    assert post(player, "/elsewhere", b"{}") == (404, {"error": "no such page: /elsewhere"})
    assert player.prompt.in_use == "a green ball"


def test_another_sites_form_cannot_steer(player: Player) -> None:
    body = b'{"prompt": "a green ball"}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert post(player, "/prompt", body, kind)[0] == 415
    player.prompt()
    assert player.prompt.in_use == "red"


def test_stop_ends_the_stream_even_without_a_viewer(player: Player) -> None:
    threading.Timer(0.1, post, (player, "/stop", b"{}")).start()
    assert not player.wait_for_viewer()
    assert not player.show(chunk(0), StreamStatistics())


def test_a_taken_port_is_an_error(player: Player) -> None:
    port = int(player.url.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(OSError, match="in use"):
        Player(LivePrompt(encode, "red"), title="tiny", fps=8.0, port=port)


def test_small_frames_are_lossless_and_large_ones_jpeg() -> None:
    frames = np.random.default_rng(0).random((1, 16, 24, 3), dtype=np.float32)
    kind, (image,) = encode_images(frames)
    decoded = decode(image)
    assert kind == "image/png"
    assert np.abs(decoded / 255 - frames[0]).max() <= 0.5 / 255 + 1e-6
    kind, (image,) = encode_images(np.full((1, 256, 256, 3), 0.5, np.float32))
    decoded = decode(image)
    assert kind == "image/jpeg"
    assert np.abs(decoded.astype(int) - 128).max() <= 1
