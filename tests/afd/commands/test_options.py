"""Numbers of the command line: taken, or refused with the option's name, what was expected and what came."""

from collections.abc import Callable
from typing import Any

import pytest

from afd.argument_parser import ArgumentParser
from afd.commands.options import non_negative_float, non_negative_int, port, positive_float, positive_int
from afd.config_file import ConfigError


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (positive_int, {"1": 1, "8": 8}, ["0", "-1", "1.5", "x", "", "inf"]),
        (non_negative_int, {"0": 0}, ["-1", "0.0"]),
        (positive_float, {"3": 3.0, "1e-3": 1e-3}, ["0", "-1", "inf", "nan", "x"]),
        (non_negative_float, {"0": 0.0}, ["-0.1", "inf", "nan"]),
        (port, {"0": 0, "65535": 65535}, ["-1", "65536", "1" * 400]),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(
    kind: Callable[[str], float], good: dict[str, Any], bad: list[str]
) -> None:
    parser = ArgumentParser(prog="afd")
    parser.add_argument("--number", type=kind)
    for text, value in good.items():
        assert parser.parse_args([f"--number={text}"]).number == value
    for text in bad:
        with pytest.raises(ConfigError, match=r"^argument --number: must be a") as refusal:
            parser.parse_args([f"--number={text}"])
        assert str(refusal.value).endswith(f"got {text!r} (see afd --help)")
