"""Which evaluation tasks tell extensions of one base apart, and what each costs.

    python research/tasks/compare_tasks.py [--tasks passkey ...] [--seeds 0 1] [--workers 2]
    python research/tasks/compare_tasks.py --seeds 1 --beside FILE
    python research/tasks/compare_tasks.py --results RUN/results.json EVAL/results.json ...

Without --results the bundled model (256 tokens) is extended to 2,048 in the ways of ARMS, at equal
tokens, and each is measured by every task of Skipwise that generates its prompts, and by
perplexity. What is there is not made again. With --beside these are only the trained arms, compared
with those of another seed in that result. With --results these are the arms, in any files of
`skipwise eval` with the same lengths, texts and counts.

By task, from the areas over log2 of the context length (docs/evaluation.md):

    pairs     of all pairs of arms, those whose paired difference (95 %) excludes 0
    halves    Kendall's tau-b between the rankings of the arms by either half of the questions
    seeds     the same between the arms of the first and the second seed of training
    others    the same against the mean rank by all other tasks that tell some pair apart
    seconds   of processor time for a model; of all tasks of a group together

and the two tasks that together tell the most pairs apart, among those that cost the least.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from common import RESEARCH, SMOKE, make_parser, write_result  # noqa: E402

from skipwise.report.area import find_areas  # noqa: E402
from skipwise.report.rows import Rows, pooled  # noqa: E402

TASKS = ("perplexity", "passkey", "needle", "copy_far", "icl", "babilong", "needle_nonliteral")
TASKS += ("mrcr", "graphwalks", "ruler")
TOKENS = 94 * 6 * 512  # of training, as in the quickstart
PUBLISHED = ("train_length=256", "positions.content=uniform", "positions.key_weights=none")
PUBLISHED += ("rope.type=yarn", "attention_temperature=1.0", "training.learning_rate=3e-4")
ARMS = {  # keys of the quickstart's recipe
    "base": (),
    **{kind: ("method=none", f"rope.type={kind}") for kind in ("linear", "ntk", "yarn", "llama3")},
    "published": PUBLISHED,
    "defaults": (),
    "a quarter of it": (),
    "full length": ("method=full", "train_length=2048"),
}
LENGTHS = (256, 512, 1024, 2048)
QUIET = ("eval.tasks=[perplexity]", "eval.perplexity_windows=0", "eval.untrained=false")


def recipe_keys(arm: str, seed: int, smoke: bool) -> list[str]:
    keys = list(ARMS[arm])
    if "method=none" in keys:
        return [*keys, *QUIET, "distillation.weight=0"]
    length = next((int(k.split("=")[1]) for k in keys if k.startswith("train_length")), 512)
    batch = max(2, 6 * 512 // length)
    steps = TOKENS // (batch * length) // (4 if arm == "a quarter of it" else 1)
    steps = 1 if smoke else steps
    sized = [f"training.num_steps={steps}", f"training.global_batch_size={batch}"]
    sized += [f"training.micro_batch_size={min(batch, 6)}", "training.save_steps=100000"]
    sized += [f"training.warmup_steps={max(1, steps // 12)}", f"seed={seed}"]
    return [*keys, *sized, *QUIET]


def make_arm(arm: str, seed: int, out: Path, smoke: bool) -> Path:
    """The folder of the arm's model."""
    from skipwise.pipeline.extend import extend
    from skipwise.pipeline.quickstart import MODEL, make_recipe

    if arm == "base":
        return MODEL
    folder = out / f"{arm.replace(' ', '-')}-{seed}"
    if not (folder / "model" / "config.json").exists():
        extend(make_recipe(recipe_keys(arm, seed, smoke)), folder)
    return folder / "model"


def _make_and_measure(job: tuple[Any, ...]) -> tuple[str, Rows, dict[str, float]]:
    name, arm, seed, tasks, text, out, smoke = job
    return name, *measure(name, make_arm(arm, seed, out, smoke), tasks, text, out, smoke)


