"""One rank of test_objectives.py: whole AFD steps on real engines, and the same student gradient by hand."""

import argparse
import json
from pathlib import Path
from typing import Any

import tiny_run
import torch
from tiny_run import BATCH, GROUP, SHAPE, adamw
from torch import Tensor

from afd.config import RunConfig
from afd.diffusion.flow_matching import sampler_grid
from afd.distributed import close_world, init_world
from afd.models.discriminator import LatentDiscriminator
from afd.models.student import CausalStudent
from afd.models.weights import load_student
from afd.rollout import SamplerTimes, rollout, rollout_noise, sampler_times
from afd.train.builders import build_roles
from afd.train.discriminator_view import latent_view
from afd.train.dmd_objective import dmd_step
from afd.train.engines import consolidated_weights
from afd.train.gan_objective import gan_step
from afd.train.learning_rate import set_lr
from afd.train.objectives import (
    DISCRIMINATOR,
    FORWARD,
    ROLLOUT,
    Roles,
    StepTimer,
    afd_step,
    roll_out,
    sample_generators,
    warmup_step,
)
from afd.train.preflight import plan_run
from afd.train.sft_objective import sft_step
from afd.train.student_update import make_noised_states, update_student
from afd.types import Rollout, VideoBatch

SGD_LR = 0.1
STEPS = {"afd": afd_step, "sft": sft_step, "gan": gan_step, "dmd": dmd_step}
WINDOWS = ("discriminator.clip_frames=3", "discriminator.num_clips=2")

parser = argparse.ArgumentParser()
parser.add_argument("result", type=Path)
parser.add_argument("student", type=Path)
parser.add_argument("vlm", type=Path)
parser.add_argument("--local_rank", type=int)
options = parser.parse_args()
world = init_world(600)


def json_for(stage: int, optimizer: dict[str, Any], clipping: float = 1.0) -> dict[str, Any]:
    return tiny_run.ds_json(stage, optimizer, gradient_accumulation_steps=1, gradient_clipping=clipping)


def configuration(*overrides: str) -> RunConfig:
    return tiny_run.configuration(options.student, options.result.parent, *overrides)


def batch_at(step: int) -> VideoBatch:
    return tiny_run.batch_at(step, world)


def roles_for(config: RunConfig, student: dict[str, Any], discriminator: dict[str, Any]) -> Roles:
    plan = plan_run(config, student, discriminator, world_size=world.size)
    return build_roles(config, plan, student, discriminator, world=world)


def train(*overrides: str, stages: tuple[int, int] = (3, 2)) -> dict[str, Any]:
    """One warm-up step, where there is a discriminator, and three steps: every metric, and the weights after them."""
    config = configuration(*overrides)
    roles = roles_for(config, json_for(stages[0], adamw(1e-3)), json_for(stages[1], adamw(1e-3)))
    before = consolidated_weights(roles.student)
    rows = []
    for step in range(4):
        if step == 0 and roles.discriminator is None:
            rows.append({})
            continue
        one_step = STEPS[config.objective] if step else warmup_step
        metrics = one_step(roles, batch_at(step), config, step, world=world, timer=StepTimer())
        rows.append({name: float(value) for name, value in metrics.items()})
    after = consolidated_weights(roles.student)
    changed = {name: not torch.equal(before[name], after[name]) for name in after}
    return {
        "rows": rows,
        "has_discriminator": roles.discriminator is not None,
        "is_view_of_latents": roles.view is latent_view,
        "changed": sorted(name for name in changed if changed[name]),
        "kept": sorted(name for name in changed if not changed[name]),
        "student_steps": roles.student.global_steps,
        "discriminator_steps": roles.discriminator.global_steps if roles.discriminator is not None else 0,
        "weights": {name: each.flatten()[:5].tolist() for name, each in after.items()},
    }


def flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weights[name].double().flatten() for name in sorted(weights)])


