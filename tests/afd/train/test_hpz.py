"""hpZ keeps a second copy of the weights in the node: swapping averages must not leave a stale one behind."""

from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
def test_an_applied_average_reaches_the_copy_inside_the_node(launch: Any) -> None:
    found = launch(Path(__file__).with_name("hpz_worker.py"), ranks=2)
    assert found["moved"] > 1e-2
    assert found["reference"] == 0.0
    assert found["restored"] == 0.0
