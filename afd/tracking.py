"""Experiment tracking that cannot stop a run.

The truth is the journal `metrics.jsonl` in the output folder (`afd.journal`), flushed at every step. A daemon thread
reads it from a saved byte offset and sends what is new to MLflow in batches. The journal is the queue: nothing piles up
in memory, a slow or dead server costs the training thread nothing, and what was not sent is known and replayed by
`sync`. Drawing curves is `afd.evaluation.report`'s.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import urlsplit

from afd.journal import (
    EVENTS,
    METRICS,
    STATE,
    TrackingState,
    count_unsent,
    locked,
    metric_batches,
    open_journals,
    read_records,
    read_state,
    write_state,
)

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)

SEND_EVERY_S = 2.0
RETRY_AFTER_S = (5.0, 15.0, 60.0, 300.0)
CLOSE_TIMEOUT_LOCAL_S, CLOSE_TIMEOUT_REMOTE_S = 60.0, 15.0
MAX_METRICS_PER_REQUEST, MAX_PARAMS_PER_REQUEST, MAX_PARAM_CHARS = 1000, 100, 6000
MLFLOW_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker(Protocol):
    """What the trainer needs of a tracker."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step; several calls for the same step are allowed."""
        ...

    def log_artifact(self, path: Path) -> None:
        """Record a finished file of the output folder."""
        ...

    def close(self, status: RunStatus = "FINISHED") -> None:
        """Flush and end the run; calling it twice is harmless."""
        ...


class NullTracker:
    """Tracker of every rank but the first: records nothing."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Do nothing."""

    def log_artifact(self, path: Path) -> None:
        """Do nothing."""

    def close(self, status: RunStatus = "FINISHED") -> None:
        """Do nothing."""


@dataclass(frozen=True)
class SyncSummary:
    """What one delivery sent."""

    run_id: str
    num_records: int
    num_artifacts: int


class JournalTracker:
    """Write the journals and nothing else: tracking without MLflow, and the local half of tracking with it."""

    def __init__(
        self, output_dir: Path, fresh: TrackingState | None = None, *, resumed_step: int | None = None
    ) -> None:
        """Open the journals of a new run (`resumed_step` None; older ones are set aside) or of a resumed one.

        `fresh` names the run for MLflow, should it be synced later; default experiment and run name say `afd`.
        """
        self._dir = Path(output_dir)
        self._dir.mkdir(parents=True, exist_ok=True)
        with locked(self._dir):
            write_state(self._dir, open_journals(self._dir, fresh or TrackingState("afd", "afd"), resumed_step))
        self._note({"status": "RUNNING"})
        self._journal = (self._dir / METRICS).open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one record to the journal and flush it.

        Raises:
            ValueError: a metric is not a number, or the tracker is closed.
        """
        if self._journal.closed:
            raise ValueError("the tracker is closed; log before close()")
        record: dict[str, float | int] = {"step": int(step), "time_unix_s": round(time.time(), 3)}
        for name, value in metrics.items():
            if name in record:
                raise ValueError(f"metric name {name!r} is reserved by the journal")
            try:
                record[name] = float(value)
            except (TypeError, ValueError):
                raise ValueError(f"metric {name!r} must be a number, got {value!r}") from None
        self._journal.write(json.dumps(record) + "\n")
        self._journal.flush()

    def log_artifact(self, path: Path) -> None:
        """Note a finished file; it stays where it is.

        Raises:
            FileNotFoundError: there is no such file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"artifact must be a file, got {path}")
        resolved, home = path.resolve(), self._dir.resolve()
        self._note({"path": resolved.relative_to(home).as_posix() if resolved.is_relative_to(home) else str(resolved)})

    def close(self, status: RunStatus = "FINISHED") -> None:
        """Note how the run ended and close the journal; calling it twice is harmless."""
        if not self._journal.closed:
            self._journal.close()
            self._note({"status": status})

    def _note(self, event: dict[str, str]) -> None:
        with (self._dir / EVENTS).open("a", encoding="utf-8") as events:
            events.write(json.dumps(event) + "\n")


