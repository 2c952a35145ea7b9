"""Kill, fill the disk, forbid to write and damage files, at the n-th file operation of `extend`.

    python benchmarks/torture.py [--kills 200] [--full 100] [--readonly 20] [--damage 40]

A tiny model goes through all phases of `skipwise extend` once undisturbed. Then chains of the same
command run into the same folder, each of them into a fault at a random file operation
(tests/helpers/faults.py), until one ends. Every chain must end as the undisturbed run did, bit by
bit, and every command that could not go on must say so in one to three lines.
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
from fault_runs import Bench, differences, is_clear, outcome

MOST = 140  # operations between two faults of a chain: a resumed command repeats about 60
STAGE = re.compile(r"^\[\d/6\] (.*)$", re.MULTILINE)


class Chain:
    """One kind of fault, again and again, until a command ends."""

    def __init__(self, bench, kind, rng, expected, found):
        self.bench, self.kind, self.rng, self.expected, self.found = (
            bench,
            kind,
            rng,
            expected,
            found,
        )

    def run(self, out, most_faults):
        faults = 0
        while faults < most_faults:
            code, said, _, hit = self.bench.run(out, f"{self.kind}:{self.rng.randint(1, MOST)}")
            if hit:
                faults += 1
                self.note(code, said, hit)
            if code == 0 and self.kind != "damage":
                break
            if self.kind in ("damage", "cut"):
                break
        self.finish(out)
        return faults

    def note(self, code, said, hit):
        stages = STAGE.findall(said)
        self.found["phases"][stages[-1] if stages else "start"] += 1
        self.found["faults"] += 1
        fine = code == -9 if self.kind == "kill" else code == 0 or is_clear(code, said)
        if not fine:
            self.complain("not told in lines", hit, code, said)

    def finish(self, out):
        """The same command without a fault; what a message says is to be removed is removed."""
        for _ in range(4):
            code, said, *_ = self.bench.run(out)
            if code == 0:
                break
            named = re.search(r"skipwise: (\S*/(?:run|results)\.json|\S*\.jsonl)", said)
            if code != 2 or not named or self.kind not in ("damage", "cut"):
                break
            Path(named[1].rstrip(":")).unlink()
        self.found["chains"] += 1
        wrong = differences(self.expected, outcome(out)) if code == 0 else ["exit code"]
        if wrong:
            self.complain(f"another end: {', '.join(sorted(wrong))}", out.name, code, said)
        else:
            self.found["same end"] += 1

    def complain(self, what, hit, code, said):
        end = " | ".join(said.strip().splitlines()[-4:])[-600:]
        text = f"{self.kind}: {what} ({hit}, exit code {code}): {end}".replace(
            f"{self.bench.folder}/", ""
        )
        print(text, file=sys.stderr, flush=True)
        self.found["complaints"].append(text)


def torture(bench, kind, wanted, rng, expected, until):
    found = {"faults": 0, "chains": 0, "same end": 0, "phases": Counter(), "complaints": []}
    chain = Chain(bench, kind, rng, expected, found)
    while found["faults"] < wanted and time.monotonic() < until:
        out = bench.folder / f"{kind}-{found['chains']}"
        chain.run(out, wanted - found["faults"])
        for folder in (out, out.with_name(f"{out.name}-cache")):
            shutil.rmtree(folder, ignore_errors=True)
        print(f"{kind}: {found['faults']} faults, {found['chains']} chains", file=sys.stderr)
    return {**found, "phases": dict(found["phases"])}


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
        for i, (kind, wanted) in enumerate(counts.items()):
            share = time.monotonic() + (until - time.monotonic()) / (len(counts) - i)
            share = until if given.smoke else share
            figures[kind] = torture(bench, kind, wanted, rng, expected, share)
    finally:
        bench.close()
        shutil.rmtree(bench.folder, ignore_errors=True)
    write_result("torture", figures, folder=SMOKE if given.smoke else BENCHMARKS)
    if any(figures[kind]["complaints"] for kind in counts):
        sys.exit(1)


if __name__ == "__main__":
    main()
