"""The verdict on a folder, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipwise.export.runtimes.config_issues import find_issues, is_new_family
from skipwise.export.runtimes.folder import ModelFolder, read_folder
from skipwise.export.runtimes.folder_report import FolderReport, Issue, make_folder_report
from skipwise.export.runtimes.readers import LLAMA_CPP, VLLM, Reading, read_all

_HEADS = ("runtime", "loads as", "theta", "factor", "original", "attention", "max length")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What runtimes make of a folder."""

    folder: str
    family: str
    window: int  # T, as the config states it
    readings: tuple[Reading, ...]
    issues: tuple[Issue, ...]
    notes: tuple[str, ...]

    @property
    def well(self) -> bool:
        return not self.issues


def verify_folder(folder: Path, original_length: int | None = None) -> Verdict:
    """What each runtime would load from a model's folder.

    Args:
        folder: A folder with a config.json. Weights are not opened.
        original_length: L, the window before scaling. A linear config does not say it.

    Raises:
        SkipwiseError: there is no config to read, or no RoPE in it.
    """
    found = read_folder(folder)
    readings = read_all(found)
    report = make_folder_report(found, readings, original_length)
    return Verdict(
        folder=str(folder),
        family=found.family,
        window=report.window,
        readings=readings,
        issues=find_issues(report),
        notes=tuple(_notes(report, found)),
    )


def format_verdict(verdict: Verdict) -> str:
    """One row per runtime, then what to fix."""
    rows = [_HEADS, *(_row(reading) for reading in verdict.readings)]
    widths = [max(len(row[k]) for row in rows if len(row) > 2 or k == 0) for k in range(7)]
    lines = [f"{verdict.folder}: {verdict.family}, {verdict.window:,} tokens", ""]
    for row in rows:
        cells = [row[0].ljust(widths[0]), row[1].ljust(widths[1]) if len(row) > 2 else row[1]]
        cells += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=False)]
        lines.append("  ".join(cells).rstrip())
    for issue in verdict.issues:
        lines += ["", *_wrapped(f"FAIL {issue.name}: {issue.what}", "     ")]
        lines += _wrapped(f"     fix: {issue.fix}", "     ")
    for note in verdict.notes:
        lines += ["", *_wrapped(f"note {note}", "     ")]
    if verdict.well:
        lines += ["", "ok   nothing to fix: every runtime that loads it computes the same"]
    return "\n".join(lines)


def as_json(verdict: Verdict) -> dict[str, Any]:
    """The same as plain values, with the highest and the lowest frequency of `inv_freq`."""
    out = dataclasses.asdict(dataclasses.replace(verdict, readings=()))
    out["readings"] = [_plain(reading) for reading in verdict.readings]
    return {**out, "well": verdict.well}


def _plain(reading: Reading) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(reading) if f.name != "inv_freq"]
    found, ends = {name: getattr(reading, name) for name in names}, reading.inv_freq
    return {**found, "inv_freq_ends": None if ends is None else [float(ends[0]), float(ends[-1])]}


def _row(reading: Reading) -> tuple[str, ...]:
    if reading.error:
        return (reading.runtime, f"fails: {reading.error}")
    return (
        reading.runtime,
        reading.rope_type,
        f"{reading.rope_theta:,.0f}",
        f"{reading.factor:g}",
        f"{reading.original_length:,}" if reading.original_length else "-",
        f"{reading.attention_factor:.4f}",
        f"{reading.max_length:,}" if reading.max_length else "-",
    )


def _notes(report: FolderReport, folder: ModelFolder) -> list[str]:
    out, readings = [], report.readings
    if report.keeps_length and not readings[LLAMA_CPP].error:
        out.append(
            f"llama.cpp's own converter writes {folder.length:,} as the length of a "
            f"{report.rope_type} model, and llama-server serves no more: skipwise export --to gguf "
            f"writes {report.window:,}"
        )
    if report.rope_type == "longrope":
        if readings[VLLM].max_length != folder.length:
            out.append(f"vLLM serves longrope at L: start it with --max-model-len {folder.length}")
        p = report.parameters
        if p.get("short_factor") != p.get("long_factor"):
            out.append("transformers changes the frequencies if a batch is longer than L")
    if folder.dual_chunks:
        out.append(
            "vLLM and SGLang compute dual chunk attention, as dual_chunk_attention_config says; "
            "transformers and llama.cpp do not read it"
        )
    out += [f"{r.error}: use transformers 5" for r in readings.values() if is_new_family(r)]
    if folder.raw.get("quantization_config"):
        out.append("the weights are quantised, and not every runtime has kernels for them")
    if not folder.weights and folder.base is None:
        out.append("the folder has no weights: this is what its config says")
    if folder.tokenizer is None:
        out.append("the folder has no tokenizer_config.json")
    if not folder.known:
        known = "transformers 5 has no causal language model of this family"
        out.append(f"{known} ({folder.family}), so its defaults are unknown")
    if folder.raw.get("auto_map"):
        out.append("the model has its own code, which may read its config differently")
    return out


def _wrapped(text: str, indent: str) -> list[str]:
    first = indent if text.startswith(" ") else ""
    return textwrap.wrap(
        text.strip(),
        100,
        initial_indent=first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
