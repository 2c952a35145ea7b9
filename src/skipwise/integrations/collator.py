"""Tokenised records of any trainer to PoSE batches.

A collator does not know the index of a record, and a dataloader worker does not know what other
workers draw. So the skips of a record are drawn from (seed, epoch, the record's tokens). They do
not depend on the number of workers, processes and examples in a batch, or on where a run was
resumed, and they are new in every epoch. Two equal records of one epoch get the same skips.

Shapes:  B = batch, L = train_length, L_x = tokens of a record
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from skipwise.data.collator import weights_by_token
from skipwise.errors import SkipwiseError
from skipwise.models.attention.masks import with_chunk_weights, with_layer_masks
from skipwise.pose.samplers import IGNORE_INDEX, Example, Sampler, check_choice

_TRIES = 256  # draws until an example has a label, where prompts are masked
_MASKS = ("completion_mask", "assistant_masks")  # TRL before 1.0 leaves labels to its collator


class PoSECollator:
    """A data collator that takes L tokens from each record and skips positions between chunks.

    A record is a mapping with `input_ids` and optionally `attention_mask` (padding is removed) and
    `labels`. Labels are cut like the tokens, so a prompt masked by -100 stays masked, and examples
    of such records are drawn until one has a label. Other keys are left out.

    A record shorter than L keeps its full text at positions 0, 1, 2, .., padded on the right. If
    all records are short, nothing skips: `PreflightCallback` reports this before the first step.

    Args:
        sampler: PoSE, CREAM, RandPos, FullLength, or another `Sampler`.
        key_weights: "importance" sends the additive mask (B, 1, L, L), for sdpa and eager. Only
            `skipwise train` avoids this mask on a GPU, by setting the model's attention.
        config: Of the loaded model. Needed if the model has sliding layers beside full ones (Gemma
            2 and 3, Olmo 3, gpt-oss), which take one mask per layer type. TRL 1.16 counts tokens
            by the mask: it fails on these, and logs num_tokens as nan with "importance".
        short_records: "plain" keeps records shorter than L, "raise" makes them an error.
        pad_token_id: The token that pads short records, masked.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        seed: int = 0,
        key_weights: Literal["none", "importance"] = "none",
        config: Any = None,
        short_records: Literal["plain", "raise"] = "plain",
        pad_token_id: int = 0,
    ) -> None:
        check_choice("key_weights", key_weights, ("none", "importance"))
        check_choice("short_records", short_records, ("plain", "raise"))
        self.sampler, self.seed, self.key_weights, self.config = sampler, seed, key_weights, config
        self.short_records, self.pad_token_id = short_records, pad_token_id
        # Shared memory: workers that outlive an epoch have a copy of everything else.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw new skips. `PreflightCallback` calls this; a training loop of your own must too."""
        self._epoch.fill_(epoch)

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """`input_ids`, `labels`, `position_ids` (B, L) int64 and the attention mask.

        Raises:
            SkipwiseError: a record without tokens, with columns of different lengths, or shorter
                than L with short_records="raise".
        """
        read = [_read(record) for record in records]
        examples = [self.example(tokens, labels) for tokens, labels in read]
        width = max(example.num_tokens for example in examples)
        size = (len(examples), width)
        input_ids = np.full(size, self.pad_token_id, np.int64)
        labels = np.full(size, IGNORE_INDEX, np.int64)
        positions = np.tile(np.arange(width), (len(examples), 1))  # padding continues them
        mask = np.zeros(size, np.int64)
        for row, (example, (tokens, targets)) in enumerate(zip(examples, read, strict=True)):
            kept = slice(0, example.num_tokens)
            input_ids[row, kept], _ = example.take(tokens)
            _, labels[row, kept] = example.take(targets)
            positions[row, kept] = example.position_ids()
            mask[row, kept] = 1
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions),
            "attention_mask": torch.from_numpy(mask),
        }
        if self.key_weights == "importance":
            # Padding comes last, where no token attends to it: the mask need not hide it.
            padded = [e if e.num_tokens == width else Example.contiguous(width) for e in examples]
            batch = with_chunk_weights({**batch, **weights_by_token(padded)}, torch.float32)
        return batch if self.config is None else with_layer_masks(self.config, batch)

    def example(self, tokens: np.ndarray, labels: np.ndarray) -> Example:
        """The example that this epoch takes from a record of L_x tokens."""
        L = self.sampler.train_length
        if len(tokens) < L:
            if self.short_records == "raise":
                raise SkipwiseError(
                    f"a record of {len(tokens):,} tokens is shorter than train_length {L:,}\n"
                    'pack the records, remove them, or set short_records="plain"'
                )
            return Example.contiguous(len(tokens))
        digest = hashlib.blake2b(tokens.tobytes(), digest_size=8).digest()
        rng = np.random.default_rng([self.seed, self.epoch, int.from_bytes(digest, "little")])
        example = self.sampler.sample(rng, len(tokens))
        trained = np.flatnonzero(labels != IGNORE_INDEX)
        if len(trained) in (0, len(labels)):
            return example
        for _ in range(_TRIES):  # an answer may be much shorter than its prompt
            if (example.take(labels)[1][1:] != IGNORE_INDEX).any():
                return example
            example = self.sampler.sample(rng, len(tokens))
        end = max(L, int(rng.choice(trained)) + 1)
        return Example.contiguous(L, end - L)


def _read(record: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, labels) of a record, both (L_x,) int64, without its padding."""
    if record.get("input_ids") is None:
        raise SkipwiseError(
            f"a record has {', '.join(record) or 'no keys'}, and no input_ids\n"
            "tokenise the data set first, or let the trainer do it"
        )
    tokens = np.asarray(record["input_ids"], np.int64)
    given = record.get("labels")
    labels = tokens if given is None else np.asarray(given, np.int64)
    columns = {"labels": labels}
    for name in ("attention_mask", *_MASKS):
        if record.get(name) is not None:
            columns[name] = np.asarray(record[name])
    for name, column in columns.items():
        if column.shape != tokens.shape or tokens.ndim != 1 or len(tokens) == 0:
            raise SkipwiseError(
                f"a record has input_ids {tokens.shape} and {name} {column.shape}: give one "
                "number per token, and one sequence per record"
            )
    if given is None:
        for name in _MASKS:
            if name in columns:
                labels = np.where(columns[name] == 0, IGNORE_INDEX, labels)
    if "attention_mask" in columns:
        kept = columns["attention_mask"] != 0
        tokens, labels = tokens[kept], labels[kept]
    return tokens, labels
