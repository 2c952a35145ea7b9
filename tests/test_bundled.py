"""Recipes and examples by name, and in the wheel."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from skipwise.cli import main
from skipwise.config import bundled as bundled_module
from skipwise.config.bundled import bundled, find_recipe
from skipwise.errors import SkipwiseError

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
EXAMPLES = [
    path.stem for path in sorted((ROOT / "examples").iterdir()) if path.suffix in (".py", ".yaml")
]

SHAPE = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps(SHAPE))
    return tmp_path


def test_a_name_is_a_recipe_in_any_folder(here, capsys):
    name = "mistral-7b-32k-8xa6000"
    for given in (name, f"{name}.yaml", f"recipes/{name}.yaml"):
        assert main(["plan", given, "model=base", "--gpu", "A6000", "--gpus", "8"]) == 0
        assert "zero3 on 8 GPUs" in capsys.readouterr().out
    assert main(["check", name, "model=base", "original_length=8k"]) == 0


def test_the_beginning_of_a_name_means_the_recipe_for_one_gpu(here, capsys):
    assert find_recipe("mistral-7b-32k") == ROOT / "recipes/mistral-7b-32k-lora-24gb.yaml"
    said = capsys.readouterr().err
    assert "mistral-7b-32k-8xa6000" in said and "taken: mistral-7b-32k-lora-24gb" in said
    assert find_recipe("tinyllama-1.1b") is not None and not capsys.readouterr().err
    with pytest.raises(SkipwiseError, match=r"beginning of several recipes.*-128k-.*-32k-"):
        find_recipe("llama-2-7b")
    assert find_recipe("mistr") is None  # not to the end of a word: a model of that name


def test_an_own_file_or_folder_of_the_name_wins(here):
    name = NAMES[0]
    own = here / f"{name}.yaml"
    own.write_text("model: own\ntarget_length: 1024\n")
    assert find_recipe(name) == Path(f"{name}.yaml") and find_recipe(str(own)) == own
    own.unlink()
    (here / name).mkdir()  # a model, or a run
    assert find_recipe(name) is None
    with pytest.raises(SkipwiseError, match=r"No such file.*\n.*skipwise recipes"):
        find_recipe("mine.yaml")
    with pytest.raises(SkipwiseError, match="No such file"):
        find_recipe(f"elsewhere/{name}.yaml")


def test_the_verb_lists_all_and_prints_one(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == [*NAMES, *EXAMPLES]
    assert all(len(line.split()) > 5 for line in lines if line.startswith("  "))
    assert main(["recipes", NAMES[0]]) == 0
    assert (
        capsys.readouterr().out.strip() == (ROOT / f"recipes/{NAMES[0]}.yaml").read_text().strip()
    )
    assert main(["recipes", "nothing"]) == 2
    assert NAMES[0] in capsys.readouterr().err


def test_the_wheel_holds_them_and_the_installed_package_finds_them(tmp_path, monkeypatch):
    source = tmp_path / "source"
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, files):
        if name.split("/")[0] in ("src", "recipes", "examples") or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_file():
                (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", str(tmp_path), str(source)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src/skipwise").rglob("*.py")}
    assert modules <= names and "skipwise/planning/gpus.json" in names
    data = f"{wheel.name.split('-py3')[0]}.data/data/share/skipwise"
    assert {f"{data}/recipes/{name}.yaml" for name in NAMES} <= names
    assert {f"{data}/examples/{p.name}" for p in (ROOT / "examples").iterdir()} <= names
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q"]
    subprocess.run([*command, "--target", str(target), str(wheel)], check=True, cwd=tmp_path)
    code = "from skipwise.config.bundled import bundled; print(*bundled('recipes').values())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(target), "PATH": ""},
    )
    paths = [Path(path) for path in found.stdout.split()]
    assert [path.stem for path in paths] == NAMES, found.stderr
    assert all(target in path.parents and path.is_file() for path in paths)


def test_a_package_without_the_files_lists_none(tmp_path, monkeypatch):
    monkeypatch.setattr(bundled_module, "__file__", str(tmp_path / "a/b/c/bundled.py"))
    assert bundled("recipes") == {} and find_recipe("mistral-7b-32k") is None
