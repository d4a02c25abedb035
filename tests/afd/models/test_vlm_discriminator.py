"""The VLM discriminator against transformers' own forward, its gradients, and who is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from afd.config import EncodersSection, VideoSection, VLMSection
from afd.models.dct_codec import DCTCodec
from afd.models.vlm_builder import build_pixel_view, build_vlm_discriminator, plan_vlm
from afd.models.vlm_discriminator import VLMDiscriminator
from afd.models.vlm_frames import patchify
from afd.models.vlm_view import PixelView
from afd.models.vlm_weights import load_tokenizer

PROMPTS = ["a ball", "two big red balls are thrown to the right", "x"]


def section_for(folder: Path, **changes: Any) -> VLMSection:
    small: dict[str, Any] = {
        "min_pixels": 256,
        "max_pixels": 1024,
        "lora_rank": 4,
        "lora_alpha": 8,
        "gradient_checkpointing": False,
    }
    return VLMSection(path=folder, **(small | changes))


def build(folder: Path, **changes: Any) -> tuple[VLMDiscriminator, PixelView]:
    """A discriminator whose adapters, head and score token are random, and its view of the default video."""
    section = section_for(folder, **changes)
    shown = plan_vlm(section, EncodersSection(), VideoSection())
    discriminator = build_vlm_discriminator(section, shown, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for name, parameter in discriminator.named_parameters():
            if ".lora_" in name or not name.startswith("vlm."):
                nn.init.normal_(parameter, std=0.3)
    return discriminator, build_pixel_view(section, shown, DCTCodec())


def latents(num: int = 3, *, seed: int = 1) -> Tensor:
    return 0.5 * torch.randn(num, 12, 12, 4, 4, generator=torch.Generator().manual_seed(seed))


def shown(view: PixelView, prompts: list[str] = PROMPTS) -> tuple[Tensor, Tensor]:
    return view(latents(len(prompts)), prompts, torch.zeros(len(prompts), 1, 1))


def official_scores(discriminator: VLMDiscriminator, folder: Path, clips: Tensor, condition: Tensor) -> Tensor:
    """Scores by transformers' whole forward: token ids, placeholders, its own mask and positions for right padding.

    The score token stands in for a word of the vocabulary, <|image_pad|>, which is written over for it.
    """
    vlm, tokenizer = discriminator.vlm, load_tokenizer(folder)
    word = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    embedding = vlm.get_input_embeddings().weight
    before, embedding.data[word] = embedding[word].clone(), discriminator.score_token.data
    config, (n, _, t, height, width) = vlm.config, clips.shape
    grid = torch.tensor([[t // 2, height // 4, width // 4]] * n)
    num_video = int(grid[0].prod()) // 4
    head = tokenizer(VLMSection().template.partition("{video}")[0])["input_ids"]
    rows = []
    for ids in condition.tolist():
        text = [each for each in ids if each >= 0]
        video = [config.vision_start_token_id, *[config.video_token_id] * num_video, config.vision_end_token_id]
        rows.append([*head, *video, *text, word])
    longest = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    types = torch.where(input_ids == config.video_token_id, 2, 0)
    seconds = {} if config.model_type == "qwen2_vl" else {"second_per_grid_ts": torch.full((n,), 0.75)}
    original = config.image_token_id
    config.image_token_id = -1  # the word stands for no image here
    hidden = vlm(
        input_ids=input_ids,
        attention_mask=mask,
        pixel_values_videos=patchify(clips, patch=4, temporal=2, merge=2),
        video_grid_thw=grid,
        mm_token_type_ids=types,
        use_cache=False,
        **seconds,
    ).last_hidden_state
    config.image_token_id = original
    embedding.data[word] = before
    last = torch.tensor([len(row) - 1 for row in rows])
    return discriminator.head(hidden[torch.arange(n), last]).squeeze(-1)


@pytest.mark.parametrize("family", ["vlm_folder", "vlm25_folder"])
def test_scores_equal_transformers_own_forward(family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(family)
    discriminator, view = build(folder)
    clips, condition = shown(view)
    with torch.no_grad():
        own, official = discriminator(clips, condition), official_scores(discriminator, folder, clips, condition)
        alone = torch.cat([discriminator(clips[i : i + 1], condition[i : i + 1]) for i in range(len(clips))])
        swapped = discriminator(clips, condition[[1, 0, 2]])
    assert own.dtype == torch.float32
    assert own.std() > 2e-3
    torch.testing.assert_close(own, official, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own, alone, rtol=1e-4, atol=1e-5)  # padding and neighbours do not matter
    assert (own - swapped)[:2].abs().min() > 1e-3, "the score token has seen the prompt"


def test_seconds_between_patches_matter_to_qwen25_only(vlm_folder: Path, vlm25_folder: Path) -> None:
    changes = []
    for folder in (vlm_folder, vlm25_folder):
        discriminator, view = build(folder)
        clips, condition = shown(view)
        with torch.no_grad():
            scores = discriminator(clips, condition)
            discriminator._seconds_per_patch *= 4
            changes.append((discriminator(clips, condition) - scores).abs().max().item())
    assert changes[0] == 0.0 < 1e-5 < changes[1]


def test_new_head_scores_zero(vlm_folder: Path) -> None:
    section = section_for(vlm_folder)
    plan = plan_vlm(section, EncodersSection(), VideoSection())
    discriminator = build_vlm_discriminator(section, plan, dtype=torch.float32)
    scores = discriminator(*shown(build_pixel_view(section, plan, DCTCodec())))
    assert scores.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("vision", ["frozen", "lora", "full"])
def test_gradients_reach_exactly_what_is_trained(vlm_folder: Path, vision: str) -> None:
    discriminator, view = build(vlm_folder, vision=vision)
    discriminator(*shown(view)).square().sum().backward()
    trained = {name for name, each in discriminator.named_parameters() if each.requires_grad}
    reached = {name for name, each in discriminator.named_parameters() if each.grad is not None and each.grad.any()}
    assert reached == trained
    language = {name for name in trained if name.startswith("vlm.language_model.")}
    assert len(language) == 2 * 2 * 7, "A and B of q, k, v, o, gate, up, down in two layers"
    assert all(".lora_" in name for name in language)
    assert trained - language >= {"score_token", "head.weight", "head.bias"}
    tower = {name for name in trained if name.startswith("vlm.visual.")}
    every = {name for name, _ in discriminator.named_parameters() if name.startswith("vlm.visual.")}
    assert tower == {"frozen": set(), "full": every, "lora": {name for name in every if ".lora_" in name}}[vision]
    assert (vision == "frozen") == (not tower)


def test_checkpointed_gradients_are_the_same(vlm_folder: Path) -> None:
    gradients, passes = [], []
    for checkpointed in (False, True):
        discriminator, view = build(vlm_folder, vision="full", gradient_checkpointing=checkpointed)
        runs: list[nn.Module] = []
        for block in (discriminator.vlm.language_model.layers[0], discriminator.vlm.visual.blocks[0]):
            block.mlp.register_forward_pre_hook(lambda module, inputs, runs=runs: runs.append(module))
        discriminator(*shown(view)).sum().backward()
        passes.append(len(runs))
        gradients.append({name: each.grad for name, each in discriminator.named_parameters() if each.requires_grad})
    assert passes == [2, 4], "both towers are computed again in the backward"
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_scores_of_a_bfloat16_model_are_finer_than_bfloat16(vlm_folder: Path) -> None:
    discriminator, view = build(vlm_folder)
    clips, condition = shown(view)
    with torch.no_grad():
        exact = discriminator(clips, condition)
        for parameter in discriminator.parameters():  # DeepSpeed's cast: parameters alone, rotary frequencies stay
            parameter.data = parameter.data.bfloat16()
        scores = discriminator(clips, condition)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())
    torch.testing.assert_close(scores, exact, rtol=0.1, atol=0.1)  # 8 bits through four blocks


def test_wrong_conditions_are_refused(vlm_folder: Path) -> None:
    discriminator, view = build(vlm_folder)
    clips, condition = shown(view)
    for wrong in (condition[:2], torch.full_like(condition, -1)):
        with pytest.raises(ValueError, match=r"condition must be \[N, L\] with a text for each of 3 clips"):
            discriminator(clips, wrong)
