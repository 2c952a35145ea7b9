"""A preview of positions: examples and coverage, as data and as a text picture. Numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np

from skipwise.pose.coverage import coverage
from skipwise.pose.samplers import Example, Sampler

_BLOCKS = " ▁▂▃▄▅▆▇█"


def describe_positions(sampler: Sampler, seed: int, num_examples: int = 24) -> dict[str, Any]:
    """Examples and coverage of relative distances, for the report's figure."""
    T = sampler.target_length
    distances = np.unique(np.linspace(1, T - 1, min(256, T - 1)).round().astype(int))
    shares = coverage(sampler, distances=distances)  # raises before long examples are drawn
    examples = []
    for k in range(num_examples):
        example = sampler.sample(np.random.default_rng([seed, k]), T)
        shown = _shown(example)
        lengths, starts = example.lengths[shown], example.position_starts[shown]
        examples.append({"lengths": lengths.tolist(), "position_starts": starts.tolist()})
    return {
        "sampler": repr(sampler),
        "examples": examples,
        "distances": distances.tolist(),
        "coverage": shares.round(5).tolist(),
    }


def _shown(example: Example) -> np.ndarray:
    """The recorded chunks: all, or 64 spread evenly over the example."""
    num = len(example.lengths)
    return np.unique(np.linspace(0, num - 1, min(num, 64)).round().astype(int))


def draw_text(facts: dict[str, Any], train_length: int, target_length: int, width: int = 72) -> str:
    """Eight examples as bars of their chunks on 0 .. T, and the coverage of each distance."""
    lines = [facts["sampler"], ""]
    for example in facts["examples"][:8]:
        row = [" "] * width
        for length, start in zip(example["lengths"], example["position_starts"], strict=True):
            end = start + length - 1
            for column in range(start * width // target_length, end * width // target_length + 1):
                row[column] = "█"
        chunks = zip(example["lengths"], example["position_starts"], strict=True)
        words = "  ".join(f"{n:,} at {start:,}" for n, start in list(chunks)[:4])
        words += "  ..." if len(example["lengths"]) > 4 else ""
        lines.append(f"|{''.join(row)}|  {words}")
    lines.append(f"0{f'{target_length:,}':>{width + 1}}   position")
    distances, shares = np.array(facts["distances"]), np.array(facts["coverage"])
    bins = np.minimum(distances * width // target_length, width - 1)
    means = [shares[bins == i].mean() if (bins == i).any() else 0.0 for i in range(width)]
    bars = "".join(_BLOCKS[min(8, int(np.ceil(m * 8)))] for m in means)
    lines += ["", f"|{bars}|  share of examples that contain a relative distance", ""]
    lines.append("distance      share")
    points = {1, train_length // 2, train_length, target_length // 2, int(target_length * 0.99)}
    for d in sorted(points):
        near = int(np.abs(distances - d).argmin())
        lines.append(f"{distances[near]:>8,}  {shares[near]:>8.1%}")
    return "\n".join(lines)
