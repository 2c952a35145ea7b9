"""One self-contained page: every word of it comes from the run folder's JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from skipwise.errors import SkipwiseError
from skipwise.report import plots
from skipwise.report.tables import Rows, find, format_table, format_value, headline, pooled

_CSS = Path(__file__).with_name("page.css")


def write_report(folder: str | Path) -> Path:
    """Write `report/` of a run folder: the page, its figures as PNG, and the table as Markdown.

    Returns:
        the path of `report/index.html`.

    Raises:
        SkipwiseError: the folder has no run.json.
    """
    folder = Path(folder)
    run = _read(folder / "run.json")
    if run is None:
        raise SkipwiseError(
            f"{folder} has no run.json: give the folder of a run, as runs/quickstart"
        )
    rows: Rows = _read(folder / "results.json") or []
    metrics = _read_lines(folder / "metrics.jsonl")
    recipe = folder / "recipe.yaml"
    out = folder / "report"
    out.mkdir(parents=True, exist_ok=True)
    sections = [
        _facts(run, rows),
        _section("Before and after", _table(rows)),
        _figure(
            out,
            "perplexity",
            "Perplexity against context length",
            lambda: plots.plot_perplexity(rows, run.get("original_length") or 1),
            _say_perplexity(rows),
            "The same target tokens, seen with more and more context: a lower value further right "
            "means that the model uses it. Bands are 95 % intervals over documents, which differ "
            "far more from each other than the lengths do.",
        ),
        _figure(
            out,
            "passkey",
            "Passkey retrieval",
            lambda: plots.plot_passkey(rows),
            _say_passkey(rows),
            "Share of trials in which greedy decoding gives exactly the five digits, by how deep "
            "in the context they stand.",
        ),
        _figure(
            out,
            "loss",
            "Training loss",
            lambda: plots.plot_loss(metrics),
            _say_loss(metrics),
            "Every step, and a running mean.",
        ),
        _positions(out, run),
        _section("What it cost, against full-length training", _cost(run)),
        _section("Checks", _checks(run)),
        _section("Data, model and machine", _details(run)),
        _section("Reproduce", _reproduce(run, recipe)),
    ]
    title = f"{run.get('name', folder.name)} · Skipwise"
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>
{_CSS.read_text(encoding="utf-8")}</style></head>
<body><main>
<h1>{escape(title)}</h1>
<p class="headline">{escape(headline(run, rows))}</p>
{"".join(sections)}
</main></body></html>
"""
    (out / "table.md").write_text(format_table(rows) + "\n", encoding="utf-8")
    (out / "index.html").write_text(page, encoding="utf-8")
    return out / "index.html"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>\n"


