"""300 wrong inputs: no crash, no corrupt sample, no file outside the target, every reject with its reason."""

import importlib.util
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from afd.data.inspection import inspect
from afd.data.loader import build_loader, read_all
from afd.data.schema import Sample
from afd.data.video import decode_video
from afd.data.writer import write_shards
from afd.models.dct_codec import DCTCodec
from afd.preparation import prepare_shards, shard_folders

pytestmark = pytest.mark.slow
NUM_SHARD_FAULTS = 90


def load_inputs() -> Any:
    path = Path(__file__).with_name("fuzzed_inputs.py")
    spec = importlib.util.spec_from_file_location("fuzzed_inputs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def listing(folder: Path, *, without: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*") if not path.is_relative_to(without))


def test_wrong_videos_and_captions_become_rejects(tmp_path: Path, config_for: Callable[..., Any]) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    inputs = list(load_inputs().make_folder(tmp_path / "videos", outside))
    assert len(inputs) + NUM_SHARD_FAULTS >= 300
    config = config_for(tmp_path / "videos", "prepare.workers=2", "prepare.video_timeout_s=100")
    before = listing(tmp_path, without=config.output_dir)
    summaries = prepare_shards(config)
    assert listing(tmp_path, without=config.output_dir) == before

    train, heldout = shard_folders(config)
    samples = [sample for folder in (train, heldout) for sample in read_all(folder)]
    for folder in (train, heldout):
        assert inspect(folder).problems == ()
    lines = [json.loads(line) for line in (train / "rejects.jsonl").read_text().splitlines()]
    assert len(lines) == summaries["train"].num_rejects
    assert all(line["reason"] for line in lines)

    rows = (json.loads(line) for line in (tmp_path / "videos" / "metadata.jsonl").read_bytes().splitlines()[:195])
    captions = {row["caption"]: row["file_name"] for row in rows}
    accepted = {captions[sample.prompt] for sample in samples}
    rejected = [f"{line.get('file', '')} {line['source_id']}" for line in lines]
    for name, kind in inputs:
        if kind in ("good", "odd", "variable", "8k"):
            assert name in accepted, name
        elif kind not in ("cut", "flips", "hole"):  # a decoder may survive these
            assert name not in accepted, name
        if kind != "line" and name not in accepted and name != ".":
            assert any(name in text for text in rejected), name
    first_line = 1 + sum(kind in load_inputs().COUNTS or kind in ("path", "caption") for _, kind in inputs)
    broken_lines = {f"metadata.jsonl:{first_line + i}" for i in range(sum(kind == "line" for _, kind in inputs))}
    assert broken_lines <= {line["source_id"].partition(" ")[0] for line in lines}

    codec, video = DCTCodec(), config.video
    for sample in samples:
        path = tmp_path / "videos" / captions[sample.prompt]
        frames = decode_video(path, num_frames=video.num_frames, height=video.height, width=video.width, fps=video.fps)
        latents = codec.encode(torch.from_numpy(frames)[None])[0]
        torch.testing.assert_close(sample.latents.float(), latents.bfloat16().float(), rtol=0, atol=1e-5)


def test_damaged_shards_are_refused_or_unharmed(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = [
        Sample("a ball", torch.randn(2, 3, 4, 4, generator=generator), torch.randn(2, 3), None, f"s{i}", "t", i, 8.0)
        for i in range(12)
    ]
    pristine = write_shards(samples, tmp_path / "pristine", metadata={}, shard_bytes=2500).path
    expected = [sample.latents for sample in read_all(pristine)]
    names = sorted(path.name for path in pristine.iterdir() if path.is_file() and not path.name.startswith("."))
    draw, refused = random.Random(3), 0
    for number in range(NUM_SHARD_FAULTS):
        folder = tmp_path / "arena" / "shards"
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(pristine, folder)
        damage(folder / draw.choice(names), draw)
        try:
            if number % 3:
                got = [sample.latents for sample in read_all(folder)]
            else:
                loader = build_loader(
                    folder, batch_size_per_rank=12, world_size=1, rank=0, seed=0, shuffle=False, verify="first_use"
                )
                got = list(next(loader).latents)
        except ValueError:
            refused += 1
        else:
            assert len(got) == len(expected)
            assert all(torch.equal(a.float(), b.float()) for a, b in zip(got, expected, strict=True))
        assert [path.name for path in folder.parent.iterdir()] == ["shards"]
    assert refused > NUM_SHARD_FAULTS // 3


def damage(path: Path, draw: random.Random) -> None:
    """Flip bits, cut, empty, delete or swap a file for a link; in JSON, also replace a value by a hostile one."""
    data = bytearray(path.read_bytes())
    kind = draw.choice(["flip", "flip", "cut", "empty", "delete", "link", "hostile"])
    if kind == "hostile" and path.name == "index.json":
        index = json.loads(data)
        shard = draw.choice(index["shards"])
        place, key, value = draw.choice(
            [
                (shard["raw_data"], "basename", "../evil.mds"),
                (shard["zip_data"], "basename", "/evil.mds.zstd"),
                (shard["raw_data"], "bytes", 1 << 50),
                (shard, "samples", -5),
                (shard, "column_encodings", ["pkl"] * 16),
                (shard, "compression", "../x"),
                (shard["zip_data"], "hashes", {}),
                (index, "shards", [index["shards"][0]] * 2),
            ]
        )
        place[key] = value
        path.write_text(json.dumps(index))
    elif kind == "delete":
        path.unlink()
    elif kind == "link":
        path.unlink()
        path.symlink_to("/dev/zero")
    elif kind == "cut":
        path.write_bytes(data[: draw.randrange(len(data))] if data else b"")
    elif kind == "empty":
        path.write_bytes(b"")
    elif data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(data))
