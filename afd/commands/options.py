"""Options that several subcommands share, and the types of numbers that the command line takes."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

_Number = TypeVar("_Number", int, float)
_DEFAULT_CONFIG = Path("configs/quickstart.yaml")


def _number(kind: type[_Number], expected: str, is_right: Callable[[_Number], bool]) -> Callable[[str], _Number]:
    """An argparse type: a number with one property, which NaN has not."""

    def parse(text: str) -> _Number:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not is_right(value):
            raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")
        return value

    return parse


positive_int = _number(int, "an integer >= 1", lambda value: value >= 1)
non_negative_int = _number(int, "an integer >= 0", lambda value: value >= 0)
positive_float = _number(float, "a finite number > 0", lambda value: 0 < value < math.inf)
non_negative_float = _number(float, "a finite number >= 0", lambda value: 0 <= value < math.inf)
port = _number(int, "a port, 0 to 65535", lambda value: 0 <= value <= 65535)


def add_config(parser: argparse.ArgumentParser) -> None:
    """`--config FILE` and dotted overrides."""
    parser.add_argument("--config", type=Path, default=_DEFAULT_CONFIG)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
