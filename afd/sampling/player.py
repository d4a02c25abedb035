"""A web page that plays a stream while it is generated and changes its prompt: the standard library's HTTP server.

`GET /` is the page, `GET /events` the stream as server-sent events, `POST /prompt` and `POST /stop` steer it. The page
loads nothing from elsewhere. It is for one's own machine: there are no accounts, so the default host is the loopback.
"""

from __future__ import annotations

import base64
import contextlib
import json
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import cv2
import numpy as np

from afd.data.video import to_pictures
from afd.sampling.live import Broadcast, LivePrompt, Pace
from afd.sampling.stream import StreamedChunk, StreamStatistics

_PAGE = Path(__file__).with_name("player.html")
_MAX_REQUEST_BYTES = 16384
_LOSSLESS_PIXELS = 128 * 128  # frames up to this size go as PNG, larger ones as JPEG
_JPEG = [cv2.IMWRITE_JPEG_QUALITY, 92, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]


class Player:
    """Serves one stream. Generation waits for the first viewer, and pauses while nobody watches."""

    def __init__(
        self, prompt: LivePrompt, *, title: str, fps: float, port: int, host: str = "127.0.0.1", ahead_s: float = 1.0
    ) -> None:
        """Bind the port.

        Args:
            prompt: changed from the page.
            title: what is streaming, shown on the page.
            fps: playback speed, frames/s.
            port: 0 takes a free one.
            host: address to listen on.
            ahead_s: seconds of video that are generated ahead of playback.
        Raises:
            OSError: the port is taken.
        """
        self.prompt = prompt
        self.broadcast = Broadcast()
        self.about = {"title": title, "fps": fps}
        self._fps = fps
        self._pace = Pace(ahead_s)
        self._stop = threading.Event()
        self._server = _Server((host, port), self)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)

    @property
    def url(self) -> str:
        """Where the page is."""
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}/"

    def __enter__(self) -> Player:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Tell the viewers that it is over, wait until they have been told, and close."""
        self.broadcast.publish("end", {})
        self.broadcast.end()
        self.broadcast.wait_for_viewers(False, timeout_s=5.0)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def wait_for_viewer(self) -> bool:
        """Block until somebody watches; False when the stream has been stopped."""
        while not self._stop.is_set():
            if self.broadcast.wait_for_viewers(True, timeout_s=0.2):
                return True
        return False

    def show(self, chunk: StreamedChunk, statistics: StreamStatistics) -> bool:
        """Send a chunk to the viewers and wait until the next one is due; False when the stream has been stopped."""
        assert chunk.frames is not None
        kind, images = encode_images(chunk.frames[0].numpy())
        self.broadcast.publish(
            "chunk",
            {
                "index": chunk.index,
                "first_frame": chunk.first_frame,
                "prompt": self.prompt.in_use,
                "prompt_version": chunk.prompt_version,
                "generate_s": chunk.generate_s,
                "decode_s": chunk.decode_s,
                "first_chunk_s": statistics.first_chunk_s,
                "fps": statistics.fps,
                "fps_without_decoding": statistics.fps_without_decoding,
                "kind": kind,
                "images": images,
            },
        )
        self._stop.wait(self._pace.wait_s(chunk.num_frames / self._fps))
        return self.wait_for_viewer()

    def stop(self) -> None:
        """End the stream after the current chunk."""
        self._stop.set()


def encode_images(frames: np.ndarray) -> tuple[str, list[str]]:
    """Frames [F, H, W, 3] in [0, 1] for a browser: MIME type and base64 text of each."""
    pictures = to_pictures(frames)
    lossless = pictures.shape[1] * pictures.shape[2] <= _LOSSLESS_PIXELS
    suffix, options = (".png", []) if lossless else (".jpg", _JPEG)
    images = []
    for picture in pictures:
        _, data = cv2.imencode(suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), options)
        images.append(base64.b64encode(data.tobytes()).decode())
    return ("image/png" if lossless else "image/jpeg"), images


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], player: Player) -> None:
        self.player = player
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A viewer that went away is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    _GETS: ClassVar = {"/": "_page", "/events": "_events", "/about": "_about"}

    @property
    def player(self) -> Player:
        """What is played."""
        assert isinstance(self.server, _Server)
        return self.server.player

    def do_GET(self) -> None:
        """Answer with the page, the events or the description."""
        answer = self._GETS.get(self.path)
        if answer is None:
            self._send_json({"error": f"no such page: {self.path}"}, HTTPStatus.NOT_FOUND)
            return
        getattr(self, answer)()

    def do_POST(self) -> None:
        """Change the prompt, or stop."""
        # A page of another site cannot send this type without asking first, which is never answered.
        if self.headers.get_content_type() != "application/json":
            self._send_json({"error": "expected application/json"}, HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > _MAX_REQUEST_BYTES:
            message = f"expected Content-Length up to {_MAX_REQUEST_BYTES}, got {length!r}"
            self._send_json({"error": message}, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            return
        try:
            self._steer(json.loads(self.rfile.read(int(length))))
        except ValueError as error:
            self._send_json({"error": str(error)}, HTTPStatus.BAD_REQUEST)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""

    def _steer(self, request: Any) -> None:
        player = self.player
        if self.path == "/stop":
            player.stop()
        elif self.path == "/prompt":
            prompt = request.get("prompt") if isinstance(request, dict) else None
            if not isinstance(prompt, str):
                raise ValueError(f"prompt must be a string, got {prompt!r}")
            player.prompt.change(prompt)
        else:
            self._send_json({"error": f"no such page: {self.path}"}, HTTPStatus.NOT_FOUND)
            return
        self._send_json({})

    def _page(self) -> None:
        self._send(_PAGE.read_bytes(), "text/html; charset=utf-8")

    def _about(self) -> None:
        self._send_json({**self.player.about, "prompt": self.player.prompt.in_use})

    def _events(self) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        with contextlib.closing(self.player.broadcast.follow()) as stream:
            for events in stream:
                self.wfile.write(events)
                self.wfile.flush()

    def _send_json(self, value: dict[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(value).encode(), "application/json", status)

    def _send(self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)
