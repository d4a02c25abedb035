"""The http teacher against a real server: every shape, every fault, and never a second payment."""

import logging
import threading
import time
from pathlib import Path

import pytest

from afd.teachers.http import HttpSource
from afd.teachers.http_spec import load_spec

SHAPES = sorted(path.stem for path in (Path(__file__).parents[3] / "configs" / "teachers").glob("*.yaml"))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shipped_shape_is_asked_once_and_never_again(serve, tmp_path, shape):
    service = serve(polls_until_done=2)
    spec = service.spec(shape)
    videos, rejects = service.split(service.source(spec, tmp_path, ["a cat & dog?", "día"], (3, 4)).videos())
    assert rejects == []
    assert [(v.prompt, v.seed) for v in videos] == [(p, s) for p in ("a cat & dog?", "día") for s in (3, 4)]
    assert len(service.submits) == 4
    assert sorted(v.read() for v in videos) == sorted(job["mp4"] for job in service.submits)
    assert {(v.teacher, v.version) for v in videos} == {(f"http:{spec.name}", spec.version)}
    for video, job in ((v, j) for v in videos for j in service.submits if j["seed"] is not None):
        assert (video.read() == job["mp4"]) == ((video.prompt, video.seed) == (job["prompt"], job["seed"]))
    calls = service.calls.copy()
    again, _ = service.split(service.source(spec, tmp_path, ["a cat & dog?", "día"], (3, 4)).videos())
    assert again == videos
    assert service.calls == calls


