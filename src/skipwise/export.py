"""What is handed over: weights, tokenizer, and a config that every stock runtime reads right.

The config is written in both spellings, for transformers 4 reads a transformers 5 checkpoint as
unscaled without a word. A fresh process with plain transformers then loads the folder, and its
logits at the far end of the window must equal those of the model that was saved.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skipwise.errors import SkipwiseError
from skipwise.models.config_checks import Check
from skipwise.models.load import load_model
from skipwise.prepare import ModelPlan
from skipwise.rope import both_spellings
from skipwise.run import RunFolder, write_json, write_text

_TOLERANCE = 1e-4
_PROBE = 64  # tokens of the reload check: half at the start of the window, half at its end
_RELOAD = """
import sys, numpy, torch
from transformers import AutoModelForCausalLM
folder, probe, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
ids, positions = torch.from_numpy(numpy.load(probe))
with torch.no_grad():
    ones = torch.ones_like(ids)[None]
    logits = model(ids[None], position_ids=positions[None], attention_mask=ones,
                   use_cache=False).logits
numpy.save(out, logits[0].numpy())
"""


def export_model(plan: ModelPlan, run: RunFolder, checkpoint: Path | None) -> list[Check]:
    """Write `model/` from a trained checkpoint and check it in a fresh process.

    Args:
        checkpoint: with the trained weights; None: training has not reached its end.

    Raises:
        SkipwiseError: training has not reached its end, or the disk is full.
    """
    recipe = plan.recipe
    if checkpoint is None and recipe.method != "none":
        raise SkipwiseError(
            f"{run.path} has not been trained to its end\ntype skipwise train {run.path} to go on"
        )
    model = trained_model(plan, checkpoint)
    dtype = getattr(plan.config, "dtype", None) or torch.float32
    for parameter in model.parameters():  # parameters only: a cast of inv_freq ruins positions
        parameter.data = parameter.data.to(dtype).float()
    probe = _probe(plan.facts.vocab_size, recipe.target_length)
    want = _logits(model, probe)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    model.config.use_cache = True
    part = run.path / "model.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        model.save_pretrained(part)
        save_tokenizer(plan.tokenizer, plan.source, part, recipe.target_length)
        make_portable(part)
        write_text(part / "skipwise_recipe.yaml", run.recipe_file.read_text(encoding="utf-8"))
        shutil.rmtree(run.model, ignore_errors=True)
        os.replace(part, run.model)
    except OSError as error:
        raise SkipwiseError(f"{run.model} could not be written: {error.strerror}") from error
    return [_check_reload(run, probe, want)]


def trained_model(
    plan: ModelPlan, checkpoint: Path | None, dtype: torch.dtype = torch.float32
) -> Any:
    """The model with a checkpoint's weights, LoRA merged; None: untrained but rescaled."""
    recipe = plan.recipe
    if checkpoint is None:
        return load_model(plan.source, plan.scaled, plan.load, dtype=dtype).eval()
    if recipe.lora is None:
        settings = recipe.load.of_own_folder()
        return load_model(str(checkpoint), plan.scaled, settings, dtype=dtype).eval()
    from peft import PeftModel

    base = load_model(plan.source, plan.scaled, plan.load, dtype=dtype)
    return PeftModel.from_pretrained(base, str(checkpoint)).merge_and_unload().eval()


def make_portable(folder: Path) -> None:
    """Both spellings of RoPE in config.json, and a tokenizer class that transformers 4 knows."""
    file = folder / "config.json"
    config = both_spellings(json.loads(file.read_text(encoding="utf-8")))
    config.pop("model_max_length", None)
    write_json(file, config)
    file = folder / "tokenizer_config.json"
    if file.exists():
        settings = json.loads(file.read_text(encoding="utf-8"))
        if settings.get("tokenizer_class") == "TokenizersBackend":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
            write_json(file, settings)


