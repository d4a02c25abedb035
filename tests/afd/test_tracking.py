import json
import logging
import socket
import time
from pathlib import Path

import pytest

from afd.journal import METRICS, count_unsent, read_metrics, read_state
from afd.tracking import JournalTracker, MLflowTracker, NullTracker, Tracker, deliver, flatten_params, sync


def dead_address() -> str:
    """Return a loopback address nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def make_tracker(folder: Path, **options: object) -> MLflowTracker:
    return MLflowTracker(folder, "experiment", "run", {"student": {"lr": 1e-4}}, tags={"commit": "abc"}, **options)  # pyright: ignore[reportArgumentType]


def stored_run(folder: Path):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder.resolve() / 'mlflow.db'}")
    run_id = read_state(folder).run_id
    assert run_id is not None
    return client, client.get_run(run_id)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return a freshly migrated SQLite store: making one takes seconds, copying it none."""
    folder = tmp_path_factory.mktemp("store")
    make_tracker(folder).close()
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    state = read_state(folder)
    assert state.run_id is not None
    client.delete_run(state.run_id)
    client.rename_experiment(client.get_experiment_by_name("experiment").experiment_id, "empty")  # pyright: ignore[reportOptionalMemberAccess]
    return (folder / "mlflow.db").read_bytes()


@pytest.fixture
def folder(tmp_path: Path, empty_store: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output folder with a ready SQLite store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_bytes(empty_store)
    return tmp_path


def test_metrics_params_tags_and_artifacts_reach_the_sqlite_store(folder: Path):
    tracker: Tracker = make_tracker(folder)
    for step in (1, 2, 3):
        tracker.log(step, {"student/loss": 1.0 / step, "student/lr": 1e-4})
    sheet = folder / "samples" / "step_000003" / "contact_sheet.png"
    sheet.parent.mkdir(parents=True)
    sheet.write_bytes(b"picture")
    tracker.log_artifact(sheet)
    tracker.close()
    client, run = stored_run(folder)
    assert run.data.params == {"student.lr": "0.0001"}
    assert run.data.tags["commit"] == "abc"
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "student/loss")
    assert [(item.step, item.value) for item in history] == [(1, 1.0), (2, 0.5), (3, 1.0 / 3)]
    names = [item.path for item in client.list_artifacts(run.info.run_id, "samples/step_000003")]
    assert names == ["samples/step_000003/contact_sheet.png"]
    assert count_unsent(folder) == 0


def test_journal_holds_every_step_before_close(folder: Path):
    tracker = make_tracker(folder)
    tracker.log(1, {"student/loss": 0.5})
    assert [record["student/loss"] for record in read_metrics(folder / METRICS)] == [0.5]
    tracker.close()


def test_resume_drops_later_steps_and_continues_the_same_mlflow_run(folder: Path):
    first = make_tracker(folder)
    for step in range(1, 7):
        first.log(step, {"student/loss": float(step)})
    first.close("KILLED")
    run_id = read_state(folder).run_id
    resumed = make_tracker(folder, resumed_step=4)
    assert [record["step"] for record in read_metrics(folder / METRICS)] == [1, 2, 3, 4]
    for step in range(5, 9):
        resumed.log(step, {"student/loss": float(step)})
    resumed.close()
    client, run = stored_run(folder)
    assert run.info.run_id == run_id
    assert run.info.status == "FINISHED"
    assert [record["step"] for record in read_metrics(folder / METRICS)] == list(range(1, 9))
    history = client.get_metric_history(run.info.run_id, "student/loss")
    assert {item.step for item in history} == set(range(1, 9))
    assert len(history) <= 9, "only the last step sent before the interruption may be sent again"


def test_resume_survives_a_torn_last_line(folder: Path):
    first = make_tracker(folder)
    first.log(1, {"student/loss": 1.0})
    first.close()
    with (folder / METRICS).open("a") as journal:
        journal.write('{"step": 2, "stud')
    resumed = make_tracker(folder, resumed_step=1)
    resumed.log(2, {"student/loss": 2.0})
    resumed.close()
    assert [record["step"] for record in read_metrics(folder / METRICS)] == [1, 2]


