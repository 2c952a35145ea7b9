"""Long real texts: Debian's documentation packages, as JSON lines of whole documents.

    python research/real_model/texts.py CACHE [--model FOLDER] [--packages NAME ...]

A package that is installed is read from /usr/share; another is fetched by `apt-get download` and
unpacked by `dpkg -x` into the cache, which needs no root. Nothing is installed or run, and nothing
of it belongs into git. Pages of one folder are joined in the order of its index, up to `LONGEST`
characters. Two packages are held out: no package is in both files.

    CACHE/train.jsonl, CACHE/held_out.jsonl     {"package", "licence", "document", "text"}
    CACHE/texts.json                            documents and tokens by package and by length
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

TRAIN = ("linux-doc-6.1", "perl-doc", "python3.11-doc", "debian-handbook", "git-doc", "cmake-doc")
HELD_OUT = ("postgresql-doc-15", "anarchism")
LENGTHS = (8192, 16384, 32768, 131072)
LONGEST = 700_000  # characters of a document: above 131,072 tokens
SHORTEST = 8_000
LICENCES = ("GPL", "LGPL", "GFDL", "FDL", "Artistic", "PSF", "PostgreSQL", "BSD", "MIT", "CC-BY")
_BLOCKS = {"p", "div", "li", "tr", "dt", "dd", "pre", "br", "table", "section", "blockquote"}
_BLOCKS |= {f"h{n}" for n in range(1, 7)}
_SKIPPED = {"script", "style", "head", "nav", "footer"}
_AROUND = re.compile(r"\b(sphinxsidebar|related|footer|navheader|navfooter|headerlink|navigation)")
_VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "wbr"}


class _Text(HTMLParser):
    """The text of a page without scripts, navigation and footers, and the pages it links to."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.links: list[str] = []
        self.skipped: list[str] = []  # open tags inside one that is skipped

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        if tag == "a" and "href" in given:
            self.links.append(given["href"].partition("#")[0])
        around = _AROUND.search(f"{given.get('class', '')} {given.get('role', '')}")
        if (self.skipped or tag in _SKIPPED or around) and tag not in _VOID:
            self.skipped.append(tag)
        elif tag in _BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.skipped:  # unclosed <p> and <li> inside end with it
            del self.skipped[len(self.skipped) - 1 - self.skipped[::-1].index(tag) :]
        elif tag in _BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.parts.append(data)


def read_page(file: Path) -> tuple[str, list[str]]:
    """(text, links) of an HTML page; a .pod file is text as it is."""
    source = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix == ".pod":
        return source.strip(), []
    parser = _Text()
    parser.feed(source)
    text = re.sub(r"[ \t]+\n", "\n", "".join(parser.parts))
    return re.sub(r"\n{3,}", "\n\n", text).strip(), parser.links


