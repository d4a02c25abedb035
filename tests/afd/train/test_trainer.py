"""A whole run on disk: what it leaves behind, and that killing it changes nothing. Real engines, shards and MLflow."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import pytest
import yaml
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

STEP_KEYS = {
    "step",
    "student/loss",
    "student/old_deviation",
    "discriminator/loss",
    "discriminator/accuracy",
    "discriminator/margin",
    "rollout/score_mean",
    "weight/mean",
    "weight/std",
    "time/step_s",
}
EVALUATED = ("gravity_error", "trajectory_residual", "dynamic_degree", "object_permanence")
NUM_STEPS = 4


def rows_of(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def without_time(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if not name.startswith("time")}


def newest_commit(output: Path) -> Path:
    return output / "checkpoints" / (output / "checkpoints" / "latest").read_text().strip()


def num_frames(video: Path) -> int:
    with av.open(str(video)) as container:
        return sum(1 for _ in container.decode(video=0))


def mlflow_run(output: Path) -> Any:
    """The only MLflow run of a folder."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{output / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("afd")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1, "a resumed run goes on under its own id"
    history = client.get_metric_history(runs[0].info.run_id, "student/loss")
    return runs[0], [(each.step, each.value) for each in history]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def command(folder: Path, tiny_inputs: Path, tiny_knobs: dict[str, str]) -> Any:
    """`command(name, *flags)`: the training command for one of this module's folders."""

    def build(name: str, *flags: str) -> list[str]:
        root = Path(__file__).parents[3]
        script, config = root / "launch" / "train.py", root / "configs" / "chunk_wise.yaml"
        paths = ["--config", str(config), "--ds_config", str(tiny_inputs / "zero3.json")]
        state = {"discriminator.replay_share": "0.5", "student.lr_schedule.kind": "cosine"}
        overrides = [f"{key}={value}" for key, value in (tiny_knobs | state).items()]
        return [sys.executable, str(script), *paths, "--output_dir", str(folder / name), *flags, *overrides]

    return build


@pytest.fixture(scope="module")
def whole(folder: Path, command: Any, run: Any) -> Path:
    """An uninterrupted run."""
    done = run(command("whole"))
    assert done.returncode == 0, done.stderr[-6000:]
    return folder / "whole"