FAULTS = {
    "submit_429": ("submit", [(429, {"Retry-After": "0"}), 429]),
    "poll_500": ("poll", [500, 502, 503]),
    "poll_429": ("poll", [(429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})]),
    "poll_404_at_first": ("poll", [404]),
    "poll_hangs": ("poll", ["hang"]),
    "poll_drops": ("poll", ["drop", "drop"]),
    "poll_malformed": ("poll", ["malformed", "page"]),
    "download_short": ("download", ["short", "short"]),
    "download_cut": ("download", ["cut"]),
    "download_error_page": ("download", ["page"]),
    "download_expired": ("download", [403, 404]),
    "download_hangs": ("download", ["hang"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_that_pass_cost_nothing(serve, tmp_path, name):
    service = serve(polls_until_done=2)
    kind, faults = FAULTS[name]
    service.faults[kind].extend(faults)
    videos, rejects = service.split(service.source(service.spec("task_id"), tmp_path, ["a cat"]).videos())
    assert rejects == []
    assert videos[0].read() == service.submits[0]["mp4"]
    assert len(service.submits) == 1
    assert not service.faults[kind]
    assert [path.name for path in (tmp_path / "videos").iterdir()] == [f"{videos[0].source_id}.mp4"]


def test_retry_after_is_honoured(serve, tmp_path):
    service = serve()
    service.faults["submit"].append((429, {"Retry-After": "0.4"}))
    begin = time.monotonic()
    service.split(service.source(service.spec("task_id"), tmp_path, ["a cat"]).videos())
    assert service.submit_times[0] - begin > 0.39


def test_faults_that_stay_are_rejects_and_the_next_run_goes_on_polling(serve, tmp_path):
    service = serve()
    service.faults["poll"].extend([500] * 5)
    spec = service.spec("task_id")
    videos, rejects = service.split(service.source(spec, tmp_path, ["a cat"]).videos())
    assert videos == []
    assert "poll: HTTP 500" in rejects[0].reason
    assert not rejects[0].is_final
    videos, rejects = service.split(service.source(spec, tmp_path, ["a cat"]).videos())
    assert (len(videos), len(rejects), len(service.submits)) == (1, 0, 1)


def test_a_slow_request_is_left_to_the_next_run(serve, tmp_path):
    service = serve(polls_until_done=10**6)
    spec = service.spec("task_id", poll__timeout_s=0.05)
    _, rejects = service.split(service.source(spec, tmp_path, ["a cat"]).videos())
    assert "not finished after 0.05 s" in rejects[0].reason
    service.polls_until_done = 0
    assert len(service.split(service.source(spec, tmp_path, ["a cat"]).videos())[0]) == len(service.submits) == 1


def test_failed_status_is_final_and_refunded_where_the_service_does_not_charge(serve, tmp_path):
    service = serve()
    spec = service.spec("task_id")
    prompts = ["forbidden 1", "forbidden 2", "fine"]
    videos, rejects = service.split(service.source(spec, tmp_path, prompts, max_calls=1, concurrency=1).videos())
    assert [video.prompt for video in videos] == ["fine"]
    assert all("the service failed it: failed moderated ***" in reject.reason for reject in rejects)
    assert all(reject.is_final for reject in rejects)
    charging = service.spec("task_id", failed_is_charged=True, name="charging")
    _, rejects = service.split(service.source(charging, tmp_path / "2", prompts, max_calls=1, concurrency=1).videos())
    assert "budget: 2 requests not made after 1 calls, 0.5 in money" in rejects[-1].reason


def test_nothing_shows_the_key(serve, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    service = serve()
    spec, prompts = service.spec("task_id"), ["forbidden", "a", "b"]
    service.faults["submit"].extend([400, 500, (429, {"X-Echo": service.key})])
    service.faults["poll"].extend([500, "malformed"])
    source = service.source(spec, tmp_path, prompts)
    outcomes = list(source.videos())
    service.is_key_right = False
    with pytest.raises(ValueError, match="submit refused: HTTP 401 bad key") as refused:
        list(service.source(spec, tmp_path, ["c"]).videos())
    assert service.calls["submit"] >= 4
    shown = [repr(outcomes), repr(vars(source)), str(refused.value), caplog.text, repr(refused.value.__cause__)]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 2
    for secret in (service.key, service.key[:12], service.key[-12:], "sk-very%2Fsecret"):
        assert not any(secret in text for text in shown)
        assert not any(secret.encode() in path.read_bytes() or secret in path.name for path in files)


def test_the_key_goes_to_its_own_host_only(serve, tmp_path):
    service, other = serve(), serve()
    for shape, is_sent in (("task_id", False), ("content", True)):
        service.split(service.source(service.spec(shape), tmp_path / shape, ["a cat"]).videos())
        assert service.keys_seen[-1] == ("download", is_sent)
        assert all(sent for kind, sent in service.keys_seen if kind != "download")
    other.jobs["x"] = service.submits[0]
    service.faults["download"].append(f"redirect:{other.url}/files/x")
    videos, _ = service.split(service.source(service.spec("content"), tmp_path / "redirected", ["a dog"]).videos())
    assert videos[0].read() == service.submits[0]["mp4"]
    assert service.keys_seen[-1] == ("download", True)
    assert other.keys_seen == [("download", False)]


REFUSALS = {
    "redirect:file:///etc/passwd": "redirect refused: to a file: address",
    "redirect:ftp://127.0.0.1/x": "redirect refused: to a ftp: address",
    "redirect:http://user@host/x": "redirect refused: address must be http",
    "big": "over the limit of 100000 bytes",
}


@pytest.mark.parametrize("fault", REFUSALS)
def test_hostile_downloads_are_refused(serve, tmp_path, fault):
    service = serve()
    service.faults["download"].append(fault)
    videos, rejects = service.split(
        service.source(service.spec("task_id"), tmp_path, ["a cat"], max_bytes=100_000).videos()
    )
    assert videos == []
    assert REFUSALS[fault] in rejects[0].reason
    assert list((tmp_path / "videos").iterdir()) == []


def test_hostile_addresses_in_answers_are_refused(serve, tmp_path):
    service = serve()
    spec = service.spec("task_id", result={"path": "data.task_status"})  # "succeed" is no address
    _, rejects = service.split(service.source(spec, tmp_path, ["a cat"], retries=1).videos())
    assert "address must be http(s)://host/..., got 'succeed'" in rejects[0].reason
    moved = serve()
    moved.faults["submit"].append("redirect:http://127.0.0.1:1/")
    with pytest.raises(ValueError, match="submit refused: HTTP 302"):
        list(service.source(moved.spec("task_id"), tmp_path / "moved", ["a cat"]).videos())


def test_concurrency_order_and_rate(serve, tmp_path):
    service = serve(polls_until_done=8)
    spec, prompts = service.spec("task_id"), [f"p{i}" for i in range(12)]
    videos, _ = service.split(service.source(spec, tmp_path, prompts, concurrency=3).videos())
    assert [video.prompt for video in videos] == prompts
    assert 2 <= service.most_open <= 3

    service.submit_times.clear()
    source = service.source(spec, tmp_path / "rate", prompts, concurrency=3, requests_per_minute=60 / 0.04)
    service.split(source.videos())
    assert service.submit_times[-1] - service.submit_times[0] > 0.9 * 11 * 0.04


def test_ending_early_leaves_open_requests_to_the_next_run(serve, tmp_path):
    service = serve(polls_until_done=3)
    spec, prompts = service.spec("task_id"), [f"p{i}" for i in range(6)]
    iterator = service.source(spec, tmp_path, prompts, concurrency=2).videos()
    next(iterator)
    iterator.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(spec.name)]
    assert len(service.split(service.source(spec, tmp_path, prompts).videos())[0]) == 6
    assert max(service.paid().values()) == 1


def test_one_process_at_a_time(serve, tmp_path):
    service = serve()
    iterator = service.source(service.spec("task_id"), tmp_path, ["a", "b"]).videos()
    next(iterator)
    with pytest.raises(ValueError, match="in use by another process"):
        next(service.source(service.spec("task_id"), tmp_path, ["a"]).videos())
    iterator.close()


def test_single_question(serve, tmp_path):
    service = serve()
    source = service.source(service.spec("task_id"), tmp_path, [])
    assert source.generate("a cat", 1).mp4 == service.submits[0]["mp4"]
    with pytest.raises(ValueError, match="the service failed it"):
        source.generate("forbidden", 1)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ("name: '../x'", "name: String should match pattern"),
        ("url: ftp://api.example.com/", "address must be http"),
        ('body: {prompt: "{promt}"}', "submit: unknown name {promt}, known are prompt, "),
        ("retry: 3", "retry: Extra inputs"),
        ("key: sk-123", "key: Extra inputs"),
        ("auth: {env: K, value: Bearer sk-123}", "auth.value must hold {key}"),
        ("result: {kind: url}", "result.path must say where"),
        ("- 1", "no valid YAML"),
        ("result: {path: a}\nresult: {path: b}", "no valid YAML: key 'result' appears twice, in lines"),
    ],
)
def test_wrong_specs_say_what_is_wrong(tmp_path, changed, problem):
    field = changed.split(":")[0]
    lines = {
        "name": "name: acme", "auth": "", "submit": "submit:", "url": "  url: http://h/v1", "body": "",
        "result": "result: {path: video.url}",
    }  # fmt: skip
    lines[field] = ("  " if field in ("url", "body") else "") + changed
    path = tmp_path / "spec.yaml"
    path.write_text("\n".join(lines.values()))
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_spec(path)
    assert problem in str(error.value)


def test_missing_or_odd_keys_are_named_but_not_shown(serve, tmp_path):
    spec = serve().spec("task_id")
    with pytest.raises(ValueError, match="environment variable EXAMPLE_API_KEY must hold the key"):
        HttpSource(spec, list, work_dir=tmp_path, environment={})
    with pytest.raises(ValueError, match="printable ASCII") as error:
        HttpSource(spec, list, work_dir=tmp_path, environment={"EXAMPLE_API_KEY": "two\nlines"})
    assert "two" not in str(error.value)
