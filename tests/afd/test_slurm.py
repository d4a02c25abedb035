"""Batch scripts run by the real bash with srun, scontrol and deepspeed replaced by a recorder: what was said is what
arrives. The scripts under a real controller: tests/launch/slurm."""

import os
import random
import shlex
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from afd.slurm import KINDS, SlurmJob, directive_quote, rank_variables, render, shell_quote, time_limit_s

RECORDER = """\
#!{python} -IS
import os, sys
with open({record!r}, "ab") as file:
    file.write(b"\\0".join(os.fsencode(word) for word in [os.path.basename(sys.argv[0]), *sys.argv[1:]]) + b"\\0\\n\\0")
name = os.path.basename(sys.argv[0])
if name == "scontrol" and "hostnames" in sys.argv:
    print("node1")
if name == "scontrol" and "node" in sys.argv:
    print("NodeName=node1 NodeAddr=10.0.0.1 State=IDLE")
if name == "scontrol" and "job" in sys.argv:
    print("JobId=41 PreemptTime=" + os.environ.get("PREEMPTED", "None"))
sys.exit(int(os.environ.get("EXIT_CODE", "0")) if name == "srun" and not "check" in sys.argv else 0)
"""
PIECES = (
    *("$(touch CANARY)", "`touch CANARY`", "; touch CANARY;", "| touch CANARY", "&& touch CANARY", "&touch CANARY"),
    *("'; touch CANARY; '", '"; touch CANARY; "', "\\", "'", '"', "$HOME", "${IFS}", "!!", "*", "?", "[a-z]", "~", "#"),
    *(
        "%j",
        "%%",
        "{{ 7 * 7 }}",
        "{% raw %}",
        "-rf",
        "--",
        "=",
        "<(touch CANARY)",
        "> CANARY",
        " ",
        "  ",
        "é",
        "\u202e",
    ),
    *("\U0001f600", "\\n", "$'\\n'", "EOF", ")", "(", "}", "{", "a,b", "\u00a0", "|| touch CANARY", "$((1+1))", "=(x)"),
)


def hostile_strings(count: int) -> list[str]:
    """Strings that mean something to a shell, a template or Slurm; the seed is fixed."""
    draw = random.Random(8)
    strings = list(PIECES)
    while len(strings) < count:
        parts = [draw.choice(PIECES) for _ in range(draw.randint(1, 5))]
        parts.insert(draw.randrange(len(parts) + 1), "".join(draw.choices(string.printable[:94], k=draw.randint(0, 9))))
        strings.append("".join(parts))
    return strings[:count]


def job(**changes: Any) -> SlurmJob:
    values = {"workdir": "/", "output_dir": "/nowhere", "gpus_per_node": 0, "ranks_per_node": 2}
    return SlurmJob(**(values | changes))