@pytest.fixture(scope="module")
def killed(folder: Path, command: Any, run: Any, environment: dict[str, str]) -> Path:
    """The same run, killed when step 2 was on disk, and started again by the same command."""
    output = folder / "killed"
    with (folder / "killed.log").open("w") as log:
        process = subprocess.Popen(command("killed"), env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 600
        while not (output / "metrics.jsonl").is_file() or len(rows_of(output)) < 2:
            assert process.poll() is None, (folder / "killed.log").read_text()[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    (folder / "steps_at_death").write_text(str(len(rows_of(output))))
    done = run(command("killed"))
    assert done.returncode == 0, done.stderr[-6000:]
    assert "resumed from" in done.stderr
    return output


def test_killed_and_resumed_run_equals_the_uninterrupted_one_bitwise(whole: Path, killed: Path) -> None:
    assert int((killed.parent / "steps_at_death").read_text()) < NUM_STEPS, "the run must have died half way"
    assert [without_time(row) for row in rows_of(killed)] == [without_time(row) for row in rows_of(whole)]
    files = ["student.safetensors", *(f"averages/{name}.safetensors" for name in ("old", "ema", "reference"))]
    for name in files:
        expected, got = load_file(newest_commit(whole) / name), load_file(newest_commit(killed) / name)
        assert expected.keys() == got.keys()
        assert all(expected[key].equal(got[key]) for key in expected), name
    assert (killed / "evaluation.json").read_text() == (whole / "evaluation.json").read_text()


@pytest.mark.parametrize("name", ["whole", "killed"])
def test_metrics_hold_one_object_per_step(request: pytest.FixtureRequest, name: str) -> None:
    rows = rows_of(request.getfixturevalue(name))
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    for row in rows:
        assert row.keys() >= STEP_KEYS
        assert all(isinstance(value, int | float) and value == value for value in row.values())
        is_evaluated = row["step"] == 2  # every 2 steps; the last one goes to evaluation.json
        assert any(key.startswith("eval/") for key in row) == is_evaluated


def test_evaluation_compares_base_student_and_teacher(whole: Path) -> None:
    evaluation = json.loads((whole / "evaluation.json").read_text())
    assert (evaluation.pop("step"), evaluation.pop("weights")) == (NUM_STEPS, "ema")
    assert evaluation.keys() == {"base", "student", "teacher"}
    for role in evaluation.values():
        for metric in EVALUATED:
            assert {"mean", "sem"} <= role[metric].keys()
    assert evaluation["teacher"]["gravity_error"]["mean"] < 0.1, "the teacher's own physics is measured as right"


def test_run_leaves_report_config_warmup_and_checkpoints(whole: Path) -> None:
    report = (whole / "report.html").read_text()
    assert "gravity" in report.lower()
    assert 'src="http' not in report, "the page must be self-contained"
    config = yaml.safe_load((whole / "config.yaml").read_text())
    assert config["num_steps"] == NUM_STEPS
    assert len((whole / "warmup.jsonl").read_text().splitlines()) == 1
    commits = sorted(each.name for each in (whole / "checkpoints").glob("step_*"))
    assert commits == ["step_00000003", "step_00000004"]


def test_sample_videos_play(whole: Path) -> None:
    videos = sorted((whole / "samples").rglob("*.mp4"))
    assert {video.name.rsplit(".", 2)[1] for video in videos} == {"base", "student", "teacher"}
    assert all(num_frames(video) == 12 for video in videos)
    assert list((whole / "samples").rglob("contact_sheet.png"))


def test_mlflow_has_the_run(whole: Path) -> None:
    tracked, history = mlflow_run(whole)
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["rollout.group_size"] == "2"
    assert tracked.data.params["ds_student.train_batch_size"] == "4"
    assert history == [(row["step"], row["student/loss"]) for row in rows_of(whole)]


def test_mlflow_run_goes_on_after_a_kill(killed: Path) -> None:
    tracked, history = mlflow_run(killed)
    assert tracked.info.status == "FINISHED"
    assert sorted(history) == [(row["step"], row["student/loss"]) for row in rows_of(killed)]


def test_sample_command_writes_the_same_playable_video_twice(whole: Path, run: Any) -> None:
    afd = [str(Path(sys.executable).with_name("afd")), "sample", "--checkpoint", str(whole)]
    for name in ("a.mp4", "b.mp4"):
        done = run([*afd, "--prompt", "a small red ball is dropped", "--out", str(whole.parent / name)])
        assert done.returncode == 0, done.stderr[-4000:]
    assert num_frames(whole.parent / "a.mp4") == 12
    assert (whole.parent / "a.mp4").read_bytes() == (whole.parent / "b.mp4").read_bytes()


def test_evaluate_command_measures_what_the_run_measured(whole: Path, run: Any) -> None:
    done = run([sys.executable, "-m", "afd.cli", "evaluate", "--checkpoint", str(whole)])
    assert done.returncode == 0, done.stderr[-4000:]
    own = json.loads((whole / "evaluation.json").read_text())
    again = json.loads((whole / "evaluation-ema.json").read_text())
    assert (again["commit"], again["weights"]) == (newest_commit(whole).name, "ema")
    assert again["student"] == own["student"]
    assert again["teacher"] == own["teacher"]
    assert "object_permanence" in done.stdout


def test_sample_of_a_word_the_encoder_does_not_know_is_one_line(whole: Path, run: Any) -> None:
    afd = [str(Path(sys.executable).with_name("afd")), "sample", "--checkpoint", str(whole)]
    done = run([*afd, "--prompt", "a purple zeppelin explodes", "--out", str(whole.parent / "c.mp4")])
    assert done.returncode == 2
    assert "error: " in done.stderr.splitlines()[-1]
    assert not (whole.parent / "c.mp4").exists()


def test_finished_run_does_no_further_step_and_fresh_sets_it_aside(
    whole: Path, killed: Path, command: Any, run: Any
) -> None:
    before = (killed / "metrics.jsonl").read_bytes()
    commit = newest_commit(killed)
    weights, changed_at = (commit / "student.safetensors").read_bytes(), os.stat(commit).st_mtime_ns
    facts = (killed / "run.json").read_text()
    assert "resumed_at_step" in facts
    done = run(command("killed"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert (killed / "run.json").read_text() == facts, "duration and start stay those of the training"
    assert (killed / "metrics.jsonl").read_bytes() == before
    assert newest_commit(killed) == commit
    assert os.stat(commit).st_mtime_ns == changed_at

    done = run(command("killed", "--fresh"))
    assert done.returncode == 0, done.stderr[-4000:]
    earlier = killed / "previous-1"
    assert (earlier / "metrics.jsonl").read_bytes() == before
    assert (earlier / "checkpoints" / commit.name / "student.safetensors").read_bytes() == weights
    assert {"report.html", "evaluation.json", "mlflow.db", "samples"} <= {each.name for each in earlier.iterdir()}
    assert [without_time(row) for row in rows_of(killed)] == [without_time(row) for row in rows_of(whole)]
