"""Build the teacher for self-distillation, and check it before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from skipwise.config.distillation import distillation_weight, shards
from skipwise.data.collator import ExampleCollator
from skipwise.errors import Check
from skipwise.models.prepared import PreparedModel
from skipwise.preflight.model import check_rope
from skipwise.training.chunked_loss import Distillation, full_loss_reason
from skipwise.training.inputs import TrainingData
from skipwise.training.teacher import (
    base_config,
    load_sharded_teacher,
    load_teacher,
    teacher_sharing_weights,
)

_CHECK = "distillation"
_PROBED = 256  # tokens of the check: more logits would take too much memory


def make_distillation(
    prepared: PreparedModel, data: TrainingData, model: Any, dtype: torch.dtype, engine: str
) -> tuple[Distillation | None, TrainingData, list[Check]]:
    """The recipe's distillation and its data; if `auto` turns it off, a check with the reason.

    Args:
        model: the loaded model, before LoRA.
        dtype: compute dtype.

    Raises:
        SkipwiseError: the recipe's distillation is not supported, or the teacher cannot be built.
    """
    recipe = prepared.recipe
    L, lacks = prepared.info.original_length, full_loss_reason(model)
    weight, reason = distillation_weight(recipe, original_length=L, engine=engine, lacks=lacks)
    if not weight:
        none = Check(name=_CHECK, passed=True, detail=f"none: {reason}")
        return None, data, [none] if reason else []
    config, source = base_config(prepared.config, prepared.info), prepared.source
    if shards(engine):
        offload = engine == "zero3-offload"
        teacher = load_sharded_teacher(source, config, prepared.load, dtype, model, offload)
    elif recipe.lora is None:
        teacher = load_teacher(source, config, prepared.load, dtype, model)
    else:
        teacher = teacher_sharing_weights(model, config)
    every, batch = recipe.distillation.every, recipe.training.global_batch_size
    weights = recipe.positions.key_weights
    collator = ExampleCollator(weights, base_length=L, every=every, global_batch_size=batch)
    data = dataclasses.replace(data, collator=collator)
    together = shards(engine) and every > 1
    taught = Distillation(teacher=teacher, weight=weight * every, together=together)
    return taught, data, []


@torch.no_grad()
def check_distillation(
    distillation: Distillation,
    prepared: PreparedModel,
    input_ids: torch.Tensor,
    first_lengths: torch.Tensor,
    engine: str,
    autocast: Callable[..., Any] = nullcontext,
) -> Check:
    """Check the teacher's RoPE, and its logits in distillation against those of a plain call."""
    teacher = distillation.teacher
    rope = check_rope(teacher, prepared.info, prepared.info.scaling)
    if not rope.passed:
        detail = f"the teacher does not have the base model's RoPE: {rope.detail}"
        return Check(name=_CHECK, passed=False, detail=detail)
    lengths = first_lengths.clamp(max=_PROBED)
    size = int(lengths.max())
    with autocast():
        output = distillation.run_teacher(input_ids, lengths)
        logits = distillation.logits(output)(output[0]).float()
        expected = teacher(input_ids[:, :size]).logits.float()
    error = float((logits - expected).abs().max())
    close = error <= 1e-2 * float(expected.abs().max())  # bf16, and other kernels
    if shards(engine):  # every process must get the same logits, because the kernels are the same
        first = logits.clone()
        torch.distributed.broadcast(first, 0)
        between = (logits - first).abs().max()
        torch.distributed.all_reduce(between, torch.distributed.ReduceOp.MAX)
        exact = output[0].dtype == torch.float32
        close = close and float(between) <= (1e-4 if exact else 1e-2) * float(expected.abs().max())
        error = max(error, float(between))
    weights = "a frozen copy" if prepared.recipe.lora is None else "those under LoRA"
    if shards(engine):
        parameters = list(teacher.parameters())
        count = sum(isinstance(p, DTensor) for p in parameters)
        weights = f"a frozen copy, {count} of its {len(parameters)} tensors sharded"
    every = prepared.recipe.distillation.every
    times = f"{distillation.weight:g} in one of {every} examples" if every > 1 else "in each"
    detail = f"w = {distillation.weight / every:g} ({times}) by the base's weights, {weights}; "
    detail += "its logits on "
    detail += f"{size} tokens of a first chunk equal the base's to {error:.0e}"
    if not close:
        detail = f"the teacher's logits in distillation are off by {error:.1e} from a plain call"
    return Check(name=_CHECK, passed=close, detail=detail)
