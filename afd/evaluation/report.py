"""The report of a run: one HTML file that needs nothing else, built from the files of the output folder alone.

Reads `run.json`, `config.yaml`, `evaluation.json`, `metrics.jsonl`, `warmup.jsonl` and `samples/`; whatever is absent
is left out of the page. Curves are `curves`', thresholds `failure_signs`', the meaning of metrics `metric_facts`'.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from afd.evaluation.contact_sheet import contact_sheet
from afd.evaluation.curves import (
    PANELS,
    Panel,
    Series,
    draw_evaluation,
    draw_histogram,
    draw_panel,
    series_of,
    split_histograms,
)
from afd.evaluation.failure_signs import failure_signs
from afd.evaluation.metric_facts import FACTS, HEADLINE, Comparison, compare, format_value, terminal_table
from afd.journal import read_metrics

__all__ = ["build_report", "contact_sheet", "terminal_table"]

TEMPLATE = "report_template.html"
VIDEO_ROLES = ("teacher", "base", "student")
MAX_HEADLINES = 4
SOURCES = ("run.json", "config.yaml", "evaluation.json", "metrics.jsonl", "samples")


@dataclass(frozen=True)
class Figure:
    """A drawing with its title and the sentence on how to read it."""

    title: str
    svg: Markup
    how_to_read: str


@dataclass(frozen=True)
class Clip:
    """Videos of one prompt by role, as data addresses."""

    prompt: str
    videos: dict[str, str]


@dataclass(frozen=True)
class SampleStep:
    """What was sampled at one step."""

    step: int
    sheet: str | None
    clips: list[Clip]


def build_report(output_dir: Path) -> Path:
    """Write `report.html` into a run's output folder.

    Args:
        output_dir: the run's folder; only files in it are read.
    Returns:
        The report's path.
    Raises:
        FileNotFoundError: the folder holds none of the files a report is made of.
        ValueError: one of them is no whole JSON object.
    """
    output_dir = Path(output_dir)
    if not any((output_dir / name).exists() for name in SOURCES):
        raise FileNotFoundError(f"{output_dir} holds no run: expected one of {', '.join(SOURCES)}")
    run = _read_json(output_dir / "run.json")
    evaluation = _read_json(output_dir / "evaluation.json")
    series = series_of(read_metrics(output_dir / "metrics.jsonl"))
    warmup = series_of(read_metrics(output_dir / "warmup.jsonl"))
    rows = compare(evaluation)
    headline_names = evaluation.get("headline", HEADLINE)
    headlines = [row for name in headline_names for row in rows if row.name == name][:MAX_HEADLINES]
    config = output_dir / "config.yaml"
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template(TEMPLATE).render(
        title=run.get("title") or output_dir.resolve().name,
        facts=_facts(run, series),
        versions=run.get("versions", {}),
        headlines=[(row, _dots(row)) for row in headlines],
        rows=rows,
        format_value=format_value,
        is_number=lambda value: not math.isnan(value),
        figures=_figures(series, warmup),
        evaluation_figures=_evaluation_figures(series, evaluation),
        other_figures=_other_figures(series),
        signs=failure_signs(series, evaluation, warmup),
        samples=_samples(output_dir / "samples"),
        roles=VIDEO_ROLES,
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
    )
    path = output_dir / "report.html"
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must hold a whole JSON object: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def _facts(run: Mapping[str, Any], series: Mapping[str, Series]) -> dict[str, str]:
    """Facts about the run as label -> text, in the order in which `run.json` has them."""
    facts: dict[str, str] = {}
    steps = max((int(steps[-1]) for steps, _ in series.values() if len(steps)), default=0)
    for name, value in run.items():
        if name in ("title", "versions") or value in (None, ""):
            continue
        if name == "duration_s":
            facts["Duration"] = _duration(float(value))
        elif isinstance(value, int) and not isinstance(value, bool):
            facts[name.replace("_", " ").capitalize()] = f"{value:,}"
        else:
            facts[name.replace("_", " ").capitalize()] = value if isinstance(value, str) else json.dumps(value)
    if steps:
        facts["Student steps"] = f"{steps:,}"
    return facts


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _dots(row: Comparison) -> list[tuple[str, float]]:
    """Place base, student and teacher on a line from 0 to 100 per cent that starts at zero where the metric does."""
    values = {"base": row.base[0], "student": row.student[0], "teacher": row.teacher[0]}
    known = {role: value for role, value in values.items() if not math.isnan(value)}
    if not known:
        return []
    low, high = min(0.0, *known.values()), max(*known.values(), 0.0)
    span = (high - low) or 1.0
    return [(role, 3 + 94 * (value - low) / span) for role, value in known.items()]


def _figures(series: Mapping[str, Series], warmup: Mapping[str, Series]) -> list[Figure]:
    """Draw the training panels that have data, the discriminator's warm-up first, weight histograms last."""
    histograms, plain = split_histograms(series)
    figures = []
    accuracy = {name: values for name, values in warmup.items() if name == "discriminator/accuracy"}
    if accuracy:
        panel = Panel(
            "Discriminator's warm-up",
            (),
            "Accuracy before the student moves: it should leave 0.5 (dashed) without settling at 1.",
            limits=(0.0, 1.02),
            reference=0.5,
        )
        figures.append(Figure(panel.title, Markup(draw_panel(accuracy, panel)), panel.how_to_read))
    for panel in PANELS:
        chosen = {name: values for name, values in plain.items() if _belongs(name, panel)}
        if chosen:
            figures.append(Figure(panel.title, Markup(draw_panel(chosen, panel)), panel.how_to_read))
    for name, bins in histograms.items():
        title = f"Histogram of {name}"
        how = "Bins from 0 (bottom) to 1 (top), bright is many: mass at both edges means that the clip saturates."
        figures.append(Figure(title, Markup(draw_histogram(bins, title)), how))
    return figures


