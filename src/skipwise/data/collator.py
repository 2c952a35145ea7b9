"""Examples to a batch with an attention mask and the key weights of each chunk.

Shapes:  B = batch, L = train_length
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from skipwise.pose.samplers import Example


class ExampleCollator:
    """Examples to a batch that always has an attention mask.

    Without a mask transformers takes a skip in `position_ids` for the boundary between packed
    sequences, and hides the chunks from each other. A mask of ones prevents that and costs nothing.

    With importance weights the batch also has `chunk_ids` and `key_weights`, from which
    `models.attention.masks` makes the mask on the device, one forward pass at a time. A Trainer
    fetches all batches of a step at once, and 64 masks of 8,192 x 8,192 take 16 GiB.

    With a `base_length`, the window of the base model, the batch has `first_lengths` (B,): how many
    of an example's first tokens the base reads as usual, for the distillation loss; 0 in examples
    that are not taught (`is_taught`).

    Args:
        every: one in this many examples is taught.
        global_batch_size: examples of a step.
    """

    def __init__(
        self,
        key_weights: str = "none",
        base_length: int | None = None,
        *,
        every: int = 1,
        global_batch_size: int = 1,
    ) -> None:
        self.key_weights, self.base_length = key_weights, base_length
        self.every, self.global_batch_size = every, global_batch_size

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        keys = ("input_ids", "labels", "position_ids")
        batch = {k: torch.from_numpy(np.stack([item[k] for item in items])) for k in keys}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        if self.key_weights == "importance":
            batch |= weights_by_token([item["example"] for item in items])
        if self.base_length is not None:
            numbers = [item["number"] for item in items]
            taught = [is_taught(k, self.every, self.global_batch_size) for k in numbers]
            lengths = [min(int(item["example"].lengths[0]), self.base_length) for item in items]
            first = [n * teach for n, teach in zip(lengths, taught, strict=True)]
            batch["first_lengths"] = torch.tensor(first)
        return batch


def is_taught(number: int, every: int, global_batch_size: int) -> bool:
    """Whether an example learns from the teacher: the first ones of each step, one in `every`.

    They are neighbours, so most passes of a step have none and run no teacher. It depends on the
    example's number alone, and so not on the number of devices.
    """
    cycle = global_batch_size if global_batch_size % every == 0 else every
    return number % cycle < cycle // every


def weights_by_token(examples: list[Example]) -> dict[str, torch.Tensor]:
    """`chunk_ids` (B, L) int32, and `key_weights` (B, L) float32: the log weight of each chunk."""
    chunk_ids = np.stack([example.chunk_ids() for example in examples]).astype(np.int32)
    weights = np.stack([np.repeat(e.log_weights(), e.lengths) for e in examples])
    return {"chunk_ids": torch.from_numpy(chunk_ids), "key_weights": torch.from_numpy(weights)}
