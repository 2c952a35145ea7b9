"""HTML building blocks: sections, figures, prose. All text from outside is escaped here."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure

from skipwise.report.figures import style

_HERE = Path(__file__).parent
MISSING = '<p class="note">Not measured.</p>'


def section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>\n"


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
    """Tiles, each a value and its label."""
    items = "".join(f"<li><b>{prose(a)}</b><span>{escape(b)}</span></li>" for a, b in tiles)
    return f'<ul class="tiles">{items}</ul>\n' if tiles else ""


def definitions(entries: dict[str, list[Any]]) -> str:
    """A definition list; names without values are left out."""
    known = {k: ", ".join(str(x) for x in v if x) for k, v in entries.items()}
    body = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in known.items() if v)
    return f"<dl>{body}</dl>"


def page(
    *, title: str, eyebrow: str, headline: str, sections: list[str], notice: str = "", tiles: str
) -> str:
    """The complete page, with its style inside: nothing is fetched."""
    lead, _, rest = headline.partition(": ")
    return Template((_HERE / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        css=(_HERE / "page.css").read_text(encoding="utf-8"),
        eyebrow=escape(eyebrow),
        lead=prose(f"{lead}: " if rest else lead),
        rest=prose(rest),
        notice=notice,
        tiles=tiles,
        sections="".join(sections),
    )
