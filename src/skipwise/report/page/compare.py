"""Several runs or evaluations side by side on one page, each model under its own label.

The `after` of a run gets the run's name, with what differs where two runs have one name. `before`
is one column if all runs started from one base model with the same values, else there is a
`before (NAME)` for each base. So is `untrained`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from skipwise.errors import SkipwiseError
from skipwise.report.area import ends_of, find_areas, main_areas
from skipwise.report.differences import differences
from skipwise.report.figures.style import shorten
from skipwise.report.format import duration, short_count
from skipwise.report.headline import evaluation_headline
from skipwise.report.load import all_training, count, is_evaluation, nested, read_rows, read_run
from skipwise.report.page.html import Section, definitions, note, page, table, tile_list
from skipwise.report.page.results import (
    area_section,
    measured_sections,
    result_tiles,
    table_section,
)
from skipwise.report.rows import Row, Rows, by_context, finite, models_of
from skipwise.report.tables import format_table

_SHARED = ("before", "untrained")  # models that runs may have in common
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
    spans = {ends_of(c.run) for c in compared}
    ends = spans.pop() if len(spans) == 1 else None
    against = _against(rows, compared, ends)
    text = page(
        title="Comparison · Skipwise",
        eyebrow=f"Skipwise comparison of {len(compared)} folders",
        headline=_headline(rows, against),
        names=models_of(rows),
        tiles=tile_list(result_tiles(rows)),
        sections=[
            table_section(rows, "Side by side", {}),
            area_section(rows, ends),
            _settings(compared),
            _differences(against),
            *measured_sections(rows, windows.pop() if len(windows) == 1 else None, None),
            _costs(compared),
            _folders(compared),
        ],
    )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    return format_table(rows, ends=ends)


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
        found.append((folder, read_run(folder) or {}, rows))
    names = [str(run.get("name") or folder.resolve().name) for folder, run, _ in found]
    labels = _labels(names, paths)
    return [
        Compared(folder=folder, label=label, run=run, rows=rows)
        for label, (folder, run, rows) in zip(labels, found, strict=True)
    ]


def merge_rows(compared: Sequence[Compared]) -> Rows:
    """All rows, the base models first, each model under a label of its own."""
    merged: Rows = []
    for model in _SHARED:
        bases = _bases(compared, model)
        for rows, owners in bases:
            name = model if len(bases) == 1 else f"{model} ({', '.join(owners)})"
            merged += [{**row, "model": name} for row in rows]
    named = [
        (one, model, one.label if model == "after" and not is_evaluation(one.run) else model)
        for one in compared
        for model in models_of(one.rows)
        if model not in _SHARED or is_evaluation(one.run)
    ]
    names = [name for _, _, name in named] + models_of(merged)
    for one, model, name in named:
        label = name if names.count(name) == 1 else f"{name} in {one.label}"
        merged += [{**row, "model": label} for row in one.rows if row["model"] == model]
    return merged


def _bases(compared: Sequence[Compared], model: str) -> list[tuple[Rows, list[str]]]:
    """The rows of each base model, and the labels of the runs that measured them.

    Args:
        model: `before`, or `untrained` for the bases with the scaling of a run.

    The rows of two runs are merged if everything that both measured is the same, and if their base
    models have the same name or they measured the same things.
    """
    bases: list[tuple[dict[tuple[Any, ...], Row], list[Compared]]] = []
    measured = ("value", "num_samples")
    for one in compared:
        if is_evaluation(one.run):
            continue
        cells = {_cell(row): row for row in finite(one.rows) if row["model"] == model}
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


def _labels(names: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """The names; those of one name with the settings that tell them apart, or else their paths."""
    labels, ends = list(names), _distinct_ends(folders)
    for name in dict.fromkeys(names):
        same = [i for i in range(len(names)) if names[i] == name]
        if len(same) == 1:
            continue
        settings = [_flat(_recipe(folders[i])) for i in same]
        keys = _differing(settings)
        endings = [ends[i] for i in same]
        for tried in (*((key,) for key in keys), *itertools.combinations(keys[:6], 2)):
            told = [
                ", ".join(f"{key}={shorten(str(one.get(key, '–')), 24)}" for key in tried)
                for one in settings
            ]
            if len(set(told)) == len(told):
                endings = told
                break
        for i, ending in zip(same, endings, strict=True):
            labels[i] = f"{name} ({ending})"
    return labels


def _distinct_ends(paths: Sequence[Path]) -> list[str]:
    """The shortest path endings, in folders, that are all different."""
    full = [path.resolve() for path in paths]
    for num in range(1, max(len(path.parts) for path in full) + 1):
        ends = ["/".join(path.parts[-num:]) for path in full]
        if len(set(ends)) == len(ends):
            return ends
    return [str(path) for path in full]


def _against(
    rows: Rows, compared: Sequence[Compared], ends: tuple[int, int] | None
) -> dict[str, str]:
    """Differences of the other trained models from the first one, on the same trials."""
    names = [one.label for one in compared if not is_evaluation(one.run)]
    names = [name for name in names if name in models_of(rows)]
    length = max((row["context_length"] for row in by_context(rows)), default=0)
    areas = main_areas(find_areas(rows, ends)[0])
    found = {}
    for name in names[1:]:
        changes = [area.difference(name, names[0]) for area in areas]
        changes = [*differences(rows, name, names[0], length), *filter(None, changes)]
        found[name] = ", ".join(map(str, changes))
    at = f"against {names[0]} at {length:,} tokens" if names else ""
    return {f"{name} {at}": text for name, text in found.items() if text}


def _headline(rows: Rows, against: dict[str, str]) -> str:
    """What was measured; of runs, how they differ."""
    text = evaluation_headline({"name": "The comparison"}, rows)
    found = ". ".join(f"{name}: {said}" for name, said in against.items())
    return f"{text.partition(' tokens')[0]} tokens: {found}." if found else text


def _differences(against: dict[str, str]) -> Section | None:
    text = "On the same trials and windows, with 95 % intervals of the difference."
    entries = definitions({name: [said] for name, said in against.items()})
    return Section("Differences", entries + note(text)) if against else None


def _settings(compared: Sequence[Compared]) -> Section | None:
    """The settings that differ between the runs: the recipe's, and what a run chose itself."""
    runs = [one for one in compared if not is_evaluation(one.run)]
    if len(runs) < 2:
        return None
    found = [_flat(_recipe(one.folder)) | _chosen(one.run) for one in runs]
    if not (keys := _differing(found)):
        return Section("What differs", note("The recipes do not differ."))
    lines = [[key, *[str(one.get(key, "–")) for one in found]] for key in keys]
    head = ["Setting", *[one.label for one in runs]]
    return Section("What differs", table(head, lines, numeric=False))


