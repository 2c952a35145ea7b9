"""Examples to a batch with an attention mask, and with the key weights of each chunk.

Shapes:  B = batch, L = train_length
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from skipwise.models.attention.masks import with_layer_masks
from skipwise.pose.samplers import Example, additive_mask


class ExampleCollator:
    """Examples to a batch that always holds an attention mask.

    Without a mask transformers takes a skip in `position_ids` for the boundary of a packed
    sequence and cuts the chunks off from each other. All ones is right and costs nothing; with
    `weights="importance"` the mask is the additive one, (B, 1, L, L), for sdpa and eager.

    With the `config` of a loaded model the batch holds what a hybrid model needs besides, a mask
    for each kind of layer. `skipwise train` adds these on the device instead, and with `later` the
    weights too: a Trainer fetches the batches of a whole step at once, and 64 masks of 8,192 x
    8,192 take 16 GiB. Then the batch holds `chunk_ids` and `key_weights`, (B, L), for
    `models.masks.pack_key_weights` or `with_chunk_weights`.

    With a `base_length`, the tokens that the base reads, the batch holds `first_lengths` (B,): how
    many of an example's first tokens read like any text, for `loss.Distillation`.
    """

    def __init__(
        self,
        key_weights: str = "none",
        config: Any = None,
        later: bool = False,
        base_length: int | None = None,
    ) -> None:
        self.key_weights, self.config, self.later = key_weights, config, later
        self.base_length = base_length

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        keys = ("input_ids", "labels", "position_ids")
        batch = {k: torch.from_numpy(np.stack([item[k] for item in items])) for k in keys}
        if self.key_weights == "importance" and self.later:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["chunk_ids"], batch["key_weights"] = (
                torch.from_numpy(np.stack(rows))
                for rows in zip(*(_by_key(item["example"]) for item in items), strict=True)
            )
        elif self.key_weights == "importance":
            examples: list[Example] = [item["example"] for item in items]
            mask = additive_mask(examples, torch.finfo(torch.bfloat16).min)  # float32 holds it too
            batch["attention_mask"] = torch.from_numpy(mask)
        else:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        if self.base_length is not None:
            first = [min(int(item["example"].lengths[0]), self.base_length) for item in items]
            batch["first_lengths"] = torch.tensor(first)
        return batch if self.config is None else with_layer_masks(self.config, batch)


def _by_key(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """(L,) int32 which chunk a token is of, and (L,) float32 the log weight of its chunk."""
    chunks = np.repeat(np.arange(len(example.lengths), dtype=np.int32), example.lengths)
    return chunks, np.repeat(example.log_weights(), example.lengths).astype(np.float32)
