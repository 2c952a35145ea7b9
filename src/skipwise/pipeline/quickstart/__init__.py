"""The quickstart: extend the bundled model from 256 to 2,048 tokens on Python's own source."""

from __future__ import annotations

import filecmp
import os
import shutil
import sys
from pathlib import Path

from skipwise.config.machine import cache_folder
from skipwise.config.parse import load_recipe
from skipwise.config.recipe import Recipe

MODEL = Path(__file__).with_name("model")
_PASSKEY_TOKENS = 194_560  # of the prompts; a run of 94 steps shows 192,500


def make_recipe(overrides: list[str] | None = None) -> Recipe:
    """The quickstart's recipe, with its model and its text in the cache folder.

    A third of the examples come from the source of this interpreter's standard library, the others
    are passkey prompts. The text is written once.
    """
    from transformers import AutoTokenizer

    from skipwise.pipeline.checks import check_settings
    from skipwise.pipeline.quickstart.corpus import write_documents

    folder = cache_folder() / "quickstart"
    model = folder / "skipwise-tiny"
    recipe_file = Path(__file__).with_name("recipe.yaml")
    asked = load_recipe(recipe_file, [f"model={MODEL}", *(overrides or [])]).train_length
    length = asked if isinstance(asked, int) else 256
    texts = folder / f"stdlib-{'.'.join(map(str, sys.version_info[:3]))}-{length}"
    weights = {"source.jsonl": 1, "passkeys.jsonl": 2}
    sources = [f"{{path: {_with_tilde(texts / k)}, weight: {w}}}" for k, w in weights.items()]
    keys = [
        f"model={_with_tilde(model)}",
        f"data.sources=[{', '.join(sources)}]",
        f"data.eval_sources=[{_with_tilde(texts / 'evaluation.jsonl')}]",
    ]
    recipe = load_recipe(recipe_file, [*keys, *(overrides or [])])
    check_settings(recipe)
    _copy_model(model)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    write_documents(texts, tokenizer, length=length, num_passkeys=_PASSKEY_TOKENS // length)
    return recipe


def _copy_model(folder: Path) -> None:
    """Copy the bundled model, file by file at once: another quickstart may be reading it."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in MODEL.iterdir():
        part = folder / f"{file.name}.{os.getpid()}.part"
        if not (folder / file.name).exists() or not filecmp.cmp(file, folder / file.name):
            shutil.copyfile(file, part)
            os.replace(part, folder / file.name)


def _with_tilde(path: Path) -> str:
    """The path with ~ for the home folder, so that a recipe shows no user name."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
