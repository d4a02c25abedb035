"""What a shard folder looks like: numbers, histograms, contact sheets, and a page to open after `afd prepare`.

Reads the shards as they are; pictures are decoded from the latents by the configured codec, as a student sees them.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import itertools
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from afd.config import EncodersSection
from afd.data.inspection import read_folder, read_rows
from afd.data.integrity import read_record
from afd.data.schema import Sample
from afd.data.writer import REJECTS_FILE
from afd.evaluation.contact_sheet import contact_sheet
from afd.models.encoders import load_codec

MEASURES = {
    "duration_s": "length of the finished video, s",
    "motion": "motion: mean |difference| of neighbouring frames",
    "brightness": "brightness: mean luma",
    "latent_std": "standard deviation of the latents",
    "words": "words in the prompt",
}
_QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
_NUM_BINS = 40


@dataclass
class _Tally:
    """Counts and values over the samples; 5 doubles each, so 10 M samples are 400 MB."""

    values: dict[str, array[float]] = field(default_factory=lambda: {name: array("d") for name in MEASURES})
    prompts: Counter[bytes] = field(default_factory=Counter)
    teachers: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)

    def add(self, sample: Sample) -> None:
        for name in ("duration_s", "motion", "brightness"):
            self.values[name].append(getattr(sample, name))
        self.values["latent_std"].append(float(sample.latents.float().std()))
        self.values["words"].append(len(sample.prompt.split()))
        self.prompts[hashlib.sha256(sample.prompt.encode()).digest()[:12]] += 1
        self.teachers[f"{sample.teacher} {sample.teacher_version}".strip()] += 1
        self.licences[sample.licence or "unknown"] += 1


def write_stats(shards: Path, out: Path) -> dict[str, Any]:
    """Write stats.json and stats.png (histograms) into `out` and return the numbers.

    Raises:
        ValueError: the folder is broken.
    """
    record, tally = read_record(shards), _Tally()
    for sample in read_folder(shards):
        tally.add(sample)
    stats: dict[str, Any] = {
        "shards": str(shards),
        "num_samples": record.num_samples,
        "num_prompts": len(tally.prompts),
        "most_videos_of_a_prompt": max(tally.prompts.values()),
        "num_shards": len(record.shards),
        "num_bytes": sum((shard.packed or shard.raw).size for shard in record.shards),
        "latent_shape": list(record.latent_shape),
        "prompt_embeds_shape": list(record.prompt_embeds_shape),
        "fps": record.fps,
        "teachers": dict(tally.teachers),
        "licences": dict(tally.licences),
    }
    for name, values in tally.values.items():
        low, early, median, late, high = np.quantile(values, _QUANTILES)
        counts, edges = np.histogram(values, bins=_NUM_BINS)
        stats[name] = {
            "min": float(low),
            "p05": float(early),
            "median": float(median),
            "p95": float(late),
            "max": float(high),
            "mean": float(np.mean(values)),
            "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
        }
    out.mkdir(parents=True, exist_ok=True)
    (out / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
    _plot(stats, out / "stats.png")
    return stats


def _plot(stats: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(MEASURES), figsize=(3.4 * len(MEASURES), 2.8), layout="constrained")
    for axis, (name, label) in zip(axes, MEASURES.items(), strict=True):
        histogram = stats[name]["histogram"]
        axis.stairs(histogram["counts"], histogram["edges"], fill=True, color="#186cd6")
        axis.axvline(stats[name]["median"], color="#202c2c", linewidth=1)
        axis.set_xlabel(label, fontsize=8)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("videos", fontsize=8)
    figure.suptitle(f"{stats['num_samples']} videos, {stats['num_prompts']} prompts; line: median", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_preview(shards: Path, path: Path, *, num_videos: int = 8, upscale: int | None = None) -> Path:
    """Write a contact sheet of videos spread evenly over the folder: one row each, its prompt above.

    Raises:
        ValueError: the folder is broken, or does not say which codec made it.
    """
    samples = _spread(shards, num_videos)
    codec = load_codec(_encoders_of(shards))
    rows = {}
    for number, sample in enumerate(samples):
        frames = codec.decode(sample.latents[None].float())[0].numpy()
        label = "teacher" + "\u200b" * number  # rows are told apart by their labels; these look alike
        rows[f"{label}: {sample.prompt}"] = frames
    height = next(iter(rows.values())).shape[1]
    return contact_sheet(rows, path, upscale=upscale or max(1, 64 // height))


def _encoders_of(shards: Path) -> EncodersSection:
    settings = read_record(shards).metadata.get("encoders")
    if settings is None:
        raise ValueError(f"{shards}: dataset.json must say in metadata.encoders which codec made the latents")
    return EncodersSection.model_validate(settings)


def _spread(shards: Path, count: int) -> list[Sample]:
    total = read_record(shards).num_samples
    if count < 1:
        raise ValueError(f"the number of videos must be >= 1, got {count}")
    wanted = set(np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist())
    return read_rows(shards, wanted)


def write_summary(folders: Mapping[str, Path], path: Path, *, num_videos: int = 12) -> Path:
    """Write one HTML file: counts, thumbnails, histograms and the reasons of the rejects of both splits."""
    parts = []
    for split, shards in folders.items():
        codec = load_codec(_encoders_of(shards))
        stats = write_stats(shards, path.parent / f"stats-{split}")
        picture = base64.b64encode((path.parent / f"stats-{split}" / "stats.png").read_bytes()).decode()
        cards = "".join(_card(sample, codec) for sample in _spread(shards, num_videos))
        facts = ", ".join(f"{stats[name]} {label}" for name, label in _FACTS.items())
        parts.append(f"<h2>{split}</h2><p>{facts}</p><div class=g>{cards}</div>")
        parts.append(f'<img class=h src="data:image/png;base64,{picture}" alt="histograms">')
        parts.append(_rejects(shards / REJECTS_FILE))
    path.write_text(f"<!doctype html><meta charset=utf-8><title>shards</title>{_STYLE}{''.join(parts)}")
    return path


_FACTS = {"num_samples": "videos", "num_prompts": "prompts", "num_shards": "shards", "num_bytes": "bytes"}
_STYLE = (
    "<style>body{font:14px system-ui;margin:2em;color:#20242c;background:#fafaf7}"
    ".g{display:flex;flex-wrap:wrap;gap:1em}figure{margin:0;width:392px}img{image-rendering:pixelated}figcaption{font-size:12px;color:#555}.h{max-width:100%}"
    "td{padding:0 1em 0 0;vertical-align:top}</style>"
)


def _card(sample: Sample, codec: Any) -> str:
    """First, middle and last frame side by side, the prompt below."""
    frames = codec.decode(sample.latents[None].float())[0].numpy()
    chosen = frames[[0, len(frames) // 2, len(frames) - 1]]
    strip = Image.fromarray((np.concatenate(list(chosen), axis=1) * 255 + 0.5).astype(np.uint8))
    strip = strip.resize((384, round(384 * strip.height / strip.width)), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    strip.save(buffer, "JPEG", quality=85)
    picture = base64.b64encode(buffer.getvalue()).decode()
    text = html.escape(sample.prompt[:200])
    return f'<figure><img src="data:image/jpeg;base64,{picture}"><figcaption>{text}</figcaption></figure>'


def _rejects(path: Path, limit: int = 200) -> str:
    if not path.is_file():
        return ""
    with path.open() as file:
        reasons = Counter(_kind(json.loads(line)["reason"]) for line in file)
        file.seek(0)
        rows = [json.loads(line) for line in itertools.islice(file, limit)]
    if not rows:
        return "<p>No video was rejected.</p>"
    kinds = "".join(f"<tr><td>{count}<td>{html.escape(reason)}" for reason, count in reasons.most_common(20))
    table = "".join(_row((row.get("file", row["source_id"]), row["reason"])) for row in rows)
    more = f" (the first {limit})" if reasons.total() > limit else ""
    return f"<h3>{reasons.total()} rejected</h3><table>{kinds}</table><h3>by name{more}</h3><table>{table}</table>"


def _kind(reason: str) -> str:
    return reason.partition(":")[0].partition("(")[0].strip()[:80]


def _row(cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in cells)