def _evaluation_figures(series: Mapping[str, Series], evaluation: Mapping[str, Any]) -> list[Figure]:
    """Draw the held-out metrics over steps, starting from the base student at step 0."""
    levels = {row.name: row for row in compare(evaluation)}
    figures = []
    for name, (steps, values) in series.items():
        metric = name.removeprefix("eval/")
        if name == metric:
            continue
        row = levels.get(metric)
        base, teacher = (row.base[0], row.teacher[0]) if row else (float("nan"), float("nan"))
        fact = FACTS.get(metric)
        title = f"{fact.label} [{fact.unit}]" if fact and fact.unit else fact.label if fact else metric
        svg = draw_evaluation(f"eval {metric}", (steps, values), base=base, teacher=teacher)
        figures.append(Figure(title, Markup(svg), fact.meaning if fact else ""))
    return figures


def _other_figures(series: Mapping[str, Series]) -> list[Figure]:
    """Draw every recorded metric that no panel claims, so that nothing recorded stays unseen."""
    _, plain = split_histograms(series)
    rest = [n for n in plain if not n.startswith("eval/") and not any(_belongs(n, panel) for panel in PANELS)]
    return [Figure(n, Markup(draw_panel({n: plain[n]}, Panel(n, (), ""))), "") for n in rest]


def _belongs(name: str, panel: Panel) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in panel.patterns)


def _samples(folder: Path) -> list[SampleStep]:
    """Collect contact sheets of all steps, newest first, and the videos of the newest step that has any."""
    steps = sorted((path for path in folder.glob("step_*") if path.is_dir()), reverse=True)
    samples: list[SampleStep] = []
    has_clips = False
    for path in steps:
        sheet = path / "contact_sheet.png"
        clips = [] if has_clips else _clips(path)
        has_clips = has_clips or bool(clips)
        data = _data_address(sheet, "image/png") if sheet.is_file() else None
        if data or clips:
            samples.append(SampleStep(int(path.name.removeprefix("step_")), data, clips))
    return samples


def _clips(folder: Path) -> list[Clip]:
    prompts: dict[str, dict[str, str]] = {}
    for path in sorted(folder.glob("*.mp4")):
        slug, _, role = path.stem.rpartition(".")
        prompts.setdefault(slug, {})[role] = _data_address(path, "video/mp4")
    return [Clip(slug.replace("-", " "), videos) for slug, videos in prompts.items()]


def _data_address(path: Path, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
