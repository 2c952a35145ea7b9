"""Train and measure the study's settings one after another; those in OUT are not run again.

python research/study/run.py --tables methods --out runs/study [--workers 4] [--minutes 8]

Each setting adds a row to OUT/rows.jsonl as soon as it is finished.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from settings import SWEEPS, TABLES, L, Setting, made

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from common import RESEARCH, make_parser, write_result

from skipwise.config.machine import machine, process_memory, versions


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--targets", nargs="+", type=int, help="only settings of these T")
    parser.add_argument("--out", type=Path, help="runs/study")
    parser.add_argument("--text", type=Path, help="where text and questions are; OUT")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e9, help="start none after so long")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--collect", nargs="*", type=Path, help="rows.jsonl files to one result")
    args = parser.parse_args()
    args.out = args.out or Path("runs/study-smoke" if args.smoke else "runs/study")
    args.text = args.text or args.out
    if args.collect is not None:
        collect(args.collect or [args.out / "rows.jsonl"])
        return
    end = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.text / "questions.npz").exists():
        from text import prepare

        prepare(args.text, [L << i for i in range(2 if args.smoke else 7)], smoke=args.smoke)
    rows = args.out / "rows.jsonl"
    done = {row["key"] for row in read_rows([rows])}
    names = [n for n in args.tables if not (args.smoke and n in SWEEPS)]
    wanted = [s for name in names for s in TABLES[name]()]
    if args.smoke:
        small = {"target": 512, "steps": 2}  # a finish: one of the two
        wanted = [made(s, **small, finish=s.finish and 0.5) for s in wanted if s.seed == 0]
        args.windows, args.trials = 4, 2
    wanted = [s for s in dict.fromkeys(wanted) if s.key not in done]
    wanted = [s for s in wanted if args.targets is None or s.target in args.targets]
    print(f"{len(wanted)} settings to do, {len(done)} done", flush=True)
    jobs = [(s, args.text, args.windows, args.trials, end) for s in wanted]
    with rows.open("a") as file:
        for row in measured_rows(jobs, args.workers):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(summary(row), flush=True)


def measured_rows(jobs: list[Any], workers: int) -> Iterator[dict[str, Any]]:
    """A row for each setting as it is finished; one worker is this process."""
    if workers == 1:
        yield from (row for row in map(work, jobs) if row is not None)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:  # one that is killed ends it
        for done in as_completed([pool.submit(work, job) for job in jobs]):
            if (row := done.result()) is not None:
                yield row


def collect(files: list[Path]) -> None:
    """One dated result of all rows; of equal settings the last."""
    rows = {(row["key"], row["windows"]): row for row in read_rows(files)}
    for row in rows.values():
        row.pop("losses", None)
    found = [_rounded(row) for row in rows.values()]
    write_result("study", {"rows": found}, folder=RESEARCH, show=False)
    print(f"{len(rows)} settings")


def read_rows(files: list[Path]) -> list[dict[str, Any]]:
    """Rows without an error; what failed is tried again."""
    lines = [line for file in files if file.exists() for line in file.read_text().splitlines()]
    return [row for line in lines if "error" not in (row := json.loads(line))]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return round(value, 5) if isinstance(value, float) else value


def work(job: tuple[Setting, Path, int, int, float]) -> dict[str, Any] | None:
    setting, folder, windows, trials, end = job
    if time.monotonic() > end:
        return None
    import torch
    from measure import arithmetic, lengths_to, measured, perplexities
    from text import read_text
    from train import trained

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    text = read_text(folder)
    row: dict[str, Any] = {"key": setting.key, "setting": dataclasses.asdict(setting)}
    row |= {"windows": windows, "trials": trials}
    started, before = time.monotonic(), process_memory("VmRSS")
    curve: dict[str, Any] = {}

    def each(step: int, model: Any) -> None:
        with arithmetic():
            model.eval()
            lengths = lengths_to(setting.target)
            curve[str(step)] = perplexities(model, text.held_out, lengths, windows // 2)

    try:
        model, losses = trained(setting, text, each if setting.curve else None)
        row |= {"train_seconds": round(time.monotonic() - started, 2), "losses": losses[::10]}
        row |= {"curve": curve} if curve else {}
        peak = process_memory("VmHWM") - before  # of this process, so of its largest setting
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak
        row |= {"train_mib": peak / 2**20}
        row |= measured(model, setting, text, folder, windows, trials)
    except Exception:
        row |= {"error": traceback.format_exc()[-1500:]}
    return row | {"seconds": round(time.monotonic() - started, 2), **_where()}


def _where() -> dict[str, Any]:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "machine": {**machine(), "gpu": gpu},
        "versions": versions(),
        "date": time.strftime("%F"),
    }


def summary(row: dict[str, Any]) -> str:
    changed = {
        k: v for k, v in row["setting"].items() if v != getattr(Setting(), k) and k != "tasks"
    }
    if "error" in row:
        return f"{changed} FAILED {row['error'][-300:]}"

    def line(found: dict[str, Any]) -> str:
        values = " ".join(f"{v:.2f}" for v in found["perplexity"].values())
        return f"{values} | {' '.join(f'{v:.2f}' for v in found.get('passkey', {}).values())}"

    text = f"{changed}\n   {line(row)}  {row['train_seconds']}/{row['seconds']} s"
    if "tempered" in row:
        text += f"\n   t={row['temperature']}: {line(row['tempered'])}"
    return text


if __name__ == "__main__":
    main()
