"""A real HTTP server that imitates the shapes of paid video services, counts what it is paid, and fails on demand."""

import base64
import io
import json
import socket
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import av
import numpy as np
import pytest
import yaml

from afd.teachers.base import SourceReject, SourceVideo, VideoRequest, request_id
from afd.teachers.http import HttpLimits, HttpSource
from afd.teachers.http_spec import HttpSpec

KEY = "sk-very/secret+key-0123456789"
SHAPES = Path(__file__).parents[3] / "configs" / "teachers"


def tiny_mp4(shade: int) -> bytes:
    """Six frames of one grey."""
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(8))
        stream.height, stream.width, stream.pix_fmt, stream.thread_count = 16, 16, "yuv420p", 1
        picture = np.full((16, 16, 3), shade, dtype=np.uint8)
        for _ in range(6):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


class Service(ThreadingHTTPServer):
    """Jobs by id; `faults[kind]` is popped before each call of that kind (submit, lookup, poll, fetch, download).

    A fault is a status number, `(status, headers)`, or a word: hang, drop, accept_drop, malformed, fail, short,
    cut, page, redirect:<where>, big.
    """

    daemon_threads = True

    key = KEY

    def __init__(self, polls_until_done: int = 1) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.polls_until_done = polls_until_done
        self.faults: dict[str, deque[Any]] = defaultdict(deque)
        self.calls: Counter[str] = Counter()
        self.submits: list[dict[str, Any]] = []  # accepted and paid
        self.submit_times: list[float] = []
        self.jobs: dict[str, dict[str, Any]] = {}
        self.replies: dict[str, dict[str, Any]] = {}  # by idempotency key
        self.keys_seen: list[tuple[str, bool]] = []  # (kind, was the key sent)
        self.open_jobs = self.most_open = 0
        self.lock = threading.Lock()
        self.is_key_right = True
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def paid(self) -> Counter[tuple[str, Any]]:
        return Counter((job["prompt"], job["seed"]) for job in self.submits)

    def spec(self, shape: str, **changes: Any) -> HttpSpec:
        """A shipped template, pointed at this server and made quick; `submit__ok` changes a nested field."""
        tree = yaml.safe_load((SHAPES / f"{shape}.yaml").read_text().replace("https://api.example.com", self.url))
        tree["timeout_s"] = 0.5
        for name in ("poll", "lookup"):
            if name in tree:
                tree[name] |= {"every_s": 0.002} if name == "poll" else {"settle_s": 0.0}
        for name, value in changes.items():
            *parents, leaf = name.split("__")
            node = tree
            for parent in parents:
                node = node[parent]
            node[leaf] = value
        return HttpSpec(**tree)

    @staticmethod
    def source(spec: HttpSpec, folder: Path, prompts: list[str], seeds: tuple[int, ...] = (0,), **limits: Any):
        """A source that loses no time between its attempts."""
        teacher = f"http:{spec.name}"
        requests = [VideoRequest(p, s, request_id(teacher, spec.version, p, s)) for p in prompts for s in seeds]
        quick = {"retries": 4, "backoff_s": 0.002, "max_backoff_s": 0.01}
        return HttpSource(spec, lambda: requests, work_dir=folder, limits=HttpLimits(**(quick | limits)))

    @staticmethod
    def split(outcomes: Iterable[SourceVideo | SourceReject]) -> tuple[list[SourceVideo], list[SourceReject]]:
        """Videos and rejects apart."""
        given = list(outcomes)
        videos = [outcome for outcome in given if isinstance(outcome, SourceVideo)]
        return videos, [outcome for outcome in given if isinstance(outcome, SourceReject)]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are expected."""


class Handler(BaseHTTPRequestHandler):
    server: Service  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._note("submit")
        fault = self._fault("submit")
        if fault is not None and fault != "accept_drop":
            return
        job = self._accept(body)
        if fault == "accept_drop":
            self._hang_up()
            return
        path = urlsplit(self.path).path
        if path == "/generate":
            self._send(200, job["mp4"], "video/mp4")
            return
        answers = {
            "/v1/videos/text2video": {"code": 0, "data": {"task_id": job["id"]}},
            "/v1/video_generation": {"task_id": job["id"], "base_resp": {"status_code": 0}},
            "/v1/generations": {"data": [{"b64_json": base64.b64encode(job["mp4"]).decode()}]},
            "/v1/videos": {"id": job["id"], "status": "queued"},
        }
        name = f"models/example-3/operations/{job['id']}"
        get = f"{self.server.url}/v1/predictions/{job['id']}"
        default = {"id": job["id"], "urls": {"get": get}} if path.endswith("/predictions") else {"name": name}
        self._json(answers.get(path, default))

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        last = parts.path.rsplit("/", 1)[-1]
        if parts.path.startswith("/files/") or last == "content":
            self._note("download")
            name = parts.path.split("/")[-2] if last == "content" else last
            if self._fault("download", self.server.jobs[name]["mp4"]) is None:
                self._send(200, self.server.jobs[name]["mp4"], "video/mp4")
            return
        if parts.path == "/v1/files/retrieve":
            self._note("fetch")
            if self._fault("fetch") is None:
                self._json({"file": {"download_url": f"{self.server.url}/files/{query['file_id']}?sig=1"}})
            return
        name = query.get("task_id", last)
        by_reference = next((job for job in self.server.jobs.values() if job["reference"] == name), None)
        kind = "lookup" if name not in self.server.jobs else "poll"
        self._note(kind)
        if self._fault(kind) is not None:
            return
        job = self.server.jobs.get(name, by_reference)
        if job is None:
            self._json({"code": 1203, "message": "no such task"})
            return
        self._poll(job, kind)

    def _poll(self, job: dict[str, Any], kind: str) -> None:
        with self.server.lock:
            job["polls"] += kind == "poll"
            is_done = job["polls"] >= self.server.polls_until_done
            if is_done and not job["is_done"]:
                job["is_done"] = True
                self.server.open_jobs -= 1
        url = f"{self.server.url}/files/{job['id']}?sig=1"
        path = urlsplit(self.path).path
        if path.startswith("/v1/videos/text2video"):
            state = "failed" if job["fails"] else "succeed" if is_done else "processing"
            data = {"task_id": job["id"], "task_status": state, "task_status_msg": f"moderated {KEY}"}
            self._json({"code": 0, "data": data | {"task_result": {"videos": [{"url": url}]}}})
        elif path.startswith("/v1beta/"):
            samples = [{"video": {"uri": f"{self.server.url}/files/{job['id']}"}}]
            done = {"done": True, "response": {"generateVideoResponse": {"generatedSamples": samples}}}
            self._json(done if is_done else {"name": "x"})
        elif path.startswith("/v1/query"):
            self._json({"status": "Success", "file_id": job["id"]} if is_done else {"status": "Queueing"})
        elif path.startswith("/v1/predictions"):
            self._json({"status": "succeeded", "output": url} if is_done else {"status": "starting"})
        else:
            self._json({"status": "completed" if is_done else "in_progress"})

    def _accept(self, body: dict[str, Any]) -> dict[str, Any]:
        """Charge for a job, unless its idempotency key is known."""
        flat = body.get("input") or (body.get("instances") or [{}])[0] | body.get("parameters", {}) | body
        with self.server.lock:
            key = self.headers.get("Idempotency-Key")
            if key in self.server.replies:
                return self.server.replies[key]
            name = f"job{len(self.server.jobs)}"
            job = {
                "id": name, "prompt": flat["prompt"], "seed": flat.get("seed"), "polls": 0, "is_done": False,
                "reference": body.get("external_task_id"), "fails": "forbidden" in flat["prompt"],
                "mp4": tiny_mp4(len(self.server.jobs) * 16 % 256),
            }  # fmt: skip
            self.server.jobs[name] = job
            self.server.submits.append(job)
            self.server.submit_times.append(time.monotonic())
            self.server.open_jobs += 1
            self.server.most_open = max(self.server.most_open, self.server.open_jobs)
            if key:
                self.server.replies[key] = job
            return job

    def _note(self, kind: str) -> None:
        sent = [value for value in self.headers.values() if KEY in value]
        with self.server.lock:
            self.server.calls[kind] += 1
            self.server.keys_seen.append((kind, bool(sent)))

    def _fault(self, kind: str, content: bytes = b"{}") -> Any:
        """Play the next fault of this kind, if any; accept_drop is the caller's."""
        if kind != "download" and not self.server.is_key_right:
            self._json({"error": {"message": f"bad key {KEY}"}, "message": f"bad key {KEY}"}, status=401)
            return 401
        with self.server.lock:
            fault = self.server.faults[kind].popleft() if self.server.faults[kind] else None
        if fault in (None, "accept_drop"):
            return fault
        if isinstance(fault, int | tuple):
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            self._json({"message": f"error for {KEY}"}, status=status, headers=headers)
        elif fault == "hang":
            time.sleep(0.8)
            self._hang_up()
        elif fault == "drop":
            self._hang_up()
        elif fault == "malformed":
            self._send(200, b'{"code": 0, "data": {"task', "application/json")
        elif fault == "short":
            self._send(200, content[: len(content) // 2], "video/mp4", promised=len(content))
            self._hang_up()
        elif fault == "cut":
            self._send(200, content[: len(content) // 2], "video/mp4")
        elif fault == "page":
            self._send(200, b"<html>try later</html>", "text/html")
        elif fault == "big":
            self._send(200, b"x" * 200_000, "video/mp4", promised=None)
        elif fault.startswith("redirect:"):
            self._send(302, b"", "text/plain", headers={"Location": fault.partition(":")[2]})
        return fault

    def _json(self, value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), "application/json", headers=headers)

    def _send(
        self, status: int, data: bytes, kind: str, *, promised: int | None = -1, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if promised is None:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(data) if promised < 0 else promised))
        self.end_headers()
        self.wfile.write(data)

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Service]]:
    """Start services that end with the test; the key lies in the environment."""
    monkeypatch.setenv("EXAMPLE_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    services: list[Service] = []

    def start(**options: Any) -> Service:
        services.append(Service(**options))
        return services[-1]

    yield start
    for service in services:
        service.shutdown()
        service.server_close()
