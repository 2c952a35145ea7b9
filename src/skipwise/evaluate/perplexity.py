"""Perplexity by context length: the same target tokens, seen with more and more context.

Windows of the longest context are laid over each document; the last S tokens of a window are its
targets, scored at every context length c with the c - S tokens before them. So a lower value at a
longer context means that the model uses it, not that the text is easier there.

Source: the sliding window of Press et al. 2022, arXiv 2108.12409, appendix B, with stride S.
Shapes:  c = context length, S = targets of a window, W = windows
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from skipwise.evaluate.forward import logits_at
from skipwise.evaluate.intervals import clustered_mean

_LOGITS = 1 << 27  # numbers of logits held at once, at most


def perplexity(
    model: Any,
    documents: Sequence[np.ndarray],
    context_lengths: Sequence[int],
    *,
    num_windows: int = 32,
    batch_tokens: int = 16384,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Rows of results, one a context length.

    Args:
        documents: token ids; those below the longest context length are left out.
        num_windows: windows in all, spread evenly over the documents.

    Returns:
        tidy rows with the perplexity and its 95 % interval over documents; no rows where no
        document is long enough for the shortest length. Context lengths beyond the longest
        document are left out.
    """
    longest = max((len(tokens) for tokens in documents), default=0)
    lengths = [c for c in sorted(context_lengths) if c <= longest]
    if not lengths or not num_windows:
        return []
    num_targets = max(1, min(lengths[0] // 2, 512))
    windows, owners = _windows(documents, lengths[-1], num_targets, num_windows)
    rows = []
    bar = tqdm(desc="perplexity", total=len(windows) * sum(lengths), unit=" tokens", disable=None)
    bar.disable = bar.disable or not progress
    with bar:
        for c in lengths:
            losses = _losses(model, windows[:, -c:], num_targets, batch_tokens, bar)
            mean, low, high = clustered_mean(losses, owners)
            rows.append(
                {
                    "task": "perplexity",
                    "metric": "perplexity",
                    "context_length": c,
                    "value": _exp(mean),
                    "low": _exp(low),
                    "high": _exp(high),
                    "num_samples": len(windows) * num_targets,
                }
            )
    return rows


def _windows(
    documents: Sequence[np.ndarray], length: int, num_targets: int, num_windows: int
) -> tuple[np.ndarray, np.ndarray]:
    """(W, length) windows and (W,) the document each is from; targets never overlap."""
    usable = [i for i, tokens in enumerate(documents) if len(tokens) >= length]
    room = {i: (len(documents[i]) - length) // num_targets + 1 for i in usable}
    counts = dict.fromkeys(usable, 0)
    left = min(num_windows, sum(room.values()))
    while left:
        for i in usable:
            if left and counts[i] < room[i]:
                counts[i] += 1
                left -= 1
    windows, owners = [], []
    for i in usable:
        places = np.linspace(0, room[i] - 1, counts[i] + 2)[1:-1] if room[i] > counts[i] else None
        for j in range(counts[i]):
            start = (j if places is None else round(float(places[j]))) * num_targets
            windows.append(np.asarray(documents[i][start : start + length], np.int64))
            owners.append(i)
    return np.stack(windows), np.array(owners)


@torch.inference_mode()
def _losses(
    model: Any, windows: np.ndarray, num_targets: int, batch_tokens: int, bar: Any
) -> np.ndarray:
    """(W,) mean loss of each window's targets, in nats."""
    length = windows.shape[1]
    vocabulary = model.get_output_embeddings().weight.shape[0]
    rows = max(1, min(batch_tokens // length, _LOGITS // (num_targets * vocabulary)))
    positions = torch.arange(length - num_targets - 1, length - 1)
    losses = []
    for start in range(0, len(windows), rows):
        ids = torch.from_numpy(windows[start : start + rows]).to(model.device)
        logits = logits_at(model, ids, positions)  # (B, S, V)
        targets = ids[:, -num_targets:]
        loss = torch.stack(  # a row at a time: float32 copies stay small
            [
                torch.nn.functional.cross_entropy(row.float(), target)
                for row, target in zip(logits, targets, strict=True)
            ]
        )
        losses.append(loss.double().cpu().numpy())
        bar.update(ids.numel())
    return np.concatenate(losses)


def _exp(loss: float) -> float | None:
    """Perplexity; None where it is not a finite number (JSON has none)."""
    value = math.exp(loss) if loss < 700 else math.inf
    return value if math.isfinite(value) else None
