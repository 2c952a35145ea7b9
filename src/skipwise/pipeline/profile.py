"""`skipwise plan --measure`: the memory and time of a few real training steps.

The steps run as in `skipwise train`, on the recipe's text or on random tokens, in a temporary run
folder. A folder that holds only a config.json gets random weights. The steps run in a new process,
so that its peak memory is theirs. The calling process loads neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from skipwise.config.batch import micro_batch
from skipwise.config.distillation import in_one_process
from skipwise.config.machine import process_memory
from skipwise.config.parse import dump_recipe, load_run_recipe
from skipwise.config.recipe import FullLengthSettings, Recipe
from skipwise.config.run_folder import RunFolder, write_json, write_text
from skipwise.errors import SkipwiseError
from skipwise.models.hf_config import is_config_alone, without_kernels
from skipwise.planning.plan import Measured

_STEPS = 3  # the first one is the slowest: it creates the optimizer states


def measure(recipe: Recipe) -> Measured:
    """Run the steps.

    Raises:
        SkipwiseError: the steps failed. It quotes their last lines of output.
    """
    with tempfile.TemporaryDirectory(prefix="skipwise-measure-") as name:
        folder = Path(name)
        if is_config_alone(recipe.model):
            _run("make", Path(recipe.model).expanduser(), folder / "model")
            recipe = dataclasses.replace(recipe, model=str(folder / "model"))
        write_text(folder / "recipe.yaml", dump_recipe(_shortened(recipe)))
        _run("steps", folder)
        found = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
    share = _shortened(recipe).training.global_batch_size / recipe.training.global_batch_size
    found["seconds_per_step"] /= share
    return Measured(**found)


def _shortened(recipe: Recipe) -> Recipe:
    """The same step in one process, with at most two micro-batches: more need no more memory."""
    recipe = in_one_process(recipe)
    training = recipe.training
    size = micro_batch(training)
    passes = min(2, max(1, training.global_batch_size // max(1, size)))
    steps = {"num_steps": _STEPS, "save_steps": _STEPS}
    batch = {"global_batch_size": passes * size, "micro_batch_size": size}
    training = dataclasses.replace(training, **steps, **batch)
    return dataclasses.replace(recipe, full_length=FullLengthSettings(), training=training)


def _run(task: str, *arguments: Path) -> None:
    command = [sys.executable, "-m", "skipwise.pipeline.profile", task, *map(str, arguments)]
    # the new process must not take itself for a member of a launched group
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        return
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    errors = [line.removeprefix("skipwise: ") for line in lines if line.startswith("skipwise: ")]
    if done.returncode in (-9, 137):
        raise SkipwiseError("the steps were killed: this machine ran out of memory")
    after = lines[lines.index(f"skipwise: {errors[-1]}") + 1 :][:2] if errors else []
    reason = (errors or lines or ["no output"])[-1]
    raise SkipwiseError("\n".join([f"measuring failed: {reason}", *after]))


def _steps(folder: Path) -> None:
    """In the new process: train, and write down memory and time."""
    import torch

    import skipwise.pipeline.extend
    from skipwise.models.prepared import convert_weights, prepare_model
    from skipwise.training.callbacks import read_metrics
    from skipwise.training.distributed.engines import on_cpu
    from skipwise.training.inputs import dummy_data, load_training_data
    from skipwise.training.setup import set_up, train

    assert skipwise.pipeline.extend  # a run loads these modules as well
    runtime = process_memory("VmRSS")
    recipe = load_run_recipe(folder / "recipe.yaml")
    run = RunFolder(folder / "run")
    run.path.mkdir()
    run.write_recipe(recipe)
    prepared = convert_weights(prepare_model(recipe), run.converted)
    if recipe.data.sources:
        data = load_training_data(prepared, run, progress=False)
    else:
        data = dummy_data(prepared)
        data.dataset.num_examples = _STEPS * recipe.training.global_batch_size
    training = set_up(prepared, data, run)
    train(training, run, recipe)
    seconds = [line["seconds"] for line in read_metrics(run)]
    step = (seconds[-1] - seconds[0]) / (len(seconds) - 1)
    tokens = recipe.training.global_batch_size * data.sampler.train_length
    cuda = torch.cuda.is_available()
    write_json(
        folder / "measured.json",
        {
            "on_cpu": on_cpu(),
            "device": torch.cuda.get_device_name() if cuda else "CPU",
            "runtime_bytes": 0 if cuda else runtime,
            "peak_bytes": torch.cuda.max_memory_allocated() if cuda else process_memory("VmHWM"),
            "seconds_per_step": step,
            "tokens_per_second": tokens / step,
        },
    )


def _make(source: Path, folder: Path) -> None:
    """Random weights for a config, and a tokenizer if the folder has none."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from skipwise.pipeline.quickstart import MODEL

    torch.manual_seed(0)
    shutil.copytree(source, folder)
    config: Any = without_kernels(AutoConfig.from_pretrained(folder))
    made: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(folder)
    shutil.copyfile(source / "config.json", folder / "config.json")
    if not any(folder.glob("tokenizer*")):
        if config.vocab_size < 1024:
            raise SkipwiseError(f"{source} has no tokenizer, and too few tokens for a stand-in")
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        {"make": _make, "steps": _steps}[sys.argv[1]](*map(Path, sys.argv[2:]))
    except SkipwiseError as problem:
        print(f"skipwise: {problem}", file=sys.stderr)
        sys.exit(2)
