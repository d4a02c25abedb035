"""The http teacher never pays twice: unknown outcomes, kills, budgets and the journal, against a real server."""

import json
import random
import subprocess
import sys
import time

import pytest
import yaml

from afd.teachers.base import SourceReject
from afd.teachers.http_journal import Journal


@pytest.mark.parametrize("fault", ["accept_drop", "hang", "drop", 500, "malformed"])
def test_unknown_submit_is_settled_by_look_up(serve, tmp_path, fault):
    service = serve()
    service.faults["submit"].append(fault)
    videos, rejects = service.split(service.source(service.spec("task_id"), tmp_path, ["a cat"]).videos())
    assert (len(videos), rejects, len(service.submits), service.calls["lookup"]) == (1, [], 1, 1)


def test_a_look_up_that_fails_never_pays_again(serve, tmp_path):
    service = serve()
    service.faults["submit"].append("accept_drop")
    service.faults["lookup"].extend([500] * 5)
    spec = service.spec("task_id", lookup__missing=[7])
    for reason in ("look-up: HTTP 500", "look-up: code is 1203"):  # 1203 is an error here, not "no such task"
        service.jobs.clear()
        videos, rejects = service.split(service.source(spec, tmp_path, ["a cat"]).videos())
        assert videos == []
        assert reason in rejects[0].reason
    assert len(service.submits) == 1


def test_unknown_submit_is_repeated_with_its_idempotency_key(serve, tmp_path):
    service = serve()
    # The 429 in between says nothing about the first submit, which was accepted: the key must stay the same.
    service.faults["submit"].extend(["accept_drop", 429, 500, "drop"])
    source = service.source(service.spec("content"), tmp_path, ["a cat"], max_calls=1)
    videos, rejects = service.split(source.videos())
    assert (len(videos), rejects, len(service.submits), service.calls["submit"]) == (1, [], 1, 5)
    service.faults["submit"].append(429)
    assert len(service.split(service.source(service.spec("content"), tmp_path, ["a dog"]).videos())[0]) == 1
    assert len(service.replies) == 2


def test_unknown_submit_without_either_is_held_and_counts(serve, tmp_path):
    service = serve()
    spec = service.spec("file_id")
    service.faults["submit"].append("accept_drop")
    _, rejects = service.split(service.source(spec, tmp_path, ["a cat"], max_calls=1).videos())
    assert "outcome of the submit is unknown" in rejects[0].reason
    assert not rejects[0].is_final
    _, rejects = service.split(service.source(spec, tmp_path, ["a cat", "a dog"], max_calls=1).videos())
    assert "on_unknown: resubmit" in rejects[0].reason
    assert "budget: 1 requests not made" in rejects[1].reason
    assert service.calls["submit"] == 1
    videos, _ = service.split(service.source(spec, tmp_path, ["a cat"], may_resubmit=True, max_calls=2).videos())
    assert (len(videos), len(service.submits)) == (1, 2)  # as the setting warns


def test_expired_idempotency_key_is_not_trusted(serve, tmp_path):
    service = serve()
    service.faults["submit"].append("accept_drop")
    spec = service.spec("content", submit__idempotency_ttl_s=0.0001)
    _, rejects = service.split(service.source(spec, tmp_path, ["a cat"]).videos())
    assert "outcome of the submit is unknown" in rejects[0].reason
    assert service.calls["submit"] == 1


class _KilledError(BaseException):
    """Ends the client where a SIGKILL would."""


