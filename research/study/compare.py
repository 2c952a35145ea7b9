"""Keys of the recipe compared on the quickstart, as the package trains it, over seeds.

    python research/study/compare.py distillation.every=1 distillation.every=4 --seeds 0 1 2

Each setting is keys of the recipe, joined by commas; --common holds for all. A run is `skipwise
quickstart`: the bundled 3.4 M model from 256 to 2,048 tokens. The result has, by setting and seed,
perplexity by context on the same targets, passkeys and seconds; the table has means over the seeds,
and the change of the perplexity against the first setting. Runs in --out are not repeated.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from common import RESEARCH, SMOKE, make_parser, write_result  # noqa: E402

COMMON = ("eval.untrained=false", "eval.perplexity_windows=32", "training.save_steps=100000")
SMALL = ("training.num_steps=1", "training.warmup_steps=1", "eval.perplexity_windows=1")
SMALL += ("eval.passkey_samples=1", "eval.context_lengths=[256,1024]", "eval.num_depths=1")
SMALL += ("target_length=1024", "attention_temperature=1.0")


def run(folder: Path, keys: list[str]) -> dict:
    """The figures of a run, which is made unless it is finished."""
    if not (folder / "results.json").exists():
        command = [sys.executable, "-m", "skipwise", "quickstart", "--out", str(folder), *keys]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f"{folder.name}.log").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, env={**os.environ})
    rows = [r for r in json.loads((folder / "results.json").read_text()) if r["model"] == "after"]
    lengths = sorted({row["context_length"] for row in rows})

    def mean(task: str, length: int) -> float:
        found = [r for r in rows if (r["task"], r["context_length"]) == (task, length)]
        found = [r for r in found if r["metric"] in ("perplexity", "exact_match")]
        counts = [r["num_samples"] for r in found]
        return float(np.average([r["value"] for r in found], weights=counts))

    times = json.loads((folder / "run.json").read_text())
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "perplexity": {n: mean("perplexity", n) for n in lengths},
        "passkey": {n: mean("passkey", n) for n in lengths},
        "training seconds": lines[-1]["seconds"],
        "scaling": times.get("scaling"),
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("settings", nargs="*", default=["distillation.every=4"])
    parser.add_argument("--common", default="", help="keys of all settings, joined by commas")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    args = parser.parse_args()
    common = [*COMMON, *(SMALL if args.smoke else ()), *filter(None, args.common.split(","))]
    figures: dict = {"common": common, "seeds": args.seeds, "settings": {}}
    for seed in args.seeds:  # all settings of a seed before the next
        for setting in args.settings:
            name = setting.replace("=", "_").replace(",", "-").replace("/", "_")
            keys = [*common, *setting.split(","), f"seed={seed}"]
            found = run(args.out.resolve() / f"{name}-seed{seed}", keys)
            figures["settings"].setdefault(setting, {})[seed] = found
    name = "compare_" + args.settings[0].partition("=")[0].replace(".", "_")
    write_result(name, figures, folder=SMOKE if args.smoke else RESEARCH, show=False)
    first = None
    for setting, by_seed in figures["settings"].items():
        runs = list(by_seed.values())
        lengths = list(runs[0]["perplexity"])
        table = np.array([[r["perplexity"][n] for n in lengths] for r in runs])
        first = table if first is None else first
        change = 100 * (np.log(table) - np.log(first))
        keys = [100 * np.mean([r["passkey"][n] for r in runs]) for n in lengths]
        seconds = np.mean([r["training seconds"] for r in runs])
        both = zip(table.mean(0), change.mean(0), strict=True)
        cells = " | ".join(f"{p:.2f} ({c:+.1f} %)" for p, c in both)
        found = " / ".join(f"{k:.0f}" for k in keys)
        print(f"| {setting} | {cells} | {found} % | {seconds:.0f} s |")


if __name__ == "__main__":
    main()
