"""Batch rules that planning and training share: accumulation, and when the loss is chunked."""

from __future__ import annotations

from skipwise.config.recipe import TrainingSettings
from skipwise.errors import SkipwiseError

SLICE = 512  # tokens through the head at a time: 0.8 GiB at a vocabulary of 128k
SMALL_LOGITS = 64 << 20  # bytes of float32 logits below which slices save too little
EVALUATION_LOGITS = 1 << 26  # most logits that an evaluation holds at once


def accumulation(settings: TrainingSettings, num_devices: int) -> int:
    """Gradient accumulation steps that make up the global batch on this many devices.

    Raises:
        SkipwiseError: the global batch does not divide evenly among the devices.
    """
    micro_batch, batch = settings.micro_batch_size * num_devices, settings.global_batch_size
    if not micro_batch or not batch or batch % micro_batch:
        raise SkipwiseError(
            f"training.global_batch_size {batch} is not a multiple of "
            f"training.micro_batch_size {settings.micro_batch_size} x {num_devices} devices"
        )
    return batch // micro_batch


def is_chunked(loss: str, batch_size: int, train_length: int, vocab_size: int) -> bool:
    """Whether `training.loss` means slices; `auto` slices when the logits are large."""
    return loss == "chunked" or (
        loss == "auto" and batch_size * train_length * vocab_size * 4 > SMALL_LOGITS
    )
