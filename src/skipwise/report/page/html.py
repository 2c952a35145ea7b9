"""HTML building blocks: sections, tables, figures, prose. Text from outside is escaped here."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from skipwise.report.figures import style

_HERE = Path(__file__).parent
MISSING = '<p class="note">Not measured.</p>'


class Section(NamedTuple):
    """A part of the page with an entry in its contents; the title is text, the body HTML."""

    title: str
    body: str


def note(text: str) -> str:
    return f'<p class="note">{prose(text)}</p>'


def prose(text: str) -> str:
    """Escaped text; no line breaks between a number and its %, ± or ≥."""
    text = escape(text).replace(" %", "&nbsp;%").replace("≥ ", "≥&nbsp;")
    return text.replace(" ± ", "&nbsp;±&nbsp;")


def code_name(name: str) -> str:
    """Escaped; a line may break after an underscore."""
    return escape(name).replace("_", "_<wbr>")


def figure(
    png_folder: Path | None,
    name: str,
    draw: Callable[[float], Figure | None],
    label: Callable[[], str],
    caption: str,
) -> str:
    """The figure at both widths with its alt text; also written as PNG if there is a folder.

    Empty if there is nothing to draw; then the PNG of an earlier report is removed.
    """
    wide, narrow = draw(style.WIDE), draw(style.NARROW)
    png = png_folder / f"{name}.png" if png_folder else None
    if wide is None or narrow is None:
        if png:
            png.unlink(missing_ok=True)
        return ""
    if png:
        png.write_bytes(style.to_png(wide))
    drawn = style.to_svg(wide, name, "wide") + style.to_svg(narrow, name, "narrow")
    return (
        f'<figure><div role="img" aria-label="{escape(label())}">{drawn}</div>'
        f"<figcaption>{prose(caption)}</figcaption></figure>"
    )


def tile_list(tiles: list[tuple[str, str]]) -> str:
    """Tiles, each a value and its label, in rows of which none holds one tile alone."""
    items = "".join(f"<li><b>{prose(a)}</b><span>{escape(b)}</span></li>" for a, b in tiles)
    num = len(tiles)
    fitting = [n for n in (4, 3) if num % n != 1] or [5]
    columns = num if num < 4 else min(fitting, key=lambda n: -num % n)  # fewest empty places
    style = f"grid-template-columns:repeat({columns},1fr)"
    return f'<ul class="tiles" style="{style}">{items}</ul>\n' if tiles else ""


def table(
    head: Sequence[str],
    lines: Sequence[Sequence[str]],
    *,
    caption: str = "",
    numeric: bool = True,
    chosen: int | None = None,
) -> str:
    """A table whose first column names its lines. The line `chosen` is marked."""
    n = ' class="n"' if numeric else ""
    heads = "".join(f'<th{n} scope="col">{escape(name)}</th>' for name in head[1:])
    body = ""
    for i, (name, *values) in enumerate(lines):
        kind, mark = (' class="chosen"', " <small>chosen</small>") if i == chosen else ("", "")
        cells = "".join(f"<td{n}>{escape(value)}</td>" for value in values)
        body += f'<tr{kind}><th scope="row">{escape(name)}{mark}</th>{cells}</tr>\n'
    first = f'<th scope="col">{escape(head[0])}</th>' if head[0] else "<td></td>"
    short = ' class="short"' if numeric and len(head) < 4 else ""
    above = f"<caption>{prose(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table{short}>{above}<thead><tr>{first}{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>\n"
    )


def definitions(entries: dict[str, list[Any]]) -> str:
    """A definition list; names without values are left out."""
    known = {k: ", ".join(str(x) for x in v if x) for k, v in entries.items()}
    body = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in known.items() if v)
    return f"<dl>{body}</dl>"


def page(
    *,
    title: str,
    eyebrow: str,
    headline: str,
    sections: Sequence[Section | None],
    notice: str = "",
    tiles: str,
    names: Collection[str] = (),
) -> str:
    """The complete page, with its style inside: nothing is fetched.

    Args:
        headline: what follows its first colon is set below it, as a sentence of its own.
        names: words that keep their small letter at the start of a sentence.
    """
    lead, _, rest = headline.partition(": ")
    if rest and not any(rest.startswith((f"{name}:", f"{name} ")) for name in names):
        rest = rest[0].upper() + rest[1:]
    anchored = _anchors([one for one in sections if one])
    links = "".join(
        f'<li><a href="#{anchor}">{escape(one.title)}</a></li>' for anchor, one in anchored.items()
    )
    shown = "".join(
        f'<section id="{anchor}">\n<h2>{escape(one.title)}</h2>\n{one.body}\n</section>\n'
        for anchor, one in anchored.items()
    )
    return Template((_HERE / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        css=(_HERE / "page.css").read_text(encoding="utf-8"),
        eyebrow=escape(eyebrow),
        lead=prose(f"{lead}. " if rest else lead),
        rest=prose(rest),
        notice=notice,
        tiles=tiles,
        contents=f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n' if links else "",
        sections=shown,
    )


def _anchors(sections: Sequence[Section]) -> dict[str, Section]:
    """The sections by their ids, which the contents link to; no figure has such an id."""
    anchored: dict[str, Section] = {}
    for one in sections:
        stem = "section-" + re.sub(r"\W+", "-", one.title.lower()).strip("-")[:60]
        anchor, num = stem, 1
        while anchor in anchored:
            num += 1
            anchor = f"{stem}-{num}"
        anchored[anchor] = one
    return anchored
