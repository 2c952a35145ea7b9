"""The size of the package: what a reader can hold in mind. CONTRIBUTING has the floor plan."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "skipwise"
MODULES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted({path.parent for path in MODULES})


def entries(folder):
    return [path for path in folder.iterdir() if path.name != "__pycache__"]


def test_the_root_has_few_modules_and_one_folder_for_each_step():
    root = [path for path in entries(PACKAGE) if path.suffix == ".py"]
    folders = [path for path in entries(PACKAGE) if path.is_dir()]
    assert len(root) <= 6 and len(folders) <= 12


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_a_folder_is_taken_in_at_a_glance(folder):
    assert len(entries(folder)) <= (13 if folder != PACKAGE else 18)


def test_files_and_functions_are_short():
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 500, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 80, f"{path}: {node.name} has {length} lines"


def test_every_module_says_what_it_does():
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert not text.strip() or ast.get_docstring(ast.parse(text)), path


def test_the_package_has_at_most_24000_lines():
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES) <= 24_000
