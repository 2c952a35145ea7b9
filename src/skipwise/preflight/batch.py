"""Checks on real examples: tokenizer, documents, labels, and the effect of skipped positions.

Shapes:  B = batch, L = tokens of an example
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from skipwise.errors import Check
from skipwise.models.attention.masks import FLEX, is_hybrid, sliding_reach
from skipwise.pose.samplers import IGNORE_INDEX

_PROBED = 256  # positions whose logits are compared


def check_tokenizer(tokenizer: Any, vocab_size: int, batch: dict[str, torch.Tensor]) -> Check:
    """The tokenizer's ids, and those of a real batch, fit the embedding."""
    largest = max(len(tokenizer) - 1, int(batch["input_ids"].max()))
    fits = largest < vocab_size
    return Check(
        name="tokenizer",
        passed=fits,
        detail=f"{len(tokenizer):,} tokens in an embedding of {vocab_size:,}"
        if fits
        else f"token id {largest:,} is beyond the embedding of {vocab_size:,}: "
        "this is another model's tokenizer",
    )


def check_documents(
    longest: int, num_documents: int, train_length: int, target: int, left_out: str = ""
) -> Check:
    """There are documents to cut examples from; `left_out` says what was dropped or packed."""
    enough = longest >= train_length
    found = f"{num_documents:,} with {train_length:,} tokens or more, the longest {longest:,}"
    found += f"; {left_out}" if left_out else ""
    found += "" if longest >= target else f"; none reaches {target:,}: far text is never aligned"
    return Check(
        name="documents",
        passed=enough,
        detail=found
        if enough
        else f"the longest has {longest:,} tokens and an example needs {train_length:,}",
    )


def check_labels(items: list[dict[str, Any]]) -> Check:
    """A label right after a jump of the text is masked: nothing before it predicts it.

    Args:
        items: examples of the data set, `labels` (L,) with the `example` they were cut by.
    """
    jumps = open_labels = 0
    for item in items:
        example = item["example"]
        firsts = (np.cumsum(example.lengths) - example.lengths)[example.jumps()]
        jumps += len(firsts)
        open_labels += int((item["labels"][firsts] != IGNORE_INDEX).sum())
    return Check(
        name="labels",
        passed=open_labels == 0,
        detail=f"{jumps} jumps of the text in a batch, the label after each masked"
        if open_labels == 0
        else f"{open_labels} labels stand right after a jump of the text: set them to -100",
    )


