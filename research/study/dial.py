"""The training length M between PoSE and full length: what each M costs and gives at equal tokens.

python research/study/dial.py [--targets 2048 --seeds 0] [--workers 2] [--minutes 60]
python research/study/dial.py --evidence      writes what `skipwise plan` says of it; trains nothing

M = L/2 .. T at f = 8 and 32: `dial` in settings.py. Each setting is trained and measured by run.py
in a process of its own, so that its peak memory is its own, and adds a row to OUT/rows.jsonl; type
the command again to go on. The result has one line a setting: perplexity by context length and
passkeys, both at the temperature found, seconds of training, and the memory that training added.
Rows of the newest result that were not run again are kept in it.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from rows import Rows, newest
from run import read_rows, summary, work
from settings import DISTILLED, FULL, TARGETS, L, Setting, at, dial, made

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from common import RESEARCH, ROOT, SMOKE, make_parser, write_result

EVIDENCE = ROOT / "src" / "skipwise" / "planning" / "distances.json"
ABOUT = (
    "Perplexity at T over that of full length at equal tokens, less 1, by factor f = T / L and by "
    "lengths = M / L, of the 3.4 M model. Written by research/study/dial.py --evidence from the "
    "results that are named. M = L is distilled; longer M are not."
)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--targets", nargs="+", type=int, help="only these T")
    parser.add_argument("--lengths", nargs="+", type=int, help="only these M; T is full length")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these seeds")
    parser.add_argument("--out", type=Path, help="runs/dial")
    parser.add_argument("--workers", type=int, default=1, help="settings at a time")
    parser.add_argument("--minutes", type=float, default=1e9, help="start none after so long")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--evidence", action="store_true", help="write distances.json, no more")
    args = parser.parse_args()
    if args.evidence:
        EVIDENCE.write_text(evidence(), encoding="utf-8")
        return
    args.out = args.out or Path("runs/dial-smoke" if args.smoke else "runs/dial")
    settings = dial()
    if args.smoke:
        args.windows, args.trials, lengths = 4, 2, (L // 2, 2 * L)
        settings = [made(s, target=4 * L, steps=2) for s in settings if s.train_length in lengths]
        settings = list(dict.fromkeys(s for s in settings if s.seed == 0))[:2]
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "questions.npz").exists():
        from text import prepare

        prepare(args.out, [L << i for i in range(3 if args.smoke else 6)], smoke=args.smoke)
    end, file = time.monotonic() + 60 * args.minutes, args.out / "rows.jsonl"
    done = {row["key"] for row in read_rows([file])}
    jobs = [
        (setting, args.out, args.windows, args.trials, end)
        for setting in settings
        if setting.key not in done
        and (not args.targets or setting.target in args.targets)
        and (not args.lengths or _length(setting) in args.lengths)
        and (not args.seeds or setting.seed in args.seeds)
    ]
    with ThreadPool(args.workers) as threads:
        for row in threads.imap_unordered(alone, jobs):
            if row is not None:
                with file.open("a") as rows:
                    rows.write(json.dumps(row) + "\n")
                print(summary(row), flush=True)
    wanted = {setting.key: setting for setting in settings}
    found = [line(row) for row in read_rows([file]) if row["key"] in wanted]
    print(f"{len(found)} of {len(wanted)} settings")
    if not args.smoke:
        found += earlier(found)
    figures = {"windows": args.windows, "trials": args.trials, "rows": found}
    write_result("study_dial", figures, folder=SMOKE if args.smoke else RESEARCH, show=False)


def earlier(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the newest result that these do not replace."""
    keys = ("target_length", "train_length", "distilled", "seed")
    here = {tuple(row[key] for key in keys) for row in found}
    kept = (newest("study_dial") or {"rows": []})["rows"]
    return [row for row in kept if tuple(row[key] for key in keys) not in here]


def alone(job: Any) -> dict[str, Any] | None:
    """A setting's row, from a process of its own; none if that was killed."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        try:
            return pool.submit(work, job).result()
        except BrokenProcessPool:
            print(f"{job[0]} was killed, most often for memory", flush=True)
            return None


def _length(setting: Setting) -> int:
    return setting.target if setting.method == "full" else setting.train_length


def line(row: dict[str, Any]) -> dict[str, Any]:
    """What a row says of its training length."""
    setting, best = row["setting"], row.get("tempered", row)
    T = setting["target"]
    return {
        "target_length": T,
        "train_length": _length(made(**setting)),
        "distilled": setting["distil"] > 0,
        "seed": setting["seed"],
        "learning_rate": setting["learning_rate"],
        "temperature": row["temperature"],
        "perplexity": {n: round(value, 4) for n, value in best["perplexity"].items()},
        "passkey": best["passkey"],
        "train_seconds": row["train_seconds"],
        "train_mib": round(row["train_mib"]),
        "machine": row["machine"],
    }


def evidence() -> str:
    """distances.json: of each f the rows of this script, and the study's defaults at M = L else.

    The study's full length has YaRN, this script's Llama 3's scaling: each row is against its own.
    """
    found: list[dict[str, Any]] = []
    study, dialled = Rows(), newest("study_dial")
    for T in TARGETS:
        rows = [r for r in (dialled or {"rows": []})["rows"] if r["target_length"] == T]
        full = {r["seed"]: r["perplexity"][str(T)] for r in rows if r["train_length"] == T}
        lengths = sorted({r["train_length"] for r in rows} - {T})
        for M in lengths:
            mine = [r for r in rows if r["train_length"] == M and r["seed"] in full]
            mine = [r for r in mine if r["distilled"] == (M <= L)]
            over = [r["perplexity"][str(T)] / full[r["seed"]] - 1 for r in mine]
            if over:
                found.append(
                    _distance(T, M, sum(over) / len(over), len(over), "study_dial", dialled)
                )
        ours, best = study.mean(at(DISTILLED, T), T, tempered=True), study.mean(at(FULL, T), T)
        known = {(row["factor"], row["lengths"]) for row in found}
        if (T / L, 1.0) not in known and ours and best:
            seeds = min(len(study.of(at(s, T))) for s in (DISTILLED, FULL))
            found.append(_distance(T, L, ours / best - 1, seeds, "study", newest("study")))
    lines = ",\n".join(f"  {json.dumps(row)}" for row in found)
    return f'{{\n "about": {json.dumps(ABOUT)},\n "rows": [\n{lines}\n ]\n}}\n'


def _distance(
    target: int, length: int, behind: float, seeds: int, name: str, result: Any
) -> dict[str, Any]:
    source = f"research/results/{name}_{result['date'][:10]}.json"
    numbers = {"factor": target / L, "lengths": length / L, "behind": round(behind, 4)}
    return {**numbers, "seeds": seeds, "source": source}


if __name__ == "__main__":
    main()