def _figure(
    out: Path, name: str, title: str, draw: Callable[[], Any], label: str, caption: str
) -> str:
    figure = draw()
    if figure is None:
        return _section(title, '<p class="note">Not measured.</p>')
    (out / f"{name}.png").write_bytes(plots.to_png(figure))
    svg = plots.to_svg(figure, escape(label, quote=True))
    return _section(title, f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>")


def _facts(run: dict[str, Any], rows: Rows) -> str:
    L, T = run.get("original_length"), run.get("target_length")
    training = run.get("training", {})
    facts = []
    if L and T:
        facts.append((f"{L:,} → {T:,}", f"tokens of context, {T / L:g} times"))
        for model in ("before", "after"):
            row = find(rows, model, "passkey", T)
            if row:
                facts.append((f"{100 * row['value']:.3g} %", f"passkey at {T:,}, {model}"))
    if training:
        facts.append((f"{training['num_tokens']:,}", "tokens of training"))
        facts.append((_duration(training["seconds"]), "of training"))
        if training.get("peak_memory_gib"):
            facts.append((f"{training['peak_memory_gib']:.2f} GiB", "peak memory of training"))
    items = "".join(f"<li><b>{escape(a)}</b><span>{escape(b)}</span></li>" for a, b in facts)
    return f'<ul class="facts">{items}</ul>\n' if facts else ""


def _table(rows: Rows) -> str:
    if not rows:
        return '<p class="note">Not measured.</p>'
    cells = {(r["task"], r["metric"], r["context_length"], r["model"]): r for r in pooled(rows)}
    models = sorted({k[3] for k in cells}, key=lambda m: {"before": 0, "after": 1}.get(m, 2))
    keys = sorted({k[:3] for k in cells}, key=lambda k: (k[0] != "perplexity", *k))
    head = "".join(f'<th class="n">{escape(m)}</th>' for m in models)
    body = ""
    for task, metric, length in keys:
        body += f'<tr><td>{escape(task)}</td><td class="n">{length:,}</td>'
        for model in models:
            row = cells.get((task, metric, length, model))
            if row is None:
                body += '<td class="n"><small>not measured</small></td>'
                continue
            value, _, interval = format_value(row).partition(" [")
            small = f"<small>[{escape(interval)}</small>" if interval else ""
            body += f'<td class="n">{escape(value)}{small}</td>'
        body += "</tr>\n"
    return (
        f'<div class="scroll"><table><thead><tr><th>Task</th><th class="n">Context</th>{head}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>"
        '<p class="note">Perplexity: lower is better. Passkey: share of exact answers over all '
        "depths. In brackets 95 % intervals.</p>"
    )


def _positions(out: Path, run: dict[str, Any]) -> str:
    positions = run.get("positions")
    title = "Positions seen in training"
    if not positions:
        return _section(title, '<p class="note">Nothing was trained.</p>')
    coverage = list(zip(positions["distances"], positions["coverage"], strict=True))
    L, T = run["train_length"], run["target_length"]
    middle, far = coverage[len(coverage) // 2]
    return _figure(
        out,
        "positions",
        title,
        lambda: plots.plot_positions(positions["examples"], coverage, L, T),
        f"{len(positions['examples'])} training examples of {L:,} tokens as chunks on positions 0 "
        f"to {T:,}; a distance of {middle:,} is shown by {far:.0%} of the examples.",
        f"Each row is an example of {L:,} tokens, cut into chunks (colours) whose positions skip "
        f"ahead. Below: how many examples show each relative distance. {positions['sampler']}",
    )


def _cost(run: dict[str, Any]) -> str:
    training, L, T = run.get("training"), run.get("train_length"), run.get("target_length")
    if not training or not L or not T:
        return '<p class="note">Nothing was trained.</p>'
    num = training["num_steps"] * training["batch_size"]
    lines = (
        ("this run", num * L, num * L * (L + 1) // 2),
        ("full length, as many examples", num * T, num * T * (T + 1) // 2),
        ("full length, as many tokens", num * L, num * L * (T + 1) // 2),
    )
    body = "".join(
        f'<tr><td>{name}</td><td class="n">{tokens:,}</td><td class="n">{_short(pairs)}</td>'
        f'<td class="n">{pairs / lines[0][2]:.3g}×</td></tr>'
        for name, tokens, pairs in lines
    )
    return (
        '<div class="scroll"><table><thead><tr><th></th><th class="n">Tokens</th>'
        '<th class="n">Attention pairs</th><th class="n">Against this run</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
        f'<p class="note">{num:,} examples of {L:,} tokens. Attention pairs are the query-key '
        "pairs of a causal layer and head, n (n + 1) / 2 for an example of n tokens. Counted, not "
        "timed; the memory of activations grows with the length of one example as well.</p>"
    )


def _checks(run: dict[str, Any]) -> str:
    checks = run.get("checks")
    if not checks:
        return '<p class="note">None has run.</p>'
    items = ""
    for check in checks:
        kind, word = ("passed", "ok") if check["passed"] else ("failed", "failed")
        text = escape(f"{check['name']}: {check['detail']}")
        items += f'<li class="{kind}"><b>{word}</b>{text}</li>'
    return f'<ul class="checks">{items}</ul>'


def _details(run: dict[str, Any]) -> str:
    model, data, machine = (run.get(k) or {} for k in ("model", "data", "machine"))
    training = run.get("training") or {}
    entries: list[tuple[str, Any]] = [
        ("Model", f"{model.get('name', '?')} ({model.get('family', '?')})"),
        ("Parameters", _count(model.get("num_parameters"))),
        ("Trained", f"{_count(training.get('trainable_parameters'))} ({training.get('mode')})")
        if training
        else ("Trained", "nothing"),
        ("RoPE", ", ".join(f"{k} {v}" for k, v in (run.get("rope") or {}).items())),
        ("Text", ", ".join(map(str, data.get("sources", []))) or "none"),
    ]
    if data:
        short = f"{data.get('num_short', 0):,} short ones ({data.get('short_documents')})"
        entries.append(
            (
                "Documents",
                f"{data['num_documents']:,} of {data['num_tokens']:,} tokens; "
                f"{short}; {data.get('num_bad_records', 0):,} records not readable",
            )
        )
        entries.append(
            ("Evaluation", f"{data.get('num_eval_documents', 0):,} documents kept apart")
        )
    memory = machine.get("memory_gib")
    entries.append(
        (
            "Machine",
            f"{machine.get('cpu', '?')}, {machine.get('num_cpus', '?')} CPUs, "
            f"{memory} GiB, {machine.get('gpu') or 'no GPU'}",
        )
    )
    stages = run.get("stages") or {}
    entries.append(("Time", ", ".join(f"{k} {_duration(v)}" for k, v in stages.items())))
    versions = run.get("versions") or {}
    entries.append(("Versions", ", ".join(f"{k} {v}" for k, v in versions.items())))
    entries.append(("Started", run.get("created", "?")))
    body = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in entries if v)
    return f"<dl>{body}</dl>"


def _reproduce(run: dict[str, Any], recipe: Path) -> str:
    commands = "\n".join(run.get("reproduce") or [run.get("command", "")])
    text = recipe.read_text(encoding="utf-8") if recipe.exists() else ""
    shown = f"<details><summary>The recipe</summary><pre>{escape(text)}</pre></details>"
    return f"<pre>{escape(commands)}</pre>{shown if text else ''}"


def _say_perplexity(rows: Rows) -> str:
    said = []
    for model in ("before", "after"):
        points = [r for r in rows if r["model"] == model and r["task"] == "perplexity"]
        values = ", ".join(
            f"{r['value']:.3g} at {r['context_length']:,}" if r["value"] else "beyond measure"
            for r in points
        )
        if values:
            said.append(f"{model}: {values}")
    return "Perplexity by tokens of context. " + "; ".join(said) + "."


def _say_passkey(rows: Rows) -> str:
    said = [
        f"{r['model']} at {r['context_length']:,}: {r['value']:.0%}"
        for r in pooled([r for r in rows if r["task"] == "passkey"])
    ]
    return "Passkey retrieval over all depths. " + "; ".join(said) + "."


def _say_loss(metrics: list[dict[str, Any]]) -> str:
    losses = [m["loss"] for m in metrics if m.get("loss") is not None]
    if not losses:
        return "Training loss."
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    return f"Training loss from {first:.3f} to {last:.3f} over {len(losses)} steps."


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes / 60:.1f} h"


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _short(number: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise SkipwiseError(f"{file} is not JSON: {error}") from error


def _read_lines(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # the last line of a killed run
            continue
    return lines
