"""Several runs or evaluations side by side on one page, each model under its own label.

The `after` of a run gets the run's name. `before` is one column if all runs started from one base
model with the same values, else there is a `before (NAME)` for each base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml

from skipwise.errors import SkipwiseError
from skipwise.report.differences import differences
from skipwise.report.format import duration, short_count
from skipwise.report.headline import evaluation_headline
from skipwise.report.load import all_training, count, is_evaluation, nested, read_json, read_rows
from skipwise.report.page.html import definitions, note, page, section, tile_list
from skipwise.report.page.results import measured_sections, result_tiles, table_section
from skipwise.report.rows import Row, Rows, by_context, finite, models_of
from skipwise.report.tables import format_table

_OWN_KEYS = ("name", "resume_from")  # of a run, and no setting


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One of the folders compared."""

    folder: Path
    label: str  # distinct among those compared
    run: dict[str, Any]
    rows: Rows

    @property
    def base(self) -> str | None:
        """The model that a run started from."""
        return nested(self.run, "model").get("name")


def compare_runs(folders: Sequence[Path], out: Path) -> str:
    """Write one self-contained page of several runs or evaluations to `out`.

    Returns:
        the table as Markdown.

    Raises:
        SkipwiseError: fewer than two folders, a folder given twice, missing or broken results.
    """
    compared = read_compared(folders)
    rows = merge_rows(compared)
    windows = {c.run.get("original_length") for c in compared}
    text = page(
        title="Comparison · Skipwise",
        eyebrow=f"Skipwise comparison of {len(compared)} folders",
        headline=evaluation_headline({"name": "The comparison"}, rows),
        tiles=tile_list(result_tiles(rows)),
        sections=[
            table_section(rows, "Side by side", {}),
            _differences(rows, compared),
            *measured_sections(rows, windows.pop() if len(windows) == 1 else None, None),
            _settings(compared),
            _folders(compared),
        ],
    )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    return format_table(rows)


def read_compared(folders: Sequence[Path]) -> list[Compared]:
    """The folders with their rows and labels that differ."""
    paths = [Path(folder) for folder in folders]
    if len(paths) < 2:
        raise SkipwiseError("a comparison needs two or more folders: skipwise report runs/a runs/b")
    if len({path.resolve() for path in paths}) < len(paths):
        names = " ".join(map(str, paths))
        raise SkipwiseError(f"a folder is given twice: {names}; name each one once")
    found = []
    for folder in paths:
        rows = read_rows(folder)
        if not rows:
            reason = "no results.json" if rows is None else "nothing in its results.json"
            advice = "give the folder of a finished run or evaluation"
            raise SkipwiseError(f"{folder} has {reason}: {advice}")
        run = read_json(folder / "run.json")
        found.append((folder, run if isinstance(run, dict) else {}, rows))
    names = [str(run.get("name") or folder.resolve().name) for folder, run, _ in found]
    ends = _distinct_ends(paths)
    labels = [
        name if names.count(name) == 1 else f"{name} ({end})"
        for name, end in zip(names, ends, strict=True)
    ]
    return [
        Compared(folder=folder, label=label, run=run, rows=rows)
        for label, (folder, run, rows) in zip(labels, found, strict=True)
    ]


def merge_rows(compared: Sequence[Compared]) -> Rows:
    """All rows, the base models first, each model under a label of its own."""
    bases = _bases(compared)
    merged: Rows = []
    for rows, owners in bases:
        name = "before" if len(bases) == 1 else f"before ({', '.join(owners)})"
        merged += [{**row, "model": name} for row in rows]
    named = [
        (one, model, one.label if model == "after" and not is_evaluation(one.run) else model)
        for one in compared
        for model in models_of(one.rows)
        if model != "before" or is_evaluation(one.run)
    ]
    names = [name for _, _, name in named] + models_of(merged)
    for one, model, name in named:
        label = name if names.count(name) == 1 else f"{name} in {one.label}"
        merged += [{**row, "model": label} for row in one.rows if row["model"] == model]
    return merged


