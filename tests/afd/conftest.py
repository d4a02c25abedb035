"""Worker scripts as real ranks, the folder of a tiny Wan pipeline, and tiny vision-language models."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import afd

ROOT = Path(afd.__file__).parents[1]
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

Launch = Callable[..., Any]


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_worker(script: Path, *arguments: str, ranks: int = 1, launcher: str = "torchrun", timeout_s: int = 300) -> str:
    """Run a worker script to its end and return what it printed; the test fails with that text if a rank fails.

    Args:
        script: the worker.
        arguments: passed on.
        ranks: number of processes.
        launcher: "torchrun", "deepspeed", or "plain" for one process without a launcher.
        timeout_s: how long it may take.
    """
    prefix = {
        "plain": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"],
        "deepspeed": [
            *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)),
            *("--master_port", _free_port()),
        ],
    }[launcher]
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    environment["OMP_NUM_THREADS"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [*prefix, str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, f"{script.name} failed:\n{done.stdout[-4000:]}\n{done.stderr[:8000]}"
    return done.stdout


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """`launch(script, *arguments, ranks=, launcher=, timeout_s=)`: the JSON that rank 0 wrote to the first argument."""

    def start(script: Path, *arguments: str, ranks: int = 1, launcher: str = "torchrun", timeout_s: int = 300) -> Any:
        result = tmp_path_factory.mktemp(script.stem) / "result.json"
        run_worker(script, str(result), *arguments, ranks=ranks, launcher=launcher, timeout_s=timeout_s)
        return json.loads(result.read_text())

    return start


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan image-to-video pipeline's folder without its transformer: VAE, UMT5, tokenizer, CLIP and its processor."""
    import torch
    from diffusers import AutoencoderKLWan
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    from afd.models.encoders import save_tiny_text_encoder

    folder = tmp_path_factory.mktemp("pipeline")
    clip: dict[str, Any] = {"hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 2}
    clip |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    sizes: dict[str, Any] = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae: Any = AutoencoderKLWan(
            base_dim=4,
            z_dim=16,
            num_res_blocks=1,
            latents_mean=[0.1 * i for i in range(16)],
            latents_std=[1.0 + 0.1 * i for i in range(16)],
        )
        vae.save_pretrained(folder / "vae")
        CLIPVisionModel(CLIPVisionConfig(**clip)).save_pretrained(folder / "image_encoder")
    CLIPImageProcessorPil(**sizes).save_pretrained(folder / "image_processor")
    save_tiny_text_encoder(folder / "text_encoder", ("a", "red", "ball", "falls"), text_dim=20, seed=1)
    (folder / "tokenizer").mkdir()
    for file in list((folder / "text_encoder").glob("*token*")):
        file.rename(folder / "tokenizer" / file.name)
    index = {
        "_class_name": "WanImageToVideoPipeline",
        "vae": ["diffusers", "AutoencoderKLWan"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "image_encoder": ["transformers", "CLIPVisionModel"],
        "image_processor": ["transformers", "CLIPImageProcessor"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


_CHAT_TOKENS = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")


def write_vlm(folder: Path, *, family: str = "qwen2_vl", seed: int = 0, **vision: Any) -> Path:
    """A random Qwen2-VL (or Qwen2.5-VL) folder: their own classes and files, a byte-level tokenizer with 7 chat tokens.

    Patches are 4 x 4 pixels and merged 2 x 2; 2 vision blocks, 2 layers of width 32; 39k parameters.
    """
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokens = [f"<|{name}|>" for name in _CHAT_TOKENS]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.add_special_tokens({"pad_token": tokens[0], "additional_special_tokens": tokens[1:]})
    tokenizer.save_pretrained(folder)
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")
    }
    ids |= {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "vocab_size": 272, "max_position_embeddings": 4096, "tie_word_embeddings": True}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
    text |= {"bos_token_id": None, "eos_token_id": None}
    tower = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if family == "qwen2_vl":
        tower |= {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
        parts: Any = (transformers.Qwen2VLConfig, transformers.Qwen2VLForConditionalGeneration)
    else:
        tower |= {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "window_size": 16}
        tower |= {"fullatt_block_indexes": [1]}
        parts = (transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = parts[1](parts[0](text_config=text, vision_config=tower | vision, tie_word_embeddings=True, **ids))
        for name, parameter in model.named_parameters():  # biases and norms too, so that no term is trivial
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            torch.nn.init.normal_(parameter, mean=float(is_norm), std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vlm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2-VL folder."""
    return write_vlm(tmp_path_factory.mktemp("vlm") / "qwen2_vl")


@pytest.fixture(scope="session")
def vlm25_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL folder."""
    return write_vlm(tmp_path_factory.mktemp("vlm25") / "qwen2_5_vl", family="qwen2_5_vl")