class MLflowTracker(JournalTracker):
    """Journal every metric, and let a daemon thread carry the journal to MLflow."""

    def __init__(
        self,
        output_dir: Path,
        experiment: str,
        run_name: str,
        params: Mapping[str, object],
        *,
        tags: Mapping[str, str] | None = None,
        resumed_step: int | None = None,
        tracking_uri: str | None = None,
    ) -> None:
        """Open the journal and start the sender.

        Args:
            output_dir: the run's folder; made if absent.
            experiment, run_name: names in MLflow.
            params: flat or nested configuration; nested keys are joined by dots.
            tags: free-form strings, such as the commit.
            resumed_step: last step of the checkpoint the run resumes from; later records are dropped from the journal
                and the same MLflow run goes on. None starts a new run; an older journal is kept under another name.
            tracking_uri: default `MLFLOW_TRACKING_URI`, else a SQLite file in `output_dir`.
        """
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or None
        fresh = TrackingState(experiment, run_name, flatten_params(params), dict(tags or {}), tracking_uri=uri)
        super().__init__(output_dir, fresh, resumed_step=resumed_step)
        self._is_local = uri is None
        self._closing = threading.Event()
        self._sender = threading.Thread(target=self._send_until_closed, name="mlflow-sender", daemon=True)
        self._sender.start()

    def close(self, status: RunStatus = "FINISHED") -> None:
        """Send what is left, wait for it a bounded time, and say what could not be sent."""
        if self._journal.closed:
            return
        super().close(status)
        self._closing.set()
        self._sender.join(CLOSE_TIMEOUT_LOCAL_S if self._is_local else CLOSE_TIMEOUT_REMOTE_S)
        unsent = count_unsent(self._dir)
        if unsent:
            logger.warning("%d records are not in MLflow yet; send them with: afd track sync %s", unsent, self._dir)

    def _send_until_closed(self) -> None:
        failures = 0
        errors = _mlflow_errors()
        while True:
            is_last = self._closing.is_set()
            try:
                deliver(self._dir)
            except errors as error:
                if failures == 0:
                    logger.warning(
                        "MLflow at %s does not take metrics (%s); they stay in %s and are sent when it answers",
                        _public_uri(read_state(self._dir)),
                        _first_line(error),
                        self._dir / METRICS,
                    )
                failures += 1
            else:
                failures = 0
            if is_last:
                return
            self._closing.wait(RETRY_AFTER_S[min(failures, len(RETRY_AFTER_S)) - 1] if failures else SEND_EVERY_S)


def sync(output_dir: Path) -> SyncSummary:
    """Send to MLflow whatever a run could not send: `afd track sync`.

    Args:
        output_dir: the run's folder.
    Raises:
        FileNotFoundError: the folder holds no tracked run.
        ConnectionError: MLflow did not take it; nothing is lost, run it again.
    """
    output_dir = Path(output_dir)
    if not (output_dir / STATE).is_file():
        raise FileNotFoundError(f"no tracked run in {output_dir}: {STATE} is missing")
    errors = _mlflow_errors()
    try:
        return deliver(output_dir)
    except errors as error:
        uri = _public_uri(read_state(output_dir))
        raise ConnectionError(f"MLflow at {uri} does not take metrics: {_first_line(error)}") from None


def deliver(output_dir: Path) -> SyncSummary:
    """Send every unsent record once, in order, saving the position after each request.

    Returns:
        The run's id and how many journal records and artifacts were sent.
    Raises:
        Any error of MLflow, requests or the file system; the saved position stays right.
    """
    with locked(output_dir):
        state = read_state(output_dir)
        client = _client(output_dir, state)
        state = _ensure_run(client, output_dir, state)
        run_id = state.run_id
        assert run_id is not None
        num_records = num_artifacts = 0
        batches = metric_batches(output_dir / METRICS, state.metrics_offset, max_metrics=MAX_METRICS_PER_REQUEST)
        for records, offset in batches:
            metrics = [item for record in records for item in _as_metrics(record, state.resend_from_step)]
            if metrics:
                client.log_batch(run_id, metrics=metrics)
            num_records += len(records)
            state = replace(state, metrics_offset=offset)
            write_state(output_dir, state)
        for event, offset in read_records(output_dir / EVENTS, state.events_offset):
            if "status" in event:
                client.update_run(run_id, status=event["status"])
            else:
                num_artifacts += _send_artifact(client, run_id, output_dir, Path(event["path"]))
            state = replace(state, events_offset=offset)
            write_state(output_dir, state)
    return SyncSummary(run_id, num_records, num_artifacts)