def _bases(compared: Sequence[Compared]) -> list[tuple[Rows, list[str]]]:
    """The rows of each base model, and the labels of the runs that measured them.

    The rows of two runs are merged if everything that both measured is the same, and if their base
    models have the same name or they measured the same things.
    """
    bases: list[tuple[dict[tuple[Any, ...], Row], list[Compared]]] = []
    measured = ("value", "num_samples")
    for one in compared:
        if is_evaluation(one.run):
            continue
        cells = {_cell(row): row for row in finite(one.rows) if row["model"] == "before"}
        if not cells:
            continue
        for known, owners in bases:
            common = known.keys() & cells.keys()
            agree = all(known[key][x] == cells[key][x] for key in common for x in measured)
            one_name = one.base is not None and one.base == owners[0].base
            if agree and common and (one_name or known.keys() == cells.keys()):
                known.update({**cells, **known})
                owners.append(one)
                break
        else:
            bases.append((cells, [one]))
    return [(list(cells.values()), [o.label for o in owners]) for cells, owners in bases]


def _cell(row: Row) -> tuple[Any, ...]:
    keys = ("task", "metric", "context_length", "depth", "num_fewshot")
    return tuple(row.get(key) for key in keys)


def _distinct_ends(paths: Sequence[Path]) -> list[str]:
    """The shortest path endings, in folders, that are all different."""
    full = [path.resolve() for path in paths]
    for num in range(1, max(len(path.parts) for path in full) + 1):
        ends = ["/".join(path.parts[-num:]) for path in full]
        if len(set(ends)) == len(ends):
            return ends
    return [str(path) for path in full]


def _differences(rows: Rows, compared: Sequence[Compared]) -> str:
    """Each trained model against the first one, on the same trials at the longest length."""
    names = [one.label for one in compared if not is_evaluation(one.run)]
    names = [name for name in names if name in models_of(rows)]
    length = max((row["context_length"] for row in by_context(rows)), default=0)
    if len(names) < 2 or not length:
        return ""
    first, *others = names
    entries = {name: list(map(str, differences(rows, name, first, length))) for name in others}
    if not any(entries.values()):
        return ""
    return section(
        f"Against {first}",
        definitions(dict(entries))
        + note(
            f"At {length:,} tokens of context, on the same trials and windows, with 95 % intervals "
            "of the difference."
        ),
    )


def _settings(compared: Sequence[Compared]) -> str:
    """The settings that differ between the runs: the recipe's, and what a run chose itself."""
    runs = [one for one in compared if not is_evaluation(one.run)]
    if len(runs) < 2:
        return ""
    found = [_flat(_recipe(one)) | _chosen(one.run) for one in runs]
    keys = [key for key in {key: None for one in found for key in one} if key not in _OWN_KEYS]
    differ = [key for key in keys if len({str(one.get(key)) for one in found}) > 1]
    if not differ:
        return section("What differs", note("The recipes do not differ."))
    head = "".join(f'<th scope="col">{escape(one.label)}</th>' for one in runs)
    body = "".join(
        f'<tr><th scope="row">{escape(key)}</th>'
        + "".join(f"<td>{escape(str(one.get(key, '–')))}</td>" for one in found)
        + "</tr>"
        for key in differ
    )
    return section(
        "What differs",
        f'<div class="scroll"><table><thead><tr><th scope="col">Setting</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>",
    )


def _recipe(one: Compared) -> Any:
    file = one.folder / "recipe.yaml"
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """`{"training": {"num_steps": 4}}` as `{"training.num_steps": 4}`."""
    if not isinstance(tree, dict) or not tree:
        return {prefix[:-1]: tree} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.")
    return flat


def _chosen(run: dict[str, Any]) -> dict[str, Any]:
    temperature = nested(run, "temperature").get("value")
    found = {"chosen scaling": run.get("scaling"), "chosen attention temperature": temperature}
    return {key: value for key, value in found.items() if value is not None}


def _folders(compared: Sequence[Compared]) -> str:
    """The path, base model, training, text and machine of each folder."""
    entries = {}
    for one in compared:
        training, data = nested(one.run, "training"), nested(one.run, "data")
        taken = all_training(one.run)
        seconds, tokens = taken.get("seconds"), taken.get("num_tokens")
        sources = ", ".join(map(str, data.get("sources") or []))
        entries[one.label] = [
            str(one.folder),
            "an evaluation" if is_evaluation(one.run) else None,
            f"from {one.base}" if one.base else None,
            count(one.run, "target_length", "tokens of target length"),
            training.get("method"),
            f"{short_count(tokens)} tokens of training" if tokens else None,
            f"{duration(seconds)} of training" if seconds else None,
            f"text {sources}" if sources else None,
            nested(one.run, "machine").get("gpu") or nested(one.run, "machine").get("cpu"),
        ]
    return section(
        "What is compared",
        definitions(entries)
        + note(
            "Perplexities compare only on the same documents, and retrieval scores only on the "
            "same trials: see the page of each folder."
        ),
    )
