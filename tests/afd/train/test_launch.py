"""The training command: wrong input is one line and exit code 2 with nothing touched; every launcher starts it."""

import fcntl
import json
import platform
import shutil
import socket
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import yaml

from afd.train import launch, preflight
from afd.train.commit import LOCK, commit_name
from afd.train.launch import main

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain process, whatever started the tests."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder but lock files, which hold no data of the run."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (LOCK, ".lock"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str], output: Path) -> str:
    """The one line that `main` prints for a wrong input, after checking that it wrote nothing."""
    before = contents(output)
    capsys.readouterr()
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Loading weights")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert contents(output) == before
    return lines[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nft.nft_betta=1", "unknown key nft.nft_betta, did you mean nft.nft_beta?"),
        ("gradient_clipping=1", "gradient_clipping belongs in the DeepSpeed JSON (--ds_config), not in the YAML"),
        ("nft.nft_beta=-1", "nft.nft_beta: Input should be greater than 0, got -1"),
        ("rollout.group_size=3", "train_batch_size 4 must be a multiple of rollout.group_size 3 x 1 ranks"),
        ("rollout.group_size=1", "rollout.group_size must be > 1 with nft.baseline = group"),
        ("video.num_frames=13", "video.num_frames must be 3 + a multiple of the student's chunk"),
        ("discriminator.ds_config=nowhere.json", "DeepSpeed config nowhere.json does not exist"),
        ("student.init_from=nowhere.safetensors", "student weights nowhere.safetensors do not exist"),
        ("rollout.steps=[500, 1000]", "steps must be strictly decreasing"),
        ("just words", "override must read section.field=value, got 'just words'"),
        ("--nosuch=1", "unrecognized arguments: --nosuch=1 (see launch/train.py --help)"),
    ],
)
def test_wrong_override_is_one_line(tiny: Any, capsys: pytest.CaptureFixture[str], override: str, message: str) -> None:
    assert message in refusal([*tiny.arguments(), override], capsys, tiny.output)
    assert not tiny.output.exists()


