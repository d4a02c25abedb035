import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from afd.evaluation.contact_sheet import contact_sheet
from afd.evaluation.curves import PANELS, draw_panel, series_of, split_histograms
from afd.evaluation.failure_signs import failure_signs
from afd.evaluation.metric_facts import compare, format_value
from afd.evaluation.report import build_report, terminal_table

SUMMARY = {
    "base": {
        "gravity_error": {"mean": 0.52, "sem": 0.02, "n": 128},
        "dynamic_degree": {"mean": 1.10, "sem": 0.05, "n": 128},
        "trajectory_residual": {"mean": 0.40, "sem": 0.01, "n": 128},
    },
    "student": {
        "gravity_error": {"mean": 0.21, "sem": 0.02, "n": 128},
        "dynamic_degree": {"mean": 1.14, "sem": 0.05, "n": 128},
        "trajectory_residual": {"mean": 0.70, "sem": 0.02, "n": 128},
    },
    "teacher": {
        "gravity_error": {"mean": 0.05, "sem": 0.01, "n": 64},
        "dynamic_degree": {"mean": 1.30, "sem": 0.05, "n": 64},
        "trajectory_residual": {"mean": None, "sem": None, "n": 0},
    },
}


def bouncing_ball(seed: int, *, num_frames: int = 15, size: int = 32) -> np.ndarray:
    """A bright disc under gravity: [F, H, W, 3] float32 in [0, 1]."""
    rows, columns = np.mgrid[0:size, 0:size] + 0.5
    video = np.full((num_frames, size, size, 3), 0.08, np.float32)
    for f in range(num_frames):
        x = size * (0.2 + 0.04 * f)
        y = size * (0.85 - abs(math.sin(0.35 * f + 0.3 * seed)) * 0.6)
        cover = np.clip(3.5 - np.hypot(columns - x, rows - y), 0, 1)[..., None]
        video[f] = video[f] * (1 - cover) + cover * np.array([0.9, 0.25 + 0.2 * seed, 0.2], np.float32)
    return video


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """The output folder of a made-up run of 200 steps."""
    from afd.data.video import encode_video

    noise = np.random.default_rng(0)
    with (tmp_path / "metrics.jsonl").open("w") as journal:
        for step in range(1, 201):
            record = {
                "step": step,
                "time_unix_s": 1.7e9 + step,
                "student/loss": 1 + 0.2 * noise.normal(),
                "student/old_deviation": 0.01 + 0.001 * noise.normal(),
                "student/lr": 1e-4,
                "student/grad_norm": 0.5 + 0.1 * noise.random(),
                "discriminator/loss": 0.5 + 0.05 * noise.normal(),
                "discriminator/accuracy": 0.8 + 0.05 * noise.normal(),
                "discriminator/margin": 1.2 + 0.3 * noise.normal(),
                "rollout/score_mean": -0.6 + 0.001 * step + 0.1 * noise.normal(),
                "rollout/score_std": 0.8 + 0.05 * noise.normal(),
                "rollout/zero_std_share": 0.0,
                "weight/mean": 0.5,
                "weight/std": 0.1 + 0.01 * noise.normal(),
                "time/step_s": 1.4 + 0.1 * noise.random(),
                "time/rollout_s": 0.8 + 0.1 * noise.random(),
                "surprise/metric": noise.random(),
                **{f"weight/hist_{i}": math.exp(-((i - 4.5) ** 2) / 6) for i in range(10)},
            }
            journal.write(json.dumps(record) + "\n")
            if step % 50 == 0:
                extra = {"eval/gravity_error": 0.52 - 0.0015 * step, "eval/dynamic_degree": 1.1 + 0.0003 * step}
                journal.write(json.dumps({"step": step, "time_unix_s": 0, **extra}) + "\n")
    warmup = [{"step": s, "discriminator/accuracy": min(0.5 + 0.01 * s, 0.8)} for s in range(1, 61)]
    (tmp_path / "warmup.jsonl").write_text("".join(json.dumps(row) + "\n" for row in warmup))
    (tmp_path / "evaluation.json").write_text(json.dumps(SUMMARY))
    (tmp_path / "config.yaml").write_text("seed: 0\nnum_steps: 200\n# <b>not bold</b>\n")
    facts = {"started_at": "2026-01-01 00:00:00 UTC", "duration_s": 312.4, "device": "CPU", "ranks": 2}
    facts["student_parameters"] = 351_000
    (tmp_path / "run.json").write_text(json.dumps({**facts, "commit": "abc123", "versions": {"torch": "2.13.0"}}))
    prompts = ["a red ball falls from the top", "a blue ball is thrown to the right"]
    for step in (100, 200):
        folder = tmp_path / "samples" / f"step_{step:06d}"
        rows = {}
        for i, prompt in enumerate(prompts):
            for j, role in enumerate(("teacher", "base", "student")):
                clip = bouncing_ball(i + j)
                rows[f"{role}: {prompt}"] = clip
                folder.mkdir(parents=True, exist_ok=True)
                encode_video(clip, folder / f"{prompt.replace(' ', '-')}.{role}.mp4", fps=10, scale=6)
        contact_sheet(rows, folder / "contact_sheet.png", upscale=2)
    return tmp_path


