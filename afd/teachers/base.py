"""The black-box contract of a teacher: a prompt and a seed in, a finished video out.

Leaves out everything a closed video service does not give: scores, latents, trajectories, sampling steps.
"""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class FinishedVideo:
    """One finished teacher video.

    Args:
        prompt: the text the teacher was asked for.
        seed: the integer that makes this video reproducible for the same prompt.
        mp4: the encoded file, container included.
        source_id: a name unique to (teacher, its settings, prompt, seed).
    """

    prompt: str
    seed: int
    mp4: bytes
    source_id: str


class Teacher(Protocol):
    """Anything that turns a prompt into a finished video."""

    def generate(self, prompt: str, seed: int) -> FinishedVideo:
        """Return the finished video of `prompt` drawn with `seed`; the same pair gives the same video."""
        ...
