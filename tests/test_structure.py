"""The size of the package: what a reader can hold in mind. CONTRIBUTING has the floor plan."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "skipwise"
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
    assert len(entries(folder)) <= (14 if folder != PACKAGE else 18)


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


def test_the_package_has_at_most_31200_lines():
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES) <= 31_200


def test_a_test_that_needs_an_extra_runs_in_test_all_alone():
    extras = {"bitsandbytes", "datasets", "deepspeed", "gguf", "lm_eval", "trl"}
    for path in sorted(ROOT.glob("tests/test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        marked = any(
            isinstance(node, ast.Assign)
            and node.targets[0].id == "pytestmark"
            and "extended" in ast.unparse(node)
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        )
        for node in tree.body:
            names = {
                call.args[0].value
                for call in ast.walk(node)
                if isinstance(call, ast.Call)
                and ast.unparse(call.func) == "pytest.importorskip"
                and isinstance(call.args[0], ast.Constant)
            }
            if names & extras:
                decorators = getattr(node, "decorator_list", [])
                own = any("extended" in ast.unparse(one) for one in decorators)
                assert marked or own, f"{path.name}, line {node.lineno}: @pytest.mark.extended"


def test_the_gate_runs_every_test_in_two_parts():
    makefile = (ROOT / "Makefile").read_text()
    assert '$(PYTEST) -m "not extended"' in makefile and "$(PYTEST) -m extended" in makefile
    gate = (ROOT / ".ci/run").read_text().splitlines()
    assert gate[-2:] == ["make test", "make test-all"]
    minimal = makefile.partition("$(STAMP): ")[2].partition("\n\n")[0]
    assert '-e ".[test]"' in minimal and makefile.count("test-all: $(EXTRAS)") == 1
