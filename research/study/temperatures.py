"""What the attention temperature does for retrieval at T, and what `skipwise extend` would take.

PYTHONPATH=src python research/study/temperatures.py --target 4096 [--seed 0] [--trials 50]

One setting (the defaults) is trained as in run.py, then searched by the library's own search on
documents of the training text. At every temperature tried: perplexity at L and T, passkeys at T.
The text and the questions are those that run.py prepared.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from measure import arithmetic, perplexities, shares
from settings import DISTILLED, L, at
from text import prepare, read_text
from train import trained

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from common import RESEARCH, SMOKE, make_parser, write_result

from skipwise.models.attention.temperature import QueryWeights
from skipwise.pipeline.choose_temperature import search_temperature


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--target", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--text", type=Path, default=Path("runs/study"))
    args = parser.parse_args()
    if args.smoke:
        args.target, args.trials, args.windows, args.steps = 2 * L, 2, 4, 1
        prepare(args.text, [L, 2 * L], smoke=True)
    chosen = {"seed": args.seed, "steps": args.steps, "tasks": ("passkey",)}
    setting = at(DISTILLED, args.target, **chosen)
    text = read_text(args.text)
    model, _ = trained(setting, text)
    model.eval()
    searched = [text.search[0][: 4 * args.target]] if args.smoke else text.search
    rows: list[dict[str, Any]] = []
    with arithmetic(), torch.inference_mode():
        value, tried = search_temperature(model, searched, L, args.target)
        weights = QueryWeights(model)
        for one in tried[:2] if args.smoke else tried:
            weights.set(one.temperature)
            lengths = [L, args.target]
            held_out = perplexities(model, text.held_out, lengths, args.windows)
            found = shares(model, setting, [args.target], args.text, args.trials)
            rows.append({**dataclasses.asdict(one), "held_out": held_out, **found})
            print(rows[-1], flush=True)
    facts = {"setting": dataclasses.asdict(setting), "taken": value, "trials": args.trials}
    name, folder = f"temperatures_{args.target}_seed{args.seed}", RESEARCH
    write_result(name, {**facts, "rows": rows}, folder=SMOKE if args.smoke else folder)


if __name__ == "__main__":
    main()
