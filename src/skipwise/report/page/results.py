"""Sections that show what was measured, shared by all pages."""

from __future__ import annotations

import functools
import re
from html import escape
from pathlib import Path

from skipwise.report import benchmarks, ruler
from skipwise.report.area import find_areas
from skipwise.report.figures import alt_text, curves, heatmaps
from skipwise.report.figures.style import MOST_CURVES, share_colours
from skipwise.report.format import (
    format_value,
    length_names,
    listed,
    metric_label,
    metric_name,
    percent,
    short_value,
)
from skipwise.report.page.html import MISSING, Section, code_name, figure, note, prose, table
from skipwise.report.rows import (
    RULER_AVERAGE,
    Row,
    Rows,
    by_context,
    describe_key_tokens,
    describe_mixed_texts,
    find,
    heading,
    is_ruler,
    models_of,
    other_tasks,
    pooled,
    task_rows,
)
from skipwise.report.tables import UNTRAINED, layout

_GRIDS = {
    "passkey": (
        "Passkey retrieval",
        "Percent of trials in which greedy decoding gives exactly the digits, by depth in the "
        "context (0 % is the start).",
    ),
    "needle": (
        "Needle in real text",
        "Percent of trials in which greedy decoding gives exactly the answer, by depth of the "
        "needle in the text (0 % is the start).",
    ),
}
_ABOUT = {
    "perplexity": "Perplexity is on the same target tokens at every length.",
    "passkey": "Passkey is the share of exact answers over all depths, in repeated filler text.",
    "needle": "Needle is the share of exact answers over all depths, in real text.",
}


def measured_sections(
    rows: Rows, original_length: int | None, png_folder: Path | None, optional: bool = True
) -> list[Section | None]:
    """A section for each kind of task.

    Args:
        optional: leave out the perplexity and the passkey too where they were not measured.
    """
    for png in png_folder.glob("task-*.png") if png_folder else ():
        png.unlink()
    return [
        perplexity_section(rows, original_length, png_folder, optional),
        grid_section(rows, "passkey", png_folder, optional),
        grid_section(rows, "needle", png_folder),
        ruler_section(rows, png_folder),
        *[task_section(rows, task, png_folder) for task in other_tasks(rows)],
        benchmark_section(rows),
    ]


def table_section(rows: Rows, title: str, names: dict[int | None, str]) -> Section | None:
    """The table of all scores at context lengths; for RULER only the averages.

    Args:
        names: labels of context lengths, such as `target`.
    """
    if not rows:
        return Section(title, MISSING)
    models, lines, cells = layout(rows)
    ruled = {row["task"] for row in rows if is_ruler(row)}
    lines = [line for line in lines if line[0] not in ruled]
    if not lines:
        return None
    head = "".join(f'<th class="n" scope="col">{escape(heading(m))}</th>' for m in models)
    body = ""
    for task, metric in dict.fromkeys(line[:2] for line in lines):
        lengths = [line[2] for line in lines if line[:2] == (task, metric)]
        one = next(cell for key, cell in cells.items() if key[:2] == (task, metric))
        body += "<tbody>"
        for i, length in enumerate(lengths):
            span = f'<th scope="rowgroup" rowspan="{len(lengths)}">{_task(one)}</th>'
            named = f"<small>{names[length]}</small> " if length in names else ""
            body += f'<tr>{span if i == 0 else ""}<th class="n" scope="row">{named}{length:,}</th>'
            for model in models:
                cell = cells.get((task, metric, length, model))
                missing = "no average" if task == RULER_AVERAGE else "not measured"
                value, _, interval = (format_value(cell) if cell else missing).partition(" [")
                small = f" <small>[{escape(interval)}</small>" if interval else ""
                body += f'<td class="n">{escape(value)}{small}</td>'
            body += "</tr>\n"
        body += "</tbody>"
    about = ["↑ higher is better, ↓ lower is better."]
    about += [text for task, text in _ABOUT.items() if task_rows(rows, task)]
    if any(cell["low"] is not None for cell in cells.values()):
        about.append("95 % intervals are in brackets.")
    about += [UNTRAINED.capitalize()] if "untrained" in models else []
    about += [mixed] if (mixed := describe_mixed_texts(rows)) else []
    return Section(
        title,
        '<div class="scroll"><table><thead><tr><th scope="col">Task</th>'
        f'<th class="n" scope="col">Context</th>{head}</tr></thead>{body}</table></div>\n'
        + note(" ".join(about)),
    )


def area_section(rows: Rows, ends: tuple[int, int] | None) -> Section | None:
    """The area of each task and of all tasks, by model."""
    areas, about = find_areas(rows, ends)
    if not areas:
        return None
    models, lines = models_of(by_context(rows)), []
    for area in areas:
        found = [area.row(model) for model in models]
        label = metric_label(next(cell for cell in found if cell)) if any(found) else ""
        values = [format_value(cell) if cell else "not measured" for cell in found]
        lines.append([f"{area.name}, {label}", *values])
    shown = table(["Task", *map(heading, models)], lines)
    return Section("One figure over all context lengths", shown + note(f"{about.capitalize()}."))