def save_tokenizer(tokenizer: Any, source: str, folder: Path, target_length: int) -> None:
    """The tokenizer with its new length, and its SentencePiece file where the source has one."""
    old = tokenizer.model_max_length
    tokenizer.model_max_length = target_length
    tokenizer.save_pretrained(folder)
    tokenizer.model_max_length = old
    for name in ("tokenizer.model",):
        file = Path(source).expanduser() / name
        if file.is_file() and not (folder / name).exists():
            shutil.copyfile(file, folder / name)


def write_card(run: RunFolder, table: str) -> None:
    """The model card: what it is, the measured table, how it was made, how to load it."""
    recipe, facts = run.recipe(), run.facts()
    L, T = facts.get("original_length"), recipe.target_length
    scaling = facts.get("scaling", recipe.rope.type)
    data, name = facts.get("data", {}), facts.get("model", {}).get("name", recipe.model)
    training = facts.get("training", {})
    base = recipe.model if not Path(recipe.model).expanduser().exists() else None
    header = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    header += [f"base_model: {base}"] if base else []
    header += ["tags:", "- long-context", "- pose", "---"]
    how = (
        f"Trained for {training['num_steps']:,} steps of {training['tokens_per_step']:,} tokens\n"
        f"(method `{recipe.method}`, {training['mode']}) on "
        f"{data.get('num_documents', 0):,} documents."
        if training
        else "Rescaled without training."
    )
    card = f"""{chr(10).join(header)}

# {recipe.run_name}

`{name}` with its context window extended from {L:,} to {T:,} tokens by Skipwise, with
[PoSE](https://arxiv.org/abs/2309.10400) (positional skip-wise training) and `{scaling}`
RoPE scaling. {how}

## Measured before and after

{table}

95 % intervals in brackets. Perplexity is on the same target tokens at every context length;
passkey is exact match, over all depths.

## Load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

No code of Skipwise is needed. The recipe is in `skipwise_recipe.yaml`. Retrieval of a passkey and
perplexity do not show every skill that a long context needs: test it on your task.
"""
    write_text(run.model / "README.md", card)


def _probe(vocab_size: int, target_length: int) -> np.ndarray:
    """(2, K) token ids and positions: the two ends of the window, so distances up to T show."""
    half = min(_PROBE, target_length) // 2
    ids = np.random.default_rng(0).integers(3, vocab_size, 2 * half)
    positions = np.concatenate([np.arange(half), np.arange(target_length - half, target_length)])
    return np.stack([ids, positions])


@torch.no_grad()
def _logits(model: Any, probe: np.ndarray) -> np.ndarray:
    ids, positions = torch.from_numpy(probe).to(model.device)
    ones = torch.ones_like(ids)[None]
    out = model(ids[None], position_ids=positions[None], attention_mask=ones, use_cache=False)
    return out.logits[0].float().cpu().numpy()


def fresh_logits(folder: Path, probe: np.ndarray) -> np.ndarray:
    """Logits of the probe (K, V) by plain transformers in a process of its own.

    Raises:
        SkipwiseError: transformers cannot load the folder, or run it; says its last line.
    """
    with tempfile.TemporaryDirectory() as scratch:
        files = Path(scratch) / "probe.npy", Path(scratch) / "logits.npy"
        np.save(files[0], probe)
        done = subprocess.run(
            [sys.executable, "-c", _RELOAD, str(folder), *map(str, files)],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no word"])[-1]
            raise SkipwiseError(f"plain transformers fails: {last}")
        return np.load(files[1])


def _check_reload(run: RunFolder, probe: np.ndarray, want: np.ndarray) -> Check:
    name = "reload"
    try:
        have = fresh_logits(run.model, probe)
    except SkipwiseError as failed:
        return Check(name=name, passed=False, detail=str(failed))
    error = float(np.abs(have - want).max())
    positions = f"positions up to {int(probe[1].max()):,}"
    return Check(
        name=name,
        passed=error <= _TOLERANCE,
        detail=f"plain transformers in a fresh process gives the same logits at {positions} "
        f"(largest difference {error:.0e})"
        if error <= _TOLERANCE
        else f"plain transformers gives other logits at {positions}: off by {error:.1e}",
    )
