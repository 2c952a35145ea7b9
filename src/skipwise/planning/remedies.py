"""What to change if a run does not fit in memory: a list of remedies, mildest first.

The first remedies cost only time, the next need more GPUs, then fewer parameters train, then the
weights are quantised or offloaded, and at last the examples get shorter. `next_change` is the next
remedy for a run that ran out of memory; `first_change` predicts which remedy is enough.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from skipwise.config.distillation import distillation_weight, shards
from skipwise.config.lengths import format_length
from skipwise.config.recipe import SHARDED_ENGINES, FullLengthSettings, LoRASettings, Recipe
from skipwise.config.samplers import example_length
from skipwise.errors import SkipwiseError
from skipwise.models.model_info import ModelInfo
from skipwise.planning.architecture import Architecture
from skipwise.planning.gpus import Gpu
from skipwise.planning.job import make_jobs
from skipwise.planning.memory import predict_memory

_MOST_GPUS = 8  # in one machine
_SHORTEST = 1024  # tokens; shorter examples teach little
_UNKNOWN = 2048  # what to try where the original length is not known

_Change = tuple[str, Recipe, int]  # (what to type, the changed recipe, number of GPUs)
_Remedy = Callable[[Recipe, int], "_Change | None"]  # None if it does not apply


def next_change(recipe: Recipe, num_processes: int = 1, *, has_gpu: bool = True) -> str | None:
    """The next setting to type for a run that is out of memory, or None if none is left.

    Args:
        num_processes: of the run; the remedy never asks for more.
        has_gpu: without one there is nothing to offload from.
    """
    remedies = [one for one in _REMEDIES if has_gpu or one is not _OFFLOAD_ACTIVATIONS]
    for remedy in (*remedies, _shorter_examples):
        change = remedy(recipe, num_processes)
        if change is not None and change[2] <= num_processes:
            return change[0]
    return None


def first_change(
    recipe: Recipe, info: ModelInfo, architecture: Architecture, gpu: Gpu, num_gpus: int = 1
) -> str | None:
    """The first setting that makes a run fit, or several if one is not enough.

    Returns:
        What to type, for example `--lora trainer.optim=adamw_8bit`; an empty text if the run fits
        already; None if all remedies together are not enough.
    """

    def size(recipe: Recipe, devices: int) -> float:
        if gpu.is_cpu and devices > num_gpus:  # this machine has one
            return math.inf
        try:
            jobs = make_jobs(recipe, info, architecture, num_gpus=devices, gpu=gpu)
        except SkipwiseError:  # the batch does not divide evenly among the GPUs
            return math.inf
        return max(predict_memory(job).gib for job in jobs if job)

    def fits(recipe: Recipe, num_gpus: int) -> bool:
        return size(recipe, num_gpus) <= gpu.memory_gib

    if fits(recipe, num_gpus):
        return ""
    recipe = dataclasses.replace(recipe, original_length=info.original_length)
    remedies = (*_REMEDIES, *[_shorter_examples] * 4)
    for remedy in remedies:  # try each alone
        change = remedy(recipe, num_gpus)
        if change and fits(*change[1:]):
            return change[0]
    applied: list[_Remedy] = []  # combine all that help, then drop those that are not needed
    at, smallest = (recipe, num_gpus), size(recipe, num_gpus)
    for remedy in remedies:
        change = remedy(*at)
        found = size(*change[1:]) if change else math.inf
        if change is None or found >= smallest:
            continue
        applied.append(remedy)
        at, smallest = change[1:], found
        if found <= gpu.memory_gib:
            return _drop_needless(applied, recipe, num_gpus, fits)
    return None


def _drop_needless(
    applied: list[_Remedy], recipe: Recipe, num_gpus: int, fits: Callable[[Recipe, int], bool]
) -> str:
    """What to type for the remedies, without those that the others make needless."""
    for remedy in list(applied):
        others = [other for other in applied if other is not remedy]
        if fits(*_apply(others, recipe, num_gpus)[1]):
            applied = others
    return " ".join(_apply(applied, recipe, num_gpus)[0])


def _apply(
    remedies: list[_Remedy], recipe: Recipe, num_gpus: int
) -> tuple[list[str], tuple[Recipe, int]]:
    """(what to type, the changed recipe and number of GPUs) for several remedies in order."""
    words: list[str] = []
    for remedy in remedies:
        change = remedy(recipe, num_gpus)
        if change is None:
            continue
        word, recipe, num_gpus = change
        key = word.split("=")[0] if "=" in word else None
        words = [w for w in words if key is None or not w.startswith(f"{key}=")]
        words.append(word)
    return words, (recipe, num_gpus)


def _set(key: str, value: Any, applies: Callable[[Recipe], bool]) -> _Remedy:
    """Set this key, if the remedy applies to the recipe."""
    section, name = key.split(".")
    word = f"{key}={value}".replace("=True", "=true").replace("=False", "=false")

    def remedy(recipe: Recipe, num_gpus: int) -> _Change | None:
        if not applies(recipe):
            return None
        settings = dataclasses.replace(getattr(recipe, section), **{name: value})
        return word, dataclasses.replace(recipe, **{section: settings}), num_gpus

    return remedy


def _copies_base(recipe: Recipe) -> bool:
    """Whether distillation needs a copy of the base model; with LoRA only if the engine shards."""
    needs_copy = recipe.lora is None or shards(recipe.engine)
    return needs_copy and distillation_weight(recipe)[0] > 0


def _can_offload_activations(recipe: Recipe) -> bool:
    """Saved activations grow with the examples; for short ones other remedies save more."""
    long = recipe.method == "full" or recipe.full_length.fraction > 0
    length, L = recipe.train_length, recipe.original_length
    longer = isinstance(length, int) and L is not None and length > L
    return recipe.training.gradient_checkpointing is True and (long or longer)


def _trains_lora_embeddings(recipe: Recipe) -> bool:
    return recipe.lora is not None and recipe.lora.train_embeddings


def _can_quantise(recipe: Recipe) -> bool:
    plain_lora = recipe.lora is not None and recipe.lora.quantization == "none"
    return plain_lora and not recipe.engine.startswith("zero3")  # DeepSpeed cannot shard nf4


def _shard_over(number: int) -> _Remedy:
    """Shard over this many GPUs."""

    def remedy(recipe: Recipe, num_gpus: int) -> _Change | None:
        sharded = recipe.engine in SHARDED_ENGINES
        if number < num_gpus or (number == num_gpus and (sharded or number == 1)):
            return None
        more = f"--gpus {number}" if number > num_gpus else ""
        engine = "" if sharded else "--engine fsdp2"
        changed = recipe if sharded else dataclasses.replace(recipe, engine="fsdp2")
        return " ".join(filter(None, (engine, more))), changed, number

    return remedy


def _lora(recipe: Recipe, num_gpus: int) -> _Change | None:
    if recipe.lora is not None:
        return None
    return "--lora", dataclasses.replace(recipe, lora=LoRASettings()), num_gpus


def _eight_bit_optimizer(recipe: Recipe, num_gpus: int) -> _Change | None:
    plain = recipe.trainer.get("optim", "adamw_torch") in ("adamw_torch", "adamw_torch_fused")
    if recipe.engine not in ("auto", "ddp") or not plain:  # its states cannot be sharded
        return None
    changed = dataclasses.replace(recipe, trainer={**recipe.trainer, "optim": "adamw_8bit"})
    return "trainer.optim=adamw_8bit", changed, num_gpus


def _offload(recipe: Recipe, num_gpus: int) -> _Change | None:
    quantised = recipe.lora is not None and recipe.lora.quantization != "none"
    if recipe.engine == "zero3-offload" or quantised:
        return None
    changed = dataclasses.replace(recipe, engine="zero3-offload")
    return "--engine zero3-offload", changed, num_gpus


def _no_full_length(recipe: Recipe, num_gpus: int) -> _Change | None:
    """Without the full-length stage: a smaller fraction needs as much memory."""
    if not recipe.full_length.fraction:
        return None
    return "full_length={}", dataclasses.replace(recipe, full_length=FullLengthSettings()), num_gpus


def _shorter_examples(recipe: Recipe, num_gpus: int) -> _Change | None:
    """Halve the length of the examples, or replace full-length training by PoSE."""
    if recipe.method == "full":
        return "method=pose", dataclasses.replace(recipe, method="pose"), num_gpus
    length = example_length(recipe, recipe.original_length or 2 * _UNKNOWN)
    if length // 2 < _SHORTEST:
        return None
    changed = dataclasses.replace(recipe, train_length=length // 2)
    return f"train_length={format_length(length // 2)}", changed, num_gpus


_OFFLOAD_ACTIVATIONS = _set("training.gradient_checkpointing", "offload", _can_offload_activations)
_REMEDIES: tuple[_Remedy, ...] = (
    _set("training.micro_batch_size", 1, lambda r: r.training.micro_batch_size not in (1, "auto")),
    _set("training.gradient_checkpointing", True, lambda r: not r.training.gradient_checkpointing),
    _OFFLOAD_ACTIVATIONS,
    _set("training.loss", "chunked", lambda r: r.training.loss == "full"),
    _set("distillation.weight", 0, _copies_base),
    lambda recipe, num_gpus: _shard_over(num_gpus)(recipe, num_gpus),  # over those of the run
    *(_shard_over(number) for number in (2, 4, _MOST_GPUS)),
    _lora,
    _set("lora.train_embeddings", False, _trains_lora_embeddings),
    _set("lora.quantization", "nf4", _can_quantise),
    _eight_bit_optimizer,
    _offload,
    _no_full_length,
    _set("positions.key_weights", "none", lambda r: r.positions.key_weights != "none"),
)
