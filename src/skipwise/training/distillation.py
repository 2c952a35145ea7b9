"""The teacher of a run: made, and checked before the first step."""

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
_PROBED = 256  # tokens of the check: logits of all would be large


def make_distillation(
    prepared: PreparedModel, data: TrainingData, model: Any, dtype: torch.dtype, engine: str
) -> tuple[Distillation | None, TrainingData, list[Check]]:
    """What the recipe asks for, with data that says what is taught; or why auto asks for nothing.

    Args:
        model: as loaded, without LoRA.
        dtype: of the arithmetic.

    Raises:
        SkipwiseError: the recipe asks for what cannot be done; the teacher cannot be made.
    """
    recipe = prepared.recipe
    weight, why = distillation_weight(recipe, engine=engine, lacks=full_loss_reason(model))
    if not weight:
        return None, data, [Check(name=_CHECK, passed=True, detail=f"none: {why}")] if why else []
    config = base_config(prepared.config, prepared.info)
    if shards(engine):
        offload = engine == "zero3-offload"
        teacher = load_sharded_teacher(
            prepared.source, config, prepared.load, dtype, model, offload
        )
    elif recipe.lora is None:
        teacher = load_teacher(prepared.source, config, prepared.load, dtype, model)
    else:
        teacher = teacher_sharing_weights(model, config)
    collator = ExampleCollator(
        recipe.positions.key_weights, base_length=prepared.info.original_length
    )
    data = dataclasses.replace(data, collator=collator)
    return Distillation(teacher=teacher, weight=weight), data, []


@torch.no_grad()
def check_distillation(
    distillation: Distillation,
    prepared: PreparedModel,
    input_ids: torch.Tensor,
    first_lengths: torch.Tensor,
    engine: str,
    autocast: Callable[..., Any] = nullcontext,
) -> Check:
    """The teacher has the base's RoPE, and in a lesson it says what it says when called plainly."""
    teacher = distillation.teacher
    rope = check_rope(teacher, prepared.info, prepared.info.scaling)
    if not rope.passed:
        detail = f"the teacher has not the base's RoPE: {rope.detail}"
        return Check(name=_CHECK, passed=False, detail=detail)
    lengths = first_lengths.clamp(max=_PROBED)
    size = int(lengths.max())
    with autocast():
        output = distillation.read(input_ids, lengths)
        lesson = distillation.logits(output)(output[0]).float()
        plain = teacher(input_ids[:, :size]).logits.float()
    apart = float((lesson - plain).abs().max())
    close = apart <= 1e-2 * float(plain.abs().max())  # other kernels, in bf16
    if shards(engine):  # and the same in every process, by the same kernels
        first = lesson.clone()
        torch.distributed.broadcast(first, 0)
        between = (lesson - first).abs().max()
        torch.distributed.all_reduce(between, torch.distributed.ReduceOp.MAX)
        exact = output[0].dtype == torch.float32
        close = close and float(between) <= (1e-4 if exact else 1e-2) * float(plain.abs().max())
        apart = max(apart, float(between))
    weights = "a frozen copy" if prepared.recipe.lora is None else "those under LoRA"
    if shards(engine):
        held = list(teacher.parameters())
        count = sum(isinstance(p, DTensor) for p in held)
        weights = f"a frozen copy, {count} of its {len(held)} tensors sharded"
    return Check(
        name=_CHECK,
        passed=close,
        detail=f"w = {distillation.weight:g} by the base's weights, {weights}; its logits on "
        f"{size} tokens of a first chunk are the base's own to {apart:.0e}"
        if close
        else f"in a lesson the teacher's logits differ from its own by {apart:.1e}",
    )