def check_batch(
    model: Any,
    batch: dict[str, Any],
    autocast: Callable[..., Any] = nullcontext,
    inner: Any = None,
) -> list[Check]:
    """Chunk 2 learns from chunk 1, and chunk 1 not from chunk 2, on a real batch.

    The gradient of the second chunk's loss with respect to the first chunk's embeddings is zero
    when the mask cuts them off from each other (transformers takes a skip in `position_ids`
    without a mask for a packed boundary). The other way round it must be zero. Runs in training
    mode without a cache, as the Trainer does, with gradient checkpointing as configured.

    Args:
        batch: from the collator; `input_ids`, `labels`, `position_ids` (B, L) and the mask.
        autocast: gives the context manager to run a forward pass in.
        inner: the model inside, where `model` is the wrapper that an engine put around it.
    """
    assert "chunk_ids" not in batch, "a model ignores them: masks.pack_key_weights comes first"
    inner = model if inner is None else inner
    skips = (batch["position_ids"].diff(dim=1) != 1).float()  # (B, L-1)
    if not bool(skips.any()):
        detail = "plain positions in this batch: no chunk to cut off"
        return [Check(name="chunks see each other", passed=True, detail=detail)]
    # the example whose first skip is nearest the middle tells most
    first = torch.where(skips.bool().any(1), skips.argmax(1) + 1, 0)
    row = int((first - batch["input_ids"].shape[1] // 2).abs().argmin())
    cut = int(first[row])
    one = _row(batch, row)
    inputs = {k: v for k, v in one.items() if k != "labels"}
    if getattr(inner.config, "output_router_logits", False):
        inputs["output_router_logits"] = False  # the routers' loss is of all chunks
    index = torch.arange(one["labels"].shape[1], device=one["labels"].device)
    late_labels = one["labels"].where(index > cut, IGNORE_INDEX)
    early_labels = one["labels"].where(index < cut, IGNORE_INDEX)
    with _embeddings(inner) as captured:
        late = _gradient(model, {**inputs, "labels": late_labels}, captured, autocast)
        early = _gradient(model, {**inputs, "labels": early_labels}, captured, autocast)
    model.zero_grad()
    seen = float(late[0, :cut].abs().max())
    leak = float(early[0, cut:].abs().max())
    finite = bool(torch.isfinite(late).all())
    skip = int(one["position_ids"][0, cut] - one["position_ids"][0, cut - 1])
    learns = Check(
        name="chunks see each other",
        passed=finite and seen > 0,
        detail=f"gradient of chunk 2's loss on chunk 1 up to {seen:.1e} (skip of {skip})"
        if finite and seen > 0
        else "chunk 2 gets no gradient from chunk 1: the attention mask cuts them off; send an "
        "attention_mask of ones with position_ids"
        if finite
        else "the gradient is not finite: the weights or the dtype are at fault",
    )
    causal = Check(
        name="no look ahead",
        passed=leak == 0,
        detail="chunk 1's loss does not depend on chunk 2"
        if leak == 0
        else "chunk 1's loss depends on chunk 2: the attention mask is not causal",
    )
    checks = [learns, causal]
    if finite and seen > 0:
        checks.append(_check_skips(model, inputs, cut, autocast, inner))
    if is_hybrid(inner.config):
        checks.append(_check_sliding(inner.config, batch))
    return checks


def _gradient(
    model: Any,
    inputs: dict[str, Any],
    captured: list[torch.Tensor],
    autocast: Callable[..., Any],
) -> torch.Tensor:
    """(1, L, width) of the model's own loss with respect to the embeddings; 0 without labels."""
    captured.clear()
    with autocast():
        loss = model(**inputs, use_cache=False).loss
    (gradient,) = torch.autograd.grad(loss, captured[0])
    if not bool((inputs["labels"][:, 1:] != IGNORE_INDEX).any()):
        return torch.zeros_like(gradient)
    return gradient


def _row(batch: dict[str, Any], row: int) -> dict[str, Any]:
    """One example of a batch, whose mask may be one for each kind of layer."""
    return {
        key: _row(value, row)
        if isinstance(value, dict)
        else value
        if value is None
        else value[row : row + 1]
        for key, value in batch.items()
    }


@torch.no_grad()
def _check_skips(
    model: Any, inputs: dict[str, Any], cut: int, autocast: Callable[..., Any], inner: Any
) -> Check:
    """What follows a skip depends on how far it is.

    Rotary positions are relative: moving all of them changes nothing but rounding, and taking the
    skips out must change more than that. It does not where a model ignores `position_ids`, or where
    its full-attention layers have no positions (Cohere 2, EXAONE 4). In float32 where the weights
    and the attention implementation are, for there rounding is smallest.
    """
    mixed = (inner.config._attn_implementation or "").startswith(("flash", FLEX)) or any(
        parameter.dtype != torch.float32 for parameter in inner.parameters()
    )
    if not mixed:  # a mask made for bf16 arithmetic
        inputs = {**inputs, "attention_mask": _in_float32(inputs.get("attention_mask"))}
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    length = inputs["position_ids"].shape[1]
    kept = torch.arange(cut, length, max(1, (length - cut) // _PROBED))  # all would be large
    sliced = "logits_to_keep" in inspect.signature(type(base).forward).parameters

    def logits(positions: torch.Tensor) -> torch.Tensor:
        devices = [positions.device] if positions.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), autocast() if mixed else nullcontext():
            torch.manual_seed(0)  # the same dropout each time
            own = {**inputs, "position_ids": positions}
            if sliced:
                return model(**own, logits_to_keep=kept, use_cache=False).logits[0].float()
            return model(**own, use_cache=False).logits[0, kept].float()

    positions = inputs["position_ids"]
    plain = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    further = int((positions - plain)[0, -1])
    as_it_is = logits(positions)
    effect = float((logits(plain) - as_it_is).abs().mean())
    rounding = float((logits(positions + further) - as_it_is).abs().mean())
    takes_effect = effect > 1.5 * rounding
    return Check(
        name="skips take effect",
        passed=takes_effect,
        detail=f"plain positions change the logits by {effect:.0e} (rounding: {rounding:.0e})"
        if takes_effect
        else f"plain positions give the same logits (to {effect:.0e}; rounding: {rounding:.0e}): "
        "the layers that look far back have no positions to learn, so PoSE would teach nothing",
    )


def _in_float32(mask: Any) -> Any:
    """The mask, or the masks by kind of layer, as float32 where they are additive."""
    if isinstance(mask, dict):
        return {kind: _in_float32(one) for kind, one in mask.items()}
    return mask.float() if mask is not None and mask.is_floating_point() else mask


def _check_sliding(config: Any, batch: dict[str, Any]) -> Check:
    reach, window = sliding_reach(config, batch), config.sliding_window
    return Check(
        name="sliding layers",
        passed=reach < window,
        detail=f"see {reach} positions back at most, as in a text"
        if reach < window
        else f"see {reach:,} positions back across a skip, and in a text {window - 1:,}: send a "
        "mask for each kind of layer (models.masks.with_layer_masks)",
    )


@contextmanager
def _embeddings(model: Any) -> Iterator[list[torch.Tensor]]:
    """Catch the input embeddings of a forward pass as a leaf that gradients can be taken of."""
    captured: list[torch.Tensor] = []

    def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        leaf = output.detach().requires_grad_(True)
        captured.append(leaf)
        return leaf

    handle = model.get_input_embeddings().register_forward_hook(hook)
    training = model.training
    model.train()
    try:
        yield captured
    finally:
        model.train(training)
        handle.remove()
