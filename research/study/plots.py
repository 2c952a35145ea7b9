"""The study's plots, as SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from rows import Rows, lengths_of, newest
from settings import DISTILLED, FULL, OURS, PAPER, L, at, made

from skipwise.pose.coverage import coverage
from skipwise.pose.samplers import FullLength, PoSE, RandPos

plt.switch_backend("svg")
plt.rcParams["svg.hashsalt"] = "skipwise"  # the same file for the same figures
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#666666")


def write_plots(rows: Rows, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name, figure in (
        ("perplexity", perplexity(rows)),
        ("coverage", coverages()),
        ("temperature", temperature(rows)),
        ("cost", cost()),
        ("training", training(rows)),
    ):
        if figure is not None:
            figure.savefig(
                folder / f"{name}.svg",
                bbox_inches="tight",
                metadata={"Date": None, "Creator": None},
            )
            plt.close(figure)


def perplexity(rows: Rows) -> Any:
    """By context length, at three factors."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    for axis, T in zip(axes, (2048, 4096, 16384), strict=True):
        lines = (
            ("PoSE as published, linear", at(made(PAPER, rope="linear"), T), False),
            ("PoSE as published, YaRN", at(PAPER, T), False),
            ("defaults without distillation", at(OURS, T), True),
            ("defaults", at(DISTILLED, T), True),
            ("full length, equal tokens", at(FULL, T), False),
        )
        for colour, (name, setting, tempered) in zip(COLOURS, lines, strict=False):
            if not rows.of(setting):
                continue
            values = [rows.mean(setting, n, tempered=tempered) for n in lengths_of(T)]
            axis.plot(lengths_of(T), values, "o-", ms=4, color=colour, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths_of(T), [f"{n:,}" for n in lengths_of(T)], fontsize=7)
        axis.set_title(f"f = {T // L}", fontsize=10)
        axis.set_xlabel("context length, tokens")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("perplexity of the same targets")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, ncol=5, loc="upper center", bbox_to_anchor=(0.5, 1.08), fontsize=8
    )
    return figure


def coverages() -> Any:
    """How often an example shows a relative distance."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
    for axis, f in zip(axes, (8, 64), strict=True):
        T = f * L
        both = {"train_length": L, "target_length": T}
        samplers = (
            ("N = 2", PoSE(**both)),
            ("N = 3", PoSE(**both, num_chunks=3)),
            ("N = 3, sorted gaps", PoSE(**both, num_chunks=3, skips="sorted")),
            ("N = 4, sorted gaps", PoSE(**both, num_chunks=4, skips="sorted")),
            ("RandPos", RandPos(**both)),
            ("full length", FullLength(target_length=T)),
        )
        for colour, (name, sampler) in zip(COLOURS, samplers, strict=True):
            shown = coverage(sampler, num_samples=1000)
            width = max(1, T // 512)
            middle = shown[: len(shown) // width * width].reshape(-1, width).mean(1)
            axis.plot(np.arange(len(middle)) * width, middle, color=colour, lw=1.2, label=name)
        axis.set_yscale("log")
        axis.set_ylim(1e-3, 1.5)
        axis.set_title(f"f = {f}", fontsize=10)
        axis.set_xlabel("relative distance, tokens")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of examples that show it")
    axes[0].legend(fontsize=8)
    return figure


def temperature(rows: Rows) -> Any:
    """Loss on the documents of the search, as the temperature grows."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4))
    for axis, key, name in (
        (axes[0], "loss", "change of perplexity at T, %"),
        (axes[1], "short_loss", "change of perplexity at 256, %"),
    ):
        for colour, (label, setting) in zip(
            COLOURS,
            [
                (f"{name_}, f = {T // L}", at(setting, T))
                for name_, setting in (("published", PAPER), ("without distillation", OURS))
                for T in (1024, 2048, 8192)
            ],
            strict=True,
        ):
            for row in rows.of(setting)[:1]:
                table = row["search"]
                gain = [100 * (np.exp(one[key] - table[0][key]) - 1) for one in table]
                temperatures = [one["temperature"] for one in table]
                axis.plot(temperatures, gain, "o-", ms=3, color=colour, label=label)
        axis.axhline(0, color="black", lw=0.6)
        axis.set_xlabel("temperature")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        fontsize=7,
        loc="center left",
        bbox_to_anchor=(0.91, 0.5),
    )
    return figure


def cost() -> Any:
    """Mistral 7B's shape: memory and time by target."""
    found = newest("method_cost")
    if found is None:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for colour, (mode, method) in zip(
        COLOURS, [(m, k) for m in ("full", "lora") for k in ("pose", "full")], strict=False
    ):
        kept = [r for r in found["rows"] if (r["mode"], r["method"]) == (mode, method)]
        kept.sort(key=lambda row: row["target_length"])
        what = "full fine-tuning" if mode == "full" else "LoRA"
        label = f"{what}, {'PoSE at 8k' if method == 'pose' else 'full length'}"
        style = "o-" if method == "pose" else "s--"
        targets = [row["target_length"] / 1024 for row in kept]
        memory = [row["memory"][-1]["peak_gib"] for row in kept]
        seconds = [row["seconds_per_example"] for row in kept]
        axes[0].plot(targets, memory, style, ms=4, color=colour, label=label)
        axes[1].plot(targets, seconds, style, ms=4, color=colour, label=label)
    for axis, name in zip(axes, ("peak memory, GiB", "seconds an example"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xticks([16, 32, 64, 128], ["16k", "32k", "64k", "128k"])
        axis.set_xlabel("target")
        axis.set_ylabel(name)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    return figure


def training(rows: Rows) -> Any:
    """Perplexity at T along training."""
    T = 2048
    measured = [s for s in (PAPER, OURS, FULL) if any("curve" in r for r in rows.of(at(s, T)))]
    if not measured:
        return None
    figure, axis = plt.subplots(figsize=(5.5, 3.4))
    for colour, (name, setting) in zip(
        COLOURS,
        (("PoSE as published", PAPER), ("without distillation", OURS), ("full length", FULL)),
        strict=False,
    ):
        curves = [row["curve"] for row in rows.of(at(setting, T)) if "curve" in row]
        if curves:
            steps = [int(step) for step in curves[0]]
            values = [one[str(T)] for one in curves[0].values()]
            axis.plot(np.array(steps) / max(steps), values, "o-", ms=3, color=colour, label=name)
    axis.set_xlabel("share of the tokens")
    axis.set_ylabel(f"perplexity at {T:,} tokens, 32 windows")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure
