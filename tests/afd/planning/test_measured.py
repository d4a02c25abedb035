"""Memory and traffic of real steps of every objective on real engines against the plan: peaks within 10 %, collectives
exactly: their bytes and their number.

The longest step is planned and measured: with the quick start's seed the rollouts of objectives gan and dmd take all
their denoising steps, and the student of objective dmd moves in every step.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from afd.config import StudentShape
from afd.config_file import load_config
from afd.models.encoders import latent_shape
from afd.planning.communication import Kind, plan_transfers, total_bytes, total_calls
from afd.planning.memory import plan_memory
from afd.planning.refusals import batch_arithmetic
from afd.planning.workload import Workload, build_workload, engine_settings
from afd.rollout import sampler_times
from afd.train.gan_objective import truncated
from afd.train.objectives import EXIT

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("step_worker.py")
CHUNK_WISE = Path(__file__).parents[3] / "configs" / "chunk_wise.yaml"
SHAPE = {"num_layers": 4, "num_heads": 4, "head_dim": 32, "ffn_dim": 512, "freq_dim": 64}
KINDS: tuple[Kind, ...] = ("all_gather", "reduce_scatter", "all_reduce")
SFT, GAN, DMD = (("objective=sft",), ("objective=gan",), ("objective=dmd", "dmd.critic_steps=1"))
CHECKPOINTED, LORA, THREE = "student.gradient_checkpointing=true", "student.lora.rank=8", "nft.velocities=three_passes"


def ds_config(stage: int, batch: int, micro: int, **zero: int) -> dict[str, Any]:
    """Prefetch is off: where it meets a weight that is still whole it saves a gather."""
    sharded = {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
    return {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000000} | (sharded if stage == 3 else {}) | zero,
    }


def case(
    ranks: int, *overrides: str, stage: int = 3, micro: int = 2, discriminator_stage: int = 2, **zero: int
) -> dict[str, Any]:
    """Two micro batches a rank on 12 frames of 16 tokens, of the critic four."""
    batch = 2 * micro * ranks
    return {
        "shape": SHAPE,
        "ds_student": ds_config(stage, batch, micro, **zero),
        "ds_discriminator": ds_config(discriminator_stage, batch, micro),
        "ds_critic": ds_config(3, batch, max(1, micro // 2)),
        "overrides": ["video.height=16", "video.width=16", "rollout.group_size=2", *overrides],
    }


FIRST_CHUNK = "rollout.first_chunk_steps=[1000,750,500]"
CASES = {
    1: {"full": case(1), "lora": case(1, LORA, THREE), "sft": case(1, *SFT), "gan": case(1, *GAN)},
    2: {
        "full": case(2, THREE, micro=1),
        "lora": case(2, LORA, THREE),
        "stage 2": case(2, stage=2, micro=1),
        "small bucket": case(2, CHECKPOINTED, "rollout.batch_size=1", micro=2, reduce_bucket_size=100000),
        "beside": case(2, LORA, CHECKPOINTED, "nft.updates_per_rollout=2"),
        "sft": case(2, *SFT, LORA, CHECKPOINTED),
        "gan": case(2, *GAN, LORA, "discriminator.kind=backbone", FIRST_CHUNK, discriminator_stage=3),
        "dmd": case(2, *DMD),
    },
}


def workload(one: dict[str, Any], ranks: int) -> Workload:
    config, shape = load_config(CHUNK_WISE, one["overrides"]), StudentShape(**one["shape"])
    student, discriminator, critic = (
        engine_settings(one[name], batch_arithmetic(one[name], ranks))
        for name in ("ds_student", "ds_discriminator", "ds_critic")
    )
    return build_workload(
        config,
        shape,
        latents=latent_shape(config.encoders, config.video),
        num_gpus=ranks,
        engines=(student, discriminator if config.has_discriminator else None),
        kernels="eager",
        critic=(shape, critic),
    ).longest


def test_the_measured_steps_are_the_longest() -> None:
    """Step 2, whose collectives are counted; in step 1, whose peaks are, the first chunk may end earlier."""
    for ranks, cases in CASES.items():
        for name, one in cases.items():
            config, passes = load_config(CHUNK_WISE, one["overrides"]), workload(one, ranks).passes
            if passes.guide is not None:
                ends = [truncated(sampler_times(config.rollout), (config.seed, EXIT, step)) for step in (1, 2)]
                assert len(ends[0].times) == passes.num_times, name
                assert [(len(ends[1].of_chunk(0)), len(ends[1].times))] == passes.lengths, name


@pytest.fixture(scope="module", params=CASES, ids=["1 rank", "2 ranks"])
def measured(request: pytest.FixtureRequest, launch: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    ranks = request.param
    path = tmp_path_factory.mktemp("cases") / "cases.json"
    path.write_text(json.dumps(list(CASES[ranks].values())))
    results = launch(WORKER, str(path), ranks=ranks, launcher="plain" if ranks == 1 else "torchrun", timeout_s=900)
    return ranks, dict(zip(CASES[ranks], results, strict=True))


def test_peaks_are_within_ten_percent(measured: Any) -> None:
    ranks, results = measured
    for name, result in results.items():
        memory = plan_memory(workload(CASES[ranks][name], ranks))
        planned = {phase: memory.timed(phase) for phase in result["collectives"]}
        planned["after"] = sum(memory.held.values())
        for phase, expected in planned.items():
            got = result["peaks"][phase]
            assert expected == pytest.approx(got, rel=0.1), f"{name}, {phase}: planned {expected}, measured {got}"


def test_collectives_are_equal(measured: Any) -> None:
    ranks, results = measured
    if ranks == 1:
        pytest.skip("a single rank's collectives move nothing")
    for name, result in results.items():
        transfers = plan_transfers(workload(CASES[ranks][name], ranks))
        assert list(result["collectives"]) == list(transfers), name
        for phase, counted in result["collectives"].items():
            planned = {
                kind: [total_calls(transfers[phase], kind), total_bytes(transfers[phase], kind)] for kind in KINDS
            }
            assert counted == planned, f"{name}, {phase}"
