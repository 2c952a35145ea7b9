"""Perplexity by context length: the same target tokens with more and more context.

Windows of the longest context slide over each document with stride S; the last S tokens of a
window are its targets, scored at every context length c with the c - S tokens before them. So a
lower value at a longer context means that the model uses it, not that the text is easier there.
Bits per byte are the same loss per byte of the targets' text, to compare models with different
tokenizers. LongPPL and the gain by context are of the same losses: see key_tokens.py.

Source: the sliding window of Press et al. 2022, arXiv 2108.12409, appendix B, with stride S.
Shapes:  c = context length, S = targets of a window, W = windows
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from skipwise.data.chat import ChatTokens
from skipwise.evaluation import processes
from skipwise.evaluation.prefill import logits_in_slices
from skipwise.evaluation.scoring import Tick
from skipwise.evaluation.tasks.key_tokens import (
    Reference,
    choose_key_tokens,
    exp_loss,
    gain_row,
    known_bounds,
    long_ppl_row,
    samples_of,
)
from skipwise.evaluation.tasks.task import Task, TaskInputs
from skipwise.report.intervals import clustered_mean
from skipwise.report.rows import Rows

_IGNORED = -100  # the label of torch's cross entropy for no target
_BEFORE = 16  # tokens decoded before the targets, so that both ends are cut alike


def perplexity(
    model: Any,
    documents: Sequence[np.ndarray],
    context_lengths: Sequence[int],
    *,
    tokenizer: Any = None,
    stride: int | None = None,
    num_windows: int = 32,
    batch_tokens: int = 16384,
    tick: Tick | None = None,
    reference: Reference | None = None,
) -> list[dict[str, Any]]:
    """Rows of results, two or three a context length: perplexity, bits per byte, gain by context.

    Args:
        documents: token ids; those shorter than the longest context length are left out. Of
            conversations (`ChatTokens`) only the assistant's tokens are targets.
        tokenizer: to count bytes; without it, and for conversations, there are no bits per byte.
        stride: S. Defaults to half the shortest context length, at most 512.
        num_windows: windows in total, spread evenly over the documents.
        tick: called with the number of tokens that went through the model.
        reference: of `find_reference` with the same documents, lengths, stride and windows: adds
            the gain at each length, and LongPPL at the longest.

    Returns:
        tidy rows with 95 % intervals over documents, of which there must be 5; no rows where no
        document is long enough for the shortest length. Context lengths beyond the longest
        document are left out. `samples` of a row are the losses of its windows, `targets` a digest
        of the tokens that were predicted: other longest lengths have others.
    """
    lengths = fitting_lengths(documents, context_lengths)
    if not lengths or not num_windows:
        return []
    windows, owners, labels = _targets(documents, lengths, stride, num_windows)
    num_targets = labels.shape[1]
    counts = (labels != _IGNORED).sum(1)
    num_samples = int(counts.sum())
    if not num_samples:
        return []
    all_count = num_samples == labels.size
    bytes_per_token = _bytes(tokenizer, windows, num_targets) / num_samples if all_count else 0
    targets = hashlib.sha1(labels.tobytes(), usedforsecurity=False).hexdigest()[:12]
    rows = []
    for c in lengths:
        token_losses = _losses(model, windows[:, -c:], labels, batch_tokens, tick)
        sums = token_losses.sum(1)
        mean = sums.sum() / num_samples  # windows of conversations have unequal counts
        losses = mean + (sums - mean * counts) / counts.mean()
        mean, low, high = clustered_mean(losses, owners)
        common = {"task": "perplexity", "context_length": c, "num_samples": num_samples}
        values = known_bounds([exp_loss(x) for x in (mean, low, high)])
        values |= {"targets": targets, **samples_of(losses, owners)}
        rows.append({**common, "metric": "perplexity", **values})
        if bytes_per_token:
            bits = math.log(2) * bytes_per_token
            values = {"value": mean / bits, "low": low / bits, "high": high / bits}
            finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
            rows.append({**common, "metric": "bits_per_byte", **finite})
        if reference is not None:
            found = [gain_row(sums, num_samples, reference, owners)]
            found += [long_ppl_row(token_losses, reference, owners)] if c == lengths[-1] else []
            rows += [{**common, **row} for row in found]
    return rows


def find_reference(
    model: Any,
    documents: Sequence[np.ndarray],
    context_lengths: Sequence[int],
    contexts: tuple[int, int],
    *,
    name: str,
    stride: int | None = None,
    num_windows: int = 32,
    batch_tokens: int = 16384,
) -> Reference:
    """The key tokens, and the losses of the evaluator that chooses them.

    Args:
        model: the evaluator. `contexts` are its short and its long context in tokens; each target
            is read with at least half of them before it.
    """
    lengths = fitting_lengths(documents, context_lengths)
    windows, _, labels = _targets(documents, lengths, stride, num_windows)
    short, long = (_sliding_losses(model, windows, labels, c, batch_tokens) for c in contexts)
    key = choose_key_tokens(short, long, labels != _IGNORED)
    sums = {"short": short.sum(1), "long": long.sum(1)}
    return Reference(evaluator=name, contexts=contexts, key=key, **sums)


def _targets(
    documents: Sequence[np.ndarray], lengths: Sequence[int], stride: int | None, num_windows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `_windows`, with the number of targets that follows from the lengths."""
    num_targets = max(1, min(stride or min(lengths[0] // 2, 512), lengths[0] - 1))
    return _windows(documents, lengths[-1], num_targets, num_windows)


def fitting_lengths(
    documents: Sequence[np.ndarray], context_lengths: Sequence[int]
) -> tuple[int, ...]:
    """The context lengths that the longest document has the tokens for, ascending."""
    longest = max((len(tokens) for tokens in documents), default=0)
    return tuple(c for c in sorted(context_lengths) if 1 < c <= longest)


def _windows(
    documents: Sequence[np.ndarray], length: int, num_targets: int, num_windows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(W, length) windows, (W,) the document each is from, (W, S) labels; these never overlap."""
    usable = [i for i, tokens in enumerate(documents) if len(tokens) >= length]
    room = {i: (len(documents[i]) - length) // num_targets + 1 for i in usable}
    counts = dict.fromkeys(usable, 0)
    left = min(num_windows, sum(room.values()))
    while left:
        for i in usable:
            if left and counts[i] < room[i]:
                counts[i] += 1
                left -= 1
    windows, owners, labels = [], [], []
    for i in usable:
        places = np.linspace(0, room[i] - 1, counts[i] + 2)[1:-1] if room[i] > counts[i] else None
        for j in range(counts[i]):
            start = (j if places is None else round(float(places[j]))) * num_targets
            window = documents[i][start : start + length]
            targets = np.array(window[-num_targets:], np.int64)
            if isinstance(window, ChatTokens):
                targets[window.masked[-num_targets:]] = _IGNORED
            windows.append(np.asarray(window, np.int64))
            owners.append(i)
            labels.append(targets)
    return np.stack(windows), np.array(owners), np.stack(labels)


def _losses(
    model: Any, windows: np.ndarray, labels: np.ndarray, batch_tokens: int, tick: Tick | None
) -> np.ndarray:
    """(W, S) loss of each label in nats; 0 where there is none."""

    def measure(own: Sequence[int]) -> list[np.ndarray]:
        return list(_own_losses(model, windows, labels, own, batch_tokens, tick))

    indices = range(len(windows))
    return np.stack(processes.shared(indices, measure, indices))


@torch.inference_mode()
def _own_losses(
    model: Any,
    windows: np.ndarray,
    labels: np.ndarray,
    own: Sequence[int],
    batch_tokens: int,
    tick: Tick | None,
) -> np.ndarray:
    length, num_targets = windows.shape[1], labels.shape[1]
    rows = max(1, batch_tokens // length)
    positions = torch.arange(length - num_targets - 1, length - 1)
    losses = []
    for start in range(0, len(own), rows):
        here = list(own[start : start + rows])
        ids = torch.from_numpy(windows[here]).to(model.device)
        targets = torch.from_numpy(labels[here])
        done, total = 0, torch.zeros(targets.shape, dtype=torch.float64)
        for logits in logits_in_slices(model, ids, positions):  # (B, k, V)
            size = logits.shape[1]
            for row in range(len(ids)):  # a row at a time: float32 copies stay small
                target = targets[row, done : done + size].to(logits.device)
                loss = cross_entropy(logits[row].float(), target, reduction="none")
                total[row, done : done + size] = loss.double().cpu()
            done += size
        losses.append(total.numpy())
        if tick is not None:
            tick(ids.numel())
    return np.concatenate(losses)


def _sliding_losses(
    model: Any, windows: np.ndarray, labels: np.ndarray, context: int, batch_tokens: int
) -> np.ndarray:
    """(W, S) loss of each label with half of `context` tokens, or up to all of it, before it."""
    num_targets, step = labels.shape[1], max(1, context // 2)
    losses = []
    for start in range(0, num_targets, step):
        piece = labels[:, start : start + step]
        end = windows.shape[1] - num_targets + start + piece.shape[1]
        seen = windows[:, max(0, end - context) : end]
        losses.append(_losses(model, seen, piece, batch_tokens, None))
    return np.concatenate(losses, axis=1)


def _bytes(tokenizer: Any, windows: np.ndarray, num_targets: int) -> int:
    """UTF-8 bytes of all targets; a character split between windows counts where it ends."""
    if tokenizer is None:
        return 0
    total = 0
    for window in windows:
        last = window[-num_targets - _BEFORE :].tolist()
        full, before = (
            tokenizer.decode(ids, clean_up_tokenization_spaces=False).rstrip("\ufffd")
            for ids in (last, last[:-num_targets])
        )
        total += len(full.encode()) - len(before.encode())
    return total


def _measure(inputs: TaskInputs) -> Rows:
    return perplexity(
        inputs.model,
        inputs.documents,
        inputs.lengths,
        tokenizer=inputs.tokenizer,
        stride=inputs.settings.perplexity_stride,
        num_windows=inputs.settings.perplexity_windows,
        batch_tokens=inputs.settings.batch_tokens,
        tick=inputs.tick,
        reference=inputs.reference,
    )


PERPLEXITY = Task(
    name="perplexity",
    measure=_measure,
    num_samples=lambda settings: settings.perplexity_windows,
    cache_key=lambda settings: (settings.perplexity_windows, settings.perplexity_stride),
    lengths="together",  # the shortest and the longest fix the targets of all
    text="required",
)
