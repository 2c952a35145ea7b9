"""Export for transformers: weights, tokenizer, and a config that every runtime reads correctly.

The config has the RoPE keys of transformers 4 and of transformers 5, because transformers 4 loads a
transformers 5 checkpoint as unscaled, without a warning. After writing, a new process loads the
folder with transformers alone. Its logits at both ends of the window must equal the model's.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCardData

from skipwise.config.machine import check_disk_space
from skipwise.config.parse import dump_recipe
from skipwise.config.recipe import Recipe
from skipwise.config.run_folder import RunFolder, write_json, write_text
from skipwise.errors import Check, SkipwiseError, system_errors
from skipwise.export.model_card import base_metadata, relation
from skipwise.models.attention.temperature import fold_temperature
from skipwise.models.compatibility import make_portable, save_tokenizer
from skipwise.models.load import best_device, compute_dtype, load_model
from skipwise.models.prepared import PreparedModel

_TOLERANCE = 1e-4
_SHARD = "5GB"
_PROBE = 64  # tokens of the reload check: half at the start of the window, half at the end
_RELOAD = """
import sys
sys.path = [folder for folder in sys.path if folder]  # not the current one
import numpy, torch
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
_RELOAD_ADAPTER = _RELOAD.replace(
    "model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()",
    """from peft import PeftConfig, PeftModel
from transformers import AutoConfig
base = PeftConfig.from_pretrained(folder).base_model_name_or_path
model = AutoModelForCausalLM.from_pretrained(
    base, config=AutoConfig.from_pretrained(folder), dtype=torch.float32)
model = PeftModel.from_pretrained(model, folder).eval()""",
)
_ADAPTER = """# An adapter that needs its own config

The adapter was trained on `{base}` with rescaled RoPE. An adapter does not store RoPE, so load the
base model with the `config.json` of this folder. With its own config the outputs are wrong.

```python
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained("FOLDER")
base = AutoModelForCausalLM.from_pretrained("{base}", config=config, dtype="auto")
model = PeftModel.from_pretrained(base, "FOLDER")
```
"""
_TEMPERATURE = """
The merged model of this run has an attention temperature ({value}) in its query weights. An adapter
cannot store it, so this adapter gives other outputs than the merged model at every length.
"""


def export_model(
    prepared: PreparedModel, run: RunFolder, checkpoint: Path | None, temperature: float = 1.0
) -> list[Check]:
    """Write `model/` from a trained checkpoint and check it in a new process.

    Args:
        checkpoint: the trained weights. None if training is not complete.
        temperature: attention temperature to fold into the weights.

    Raises:
        SkipwiseError: training is not complete, the temperature cannot be folded into the weights,
            or the disk is full.
    """
    recipe = prepared.recipe
    if recipe.method != "none":
        require_trained(run, checkpoint)
    model = trained_model(prepared, checkpoint)
    if temperature != 1:
        fold_temperature(model, temperature)
    dtype = getattr(prepared.config, "dtype", None) or torch.float32
    for parameter in model.parameters():  # not buffers: inv_freq needs float32
        parameter.data = parameter.data.to(dtype).float()
    probe = _probe(prepared.info.vocab_size, recipe.target_length)
    want = _logits(model, probe)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    model.config.use_cache = True
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    check_disk_space(run.path, num_bytes, "the model")
    with _replacing(run.model) as part:
        model.save_pretrained(part, max_shard_size=_SHARD)
        save_tokenizer(prepared.tokenizer, prepared.source, part)
        make_portable(part, recipe.target_length)
        write_text(
            part / "skipwise_recipe.yaml", dump_recipe(without_local_names(recipe, run.metadata()))
        )
    return [_check_reload(run.model, probe, want)]


def export_adapter(prepared: PreparedModel, run: RunFolder, checkpoint: Path | None) -> list[Check]:
    """Write `adapter/`, the LoRA weights with the scaled config of the base model, and check it.

    An adapter does not store the rescaled RoPE: on the base model's own config it silently gives
    wrong outputs. So the folder also holds the scaled config and a README that says how to load it.

    Raises:
        SkipwiseError: the run trained no adapter, or training is not complete.
    """
    if prepared.recipe.lora is None:
        raise SkipwiseError(f"{run.path} trained all weights: it has no adapter\npass --to hf")
    checkpoint = require_trained(run, checkpoint)
    size = (checkpoint / "adapter_model.safetensors").stat().st_size
    check_disk_space(run.path, size, "the adapter")
    with _replacing(run.adapter) as part:
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            shutil.copyfile(checkpoint / name, part / name)
        base = prepared.source
        settings = json.loads((part / "adapter_config.json").read_text(encoding="utf-8"))
        write_json(part / "adapter_config.json", {**settings, "base_model_name_or_path": base})
        prepared.scaled.save_pretrained(part)
        save_tokenizer(prepared.tokenizer, prepared.source, part)
        make_portable(part, prepared.recipe.target_length)
        card = {**relation(base, "adapter", run.metadata()), **base_metadata(prepared.recipe.model)}
        head = ModelCardData(library_name="peft", tags=["long-context", "skipwise"], **card)
        text = f"---\n{head.to_yaml()}\n---\n\n{_ADAPTER.format(base=base)}"
        write_text(part / "README.md", text + _temperature_note(run))
    probe = _probe(prepared.info.vocab_size, prepared.recipe.target_length)
    want = _logits(trained_model(prepared, checkpoint), probe)
    return [_check_reload(run.adapter, probe, want, "reload of the adapter", _RELOAD_ADAPTER)]


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which replaces `folder` when it is complete."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    with system_errors(folder):
        part.mkdir(parents=True)
        yield part
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)