def measure(
    name: str, model: Path, tasks: list[str], text: Path, out: Path, smoke: bool
) -> tuple[Rows, dict[str, float]]:
    """The rows of all tasks, and processor seconds by task; kept in a file."""
    from skipwise.evaluation.run import evaluate

    file = out / f"{name.replace(' ', '-')}.json"
    kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    lengths = [256, 512] if smoke else list(LENGTHS)
    for task in tasks[:3] if smoke else tasks:
        if task in kept:
            continue
        counts = ("perplexity_windows", "passkey_samples", "needle_samples", "samples")
        few = [f"eval.{key}=4" for key in counts] if smoke else ["eval.needle_samples=50"]
        started = time.process_time()
        rows, _ = evaluate(
            str(model),
            lengths=lengths,
            tasks=[task],
            data=[str(text)],
            overrides=few,
            out=out / "eval" / f"{name.replace(' ', '-')}-{task}",
        )
        seconds = time.process_time() - started
        kept[task] = {"seconds": round(seconds, 1), "rows": rows}
        file.write_text(json.dumps(kept))
    kept = {task: part for task, part in kept.items() if task in tasks}
    rows = [{**row, "model": name} for part in kept.values() for row in part["rows"]]
    return rows, {task: part["seconds"] for task, part in kept.items()}


def half(rows: Rows, which: int) -> Rows:
    """The rows by every second question or window."""
    found = []
    for row in pooled(rows):
        samples = (row.get("samples") or [])[which::2]
        if not samples:
            continue
        mean = float(np.mean(samples))
        value = float(np.exp(mean)) if row["metric"] == "perplexity" else mean
        documents = (row.get("documents") or [])[which::2]
        found.append({**row, "samples": samples, "documents": documents, "value": value})
    return found


def scores_of(rows: Rows) -> dict[str, dict[str, float]]:
    """By task, the area of each arm, higher is better."""
    found: dict[str, dict[str, float]] = {}
    for area in find_areas(rows)[0]:
        if len(area.weights) > 1 and (area.name in TASKS or _one_task(area)):
            sign = -1 if area.metric == "loss" else 1
            models = dict.fromkeys(row["model"] for row in rows)
            each = {m: row for m in models if (row := area.row(m)) is not None}
            found[area.name] = {m: sign * row["value"] for m, row in each.items()}
    return found


def _one_task(area: Any) -> bool:
    return area.name == "RULER" or len({task for task, _ in area.weights}) == 1


def tau(first: list[float], second: list[float]) -> float | None:
    """Kendall's tau-b; None where one has only ties (Kendall 1945, Biometrika 33)."""
    pairs = list(itertools.combinations(range(len(first)), 2))
    a = np.sign([first[i] - first[j] for i, j in pairs])
    b = np.sign([second[i] - second[j] for i, j in pairs])
    size = np.sqrt((a**2).sum() * (b**2).sum())
    return round(float((a * b).sum() / size), 2) if size else None


def compare(
    rows: Rows, seconds: dict[str, dict[str, float]], before: dict[str, Any] | None = None
) -> dict[str, Any]:
    scores, halves = scores_of(rows), [scores_of(half(rows, i)) for i in (0, 1)]
    areas = {area.name: area for area in find_areas(rows)[0]}
    names = list(dict.fromkeys(row["model"] for row in rows))
    scores = {task: own for task, own in scores.items() if len(own) == len(names)}  # all arms
    pairs = list(itertools.combinations(names, 2))
    apart = {task: [p for p in pairs if _apart(areas[task], p)] for task in scores}
    telling = [task for task in scores if apart[task]]
    found: dict[str, Any] = {}
    for task, own in scores.items():
        others = [scores[other] for other in telling if other != task]
        ranks = [np.mean([_rank(o, name) for o in others]) if others else 0.0 for name in names]
        split = [[h.get(task, {}).get(name) for name in names] for h in halves]
        found[task] = {
            "area": {name: round(own[name], 4) for name in names},
            "pairs": len(apart[task]),
            "halves": None if None in split[0] + split[1] else tau(*split),
            "seeds": _seeds({**(before or {}).get(task, {}).get("area", {}), **own}),
            "others": tau([own[n] for n in names], [-float(r) for r in ranks]) if others else None,
            "seconds": _seconds(task, seconds),
        }
    two = []
    for first, second in itertools.combinations(telling, 2):
        cost = [found[task]["seconds"] for task in (first, second)]
        both = {*apart[first], *apart[second]}
        total = None if None in cost else round(sum(cost), 1)
        two.append({"tasks": [first, second], "pairs": len(both), "seconds": total})
    two.sort(key=lambda row: (-row["pairs"], row["seconds"] or 0))
    any_task = {pair for task in telling for pair in apart[task]}
    all_pairs = {"all pairs": len(pairs), "by any task": len(any_task)}
    return {"arms": names, **all_pairs, "tasks": found, "two tasks": two[:10]}