def _gains(rows: Rows) -> str:
    """The gain at each context length, and LongPPL, by model; empty if not measured."""
    gains = task_rows(rows, "perplexity", "context_gain")
    if not gains:
        return ""
    lengths = sorted({row["context_length"] for row in gains})
    long_ppl = {row["model"]: row for row in task_rows(rows, "perplexity", "long_ppl")}
    cells = {(row["model"], row["context_length"]): row for row in gains}
    lines = []
    for model in models_of(gains):
        found = [*(cells.get((model, n)) for n in lengths), long_ppl.get(model)]
        shown = [short_value(row) if row else "not measured" for row in found]
        lines.append([heading(model), *shown])
    head = ["Model", *(f"gain at {name}" for name in length_names(lengths)), "LongPPL"]
    return table(head, lines) + note(describe_key_tokens(rows))


def perplexity_section(
    rows: Rows, original_length: int | None, png_folder: Path | None, optional: bool = False
) -> Section | None:
    """The curve, or a note that it was not measured; nothing if it is optional."""
    title = "Perplexity against context length"
    drawn = figure(
        png_folder,
        "perplexity",
        lambda width: curves.plot_perplexity(rows, original_length, width),
        lambda: alt_text.describe_curves(task_rows(rows, "perplexity"), "Perplexity"),
        "The same target tokens with more and more context: a falling curve means that the model "
        "uses it. Bands are 95 % intervals over documents, which differ from each other far more "
        f"than the lengths do.{_beyond(rows)}",
    )
    num = len(models_of(task_rows(rows, "perplexity")))
    if not drawn and num > MOST_CURVES:
        drawn = _too_many(num)
    elif not drawn and optional:
        return None
    return Section(title, (drawn or MISSING) + _gains(rows))


def grid_section(
    rows: Rows, task: str, png_folder: Path | None, optional: bool = True
) -> Section | None:
    """Heat maps of a task by depth and length, one panel per model."""
    title, caption = _GRIDS[task]
    models = heatmaps.grid_models(rows, task)
    if len(models) > heatmaps.MOST_PANELS:
        first = f"The first {heatmaps.MOST_PANELS} of {len(models)} models"
        caption += f" {first}; all are in the table."
    drawn = figure(
        png_folder,
        task,
        lambda width: heatmaps.plot_grid(rows, task, width),
        lambda: alt_text.describe_grid(rows, task),
        caption,
    )
    return Section(title, drawn or MISSING) if drawn or not optional else None


def ruler_section(rows: Rows, png_folder: Path | None) -> Section | None:
    """The averages as curves, the effective lengths, and every task by model and length."""
    summaries = ruler.summarise_ruler(rows)
    drawn = figure(
        png_folder,
        "ruler",
        lambda width: curves.plot_ruler(rows, width),
        lambda: alt_text.describe_ruler(summaries),
        f"Score by context length, {ruler.describe_tasks(summaries)}. Dashed: "
        f"{100 * ruler.EFFECTIVE_THRESHOLD:.1f} %, the average of Llama-2-7B at 4k tokens over "
        "RULER's 13 tasks (Hsieh et al. 2024). The effective length is the largest one measured "
        "that, with all shorter ones, reaches this threshold.",
    )
    if not summaries:
        return None
    num = sum(bool(s.averages) for s in summaries)
    if not drawn:
        drawn = _too_many(num) if num > MOST_CURVES else note(f"{ruler.describe_tasks(summaries)}.")
    lines = [[heading(s.model), s.effective] for s in summaries]
    effective = table(["Model", ruler.EFFECTIVE_LENGTH.capitalize()], lines)
    return Section("RULER tasks", f"{drawn}\n{effective}\n{_ruler_table(rows)}")


def task_section(rows: Rows, task: str, png_folder: Path | None) -> Section:
    """Curves of a task that the report does not know, a figure a metric, as its rows say."""
    points = pooled(task_rows(rows, task))
    title, num = points[0].get("title") or task, len(models_of(points))
    figures = ""
    for metric in dict.fromkeys(row["metric"] for row in points):
        kept = [row for row in points if row["metric"] == metric]
        figures += figure(
            png_folder,
            "task-" + re.sub(r"\W+", "-", f"{task}-{metric}"),
            functools.partial(curves.plot_metric, kept),
            functools.partial(alt_text.describe_curves, kept, f"{title}, {metric_name(kept[0])},"),
            points[0].get("about") or "Bands are 95 % intervals.",
        )
    return Section(title, figures or (_too_many(num) if num > MOST_CURVES else MISSING))