def test_wrong_file_is_one_line(tiny: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "none.json does not exist" in refusal(tiny.arguments(ds="none.json"), capsys, tiny.output)
    different = refusal(tiny.arguments(ds="odd.json"), capsys, tiny.output)
    assert "must be the same in both DeepSpeed JSONs (rollouts per step), got 6 for the student and 4" in different
    config = tmp_path / "bad.yaml"
    config.write_text("a: [1\n")
    assert "is not valid YAML" in refusal(["--config", str(config)], capsys, tiny.output)
    missing = refusal(["--config", str(tmp_path / "none.yaml")], capsys, tiny.output)
    assert missing == f"error: --config {tmp_path / 'none.yaml'} does not exist"


def test_resume_needs_a_commit_and_contradicts_fresh(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert "checkpoints must hold a commit, got none" in refusal(tiny.arguments("--resume"), capsys, tiny.output)
    both = refusal(tiny.arguments("--resume", "--fresh"), capsys, tiny.output)
    assert "--resume and --fresh contradict each other" in both
    assert not tiny.output.exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_after_the_ranks_have_met_each_names_itself_beside_its_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    def fail(arguments: Any) -> int:
        raise OSError("shard.00007 is damaged:\n expected 8 bytes, got 7")

    monkeypatch.setattr(launch, "_run", fail)
    monkeypatch.setenv("RANK", str(rank))
    assert main([]) == 2
    line = "error: shard.00007 is damaged: expected 8 bytes, got 7\n"
    assert capsys.readouterr().err == ("" if rank else line), "before that all ranks fail alike"
    monkeypatch.setattr("afd.distributed.dist.is_initialized", lambda: True)
    monkeypatch.setattr("afd.distributed.dist.get_rank", lambda: rank)
    monkeypatch.setattr("afd.distributed.dist.get_world_size", lambda: 2)
    monkeypatch.setattr("afd.distributed.dist.destroy_process_group", lambda: None)
    assert main([]) == 2
    assert capsys.readouterr().err == line.replace("error", f"error (rank {rank} on {platform.node()})")


def test_missing_and_empty_shard_folders_are_named(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(tiny.arguments(teacher__kind="shards"), capsys, tiny.output)
    assert f"shard folder {tiny.output / 'data' / 'train'} must hold index.json, which is missing" in line
    assert not tiny.output.exists()
    (tiny.output / "data" / "train").mkdir(parents=True)
    assert "must hold index.json" in refusal(tiny.arguments(teacher__kind="shards"), capsys, tiny.output)
    (tiny.output / "data" / "train" / "index.json").write_text('{"version": 2, "shards": []}')
    shutil.copytree(tiny.output / "data" / "train", tiny.output / "data" / "heldout")
    assert str(tiny.output / "data" / "train") in refusal(tiny.arguments(teacher__kind="shards"), capsys, tiny.output)


def test_what_the_built_in_world_did_not_make_is_never_replaced(
    tiny: Any, capsys: pytest.CaptureFixture[str], clean_environment: None
) -> None:
    precious = tiny.output / "data" / "heldout"
    precious.mkdir(parents=True)
    (precious / "thesis.txt").write_text("years of work")
    line = refusal(tiny.arguments(), capsys, tiny.output)
    assert f"{precious} holds no dataset.json, so it is no dataset and never replaced" in line
    (precious / "dataset.json").write_text('{"metadata": {"teacher": {"kind": "folder"}}}')
    line = refusal(tiny.arguments(), capsys, tiny.output)
    assert f"{precious} exists already, prepared from teacher.kind=folder with other settings" in line


def test_a_fresh_run_leaves_what_was_paid_for_where_it_is(
    tiny: Any, capsys: pytest.CaptureFixture[str], clean_environment: None, tmp_path: Path
) -> None:
    stays = ["teacher/journal.jsonl", "paid/videos/a.mp4", "live/part-00000/index.json", "data/heldout/thesis.txt"]
    moves = ["metrics.jsonl", "checkpoints/latest"]
    for name in stays + moves:
        (tiny.output / name).parent.mkdir(parents=True, exist_ok=True)
        (tiny.output / name).write_text(name)
    (tiny.output / "teacher").rename(tmp_path / "disk")
    (tiny.output / "teacher").symlink_to(tmp_path / "disk")
    knobs = {
        "teacher__http__work_dir": str(tiny.output / "paid" / ".." / "paid"),
        "teacher__live__cache": str(tiny.output / "live"),
    }
    assert main(tiny.arguments("--fresh", **knobs)) == 2  # for what stands in data/heldout
    assert all((tiny.output / name).read_text() == name for name in stays)
    assert all((tiny.output / "previous-1" / name).read_text() == name for name in moves)
    knobs["teacher__pipeline__work_dir"] = str(tiny.output)
    line = refusal(tiny.arguments("--fresh", **knobs), capsys, tiny.output)
    assert f"--fresh would set aside what the teacher or the data section keeps in {tiny.output} itself" in line


def test_folder_in_use_by_another_run_is_refused(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.output.mkdir()
    with (tiny.output / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 4711 on somewhere\n")
        lock.flush()
        line = refusal(tiny.arguments(), capsys, tiny.output)
    assert line == f"error: output folder {tiny.output} is in use by another run: process 4711 on somewhere"


def test_full_disk_is_refused_before_anything_is_written(
    tiny: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2**40, 2**40 - 2**20, 2**20))
    line = refusal(tiny.arguments(), capsys, tiny.output)
    assert "needs about 0.3 GiB, only 0.0 GiB are free" in line
    assert not tiny.output.exists()


def test_commits_that_make_room_for_others_are_not_counted_twice(
    tiny: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2**40, 0, 3 * 2**29))
    monkeypatch.setattr(preflight, "_commit_bytes", lambda work: 2**30)
    knobs = ["checkpoint.keep=2", "--dry_run"]
    assert "needs about 3.2 GiB, only 1.5 GiB are free" in refusal(tiny.arguments(*knobs), capsys, tiny.output)
    for step in (1, 2, 3):
        (tiny.output / "checkpoints" / commit_name(step)).mkdir(parents=True)
    assert main(tiny.arguments(*knobs)) == 0
    assert main(tiny.arguments(*knobs, "--fresh")) == 2


def test_dry_run_shows_the_plan_and_touches_nothing(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tiny.arguments("--dry_run")) == 0
    text = capsys.readouterr().out
    assert "rollouts per step N = 4 = 2 prompts x G 2" in text
    assert "rollouts x^S             [4, 12, 12, 4, 4]   4 chunks of 3 frames" in text
    assert "ZeRO stage 3" in text
    assert not tiny.output.exists()


def test_an_output_folder_is_taken_as_it_stands(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*tiny.arguments("--dry_run"), "--output_dir", f"{tiny.output} #2"]) == 0
    line = yaml.safe_dump({"output_dir": f"{tiny.output} #2"})  # quoted, and a long path goes on in the next line
    assert line.startswith(f"output_dir: '{tiny.output}")
    assert line in capsys.readouterr().out


@pytest.mark.slow
def test_other_runs_and_damaged_shards_are_refused_untouched(
    tiny: Any, capsys: pytest.CaptureFixture[str], run: Any, clean_environment: None
) -> None:
    done = run(tiny.command(num_steps="1", tracking__mlflow="false"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert not (tiny.output / "mlflow.db").exists()
    other = str(tiny.inputs / "other.safetensors")
    line = refusal(tiny.arguments(student__init_from=other), capsys, tiny.output)
    assert f"output_dir {tiny.output} holds a run with num_layers 1, not 2: choose another output_dir" in line
    line = refusal(tiny.arguments(student__lora__rank="2", teacher__num_prompts="9"), capsys, tiny.output)
    assert "holds a run with another LoRA; another teacher" in line
    line = refusal(tiny.arguments(discriminator__kind="backbone"), capsys, tiny.output)
    assert "holds a run with another discriminator" in line

    shard = next((tiny.output / "data" / "train").glob("shard.*.zstd"))
    shutil.copytree(tiny.output / "data", tiny.inputs / "data", dirs_exist_ok=True)
    copy = tiny.inputs / "data" / "train" / shard.name
    damaged = bytearray(copy.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    copy.write_bytes(damaged)
    elsewhere = {
        "teacher__kind": "shards",
        "data__train_shards": str(copy.parent),
        "data__heldout_shards": str(tiny.inputs / "data" / "heldout"),
        "tracking__mlflow": "false",
    }
    fresh = type(tiny)(tiny.inputs, tiny.output.with_name("fresh"), tiny.knobs)
    assert f"{copy} is damaged" in refusal(fresh.arguments(**elsewhere), capsys, fresh.output)
    wrong = {**elsewhere, "data__train_shards": elsewhere["data__heldout_shards"], "video__num_frames": "9"}
    line = refusal(fresh.arguments(**wrong), capsys, fresh.output)
    assert "latents must be [12, 9, 4, 4], got [12, 12, 4, 4]" in line


@pytest.mark.slow
def test_damaged_newest_commit_goes_on_from_the_one_before(tiny: Any, run: Any) -> None:
    assert run(tiny.command(num_steps="3")).returncode == 0
    metrics = tiny.output / "metrics.jsonl"

    def rows() -> list[dict[str, float]]:
        decoded = [json.loads(line) for line in metrics.read_text().splitlines()]
        return [{name: each for name, each in row.items() if not name.startswith("time")} for row in decoded]

    before = rows()
    weights = tiny.output / "checkpoints" / commit_name(3) / "student.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    done = run(tiny.command(num_steps="3"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "damaged commit, trying the one before it" in done.stderr
    assert rows() == before, "step 3 once, with the same numbers"


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "ranks"),
    [
        ([sys.executable], 1),
        (["deepspeed"], 1),
        (["deepspeed", "--num_gpus", "2"], 2),
        ([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"], 2),
    ],
    ids=["python", "deepspeed", "deepspeed --num_gpus 2", "torchrun --nproc_per_node 2"],
)
def test_every_launcher_runs_a_step(tiny: Any, run: Any, launcher: list[str], ranks: int) -> None:
    port = ["--master_port", free_port()] if launcher[0] == "deepspeed" else []
    done = run([*launcher, *port, *tiny.command(num_steps="1")[1:]])
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    facts = json.loads((tiny.output / "run.json").read_text())
    assert facts["ranks"] == ranks
    assert len((tiny.output / "metrics.jsonl").read_text().splitlines()) == 1
    assert (tiny.output / "report.html").is_file()
    assert "gravity_error" in done.stdout


@pytest.mark.slow
def test_bad_input_under_two_ranks_is_said_once(tiny: Any, run: Any) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run([*launcher, *tiny.command(nft__nft_betta="1")[1:]])
    assert done.returncode != 0
    assert done.stderr.count("error: unknown key nft.nft_betta, did you mean nft.nft_beta?") == 1
    assert not tiny.output.exists()