class Recorded:
    """A folder of recorders that a rendered script finds first on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.canary = folder, folder / "CANARY"
        self.record = folder / "record"
        (folder / "bin").mkdir()
        for name in ("srun", "scontrol", "deepspeed", "touch", "sleep"):
            program = folder / "bin" / name
            program.write_text(RECORDER.format(python=sys.executable, record=str(self.record)))
            program.chmod(0o755)

    def run(self, script: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        variables = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "HOME": "/home",
            "SLURM_JOB_ID": "41",
            "SLURM_JOB_NODELIST": "node1",
        }
        return subprocess.run(
            ["bash", "-s"], input=script, env=variables | environment, cwd=self.folder,
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def calls(self, program: str) -> list[list[str]]:
        lines = self.record.read_bytes().decode().split("\0\n\0") if self.record.exists() else []
        return [line.split("\0")[1:] for line in lines if line.split("\0")[0] == program]


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    return Recorded(tmp_path)


def test_a_thousand_hostile_strings_arrive_as_they_are_and_nothing_runs(recorded: Recorded) -> None:
    hostile = hostile_strings(1000)
    assert len(set(hostile)) > 950
    workdir = recorded.folder / "a 'b' $(touch CANARY)"
    workdir.mkdir()
    script = render(
        job(
            workdir=str(workdir),
            overrides=tuple(hostile),
            config=hostile[0],
            ds_config=hostile[1],
            python=f"{recorded.folder}/$(touch CANARY)/srun",
            output_dir=f"{recorded.folder}/{hostile[2]}",
            name=hostile[3],
            log_dir=hostile[4],
            partition=hostile[5],
            environment={f"V{number}": each for number, each in enumerate(hostile[:50])},
            mounts=(f"{hostile[6]}:/data",),
            container=hostile[7],
            container_runtime="apptainer",
        )
    )
    done = recorded.run(script)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    check, train = recorded.calls("srun")
    assert check[-1000:] == hostile
    assert train[-1000:] == hostile
    start = train.index("launch/train.py")
    assert train[start + 1 : start + 5] == ["--config", hostile[0], "--ds_config", hostile[1]]
    assert train[start - 1] == f"{recorded.folder}/$(touch CANARY)/srun"
    assert train[start - 4 : start - 1] == ["--bind", f"{hostile[6]}:/data", hostile[7]]
    assert recorded.calls("touch") == []
    assert not list(recorded.folder.rglob("CANARY*"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_passes_hostile_overrides_on(recorded: Recorded, kind: Any) -> None:
    hostile = hostile_strings(120)
    sweep = (tuple(hostile[60:]), ("seed=1",)) if kind == "sweep" else ()
    changes: dict[str, Any] = {} if kind in ("single", "prepare") else {"nodes": 3}
    first = hostile[:60] if sweep else hostile
    script = render(job(kind=kind, overrides=tuple(first), sweep=sweep, **changes))
    array = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "40"} if sweep else {}
    done = recorded.run(script, **array)
    assert done.returncode == 0, done.stderr
    call = recorded.calls("deepspeed" if kind == "deepspeed" else "srun")[-1]
    expected = [*hostile, "output_dir=/nowhere/0"] if sweep else hostile
    assert call[-len(expected) :] == expected
    assert recorded.calls("touch") == []


@pytest.mark.parametrize("bad", ["a\nb", "a\rb", "\x00", "\x1b[31m", "\x7f", "\x85", "\u2028", "\ud800"])
@pytest.mark.parametrize("field", ["name", "output_dir", "overrides", "environment", "container", "time", "workdir"])
def test_newlines_and_control_characters_are_refused_with_the_options_name(bad: str, field: str) -> None:
    value: Any = {"overrides": (bad,), "environment": {"NAME": bad}}.get(field, bad)
    with pytest.raises(ValueError, match=f"{field.replace('name', 'name')}.* must hold no newline"):
        render(job().model_copy(update={field: value}))


def test_endless_and_empty_values_are_refused() -> None:
    with pytest.raises(ValueError, match="name must have at most 4096 characters, got 5000"):
        render(job(name="a" * 5000))
    with pytest.raises(ValueError, match="partition a Slurm option's value must not be empty"):
        render(job(partition=""))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90:30", 5430), ("1:00:05", 3605), ("2-12", 216000), ("2-12:30", 217800), ("1-00:00:01", 86401),
     ("unlimited", None)],
)  # fmt: skip
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: int | None) -> None:
    assert time_limit_s(text) == seconds


def test_directives_escape_what_sbatch_would_read_differently() -> None:
    assert directive_quote("gpu-a100:2,x_1.sh/%x=@+") == "gpu-a100:2,x_1.sh/%x=@+"
    assert directive_quote('a b "#') == "'a b \"#'"
    assert directive_quote("it's \\") == "'it\\'s \\\\'"
    assert "#SBATCH --output=out%%put/%x-%j.log\n" in render(job(log_dir="out%put"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "single", "nodes": 2}, "--nodes must be 1 for single, got 2"),
        ({"gpus_per_node": 8}, "one per GPU, got 2 for 8 GPUs"),
        ({"kind": "sweep"}, "sweep needs at least one --sweep line"),
        ({"sweep": (("a=1",),)}, "sweep needs at least one --sweep line and no other kind has any, got 1"),
        ({"environment": {"A B": "1"}}, "--env must be NAME=VALUE with a plain name, got 'A B'"),
        ({"kind": "deepspeed", "environment": {"NCCL_IB_HCA": "a,b"}}, "must hold no comma with --kind deepspeed"),
        ({"kind": "deepspeed", "container": "x", "container_runtime": "apptainer"}, "not through apptainer"),
        ({"time": "4"}, "--time must be longer than --signal-lead-s 240, got '4' = 240 s"),
        ({"time": "soon"}, "--time must be like 90, 90:00, 24:00:00, 2-12 or 2-12:30:00, got 'soon'"),
        ({"time": "1\n"}, "--time must be like"),
        ({"mounts": ("a:b,c:d",)}, "--mount must be SOURCE:TARGET or SOURCE:TARGET:OPTIONS without a comma"),
        ({"mounts": ("/data",)}, "--mount must be SOURCE:TARGET or SOURCE:TARGET:OPTIONS without a comma, got '/data'"),
        ({"mounts": ("a:b:ro:c",)}, "--mount must be SOURCE:TARGET or SOURCE:TARGET:OPTIONS"),
        ({"container": "x", "workdir": "/a,b"}, "must have no comma or colon in its path, got '/a,b'"),
        ({"container": "x", "workdir": "/a b"}, "pyxis mounts no path with a space, got '/a b'"),
        ({"container": "x", "mounts": ("/a b:/c",)}, "pyxis mounts no path with a space, got '/a b:/c'"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job(**changes)


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, 0, False), (1, 0, False), (2, 0, False), (75, 0, True), (76, 3, True), (75, 5, False), (143, 0, False)],
)
def test_only_a_run_that_was_asked_to_stop_goes_back_into_the_queue(
    recorded: Recorded, code: int, restarts: int, requeued: bool
) -> None:
    done = recorded.run(render(job(max_requeues=5)), EXIT_CODE=str(code), SLURM_RESTART_COUNT=str(restarts))
    assert done.returncode == code
    assert (["requeue", "41"] in recorded.calls("scontrol")) == requeued
    assert ("after 5 requeues: not again" in done.stderr) == (restarts == 5)


def test_sigterm_means_a_requeue_only_where_slurm_preempted_the_job(recorded: Recorded) -> None:
    script = render(job(kind="evaluate"))
    assert recorded.run(script, EXIT_CODE="143").returncode == 143, "srun ended it because another rank failed"
    assert ["requeue", "41"] not in recorded.calls("scontrol")
    assert recorded.run(script, EXIT_CODE="143", PREEMPTED="2026-01-01T00:00:00").returncode == 75
    assert ["requeue", "41"] in recorded.calls("scontrol")


def test_marker_stands_for_the_exit_code_that_torchrun_hides(recorded: Recorded) -> None:
    output = recorded.folder / "run"
    output.mkdir()
    script = render(job(kind="torchrun", output_dir=str(output)))
    (output / "stopped.json").write_text("{}")
    assert recorded.run(script, EXIT_CODE="1").returncode == 1, "a marker of an earlier start is removed"
    script = script.replace("rm -f -- ", "true ")
    (output / "stopped.json").write_text("{}")
    assert recorded.run(script, EXIT_CODE="1").returncode == 75


def test_an_array_task_requeues_itself_and_not_the_array(recorded: Recorded) -> None:
    script = render(job(kind="sweep", sweep=(("seed=0",), ("seed=1",))))
    recorded.run(script, EXIT_CODE="75", SLURM_ARRAY_TASK_ID="1", SLURM_ARRAY_JOB_ID="40")
    assert ["requeue", "40_1"] in recorded.calls("scontrol")
    assert recorded.run(script, SLURM_ARRAY_TASK_ID="2").returncode == 2


def test_preparation_ended_by_a_signal_goes_on_later(recorded: Recorded) -> None:
    recorded.run(render(job(kind="prepare")), EXIT_CODE="143")
    assert ["requeue", "41"] in recorded.calls("scontrol")


def test_staged_shards_are_what_the_run_reads(recorded: Recorded) -> None:
    script = render(job(stage_to="/scratch/me", overrides=("a=1",), nodes=2))
    assert recorded.run(script).returncode == 0
    stage, check, train = recorded.calls("srun")
    assert stage[stage.index("stage") :] == [
        "stage",
        "--config",
        "configs/quickstart.yaml",
        "--to",
        "/scratch/me",
        "a=1",
    ]
    assert "--ntasks=2" in stage
    own = ["a=1", "data.train_shards=/scratch/me/train", "data.heldout_shards=/scratch/me/heldout"]
    assert train[-3:] == check[-3:] == own
    assert "--ntasks=4" in train


def test_health_check_can_be_left_out_and_its_failure_starts_nothing(recorded: Recorded) -> None:
    assert recorded.run(render(job(health_check=False))).returncode == 0
    assert len(recorded.calls("srun")) == 1
    failing = render(job()).replace("launch check", "launch failing")
    done = recorded.run(failing, EXIT_CODE="1")
    assert done.returncode == 3
    assert "nothing was started" in done.stderr
    assert len(recorded.calls("srun")) == 2


def test_pyxis_goes_to_srun_and_apptainer_before_the_command(recorded: Recorded) -> None:
    """Options as in the pyxis wiki (Usage) and apptainer-exec(1)."""
    image, workdir = "nvcr.io#nvidia/py torch:$(touch CANARY) é'\"", str(recorded.folder)
    recorded.run(render(job(container=image, mounts=("/data:/data:ro",), workdir=workdir)))
    srun = recorded.calls("srun")[-1]
    flags = [f"--container-image={image}", f"--container-mounts={workdir}:{workdir},/data:/data:ro",
             f"--container-workdir={workdir}", "--no-container-mount-home"]  # fmt: skip
    start = srun.index(flags[0])
    assert srun[start : start + 4] == flags
    assert srun[start + 4 : start + 6] == ["python", "launch/train.py"]

    image = "a 'b' $(touch CANARY).sif"
    apptainer = job(
        container=image, container_runtime="apptainer", gpus_per_node=2, mounts=("/a b:/c",), workdir=workdir
    )
    recorded.run(render(apptainer))
    srun = recorded.calls("srun")[-1]
    assert srun[srun.index("apptainer") : srun.index("python")] == [
        "apptainer", "exec", "--nv", "--pwd", workdir, "--bind", f"{workdir}:{workdir}", "--bind", "/a b:/c", image
    ]  # fmt: skip
    assert "PYTHONNOUSERSITE" not in render(job())
    assert recorded.calls("touch") == []


def test_deepspeeds_launcher_gets_pyxis_options_that_survive_its_own_splitting(recorded: Recorded) -> None:
    image = "reg.io#a b:$(touch CANARY) é'\"\\"
    recorded.run(render(job(kind="deepspeed", container=image, workdir=str(recorded.folder))))
    call = recorded.calls("deepspeed")[-1]
    words = shlex.split(call[call.index("--launcher_args") + 1])  # as deepspeed/launcher/multinode_runner.py does
    assert words[:3] == ["--kill-on-bad-exit=1", "--ntasks-per-node=2", "--cpus-per-task=8"]
    assert words[3] == f"--container-image={image}"
    assert words[-1] == "--no-container-mount-home"
    assert recorded.calls("touch") == []


def test_srun_task_becomes_a_rank() -> None:
    step = {"SLURM_STEP_NUM_TASKS": "7", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "3"}
    step |= {"SLURM_STEP_TASKS_PER_NODE": "2(x2),3", "SLURM_NODEID": "2", "SLURM_JOB_ID": "123456"}
    rank = rank_variables(step | {"MASTER_ADDR": "host", "MASTER_PORT": "29"})
    assert rank == {
        "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "7", "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "host", "MASTER_PORT": "29",
    }  # fmt: skip
    with pytest.raises(ValueError, match="MASTER_ADDR must be set for srun over several nodes"):
        rank_variables(step)
    alone = rank_variables(step | {"SLURM_STEP_NUM_NODES": "1"})
    assert (alone["MASTER_ADDR"], alone["MASTER_PORT"]) == ("127.0.0.1", "23456")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"},  # the batch script's own shell
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # one task: torchrun, or an interactive step
        {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "RANK": "0"},  # a launcher has spoken
    ],
)
def test_no_other_process_takes_slurms_variables(environment: dict[str, str]) -> None:
    assert rank_variables(environment) == {}


def test_shell_quote_is_undone_by_a_shells_own_rules() -> None:
    for each in hostile_strings(300):
        assert shlex.split(shell_quote(each)) == [each]