def benchmark_section(rows: Rows) -> Section | None:
    """All benchmarks with their standard errors, and what changed beyond them."""
    models, lines, cells = benchmarks.benchmark_layout(rows)
    if not lines:
        return None
    pair = len(models) == 2
    heads = [*map(heading, models), *(["Difference"] if pair else [])]
    head = "".join(f'<th class="n" scope="col">{escape(m)}</th>' for m in heads)
    body = ""
    for line in lines:
        found = [cells.get((line, model)) for model in models]
        label = escape(metric_label(next(cell for cell in found if cell)))
        body += (
            f'<tr><th scope="row">{code_name(line[0])}<small class="under">{label}, '
            f"shots: {escape(benchmarks.shots_label(line))}</small></th>"
        )
        shown = [_with_error(benchmarks.format_benchmark(cell)) for cell in found]
        body += "".join(f'<td class="n">{value}</td>' for value in shown)
        body += (_difference(benchmarks.line_difference(*found)) if pair else "") + "</tr>\n"
    verdicts = [f"<p>{prose(text)}</p>" for text in benchmarks.describe_benchmarks(rows)]
    return Section(
        "Short-context benchmarks",
        '<div class="scroll"><table><thead><tr><th scope="col">Benchmark</th>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>\n{''.join(verdicts)}"
        + note(
            "Percent ± standard error. A difference is beyond error if it is larger than 1.96 "
            "sqrt(se1² + se2²). Of twenty tasks that did not change, one is expected to look as if "
            "it had."
        ),
    )


def _difference(difference: benchmarks.Difference | None) -> str:
    if difference is None:
        return '<td class="n">not measured</td>'
    kind = {"worse": "bad", "better": "good"}.get(difference.judgement, "")
    return (
        f'<td class="n {kind}">{_with_error(str(difference))}'
        f'<small class="under">{difference.judgement}</small></td>'
    )


def _with_error(text: str) -> str:
    """The value, with its standard error in small type (below it on a phone)."""
    value, _, error = text.partition(" ± ")
    return escape(value) + (f" <small>±&nbsp;{escape(error)}</small>" if error else "")


def _ruler_table(rows: Rows) -> str:
    """Scores by task, model and length, the models of a task below each other."""
    kept = [row for row in pooled(rows) if is_ruler(row)]
    cells = {(r["task"], r["model"], r["context_length"]): r["value"] for r in kept}
    lengths = sorted({r["context_length"] for r in kept})
    head = "".join(f'<th class="n" scope="col">{n}</th>' for n in length_names(lengths))
    body = ""
    for task in ruler.ruler_tasks(kept):
        models = models_of([row for row in kept if row["task"] == task])
        first = f'<th scope="rowgroup" rowspan="{len(models)}">{code_name(task)}</th>'
        lines = (
            f'<th scope="row">{escape(heading(model))}</th>'
            + "".join(_share_cell(cells.get((task, model, n))) for n in lengths)
            for model in models
        )
        body += f"<tbody><tr>{first}{'</tr><tr>'.join(lines)}</tr></tbody>\n"
    samples = sorted({r["num_samples"] for r in kept})
    num = f"{samples[0]:,}" if len(samples) == 1 else f"{samples[0]:,} to {samples[-1]:,}"
    return (
        '<div class="scroll"><table class="shares"><caption>Percent of the expected answers '
        f"found, {num} samples a cell, by tokens of context</caption><thead><tr>"
        f'<th scope="col">Task</th><th scope="col">Model</th>{head}</tr></thead>{body}</table>'
        "</div>"
    )


def _share_cell(value: float | None) -> str:
    if value is None:
        return '<td class="n">–</td>'
    background, ink = share_colours(value)
    return f'<td class="n" style="background:{background};color:{ink}">{percent(value)}</td>'


def _task(row: Row) -> str:
    """The task and, small below it, its metric and which direction is better."""
    task = row["task"]
    if task == "perplexity":
        return escape(metric_label(row))
    name = "RULER average" if task == RULER_AVERAGE else code_name(task)
    return f"{name}<small>{escape(metric_label(row))}</small>"


def _too_many(num: int) -> str:
    return note(f"{num} models are too many to tell apart as curves: see the table.")


def _beyond(rows: Rows) -> str:
    points = [r for r in task_rows(rows, "perplexity") if r["value"] is None]
    at = ", ".join(f"{r['model']} at {r['context_length']:,}" for r in points)
    known = [row for row in task_rows(rows, "perplexity") if row["value"] is not None]
    drawn = curves.drawn_rows(known)
    said = (
        " Values too high for the axis are written at its top." if curves.off_scale(drawn) else ""
    )
    missing = [model for model in models_of(known) if model not in models_of(drawn)]
    said += f" Only in the table: {listed(missing)}." if missing else ""
    return said + (f" Beyond measure, and not drawn: {at}." if at else "")


def result_tiles(rows: Rows) -> list[tuple[str, str]]:
    """Effective lengths, and scores at the longest length, of one or two models."""
    models = models_of(rows)
    if len(models) > 2:
        return []
    lengths = {s.model: s.effective_short for s in ruler.summarise_ruler(rows) if s.averages}
    tiles = [(lengths[m], f"effective length (RULER), {m}") for m in models if m in lengths]
    for task in ("passkey", "needle", *other_tasks(rows)):
        longest = max((row["context_length"] for row in task_rows(rows, task)), default=0)
        for model in models_of(task_rows(rows, task)):
            row = find(rows, model, task, longest)
            if row and row["value"] is not None:
                tiles.append((short_value(row), f"{task} at {longest:,}, {model}"))
    return tiles
