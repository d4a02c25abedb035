"""Checkpoints: a resumed run is the uninterrupted run bit for bit, and nothing damaged or foreign is loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from afd.train import checkpoint
from afd.train.checkpoint import find_commit, read_student_weights
from afd.train.commit import commit_name, persist_files, publish, write_manifest

WORKER = Path(__file__).with_name("checkpoint_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def trained(folder: Path, launch: Any) -> dict[str, Any]:
    """Six uninterrupted steps on 2 ranks; commits of steps 2 and 3 remain."""
    leftover = folder / f"{commit_name(9)}.tmp-dead"
    leftover.mkdir()
    (leftover / "half").write_text("written")
    result = launch(WORKER, "train", str(folder), ranks=2)
    result["folder"] = sorted(entry.name for entry in folder.iterdir())
    newest = folder / commit_name(3)
    result["raw"], result["ema"] = read_student_weights(newest), read_student_weights(newest, average="ema")
    result["files"] = sorted(each.relative_to(newest).as_posix() for each in newest.rglob("*") if each.is_file())
    result["latest"] = (folder / "latest").read_text()
    return result


@pytest.fixture(scope="module")
def resumed(trained: dict[str, Any], folder: Path, launch: Any) -> dict[str, Any]:
    """The same run continued in new processes: from step 3, and from step 2 after step 3 was damaged."""
    result = launch(WORKER, "resume", str(folder), ranks=2)
    result["folder"] = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and "step" in entry.name)
    return result


@pytest.fixture(scope="module")
def refused(resumed: dict[str, Any], folder: Path, launch: Any) -> dict[str, str]:
    return launch(WORKER, "refuse", str(folder), ranks=1)


def test_folder_holds_the_newest_commits_only(trained: dict[str, Any]) -> None:
    assert trained["folder"] == [".run.lock", "latest", commit_name(2), commit_name(3)]
    assert trained["latest"] == f"{commit_name(3)}\n"


def test_commit_holds_everything(trained: dict[str, Any]) -> None:
    assert {
        "MANIFEST.json",
        "config.yaml",
        "student.safetensors",
        "averages/ema.safetensors",
        "ranks/rank_00000.pt",
        "ranks/rank_00001.pt",
    } <= set(trained["files"])


def test_resume_equals_the_uninterrupted_run_bitwise(trained: dict[str, Any], resumed: dict[str, Any]) -> None:
    whole = resumed["whole"]
    assert whole["step"] == 3
    assert whole["config"] == "step: 3\n"
    assert whole["losses"] == trained["losses"][3:]
    assert whole["drawn"] == trained["drawn"]
    assert whole["weights"] == trained["weights"]


def test_damaged_newest_commit_falls_back_to_the_one_before(trained: dict[str, Any], resumed: dict[str, Any]) -> None:
    assert resumed["damaged"]["step"] == 2
    assert resumed["damaged"]["losses"] == trained["losses"][2:]
    assert resumed["damaged"]["weights"] == trained["weights"]


def test_commits_of_an_abandoned_future_are_set_aside(resumed: dict[str, Any]) -> None:
    # The resumed run saved step 2 again: the old step 2 and the later step 3 must not win the next resume.
    assert resumed["folder"] == [f"abandoned_{commit_name(2)}_1", f"abandoned_{commit_name(3)}_1", commit_name(2)]


def test_used_engines_are_refused(resumed: dict[str, Any]) -> None:
    assert "student engine has already taken 6 steps: resume in a new process" in resumed["whole"]["used"]


def test_resumed_run_takes_its_optimizer_settings_from_the_configuration(resumed: dict[str, Any]) -> None:
    """What is in the commit may be a scale, a schedule or a JSON of before; only a scheduler goes on."""
    settings = resumed["settings"]
    assert settings["other"] == [[0.5, [0.5, 0.6], 0.25]] * 2
    assert settings["then"] == settings["first"]
    assert all(0 < rate < 1 for rate, *_ in settings["then"])


def test_scheduler_without_a_state_to_go_on_from_is_refused(resumed: dict[str, Any]) -> None:
    told = resumed["settings"]["added"]
    assert "was trained with 'scheduler' none in its DeepSpeed JSON, this run's has WarmupLR, which would have" in told


def test_other_weights_under_what_is_trained_are_refused(resumed: dict[str, Any]) -> None:
    """Frozen parameters and dmd's real score are not in the commit: their digests are."""
    assert f"{commit_name(2)} was trained on other frozen weights of student (SHA-256 " in resumed["base"]
    assert "start from the same weights (student.init_from, dmd.real_score" in resumed["base"]
    assert "was trained on other frozen weights of real_score (SHA-256 " in resumed["real_score"]


