"""The input of the checks, `FolderReport`, and what they find, `Issue`."""

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
from skipwise.pose.rope import SCALINGS, keeps_length

ALL = (T5, T4, VLLM, SGLANG, LLAMA_CPP)


@dataclass(frozen=True, kw_only=True)
class Issue:
    """Something to fix."""

    name: str
    runtimes: tuple[str, ...]  # those that read it wrongly
    what: str
    fix: str
    inherent: bool = False  # no config with this scaling would avoid it: a matter of choice


@dataclass(frozen=True, kw_only=True)
class FolderReport:
    """A folder, and what each runtime makes of it."""

    folder: ModelFolder
    readings: dict[str, Reading]  # by runtime
    parameters: dict[str, Any]  # as in transformers 5
    original_length: int | None  # L, if the caller knows it
    window: int  # T, as the config states it
    keeps_length: bool  # max_position_embeddings is L, and vLLM and SGLang multiply it

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
    scaling = SCALINGS.get(p["rope_type"])
    keeps = keeps_length(scaling, folder.family)
    multiplied = round((original_length or folder.length) * factor)
    if keeps:
        window = multiplied
    elif scaling is not None and scaling.keeps_length:  # Gemma 3 states T; it may be wrong
        known = original_length or folder.tokenizer_length == multiplied
        window = multiplied if known else folder.length
    elif p["rope_type"] == "yarn" and p.get("factor") and (original_length or names_length(folder)):
        window = round((original_length or p["original_max_position_embeddings"]) * factor)
    return FolderReport(
        folder=folder,
        readings={reading.runtime: reading for reading in readings},
        parameters=p,
        original_length=original_length,
        window=window,
        keeps_length=keeps,
    )


def names_length(folder: ModelFolder) -> bool:
    """Whether the config or its class says L."""
    given = given_parameters(folder)
    return not given or bool(given.get("original_max_position_embeddings") or top_length(folder))


def describe(reading: Reading) -> str:
    """For example: yarn x8 of 4,096, theta 10,000."""
    if reading.error:
        return "nothing"
    if reading.rope_type == "default":
        return f"no scaling, theta {reading.rope_theta:,.0f}"
    of = f" of {reading.original_length:,}" if reading.original_length else ""
    factor = reading.attention_factor
    times = f", attention factor {factor:.4f}" if factor != 1 else ""
    return f"{reading.rope_type} x{reading.factor:g}{of}, theta {reading.rope_theta:,.0f}{times}"
