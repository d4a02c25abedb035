"""The README.md of an exported student: what it is, how to load it, and what is known about how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from afd.config import RunConfig, StudentShape
from afd.config_file import dump_config
from afd.train.commit import list_commits, read_manifest

_LOAD = """```python
from diffusers import DiffusionPipeline, WanTransformer3DModel

# Runs pipeline.py of this folder, which samples chunk by chunk; read it before you trust it. diffusers refuses without
# the flag; imported from that file, CausalWanPipeline.from_pretrained(folder) does without.
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
transformer = WanTransformer3DModel.from_pretrained(folder)  # the weights alone
```"""
_ADAPTER = """
The adapter is not merged; `lora/` holds it in peft's format:

```python
from peft import PeftModel

pipe.transformer = PeftModel.from_pretrained(pipe.transformer, f"{folder}/lora").merge_and_unload()
```
"""


def write_card(
    source: Path, shape: StudentShape, *, weights: str, lora: str | None, config: RunConfig | None, commit: Path | None
) -> str:
    """The text, as YAML front matter and Markdown.

    Args:
        source: where the weights were read.
        shape: the student's dimensions.
        weights: "average" or "raw".
        lora: "merged" or "separate"; None without adapters.
        config: the run's configuration, when known.
        commit: the commit in its run's checkpoints folder; None for weights that are not ours.
    """
    task = "image-to-video" if shape.condition_channels or shape.image_dim else "text-to-video"
    parts = [
        f"---\nlibrary_name: diffusers\npipeline_tag: {task}\ntags: [afd, wan, causal, distillation]\n---",
        f"# Causal Wan student ({task})",
        "Generates latent frames chunk by chunk, each chunk attending to what came before. Licence: that of the base "
        "weights, and the terms of the teacher whose videos it was trained on.",
        _LOAD + (_ADAPTER if lora == "separate" else ""),
        "## Weights",
        _bullets(_weight_facts(source, shape, weights, lora, commit)),
    ]
    if config is not None and commit is not None:
        parts += ["## Data", _bullets(_data_facts(config))]
        parts += ["## Metrics", _metrics(commit, weights, config.num_steps)]
        parts += ["## Configuration", f"```yaml\n{dump_config(config).rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"


def _weight_facts(
    source: Path, shape: StudentShape, weights: str, lora: str | None, commit: Path | None
) -> dict[str, Any]:
    chunk = str(shape.chunk_frames)
    if shape.first_chunk_frames:
        chunk += f", the first {shape.first_chunk_frames}"
    window = "everything before" if shape.window_frames is None else f"the last {shape.window_frames} frames"
    facts: dict[str, Any] = {
        "read from": source.name,
        "which": weights,
        "adapters": lora or "none",
        "architecture": f"{shape.num_layers} layers, width {shape.dim} = {shape.num_heads} heads x {shape.head_dim}",
        "latent frames per chunk": chunk,
        "sees": window + (f" and the first {shape.sink_frames}" if shape.sink_frames else ""),
    }
    if commit is not None:
        manifest = read_manifest(commit)
        facts |= {"training steps": manifest["step"], "ranks": manifest["world_size"]}
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
        run = commit.parent.parent / "run.json"
        if run.is_file():
            facts["code"] = json.loads(run.read_text())["commit"]
    return facts


def _data_facts(config: RunConfig) -> dict[str, Any]:
    video = config.video
    return {
        "teacher": config.teacher.kind,
        "training prompts, one teacher video each": config.teacher.num_prompts,
        "held-out prompts": config.teacher.num_heldout_prompts,
        "video": f"{video.num_frames} latent frames of {video.width} x {video.height} at {video.fps:g} fps",
        "codec": config.encoders.codec,
    }


def _metrics(commit: Path, weights: str, num_steps: int) -> str:
    """A table of the run's last evaluation on held-out prompts, where it measured these very weights.

    It is the averaged student's at the end of the run. Files made before the step was written beside it count for the
    run's last commit only, where the run was over.
    """
    file = commit.parent.parent / "evaluation.json"
    if not file.is_file():
        return "The run has not been evaluated yet."
    summary, step = json.loads(file.read_text()), read_manifest(commit)["step"]
    is_last = step == num_steps and [newest for newest, _ in list_commits(commit.parent)[:1]] == [step]
    evaluated = (summary.pop("step", step if is_last else None), summary.pop("weights", "ema"))
    if evaluated != (step, {"average": "ema"}.get(weights, weights)):
        return "This commit was not evaluated."
    columns = list(summary)
    rows = [f"| held-out mean | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for metric in summary[columns[-1]]:
        values = [summary[column].get(metric, {}).get("mean") for column in columns]
        cells = " | ".join("" if value is None else f"{value:.4g}" for value in values)
        rows.append(f"| {metric} | {cells} |")
    return "\n".join(rows)


def _bullets(facts: dict[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())
