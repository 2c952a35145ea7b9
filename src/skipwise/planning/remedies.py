"""What to change when a run does not fit, mildest first: a ladder of settings to type.

The first rungs cost nothing but time, the next ones need more GPUs, then less is trained, then the
weights are rounded or moved, and last the examples get shorter. `next_change` names the next rung
for a run that met the end of its memory; `first_change` predicts which rung is enough.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from skipwise.config.distillation import distillation_weight, shards
from skipwise.config.lengths import format_length
from skipwise.config.recipe import (
    SHARDED_ENGINES,
    DistillationSettings,
    FullLengthSettings,
    LoRASettings,
    Recipe,
)
from skipwise.errors import SkipwiseError
from skipwise.models.model_info import ModelInfo
from skipwise.planning.architecture import Architecture
from skipwise.planning.gpus import Gpu
from skipwise.planning.job import make_jobs
from skipwise.planning.memory import predict_memory

_MOST_GPUS = 8  # of one machine
_SHORTEST = 1024  # tokens below which an example teaches little

_Step = tuple[str, Recipe, int]  # (what to type, the recipe with it, GPUs)
_Rung = Callable[[Recipe, int], "_Step | None"]


def next_change(recipe: Recipe, num_processes: int = 1) -> str | None:
    """The next setting to type for a run that is out of memory; None: there is none left.

    Args:
        num_processes: that train together; more of them are not asked for.
    """
    for rung in (*_RUNGS, _shorter(None)):
        step = rung(recipe, num_processes)
        if step is not None and step[2] <= num_processes:
            return step[0]
    return None


def first_change(
    recipe: Recipe,
    info: ModelInfo,
    architecture: Architecture,
    gpu: Gpu,
    num_gpus: int = 1,
) -> str | None:
    """The first setting that makes a run fit, several where one is not enough.

    Returns:
        what to type, as `--lora trainer.optim=adamw_8bit`; an empty text where the run fits;
        None where no remedy is enough.
    """

    def size(recipe: Recipe, num_gpus: int) -> float | None:
        try:
            jobs = make_jobs(recipe, info, architecture, num_gpus=num_gpus, gpu=gpu)
        except SkipwiseError:  # GPUs that cannot share the batch
            return None
        return max(predict_memory(job).gib for job in jobs if job)

    now = size(recipe, num_gpus)
    if now is not None and now <= gpu.memory_gib:
        return ""
    rungs = (*_RUNGS, *[_shorter(info.original_length)] * 4)
    for rung in rungs:  # one alone
        step = rung(recipe, num_gpus)
        found = size(step[1], step[2]) if step else None
        if step and found is not None and found <= gpu.memory_gib:
            return step[0]
    taken: list[_Rung] = []  # several: hill_climb, and leave out what the last ones made needless
    at: tuple[Recipe, int] = recipe, num_gpus
    for rung in rungs:
        step = rung(*at)
        found = size(step[1], step[2]) if step else None
        if step is None or found is None or (now is not None and found >= now):
            continue
        taken.append(rung)
        at, now = (step[1], step[2]), found
        if found <= gpu.memory_gib:
            return _fewest(taken, recipe, num_gpus, lambda r, n: _within(size(r, n), gpu))
    return None


def _within(found: float | None, gpu: Gpu) -> bool:
    return found is not None and found <= gpu.memory_gib


def _fewest(
    taken: list[_Rung], recipe: Recipe, num_gpus: int, enough: Callable[[Recipe, int], bool]
) -> str:
    for rung in list(taken):
        rest = [other for other in taken if other is not rung]
        if enough(*_climb(rest, recipe, num_gpus)[1]):
            taken = rest
    words, _ = _climb(taken, recipe, num_gpus)
    return " ".join(words)


def _climb(
    rungs: list[_Rung], recipe: Recipe, num_gpus: int
) -> tuple[list[str], tuple[Recipe, int]]:
    words: list[str] = []
    for rung in rungs:
        step = rung(recipe, num_gpus)
        if step is None:
            continue
        word, recipe, num_gpus = step
        stem = word.split("=")[0] if "=" in word else None
        words = [w for w in words if stem is None or not w.startswith(f"{stem}=")]
        words.append(word)
    return words, (recipe, num_gpus)


def _batch(recipe: Recipe, num_gpus: int) -> _Step | None:
    if recipe.training.micro_batch_size <= 1:
        return None
    return "training.micro_batch_size=1", _training(recipe, micro_batch_size=1), num_gpus


def _checkpointing(recipe: Recipe, num_gpus: int) -> _Step | None:
    if recipe.training.gradient_checkpointing:
        return None
    changed = _training(recipe, gradient_checkpointing=True)
    return "training.gradient_checkpointing=true", changed, num_gpus


def _chunked(recipe: Recipe, num_gpus: int) -> _Step | None:
    if recipe.training.loss != "full":
        return None
    return "training.loss=chunked", _training(recipe, loss="chunked"), num_gpus


def _untaught(recipe: Recipe, num_gpus: int) -> _Step | None:
    """Without the copy of the base; under LoRA there is none, unless the engine shards."""
    if recipe.lora is not None and not shards(recipe.engine):
        return None
    if not distillation_weight(recipe)[0]:
        return None
    return (
        "distillation.weight=0",
        dataclasses.replace(recipe, distillation=DistillationSettings(weight=0.0)),
        num_gpus,
    )


def _fsdp(number: int) -> _Rung:
    """Shard over this many GPUs."""

    def rung(recipe: Recipe, num_gpus: int) -> _Step | None:
        sharded = recipe.engine in SHARDED_ENGINES
        if number < num_gpus or (number == num_gpus and (sharded or number == 1)):
            return None
        more = f"--gpus {number}" if number > num_gpus else ""
        engine = "" if sharded else "--engine fsdp2"
        changed = recipe if sharded else dataclasses.replace(recipe, engine="fsdp2")
        return " ".join(filter(None, (engine, more))), changed, number

    return rung


def _shard_here(recipe: Recipe, num_gpus: int) -> _Step | None:
    return _fsdp(num_gpus)(recipe, num_gpus)


def _lora(recipe: Recipe, num_gpus: int) -> _Step | None:
    if recipe.lora is not None:
        return None
    return "--lora", dataclasses.replace(recipe, lora=LoRASettings()), num_gpus


def _embeddings(recipe: Recipe, num_gpus: int) -> _Step | None:
    if recipe.lora is None or not recipe.lora.train_embeddings:
        return None
    lora = dataclasses.replace(recipe.lora, train_embeddings=False)
    return "lora.train_embeddings=false", dataclasses.replace(recipe, lora=lora), num_gpus


def _nf4(recipe: Recipe, num_gpus: int) -> _Step | None:
    if recipe.lora is None or recipe.lora.quantization != "none":
        return None
    if recipe.engine.startswith("zero3"):  # DeepSpeed cannot shard quantised weights
        return None
    lora = dataclasses.replace(recipe.lora, quantization="nf4")
    return "lora.quantization=nf4", dataclasses.replace(recipe, lora=lora), num_gpus


def _eight_bit(recipe: Recipe, num_gpus: int) -> _Step | None:
    plain = ("adamw_torch", "adamw_torch_fused")
    if recipe.engine not in ("auto", "ddp"):  # its states are no sharded tensors
        return None
    if recipe.trainer.get("optim", "adamw_torch") not in plain:
        return None
    changed = dataclasses.replace(recipe, trainer={**recipe.trainer, "optim": "adamw_8bit"})
    return "trainer.optim=adamw_8bit", changed, num_gpus


def _offload(recipe: Recipe, num_gpus: int) -> _Step | None:
    if recipe.engine == "zero3-offload":
        return None
    if recipe.lora is not None and recipe.lora.quantization != "none":
        return None
    changed = dataclasses.replace(recipe, engine="zero3-offload")
    return "--engine zero3-offload", changed, num_gpus


def _unfinished(recipe: Recipe, num_gpus: int) -> _Step | None:
    """Without the full-length finish: of a lower share the memory is the same."""
    if not recipe.full_length.fraction:
        return None
    return "full_length={}", dataclasses.replace(recipe, full_length=FullLengthSettings()), num_gpus


def _unweighted(recipe: Recipe, num_gpus: int) -> _Step | None:
    if recipe.positions.key_weights == "none":
        return None
    positions = dataclasses.replace(recipe.positions, key_weights="none")
    changed = dataclasses.replace(recipe, positions=positions)
    return "positions.key_weights=none", changed, num_gpus


def _shorter(original_length: int | None) -> _Rung:
    """Half of the examples' length; of full-length training, PoSE instead."""

    def rung(recipe: Recipe, num_gpus: int) -> _Step | None:
        if recipe.method == "full":
            return "method=pose", dataclasses.replace(recipe, method="pose"), num_gpus
        length = recipe.train_length or recipe.original_length or original_length
        if length is None:
            return "train_length=2k", dataclasses.replace(recipe, train_length=2048), num_gpus
        if length // 2 < _SHORTEST:
            return None
        changed = dataclasses.replace(recipe, train_length=length // 2)
        return f"train_length={format_length(length // 2)}", changed, num_gpus

    return rung


def _training(recipe: Recipe, **changes: object) -> Recipe:
    return dataclasses.replace(
        recipe,
        training=dataclasses.replace(recipe.training, **changes),  # type: ignore[arg-type]
    )


_RUNGS: tuple[_Rung, ...] = (
    _batch,
    _checkpointing,
    _chunked,
    _untaught,
    _shard_here,
    *(_fsdp(number) for number in (2, 4, _MOST_GPUS)),
    _lora,
    _embeddings,
    _nf4,
    _eight_bit,
    _offload,
    _unfinished,
    _unweighted,
)
