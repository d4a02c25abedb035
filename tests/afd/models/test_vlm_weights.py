"""Plain VLM folders and VideoAlign checkpoints: a tiny reward model in that format, its own scores, and errors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from afd.config import EncodersSection, VideoSection, VLMSection
from afd.models.vlm_builder import build_vlm_discriminator, plan_vlm
from afd.models.vlm_discriminator import VLMDiscriminator
from afd.models.vlm_frames import patchify
from afd.models.vlm_weights import DIMENSIONS, current_name, load_tokenizer, load_vlm

RANK, ALPHA = 4, 8
REWARD_TOKENS = [f"<|{dimension}_reward|>" for dimension in DIMENSIONS]


class RewardModel(transformers.Qwen2VLForConditionalGeneration):
    """VideoAlign's Qwen2VLRewardModelBT: a linear head on the hidden states, read at the reward tokens."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.rm_head = nn.Linear(config.text_config.hidden_size, len(DIMENSIONS), bias=False)


def old_name(name: str) -> str:
    """The name that transformers 4.45 gave a parameter of a peft model."""
    name = name.replace("base_model.model.model.visual.", "base_model.model.visual.")
    return name.replace("base_model.model.model.language_model.", "base_model.model.model.")


def make_reward_model(folder: Path) -> tuple[Any, Any]:
    """A random VideoAlign model on a VLM folder: reward tokens behind the vocabulary, adapters, everything trained."""
    plain: Any = transformers.Qwen2VLForConditionalGeneration.from_pretrained(folder)
    model: Any = RewardModel(plain.config)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert (missing, unexpected) == (["rm_head.weight"], [])
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": REWARD_TOKENS})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    linear = [name for name, each in model.named_modules() if isinstance(each, nn.Linear) and "language_model" in name]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=linear, task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(model, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name or ".visual." in name or "rm_head" in name:
                nn.init.normal_(parameter, std=0.2)
        embedding = adapted.get_input_embeddings().weight
        nn.init.normal_(embedding.data[-len(DIMENSIONS) :])
    return adapted.eval(), tokenizer


def write_config(folder: Path, **changes: Any) -> None:
    lora = {"lora_enable": True, "lora_r": RANK, "lora_alpha": ALPHA} | changes
    model = {"output_dim": 3, "use_special_tokens": True, "reward_token": "special"}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"data_config": {}, "training_args": {}, "model_config": model, "peft_lora_config": lora})
    (folder / "model_config.json").write_text(text)


def write_full(model: Any, folder: Path) -> Path:
    """`save_full_model True`: one model.pth with every weight."""
    write_config(folder)
    (folder / "checkpoint-11").mkdir()
    state = {old_name(name): each.detach().clone() for name, each in model.state_dict().items()}
    torch.save(state, folder / "checkpoint-11" / "model.pth")
    return folder


def write_parts(model: Any, folder: Path) -> Path:
    """`save_full_model False`: peft's adapter file, and the other trained weights."""
    write_config(folder)
    for step in ("checkpoint-2", "checkpoint-11"):  # the newest counts
        (folder / step).mkdir()
    state = {old_name(name): each.detach().clone() for name, each in model.named_parameters()}
    adapter = {name.replace(".default.", "."): each for name, each in state.items() if ".lora_" in name}
    save_file(
        {name: each.contiguous() for name, each in adapter.items()},
        folder / "checkpoint-11" / "adapter_model.safetensors",
    )
    trained = (".visual.", ".rm_head.", ".embed_tokens.")
    others = {name: each for name, each in state.items() if any(part in name for part in trained)}
    torch.save(others, folder / "checkpoint-11" / "non_lora_state_dict.pth")
    return folder


@pytest.fixture(scope="module")
def reward(vlm_folder: Path) -> tuple[Any, Any]:
    return make_reward_model(vlm_folder)


