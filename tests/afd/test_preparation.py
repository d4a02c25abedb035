"""Teacher videos to shards: written once, kept while the settings match, readable."""

from pathlib import Path

import pytest
import torch

from afd.config import RunConfig, TeacherSection
from afd.config_file import load_config
from afd.data.loader import build_loader, read_all
from afd.data.video import decode_video
from afd.models.dct_codec import DCTCodec
from afd.preparation import prepare_shards, shard_folders
from afd.teachers.physics import PhysicsTeacher, training_prompts

OVERRIDES = ["teacher.num_prompts=4", "teacher.num_heldout_prompts=2"]


def make_config(folder: Path, *overrides: str) -> RunConfig:
    """The quick start with four training and two held-out prompts."""
    path = folder / "run.yaml"
    path.write_text(f"output_dir: {folder / 'out'}\n")
    return load_config(path, [*OVERRIDES, *overrides])


def test_shards_are_written_once_and_again_only_for_other_settings(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    train, heldout = shard_folders(config)
    assert (train, heldout) == (tmp_path / "out" / "data" / "train", tmp_path / "out" / "data" / "heldout")
    summaries = prepare_shards(config)
    assert {split: summary.num_samples for split, summary in summaries.items()} == {"train": 4, "heldout": 2}
    assert not any(summary.rejects for summary in summaries.values())
    assert prepare_shards(config) == {}
    assert prepare_shards(make_config(tmp_path, "seed=5", "nft.nft_beta=0.3")) == {}

    heavier = make_config(tmp_path, "teacher.physics.gravity=2")
    with pytest.raises(ValueError, match="exists already"):
        prepare_shards(heavier)
    rewritten = prepare_shards(heavier, overwrite=True)
    assert rewritten.keys() == {"train", "heldout"}
    assert {s.fingerprint for s in rewritten.values()}.isdisjoint(s.fingerprint for s in summaries.values())


def test_shards_hold_the_teachers_videos_encoded(tmp_path: Path) -> None:
    config = make_config(tmp_path, f"data.train_shards={tmp_path / 'shards'}")
    prepare_shards(config)
    loader = build_loader(tmp_path / "shards", batch_size_per_rank=4, world_size=1, rank=0, seed=0, shuffle=False)
    batch = next(loader)
    assert list(batch.prompts) == list(training_prompts(4))
    assert batch.latents.shape == (4, 12, 12, 4, 4)
    assert batch.prompt_embeds.shape == (4, 16, 32)
    video = config.video
    finished = PhysicsTeacher(config.teacher.physics).generate(batch.prompts[1], 1)
    frames = decode_video(
        finished.mp4, num_frames=video.num_frames, height=video.height, width=video.width, fps=video.fps
    )
    expected = DCTCodec().encode(torch.from_numpy(frames)[None])[0]
    torch.testing.assert_close(batch.latents[1], expected.bfloat16().float(), rtol=0, atol=1e-6)


def test_a_teacher_of_shards_cannot_be_queried(tmp_path: Path) -> None:
    config = RunConfig(teacher=TeacherSection(kind="shards"), output_dir=tmp_path)
    with pytest.raises(
        ValueError, match=r"teacher\.kind must be folder, http or pipeline to read videos, got 'shards'"
    ):
        prepare_shards(config)


def test_a_training_prompt_may_have_several_videos_of_the_built_in_world(tmp_path: Path) -> None:
    prepare_shards(make_config(tmp_path, "teacher.num_prompts=2", "teacher.videos_per_prompt=2"))
    samples = read_all(tmp_path / "out" / "data" / "train")
    assert [sample.prompt for sample in samples] == [prompt for prompt in training_prompts(2) for _ in range(2)]
    assert [sample.seed for sample in samples] == [0, 1, 2, 3]
    assert not torch.equal(samples[0].latents, samples[1].latents)
    assert len(read_all(tmp_path / "out" / "data" / "heldout")) == 2
