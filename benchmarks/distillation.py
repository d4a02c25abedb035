"""Distil the built-in world over several seeds and record what it did to physics and to quality.

    python benchmarks/distillation.py --label quickstart --config configs/quickstart.yaml --seeds 0,1,2
    python benchmarks/distillation.py --label weak-gravity --seeds 0 teacher.physics.gravity=0.33

Each seed is one real run of `launch/train.py`; a finished one of the same command is not repeated, one of another
command under the same label is an error. Rows go to benchmarks/results/distillation.csv, a table to the terminal.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "distillation.csv"
METRICS = (
    "gravity_error",
    "gravity_estimate",
    "trajectory_residual",
    "object_permanence",
    "dynamic_degree",
    "sharpness",
    "colour_fidelity",
    "direction_fidelity",
    "energy_error",
    "momentum_error",
)


def main() -> int:
    """Run the seeds, append their rows, print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", required=True, help="name of this setting in the results")
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--ds_config", default="configs/zero3.json")
    parser.add_argument("--seeds", type=_seeds, default=[0, 1, 2], help="comma-separated, such as 0,1,2")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "benchmarks")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    arguments = parser.parse_intermixed_args()
    try:
        rows = [run_seed(arguments, seed) for seed in arguments.seeds]
        append_rows(RESULTS, rows)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(arguments.label, rows))
    return 0


def _seeds(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def run_seed(arguments: argparse.Namespace, seed: int) -> dict[str, object]:
    """One run (or its earlier result) as a row: setting, time, commit, and base/student/teacher metrics.

    Raises:
        ValueError: the label's folder holds a run of another command.
    """
    output = arguments.output.resolve() / arguments.label / f"seed_{seed}"
    command = ["launch/train.py", "--ds_config", arguments.ds_config, "--config", arguments.config]
    command += ["--output_dir", str(output), f"seed={seed}", *arguments.overrides]
    started = time.time()
    if not (output / "evaluation.json").is_file():
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    measured = json.loads((output / "evaluation.json").read_text())
    facts = json.loads((output / "run.json").read_text())
    asked = " ".join(["train.py", *command[1:]])
    if facts["command"] != asked:
        raise ValueError(
            f"{output} holds the result of `{facts['command']}`, not of `{asked}`: choose another --label or --output"
        )
    row: dict[str, object] = {
        "label": arguments.label,
        "seed": seed,
        "command": f"{arguments.config} {' '.join(arguments.overrides)}".strip(),
        "date": time.strftime("%Y-%m-%d", time.gmtime(started)),
        "commit": facts["commit"],
        "device": facts["device"],
        "duration_s": facts["duration_s"],
        "steps": sum(1 for _ in (output / "metrics.jsonl").open()),
    }
    for model in ("base", "student", "teacher"):
        for metric in METRICS:
            row[f"{model}/{metric}"] = measured[model][metric]["mean"]
    return row


def append_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Add rows to the results; a row of the same label and seed is replaced.

    Raises:
        ValueError: the file was written with other columns; it stays as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    old = [dict[str, object](row) for row in csv.DictReader(path.open())] if path.is_file() else []
    if old and list(old[0]) != list(rows[0]):
        raise ValueError(f"{path} has other columns than this version writes: set it aside first")
    new = {(row["label"], str(row["seed"])) for row in rows}
    kept = [row for row in old if (row["label"], str(row["seed"])) not in new]
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows([*kept, *rows])
    partial.replace(path)


def summary(label: str, rows: list[dict[str, object]]) -> str:
    """A Markdown table: mean +- standard error over the seeds, and the ratio student / base."""
    lines = [
        f"{label}: {len(rows)} seeds",
        "| metric | base | student | teacher | student / base |",
        "|---|---|---|---|---|",
    ]
    for metric in METRICS:
        cells, values = [], {}
        for model in ("base", "student", "teacher"):
            numbers = np.array([float(str(row[f"{model}/{metric}"])) for row in rows])
            error = numbers.std(ddof=1) / len(numbers) ** 0.5 if len(numbers) > 1 else 0.0
            values[model] = numbers.mean()
            cells.append(f"{numbers.mean():.3f} +- {error:.3f}")
        lines.append(f"| {metric} | {' | '.join(cells)} | {values['student'] / values['base']:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
