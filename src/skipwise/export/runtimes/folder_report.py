"""What the checks look at, and what they find."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from skipwise.export.runtimes.folder import ModelFolder
from skipwise.export.runtimes.readers import (
    LLAMA_CPP,
    SGLANG,
    T4,
    T5,
    VLLM,
    Reading,
    given_parameters,
    parameters_5,
    top_length,
)

ALL = (T5, T4, VLLM, SGLANG, LLAMA_CPP)


@dataclass(frozen=True, kw_only=True)
class Issue:
    """Something to mend."""

    name: str
    runtimes: tuple[str, ...]  # those that read it wrongly
    what: str
    mend: str


@dataclass(frozen=True, kw_only=True)
class FolderReport:
    """What the checks look at."""

    folder: ModelFolder
    readings: dict[str, Reading]  # of each runtime
    parameters: dict[str, Any]  # as transformers 5 holds them
    original_length: int | None  # L, where the caller knows it
    window: int  # T: how far the config reaches, by its own account

    @property
    def reference(self) -> Reading:
        return self.readings[T5]

    @property
    def rope_type(self) -> str:
        return self.parameters["rope_type"]


def make_folder_report(
    folder: ModelFolder, readings: tuple[Reading, ...], original_length: int | None
) -> FolderReport:
    p, _ = parameters_5(folder)
    factor = p.get("factor") or 1.0
    window = folder.length
    if p["rope_type"] in ("linear", "dynamic"):
        window = round((original_length or folder.length) * factor)
    elif p["rope_type"] == "yarn" and p.get("factor") and (original_length or names_length(folder)):
        window = round((original_length or p["original_max_position_embeddings"]) * factor)
    return FolderReport(
        folder=folder,
        readings={reading.runtime: reading for reading in readings},
        parameters=p,
        original_length=original_length,
        window=window,
    )


def names_length(folder: ModelFolder) -> bool:
    """Whether the config says L, or its class does."""
    given = given_parameters(folder)
    return not given or bool(given.get("original_max_position_embeddings") or top_length(folder))


def describe(reading: Reading) -> str:
    """yarn x8 of 4,096, theta 10,000."""
    if reading.error:
        return "nothing"
    if reading.rope_type == "default":
        return f"no scaling, theta {reading.rope_theta:,.0f}"
    of = f" of {reading.original_length:,}" if reading.original_length else ""
    times = f", attention factor {reading.attention_factor:.4f}"
    return (
        f"{reading.rope_type} x{reading.factor:g}{of}, theta {reading.rope_theta:,.0f}"
        f"{times if reading.attention_factor != 1 else ''}"
    )
