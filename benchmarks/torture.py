"""Kill, fill the disk, forbid to write and damage files, at the n-th file operation of `extend`.

    python benchmarks/torture.py [--kills 200] [--full 100] [--readonly 20] [--damage 40]

A tiny model goes through all phases of `skipwise extend` once undisturbed, and is once stopped at
the beginning of each. From each of these places, equally often, a chain of the same command runs
into faults at random file operations (tests/helpers/faults.py), and then to its end. Every chain
must end as the undisturbed run did, bit by bit, and every command that could not go on must say so
in one to three lines.
"""

import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from common import BENCHMARKS, ROOT, SMOKE, make_parser, write_result

sys.path.insert(0, str(ROOT / "tests" / "helpers"))
from fault_runs import Bench, copy_state, differences, is_clear, outcome

MOST = 120  # operations of a phase that a fault is drawn from
STAGE = re.compile(r"^\[\d/6\] (.*)$", re.MULTILINE)


class Places:
    """A run as it is at the beginning of each phase, to go on from in the same folder."""

    def __init__(self, bench, stages):
        self.bench, self.out = bench, bench.folder / "run"
        # operations of a command that goes on there: before the phase, and from it to the end
        self.before, self.rest = {}, {}
        for stage in stages:
            self.clear()
            code, said, *_ = bench.run(self.out, f"stage:{stage}")
            assert code == -9, said
            for folder in filter(Path.exists, self.folders()):  # no cache before the text is read
                copy_state(folder, self.stored(stage, folder))
            _, _, before, _ = bench.run(self.out, f"stage:{stage}")
            _, said, operations, _ = bench.run(self.out, "count:0")
            assert operations > before, said
            self.before[stage], self.rest[stage] = before, operations - before

    def folders(self):
        return self.out, self.out.with_name(f"{self.out.name}-cache")

    def stored(self, stage, folder):
        return self.bench.folder / f"stage{stage}" / folder.name

    def clear(self):
        for folder in self.folders():
            shutil.rmtree(folder, ignore_errors=True)

    def restore(self, stage):
        self.clear()
        for folder in self.folders():
            if self.stored(stage, folder).exists():
                copy_state(self.stored(stage, folder), folder)


class Torture:
    """Faults of one kind."""

    def __init__(self, places, kind, rng, expected):
        self.places, self.kind, self.rng, self.expected = places, kind, rng, expected
        self.bench, self.out = places.bench, places.out
        self.found = {"faults": 0, "chains": 0, "same end": 0}
        self.found |= {"phases": Counter(), "complaints": []}

    def run(self, wanted, until):
        """So many faults, of which each place has its share."""
        stages = sorted(self.places.before)
        for i, stage in enumerate(stages):
            share = wanted * (i + 1) // len(stages)
            while self.found["faults"] < share and time.monotonic() < until:
                self.places.restore(stage)
                self.chain(stage, share - self.found["faults"])
                name, faults, chains = self.kind, self.found["faults"], self.found["chains"]
                print(f"{name}: {faults} faults, {chains} chains", file=sys.stderr)
        return {**self.found, "phases": dict(self.found["phases"])}

    def chain(self, stage, most):
        for _ in range(most):
            number = self.rng.randint(1, min(MOST, self.places.rest[stage]))
            if self.kind not in ("damage", "cut"):  # which count what is read alone
                number += self.places.before[stage]
            code, said, _, hit = self.bench.run(self.out, f"{self.kind}:{number}")
            if hit:
                self.note(code, said, hit)
            if code == 0 or self.kind in ("damage", "cut"):
                break
        self.finish()

    def note(self, code, said, hit):
        stages = STAGE.findall(said)
        self.found["phases"][stages[-1] if stages else "start"] += 1
        self.found["faults"] += 1
        fine = code == -9 if self.kind == "kill" else code == 0 or is_clear(code, said)
        if not fine:
            self.complain("not told in lines", hit, code, said)

    def finish(self):
        """The same command without a fault; what a message says is done."""
        lost = False  # run.json had to be removed: its facts, which the card repeats, are gone
        for _ in range(4):
            code, said, *_ = self.bench.run(self.out)
            if "changed since the export" in said:  # it says: export again, which this does
                shutil.rmtree(self.out / "model")
                continue
            if "copy its tokenizer files again" in said:
                for file in (self.bench.folder / "model").glob("tokenizer*"):
                    shutil.copy(file, self.out / "model")
                continue
            if code == 0:
                break
            named = re.search(r"skipwise: (\S*/(?:run|results|key_tokens)\.json|\S*\.jsonl)", said)
            if code != 2 or not named or self.kind not in ("damage", "cut"):
                break
            Path(named[1].rstrip(":")).unlink()
            lost = lost or "run.json" in named[1]
        self.found["chains"] += 1
        wrong = differences(self.expected, outcome(self.out)) if code == 0 else ["exit code"]
        gone = ("run.json ", "model/README.md") if lost else ()
        wrong = [name for name in wrong if not name.startswith(gone)]
        if wrong:
            self.complain(f"another end: {', '.join(sorted(wrong))}", self.out.name, code, said)
        else:
            self.found["same end"] += 1

    def complain(self, what, hit, code, said):
        end = " | ".join(said.strip().splitlines()[-4:]).replace(f"{self.bench.folder}/", "")
        hit = hit.replace(f"{self.bench.folder}/", "")
        text = f"{self.kind}: {what} ({hit}, exit code {code}): {end[-600:]}"
        print(text, file=sys.stderr, flush=True)
        self.found["complaints"].append(text)


def main():
    parser = make_parser(__doc__)
    for kind, count in (("kills", 200), ("full", 100), ("readonly", 20), ("damage", 40)):
        parser.add_argument(f"--{kind}", type=int, default=count)
    parser.add_argument("--minutes", type=float, default=240, help="stop after this time (240)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    counts = {
        "kill": given.kills,
        "full": given.full,
        "readonly": given.readonly,
        "damage": given.damage,
    }
    if given.smoke:
        counts = {"kill": 2, "full": 1, "readonly": 0, "damage": 0}
    until, rng = time.monotonic() + 60 * given.minutes, random.Random(given.seed)
    bench = Bench(tempfile.mkdtemp())
    try:
        straight = bench.folder / "straight"
        code, said, operations, _ = bench.run(straight, "count:0")
        assert code == 0, said
        expected, figures = outcome(straight), {"operations": operations}
        places = Places(bench, (1, 6) if given.smoke else range(1, 7))
        for i, (kind, wanted) in enumerate(counts.items()):
            part = wanted / max(1, sum(list(counts.values())[i:]))  # of the time that is left
            share = time.monotonic() + (until - time.monotonic()) * part
            share = until if given.smoke else share
            figures[kind] = Torture(places, kind, rng, expected).run(wanted, share)
    finally:
        bench.close()
        shutil.rmtree(bench.folder, ignore_errors=True)
    write_result("torture", figures, folder=SMOKE if given.smoke else BENCHMARKS)
    fewer = [kind for kind, wanted in counts.items() if figures[kind]["faults"] < wanted]
    if fewer:
        print(f"fewer faults than asked for: {', '.join(fewer)}", file=sys.stderr)
    if fewer or any(figures[kind]["complaints"] for kind in counts):
        sys.exit(1)


if __name__ == "__main__":
    main()
