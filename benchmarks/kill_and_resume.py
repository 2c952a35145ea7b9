"""Kill a training run with SIGKILL at random moments, and compare what it ends with.

    python benchmarks/kill_and_resume.py [--kills 10] [--engine ddp]

A tiny model is trained once undisturbed. Then the same run is started again and again, and each
time killed (the complete process group, without warning) after a random time from its first step on
or while it loads, in one process and in two over gloo, until it has been killed `--kills` times;
then it is left to finish. Saved every two steps, so kills hit saves as well.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from common import BENCHMARKS, SMOKE, make_parser, write_result
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from skipwise.config.run_folder import RunFolder
from skipwise.pipeline.quickstart import MODEL
from skipwise.training.callbacks import read_metrics

STEPS = 400


def make_recipe(folder, num_steps):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder / "model")
    lines = [
        json.dumps({"text": "".join(f"def f{i}_{j}(x): return x + {i * j}\n" for j in range(200))})
        for i in range(20)
    ]
    (folder / "text.jsonl").write_text("\n".join(lines))
    tree = {
        "model": str(folder / "model"),
        "target_length": 256,
        "data": {"sources": [str(folder / "text.jsonl")]},
        "training": {
            "num_steps": num_steps,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": 1e-3,
            "save_steps": 2,
        },
        "trainer": {"report_to": "none"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder / "recipe.yaml"


def start(recipe, out, options):
    command = [sys.executable, "-m", "skipwise", "train", str(recipe), "--out", str(out), *options]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def finish(recipe, out, options):
    code = start(recipe, out, options).wait()
    assert code == 0, f"exit code {code}"
    num_steps = len(read_metrics(RunFolder(out)))
    (file,) = (out / "checkpoints" / f"checkpoint-{num_steps}").glob("*.safetensors")
    return load_file(file), [m["loss"] for m in read_metrics(RunFolder(out))]


def kill_often(recipe, out, options, kills, rng):
    places, broken = [], 0
    while len(places) < kills:
        process = start(recipe, out, options)
        before = len(read_metrics(RunFolder(out)))
        while process.poll() is None and len(read_metrics(RunFolder(out))) <= before:
            time.sleep(0.005)
        time.sleep(rng.random() * 1.0)
        if process.poll() is not None:
            assert process.returncode == 0, process.returncode
            return places, broken  # it got to its end before all kills
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.3)  # its processes end with it
        places.append(len(read_metrics(RunFolder(out))))
        folders = list((out / "checkpoints").glob("checkpoint-*"))
        broken += sum(not (folder / "complete").exists() for folder in folders)
    return places, broken


def compare(name, recipe, folder, options, kills, rng):
    expected, expected_losses = finish(recipe, folder / f"{name}-undisturbed", options)
    out = folder / f"{name}-killed"
    places, broken = kill_often(recipe, out, options, kills, rng)
    have, losses = finish(recipe, out, options)
    pairs = zip(losses, expected_losses, strict=True)
    return {
        "kills": len(places),
        "killed_at_steps": places,
        "half_written_checkpoints_left": broken,
        "bit_identical_weights": all(torch.equal(have[k], expected[k]) for k in expected),
        "largest_weight_difference": max(
            float((have[k] - expected[k]).abs().max()) for k in expected
        ),
        "largest_loss_difference": max(abs(a - b) for a, b in pairs),
    }


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--engine", default="ddp")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, num_steps = random.Random(given.seed), STEPS
    if given.smoke:
        given.kills, num_steps = 1, 30
    folder = Path(tempfile.mkdtemp())
    os.environ["SKIPWISE_CACHE"] = str(folder / "cache")
    try:
        recipe = make_recipe(folder, num_steps)
        two = ["--gpus", "2", "--engine", given.engine]
        figures = {
            "steps": num_steps,
            "engine_of_two": given.engine,
            "one_process": compare("one", recipe, folder, [], given.kills, rng),
        }
        if not given.smoke:
            figures["two_processes"] = compare("two", recipe, folder, two, given.kills, rng)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    write_result("kill_and_resume", figures, folder=SMOKE if given.smoke else BENCHMARKS)


if __name__ == "__main__":
    main()
