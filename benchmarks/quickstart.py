"""`skipwise quickstart`: minutes, peak memory, and what it measures.

python benchmarks/quickstart.py [key=value ...]

The command runs in a new process and a new folder. Peak memory is that of its largest process. The
table of the README is a result of this script.

Bars: 4 minutes on two cores, 1.5 GB.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import BENCHMARKS, SMOKE, make_parser, write_result

SMALL = ["target_length=1024", "training.num_steps=1", "training.warmup_steps=1"]
SMALL += ["eval.perplexity_windows=1", "eval.passkey_samples=1", "eval.num_depths=1"]
SMALL += ["attention_temperature=1.0"]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        keys = [*(SMALL if args.smoke else []), *args.overrides]
        started = time.perf_counter()
        command = [sys.executable, "-m", "skipwise", "quickstart", "--out", str(out), *keys]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - started
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        rows = json.loads((out / "results.json").read_text())
    kept = ("model", "task", "metric", "context_length", "depth", "value", "low", "high")
    figures = {
        "keys": keys,
        "seconds": round(seconds, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9, 2),
        "rows": [{key: row.get(key) for key in (*kept, "num_samples")} for row in rows],
        "table": done.stdout.partition("\n\n")[0].splitlines(),
    }
    write_result("quickstart", figures, folder=SMOKE if args.smoke else BENCHMARKS, show=False)
    print(done.stdout)


if __name__ == "__main__":
    main()
