"""`afd launch`: what it prints, what it refuses in one line, and what it sends."""

import os
import sys
from pathlib import Path

import pytest

from afd.cli import main

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(["launch", "slurm", *arguments]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


JSONS_OF_64 = ("discriminator.ds_config=configs/zero2_discriminator_h100_64.json",)
ON_4_GPUS = ("--gpus-per-node", "4")  # as many as the quick start's 32 rollouts in groups of 8 divide among
ON_8_NODES = ("--ds_config", "configs/zero3_h100_64.json", "--nodes", "8")


def test_prints_a_script_for_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    options = (*ON_8_NODES, "--partition", "h100", "--time", "2-00:00:00")
    script = said(capsys, *options, *JSONS_OF_64, "output_dir=outputs/a b")
    assert script.startswith("#!/bin/bash\n")
    lines = script.splitlines()
    for line in ("#SBATCH --nodes=8", "#SBATCH --partition=h100", "#SBATCH --requeue", "#SBATCH --open-mode=append",
                 "#SBATCH --signal=USR2@240", "#SBATCH --gpus-per-node=8", "output_dir='outputs/a b'"):  # fmt: skip
        assert line in lines
    assert "--ntasks=64" in script


def test_cpu_jobs_ask_for_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    script = said(capsys, "--gpus-per-node", "0", "--ranks-per-node", "2", "--kind", "torchrun")
    assert "gpus-per-node=" not in script
    assert "--nproc_per_node 2" in script
    assert "NCCL_DEBUG" not in script


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nft.nft_betta=1"], "error: unknown key nft.nft_betta, did you mean nft.nft_beta?"),
        (["--kind", "sweep", "--sweep", "seed=x"], "error: seed: "),
        (["--kind", "sweep", "--sweep", "output_dir=a"], "error: --sweep must leave output_dir to the template"),
        (
            ["--gpus-per-node", "4", "--nodes", "8"],
            "error: train_batch_size 32 must be a multiple of rollout.group_size 8 x 32 ranks",
        ),
        (["--ds_config", "nope.json"], "error: "),
        (["--env", "A"], "error: --env must read NAME=VALUE, got 'A'"),
        (["--signal-lead-s", "100"], "error: --signal-lead-s must be at least stopping.grace_s + 60 s = 180, got 100"),
        (["--stage-to", "/scratch"], "error: --stage-to needs teacher.kind=shards, got 'physics'"),
        (
            ["--stage-to", "/s", "teacher.kind=shards", "data.train_remote=s3://b"],
            "error: --stage-to copies local shards",
        ),
        (["--name", "a\nb"], "error: name must hold no newline and no other control character, got 'a\\nb'"),
        (["--nodes", "0"], "error: --nodes: Input should be greater than 0"),
        (["--kind", "single", "--nodes", "2"], "error: --nodes must be 1 for single, got 2"),
    ],
)
def test_wrong_input_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert said(capsys, *arguments, code=2).startswith(message)


def test_submit_sends_the_script_and_prints_the_jobs_number(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "needs sbatch, which is not on PATH" in _submit(capsys, tmp_path, monkeypatch, code=2)
    sbatch = tmp_path / "sbatch"
    record = f"open({str(tmp_path / 'sent')!r}, 'w').write(sys.stdin.read())"
    sbatch.write_text(f"#!{sys.executable} -IS\nimport sys\n{record}\nprint('17;cluster')\n")
    sbatch.chmod(0o755)
    assert _submit(capsys, tmp_path, monkeypatch) == "17\n"
    assert (tmp_path / "logs").is_dir()
    assert (tmp_path / "sent").read_text() == said(capsys, *ON_4_GPUS, "--log-dir", str(tmp_path / "logs"))
    sbatch.write_text(f"#!{sys.executable} -IS\nimport sys\nsys.exit('sbatch: error: invalid partition')\n")
    assert "sbatch refused the job: sbatch: error: invalid partition" in _submit(capsys, tmp_path, monkeypatch, code=2)


def _submit(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch, code: int = 0) -> str:
    monkeypatch.setenv("PATH", str(folder))
    assert os.environ["PATH"] == str(folder)
    return said(capsys, *ON_4_GPUS, "--submit", "--log-dir", str(folder / "logs"), code=code)
