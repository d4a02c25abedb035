"""The live teacher: what it asks, what it writes, and a training run beside it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from afd.config import RunConfig, TeacherSection
from afd.config_file import load_config
from afd.data.live_loader import part_folder
from afd.data.loader import read_all
from afd.live import LiveTeacher, _heldout_rule, fetch, live_folder, live_source
from afd.preparation import prepare_shards, shard_folders
from afd.teachers.base import SourceReject, VideoRequest, accept_all

OVERRIDES = ["teacher.num_prompts=3", "teacher.num_heldout_prompts=2", "teacher.live.enabled=true"]


def _config(folder: Path, *overrides: str) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(f"output_dir: {folder / 'out'}\n")
    return load_config(path, [*OVERRIDES, *overrides])


class _Recorded:
    """A source that remembers what was wanted, and rejects one request."""

    teacher, version = "physics", ""

    def __init__(self, source, bad=()):
        self.source, self.bad, self.asked = source, bad, []

    def videos(self, wanted=accept_all):
        def seen(request: VideoRequest) -> bool:
            is_wanted = wanted(request)
            self.asked += [request.prompt] * is_wanted
            return is_wanted

        for number, video in enumerate(self.source.videos(seen)):
            yield SourceReject(video.source_id, "blurred") if number in self.bad else video


def test_only_prompts_in_no_shard_are_asked_and_parts_go_on_where_they_ended(tmp_path):
    config = _config(tmp_path, "teacher.live.max_videos=5", "teacher.live.samples_per_part=2")
    prepare_shards(config)
    prepared = [sample.prompt for folder in shard_folders(config) for sample in read_all(folder)]
    source = _Recorded(live_source(config), bad=(1,))
    assert fetch(config, source) == 4
    assert len(source.asked) == 5
    assert not set(source.asked) & set(prepared)
    cache = live_folder(config)
    parts = [read_all(part_folder(cache, number)) for number in (0, 1)]
    assert [sample.prompt for part in parts for sample in part] == [source.asked[i] for i in (0, 2, 3, 4)]
    assert json.loads((cache / "rejects.jsonl").read_text())["reason"] == "blurred"

    again = _Recorded(live_source(config))
    assert fetch(config, again) == 1  # the rejected one is asked again; five is the most
    assert again.asked == [source.asked[1]]
    assert len(read_all(part_folder(cache, 2))) == 1
    other = _config(tmp_path, "video.fps=9")
    with pytest.raises(ValueError, match=r"part-00000 was made with other video, encoders or keep_video settings"):
        fetch(other, live_source(config))


def test_live_needs_a_teacher_that_can_be_asked(tmp_path):
    with pytest.raises(ValueError, match="kind must not be shards"):
        _config(tmp_path, "teacher.kind=shards")
    with (
        pytest.raises(ValueError, match=r"teacher\.http\.spec must be set"),
        LiveTeacher(_config(tmp_path, "teacher.kind=http"), is_main=True),
    ):
        pass
    with LiveTeacher(_config(tmp_path, "teacher.kind=http"), is_main=False):
        pass  # other ranks have nothing to start


def test_prompts_that_preparation_would_hold_out_are_never_asked(tmp_path):
    config = _config(tmp_path)
    heldout = _heldout_rule(config.model_copy(update={"teacher": TeacherSection(kind="folder")}), live_source(config))
    requests = []
    list(live_source(config).videos(lambda request: bool(requests.append(request))))
    assert 1 <= sum(map(heldout, requests)) < len(requests)
    assert not any(map(_heldout_rule(config, live_source(config)), requests))


@pytest.mark.slow
def test_the_process_ends_well_when_the_source_does(tmp_path):
    config = _config(tmp_path, "teacher.live.max_videos=1")
    prepare_shards(config)
    with LiveTeacher(config, is_main=True) as teacher:
        assert teacher._process is not None
        assert teacher._process.wait(120) == 0, (tmp_path / "out" / "live.log").read_text()


@pytest.mark.slow
def test_the_process_ends_with_the_training_even_when_that_is_killed(tmp_path):
    parts = ["teacher.live.samples_per_part=2", "teacher.live.max_videos=6"]
    config = _config(tmp_path, *parts)
    prepare_shards(config)
    program = f"""
import sys, time
from pathlib import Path
from afd.config_file import load_config
from afd.live import LiveTeacher
config = load_config(Path({str(tmp_path / "run.yaml")!r}), {[*OVERRIDES, *parts]!r})
with LiveTeacher(config, is_main=True) as teacher:
    print(teacher._process.pid, flush=True)
    time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    deadline = time.monotonic() + 120
    while not part_folder(live_folder(config), 0).is_dir():
        assert time.monotonic() < deadline, (tmp_path / "out" / "live.log").read_text()
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    number = len(list(live_folder(config).glob("part-*")))
    assert fetch(config, live_source(config)) == max(0, 6 - 2 * number)


def test_environment_of_the_process_has_no_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    started = {}
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **options: started.update(options) or _Ended())
    with LiveTeacher(_config(tmp_path), is_main=True):
        pass
    assert "RANK" not in started["env"]
    assert started["start_new_session"]
    assert started["env"]["PYTHONPATH"].split(os.pathsep)[0] == next(path for path in sys.path if path)


class _Ended:
    """A process that has ended."""

    class stdin:
        close = staticmethod(lambda: None)

    def wait(self, timeout=None):
        del timeout
        return 0
