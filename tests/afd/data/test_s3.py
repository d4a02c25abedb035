"""Shards in a bucket, through streaming's own S3 client, against a real HTTP server on this machine.

Needs boto3, which afd does not: `pip install boto3` to run it. Without it test_store.py has a stand-in client.
"""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from afd.data.loader import build_loader, read_all
from afd.data.store import ShardStore

pytest.importorskip("boto3")


class Bucket(ThreadingHTTPServer):
    """GET and HEAD of the files of one folder as the objects of `bucket/set/`; the first `num_faults` answers of
    shards are wrong.
    """

    def __init__(self, folder: Path, num_faults: int) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.num_faults, self.asked, self.lock = folder, num_faults, [], threading.Lock()


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        server: Any = self.server
        name = self.path.partition("?")[0].removeprefix("/bucket/set/")
        path = server.folder / name
        if "/" in name or not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = bytearray(path.read_bytes())
        with server.lock:
            server.asked.append(f"{self.command} {name}")
            if with_body and name.startswith("shard") and server.num_faults > 0:
                server.num_faults -= 1
                data[len(data) // 2] ^= 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", '"1"')
        self.end_headers()
        if with_body:
            self.wfile.write(bytes(data))


@pytest.fixture
def bucket(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    server = Bucket(shards, num_faults=2)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "nobody")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    yield server
    server.shutdown()
    server.server_close()


def test_a_bucket_gives_the_same_batches_in_spite_of_damage(bucket: Bucket, shards: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_size_per_rank": 4, "world_size": 1, "rank": 0, "seed": 3}
    far = build_loader(tmp_path / "local", remote="s3://bucket/set", **options).read_ahead(2)
    near = build_loader(shards, **options)
    for _ in range(9):
        first, second = next(far), next(near)
        assert torch.equal(first.sample_ids, second.sample_ids)
        assert torch.equal(first.latents, second.latents)
    far.close()
    assert bucket.num_faults == 0
    assert sum(line.startswith("GET shard") for line in bucket.asked) == len(far.record.shards) + 2
    assert len(read_all(tmp_path / "other", remote="s3://bucket/set")) == 23


def test_a_missing_object_is_named(bucket: Bucket, shards: Path, tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "local", remote="s3://bucket/set")
    (shards / store.record.shards[1].raw.name).with_suffix(".mds.zstd").unlink()
    with pytest.raises(ValueError, match=r"s3://bucket/set/shard.00001.mds.zstd cannot be fetched"):
        store.ensure(1)
    with pytest.raises(ValueError, match=r"s3://bucket/nothing/dataset.json cannot be fetched"):
        ShardStore(tmp_path / "other", remote="s3://bucket/nothing")
