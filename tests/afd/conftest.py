"""Worker scripts as real ranks, and the folder of a tiny Wan pipeline."""

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


def run_worker(script: Path, *arguments: str, ranks: int = 1, launcher: str = "torchrun") -> str:
    """Run a worker script to its end and return what it printed; the test fails with that text if a rank fails.

    Args:
        script: the worker.
        arguments: passed on.
        ranks: number of processes.
        launcher: "torchrun", "deepspeed", or "plain" for one process without a launcher.
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
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{script.name} failed:\n{done.stdout[-4000:]}\n{done.stderr[:8000]}"
    return done.stdout


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """`launch(script, *arguments, ranks=, launcher=)`: the JSON that rank 0 wrote to the worker's first argument."""

    def start(script: Path, *arguments: str, ranks: int = 1, launcher: str = "torchrun") -> Any:
        result = tmp_path_factory.mktemp(script.stem) / "result.json"
        run_worker(script, str(result), *arguments, ranks=ranks, launcher=launcher)
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
