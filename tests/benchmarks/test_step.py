"""The step benchmark: refusals before anything is allocated, and the whole command on a machine without a GPU."""

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "wan_1_3b_self_forcing.yaml"


@pytest.fixture(scope="module")
def step() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("step_benchmark", ROOT / "benchmarks" / "step.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["video.width=836"], "video.height and video.width must be divisible by 8 for codec wan_vae, got 480 x 836"),
        (["video.width=840"], "must give latents divisible by the student's patch [2, 2], got latents 60 x 105"),
        (["video.num_frames=2"], "num_frames must be 3 + a multiple of the student's chunk 3, got 2"),
        (["--config", str(ROOT / "configs" / "quickstart.yaml")], "dimensions must be written in the configuration"),
        (["--rollouts", "1"], "--rollouts must be at least 2 and --steps 1, got 1, 3"),
    ],
)
def test_what_cannot_run_is_refused_first(
    step: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert step.main(["--config", str(CONFIG), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_real_sizes_are_wans(step: ModuleType) -> None:
    config = step.load_config(CONFIG)
    shape, latents = step.real_shape(config)
    assert latents == (16, 21, 60, 104)
    files = [
        step.load_ds_config(ROOT / "configs" / name) for name in ("zero3_h100.json", "zero2_discriminator_h100.json")
    ]
    text = "\n".join(step.model_lines(config, shape, latents, tuple(files), 8))
    assert "parameters 1,418,996,800; adapters 349,962,240; trained 349,962,240" in text
    assert "32,760 tokens a clip" in text
    assert "keys and values of one rollout, bf16: 5.62 GiB" in text


def test_sharing_a_pass_spares_the_references_adapters(step: ModuleType) -> None:
    config = step.load_config(CONFIG)
    shape, latents = step.real_shape(config)
    shared = step.phase_flops(config, shape, latents, 1)
    apart = step.phase_flops(step.load_config(CONFIG, ["nft.velocities=three_passes"]), shape, latents, 1)
    assert shared["update"][0] < apart["update"][0]
    assert {phase: shared[phase] for phase in ("rollout", "score")} == {
        phase: apart[phase] for phase in ("rollout", "score")
    }


@pytest.mark.slow
def test_the_command_runs_without_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "step.csv"
    command = [sys.executable, "benchmarks/step.py", "--config", str(CONFIG), "--steps", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "# model of the real size" in done.stdout
    assert "They say nothing about a GPU" in done.stdout
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["phase"] for row in rows] == ["rollout", "discriminator", "score", "update"]
    assert {row["size"] for row in rows} == {"tiny"}
    assert all(float(row["seconds"]) > 0 for row in rows)
    planned = {row["phase"]: float(row["planned_gib"]) for row in rows}
    assert min(planned["rollout"], planned["discriminator"], planned["update"]) > 0
