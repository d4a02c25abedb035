"""Benchmarks are scripts in a folder of their own: these tests import them by name."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def on_path() -> Iterator[None]:
    """Puts `benchmarks/` on the import path."""
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