def flatten_params(params: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Flatten nested mappings to dotted keys and strings, as MLflow wants parameters."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat |= flatten_params(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)[:MAX_PARAM_CHARS]
    return flat


def _send_artifact(client: MlflowClient, run_id: str, output_dir: Path, path: Path) -> int:
    """Send one file under its folder's name; a file that is gone by now is passed over. Return how many were sent."""
    if not (output_dir / path).is_file():
        logger.warning("artifact %s is gone and is not sent to MLflow", output_dir / path)
        return 0
    folder = None if path.is_absolute() or path.parent == Path() else path.parent.as_posix()
    client.log_artifact(run_id, str(output_dir / path), artifact_path=folder)
    return 1


def _as_metrics(record: dict[str, Any], resend_from_step: int) -> list[Any]:
    from mlflow.entities import Metric

    step, at_ms = int(record["step"]), int(record["time_unix_s"] * 1000)
    if step < resend_from_step:
        return []
    return [Metric(k, v, at_ms, step) for k, v in record.items() if k not in ("step", "time_unix_s")]


def _client(output_dir: Path, state: TrackingState) -> MlflowClient:
    for name, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # its retries would warn beside our one warning
    if state.tracking_uri is not None:
        return MlflowClient(tracking_uri=state.tracking_uri)
    database = output_dir.resolve() / "mlflow.db"
    if not database.exists():
        _create_database(database)
    return MlflowClient(tracking_uri=f"sqlite:///{database}")


def _create_database(database: Path) -> None:
    """Make MLflow's SQLite file under another name first: a run killed meanwhile leaves no half-made tables behind."""
    from mlflow.tracking import MlflowClient

    draft = database.with_name(f".{database.name}.draft")
    for leftover in database.parent.glob(f"{draft.name}*"):
        leftover.unlink()
    MlflowClient(tracking_uri=f"sqlite:///{draft}").search_experiments(max_results=1)
    os.replace(draft, database)


def _ensure_run(client: MlflowClient, output_dir: Path, state: TrackingState) -> TrackingState:
    """Create the experiment and the run if MLflow has none yet, and send params and tags once."""
    from mlflow.entities import Param, RunTag

    if state.run_id is None:
        experiment = client.get_experiment_by_name(state.experiment)
        location = (output_dir.resolve() / "mlflow_artifacts").as_uri() if state.tracking_uri is None else None
        experiment_id = (
            experiment.experiment_id
            if experiment is not None
            else client.create_experiment(state.experiment, artifact_location=location)
        )
        run = client.create_run(experiment_id, run_name=state.run_name)
        state = replace(state, run_id=run.info.run_id)
        write_state(output_dir, state)
    if not state.described:
        run_id = state.run_id
        assert run_id is not None
        params = [Param(key, value) for key, value in state.params.items()]
        for start in range(0, len(params), MAX_PARAMS_PER_REQUEST):
            client.log_batch(run_id, params=params[start : start + MAX_PARAMS_PER_REQUEST])
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in state.tags.items()])
        state = replace(state, described=True)
        write_state(output_dir, state)
    return state


def _mlflow_errors() -> tuple[type[Exception], ...]:
    """Return the errors that mean MLflow is unreachable or refuses, not that our code is wrong."""
    for name, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, requests.RequestException, SQLAlchemyError, OSError)


def _first_line(error: Exception) -> str:
    """Shorten an error to one line, without the user and password of any address in it."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"//[^/@\s]+@", "//", line)[:200]


def _public_uri(state: TrackingState) -> str:
    """Name the store without any user or password in its address."""
    if state.tracking_uri is None:
        return "the run's own SQLite file"
    parts = urlsplit(state.tracking_uri)
    return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"
