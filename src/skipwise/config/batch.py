"""Batch rules that planning and training share: accumulation, and when the loss is chunked."""

from __future__ import annotations

from skipwise.config.recipe import TrainingSettings
from skipwise.errors import SkipwiseError

SLICE = 512  # tokens through the head at a time: 0.8 GiB at a vocabulary of 128k
SMALL_LOGITS = 64 << 20  # bytes of float32 logits below which slices save too little
EVALUATION_LOGITS = 1 << 26  # most logits that an evaluation holds at once


def micro_batch(settings: TrainingSettings) -> int:
    """Examples per device and pass; 1 as long as they are `auto`."""
    return 1 if settings.micro_batch_size == "auto" else settings.micro_batch_size


def micro_batches(settings: TrainingSettings, num_devices: int) -> list[int]:
    """The sizes that `training.micro_batch_size: auto` may take, each at least twice the last."""
    if settings.micro_batch_size != "auto":
        return [settings.micro_batch_size]
    each, sizes = accumulation(settings, num_devices), [1]
    for size in range(2, each + 1):
        if each % size == 0 and size >= 2 * sizes[-1]:
            sizes.append(size)
    return sizes


def accumulation(settings: TrainingSettings, num_devices: int) -> int:
    """Gradient accumulation steps that make up the global batch on this many devices.

    Raises:
        SkipwiseError: the global batch does not divide evenly among the devices.
    """
    size, batch = settings.micro_batch_size, settings.global_batch_size
    each = num_devices * micro_batch(settings)
    if not each or not batch or batch % each:
        by = "" if size == "auto" else f"training.micro_batch_size {size} x "
        raise SkipwiseError(
            f"training.global_batch_size {batch} is not a multiple of {by}{num_devices} devices"
        )
    return batch // each


def is_chunked(loss: str, batch_size: int, train_length: int, vocab_size: int) -> bool:
    """Whether `training.loss` means slices; `auto` slices when the logits are large."""
    return loss == "chunked" or (
        loss == "auto" and batch_size * train_length * vocab_size * 4 > SMALL_LOGITS
    )