def _differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """The keys whose values are not the same everywhere."""
    keys = dict.fromkeys(key for one in settings for key in one if key not in _OWN_KEYS)
    return [key for key in keys if len({str(one.get(key)) for one in settings}) > 1]


def _costs(compared: Sequence[Compared]) -> Section | None:
    """Training tokens, time, speed and memory of each run, and the time of all its stages."""
    head = ["Run", "Steps", "Tokens", "Training", "Tokens a second", "Peak memory", "All stages"]
    lines = []
    for one in compared:
        taken, stages = all_training(one.run), nested(one.run, "stages").values()
        seconds, tokens = taken.get("seconds"), taken.get("num_tokens")
        steps = sum(nested(one.run, part).get("num_steps") or 0 for part in ("training", "finish"))
        cells = [
            f"{steps:,}" if taken else "–",
            short_count(tokens) if tokens else "–",
            duration(seconds) if seconds else "–",
            f"{tokens / seconds:,.0f}" if tokens and seconds else "–",
            f"{taken['peak_memory_gib']:.2f} GiB" if "peak_memory_gib" in taken else "–",
            duration(sum(filter(None, stages))) if any(stages) else "–",
        ]
        lines += [] if is_evaluation(one.run) else [[one.label, *cells]]
    return Section("What each run cost", table(head, lines)) if lines else None


def _recipe(folder: Path) -> Any:
    file = folder / "recipe.yaml"
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


def _folders(compared: Sequence[Compared]) -> Section:
    """The path, base model, method, text and machine of each folder."""
    entries = {}
    for one in compared:
        training, data = nested(one.run, "training"), nested(one.run, "data")
        sources = ", ".join(map(str, data.get("sources") or []))
        entries[one.label] = [
            str(one.folder),
            "an evaluation" if is_evaluation(one.run) else None,
            f"from {one.base}" if one.base else None,
            count(one.run, "target_length", "tokens of target length"),
            training.get("method"),
            f"text {sources}" if sources else None,
            nested(one.run, "machine").get("gpu") or nested(one.run, "machine").get("cpu"),
        ]
    return Section(
        "What is compared",
        definitions(entries)
        + note(
            "Perplexities compare only on the same documents, and retrieval scores only on the "
            "same trials: see the page of each folder."
        ),
    )
