"""Makes the built-in world's base students: few-step causal models of a *wrong-physics* mixture.

Stage 1 trains a multi-step flow-matching model in the teacher-forcing layout on videos whose gravity is drawn from a
wide range. Stage 2 regresses the same network on the model's own probability-flow trajectories (ODE regression, as
CausVid and Self-Forcing initialise their few-step students). The result ships with the project; AFD starts from it.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from afd.config import PhysicsConstants, PretrainSection, RunConfig, StudentShape, configured_shape
from afd.diffusion.flow_matching import add_noise, shift_time, x0_from_velocity
from afd.distributed import seeded_generator
from afd.models.dct_codec import DCTCodec
from afd.models.encoders import TextEncoder, save_tiny_text_encoder
from afd.models.student import CausalStudent
from afd.models.weights import load_student, read_student_note, read_student_shape, save_student
from afd.teachers.physics import prompt_vocabulary, simulate_batch, training_prompts
from afd.train.preflight import check_attention

logger = logging.getLogger(__name__)

_FLOW, _DISTIL, _DATA = 1, 2, 3  # seed streams
_NUM_PROMPTS = 270  # every training prompt with one ball, and one with two balls for every four of them
# Not the teacher's renderer: hard discs without light or noise.
_OTHER_RENDERER = {"supersample": 3, "soft_edge": 0.0, "shading": False, "noise": 0.0}


def wrong_physics_latents(
    section: PretrainSection, constants: PhysicsConstants, text: TextEncoder, *, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Simulate the base mixture in the student's own format.

    Returns:
        latents [V, C, F, H, W] float32, prompt embeddings [P, L, D], and for each video its prompt's row [V] int64.
    """
    prompts = training_prompts(_NUM_PROMPTS)
    rng = np.random.default_rng([seed, _DATA])
    rows = rng.integers(len(prompts), size=section.num_videos)
    gravities = rng.uniform(*section.gravity_range, size=section.num_videos)
    seeds = rng.integers(2**40, size=section.num_videos)
    frames = simulate_batch([prompts[i] for i in rows], seeds.tolist(), constants, gravities=gravities.tolist())
    codec = DCTCodec()
    latents = [codec.encode(torch.from_numpy(part).float() / 255) for part in np.array_split(frames, 64)]
    return torch.cat(latents), text.encode(prompts), torch.from_numpy(rows)


def _train(
    student: CausalStudent, num_steps: int, lr: float, ema_decay: float, loss_at: Callable[[int], Tensor], label: str
) -> CausalStudent:
    """AdamW with warm-up and cosine decay on `loss_at(step)`; returns the averaged weights."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    average = copy.deepcopy(student).requires_grad_(False)
    progress = tqdm(range(num_steps), desc=label)
    for step in progress:
        scale = min(1.0, (step + 1) / 100) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / num_steps)))
        optimizer.param_groups[0]["lr"] = lr * scale
        optimizer.zero_grad(set_to_none=True)
        loss = loss_at(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(ema_decay, step / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(student.parameters()), 1 - decay)
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    return average


def _frames_times(student: CausalStudent, chunk_times: Tensor) -> Tensor:
    return chunk_times.repeat_interleave(student.shape.chunk_frames, dim=1)


def train_multistep(
    student: CausalStudent, data: tuple[Tensor, Tensor, Tensor], section: PretrainSection, *, seed: int
) -> CausalStudent:
    """Stage 1: flow matching, one uniform time per chunk, clean earlier chunks as context."""
    latents, embeds, rows = data

    def loss_at(step: int) -> Tensor:
        generator = seeded_generator(seed, _FLOW, step)
        pick = torch.randint(len(latents), (section.batch_size,), generator=generator)
        x0 = latents[pick]
        uniforms = torch.rand(len(x0), x0.shape[2] // student.shape.chunk_frames, generator=generator)
        t = _frames_times(student, shift_time(uniforms, section.time_shift))
        eps, context = (torch.randn(x0.shape, generator=generator) for _ in range(2))
        v = student(add_noise(x0, eps, t), t, embeds[rows[pick]], clean=x0 + section.context_noise * context)
        return (v - (eps - x0)).square().mean()

    return _train(student, section.flow_steps, section.flow_lr, section.ema_decay, loss_at, "flow matching")


@torch.no_grad()
def ode_trajectory(model: CausalStudent, x0: Tensor, embeds: Tensor, eps: Tensor, times: Tensor) -> Tensor:
    """Integrate every chunk from noise in parallel, each given the clean chunks before it.

    Args:
        times: [S + 1] from 1 to 0.
    Returns:
        states [S + 1, N, C, F, H, W].
    """
    states = [eps]
    for now, after in itertools.pairwise(times):
        t = now.expand(x0.shape[0], x0.shape[2])
        v = model(states[-1], t, embeds, clean=x0)
        states.append(states[-1] + (after - now) * v)
    return torch.stack(states)


def distil_few_step(
    model: CausalStudent, data: tuple[Tensor, Tensor, Tensor], section: PretrainSection, *, seed: int
) -> CausalStudent:
    """Stage 2: regress x0 at the end of the model's trajectories from random points on them."""
    latents, embeds, rows = data
    student = copy.deepcopy(model).requires_grad_(True)
    linear = torch.linspace(1, 0, section.ode_steps + 1)
    times = shift_time(linear, section.time_shift)
    bank: list[tuple[Tensor, Tensor, Tensor]] = []
    reuse = 8  # steps taken per fresh batch of trajectories

    def loss_at(step: int) -> Tensor:
        generator = seeded_generator(seed, _DISTIL, step)
        if step % reuse == 0:
            pick = torch.randint(len(latents), (section.batch_size,), generator=generator)
            eps = torch.randn(latents[pick].shape, generator=generator)
            states = ode_trajectory(model, latents[pick], embeds[rows[pick]], eps, times)
            bank.append((states, latents[pick], embeds[rows[pick]]))
            del bank[:-32]
        states, clean, prompt = bank[int(torch.randint(len(bank), (1,), generator=generator))]
        n, chunks = clean.shape[0], clean.shape[2] // student.shape.chunk_frames
        # Half of the chunks start from pure noise, the others anywhere on the trajectory.
        index = torch.randint(section.ode_steps, (n, chunks), generator=generator)
        index[torch.rand(n, chunks, generator=generator) < 0.5] = 0
        frame_index = index.repeat_interleave(student.shape.chunk_frames, dim=1)  # [N, F]
        t = times[frame_index]
        frames = torch.arange(clean.shape[2])
        x_t = states.permute(0, 1, 3, 2, 4, 5)[frame_index, torch.arange(n)[:, None], frames].transpose(1, 2)
        v = student(x_t, t, prompt, clean=clean)
        return (x0_from_velocity(x_t, v, t) - states[-1]).square().mean()

    return _train(student, section.distil_steps, section.distil_lr, section.ema_decay, loss_at, "ODE regression")


