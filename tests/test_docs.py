"""The documentation agrees with the code and with itself. No torch, no network."""

import ast
import dataclasses
import re
import sys
import typing
from functools import cache
from pathlib import Path

import pytest
import yaml

import skipwise
from skipwise.config.recipe import Recipe

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import make_reference  # noqa: E402

PAGES = sorted((ROOT / "docs").rglob("*.md"))
WITH_LINKS = [*sorted(ROOT.glob("*.md")), *PAGES]
WITH_LINKS += [p for folder in ("benchmarks", "research") for p in (ROOT / folder).rglob("*.md")]
YAML = [
    *sorted((ROOT / ".github").rglob("*.yml")),
    *(ROOT / "mkdocs.yml", ROOT / ".pre-commit-config.yaml"),
]


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("name", make_reference.PAGES)
def test_the_generated_page_is_that_of_the_code(name):
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert page == make_reference.PAGES[name](), "run make reference"


def test_every_recipe_key_has_a_plain_sentence_and_is_on_the_page():
    documented = make_reference.field_docstrings()
    page = (ROOT / "docs/recipe.md").read_text(encoding="utf-8")
    for cls in recipe_classes(Recipe):
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if make_reference._section(hints[field.name]) is not None:
                assert f"## {field.name}\n" in page
                continue
            sentence = documented[cls.__name__, field.name]
            assert sentence[-1] == "." and sentence[0] in sentence[0].upper() + "`"
            assert f"| `{field.name}` |" in page


def recipe_classes(cls):
    sections = map(make_reference._section, typing.get_type_hints(cls).values())
    return [cls, *filter(None, sections)]


def test_auto_is_explained_where_a_key_takes_it():
    documented = make_reference.field_docstrings()
    for cls in recipe_classes(Recipe):
        for field in dataclasses.fields(cls):
            if field.default == "auto":
                assert "`auto`" in documented[cls.__name__, field.name], field.name


def test_every_verb_and_option_is_on_the_command_line_page():
    page = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    parser = make_reference.build_parser()
    verbs = list(make_reference._verbs(parser))
    assert len(verbs) >= 10
    for verb in verbs:
        assert f"\n## {verb.prog.removeprefix('skipwise ')}\n" in page
        for action in filter(make_reference._is_shown, verb._actions):
            assert all(option in page for option in action.option_strings)


def test_a_pipe_in_a_cell_ends_no_cell():
    table = make_reference.markdown_table(("a|b", "c"), [("`x|y`", "|")])
    assert all(line.count("|") == 3 for line in table.splitlines())
    assert "<code>x&#124;y</code>" in table


def test_every_public_name_is_on_a_page_of_the_api():
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/api").glob("*.md"))
    shown = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert {name.rsplit(".", 1)[-1] for name in shown} >= set(skipwise.__all__)
    for name in shown:
        assert defined(name), f"{name} is not defined"


def defined(name):
    """Whether a dotted name is one of skipwise's, or is defined in the module that it names."""
    *modules, last = name.split(".")
    if modules == ["skipwise"]:
        return last in skipwise.__all__
    file = ROOT / "src" / Path(*modules).with_suffix(".py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    return any(node.name == last for node in tree.body if isinstance(node, kinds))


@pytest.mark.parametrize("page", WITH_LINKS, ids=name_of)
def test_links_lead_to_files_and_headings_that_exist(page):
    broken = []
    for target in links(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        missing = not file.exists()
        if missing or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def links(text):
    """Relative targets of a page's links and pictures, outside code."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    found = re.findall(r"\]\(<?([^)\s>]+)>?(?:\s[^)]*)?\)|(?:href|src)=\"([^\"]+)\"", text)
    return [t for t in map("".join, found) if not re.match(r"[a-z]+:", t)]


@cache
def anchors(page):
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ +(.+?) *#*$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def test_the_link_check_finds_what_is_broken(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A, b\n[x](#a-b) [y](gone.md) ![z](z.svg) `[code](no.md)` [w](https://w)\n")
    assert links(page.read_text()) == ["#a-b", "gone.md", "z.svg"]
    assert anchors(page) == {"a-b"}


@pytest.mark.parametrize("path", YAML, ids=name_of)
def test_yaml_files_parse(path):
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_the_site_has_every_page():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        return [p for e in (entry.values() if isinstance(entry, dict) else entry) for p in pages(e)]

    listed = pages(config["nav"])
    assert len(listed) == len(set(listed))
    there = {str(page.relative_to(ROOT / "docs")) for page in PAGES}
    assert set(listed) <= there
    assert there - set(listed) <= {"study.md"}


def test_the_hook_takes_links_out_of_docs_to_the_repository():
    import mkdocs_links

    class Page:
        class file:
            src_uri = "api/index.md"

    class Config:
        repo_url = "https://example.org/skipwise"

    text = "[a](../../README.md#try-it) [b](../recipe.md) ![c](../../x.png)"
    said = {"page": Page, "config": Config, "files": None}
    assert mkdocs_links.on_page_markdown(text, **said) == (
        "[a](https://example.org/skipwise/blob/HEAD/README.md#try-it) [b](../recipe.md) "
        "![c](https://example.org/skipwise/blob/HEAD/x.png)"
    )
    Config.repo_url = ""
    assert mkdocs_links.on_page_markdown(text, **said) == "a [b](../recipe.md) c"


def test_pre_commit_runs_the_pinned_versions():
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.M))
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    revisions = {repo["repo"].rsplit("/", 1)[-1]: repo["rev"] for repo in config["repos"]}
    assert revisions["ruff-pre-commit"] == f"v{pins['ruff']}"
    assert revisions["codespell"] == f"v{pins['codespell']}"


def test_every_python_of_the_classifiers_is_tested():
    tests = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    claimed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    assert tests["jobs"]["tests"]["strategy"]["matrix"]["python"] == claimed
    assert f'requires-python = ">={claimed[0]}"' in project


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "src/skipwise/py.typed").read_text() == ""
    project = (ROOT / "pyproject.toml").read_text()
    assert '"py.typed"' in project and '"Typing :: Typed"' in project
