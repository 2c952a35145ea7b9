"""One self-contained page: every word of it comes from the run folder's JSON.

Whatever run.json does not hold is left out or said to be missing; nothing is guessed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure

from skipwise.errors import SkipwiseError
from skipwise.report import plots, words
from skipwise.report.tables import (
    METRICS,
    Rows,
    find,
    finite,
    format_table,
    format_value,
    layout,
    percent,
)
from skipwise.report.verdict import headline

_HERE = Path(__file__).parent
_MISSING = '<p class="note">Not measured.</p>'


def write_report(run_folder: str | Path) -> Path:
    """Write `report/` of a run folder: the page, its figures as PNG, and the table as Markdown.

    Returns:
        the path of `report/index.html`.

    Raises:
        SkipwiseError: the folder has no run.json, or a file that is not JSON.
    """
    folder = Path(run_folder)
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
    L = run.get("original_length") or 0
    sections = [
        _section("Before and after", _table(run, rows)),
        _figure(
            out,
            "perplexity",
            "Perplexity against context length",
            lambda width: plots.plot_perplexity(rows, L or 1, width),
            words.say_perplexity(rows),
            "The same target tokens, seen with more and more context: a lower value further right "
            "means that the model uses it. Bands are 95 % intervals over documents, which differ "
            f"far more from each other than the lengths do.{_beyond(rows)}",
        ),
        _figure(
            out,
            "passkey",
            "Passkey retrieval",
            lambda width: plots.plot_passkey(rows, width),
            words.say_passkey(rows),
            "Share of trials, in percent, in which greedy decoding gives exactly the digits, by "
            "how deep in the context they stand (0 % is the start).",
        ),
        _figure(
            out,
            "loss",
            "Training loss",
            lambda width: plots.plot_loss(metrics, width),
            words.say_loss(metrics),
            "Pale: every logged step, beyond 400 the range in equal bins. Strong: a running mean "
            "over a twentieth of the steps.",
        ),
        _positions(out, run),
        _section("What it cost, against full-length training", _cost(run)),
        _section("Checks", _checks(run)),
        _section("Data, model and machine", _details(run)),
        _section("Reproduce", _reproduce(run, recipe)),
    ]
    name = run.get("name") or folder.name
    lead, _, rest = headline(run, rows).partition(": ")
    page = Template((_HERE / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"{name} · Skipwise"),
        css=(_HERE / "page.css").read_text(encoding="utf-8"),
        eyebrow=escape(" · ".join([f"Skipwise run {name}", *_when(run)])),
        lead=_prose(f"{lead}: " if rest else lead),
        rest=_prose(rest),
        notice=_notice(run),
        facts=_facts(run, rows),
        sections="".join(sections),
    )
    (out / "table.md").write_text(format_table(rows) + "\n", encoding="utf-8")
    (out / "index.html").write_text(page, encoding="utf-8")
    return out / "index.html"


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>\n"


def _figure(
    out: Path,
    name: str,
    title: str,
    draw: Callable[[float], Figure | None],
    label: str,
    caption: str,
) -> str:
    wide, narrow = draw(plots.WIDE), draw(plots.NARROW)
    png = out / f"{name}.png"
    if wide is None or narrow is None:
        png.unlink(missing_ok=True)  # of an earlier report
        return _section(title, _MISSING)
    png.write_bytes(plots.to_png(wide))
    drawn = plots.to_svg(wide, name, "wide") + plots.to_svg(narrow, name, "narrow")
    return _section(
        title,
        f'<figure><div role="img" aria-label="{escape(label)}">{drawn}</div>'
        f"<figcaption>{_prose(caption)}</figcaption></figure>",
    )


def _when(run: dict[str, Any]) -> list[str]:
    created = str(run.get("created") or "").replace("T", " ").replace("+00:00", " UTC")
    version = _part(run, "versions").get("skipwise")
    return [x for x in (created, f"version {version}" if version else "") if x]


def _notice(run: dict[str, Any]) -> str:
    status = run.get("status")
    if status in (None, "finished"):
        return ""
    return f'<p class="notice">This run has not finished; its status is “{escape(status)}”.</p>\n'


def _facts(run: dict[str, Any], rows: Rows) -> str:
    L, T = run.get("original_length"), run.get("target_length")
    training = _part(run, "training")
    facts = []
    if L and T:
        facts.append((" → ".join(words.length_names([L, T])), "tokens of context"))
        found = [(m, find(rows, m, "passkey", T)) for m in ("before", "after")]
        shares = {m: percent(row["value"]) for m, row in found if row and row["value"] is not None}
        if shares:
            models = " and ".join(shares)
            facts.append((f"{' → '.join(shares.values())} %", f"passkey at {T:,}, {models}"))
    if training.get("num_tokens"):
        facts.append((words.short_count(training["num_tokens"]), "tokens of training"))
    if training.get("seconds"):
        facts.append((words.duration(training["seconds"]), "of training"))
    if training.get("peak_memory_gib"):
        facts.append((f"{training['peak_memory_gib']:.2f} GiB", "peak memory of training"))
    items = "".join(f"<li><b>{escape(a)}</b><span>{escape(b)}</span></li>" for a, b in facts)
    return f'<ul class="facts">{items}</ul>\n' if facts else ""


def _table(run: dict[str, Any], rows: Rows) -> str:
    if not rows:
        return _MISSING
    models, lines, cells = layout(rows)
    names = {run.get("target_length"): "target", run.get("original_length"): "original"}
    head = "".join(f'<th class="n" scope="col">{escape(m)}</th>' for m in models)
    body = ""
    for task, metric in dict.fromkeys(line[:2] for line in lines):
        lengths = [line[2] for line in lines if line[:2] == (task, metric)]
        label = METRICS.get(metric, metric)
        said = f"{escape(task)}" + (
            f"<small>{escape(label)}</small>"
            if not label.startswith(task)
            else f"<small>{escape(label.removeprefix(task).strip())} lower is better</small>"
        )
        body += "<tbody>"
        for i, length in enumerate(lengths):
            first = f'<th scope="rowgroup" rowspan="{len(lengths)}">{said}</th>' if i == 0 else ""
            named = f"<small>{names[length]}</small> " if length in names else ""
            body += f'<tr>{first}<th class="n" scope="row">{named}{length:,}</th>'
            for model in models:
                cell = cells.get((task, metric, length, model))
                value, _, interval = (format_value(cell) if cell else "not measured").partition(
                    " ["
                )
                small = f" <small>[{escape(interval)}</small>" if interval else ""
                body += f'<td class="n">{escape(value)}{small}</td>'
            body += "</tr>\n"
        body += "</tbody>"
    return (
        '<div class="scroll"><table><thead><tr><th scope="col">Task</th>'
        f'<th class="n" scope="col">Context</th>{head}</tr></thead>{body}</table></div>\n'
        '<p class="note">Perplexity is taken on the same target tokens at every length. Passkey is '
        "the share of exact answers over all depths. In brackets 95&nbsp;% intervals.</p>"
    )


def _positions(out: Path, run: dict[str, Any]) -> str:
    title, positions = "Positions seen in training", _part(run, "positions")
    L, T = run.get("train_length"), run.get("target_length")
    examples = positions.get("examples") or []
    pairs = zip(positions.get("distances") or [], positions.get("coverage") or [], strict=False)
    coverage = [(d, share) for d, share in pairs if share is not None]
    if not (examples and coverage and L and T):
        (out / "positions.png").unlink(missing_ok=True)
        return _section(title, _untrained(run))
    return _figure(
        out,
        "positions",
        title,
        lambda width: plots.plot_positions(examples, coverage, L, T, width),
        words.say_positions(examples, coverage, L, T),
        f"Each row is an example of {L:,} tokens, cut into chunks (colours) whose positions skip "
        "ahead. Below: how many of the examples show two tokens at each relative distance. "
        + str(positions.get("sampler") or ""),
    )


def _cost(run: dict[str, Any]) -> str:
    training, L, T = _part(run, "training"), run.get("train_length"), run.get("target_length")
    if not training or not L or not T:
        return _untrained(run)
    if not training.get("num_steps") or not training.get("batch_size"):
        return '<p class="note">The number of examples was not recorded.</p>'
    num = training["num_steps"] * training["batch_size"]
    lines = (
        ("This run", num * L, num * L * (L + 1) // 2),
        ("Full length, as many examples", num * T, num * T * (T + 1) // 2),
        ("Full length, as many tokens", num * L, num * L * (T + 1) // 2),
    )
    body = "".join(
        f'<tr><th scope="row">{name}</th>'
        f'<td class="n">{words.short_count(tokens) if tokens >= 1e8 else f"{tokens:,}"}</td>'
        f'<td class="n">{words.short_count(pairs)}</td>'
        f'<td class="n">{_ratio(pairs / lines[0][2])}×</td></tr>'
        for name, tokens, pairs in lines
    )
    spent = [f"{training['num_steps']:,} steps of {training['batch_size']:,} examples"]
    if training.get("seconds"):
        speed = num * L / training["seconds"]
        spent.append(f"{words.duration(training['seconds'])}, {speed:,.0f} tokens a second")
    if training.get("peak_memory_gib"):
        spent.append(f"{training['peak_memory_gib']:.2f} GiB of memory at the peak")
    return (
        f"<p>{escape('; '.join(spent))}.</p>\n"
        '<div class="scroll"><table><thead><tr><td></td><th class="n" scope="col">Tokens</th>'
        '<th class="n" scope="col">Attention pairs</th>'
        f'<th class="n" scope="col">Pairs, to this run</th></tr></thead><tbody>{body}</tbody>'
        f'</table></div>\n<p class="note">{num:,} examples of {L:,} tokens; full length is {T:,}. '
        "Attention pairs are the query-key pairs of one causal layer and head, n (n + 1) / 2 ≈ "
        f"n² / 2 for an example of n tokens: at equal tokens the ratio is about T / L = {T / L:.3g}"
        f", at equal examples its square. These are counted, not timed; of the work of a step, "
        "only attention grows this way.</p>"
    )


def _ratio(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"


def _checks(run: dict[str, Any]) -> str:
    items = ""
    for check in run.get("checks") or []:
        kind, word = ("passed", "ok") if check.get("passed") else ("failed", "failed")
        text = escape(f"{check.get('name', '?')}: {check.get('detail', '')}")
        items += f'<li class="{kind}"><b>{word}</b><span>{text}</span></li>'
    return f'<ul class="checks">{items}</ul>' if items else '<p class="note">None has run.</p>'


def _details(run: dict[str, Any]) -> str:
    model, data, machine, training = (
        _part(run, key) for key in ("model", "data", "machine", "training")
    )
    lengths = [
        f"{run[key]:,} {key.removesuffix('_length')}"
        for key in ("original_length", "train_length", "target_length")
        if run.get(key)
    ]
    trained = [_count(training, "trainable_parameters", "parameters"), training.get("mode")]
    shorts = _count(data, "num_short", "short ones")
    documents = [
        _count(data, "num_documents", "documents"),
        _count(data, "num_tokens", "tokens"),
        f"{shorts} ({data.get('short_documents', '?')})" if shorts else None,
        _count(data, "num_bad_records", "records not readable"),
    ]
    memory = f"{machine['memory_gib']} GiB" if machine.get("memory_gib") else None
    hardware = [machine.get("cpu"), _count(machine, "num_cpus", "CPUs"), memory]
    gpu = machine.get("gpu") or "no GPU"
    if machine.get("num_gpus", 1) > 1:
        gpu = f"{machine['num_gpus']} × {gpu}"
    stages = _part(run, "stages").items()
    entries = {
        "Model": [
            model.get("name"),
            model.get("family"),
            _count(model, "num_parameters", "parameters"),
        ],
        "Lengths": lengths,
        "Trained": trained if training else [],
        "RoPE": [f"{k} {v}" for k, v in _part(run, "rope").items()],
        "Text": data.get("sources") or [],
        "Documents": documents,
        "Evaluation": [_count(data, "num_eval_documents", "documents kept apart")],
        "Machine": [*hardware, gpu] if machine else ["not recorded"],
        "Time": [
            f"{k} {words.duration(v)}".replace(" ", "\u00a0") for k, v in stages if v is not None
        ],
        "Versions": [f"{k} {v}" for k, v in _part(run, "versions").items()],
    }
    known = {k: ", ".join(str(x) for x in v if x) for k, v in entries.items()}
    body = "".join(f"<dt>{k}</dt><dd>{escape(v)}</dd>" for k, v in known.items() if v)
    return f"<dl>{body}</dl>"


def _reproduce(run: dict[str, Any], recipe: Path) -> str:
    commands = [c for c in run.get("reproduce") or [run.get("command")] if c]
    shown = f"<pre>{escape(chr(10).join(commands))}</pre>" if commands else ""
    if recipe.exists():
        text = escape(recipe.read_text(encoding="utf-8"))
        shown += f"<details><summary>The recipe, recipe.yaml</summary><pre>{text}</pre></details>"
    return shown or '<p class="note">No command was recorded.</p>'


def _beyond(rows: Rows) -> str:
    points = [r for r in finite(rows) if r["task"] == "perplexity" and r["value"] is None]
    at = ", ".join(f"{r['model']} at {r['context_length']:,}" for r in points)
    return f" Beyond measure, and not drawn: {at}." if at else ""


def _untrained(run: dict[str, Any]) -> str:
    if run.get("training"):
        return '<p class="note">Not recorded.</p>'
    done = run.get("status") in (None, "finished")
    text = "Nothing was trained." if done else "No finished training is recorded."
    return f'<p class="note">{text}</p>'


def _prose(text: str) -> str:
    """Escaped; a percent sign stays on the line of its number."""
    return escape(text).replace(" %", "&nbsp;%")


def _part(run: dict[str, Any], key: str) -> dict[str, Any]:
    part = run.get(key)
    return part if isinstance(part, dict) else {}


def _count(part: dict[str, Any], key: str, noun: str) -> str | None:
    return None if part.get(key) is None else f"{part[key]:,} {noun}"


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
