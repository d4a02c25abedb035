"""`--student FIELD=VALUE` of `afd convert` and `afd export`."""

from pathlib import Path

import pytest

from afd.cli import main
from afd.commands.weights import _student_fields


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("num_heads={a", "override student.num_heads must have a YAML value, got '{a'"),
        ("num_heads=-1", "student.num_heads: Input should be greater than 0, got -1"),
        ("num_headss=2", "unknown key student.num_headss, did you mean student.num_heads?"),
        ("num_heads", "override must read section.field=value, got 'student.num_heads'"),
    ],
)
def test_wrong_student_fields_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pair: str, message: str
) -> None:
    out = tmp_path / "student.safetensors"
    assert main(["convert", "a.pt", "--out", str(out), "--student", pair]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not out.exists()


def test_student_fields_are_those_given() -> None:
    assert _student_fields(["num_heads=12", "patch_size=[1, 2, 2]", "init_base=/a #b.pt"]) == {
        "num_heads": 12,
        "patch_size": (1, 2, 2),
        "init_base": Path("/a #b.pt"),
    }
    assert _student_fields([]) == {}
