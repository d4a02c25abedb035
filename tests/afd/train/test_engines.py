"""DeepSpeed's JSON and engines: errors that teach, and training that equals plain torch at every stage."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from afd.train.ds_config import batch_arithmetic, check_ds_config, load_ds_config
from afd.train.engines import bare_module, build_engine, gathered, zero_stage

WORKER = Path(__file__).with_name("engines_worker.py")
CONFIGS = Path(__file__).parents[3] / "configs"
GOOD: dict[str, Any] = {
    "train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 3},
}


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in GOOD.items() if name != key}


def zero(**more: Any) -> dict[str, Any]:
    return {**GOOD, "zero_optimization": {"stage": 3, **more}}


def adam(kind: str = "AdamW", *, lr: Any = 1e-3) -> dict[str, Any]:
    return {**GOOD, "optimizer": {"type": kind, "params": {"lr": lr}}}


@pytest.fixture(scope="module", params=[("plain", 1), ("deepspeed", 2)], ids=["1 rank", "2 ranks"])
def measured(request: pytest.FixtureRequest, launch: Any) -> dict[str, Any]:
    launcher, ranks = request.param
    return launch(WORKER, ranks=ranks, launcher=launcher)


@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_engine_trains_like_plain_torch(measured: dict[str, Any], stage: str) -> None:
    assert measured["stages"][stage]["weights"] < 1e-6  # float32
    assert measured["stages"][stage]["skipped"] == 0


@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_gathered_rollout_equals_plain_forward_between_training_steps(measured: dict[str, Any], stage: str) -> None:
    assert measured["stages"][stage]["rollout"] < 1e-6  # float32


def test_only_trainable_parameters_reach_the_optimizer(measured: dict[str, Any]) -> None:
    assert measured["stages"]["0"]["optimizer_numel"] == 4 * 7 + 7 + 7 * 3 + 3


def test_two_engines_with_a_gradient_through_the_discriminator(measured: dict[str, Any]) -> None:
    assert measured["pair"]["student"] < 1e-6  # float32
    assert measured["pair"]["critic"] < 1e-6


def test_bf16_engine_learns(measured: dict[str, Any]) -> None:
    assert measured["bf16"][-1] < 0.8 * measured["bf16"][0]


def test_shipped_configs_pass_deepspeeds_own_parser(measured: dict[str, Any]) -> None:
    assert {"zero3.json", "zero2_discriminator.json", "zero3_h100.json"} <= set(measured["configs"])


def test_engines_on_a_cpu_do_not_load_the_compiler(measured: dict[str, Any]) -> None:
    assert measured["has_loaded_the_compiler"] is False  # two seconds of a start


def test_shipped_configs_fit_one_and_two_ranks() -> None:
    for name in ("zero3.json", "zero2_discriminator.json"):
        for world_size in (1, 2):
            total, micro, accumulation = batch_arithmetic(load_ds_config(CONFIGS / name), world_size)
            assert total == micro * accumulation * world_size


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**GOOD, "zero_optimisation": {}}, "unknown key 'zero_optimisation', did you mean 'zero_optimization'?"),
        ({**GOOD, "qqq": 1}, "unknown key 'qqq'$"),
        ({**GOOD, "gradient_clipping": "auto"}, "'gradient_clipping' is 'auto'"),
        ({**GOOD, "zero_optimization": {"stage": "auto"}}, "'zero_optimization.stage' is 'auto'"),
        ({**GOOD, "zero_optimization": {"stage": 4}}, "'zero_optimization.stage' must be 0, 1, 2 or 3, got 4"),
        ({**GOOD, "zero_optimization": True}, "'zero_optimization' must be an object"),
        (without("train_batch_size"), "'train_batch_size' is missing"),
        (without("gradient_accumulation_steps"), "one of 'train_micro_batch_size_per_gpu' and"),
        (without("gradient_clipping"), "'gradient_clipping' is missing"),
        (without("optimizer"), "'optimizer' must be"),
        ({**GOOD, "optimizer": {"type": "AdamW"}}, "'optimizer' must be"),
        ({**GOOD, "bf16": {"enabled": True}}, "'bf16.check_grad_overflow' must be set"),
        (
            {**GOOD, "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            r"'zero_optimization.offload_param.device' must be 'none' or 'cpu' \(nvme is not supported",
        ),
        ({**GOOD, "bf16": True}, "'bf16' must be an object, got True"),
        ({**GOOD, "scheduler": True}, "'scheduler' must be an object, got True"),
        ({**GOOD, "scheduler": {}}, "'scheduler' must be .*, got {}"),
        ({**GOOD, "bf16": {"enabled": "yes"}}, "'bf16.enabled' must be true or false, got 'yes'"),
        (zero(offload_optimizer=None), "'zero_optimization.offload_optimizer' must be an object, got None"),
        (zero(offload_optimizer="cpu"), "'zero_optimization.offload_optimizer' must be an object, got 'cpu'"),
        (zero(zero_hpz_partition_size="2"), "hpz_partition_size' must be an integer >= 1, got '2'"),
        (zero(zero_hpz_partition_size=True), "hpz_partition_size' must be an integer >= 1, got True"),
        (zero(reduce_bucket_size=None), "reduce_bucket_size' must be a finite number > 0, got None"),
        (
            zero(offload_optimiser={"device": "cpu"}),
            "unknown key 'zero_optimization.offload_optimiser', did you mean 'zero_optimization.offload_optimizer'",
        ),
        (
            zero(stage3_prefetch_bucket=1),
            "'zero_optimization.stage3_prefetch_bucket', did you mean 'zero_optimization.stage3_prefetch_bucket_size'",
        ),
        (zero(offload_param={"devise": "cpu"}), "did you mean 'zero_optimization.offload_param.device'"),
        ({**GOOD, "optimizer": {"type": "AdamW", "params": None}}, "'optimizer' must be"),
        (adam(lr="1e-4"), "'optimizer.params.lr' must be a finite number >= 0, got '1e-4'"),
        (adam(lr=-1), "'optimizer.params.lr' must be a finite number >= 0, got -1"),
        (adam(lr=float("nan")), "'optimizer.params.lr' must be a finite number >= 0, got nan"),
        (adam("Adamm"), "'optimizer.type' must be one of Adagrad, .* got 'Adamm', did you mean 'Adam'"),
        (adam("Optimizer"), "'optimizer.type' must be one of .* got 'Optimizer'"),
        ({**GOOD, "gradient_clipping": "1"}, "'gradient_clipping' must be a finite number >= 0, got '1'"),
        ({**GOOD, "gradient_clipping": -1}, "'gradient_clipping' must be a finite number >= 0, got -1"),
        (
            {**GOOD, "torch_autocast": {"enabled": False}},
            "'torch_autocast' is not supported: .* outside of it, use 'bf16'$",
        ),
        ([1], "must hold a JSON object, got list"),
    ],
)
def test_bad_config_is_one_clear_line(tmp_path: Path, config: object, message: str) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        load_ds_config(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        zero(
            offload_optimizer={"device": "cpu", "pin_memory": True}, stage3_max_live_parameters=1e9, sub_group_size=1e9
        ),
        zero(prefetch_bucket_size=1, zero_hpz_partition_size=1),
        {**GOOD, "gradient_clipping": 0, "bf16": {"enabled": False}},
        {**GOOD, "scheduler": {"type": "WarmupLR", "params": {}}},
        adam("adamw"),
        adam("SGD"),
        adam("Lion"),
    ],
)
def test_what_deepspeed_takes_is_taken(config: dict[str, Any]) -> None:
    check_ds_config(config)


def test_unreadable_config_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_ds_config(tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"train_batch_size": 8,}')
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_ds_config(broken)
    broken.write_text('{"train_batch_size": 8, "train_batch_size": 9}')
    with pytest.raises(ValueError, match="key 'train_batch_size' appears twice"):
        load_ds_config(broken)


def test_batch_arithmetic_solves_for_the_missing_number() -> None:
    assert batch_arithmetic({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4}, 2) == (24, 4, 3)
    assert batch_arithmetic({"train_batch_size": 24, "gradient_accumulation_steps": 3}, 2) == (24, 4, 3)
    with pytest.raises(ValueError, match=r"train_batch_size 10 must be a multiple of .* 4 \* ranks 2 = 8"):
        batch_arithmetic({"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4}, 2)
    both = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}
    with pytest.raises(ValueError, match=r"train_batch_size 16 must equal .* = 8"):
        batch_arithmetic(both, 2)
    with pytest.raises(ValueError, match="gradient_accumulation_steps must be a positive integer, got 0"):
        batch_arithmetic({"train_batch_size": 16, "gradient_accumulation_steps": 0}, 2)


def test_build_engine_without_process_group_says_what_to_call() -> None:
    with pytest.raises(ValueError, match=r"call afd\.distributed\.init_world first"):
        build_engine(nn.Linear(2, 2), GOOD)


def test_plain_module_counts_as_stage_0() -> None:
    module: Any = nn.Linear(2, 2)
    assert zero_stage(module) == 0
    assert bare_module(module) is module
    with gathered(module) as inside:
        assert inside is module