def package_root(name: str, cache: Path) -> Path | None:
    """The folder that holds the package's usr/share; None if it cannot be had."""
    if Path("/usr/share/doc", name, "html").is_dir():
        return Path("/")
    root = cache / "packages" / name
    if not root.is_dir():
        debs = cache / "debs"
        debs.mkdir(parents=True, exist_ok=True)
        if shutil.which("apt-get") and not list(debs.glob(f"{name}_*.deb")):
            subprocess.run(["apt-get", "download", "-q", name], cwd=debs, capture_output=True)
        found = sorted(debs.glob(f"{name}_*.deb"))
        if not found:
            return None
        part = root.with_name(f"{name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        subprocess.run(["dpkg", "-x", str(found[-1]), str(part)], check=True)
        part.rename(root)
    return root


def folders_of(name: str, root: Path) -> list[Path]:
    """The package's folders with pages in English, each path once."""
    if root == Path("/"):
        listed = subprocess.run(["dpkg", "-L", name], capture_output=True, text=True).stdout
        files = [Path(line) for line in listed.splitlines()]
    else:
        files = list(root.rglob("*"))
    pages = [f for f in files if f.suffix in (".html", ".pod") and f.is_file()]
    pages = [f for f in pages if not re.search(r"/(_sources|_static|releaselog)/", str(f))]
    english = [f for f in pages if "/en-US/" in str(f)]
    return sorted({page.resolve().parent for page in english or pages})


def documents_of(folder: Path) -> list[str]:
    """The pages of a folder in the order of its index, joined up to `LONGEST` characters."""
    pages = {
        f.name: read_page(f) for f in sorted(folder.iterdir()) if f.suffix in (".html", ".pod")
    }
    order = list(dict.fromkeys([*pages.get("index.html", ("", []))[1], *pages]))
    made: list[list[str]] = [[]]
    for text in (pages[name][0] for name in order if name in pages and "genindex" not in name):
        for start in range(0, len(text), LONGEST):  # a page longer than that is cut
            piece = text[start : start + LONGEST]
            if sum(map(len, made[-1])) + len(piece) > LONGEST:
                made.append([])
            made[-1].append(piece)
    joined = ["\n\n".join(texts) for texts in made]
    return [text for text in joined if len(text) >= SHORTEST]


def licence_of(name: str, root: Path) -> str:
    """The licences that the package's copyright file names."""
    file = root / "usr/share/doc" / name / "copyright"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    short = re.findall(r"^License:\s*(\S.{0,50})$", text, re.M)  # a name, not a sentence
    found = short or [word for word in LICENCES if re.search(rf"\b{word}", text)]
    return ", ".join(list(dict.fromkeys(found))[:6]) or "see its copyright file"


def make_texts(cache: Path, packages: dict[str, tuple[str, ...]]) -> dict[str, list[dict]]:
    """Write CACHE/train.jsonl and held_out.jsonl; returns their documents."""
    both = set(packages["train"]) & set(packages["held_out"])
    assert not both, f"held out and trained on: {both}"
    cache.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    made: dict[str, list[dict]] = {}
    for part in ("held_out", "train"):  # a text that both have stays held out
        made[part] = []
        for name in packages[part]:
            root = package_root(name, cache)
            if root is None:
                print(f"{name}: not installed, and apt-get cannot fetch it", file=sys.stderr)
                continue
            for folder in folders_of(name, root):
                for i, text in enumerate(documents_of(folder)):
                    digest = hashlib.sha1(text.encode()).hexdigest()
                    if digest not in seen:
                        seen.add(digest)
                        place = f"{folder.name}/{i}"
                        facts = {"package": name, "licence": licence_of(name, root)}
                        made[part].append({**facts, "document": place, "text": text})
        lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in made[part]]
        (cache / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    return made


def count(made: dict[str, list[dict]], model: str) -> dict:
    """Documents and tokens by package, and how many documents have each length."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    counted: dict = {}
    for part, documents in made.items():
        for one in documents:
            n = len(tokenizer(one["text"], add_special_tokens=False)["input_ids"])
            row = counted.setdefault(
                one["package"],
                {"part": part, "licence": one["licence"], "documents": 0, "tokens": 0}
                | {f">= {length}": 0 for length in LENGTHS},
            )
            row["documents"] += 1
            row["tokens"] += n
            for length in LENGTHS:
                row[f">= {length}"] += n >= length
    return counted


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cache", type=Path, help="folder outside git")
    parser.add_argument("--model", help="folder or hub name: counts tokens with its tokenizer")
    parser.add_argument("--packages", nargs="+", default=list(TRAIN), help="to train on")
    parser.add_argument("--held-out", nargs="+", default=list(HELD_OUT), help="to measure on")
    args = parser.parse_args()
    cache = args.cache.resolve()
    packages = {"train": tuple(args.packages), "held_out": tuple(args.held_out)}
    made = make_texts(cache, packages)
    if not made["train"] or not made["held_out"]:
        parser.error("no text to train on, or none to measure on")
    if args.model:
        counted = count(made, args.model)
        (cache / "texts.json").write_text(json.dumps(counted, indent=1) + "\n", encoding="utf-8")
        columns = list(next(iter(counted.values())))
        print("| package |", " | ".join(columns), "|\n|" + "---|" * (len(columns) + 1))
        for name, row in counted.items():
            values = (f"{v:,}" if isinstance(v, int) else v for v in row.values())
            print(f"| {name} |", " | ".join(values), "|")


if __name__ == "__main__":
    main()
