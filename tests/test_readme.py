"""The README is short, its Python runs as written, and what the docs link and name exists."""

import dataclasses
import json
import math
import re
import typing
from pathlib import Path

import pytest

from skipwise.config.recipe import Recipe

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = [page for home in ("benchmarks", "research") for page in (ROOT / home).rglob("README.md")]
SMALL = {'"./my-model"': "MODEL", "32768": "256", '"./books"': "BOOKS", '"out"': "OUT"}


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def slug(heading):
    """The anchor that GitHub gives a heading."""
    words = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower())
    return words.strip().replace(" ", "-")


def anchors(page):
    text = without_code(page.read_text(encoding="utf-8"))
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def snippet(page, model, books, out, **changes):
    """The first Python block of a page with small lengths and folders of the test."""
    code = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[0]
    places = {"MODEL": repr(str(model)), "BOOKS": repr(str(books)), "OUT": repr(str(out))}
    for written, small in SMALL.items():
        code = code.replace(written, places.get(small, small))
    for written, small in changes.items():
        assert f"{written}=" in code
        code = re.sub(rf"{written}=[\w.-]+", f"{written}={small}", code)
    assert "my-model" not in code and "books" not in code.replace(str(books), "")
    return code


@pytest.fixture
def books(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(2):
        text = "".join(f"def f{i}_{j}(x): return x + {i * j}\n" for j in range(60))
        (folder / f"{i}.txt").write_text(text, encoding="utf-8")
    return folder


def differing(model, folder):
    """Names of the weights that are not those of the folder's model."""
    import torch
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    state = model.state_dict()
    assert state.keys() == base.keys()
    return [name for name in base if not torch.equal(state[name].cpu().float(), base[name].float())]


def test_the_readme_is_a_front_page():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


def test_the_loop_of_the_readme_trains_the_scaled_model(tiny, books, tmp_path):
    names: dict[str, typing.Any] = {}
    exec(snippet(README, tiny, books, tmp_path / "model"), names)
    assert names["k"] == 1 and names["loss"].isfinite()
    assert names["model"].config.rope_parameters["rope_type"] == "yarn"
    assert names["position_ids"].max() >= 64  # the base's window
    assert differing(names["model"], tiny)


def test_the_trainer_of_the_docs_checks_trains_and_saves_the_scaled_model(
    tiny, books, tmp_path, capsys
):
    out: Path = tmp_path / "model"
    names: dict[str, typing.Any] = {}
    exec(snippet(ROOT / "docs" / "training-loops.md", tiny, books, out, max_steps=2), names)
    said = capsys.readouterr().out
    assert "ok   chunks see each other" in said and "FAIL" not in said
    assert names["trainer"].state.global_step == 2
    assert math.isfinite(names["trainer"].state.log_history[-1]["train_loss"])
    assert differing(names["model"], tiny)
    config = json.loads((out / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == config["rope_scaling"]["rope_type"] == "yarn"
    assert config["max_position_embeddings"] == 256


@pytest.mark.parametrize("page", PAGES + OTHERS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_of_the_docs_leads_somewhere(page):
    text = without_code(page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_python_file_that_the_docs_name_exists(page):
    homes = (ROOT, ROOT / "src/skipwise", ROOT / "benchmarks", ROOT / "research", ROOT / "tests")
    for name in re.findall(r"`([\w/.-]+\.py)\b", page.read_text(encoding="utf-8")):
        assert any((home / name).is_file() for home in homes), f"{page.name}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_recipe_key_that_the_docs_name_exists(page):
    """Keys of a section, as `training.num_steps`; those at the top look like any word."""
    sections = {
        name: {field.name for field in dataclasses.fields(inner)}
        for name, hint in typing.get_type_hints(Recipe).items()
        for inner in (hint, *typing.get_args(hint))
        if dataclasses.is_dataclass(inner)
    }
    pattern = rf"[`\s]({'|'.join(sections)})\.([a-z_]+)(?=[=`:])"
    for section, key in re.findall(pattern, page.read_text(encoding="utf-8")):
        assert key in sections[section], f"{page.name}: {section}.{key}"


def test_the_floor_plan_names_every_folder_and_no_other():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text.split("src/skipwise/\n", 1)[1].split("```", 1)[0]
    named, above = set(), ""
    for line in tree.splitlines():
        if match := re.match(r"(│   )?[├└]── (\w+)/", line):
            above = above if match[1] else match[2]
            named.add(f"{above}/{match[2]}" if match[1] else match[2])
    home = ROOT / "src/skipwise"
    folders = {str(file.parent.relative_to(home)) for file in home.rglob("*.py")} - {"."}
    assert named == folders
