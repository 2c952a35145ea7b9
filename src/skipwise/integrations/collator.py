"""Tokenised records of any trainer to PoSE batches.

A collator does not know which record of the run it is given, nor does a dataloader worker know what
the others draw. So the skips of a record are drawn from (seed, epoch, the record's own tokens): the
same whatever the number of workers, processes and examples in a batch, wherever a run was taken up
again, and new in every epoch. Two records of one epoch that are equal token for token draw alike.

Shapes:  B = batch, L = train_length, L_x = tokens of a record
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from skipwise.errors import SkipwiseError
from skipwise.models.attention.masks import with_layer_masks
from skipwise.pose.samplers import IGNORE_INDEX, Example, Sampler, additive_mask

_TRIES = 256  # draws until an example holds a label, where prompts are masked
_MASKS = ("completion_mask", "assistant_masks")  # TRL before 1.0 leaves labels to its collator


class PoSECollator:
    """A data collator that cuts L tokens out of each record and lets their positions skip.

    A record is a mapping with `input_ids`, and perhaps `attention_mask` (its padding is taken off)
    and `labels`, which are cut as the tokens are: a prompt masked by -100 stays masked. Of a record
    with such masks an example is drawn that holds a label. Other keys are left out.

    A record shorter than L keeps its whole text at plain positions, padded on the right. So in a
    set of short records nothing skips, which `PreflightCallback` reports before the first step.

    Args:
        sampler: PoSE, CREAM, RandPos, or FullLength.
        weights: "importance" sends the additive mask (B, 1, L, L), for sdpa and eager: `skipwise
            train` alone does without it on a GPU, by an attention that it gives the model.
        config: of the loaded model; needed where it has sliding layers beside full ones (Gemma 2
            and 3, Olmo 3, gpt-oss), for a mask for each kind of layer. TRL 1.16 counts tokens by
            the mask: it fails on these, and logs a num_tokens of nan with "importance".
        short_records: "plain", or "raise".
        pad_token_id: what stands behind a short record, masked.
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
        for name, value, choices in (
            ("key_weights", key_weights, ("none", "importance")),
            ("short_records", short_records, ("plain", "raise")),
        ):
            if value not in choices:
                raise SkipwiseError(f"{name} is {value!r}: choose one of {', '.join(choices)}")
        self.sampler, self.seed, self.key_weights, self.config = sampler, seed, key_weights, config
        self.short_records, self.pad_token_id = short_records, pad_token_id
        # Shared, for workers that outlive an epoch hold a copy of everything else.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw anew; `PreflightCallback` does it, a loop of one's own has to."""
        self._epoch.fill_(epoch)

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """`input_ids`, `labels`, `position_ids` (B, L) int64 and the attention mask.

        Raises:
            SkipwiseError: a record without tokens, with columns of different lengths, or, with
                short_records="raise", shorter than L.
        """
        read = [_read(record) for record in records]
        examples = [self.example(tokens, labels) for tokens, labels in read]
        width = max(example.num_tokens for example in examples)
        size = (len(examples), width)
        input_ids = np.full(size, self.pad_token_id, np.int64)
        labels = np.full(size, IGNORE_INDEX, np.int64)
        positions = np.tile(np.arange(width), (len(examples), 1))  # padding counts on
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
            # No token looks at the padding behind it, so the mask need not name it.
            padded = [e if e.num_tokens == width else _plain(width) for e in examples]
            additive = additive_mask(padded, torch.finfo(torch.bfloat16).min)
            batch["attention_mask"] = torch.from_numpy(additive)
        return batch if self.config is None else with_layer_masks(self.config, batch)

    def example(self, tokens: np.ndarray, labels: np.ndarray) -> Example:
        """Where the tokens of the example stand that this epoch cuts out of a record (L_x,)."""
        L = self.sampler.train_length
        if len(tokens) < L:
            if self.short_records == "raise":
                raise SkipwiseError(
                    f"a record of {len(tokens):,} tokens is shorter than train_length {L:,}\n"
                    'pack the records, take them out, or say short_records="plain"'
                )
            return _plain(len(tokens))
        digest = hashlib.blake2b(tokens.tobytes(), digest_size=8).digest()
        rng = np.random.default_rng([self.seed, self.epoch, int.from_bytes(digest, "little")])
        example = self.sampler.sample(rng, len(tokens))
        trained = np.flatnonzero(labels != IGNORE_INDEX)
        if len(trained) in (0, len(labels)):
            return example
        for _ in range(_TRIES):  # an answer may be short beside its prompt
            if (example.take(labels)[1][1:] != IGNORE_INDEX).any():
                return example
            example = self.sampler.sample(rng, len(tokens))
        end = max(L, int(rng.choice(trained)) + 1)
        return _plain(L, end - L)


def _plain(num_tokens: int, text_start: int = 0) -> Example:
    return Example(
        lengths=np.array([num_tokens]),
        position_starts=np.array([0]),
        text_starts=np.array([text_start]),
    )


def _read(record: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, labels) of a record, both (L_x,) int64, without its padding."""
    if record.get("input_ids") is None:
        raise SkipwiseError(
            f"a record holds {', '.join(record) or 'nothing'}, and no input_ids\n"
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
                "number a token, for one sequence a record"
            )
    if given is None:
        for name in _MASKS:
            if name in columns:
                labels = np.where(columns[name] == 0, IGNORE_INDEX, labels)
    if "attention_mask" in columns:
        kept = columns["attention_mask"] != 0
        tokens, labels = tokens[kept], labels[kept]
    return tokens, labels
