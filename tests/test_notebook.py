"""The notebook for Colab runs from its first cell to its last, on a tiny model."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples/colab.ipynb"
SMALL = (
    "training.num_steps=2 training.global_batch_size=2 rope.type=yarn eval.passkey_samples=2 "
    "eval.needle_samples=2 eval.ruler_samples=1 eval.perplexity_windows=2"
)


def run_cells(cells, parameters, environment):
    """Run code cells as Jupyter does; returns what the ! and % lines printed, by line.

    A cell tagged `parameters` is replaced by the given values, as papermill does.
    """
    names, printed = {}, {}
    for cell in cells:
        source = "".join(cell["source"])
        if "parameters" in cell["metadata"].get("tags", ()):
            assigned = [node.targets[0].id for node in ast.parse(source).body]
            assert assigned == list(parameters)
            names.update(parameters)
            continue
        if source[0] not in "!%":
            exec(compile(source, "cell", "exec"), names)
            continue
        for line in source.splitlines():
            words = re.sub(r"^%pip ", f"{sys.executable} -m pip ", line).removeprefix("!")
            assert words[0] != "%", f"{line}: run_cells knows no such magic"
            command = words.format_map(names)
            done = subprocess.run(
                command, shell=True, text=True, env=environment, capture_output=True
            )
            assert done.returncode == 0, (line, done.stdout[-1000:], done.stderr[-2000:])
            printed[line] = done.stdout + done.stderr
    return printed


@pytest.fixture
def shown(monkeypatch):
    """What the cells display: a stand-in of IPython, which is not needed for anything else."""
    objects = []
    display = ModuleType("IPython.display")
    display.Markdown = str
    display.Image = lambda file: Path(file).read_bytes()
    display.display = objects.append
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return objects


@pytest.mark.extended
def test_the_notebook_runs_from_the_wheel_to_the_line_that_publishes(
    tiny, text_folder, tmp_path, monkeypatch, shown, capsys
):
    pytest.importorskip("setuptools", minversion="77")
    source, work, target = tmp_path / "source", tmp_path / "work", tmp_path / "target"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    work.mkdir()
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*wheel, "-w", str(work), str(source)], check=True)
    monkeypatch.chdir(work)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(target),  # the commands run what %pip installed
        "PIP_TARGET": str(target),
        "PIP_NO_DEPS": "1",  # they are installed
        "PIP_NO_INDEX": "1",
    }
    cells = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    values = {"MODEL": str(tiny), "TO": "256", "DATA": str(text_folder), "SETTINGS": SMALL}
    printed = run_cells(cells, values, environment)
    assert (target / "skipwise/cli.py").exists()
    table, picture = shown
    assert "| passkey " in table and "untrained" in table
    assert picture.startswith(b"\x89PNG")
    assert "Once upon a time" in capsys.readouterr().out
    (check,) = [text for line, text in printed.items() if line.startswith("!skipwise check")]
    assert "ok   chunks see each other" in check
    (listed,) = [text for line, text in printed.items() if line.startswith("!skipwise publish")]
    assert "model.safetensors" in listed and "nothing uploaded" in listed


def test_the_notebook_has_no_output_and_no_path_of_a_machine():
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        assert not re.search(r"/(home|root|content|work)/", "".join(cell["source"]))