def _apart(area: Any, pair: tuple[str, str]) -> bool:
    difference = area.difference(*pair)
    return difference is not None and (difference.better or difference.worse)


def _rank(scores: dict[str, float], name: str) -> float:
    """1 is the best; equal scores share their ranks."""
    above = sum(score > scores[name] for score in scores.values())
    same = sum(score == scores[name] for score in scores.values())
    return above + (same + 1) / 2


def _seeds(scores: dict[str, float]) -> float | None:
    """Between the trained arms of two seeds: their names end in -0 and -1."""
    stems = [n.removesuffix("-0") for n in scores if n.endswith("-0")]
    stems = [s for s in stems if f"{s}-1" in scores]
    if len(stems) < 3:
        return None
    return tau([scores[f"{s}-0"] for s in stems], [scores[f"{s}-1"] for s in stems])


def _seconds(task: str, seconds: dict[str, dict[str, float]]) -> float | None:
    name = {"RULER": "ruler"}.get(task, task)
    keys = [key for key in TASKS if name.startswith(key)]
    known = [arm[max(keys, key=len)] for arm in seconds.values()] if keys and seconds else []
    return round(float(np.mean(known)), 1) if known else None


def table(figures: dict[str, Any]) -> str:
    columns = ("pairs", "halves", "seeds", "others", "seconds")
    lines = ["| task | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    for task, row in sorted(figures["tasks"].items(), key=lambda item: -item[1]["pairs"]):
        cells = ["-" if row[c] is None else f"{row[c]:g}" for c in columns]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    lines.append(f"\n{figures['all pairs']} pairs; told apart by any task {figures['by any task']}")
    lines += [
        f"{' and '.join(row['tasks'])}: {row['pairs']} pairs, {row['seconds']} s"
        for row in figures["two tasks"][:5]
    ]
    return "\n".join(lines)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--results", nargs="+", type=Path, help="results.json of the arms")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--beside", type=Path, help="a result of the other seed")
    parser.add_argument("--out", type=Path, help="runs/tasks")
    parser.add_argument("--workers", type=int, default=1, help="arms at a time")
    args = parser.parse_args()
    rows: Rows = []
    seconds: dict[str, dict[str, float]] = {}
    if args.results:
        for file in args.results:
            name = file.resolve().parent.name
            rows += [{**row, "model": name} for row in json.loads(file.read_text())]
    else:
        from skipwise.pipeline.quickstart import make_recipe

        out = (args.out or Path("runs/tasks-smoke" if args.smoke else "runs/tasks")).resolve()
        (out / "eval").mkdir(parents=True, exist_ok=True)
        text = Path(os.path.expanduser(make_recipe().data.eval_sources[0]))
        arms = ("base", "defaults") if args.smoke else ARMS
        jobs = []
        for arm in arms:
            trained = arm != "base" and "method=none" not in ARMS[arm]
            for seed in args.seeds if trained else args.seeds[:1] if not args.beside else ():
                name = f"{arm}-{seed}" if trained else arm
                jobs.append((name, arm, seed, args.tasks, text, out, args.smoke))
        with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
            for name, found, taken in pool.map(_make_and_measure, jobs):
                seconds[name] = taken
                rows += found
    before = json.loads(args.beside.read_text())["tasks"] if args.beside else {}
    figures = compare(rows, seconds, before)
    name = "compare_tasks_seeds" if args.beside else "compare_tasks"
    write_result(name, figures, folder=SMOKE if args.smoke else RESEARCH, show=False)
    print(table(figures))


if __name__ == "__main__":
    main()
