"""The rules of the house that a machine can check: layout, sizes, imports, packaging."""

import ast
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE_FOLDERS = ("afd", "kernels", "launch", "benchmarks", "tests")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
HEAVY_LIBRARIES = ("deepspeed", "streaming", "mlflow", "triton", "diffusers", "transformers")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".json", ".yaml", ".yml", ".html", ".sh", ".sbatch", ".j2", ""}


def source_files(*folders: str) -> list[Path]:
    """Return our Python files under the given top-level folders, sorted."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def repository_texts() -> list[Path]:
    """Return every text file of the repository: tracked, or new and not ignored."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in listing.stdout.split("\0") if name)
    return [path for path in paths if path.suffix in TEXT_SUFFIXES and path.is_file()]


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, source: list[str]) -> int:
    """Count a function's lines of code, signature included; docstring, blank lines and comments are not code."""
    skipped: set[int] = set()
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        skipped = set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines = range(function.lineno, (function.end_lineno or function.lineno) + 1)
    texts = (source[number - 1].strip() for number in lines if number not in skipped)
    return sum(1 for text in texts if text and not text.startswith("#"))


def test_kernels_and_tests_are_not_packages():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "would shadow the Hugging Face package `kernels`"
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_launch_files_shadow_no_other_module():
    installed = set(metadata.packages_distributions()) - {"afd", "afd_kernels"}
    for path in (ROOT / "launch").glob("*"):
        assert path.stem not in sys.stdlib_module_names, f"{path.name} shadows the standard library"
        assert path.stem not in installed, f"{path.name} shadows an installed package"


def test_no_file_is_over_its_size():
    long_files = {
        str(path.relative_to(ROOT)): lines
        for path in source_files(*CODE_FOLDERS)
        if (lines := len(path.read_text().splitlines())) > MAX_FILE_LINES
    }
    assert not long_files


def test_no_function_is_over_its_size():
    long_functions = {}
    for path in source_files("afd", "kernels", "launch"):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = code_lines(node, text.splitlines())
                if lines > MAX_FUNCTION_LINES:
                    long_functions[f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"] = lines
    assert not long_functions


def test_nothing_is_left_unfinished():
    marks = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3, "NotImplemented" + "Error")) + r")\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in source_files(*CODE_FOLDERS)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if marks.search(line)
    ]
    assert not found


def test_no_text_names_a_path_of_one_machine():
    folders = ("work", "farm", "root", "home", "tmp")
    machine_path = re.compile(r"(?<![\w.~-])/(?:" + "|".join(folders) + r")/\w")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in repository_texts()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if machine_path.search(line)
    ]
    assert not found


def test_links_between_pages_lead_somewhere():
    """Files, and headings by the anchors that GitHub gives them."""
    lost = []
    for page in (path for path in repository_texts() if path.suffix == ".md"):
        for name, _, anchor in re.findall(r"\]\(([^)#\s]*)(#([^)\s]*))?\)", page.read_text()):
            target = page.parent / name if name else page
            if re.match(r"[a-z]+:", name):
                continue
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.M) if anchor and target.is_file() else []
            anchors = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            if not target.exists() or (anchor and anchor not in anchors):
                lost.append(f"{page.relative_to(ROOT)}: {name}#{anchor}")
    assert not lost


def test_import_afd_stays_light():
    program = f"""
import importlib, pkgutil, sys
import afd
importlib.import_module("afd.config")
importlib.import_module("afd.types")
print(*[name for name in {HEAVY_LIBRARIES!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_afd_does_not_import_the_launch_folder():
    for path in source_files("afd", "kernels"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in {"launch", "tests", "benchmarks"} for name in names), path


@pytest.mark.slow
def test_wheel_holds_both_packages_and_the_data_files(tmp_path: Path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"afd/__init__.py", "afd_kernels/__init__.py", "afd/evaluation/report_template.html"} <= names
    assets = {path.relative_to(ROOT).as_posix() for path in (ROOT / "afd" / "assets").rglob("*") if path.is_file()}
    assert assets <= names
    assert not any(name.startswith(("kernels/", "tests/", "launch/")) for name in names)