def gradient_by_hand(
    student: CausalStudent,
    weights: dict[str, dict[str, Tensor]],
    discriminator: LatentDiscriminator,
    config: RunConfig,
    step: int,
) -> Tensor:
    """The student's gradient of one AFD step in float64, from the paper's formulas; no engine, no kernel."""
    nft, batch, g = config.nft, batch_at(step), config.rollout.group_size
    times = sampler_grid(config.rollout.steps, shift=config.rollout.shift)
    ids = batch.sample_ids.tolist()
    prompt = batch.prompt_embeds.repeat_interleave(g, dim=0).double()
    student.double()

    def with_weights(name: str) -> CausalStudent:
        student.load_state_dict({key: each.double() for key, each in weights[name].items()})
        return student

    keys = [(config.seed, ROLLOUT, step, i, k) for i in ids for k in range(g)]
    x0 = rollout(with_weights("old"), prompt, rollout_noise(keys, len(times), SHAPE).double(), SamplerTimes(times))
    with torch.no_grad():
        scores = discriminator.double()(x0, prompt).view(-1, g)
    advantage = scores - scores.mean(dim=1, keepdim=True)
    advantage = (advantage / (advantage.std(correction=0) + 1e-4)).flatten()
    w = 0.5 + 0.5 * (advantage / nft.advantage_clip).clamp(-1, 1)

    generators = sample_generators(batch, g, config.seed, FORWARD, step, 0)
    grid = torch.tensor(times).double()
    uniforms = torch.stack([torch.rand(SHAPE[1] // 3, generator=each) for each in generators])
    t = grid[(uniforms * len(times)).long()].repeat_interleave(3, dim=1)
    eps = torch.stack([torch.randn(SHAPE, generator=each) for each in generators]).double()
    at = t[:, None, :, None, None]
    x_t = (1 - at) * x0 + at * eps
    with torch.no_grad():
        v_old = with_weights("old")(x_t, t, prompt, clean=x0)
        v_ref = with_weights("reference")(x_t, t, prompt, clean=x0)
    v = with_weights("student")(x_t, t, prompt, clean=x0)
    loss = nft.prior_weight * (w * (v - v_ref).square().flatten(1).mean(1)).mean()
    for sign, weight in ((1, w), (-1, 1 - w)):
        branch = v_old + sign * nft.nft_beta * (v - v_old)
        error = (x_t - at * branch - x0).flatten(1)
        per_sample = error.square().mean(1) / error.detach().abs().mean(1)
        loss = loss + (weight * per_sample).mean() * nft.advantage_clip / nft.nft_beta
    student.zero_grad()
    loss.backward()
    named = dict(student.named_parameters())
    return flat({name: torch.zeros_like(each) if each.grad is None else each.grad for name, each in named.items()})


def engine_against_hand() -> dict[str, float]:
    """The second step's parameter change of a ZeRO-3 engine with plain SGD, against the hand-written gradient."""
    # A discriminator with an opinion: with the quick start's smoothing and penalty all weights are near 1/2, and the
    # gradient is the difference of two branches hundreds of times its size.
    config = configuration(
        "averages.old_policy_decay=0.5", "discriminator.label_smoothing=0", "discriminator.r1_weight=0"
    )
    sgd = {"type": "SGD", "params": {"lr": SGD_LR}}
    roles = roles_for(config, json_for(3, sgd, clipping=0.0), json_for(2, adamw(1e-2)))
    for step in range(6):
        warmup_step(roles, batch_at(step), config, step, world=world, timer=StepTimer())
    judge_engine = roles.discriminator
    assert judge_engine is not None
    for group in judge_engine.optimizer.param_groups:
        group["lr"] = 0.0  # D has an opinion by now and keeps it
    discriminator = LatentDiscriminator(config.discriminator.shape)
    discriminator.load_state_dict(consolidated_weights(judge_engine))
    afd_step(roles, batch_at(1), config, 1, world=world, timer=StepTimer())
    weights = {
        "student": consolidated_weights(roles.student),
        "old": roles.old.state_dict(),
        "reference": roles.reference.state_dict(),
    }
    afd_step(roles, batch_at(2), config, 2, world=world, timer=StepTimer())
    change = flat(consolidated_weights(roles.student)) - flat(weights["student"])
    expected = gradient_by_hand(load_student(options.student), weights, discriminator, config, 2)
    measured = -change / SGD_LR
    return {
        "relative_error": ((measured - expected).norm() / expected.norm()).item(),
        "gradient_norm": expected.norm().item(),
        "old_distance": (flat(weights["old"]) - flat(weights["student"])).norm().item(),
    }


def change_at(weight: float) -> Tensor:
    """How a fresh SGD student moves when every rollout has this optimality weight, at v = v_old, without prior."""
    config = configuration("nft.prior_weight=0", "rollout.policy=current")
    sgd = {"type": "SGD", "params": {"lr": SGD_LR}}
    roles = roles_for(config, json_for(3, sgd, clipping=0.0), json_for(2, adamw(0.0)))
    batch = batch_at(0)
    embeds = batch.prompt_embeds.repeat_interleave(GROUP, dim=0)
    clean = batch.latents.repeat_interleave(GROUP, dim=0)
    ids = torch.arange(BATCH)
    generators = sample_generators(batch, GROUP, 0)
    states = make_noised_states(
        Rollout(clean, embeds, ids // GROUP, ids), generators, config.nft, times=sampler_times(config.rollout),
        shift=3.0, shape=roles.student.module.shape,
    )  # fmt: skip
    before = flat(consolidated_weights(roles.student))
    update_student(roles.student, states, embeds, torch.full((BATCH,), weight), config.nft, v_old=None, v_ref=None)
    return flat(consolidated_weights(roles.student)) - before


def gan_against_hand() -> dict[str, float]:
    """One GAN step's parameter change under plain SGD, against autograd through the student and D in float64."""
    config = configuration("objective=gan", "rollout.steps=[1000]")
    sgd = {"type": "SGD", "params": {"lr": SGD_LR}}
    roles = roles_for(config, json_for(3, sgd, clipping=0.0), json_for(2, adamw(1e-2)))
    for step in range(3):
        warmup_step(roles, batch_at(step), config, step, world=world, timer=StepTimer())
    judge_engine = roles.discriminator
    assert judge_engine is not None
    for group in judge_engine.optimizer.param_groups:
        group["lr"] = 0.0
    discriminator = LatentDiscriminator(config.discriminator.shape)
    discriminator.load_state_dict(consolidated_weights(judge_engine))
    before = consolidated_weights(roles.student)
    gan_step(roles, batch_at(3), config, 3, world=world, timer=StepTimer())
    measured = -(flat(consolidated_weights(roles.student)) - flat(before)) / SGD_LR

    batch, g, seed = batch_at(3), config.rollout.group_size, config.seed
    student = load_student(options.student).double()
    student.load_state_dict({name: each.double() for name, each in before.items()})
    prompt = batch.prompt_embeds.repeat_interleave(g, dim=0).double()
    eps = rollout_noise([(seed, ROLLOUT, 3, i, k) for i in batch.sample_ids.tolist() for k in range(g)], 1, SHAPE)
    eps = eps.double()
    clean = rollout(student, prompt, eps, sampler_times(config.rollout))
    ones = torch.ones(BATCH, SHAPE[1]).double()
    x0 = eps[:, 0] - student(eps[:, 0], ones, prompt, clean=clean)  # t = 1
    generators = sample_generators(batch, g, seed, DISCRIMINATOR, 3, -1)
    blur = torch.stack([torch.randn((2, *SHAPE), generator=each) for each in generators]).double()
    blur = blur * config.discriminator.input_noise
    real = batch.latents.repeat_interleave(g, dim=0).double()
    judge = discriminator.double()
    margin = judge(real + blur[:, 0], prompt) - judge(x0 + blur[:, 1], prompt)
    torch.nn.functional.softplus(margin).mean().backward()
    named = dict(student.named_parameters())
    expected = flat({name: torch.zeros_like(each) if each.grad is None else each.grad for name, each in named.items()})
    return {
        "relative_error": ((measured - expected).norm() / expected.norm()).item(),
        "gradient_norm": expected.norm().item(),
    }


def sft_against_hand() -> dict[str, float]:
    """One SFT step's parameter change under plain SGD, against the mean squared velocity error in float64."""
    config = configuration("objective=sft", "nft.time_sampling=uniform")
    sgd = {"type": "SGD", "params": {"lr": SGD_LR}}
    roles = roles_for(config, json_for(3, sgd, clipping=0.0), json_for(2, adamw(0.0)))
    before, batch = consolidated_weights(roles.student), batch_at(0)
    sft_step(roles, batch, config, 0, world=world, timer=StepTimer())
    measured = -(flat(consolidated_weights(roles.student)) - flat(before)) / SGD_LR
    student = load_student(options.student).double()
    student.load_state_dict({name: each.double() for name, each in before.items()})
    x0 = batch.latents.repeat_interleave(GROUP, dim=0).double()
    prompt = batch.prompt_embeds.repeat_interleave(GROUP, dim=0).double()
    uniforms, noises = [], []
    for generator in sample_generators(batch, GROUP, config.seed, FORWARD, 0):
        uniforms.append(torch.rand(2, generator=generator))
        noises.append(torch.randn(SHAPE, generator=generator))
    u, shift = torch.stack(uniforms), config.rollout.shift
    t = (shift * u / (1 + (shift - 1) * u)).repeat_interleave(3, dim=1).double()
    eps, time = torch.stack(noises).double(), t[:, None, :, None, None]
    v = student((1 - time) * x0 + time * eps, t, prompt, clean=x0)
    (v - (eps - x0)).square().mean().backward()
    expected = flat({name: each.grad for name, each in student.named_parameters() if each.grad is not None})
    return {
        "relative_error": ((measured - expected).norm() / expected.norm()).item(),
        "gradient_norm": expected.norm().item(),
    }


def stale_roles() -> dict[str, float]:
    """Off-policy rollouts and a frozen D: what moved after two steps in which the student did."""
    config = configuration("averages.old_policy_decay=1")
    roles = roles_for(config, json_for(3, adamw(1e-2)), json_for(2, adamw(1e-2)))
    judge_engine = roles.discriminator
    assert judge_engine is not None
    set_lr(judge_engine, 0.0)
    judge, student = (flat(consolidated_weights(engine)) for engine in (judge_engine, roles.student))
    first = roll_out(roles, batch_at(0), config, 0, world=world)[0].latents
    for step in range(2):
        afd_step(roles, batch_at(step), config, step, world=world, timer=StepTimer())
    again = roll_out(roles, batch_at(0), config, 0, world=world)[0].latents
    return {
        "rollout": (again - first).abs().max().item(),
        "discriminator": (flat(consolidated_weights(judge_engine)) - judge).abs().max().item(),
        "student": (flat(consolidated_weights(roles.student)) - student).abs().max().item(),
    }


def dmd_at_agreement() -> dict[str, float]:
    """DMD where the critic is the real score and stays so: the student has nowhere to go."""
    critic = f"dmd.ds_config={options.result.parent / 'critic.json'}"
    config = configuration("objective=dmd", "dmd.critic_steps=1", f"dmd.real_score={options.student}", critic)
    roles = roles_for(config, json_for(3, adamw(1e-2)), json_for(2, adamw(0.0)))
    assert roles.critic is not None
    for group in roles.critic.optimizer.param_groups:
        group["lr"] = 0.0
    before = flat(consolidated_weights(roles.student))
    metrics = dmd_step(roles, batch_at(0), config, 0, world=world, timer=StepTimer())
    moved = (flat(consolidated_weights(roles.student)) - before).abs().max().item()
    return {"gradient": metrics["student/dmd_gradient"].item(), "moved": moved}


def signs() -> dict[str, float]:
    good, bad, neutral = change_at(1.0), change_at(0.0), change_at(0.5)
    return {
        "neutral": neutral.abs().max().item(),
        "good": good.norm().item(),
        "sum": (good + bad).norm().item(),
    }


(options.result.parent / "critic.json").write_text(json.dumps(json_for(3, adamw(1e-3))))
result: dict[str, Any] = {
    "ema": train(),
    "current": train("rollout.policy=current"),
    "plain": train("nft.variant=plain"),
    "stage 3 + stage 3": train(stages=(3, 3)),
    "two updates": train(
        "nft.updates_per_rollout=2", "discriminator.steps_per_student_step=2", "discriminator.warmup_updates=3"
    ),
    "watched D": train(
        "discriminator.replay_share=0.5",
        "discriminator.r1_weight=0.1",
        "discriminator.input_noise=0.3",
        "discriminator.hold_above=0.99",
        *WINDOWS,
    ),
    "terminal": train("nft.time_sampling=terminal"),
    "coupled": train("nft.noise_coupling=0.5"),
    "sft": train("objective=sft"),
    "sft, vlm": train("objective=sft", "discriminator.kind=vlm", "discriminator.vlm.path=/nowhere"),
    "gan": train("objective=gan"),
    "gan, non-saturating": train("objective=gan", "discriminator.loss=gan", *WINDOWS, stages=(3, 3)),
    "dmd": train(
        "objective=dmd",
        "dmd.critic_steps=2",
        f"dmd.real_score={options.student}",
        f"dmd.ds_config={options.result.parent / 'critic.json'}",
    ),
    "vlm": train(
        "discriminator.kind=vlm",
        f"discriminator.vlm.path={options.vlm}",
        "discriminator.vlm.vision=full",
        "discriminator.vlm.min_pixels=256",
        "discriminator.vlm.max_pixels=1024",
        "discriminator.input_noise=0.05",
        "discriminator.r1_weight=0.1",
        "discriminator.replay_share=0.5",
        stages=(3, 3),
    ),
    "LoRA": train("student.lora.rank=4", "student.lora.alpha=8"),
    "backbone, stage 3": train("discriminator.kind=backbone", *WINDOWS, stages=(3, 3)),
    "backbone, gan": train("discriminator.kind=backbone", "objective=gan"),
    "LoRA, merged": train("student.lora.rank=4", "student.lora.alpha=8", "rollout.merge_adapters=true"),
}
if world.size == 1:
    result |= {"hand": engine_against_hand(), "signs": signs()}
    result |= {"sft hand": sft_against_hand(), "stale": stale_roles()}
    result |= {"gan hand": gan_against_hand(), "dmd at agreement": dmd_at_agreement()}
if world.is_main:
    options.result.write_text(json.dumps(result))
close_world()
