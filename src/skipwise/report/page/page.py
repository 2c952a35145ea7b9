"""The page of a run, or of an evaluation, from the folder's JSON alone.

What run.json does not hold is left out or marked as not recorded; nothing is guessed.

Reading order:  results.py (sections of what was measured)  usage.py (how to load the model)
                choices.py, training.py (how a run was made)  html.py (HTML building blocks)
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from skipwise.errors import SkipwiseError
from skipwise.report.area import ends_of
from skipwise.report.format import length_names, listed, short_value
from skipwise.report.headline import evaluation_headline, headline
from skipwise.report.load import count, is_evaluation, nested, read_lines, read_rows, read_run
from skipwise.report.page import training
from skipwise.report.page.choices import choices_section
from skipwise.report.page.html import Section, definitions, note, page, tile_list
from skipwise.report.page.results import (
    area_section,
    measured_sections,
    result_tiles,
    table_section,
)
from skipwise.report.page.usage import usage_section
from skipwise.report.rows import RUN_MODELS, Rows, find, models_of, other_tasks
from skipwise.report.ruler import summarise_ruler
from skipwise.report.tables import format_table


def write_report(run_folder: str | Path, out_file: Path | None = None) -> Path:
    """Write `report/` of a folder: the page, its figures as PNG, and the table as Markdown.

    Args:
        run_folder: of a run, or of an evaluation (run.json with `"kind": "evaluation"`).
        out_file: write the page alone, to this file.

    Returns:
        the path of the page, `report/index.html`.

    Raises:
        SkipwiseError: the folder has no run.json, or a broken file.
    """
    folder = Path(run_folder)
    run = read_run(folder)
    if not isinstance(run, dict):
        advice = "give the folder of a run, as runs/quickstart"
        raise SkipwiseError(f"{folder} has no run.json: {advice}")
    rows = read_rows(folder) or []
    out = None if out_file else folder / "report"
    page_file = out_file or folder / "report" / "index.html"
    page_file.parent.mkdir(parents=True, exist_ok=True)
    name = run.get("name") or folder.name
    text = verdict(folder)
    if is_evaluation(run):
        rows = _baseline_first(run, rows)
        tiles = result_tiles(rows)
        sections, what = _evaluation(run, rows, out), "evaluation"
    else:
        tiles = _run_tiles(run, rows)
        sections, what = _run(folder, run, rows, out), "run"
    html = page(
        title=f"{name} · Skipwise",
        eyebrow=" · ".join([f"Skipwise {what} {name}", *_when(run)]),
        headline=text,
        notice=_notice(run),
        tiles=tile_list(tiles),
        sections=sections,
        names=[*models_of(rows), *other_tasks(rows)],
    )
    if out:
        table = format_table(rows, ends=ends_of(run))
        (out / "table.md").write_text(table + "\n", encoding="utf-8")
    page_file.write_text(html, encoding="utf-8")
    return page_file


def verdict(run_folder: str | Path) -> str:
    """The headline of a folder's page, which the terminal shows as well."""
    folder = Path(run_folder)
    run, rows = read_run(folder) or {}, read_rows(folder) or []
    if is_evaluation(run):
        rows = _baseline_first(run, rows)
        return evaluation_headline({**run, "name": run.get("name") or folder.name}, rows)
    return headline(run, rows)


def _baseline_first(run: dict[str, Any], rows: Rows) -> Rows:
    """The rows with those of the baseline first, even if it was measured later."""
    return sorted(rows, key=lambda row: row["model"] != run.get("baseline"))


def _run(folder: Path, run: dict[str, Any], rows: Rows, out: Path | None) -> list[Section | None]:
    names = {run.get("target_length"): "target", run.get("original_length"): "original"}
    return [
        table_section(rows, "Before, rescaled and trained", names),
        area_section(rows, ends_of(run)),
        *measured_sections(rows, run.get("original_length"), out, optional=False),
        usage_section(folder, run),
        choices_section(run),
        training.selection_section(run, out),
        training.loss_section(run, read_lines(folder / "metrics.jsonl"), out),
        training.positions_section(run, out),
        training.cost_section(run),
        training.checks_section(run),
        training.details_section(run),
        _reproduce(run, folder / "recipe.yaml"),
    ]


def _evaluation(run: dict[str, Any], rows: Rows, out: Path | None) -> list[Section | None]:
    models, machine = nested(run, "models"), nested(run, "machine")
    windows = {nested(models, label).get("original_length") for label in models}
    memory = f"{machine['memory_gib']} GiB" if machine.get("memory_gib") else None
    entries = {}
    for label in models:
        model = nested(models, label)
        parameters = count(model, "num_parameters", "parameters")
        window = count(model, "original_length", "tokens of original context")
        entries[label] = [model.get("name"), model.get("family"), parameters, window]
    gpu = machine.get("gpu") or ("no GPU" if machine else None)
    entries["Machine"] = [machine.get("cpu"), count(machine, "num_cpus", "CPUs"), memory, gpu]
    entries["Versions"] = [f"{k} {v}" for k, v in nested(run, "versions").items()]
    return [
        table_section(rows, "What was measured", {}),
        area_section(rows, None),
        *measured_sections(rows, windows.pop() if len(windows) == 1 else None, out),
        Section("Models and machine", definitions(entries)),
        _reproduce(run, None),
    ]


def _when(run: dict[str, Any]) -> list[str]:
    created = str(run.get("created") or "").replace("T", " ").replace("+00:00", " UTC")
    version = nested(run, "versions").get("skipwise")
    return [x for x in (created, f"version {version}" if version else "") if x]


def _notice(run: dict[str, Any]) -> str:
    status = run.get("status")
    if status in (None, "finished"):
        return ""
    what = "evaluation" if is_evaluation(run) else "run"
    text = f"This {what} has not finished; its status is “{escape(status)}”."
    return f'<p class="notice">{text}</p>\n'


def _run_tiles(run: dict[str, Any], rows: Rows) -> list[tuple[str, str]]:
    """Lengths, scores at the target length, effective lengths, training time and memory."""
    L, T = run.get("original_length"), run.get("target_length")
    tiles = []
    if L and T:
        tiles.append((" → ".join(length_names([L, T])), "tokens of context"))
        for task in ("passkey", "needle", *other_tasks(rows)):
            found = [(m, find(rows, m, task, T)) for m in RUN_MODELS]
            values = {m: short_value(r) for m, r in found if r and r["value"] is not None}
            if values:
                shown = " → ".join(values.values()).replace(" % →", " →")
                tiles.append((shown, f"{task} at {T:,}, {listed(list(values))}"))
    known = [s for s in summarise_ruler(rows) if s.averages and s.model in RUN_MODELS]
    if known:
        models = listed([s.model for s in known])
        lengths = " → ".join(s.effective_short for s in known)
        tiles.append((lengths, f"effective length (RULER), {models}"))
    return tiles + training.training_tiles(run)


def _reproduce(run: dict[str, Any], recipe: Path | None) -> Section:
    commands = [c for c in run.get("reproduce") or [run.get("command")] if c]
    shown = f"<pre>{escape(chr(10).join(commands))}</pre>" if commands else ""
    if recipe and recipe.exists():
        text = escape(recipe.read_text(encoding="utf-8"))
        shown += f"<details><summary>The recipe, recipe.yaml</summary><pre>{text}</pre></details>"
    return Section("Reproduce", shown or note("No command was recorded."))