def test_another_world_or_model_is_refused_before_loading(refused: dict[str, str]) -> None:
    assert "was written by 2 ranks, this run has 1: start with 2 ranks, or begin a new run from" in refused["world"]
    assert "is a checkpoint of another student: 6 tensors, 73 parameters" in refused["model"]
    assert (
        "holds engines ['discriminator', 'student'] and averages ['ema'], this run has ['student']" in refused["roles"]
    )


def test_state_that_needs_pickle_is_refused_when_saving(refused: dict[str, str]) -> None:
    assert refused["state"] == "state['bad'][1] must be a tensor or a plain Python value, got float64"


def test_too_little_disk_is_one_clear_error_on_every_rank(trained: dict[str, Any]) -> None:
    assert trained["full"].startswith("checkpoint needs about ")
    assert trained["full"].endswith(" GiB are free")


def test_a_frozen_weight_costs_its_own_size_once() -> None:
    student, discriminator = (torch.nn.Sequential(torch.nn.Linear(9, 100), torch.nn.Linear(3, 5)) for _ in range(2))
    for module in (student, discriminator):
        module[0].bfloat16().requires_grad_(False)
    engines: Any = {"student": student, "discriminator": discriminator}
    averages: Any = {"old": None, "ema": None, "reference": None}
    expected = 1000 * 2 + 20 * (12 + 4 + 4 * (1 + 3)) + 20 * (12 + 4)
    assert checkpoint._estimated_bytes(engines, averages) == checkpoint.RESERVE_BYTES + expected


def test_student_weights_need_no_deepspeed(trained: dict[str, Any]) -> None:
    raw, ema = trained["raw"], trained["ema"]
    assert set(raw) == {*(f"{n}.{p}" for n in (0, 3, 4) for p in ("weight", "bias")), "scale"}
    assert raw["0.weight"].shape == (7, 4)
    assert raw["0.weight"].dtype == torch.float32
    assert torch.equal(raw["3.weight"], ema["3.weight"])  # frozen: no average of its own
    assert not torch.equal(raw["0.weight"], ema["0.weight"])


def test_reading_damaged_or_absent_weights_is_an_error(resumed: dict[str, Any], folder: Path) -> None:
    commit = folder / commit_name(2)
    with pytest.raises(ValueError, match=r"has no average 'old', only \['ema'\]"):
        read_student_weights(commit, average="old")
    file = commit / "student.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-4] + b"abcd")
    with pytest.raises(ValueError, match=r"student\.safetensors is missing or damaged"):
        read_student_weights(commit)
    file.write_bytes(content)


def test_fallback_names_the_damaged_commit_in_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        temporary = tmp_path / f"{commit_name(step)}.tmp-00"
        temporary.mkdir()
        (temporary / "weights").write_text("0123456789")
        write_manifest(temporary, {"step": step, "files": persist_files(temporary, ["weights"])})
        publish(temporary, tmp_path / commit_name(step))
    (tmp_path / commit_name(2) / "weights").write_text("0123456780")
    with caplog.at_level("WARNING"):
        assert find_commit(tmp_path) == tmp_path / commit_name(1)
    assert f"{tmp_path / commit_name(2)}: weights does not match its SHA-256" in caplog.text


def test_no_commit_is_none_but_no_good_commit_is_an_error(tmp_path: Path) -> None:
    assert find_commit(tmp_path / "absent") is None
    assert find_commit(tmp_path) is None
    (tmp_path / commit_name(4)).mkdir()
    with pytest.raises(ValueError, match=r"none of the 1 commits in .* verifies .*MANIFEST.json cannot be read"):
        find_commit(tmp_path)