def test_report_is_one_file_that_asks_for_nothing(run_folder: Path):
    page = build_report(run_folder).read_text()
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    # Names of XML vocabularies are no requests.
    assert set(re.findall(r"https?://[^\"' )]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in page
    assert page.count("<video") == 6
    assert page.count('src="data:image/png') == 2


def test_report_shows_numbers_curves_signs_and_how_it_was_made(run_folder: Path):
    page = build_report(run_folder).read_text()
    for text in (
        "Gravity error",
        "-59.6 %",
        "0.210 ± 0.020",
        "within noise",
        "Discriminator accuracy",
        "Discriminator&#39;s warm-up",
        "Histogram of weight",
        "surprise/metric",
        "Artefacts grow",
        "abc123",
        "5 min 12 s",
        "351,000",
        "a red ball falls from the top",
        "prefers-color-scheme: dark",
    ):
        assert text in page, text
    assert "&lt;b&gt;not bold&lt;/b&gt;" in page, "the configuration is escaped"
    assert "#0102" not in page
    assert "#0103" not in page, "no stand-in colour is left"


def test_report_of_a_run_that_has_only_begun(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    page = build_report(tmp_path).read_text()
    assert "was not evaluated" in page
    assert "not measured" in page


def test_report_names_what_it_misses(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"holds no run: expected one of run\.json"):
        build_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.json", '{"title": "a', r"run\.json must hold a whole JSON object: Unterminated string"),
        ("run.json", "[]", r"run\.json must hold a JSON object, got list"),
        ("evaluation.json", "3", r"evaluation\.json must hold a JSON object, got int"),
    ],
)
def test_report_names_a_file_that_is_no_object(tmp_path: Path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        build_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_comparison_knows_better_worse_and_noise():
    verdicts = {row.name: row.verdict for row in compare(SUMMARY)}
    assert verdicts == {"gravity_error": "better", "dynamic_degree": "same", "trajectory_residual": "worse"}


def test_terminal_table_aligns_and_marks_what_is_missing():
    lines = terminal_table(SUMMARY).splitlines()
    assert lines[0].split() == ["metric", "base", "student", "teacher", "change"]
    assert "-59.6 %" in lines[2]
    assert "better" in lines[2]
    assert re.search(r"trajectory_residual \[px\] .* - ", lines[4])
    assert terminal_table({}).splitlines()[0].startswith("metric")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ((0.5234, 0.0213), "0.523 ± 0.021"),
        ((12.3, 1.6), "12.3 ± 1.6"),
        ((float("nan"), 1.0), "-"),
        ((0.0, 0.0), "0.000 ± 0.000"),
        ((0.25, float("nan")), "0.2500"),
    ],
)
def test_values_have_as_many_digits_as_their_error(value: tuple[float, float], text: str):
    assert format_value(value) == text


def signs_of(**metrics: float) -> dict[str, str]:
    series = {
        name.replace("__", "/"): (np.arange(40), np.full(40, value, dtype=np.float64))
        for name, value in metrics.items()
    }
    return {sign.name: sign.state for sign in failure_signs(series, {})}


def test_failure_signs_are_raised_cleared_or_unknown():
    assert signs_of(discriminator__accuracy=0.995)["Discriminator has won"] == "warning"
    assert signs_of(discriminator__accuracy=0.5)["Discriminator cannot tell"] == "warning"
    assert signs_of(discriminator__accuracy=0.8)["Discriminator has won"] == "ok"
    assert signs_of()["Discriminator has won"] == "unknown"
    assert signs_of(weight__std=0.001)["Weights carry no signal"] == "warning"
    assert signs_of(student__lr=0.0)["Student does not move"] == "warning"
    assert signs_of(student__skipped_steps=2)["Skipped steps"] == "warning"
    assert signs_of(student__loss=float("nan"))["Numbers break"] == "warning"


def test_failure_signs_compare_student_with_base():
    states = {sign.name: sign.state for sign in failure_signs({}, SUMMARY)}
    assert states["Artefacts grow"] == "warning"
    assert states["Motion freezes"] == "ok"
    assert states["Rollouts blur"] == "unknown"


def test_sharpness_is_read_from_the_rollouts_when_nothing_was_evaluated():
    series = {"rollout/sharpness": (np.arange(40), np.linspace(1.0, 0.5, 40))}
    states = {sign.name: sign.state for sign in failure_signs(series, {})}
    assert states["Rollouts blur"] == "warning"


def test_series_keep_the_last_value_of_a_step():
    series = series_of([{"step": 1, "a": 1.0}, {"step": 1, "a": 2.0}, {"step": 2, "a": 3.0, "weight/hist_0": 1.0}])
    assert series["a"][1].tolist() == [2.0, 3.0]
    histograms, plain = split_histograms(series)
    assert list(histograms) == ["weight"]
    assert list(plain) == ["a"]


def test_a_panel_survives_gaps_in_its_data():
    values = np.where(np.arange(50) % 7 == 0, np.nan, 1.0)
    svg = draw_panel({"student/loss": (np.arange(50), values)}, PANELS[0])
    assert svg.startswith("<svg")
    assert "var(--series-1)" in svg


def test_contact_sheet_has_a_row_a_video_and_a_column_a_frame(tmp_path: Path):
    clip = np.zeros((5, 7, 9, 3), np.float32)
    path = contact_sheet({"teacher": clip, "student": clip}, tmp_path / "a" / "sheet.png", upscale=3)
    with Image.open(path) as sheet:
        assert sheet.height == 2 * (7 * 3 + 4) + 8
        assert sheet.width == 84 + 5 * (9 * 3 + 4) - 4 + 8


def test_contact_sheet_checks_its_videos(tmp_path: Path):
    with pytest.raises(ValueError, match=r"'base' must be \[F, H, W, 3\], got \[5, 7, 9\]"):
        contact_sheet({"base": np.zeros((5, 7, 9))}, tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="'base' must be finite"):
        contact_sheet({"base": np.full((2, 4, 4, 3), np.nan)}, tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="at least 1, 1 and 2, got 0"):
        contact_sheet({}, tmp_path / "sheet.png")
