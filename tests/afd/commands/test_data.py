"""`afd verify | stats | merge | preview` on shards of the built-in codec."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from afd.cli import main
from afd.config import EncodersSection
from afd.data.schema import Reject, Sample
from afd.data.writer import write_shards
from afd.evaluation.shard_report import write_summary


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Nine samples in the codec's shape, one reject."""
    generator = torch.Generator().manual_seed(0)
    samples = [
        Sample(
            prompt=f"ball <{i % 4}>",
            latents=torch.randn(12, 5, 4, 4, generator=generator),
            prompt_embeds=torch.randn(3, 8, generator=generator),
            video_mp4=None,
            source_id=f"s{i}",
            teacher="folder",
            seed=i,
            fps=8.0,
            duration_s=1.0 + i,
            motion=i / 100,
            brightness=0.5,
        )
        for i in range(9)
    ]
    metadata = {"encoders": EncodersSection().model_dump(mode="json")}
    rows = [*samples, Reject("x", "too short: 1 frame", "<b>.mp4")]
    return write_shards(rows, tmp_path / "shards", metadata=metadata).path


def test_verify_says_good_or_fails_by_name(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(shards)]) == 0
    assert "9 samples in 1 shards" in capsys.readouterr().out
    data = (shards / "shard.00000.mds.zstd").read_bytes()
    (shards / "shard.00000.mds.zstd").write_bytes(data[:-3])
    assert main(["verify", str(shards)]) == 2
    captured = capsys.readouterr()
    assert "truncated or overwritten" in captured.out
    assert "do not train on" in captured.err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prepare.device=gpu", "prepare.device must be cpu, cuda or cuda:N, got 'gpu'"),
        (
            "teacher.num_prompts=100000000",
            "teacher.num_prompts must be in [0, 1656], as many as there are, got 100000000",
        ),
    ],
)
def test_a_preparation_that_cannot_start_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    (tmp_path / "run.yaml").write_text(f"output_dir: {tmp_path / 'out'}\n")
    assert main(["prepare", "--config", str(tmp_path / "run.yaml"), "--overwrite", override]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "out").exists()


def test_stats_count_and_draw(shards: Path, tmp_path: Path) -> None:
    assert main(["stats", str(shards), "--out", str(tmp_path / "stats")]) == 0
    stats = json.loads((tmp_path / "stats" / "stats.json").read_text())
    assert (stats["num_samples"], stats["num_prompts"], stats["most_videos_of_a_prompt"]) == (9, 4, 3)
    assert (stats["duration_s"]["median"], stats["motion"]["max"], stats["words"]["min"]) == (5.0, 0.08, 2.0)
    assert sum(stats["motion"]["histogram"]["counts"]) == 9
    assert Image.open(tmp_path / "stats" / "stats.png").width > 500


def test_preview_and_summary_show_the_videos(shards: Path, tmp_path: Path) -> None:
    assert main(["preview", str(shards), "--out", str(tmp_path / "sheet.png"), "--num", "3"]) == 0
    assert Image.open(tmp_path / "sheet.png").height > 3 * 64
    page = write_summary({"train": shards}, tmp_path / "summary.html").read_text()
    assert page.count("<figure>") == 9
    assert "&lt;b&gt;.mp4" in page
    assert "<b>" not in page


def test_merge_from_the_command_line(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(shards), str(shards), "--out", str(tmp_path / "all")]) == 0
    assert "9 samples" in capsys.readouterr().out
    assert main(["merge", str(shards), str(shards), "--out", str(tmp_path / "all")]) == 2
    assert "exists already" in capsys.readouterr().err
