"""One commit on disk: every kind of damage is found, publication is atomic, the folder has one owner."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from afd.train.commit import (
    MANIFEST,
    RunLock,
    commit_name,
    commit_problems,
    list_commits,
    list_files,
    persist_files,
    prune,
    publish,
    read_manifest,
    remove_leftovers,
    write_manifest,
)


def make_commit(output: Path, step: int) -> Path:
    folder = output / f"{commit_name(step)}.tmp-1a2b"
    (folder / "student").mkdir(parents=True)
    (folder / "student" / "weights.pt").write_bytes(bytes(range(200)))
    (folder / "config.yaml").write_text(f"step: {step}\n")
    write_manifest(folder, {"step": step, "files": persist_files(folder, list_files(folder))})
    final = output / commit_name(step)
    publish(folder, final)
    return final


def flip_bit(folder: Path) -> None:
    file = folder / "student" / "weights.pt"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(bytes(content))


def edit_manifest(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"size": 200', '"size": 201'))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit flip": (flip_bit, "student/weights.pt does not match its SHA-256"),
    "missing": (lambda folder: (folder / "config.yaml").unlink(), "config.yaml is missing"),
    "short": (lambda folder: os.truncate(folder / "student" / "weights.pt", 50), "has 50 bytes, the manifest says 200"),
    "extra pickle": (lambda folder: (folder / "student" / "evil.pt").touch(), "unlisted student/evil.pt"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "MANIFEST.json cannot be read"),
    "half a manifest": (lambda folder: os.truncate(folder / MANIFEST, 40), "MANIFEST.json is not a manifest"),
    "edited manifest": (edit_manifest, "MANIFEST.json was altered after it was written"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_named(tmp_path: Path, damage: str) -> None:
    commit = make_commit(tmp_path, 3)
    assert commit_problems(commit) == []
    action, expected = DAMAGES[damage]
    action(commit)
    (problem,) = commit_problems(commit)
    assert expected in problem
    assert str(commit) in problem


def test_ranks_share_the_hashing(tmp_path: Path) -> None:
    commit = make_commit(tmp_path, 3)
    flip_bit(commit)
    assert sorted(len(commit_problems(commit, rank=rank, size=2)) for rank in (0, 1)) == [0, 1]


def test_a_note_beside_the_files_is_no_damage(tmp_path: Path) -> None:
    commit = make_commit(tmp_path, 3)
    (commit / "notes.txt").write_text("best run so far")
    assert commit_problems(commit) == []


def test_commits_are_listed_newest_first_without_unfinished_ones(tmp_path: Path) -> None:
    for step in (5, 100, 20):
        make_commit(tmp_path, step)
    (tmp_path / f"{commit_name(200)}.tmp-dead").mkdir()
    assert [step for step, _ in list_commits(tmp_path)] == [100, 20, 5]
    assert (tmp_path / "latest").read_text() == f"{commit_name(20)}\n"
    assert read_manifest(tmp_path / commit_name(100))["step"] == 100


def test_leftovers_of_dead_runs_are_removed(tmp_path: Path) -> None:
    make_commit(tmp_path, 5)
    for name in (f"{commit_name(6)}.tmp-0f0f", f"{commit_name(4)}.tmp-pruned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    (tmp_path / "samples.tmp-1").mkdir()
    remove_leftovers(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "samples.tmp-1", commit_name(5)]


def test_prune_keeps_the_newest_and_sets_a_rolled_back_future_aside(tmp_path: Path) -> None:
    for step in (1, 2, 3, 9):
        make_commit(tmp_path, step)
    prune(tmp_path, newest=3, keep=2)
    folders = sorted(entry.name for entry in tmp_path.iterdir() if entry.is_dir())
    assert folders == [f"abandoned_{commit_name(9)}_1", commit_name(2), commit_name(3)]


def test_publishing_a_step_again_sets_the_old_commit_aside(tmp_path: Path) -> None:
    make_commit(tmp_path, 3)
    make_commit(tmp_path, 3)
    make_commit(tmp_path, 3)
    folders = sorted(entry.name for entry in tmp_path.iterdir() if entry.is_dir())
    assert folders == [f"abandoned_{commit_name(3)}_{number}" for number in (1, 2)] + [commit_name(3)]


def test_locked_folder_names_its_owner_and_is_free_again_when_it_dies(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom afd.train.commit import RunLock\n"
        f"with RunLock({str(tmp_path)!r}):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"is in use by another run: process {holder.pid} on "), RunLock(tmp_path):
            pass
        holder.kill()
        holder.wait()
    with RunLock(tmp_path):
        pass


def test_manifest_is_readable_json(tmp_path: Path) -> None:
    commit = make_commit(tmp_path, 3)
    body = json.loads((commit / MANIFEST).read_text())["body"]
    assert body["files"]["student/weights.pt"]["size"] == 200
