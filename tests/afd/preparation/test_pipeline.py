"""A folder of videos to shards: what is kept, refused and held out, and what a kill changes (nothing)."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from afd.config import RunConfig
from afd.config_file import ConfigError, dump_config
from afd.data.integrity import open_dataset
from afd.data.loader import build_loader, read_all
from afd.data.schema import Sample
from afd.data.video import decode_video
from afd.models.dct_codec import DCTCodec
from afd.models.encoders import load_text_encoder
from afd.preparation import prepare_shards, shard_folders
from afd.preparation.intake import prompt_key
from afd.teachers.base import VideoRequest

MakeFolder = Callable[..., Path]
MakeConfig = Callable[..., RunConfig]
KILL_WORKER = Path(__file__).with_name("kill_worker.py")


def read_both(config: RunConfig) -> tuple[list[Sample], list[Sample]]:
    train, heldout = shard_folders(config)
    return read_all(train), read_all(heldout)


def read_rejects(config: RunConfig) -> dict[str, str]:
    lines = (shard_folders(config)[0] / "rejects.jsonl").read_text().splitlines()
    return {row["source_id"]: row["reason"] for row in map(json.loads, lines)}


def captions(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_hold_the_decoded_videos_and_where_they_come_from(
    folder_of_videos: MakeFolder, config_for: MakeConfig
) -> None:
    videos = folder_of_videos(11)
    config = config_for(videos, "teacher.licence=CC0-1.0", "teacher.folder.version=v3", "prepare.heldout_fraction=0.3")
    summaries = prepare_shards(config)
    train, heldout = read_both(config)
    assert {split: summary.num_samples for split, summary in summaries.items()} == {
        "train": len(train),
        "heldout": len(heldout),
    }
    assert len(train) + len(heldout) == 11
    assert not {sample.prompt for sample in train} & {sample.prompt for sample in heldout}
    rows = [json.loads(line) for line in (videos / "metadata.jsonl").read_text().splitlines()]
    text, codec = load_text_encoder(config.encoders), DCTCodec()
    for sample in train + heldout:
        (row,) = [row for row in rows if row["caption"] == sample.prompt]
        frames = decode_video(videos / row["file_name"], num_frames=12, height=16, width=16, fps=8)
        latents = codec.encode(torch.from_numpy(frames)[None])[0]
        torch.testing.assert_close(sample.latents.float(), latents.bfloat16().float(), rtol=0, atol=1e-6)
        assert torch.equal(sample.prompt_embeds, text.encode([sample.prompt])[0].bfloat16())
        assert (sample.teacher, sample.teacher_version, sample.licence) == ("folder", "v3", "CC0-1.0")
        assert (sample.fps, round(sample.duration_s, 3), sample.video_mp4) == (8.0, 1.625, None)
        assert sample.motion == pytest.approx(abs(frames[1:] - frames[:-1]).mean(), rel=1e-4)
        assert sample.brightness == pytest.approx((frames @ [0.299, 0.587, 0.114]).mean(), rel=1e-4)


def test_duplicates_are_refused_as_configured(
    folder_of_videos: MakeFolder, config_for: MakeConfig, video: Callable[..., bytes]
) -> None:
    videos = folder_of_videos(9)
    rows = [json.loads(line) for line in (videos / "metadata.jsonl").read_text().splitlines()]
    (videos / "copy.mp4").write_bytes(video(2))
    (videos / "more.mp4").write_bytes(video(50))
    same_words = rows[0]["caption"].upper().replace(" ", "  ").lower()
    rows += [
        {"file_name": "copy.mp4", "caption": rows[4]["caption"]},
        {"file_name": "more.mp4", "caption": same_words},
    ]
    captions(videos, rows)
    config = config_for(videos)
    prepare_shards(config)
    (reason,) = read_rejects(config).values()
    first = read_both(config)
    assert reason in {f"the same video as {sample.source_id}" for part in first for sample in part}
    assert sum(map(len, first)) == 10

    config = config_for(videos, "prepare.dedupe_videos=prompt", "prepare.videos_per_prompt=1")
    prepare_shards(config, overwrite=True)
    assert list(read_rejects(config).values()) == ["the prompt already has 1 (prepare.videos_per_prompt)"] * 2
    config = config_for(videos, "prepare.dedupe_videos=prompt")
    prepare_shards(config, overwrite=True)
    assert read_rejects(config) == {}
    assert sum(map(len, read_both(config))) == 11


def test_several_videos_of_a_prompt_stay_together_and_in_order(
    folder_of_videos: MakeFolder, config_for: MakeConfig
) -> None:
    videos = folder_of_videos(15, videos_per_prompt=3)
    rows = [json.loads(line) for line in (videos / "metadata.jsonl").read_text().splitlines()]
    written = []
    for workers in (0, 2):
        config = config_for(
            videos, f"prepare.workers={workers}", "prepare.heldout_fraction=0.4", "prepare.batch_size=4"
        )
        prepare_shards(config)
        data = shard_folders(config)[0].parent
        files = {path.relative_to(data): path.read_bytes() for path in data.rglob("*") if path.is_file()}
        written.append(files)
        train, heldout = read_both(config)
        loader = build_loader(shard_folders(config)[0], batch_size_per_rank=4, world_size=1, rank=0, seed=0)
        batches = [next(loader) for _ in range(6)]
        shutil.rmtree(config.output_dir)
    assert written[0] == written[1]
    assert not {sample.prompt for sample in train} & {sample.prompt for sample in heldout}
    order = [row["caption"] for row in rows]
    for samples in (train, heldout):
        prompts = [sample.prompt for sample in samples]
        assert prompts == [prompt for prompt in order if prompt in prompts]
        assert [prompts.count(prompt) for prompt in prompts] == [3] * len(prompts)
    assert len({sample.seed for sample in train + heldout}) == 15
    for batch in batches:  # a row is a prompt with one of its videos, whichever order the epoch has
        for sample_id, prompt, latents in zip(batch.sample_ids, batch.prompts, batch.latents, strict=True):
            assert (prompt, True) == (train[sample_id].prompt, torch.equal(latents, train[sample_id].latents.float()))


def test_unusable_videos_and_captions_are_rejects_with_reasons(
    folder_of_videos: MakeFolder, config_for: MakeConfig, video: Callable[..., bytes]
) -> None:
    videos = folder_of_videos(6)
    rows = [json.loads(line) for line in (videos / "metadata.jsonl").read_text().splitlines()]
    data = (videos / "0001.mp4").read_bytes()
    (videos / "0001.mp4").write_bytes(data[: len(data) // 2])
    (videos / "0002.mp4").write_bytes(video(2, num_frames=3))
    (videos / "0003.mp4").write_text("no video at all")
    rows[4]["caption"] = "a purple elephant sings"
    captions(videos, rows)
    for workers in (0, 2):
        config = config_for(videos, f"prepare.workers={workers}", "prepare.heldout_fraction=0.5")
        prepare_shards(config, overwrite=True)
        reasons = sorted(read_rejects(config).values())
        assert sum(map(len, read_both(config))) == 2
        assert len(reasons) == 4
        for reason, expected in zip(
            reasons, ("cannot be decoded", "cannot be decoded", "prompt has a word", "too short"), strict=True
        ):
            assert expected in reason
        assert "Invalid data" in reasons[0]
        shutil.rmtree(config.output_dir)


@pytest.mark.parametrize("keep", ["source", "resampled", "codec"])
def test_kept_videos_go_the_way_that_was_asked_for(
    folder_of_videos: MakeFolder, config_for: MakeConfig, keep: str
) -> None:
    videos = folder_of_videos(3)
    config = config_for(videos, f"prepare.keep_video={keep}", "prepare.crf=0")
    prepare_shards(config)
    for sample in [sample for part in read_both(config) for sample in part]:
        assert sample.video_mp4
        frames = decode_video(sample.video_mp4, num_frames=12, height=16, width=16, fps=8)
        if keep == "source":
            assert sample.video_mp4 in [path.read_bytes() for path in videos.glob("*.mp4")]
        else:
            latents = DCTCodec().encode(torch.from_numpy(frames)[None])[0]
            assert (latents - sample.latents.float()).abs().mean() < 0.03
        seen = DCTCodec().decode(sample.latents[None].float())[0].numpy()
        error = abs(frames - seen).mean()
        assert error < (0.025 if keep == "codec" else 0.06)


def test_a_split_that_would_be_empty_is_refused_before_the_work(
    folder_of_videos: MakeFolder, config_for: MakeConfig
) -> None:
    config = config_for(folder_of_videos(2, videos_per_prompt=2))
    with pytest.raises(ValueError, match=r"at least 2 different prompts.*got 1 in 2 requests"):
        prepare_shards(config)
    assert not config.output_dir.exists()


def test_an_empty_split_loses_nothing_and_is_asked_for_again(
    folder_of_videos: MakeFolder, config_for: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from afd.preparation import pipeline

    encoded: list[int] = []
    encode = pipeline.ClipEncoder.encode

    def count(self: Any, clips: Any) -> Any:
        encoded.append(len(clips))
        return encode(self, clips)

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.ClipEncoder, "encode", count)
    videos = folder_of_videos(6)
    config = config_for(videos, "prepare.heldout_fraction=0", "prepare.batch_size=2", "prepare.shard_mib=0.04")
    rows = [json.loads(line) for line in (videos / "metadata.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: prompt_key(VideoRequest(row["caption"], 0, "")))  # the lowest is held out
    files = {row["file_name"]: (videos / row["file_name"]).read_bytes() for row in rows[:2]}
    for name in files:
        (videos / name).write_bytes(b"damaged")
    message = (
        rf"heldout: the prompts of this split \('{rows[0]['caption'][:60]}'\) gave none "
        r"\(1 rejected: folder-.*: cannot be .*stays in .*\.train\.work.*another prepare\.heldout_fraction"
    )
    for num_encoded in (4, 0):
        encoded.clear()
        with pytest.raises(ValueError, match=message):
            prepare_shards(config)
        assert sum(encoded) == num_encoded
    for name, data in files.items():
        (videos / name).write_bytes(data)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "publish", die)
        with pytest.raises(KeyboardInterrupt):
            prepare_shards(config)
    prepare_shards(config)
    train, heldout = read_both(config)
    assert sorted(sample.prompt for sample in train) == sorted(row["caption"] for row in rows[1:])
    assert [sample.prompt for sample in heldout] == [rows[0]["caption"]]
    assert (sum(encoded), read_rejects(config)) == (2, {})
    assert sorted(path.name for path in (config.output_dir / "data").iterdir()) == ["heldout", "train"]


def test_no_setting_holds_out_every_prompt(folder_of_videos: MakeFolder, config_for: MakeConfig) -> None:
    videos = folder_of_videos(4)
    with pytest.raises(ConfigError, match=r"heldout_fraction: Input should be less than 1, got 1"):
        config_for(videos, "prepare.heldout_fraction=1")
    config = config_for(videos, "prepare.heldout_fraction=0.9999")
    prepare_shards(config)
    assert list(map(len, read_both(config))) == [1, 3]


@pytest.mark.parametrize("heldout", ["train", "train/inside", ".", "other/../train"])
def test_the_folders_of_the_splits_must_be_apart(
    folder_of_videos: MakeFolder, config_for: MakeConfig, tmp_path: Path, heldout: str
) -> None:
    folders = (f"data.train_shards={tmp_path / 'train'}", f"data.heldout_shards={tmp_path / heldout}")
    config = config_for(folder_of_videos(3), *folders)
    with pytest.raises(
        ValueError, match=r"data\.heldout_shards must be two folders, neither in the other, got .*train"
    ):
        prepare_shards(config)
    assert not (tmp_path / "train").exists()


def test_a_folder_without_a_usable_row_says_why(folder_of_videos: MakeFolder, config_for: MakeConfig) -> None:
    videos = folder_of_videos(4)
    captions(videos, [{"file_name": f"clip_{number}.mp4", "caption": "a ball"} for number in range(4)])
    reasons = r"8 rejected: metadata\.jsonl:1 clip_0\.mp4: no such file; .*:2 .*; .*:3 clip_2\.mp4: no such file\)$"
    with pytest.raises(ValueError, match=rf"got 0 in 0 requests \({reasons}"):
        prepare_shards(config_for(videos))


def test_a_published_split_is_not_made_again(folder_of_videos: MakeFolder, config_for: MakeConfig) -> None:
    config = config_for(folder_of_videos(8))
    prepare_shards(config)
    assert prepare_shards(config) == {}
    train, heldout = shard_folders(config)
    before = {path.name: (path.read_bytes(), path.stat().st_ino) for path in train.iterdir()}
    held = {path.name: path.read_bytes() for path in heldout.iterdir()}
    shutil.rmtree(heldout)
    assert prepare_shards(config).keys() == {"heldout"}
    assert {path.name: path.read_bytes() for path in heldout.iterdir()} == held
    assert {path.name: (path.read_bytes(), path.stat().st_ino) for path in train.iterdir()} == before
    assert sorted(path.name for path in train.parent.iterdir()) == ["heldout", "train"]


def test_unfinished_work_of_other_settings_is_dropped_only_when_asked(
    folder_of_videos: MakeFolder, config_for: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from afd.preparation import pipeline

    videos = folder_of_videos(20)

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "publish", die)
        with pytest.raises(KeyboardInterrupt):
            prepare_shards(config_for(videos))
    other = config_for(videos, "prepare.crf=30")
    with pytest.raises(ValueError, match="unfinished preparation with other settings"):
        prepare_shards(other)
    prepare_shards(other, overwrite=True)
    assert sum(map(len, read_both(other))) == 20


def test_a_training_run_replaces_only_what_the_built_in_world_made(
    folder_of_videos: MakeFolder, config_for: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from afd.preparation import pipeline

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    def train(*overrides: str) -> dict[str, Any]:
        sizes = ("teacher.num_prompts=2", "teacher.num_heldout_prompts=1")
        config = config_for(videos, "teacher.kind=physics", *sizes, *overrides)
        return dict(prepare_shards(config, overwrite="built_in"))

    videos = folder_of_videos(4)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "publish", die)
        with pytest.raises(KeyboardInterrupt):
            prepare_shards(config_for(videos))
    with pytest.raises(ValueError, match=r"\.train\.work holds an unfinished preparation with other settings"):
        train()
    prepare_shards(config_for(videos))
    with pytest.raises(ValueError, match=r"train exists already, prepared from teacher\.kind=folder .*kind=shards"):
        train()
    assert sum(map(len, read_both(config_for(videos)))) == 4

    (tmp_path / "out").rename(tmp_path / "elsewhere")
    train()
    assert train("teacher.physics.gravity=2").keys() == {"train", "heldout"}
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"precious holds no dataset\.json"):
        train("teacher.physics.gravity=3", f"data.heldout_shards={tmp_path / 'precious'}")
    with pytest.raises(ValueError, match="exists already, prepared from"):  # nor the world's own shards elsewhere
        train("teacher.physics.gravity=3", f"data.train_shards={tmp_path / 'elsewhere' / 'data' / 'train'}")
    assert [path.name for path in (tmp_path / "precious").iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_killed_twenty_times_writes_the_same_shards_as_never(
    folder_of_videos: MakeFolder, config_for: MakeConfig, launch: Any, tmp_path: Path
) -> None:
    videos = folder_of_videos(70)
    for number in range(0, 70, 17):
        (videos / f"{number:04}.mp4").write_bytes(b"damaged")
    config = config_for(videos, "prepare.shard_mib=0.04", "prepare.heldout_fraction=0.3", "prepare.batch_size=3")
    path = tmp_path / "kill.yaml"
    path.write_text(dump_config(config))
    outcome = launch(KILL_WORKER, str(path), "20", launcher="plain")
    assert outcome["kills"] == 20
    assert outcome["killed"] == outcome["whole"]
    assert sum(name.startswith("train/shard.") for name in outcome["whole"]) > 5
    assert "train/rejects.jsonl" in outcome["whole"]
    for folder in shard_folders(config):
        open_dataset(folder)
    assert len(read_rejects(config)) == 5