@pytest.fixture(scope="module")
def saved(reward: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videoalign")
    return {"full": write_full(reward[0], folder / "full"), "parts": write_parts(reward[0], folder / "parts")}


Load = Callable[..., VLMDiscriminator]


@pytest.fixture
def load(vlm_folder: Path) -> Load:
    """`load(checkpoint, **changes)`: the discriminator that a section with this init_from builds."""

    def build(checkpoint: Path | None, **changes: Any) -> VLMDiscriminator:
        sizes: dict[str, Any] = {"min_pixels": 256, "max_pixels": 1024, "lora_rank": RANK, "lora_alpha": ALPHA}
        section = VLMSection(path=vlm_folder, init_from=checkpoint, positions="sequential", **(sizes | changes))
        shown = plan_vlm(section, EncodersSection(), VideoSection())
        return build_vlm_discriminator(section, shown, dtype=torch.float32)

    return build


def own_scores(model: Any, tokenizer: Any, clips: Tensor, texts: list[str], dimension: str) -> Tensor:
    """VideoAlign's forward, one clip at a time: embeddings, video scattered in, positions 0, 1, 2, ..., head."""
    inner, scores = model.base_model.model, []
    token = tokenizer.convert_tokens_to_ids(REWARD_TOKENS[DIMENSIONS.index(dimension)])
    for clip, text in zip(clips, texts, strict=True):
        _, t, height, width = clip.shape
        grid = torch.tensor([[t // 2, height // 4, width // 4]])
        pads = "<|video_pad|>" * (int(grid.prod()) // 4)
        whole = (
            VLMSection().template.replace("{video}", f"<|vision_start|>{pads}<|vision_end|>").replace("{prompt}", text)
        )
        ids = torch.tensor([[*tokenizer(whole)["input_ids"], token]])
        embeds = inner.get_input_embeddings()(ids)
        video = inner.model.visual(patchify(clip[None], patch=4, temporal=2, merge=2), grid_thw=grid).pooler_output
        embeds = embeds.masked_scatter((ids == inner.config.video_token_id)[..., None], video)
        positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
        hidden = inner.model.language_model(inputs_embeds=embeds, position_ids=positions).last_hidden_state
        scores.append(inner.rm_head(hidden[:, -1])[0, DIMENSIONS.index(dimension)])
    return torch.stack(scores)


@pytest.mark.parametrize(("kind", "dimension"), [("full", "MQ"), ("parts", "TA"), ("parts", "VQ")])
def test_loaded_checkpoint_scores_as_videoalign_does(
    kind: str, dimension: str, reward: tuple[Any, Any], saved: dict[str, Path], load: Load
) -> None:
    clips, texts = torch.rand(2, 3, 4, 16, 16), ["a ball falls", "two cubes"]
    discriminator = load(saved[kind], dimension=dimension)
    tail = VLMSection().template.partition("{video}")[2]
    rows = [reward[1](tail.replace("{prompt}", text))["input_ids"] for text in texts]
    condition = torch.full((2, max(map(len, rows))), -1)
    for row, ids in zip(condition, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    with torch.no_grad():
        expected = own_scores(*reward, clips, texts, dimension)
        torch.testing.assert_close(discriminator(clips, condition), expected, rtol=1e-4, atol=1e-5)
    assert expected.abs().min() > 1e-3


def test_names_of_a_published_checkpoint() -> None:
    layer = "base_model.model.model.layers.27"
    assert {name: current_name(name) for name in (
        f"{layer}.self_attn.q_proj.base_layer.bias", f"{layer}.mlp.down_proj.lora_A.default.weight",
        f"{layer}.mlp.down_proj.lora_B.weight", f"{layer}.input_layernorm.weight",
        "base_model.model.visual.blocks.31.attn.qkv.weight", "base_model.model.visual.merger.mlp.2.bias",
        "base_model.model.model.norm.weight", "base_model.model.rm_head.weight", "base_model.model.lm_head.weight",
    )} == {
        f"{layer}.self_attn.q_proj.base_layer.bias": "language_model.layers.27.self_attn.q_proj.bias",
        f"{layer}.mlp.down_proj.lora_A.default.weight": "language_model.layers.27.mlp.down_proj.lora_A.default.weight",
        f"{layer}.mlp.down_proj.lora_B.weight": "language_model.layers.27.mlp.down_proj.lora_B.default.weight",
        f"{layer}.input_layernorm.weight": "language_model.layers.27.input_layernorm.weight",
        "base_model.model.visual.blocks.31.attn.qkv.weight": "visual.blocks.31.attn.qkv.weight",
        "base_model.model.visual.merger.mlp.2.bias": "visual.merger.mlp.2.bias",
        "base_model.model.model.norm.weight": "language_model.norm.weight",
        "base_model.model.rm_head.weight": "head.weight",
        "base_model.model.lm_head.weight": "",
    }  # fmt: skip


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {key: value for key, value in state.items() if key != name}


def spoil_full(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "checkpoint-11" / "model.pth"
    state = torch.load(file, weights_only=True)
    torch.save(change(state), file)


def spoil_adapter(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "checkpoint-11" / "adapter_model.safetensors"
    state = load_file(file)
    save_file(change(state), file)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
WRONG: list[tuple[str, Callable[[Path], Any], str]] = [
    ("full", lambda at: spoil_full(at, without("base_model.model.rm_head.weight")), "must hold rm_head.weight"),
    ("full", lambda at: spoil_full(at, lambda s: {k.removeprefix("base_model.model."): v for k, v in s.items()}),
     "VideoAlign names begin with 'base_model.model.', got"),
    ("full", lambda at: spoil_full(at, lambda s: s | {"base_model.model.value_head.weight": torch.zeros(1)}),
     "1 tensors without a place: value_head.weight"),
    ("full", lambda at: spoil_full(at, without(f"{Q}.base_layer.weight")),
     "lacks 1 tensors: language_model.layers.0.self_attn.q_proj.weight"),
    ("parts", lambda at: spoil_adapter(at, without(f"{Q}.lora_B.weight")),
     "lacks 1 tensors: language_model.layers.0.self_attn.q_proj.lora_B.default.weight"),
    ("parts", lambda at: spoil_adapter(at, lambda s: s | {f"{Q}.lora_B.weight": torch.zeros(16, 4)}),
     r"q_proj.lora_B.default.weight must be \[32, 4\], got \[16, 4\]"),
    ("parts", lambda at: (at / "checkpoint-11" / "adapter_model.safetensors").write_bytes(b"not tensors"),
     "is no readable VideoAlign file"),
    ("full", lambda at: (at / "checkpoint-11" / "model.pth").write_bytes(b"not tensors"), "no readable VideoAlign"),
    ("full", lambda at: torch.save([1], at / "checkpoint-11" / "model.pth"), "must hold tensors by name, got list"),
    ("full", lambda at: write_config(at, lora_r=64), "lora_rank and lora_alpha must be 64 and 8"),
    ("full", lambda at: write_config(at, lora_enable=False), "must have lora_enable"),
    ("full", lambda at: (at / "model_config.json").write_text("{}"), "must be VideoAlign's .*, got KeyError"),
    ("full", lambda at: (at / "model_config.json").unlink(), "must hold model_config.json of VideoAlign"),
    ("parts", lambda at: (at / "checkpoint-11" / "non_lora_state_dict.pth").unlink(),
     "must hold model.pth, or adapter_model.safetensors and non_lora_state_dict.pth, got neither"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "spoil", "message"), WRONG, ids=[message[:40] for _, _, message in WRONG])
def test_what_is_no_videoalign_checkpoint_is_refused(
    kind: str, spoil: Callable[[Path], Any], message: str, saved: dict[str, Path], load: Load, tmp_path: Path
) -> None:
    copy = tmp_path / kind
    shutil.copytree(saved[kind], copy)
    spoil(copy)
    with pytest.raises(ValueError, match=message):
        load(copy)


def test_plain_folders_are_checked(vlm_folder: Path, tmp_path: Path) -> None:
    def plan(folder: Path | None) -> None:
        plan_vlm(VLMSection(path=folder, min_pixels=256, max_pixels=1024), EncodersSection(), VideoSection())

    with pytest.raises(ValueError, match=r"discriminator\.vlm\.path must name a Qwen2-VL or Qwen2\.5-VL folder"):
        plan(None)
    with pytest.raises(ValueError, match="must be a folder, which is missing"):
        plan(tmp_path / "nowhere")
    for name in ("config.json", "tokenizer_config.json", "model.safetensors"):
        copy = tmp_path / name
        shutil.copytree(vlm_folder, copy)
        (copy / name).unlink()
        with pytest.raises(ValueError, match=r"must hold .*(config\.json|weights)"):
            plan(copy)
    other = tmp_path / "other"
    shutil.copytree(vlm_folder, other)
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"must hold one of \['qwen2_5_vl', 'qwen2_vl'\], got 'llama'"):
        plan(other)
    short = tmp_path / "short"
    shutil.copytree(vlm_folder, short)
    weights = load_file(short / "model.safetensors")
    dropped = next(name for name in weights if "layers.1.mlp.up_proj" in name)
    save_file(
        {name: each for name, each in weights.items() if name != dropped}, short / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"has 1 missing keys: model\.language_model\.layers\.1\.mlp\.up_proj"):
        load_vlm(short, dtype=torch.float32)