def require_trained(run: RunFolder, checkpoint: Path | None) -> Path:
    """The checkpoint.

    Raises:
        SkipwiseError: it is None, because training is not complete.
    """
    if checkpoint is None:
        raise SkipwiseError(
            f"training of {run.path} is not complete\nrun skipwise train {run.path} to resume it"
        )
    return checkpoint


def trained_model(
    prepared: PreparedModel,
    checkpoint: Path | None,
    dtype: torch.dtype = torch.float32,
    device_map: str | None = None,
) -> Any:
    """The rescaled model with the checkpoint's weights, LoRA merged; without one, untrained."""
    recipe = prepared.recipe
    source, settings = prepared.source, prepared.load
    if checkpoint is not None and recipe.lora is None:
        source, settings = str(checkpoint), recipe.load.of_own_folder()
    model = load_model(source, prepared.scaled, settings, dtype=dtype, device_map=device_map)
    if checkpoint is not None and recipe.lora is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(checkpoint)).merge_and_unload()
    return model.eval()


def load_for_scoring(prepared: PreparedModel, checkpoint: Path | None) -> Any:
    """`trained_model` on the best device, or placed by `load.device_map`."""
    settings = prepared.recipe.load
    dtype = compute_dtype(settings)
    model = trained_model(prepared, checkpoint, dtype, settings.device_map)
    return model if settings.device_map is not None else model.to(best_device())


def without_local_names(recipe: Recipe, metadata: dict[str, Any]) -> Recipe:
    """The recipe for publication: names of the Hub are kept, those of this machine are not.

    Args:
        metadata: run.json, which says since the run began which names are of the Hub.
    """
    public = set(metadata.get("data", {}).get("hub_sources", []))
    public |= {recipe.model} if metadata.get("model", {}).get("hub") else set()

    def name(value: Any) -> Any:
        if isinstance(value, dict):
            return {**value, "path": name(value.get("path"))}
        return value if value in public else "local"

    data = dataclasses.replace(
        recipe.data,
        sources=tuple(map(name, recipe.data.sources)),
        eval_sources=tuple(map(name, recipe.data.eval_sources)),
    )

    def without_paths(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_paths(item) for key, item in value.items()}
        if isinstance(value, list):
            return [without_paths(item) for item in value]
        return "local" if isinstance(value, str) and re.search(r"[/\\]", value) else value

    return dataclasses.replace(
        recipe,
        model=name(recipe.model),
        data=data,
        trainer=without_paths(recipe.trainer),
        eval=dataclasses.replace(
            recipe.eval,
            task_folder=recipe.eval.task_folder and "local",
            evaluator=recipe.eval.evaluator and "local",
        ),
        load=dataclasses.replace(recipe.load, trust_remote_code=False),  # each user consents
    )


def _temperature_note(run: RunFolder) -> str:
    """For the adapter's README: the merged model's attention temperature, which it lacks."""
    value = run.metadata().get("temperature", {}).get("value", run.recipe().attention_temperature)
    value = "chosen at export" if value == "auto" else value
    return "" if value == 1 else _TEMPERATURE.format(value=value)


def _probe(vocab_size: int, target_length: int) -> np.ndarray:
    """(2, K) token ids and positions at both ends of the window: distances reach T."""
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


def fresh_logits(folder: Path, probe: np.ndarray, program: str = _RELOAD) -> np.ndarray:
    """Logits of the probe (K, V), by transformers alone in a new process.

    Raises:
        SkipwiseError: transformers cannot load or run the folder. Quotes the last line of stderr.
    """
    with tempfile.TemporaryDirectory() as scratch:
        files = Path(scratch) / "probe.npy", Path(scratch) / "logits.npy"
        np.save(files[0], probe)
        done = subprocess.run(
            [sys.executable, "-c", program, str(folder), *map(str, files)],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise SkipwiseError(f"transformers alone fails: {last}")
        return np.load(files[1])


def _check_reload(
    folder: Path, probe: np.ndarray, want: np.ndarray, name: str = "reload", program: str = _RELOAD
) -> Check:
    try:
        have = fresh_logits(folder, probe, program)
    except SkipwiseError as failed:
        return Check(name=name, passed=False, detail=str(failed))
    error = float(np.abs(have - want).max())
    positions = f"positions up to {int(probe[1].max()):,}"
    passed = error <= _TOLERANCE  # False for NaN
    detail = f"transformers alone, in a new process, gives the same logits at {positions} "
    detail += f"(largest difference {error:.0e})"
    if not passed:
        detail = f"transformers alone gives different logits at {positions}: off by {error:.1e}"
    return Check(name=name, passed=passed, detail=detail)
