"""How much of physics the discriminator sees, and how far the same updates go under a judge that sees all of it.

    python benchmarks/judge.py --label latent
    python benchmarks/judge.py --label backbone discriminator.kind=backbone discriminator.input_noise=0.2
    python benchmarks/judge.py --label perfect --perfect discriminator.warmup_steps=0

Each is one real AFD run on the built-in world. Every step's rollouts are measured, and *agreement* is the rank
correlation between D's scores and minus the gravity error within the group of a prompt: 1 where D ranks its rollouts as
the truth does, 0 where it sees nothing of it. With `--perfect` minus the error takes the scores' place. That is no
method, since no black-box teacher tells it: it bounds what a better discriminator could bring, updates and student
being the same. Means over windows of steps go to benchmarks/results/judge.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measurement import append_csv, describe_commit
from torch import Tensor

from afd.config import RunConfig
from afd.evaluation.heldout import measure_clip
from afd.models.encoders import VideoCodec, load_codec
from afd.teachers.physics_scene import parse_prompt
from afd.train import launch, objectives

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "judge.csv"


def main() -> int:
    """Train with the judge watched, then write what was seen; returns the training command's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", required=True, help="name of this run in the results")
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--perfect", action="store_true", help="score rollouts by their true gravity error")
    parser.add_argument("--window", type=int, default=50, help="steps to a row")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "judge")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    arguments = parser.parse_intermixed_args()
    folder = arguments.output / arguments.label / f"seed_{arguments.seed}"
    watch = Watch(is_perfect=arguments.perfect)
    watch.install()
    code = launch.main(
        ["--config", arguments.config, "--output_dir", str(folder), "--fresh", f"seed={arguments.seed}",
         *arguments.overrides]
    )  # fmt: skip
    if code == 0:
        command = " ".join([arguments.config, *("--perfect",) * arguments.perfect, *arguments.overrides])
        facts = {"label": arguments.label, "seed": arguments.seed, "command": command, "commit": describe_commit()}
        rows = [{**facts, **row} for row in watch.rows(arguments.window)]
        append_csv(RESULTS, rows)
        for row in rows:
            print({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()})
    return code


@dataclass
class Watch:
    """Stands between the discriminator's scores and the student's update.

    Attributes:
        is_perfect: replace the scores by minus the gravity error.
        steps: per step, one (balls, agreement, mean gravity error) for each group.
    """

    is_perfect: bool
    steps: list[list[tuple[int, float, float]]] = field(default_factory=list)
    _shown: tuple[Tensor, tuple[str, ...], RunConfig] | None = None
    _codec: VideoCodec | None = None

    def install(self) -> None:
        """Put this in the place of the two functions of the AFD step that it watches."""
        objectives.roll_out = self._remembering(objectives.roll_out)
        objectives.score = self._judging(objectives.score)

    def _remembering(self, roll_out: Callable[..., Any]) -> Callable[..., Any]:
        def remembered(roles: Any, batch: Any, config: RunConfig, *args: Any, **kwargs: Any) -> Any:
            found = roll_out(roles, batch, config, *args, **kwargs)
            self._shown = (found[0].latents, batch.prompts, config)
            return found

        return remembered

    def _judging(self, score: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def judged(*args: Any) -> Tensor:
            scores = score(*args)
            errors = self._gravity_errors()
            assert self._shown is not None
            prompts = self._shown[1]
            groups = zip(prompts, scores.view(len(prompts), -1), errors.view(len(prompts), -1), strict=True)
            self.steps.append(
                [
                    (len(parse_prompt(prompt)), rank_correlation(mine.cpu().numpy(), -true.numpy()), true.mean().item())
                    for prompt, mine, true in groups
                ]
            )
            return -errors.to(scores) if self.is_perfect else scores

        return judged

    def _gravity_errors(self) -> Tensor:
        """Of the last rollouts [N], prompt by prompt."""
        assert self._shown is not None
        latents, prompts, config = self._shown
        self._codec = self._codec or load_codec(config.encoders, device=latents.device)
        group_size = len(latents) // len(prompts)
        errors = [
            measure_clip(self._codec.decode(clip[None])[0].cpu().numpy(), prompts[i // group_size], config)[
                "gravity_error"
            ]
            for i, clip in enumerate(latents)
        ]
        return torch.tensor(errors)

    def rows(self, window: int) -> list[dict[str, object]]:
        """Means over windows of steps, for prompts with one ball and with two."""
        rows: list[dict[str, object]] = []
        for start in range(0, len(self.steps), window):
            part = [group for step in self.steps[start : start + window] for group in step]
            for balls in sorted({group[0] for group in part}):
                chosen = np.array([group[1:] for group in part if group[0] == balls])
                agreement = chosen[:, 0][~np.isnan(chosen[:, 0])]
                rows.append(
                    {
                        "first_step": start + 1, "last_step": min(start + window, len(self.steps)), "balls": balls,
                        "groups": len(chosen), "agreement": float(agreement.mean()) if len(agreement) else "",
                        "gravity_error": float(chosen[:, 1].mean()),
                    }
                )  # fmt: skip
        return rows


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two vectors [n], ties sharing their mean rank; NaN where one is constant."""
    ranks = [np.array([(each < value).sum() + (each == value).sum() / 2 for value in each]) for each in (a, b)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return float("nan")
    return float(np.corrcoef(np.stack(ranks))[0, 1])


if __name__ == "__main__":
    sys.exit(main())