def _multistep_once(
    student: CausalStudent, data: tuple[Tensor, Tensor, Tensor], config: RunConfig, path: Path
) -> CausalStudent:
    """Stage 1, or its result where `path` holds one made with the same settings."""
    start = config.pretrain.start_from
    settings = json.dumps(
        {
            "seed": config.seed,
            "video": config.video.model_dump(),
            "pretrain": config.pretrain.model_dump(mode="json"),
            "shape": student.shape.model_dump(),
            "start": None if start is None else hashlib.sha256(start.read_bytes()).hexdigest(),
        },
        sort_keys=True,
    )
    if path.exists() and read_student_note(path).get("settings") == settings:
        logger.info("stage 1: taken from %s", path)
        return load_student(path)
    multi_step = train_multistep(student, data, config.pretrain, seed=config.seed)
    save_student(multi_step, path, dtype=torch.float32, note={"made_by": "afd pretrain", "settings": settings})
    return multi_step


def _initial_student(config: RunConfig) -> CausalStudent:
    """What stage 1 starts from: random weights, or another student's under this configuration's chunks."""
    if config.pretrain.start_from is None:
        return CausalStudent(configured_shape(StudentShape(), config.student))
    student = load_student(config.pretrain.start_from, config=config.student.model_dump())
    student.shape = configured_shape(student.shape, config.student)
    return student


def make_base_student(config: RunConfig, out: Path) -> None:
    """Both stages: writes `text_encoder/` and `student.safetensors` (float16) into a folder.

    `multi_step.safetensors` (float32) is stage 1's result; a second call in the same folder with the same settings
    starts from it. Deterministic for a given configuration, torch build and processor: one thread, because the order
    of a sum depends on their number.

    Raises:
        ConfigError: student.attention_impl does not train here.
    """
    torch.set_num_threads(1)
    start = config.pretrain.start_from
    shape = StudentShape() if start is None else read_student_shape(start, config.student.model_dump())
    check_attention(config, configured_shape(shape, config.student), torch.float32, torch.device("cpu"))
    save_tiny_text_encoder(
        out / "text_encoder", prompt_vocabulary(), text_dim=StudentShape().text_dim, seed=config.seed
    )
    torch.manual_seed(config.seed)
    text = TextEncoder(out / "text_encoder", text_len=StudentShape().text_len)
    video = config.video
    constants = config.teacher.physics.model_copy(
        update={
            "fps": round(video.fps),
            "height": video.height,
            "width": video.width,
            "duration_s": video.num_frames / video.fps,
            **_OTHER_RENDERER,
        }
    )
    data = wrong_physics_latents(config.pretrain, constants, text, seed=config.seed)
    student = _initial_student(config)
    logger.info("base student: %d parameters", sum(parameter.numel() for parameter in student.parameters()))
    multi_step = _multistep_once(student, data, config, out / "multi_step.safetensors")
    few_step = distil_few_step(multi_step, data, config.pretrain, seed=config.seed)
    save_student(few_step, out / "student.safetensors", dtype=torch.float16, note={"made_by": "afd pretrain"})