def test_a_new_run_keeps_the_older_journal_under_another_name(folder: Path):
    first = make_tracker(folder)
    first.log(7, {"student/loss": 1.0})
    first.close()
    second = make_tracker(folder)
    second.log(1, {"student/loss": 2.0})
    second.close()
    assert [record["step"] for record in read_metrics(folder / METRICS)] == [1]
    (older,) = folder.glob("metrics.before-*.jsonl")
    assert [record["step"] for record in read_metrics(older)] == [7]


def test_a_dead_server_costs_training_nothing_and_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING, logger="afd.tracking")
    began = time.monotonic()
    tracker = make_tracker(tmp_path, tracking_uri=dead_address())
    for step in range(200):
        tracker.log(step, {"student/loss": 0.1})
    logging_s = time.monotonic() - began
    tracker.close()
    assert logging_s < 1.0
    assert time.monotonic() - began < 25.0
    assert len(read_metrics(tmp_path / METRICS)) == 200
    warnings = [record.getMessage() for record in caplog.records if record.name == "afd.tracking"]
    assert sum("does not take metrics" in text for text in warnings) == 1
    assert sum("afd track sync" in text for text in warnings) == 1
    assert count_unsent(tmp_path) == 202  # 200 steps, and the run's start and end
    with pytest.raises(ConnectionError, match="does not take metrics"):
        sync(tmp_path)


@pytest.mark.slow
def test_a_server_that_never_answers_delays_only_close_and_only_so_long(tmp_path: Path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        tracker = make_tracker(tmp_path, tracking_uri=f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        tracker.log(1, {"student/loss": 0.1})
        assert time.monotonic() - began < 0.5
        tracker.close()
        assert time.monotonic() - began < 20.0
    assert count_unsent(tmp_path) == 3


def test_sync_replays_what_a_dead_server_missed(folder: Path):
    tracker = make_tracker(folder, tracking_uri=dead_address())
    for step in (1, 2):
        tracker.log(step, {"student/loss": float(step)})
    tracker.close()
    state = folder / "tracking.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"tracking_uri": None}))
    summary = sync(folder)
    assert summary.num_records == 2
    client, run = stored_run(folder)
    assert [item.value for item in client.get_metric_history(run.info.run_id, "student/loss")] == [1.0, 2.0]
    assert deliver(folder).num_records == 0, "a second delivery has nothing left to send"


def test_sync_names_a_folder_without_a_run(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"tracking\.json is missing"):
        sync(tmp_path)


def test_log_rejects_what_is_not_a_number(folder: Path):
    tracker = make_tracker(folder)
    with pytest.raises(ValueError, match="'student/loss' must be a number, got 'low'"):
        tracker.log(1, {"student/loss": "low"})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="'step' is reserved"):
        tracker.log(1, {"step": 2.0})
    with pytest.raises(FileNotFoundError, match="artifact must be a file"):
        tracker.log_artifact(folder / "absent.png")
    tracker.close()
    with pytest.raises(ValueError, match="closed"):
        tracker.log(2, {"student/loss": 1.0})


def test_no_password_reaches_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING, logger="afd.tracking")
    address = dead_address().replace("http://", "http://user:secret@")
    make_tracker(tmp_path, tracking_uri=address).close()
    assert "does not take metrics" in caplog.text
    with pytest.raises(ConnectionError) as caught:
        sync(tmp_path)
    assert "secret" not in str(caught.value)
    own = [record.getMessage() for record in caplog.records if record.name == "afd.tracking"]
    assert not any("secret" in text for text in own)


def test_params_are_flattened_to_dotted_names():
    assert flatten_params({"a": {"b": {"c": 1}}, "d": True}) == {"a.b.c": "1", "d": "True"}


def test_journal_tracker_leaves_mlflow_alone_until_it_is_synced(folder: Path):
    store = (folder / "mlflow.db").read_bytes()
    tracker: Tracker = JournalTracker(folder)
    tracker.log(1, {"student/loss": 1.0})
    tracker.close()
    assert (folder / "mlflow.db").read_bytes() == store
    assert sync(folder).num_records == 1


def test_null_tracker_records_nothing(tmp_path: Path):
    tracker: Tracker = NullTracker()
    tracker.log(1, {"student/loss": 1.0})
    tracker.log_artifact(tmp_path / "absent.png")
    tracker.close()
    assert not list(tmp_path.iterdir())