@pytest.mark.parametrize("shape", ["task_id", "content", "file_id", "base64"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_client_killed_around_every_journal_line_never_pays_twice(serve, tmp_path, monkeypatch, shape, moment):
    service = serve()
    spec, write = service.spec(shape), Journal._write
    for number in range(3):
        left = [number]

        def write_or_die(self, name, event, left=left, **values):
            left[0] -= 1
            if left[0] == -1 and moment == "before":
                raise _KilledError
            entry = write(self, name, event, **values)
            if left[0] == -1:
                raise _KilledError
            return entry

        monkeypatch.setattr(Journal, "_write", write_or_die)
        folder, prompt = tmp_path / str(number), f"prompt {number}"
        if shape in ("base64",) and number == 2:
            continue  # intent and done are all it writes
        with pytest.raises(_KilledError):
            list(service.source(spec, folder, [prompt]).videos())
        monkeypatch.setattr(Journal, "_write", write)
        videos, rejects = service.split(service.source(spec, folder, [prompt]).videos())
        # Without key or look-up, an accepted submit that was not written down cannot be known: it is held.
        is_unknown = shape == "file_id" and (number, moment) in ((0, "after"), (1, "before"))
        assert len(videos) == (0 if is_unknown else 1), rejects
        assert len([job for job in service.submits if job["prompt"] == prompt]) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["task_id", "content"])
def test_a_client_killed_for_real_never_pays_twice(serve, tmp_path, shape):
    service = serve(polls_until_done=8)
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(service.spec(shape).model_dump(mode="json")))
    prompts = [f"p{i}" for i in range(12)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    program = f"""
from pathlib import Path
from afd.config import HttpSection, RunConfig, TeacherSection
from afd.teachers.sources import open_source
http = HttpSection(spec=Path({str(path)!r}), backoff_s=0.01, retries=9, work_dir=Path({str(tmp_path / "work")!r}))
teacher = TeacherSection(kind="http", prompts=Path({str(tmp_path / "prompts.txt")!r}), http=http)
print("ready", flush=True)
print(*(type(video).__name__ for video in open_source(RunConfig(teacher=teacher)).videos()))
"""
    random.seed(shape)
    for _ in range(7):
        client = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        assert client.stdout is not None
        assert client.stdout.readline() == "ready\n"
        calls = service.calls.total() + random.randrange(1, 12)
        while service.calls.total() < calls and client.poll() is None:
            time.sleep(0.001)
        client.kill()
        client.wait()
    assert len(service.submits) > 0
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.split() == ["ready", *["SourceVideo"] * 12]
    assert service.paid() == {(prompt, None): 1 for prompt in prompts}


def test_budget_holds_over_runs_and_threads(serve, tmp_path):
    service = serve()
    spec, prompts = service.spec("prediction"), [f"p{i}" for i in range(9)]
    videos, rejects = service.split(
        service.source(spec, tmp_path, prompts, max_cost=2.5, concurrency=4).videos()
    )  # 0.8 each
    assert (len(videos), len(service.submits)) == (3, 3)
    assert rejects == [
        SourceReject("http:example-prediction-budget", "budget: 6 requests not made after 3 calls, 2.4 in money", False)
    ]
    videos, rejects = service.split(service.source(spec, tmp_path, prompts, max_cost=3.2).videos())
    assert (len(videos), len(service.submits), len(rejects)) == (4, 4, 1)
    assert (
        service.split(service.source(spec, tmp_path, prompts, max_calls=0).videos())[0] == videos
    )  # what is paid is still given
    with pytest.raises(ValueError, match="max_cost needs cost_per_call"):
        service.source(service.spec("prediction", cost_per_call=None), tmp_path, prompts, max_cost=1.0)


def test_torn_and_damaged_journals(serve, tmp_path):
    service = serve()
    spec = service.spec("task_id")
    list(service.source(spec, tmp_path, ["a", "b"]).videos())
    path = tmp_path / "journal.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"unix_s": 1, "request": "x", "ev')
    assert len(service.split(service.source(spec, tmp_path, ["a", "b"]).videos())[0]) == 2
    assert path.read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"{}\n", *lines[1:]]))
    with pytest.raises(ValueError, match="line 2 is damaged"):
        next(service.source(spec, tmp_path, ["a"]).videos())
    assert [json.loads(line)["event"] for line in lines].count("done") == 2
