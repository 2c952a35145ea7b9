"""The section on what a run chose by measuring: scaling, attention temperature, separator."""

from __future__ import annotations

from html import escape
from typing import Any

from skipwise.report.format import number
from skipwise.report.load import nested
from skipwise.report.page.html import Section, note, table


def choices_section(run: dict[str, Any]) -> Section | None:
    """Each choice beside what it was chosen from; None if nothing is recorded."""
    exported, base = nested(run, "temperature"), nested(run, "untrained")
    small = _temperatures(exported, "Attention temperature, of the exported model")
    small += _temperatures(base, "Attention temperature, without training")
    small += _separators(nested(run, "separator"))
    body = _scaling(run) + (f'<div class="beside">{small}</div>' if small else "")
    return Section("Scaling, temperature and separator", body) if body else None


def _scaling(run: dict[str, Any]) -> str:
    """The scalings that `rope.type: auto` measured, or where the scaling comes from."""
    choice = nested(run, "rope_choice")
    measured, lengths = choice.get("measured") or [], choice.get("context_lengths") or []
    chosen = choice.get("type") or run.get("scaling")
    if not measured:
        origin = choice.get("detail") or f"{chosen}, as the recipe or the base model says"
        return f"<p>RoPE scaling: {escape(str(origin))}.</p>\n" if chosen else ""
    head = ["RoPE scaling", "Attention temperature", *[f"{n:,}" for n in lengths], "Passkeys"]
    lines = [
        [
            str(one.get("type")),
            f"{one.get('temperature', 1):g}",
            *[number(value) for value in one.get("perplexity") or []],
            f"{one.get('passkeys', '–')} of {one.get('num_passkeys', '–')}",
        ]
        for one in measured
    ]
    names = [line[0] for line in lines]
    caption = (
        "Perplexity on training documents by tokens of context, and passkeys at the longest: the "
        "base with each scaling at its best temperature of those tried, before training"
    )
    text = "The lowest mean loss is chosen if it is 0.01 or more below that of the first line."
    for name, reason in nested(choice, "left_out").items():
        text += f" {name} was left out: {reason}."
    index = names.index(chosen) if chosen in names else None
    return table(head, lines, caption=caption, chosen=index) + note(text)


def _temperatures(found: dict[str, Any], title: str) -> str:
    """The temperatures of a search, or where the number comes from."""
    value, searched = found.get("value"), found.get("searched") or []
    if value is None:
        return ""
    if not searched:
        return f"<p>{title}: {value:g}, {escape(str(found.get('detail', '')))}.</p>\n"
    head = ["Temperature", *[f"{n:,} tokens" for n in found.get("context_lengths") or []]]
    lines = [
        [f"{one['temperature']:g}", *[number(x) for x in one["perplexity"]]] for one in searched
    ]
    values = [one["temperature"] for one in searched]
    caption = f"{title}: perplexity on documents that the evaluation does not use"
    index = values.index(value) if value in values else None
    return table(head, lines, caption=caption, chosen=index)


def _separators(found: dict[str, Any]) -> str:
    """The separators that were measured on the base, or where this one comes from."""
    detail, measured = str(found.get("detail") or ""), nested(found, "perplexity")
    if len(measured) < 2:
        return f"<p>Separator: {escape(detail)}.</p>\n" if detail else ""
    chosen = next(
        (i for i, name in enumerate(measured) if detail.startswith(f"{name} between")), None
    )
    lines = [[name, number(value)] for name, value in measured.items()]
    caption = "Separator between documents: perplexity of the base on the documents' beginnings"
    return table(["Separator", "Perplexity"], lines, caption=caption, chosen=chosen)
