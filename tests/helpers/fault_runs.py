"""Runs of `extend` on a tiny model under faults (faults.py), compared with an undisturbed one.

The commands run in forks of a server that has its imports done. What a run is compared by: the
weights and configs of model/, the evaluation text, the table, the metrics without seconds, the
results without keys, run.json without times.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

HELPERS = Path(__file__).parent
SERVER = f"""
import json, os, sys, traceback
sys.path.insert(0, {str(HELPERS)!r})
import skipwise.cli, skipwise.pipeline.extend, skipwise.report.page.page, skipwise.report.figures
import torch, faults
from skipwise.export import hf
import forked_script, gc
from skipwise.report.figures import style
from skipwise.report.page import html
style.to_svg, style.to_png = (lambda *rest: "<svg></svg>"), (lambda *rest: b"PNG")  # seconds each
hf.subprocess = type("Forked", (), {{"run": staticmethod(forked_script._forked_run)}})
torch.set_num_threads(1)
gc.collect(), gc.freeze()
for line in sys.stdin:
    task = json.loads(line)
    if not (pid := os.fork()):
        os.setsid()
        os.environ.update(task["env"])
        out = os.open(task["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        code = 1
        try:
            injector = faults.install()
            if injector:
                injector.wrap_savers()
            code = skipwise.cli.main(task["argv"])
            if injector:
                injector.note()
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
RESULT_KEYS = ("key", "seconds")
TIME = re.compile(rb"\d ?(ms|s|seconds|min|minutes|h|hours)\b")  # in a line of the card
TIMES = ("stages", "estimate", "created", "machine", "command", "reproduce")


class Bench:
    """A tiny model, text and recipe, and a server that runs commands with faults."""

    def __init__(self, folder, steps=6):
        self.folder, self.steps = Path(folder), steps
        self.folder.mkdir(parents=True, exist_ok=True)
        self.cache = self.folder / "cache"
        self.number, self.server = 0, None
        self.recipe = self._make_inputs()

    def _make_inputs(self):
        import torch
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        from skipwise.pipeline.quickstart import MODEL

        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "max_position_embeddings": 64}
        config = LlamaConfig(vocab_size=1024, bos_token_id=1, eos_token_id=2, **shape, **heads)
        model = self.folder / "model"
        LlamaForCausalLM(config).save_pretrained(model)
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(model)
        lines = [
            json.dumps(
                {"text": "".join(f"def f{i}_{j}(x): return x + {i * j}\n" for j in range(n))}
            )
            for i, n in enumerate(range(40, 160, 10))
        ]
        (self.folder / "text.jsonl").write_text("\n".join(lines) + "\n")
        tree = {
            "model": str(model),
            "target_length": 256,
            "name": "tiny",
            "data": {"sources": [str(self.folder / "text.jsonl")]},
            "training": {
                "num_steps": self.steps,
                "global_batch_size": 4,
                "micro_batch_size": 4,
                "learning_rate": 1e-3,
                "save_steps": 2,
            },
            "trainer": {"report_to": "none"},
            "eval": {
                "tasks": ["perplexity", "passkey"],
                "perplexity_windows": 2,
                "passkey_samples": 2,
                "context_lengths": [64, 256],
            },
        }
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(tree))
        return recipe

    def run(self, out, fault="", *verb, cache=None):
        """Exit code, output, number of operations and what was hit, of `extend` or of a verb."""
        if self.server is None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            self.server = subprocess.Popen(
                [sys.executable, "-c", SERVER],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        self.number += 1
        output, log = self.folder / "output.txt", self.folder / "faults.txt"
        log.unlink(missing_ok=True)
        cache = cache or out.with_name(f"{out.name}-cache")
        env = {"SKIPWISE_CACHE": str(cache), "SKIPWISE_FAULT": "", "SKIPWISE_FAULT_LOG": str(log)}
        if fault:
            env["SKIPWISE_FAULT"] = f"{fault}:{out}:{cache}"
        argv = list(verb) or ["extend", str(self.recipe), "--out", str(out)]
        task = {"argv": argv, "env": env, "output": str(output)}
        self.server.stdin.write(json.dumps(task) + "\n")
        self.server.stdin.flush()
        code = int(self.server.stdout.readline())
        count, hit = (*log.read_text().splitlines(), "", "")[:2] if log.exists() else ("0", "")
        return code, output.read_text(errors="replace"), int(count or 0), hit

    def close(self):
        if self.server is not None:
            self.server.kill()


def outcome(out):
    """What must be equal, name by name."""
    found = {}
    for path in sorted((out / "model").rglob("*")):
        young = path.suffix == ".part" and path.name.split(".")[-2].isdigit()  # of a killed process
        if path.is_file() and not young:
            text = path.read_bytes()
            name = path.relative_to(out).as_posix()
            if path.name == "README.md":
                text = text.replace(str(out).encode(), b"")
                text = b"\n".join(x for x in text.splitlines() if not TIME.search(x))
            found[name] = hashlib.sha256(text).hexdigest()
    for name in ("eval_documents.jsonl", "report/table.md"):
        found[name] = hashlib.sha256((out / name).read_bytes()).hexdigest()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{k: v for k, v in m.items() if k != "seconds"} for m in lines]
    rows = json.loads((out / "results.json").read_text())
    found["results"] = [{k: v for k, v in row.items() if k not in RESULT_KEYS} for row in rows]
    facts = json.loads((out / "run.json").read_text())
    found.update({f"run.json {k}": v for k, v in _timeless(facts).items() if k not in TIMES})
    found["run.json keys"] = sorted(facts)
    left = [p.relative_to(out).as_posix() for p in out.rglob("*.part")]
    young = [name for name in left if not name.split(".")[-2].isdigit()]
    found["parts left"] = young
    return found


def _timeless(value):
    """JSON without what two runs never have in common."""
    if isinstance(value, dict):
        varies = ("seconds", "peak_memory_gib", "tried", "place", "numbers")
        return {k: _timeless(v) for k, v in value.items() if k not in varies}
    if isinstance(value, list):
        kept = [_timeless(v) for v in value]
        if kept and all(isinstance(v, dict) and "passed" in v for v in kept):
            times = ("micro batch", "batch", "full-length step")
            return sorted((v for v in kept if v["name"] not in times), key=lambda v: v["name"])
        return kept
    return value


def differences(expected, found):
    return [key for key in {*expected, *found} if expected.get(key) != found.get(key)]


def is_clear(code, output):
    """Whether a failed command ended as an error does: exit code 2, one to three lines."""
    said = output[output.rfind("skipwise: ") :].strip().splitlines()
    return code == 2 and "Traceback" not in output and "skipwise: " in output and len(said) <= 3


def copy_state(source, target):
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)
