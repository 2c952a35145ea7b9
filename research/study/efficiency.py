"""Memory and time of a step by target: PoSE against full length, at equal global batch.

python research/study/efficiency.py [--steps 10] [--rounds 3]

16 examples a step, all held at once: of L tokens for PoSE (with importance weights and without), of
T tokens at full length. The cases take turns in every round, each in a process of its own, so that
noise of the machine meets all of them and memory is the process's own. Memory: on a GPU what torch
allocated at most, else the resident set at its peak, less what it was before the first step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from settings import BATCH, L, made

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from common import RESEARCH, SMOKE, make_parser, run_child, write_result

METHODS = ["pose", "pose, weighted", "full"]
TARGETS = [L, 2 * L, 4 * L, 8 * L, 16 * L]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one[0], int(args.one[1]), args.steps)))
        return
    if args.smoke:
        args.steps, args.rounds, args.targets, args.methods = 1, 1, [2 * L], ["pose, weighted"]
    cases = [(m, T) for T in args.targets for m in args.methods]
    found: dict[tuple[str, int], list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(args.rounds):
        for method, T in cases:
            try:
                found[method, T].append(run_child("--steps", args.steps, "--one", method, T))
            except SystemExit as failure:  # out of memory: the other cases are still measured
                print(method, T, "failed", str(failure)[-300:], file=sys.stderr)
    rows = [
        {
            "method": method,
            "target": T,
            **{key: statistics.median(one[key] for one in all_) for key in all_[0]},
        }
        for (method, T), all_ in found.items()
        if all_
    ]
    figures: dict[str, Any] = {"gpu": _gpu(), "batch": BATCH, "rounds": args.rounds, "rows": rows}
    write_result("study_efficiency", figures, folder=SMOKE if args.smoke else RESEARCH)


def one(method: str, target: int, steps: int) -> dict[str, float]:
    """Peak memory and median seconds of a step."""
    import numpy as np
    import torch
    from train import DTYPE, load_base

    from skipwise.config.machine import process_memory
    from skipwise.data.collator import ExampleCollator
    from skipwise.models.attention.masks import with_chunk_weights
    from skipwise.models.load import best_device
    from skipwise.pose.samplers import FullLength, PoSE

    device = best_device()
    model = load_base(made(target=max(target, 2 * L)))
    sampler: Any = (
        FullLength(target_length=target)
        if method == "full"
        else PoSE(train_length=L, target_length=target, content="aligned")
    )
    collator = ExampleCollator("importance" if "weighted" in method else "none")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    rng = np.random.default_rng(0)
    before = process_memory("VmRSS")

    def step() -> None:
        items = []
        for _ in range(BATCH):
            example = sampler.sample(rng, target)
            input_ids, labels = example.take(rng.integers(0, 1000, target))
            ids = {"input_ids": input_ids, "labels": labels, "example": example}
            items.append(ids | {"position_ids": example.position_ids()})
        batch = {k: v.to(device) for k, v in collator(items).items()}
        batch = with_chunk_weights(batch, DTYPE)
        with torch.autocast(device.type, DTYPE, enabled=torch.float32 != DTYPE):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    seconds = []
    for k in range(steps + 2):
        started = time.perf_counter()
        step()
        if k >= 2:
            seconds.append(time.perf_counter() - started)
    peak = process_memory("VmHWM") - before
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return {"peak_mib": peak / 2**20, "seconds_per_100_steps": 100 * statistics.median(seconds)}


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


if __name__ == "__main__":
    main()
