"""The quickstart's text: the standard library's source of the running Python.

Modules are split by name: on every Python version the same modules are kept for evaluation, out of
the base model's training and out of the extension. Passkey prompts of exactly the training length
preserve the retrieval that the evaluation measures.
"""

from __future__ import annotations

import json
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from skipwise.config.run_folder import write_text
from skipwise.errors import SkipwiseError
from skipwise.evaluation.tasks import passkey
from skipwise.evaluation.tasks.prompts import fit_to_length

_SKIPPED = {"site-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "pydoc_data"}
_TRIES, _SMALLEST = 100, 128  # of a prompt; tokens that have room for one


def modules() -> Iterator[tuple[str, str]]:
    """(module name, source) of the standard library, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED.isdisjoint(parts) and not parts[0].startswith("config-"):
            try:
                yield ".".join(parts), path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a few codec tables are not UTF-8


def held_out(module: str) -> bool:
    """Whether a module is kept for evaluation: one in eight, decided by its name."""
    return zlib.crc32(module.encode()) % 8 == 0


def passkey_document(
    tokenizer: Any, length: int, rng: np.random.Generator, sources: list[str]
) -> str:
    """A passkey prompt with its answer, exactly `length` tokens long.

    Half of the prompts use the evaluation's filler, the others lines of the `sources`.

    Raises:
        SkipwiseError: the length has no room for a question.
    """
    for _ in range(_TRIES):
        if rng.random() < 0.5:
            filler: tuple[str, ...] = passkey.FILLER
        else:
            lines = [s for s in sources[rng.integers(len(sources))].splitlines() if len(s) > 8]
            start = int(rng.integers(max(1, len(lines) - 40)))
            filler = tuple(lines[start : start + 40]) or passkey.FILLER
        key = str(rng.integers(10_000, 100_000))
        depth = float(rng.random())

        def size(
            num_fillers: int, key: str = key, depth: float = depth, filler: tuple[str, ...] = filler
        ) -> int:
            return len(_ids(tokenizer, _answered(key, num_fillers, depth, filler)))

        num_fillers = fit_to_length(size, length - 4) or 0
        text = _answered(key, num_fillers, depth, filler) + ".\n" + " ".join(passkey.FILLER * 8)
        cut = tokenizer.decode(_ids(tokenizer, text)[:length])
        if num_fillers and len(_ids(tokenizer, cut)) == length:
            return cut
    raise SkipwiseError(
        f"train_length={length} has no room for a passkey question\ngive {_SMALLEST} or more"
    )


def _answered(key: str, num_fillers: int, depth: float, filler: tuple[str, ...]) -> str:
    return passkey.prompt(key, num_fillers, depth, filler) + " " + key


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def write_documents(folder: Path, tokenizer: Any, *, length: int, num_passkeys: int) -> None:
    """Write the quickstart's text: `source.jsonl`, `passkeys.jsonl` and `evaluation.jsonl`.

    Passkey prompts are `length` tokens, the training length, so that each is one example.
    """
    if (folder / "evaluation.jsonl").exists():  # written last
        return
    folder.mkdir(parents=True, exist_ok=True)
    # The codec tables repeat each other, so that training would show what the evaluation asks.
    texts = [(name, text) for name, text in modules() if not name.startswith("encodings.")]
    sources = [text for name, text in texts if not held_out(name)]
    rng = np.random.default_rng(1)  # not the base model's prompts
    prompts = [passkey_document(tokenizer, length, rng, sources) for _ in range(num_passkeys)]
    for name, documents in (
        ("source", sources),
        ("passkeys", prompts),
        ("evaluation", [text for name, text in texts if held_out(name)]),
    ):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        write_text(folder / f"{name}.jsonl", lines)
