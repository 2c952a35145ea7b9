"""Checks on real examples: tokenizer, documents, labels, and the effect of skipped positions.

Shapes:  B = batch, L = tokens per example
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


def check_tokenizer(
    tokenizer: Any,
    vocab_size: int,
    batch: dict[str, torch.Tensor],
    largest_in_text: Callable[[], int] | None = None,
) -> Check:
    """All token ids, of the tokenizer and of the text, fit the embedding.

    A special token that was added without a row in the embedding is allowed if no text holds it,
    as [PAD] in many published tokenizers.

    Args:
        largest_in_text: the largest token id of all documents; the batch is one example. Called
            only if it matters.
    """
    in_text = int(batch["input_ids"].max())
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    largest = max(in_text, *vocabulary.values())
    beyond = {i: token for token, i in vocabulary.items() if i >= vocab_size}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    detail = f"the embedding of {vocab_size:,} has room for all {len(tokenizer):,} tokens"
    fits = largest < vocab_size
    if not fits and all(i in added for i in beyond):
        in_text = max(in_text, largest_in_text() if largest_in_text else 0)
        fits = in_text < vocab_size
        names = ", ".join(f"{beyond[i]} (id {i:,})" for i in sorted(beyond)[:3])
        names += ", ..." if len(beyond) > 3 else ""
        text = "no text holds" if largest_in_text else "the first example does not hold"
        detail = f"{text} {names}, which the embedding of {vocab_size:,} has no row for"
        if not fits:
            name = beyond.get(in_text, "a token")
            detail = (
                f"the text holds {name} (id {in_text:,}), and the embedding of {vocab_size:,} has "
                f"no row for it: take {name} out of the text, or give the model a row with "
                f"model.resize_token_embeddings({largest + 1}) and save it"
            )
    elif not fits:
        detail = (
            f"token id {largest:,} is beyond the embedding of {vocab_size:,}: "
            "this is another model's tokenizer"
        )
    numbers = {"largest_token_id": largest, "vocab_size": vocab_size}
    return Check(name="tokenizer", passed=fits, detail=detail, numbers=numbers)


def check_documents(
    longest: int, num_documents: int, train_length: int, target: int, left_out: str = ""
) -> Check:
    """There are documents to cut examples from; `left_out` says what was dropped or packed."""
    enough = longest >= train_length
    detail = f"{num_documents:,} have at least {train_length:,} tokens; the longest has {longest:,}"
    detail += f"; {left_out}" if left_out else ""
    if longest < target:
        detail += f"; none reaches {target:,}, so text at that distance is never seen"
    if not enough:
        detail = f"the longest has {longest:,} tokens, and an example needs {train_length:,}"
    numbers = {"num_documents": num_documents, "longest": longest}
    return Check(name="documents", passed=enough, detail=detail, numbers=numbers)


def check_labels(items: list[dict[str, Any]]) -> Check:
    """The first label after a gap in the text is masked: the tokens before do not predict it.

    Args:
        items: examples of the data set, with `labels` (L,) and the `example` that they come from.
    """
    jumps = open_labels = 0
    for item in items:
        example = item["example"]
        firsts = (np.cumsum(example.lengths) - example.lengths)[example.jumps()]
        jumps += len(firsts)
        open_labels += int((item["labels"][firsts] != IGNORE_INDEX).sum())
    detail = "the first label after each gap in the text is masked"
    if open_labels:
        detail = f"{open_labels} labels come right after a gap in the text: set them to -100"
    numbers = {"gaps": jumps, "unmasked_labels": open_labels}
    return Check(name="labels", passed=open_labels == 0, detail=detail, numbers=numbers)


def check_batch(
    model: Any, batch: dict[str, Any], autocast: Callable[..., Any] = nullcontext, inner: Any = None
) -> list[Check]:
    """Chunk 2 learns from chunk 1, but chunk 1 does not learn from chunk 2, on a real batch.

    The gradient of chunk 2's loss with respect to chunk 1's embeddings is zero if the mask
    separates the chunks: without a mask, transformers takes a skip in `position_ids` for the
    boundary of a packed sequence. The opposite gradient must be zero. Runs in training mode without
    a cache, as the Trainer does, with gradient checkpointing as configured.

    Args:
        batch: from the collator; `input_ids`, `labels`, `position_ids` (B, L) and the mask.
        autocast: makes the context manager for a forward pass.
        inner: the model inside `model`, if an engine has wrapped it.
    """
    assert "chunk_ids" not in batch, "models ignore chunk_ids: call masks.pack_key_weights first"
    inner = model if inner is None else inner
    skips = (batch["position_ids"].diff(dim=1) != 1).float()  # (B, L-1)
    if not bool(skips.any()):
        detail = "this batch has no skips, so there is nothing to check"
        return [Check(name="chunks see each other", passed=True, detail=detail)]
    # the most informative example has its first skip nearest the middle
    first = torch.where(skips.bool().any(1), skips.argmax(1) + 1, 0)
    row = int((first - batch["input_ids"].shape[1] // 2).abs().argmin())
    cut = int(first[row])
    one = _row(batch, row)
    inputs = {k: v for k, v in one.items() if k != "labels"}
    if getattr(inner.config, "output_router_logits", False):
        inputs["output_router_logits"] = False  # the routers' loss covers all chunks
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
    learns, numbers = finite and seen > 0, {"largest_gradient": seen, "skip": skip}
    detail = f"chunk 2 learns from chunk 1 across a skip of {skip:,} positions"
    if not finite:
        detail, numbers = "the gradient is not finite: check the weights and the dtype", {}
    elif not seen:
        detail = (
            "chunk 2 gets no gradient from chunk 1: the attention mask separates them; send an "
            "attention_mask of ones with position_ids"
        )
    checks = [Check(name="chunks see each other", passed=learns, detail=detail, numbers=numbers)]
    detail = "chunk 1's loss does not depend on chunk 2"
    if leak != 0:
        detail = "chunk 1's loss depends on chunk 2: the attention mask is not causal"
    checks.append(Check(name="no look ahead", passed=leak == 0, detail=detail))
    if learns:
        checks.append(_check_skips(model, inputs, cut, autocast, inner))
    if is_hybrid(inner.config):
        checks.append(_check_sliding(inner.config, batch))
    return checks


def _gradient(
    model: Any, inputs: dict[str, Any], captured: list[torch.Tensor], autocast: Callable[..., Any]
) -> torch.Tensor:
    """(1, L, width) gradient of the model's own loss at the embeddings; 0 without labels."""
    captured.clear()
    with autocast():
        loss = model(**inputs, use_cache=False).loss
    (gradient,) = torch.autograd.grad(loss, captured[0])
    if not bool((inputs["labels"][:, 1:] != IGNORE_INDEX).any()):
        return torch.zeros_like(gradient)
    return gradient


def _row(batch: dict[str, Any], row: int) -> dict[str, Any]:
    """One example of a batch; the mask may be a dict with one for each layer type."""
    out = {}
    for key, value in batch.items():
        nested = isinstance(value, dict)
        out[key] = _row(value, row) if nested else None if value is None else value[row : row + 1]
    return out


@torch.no_grad()
def _check_skips(
    model: Any, inputs: dict[str, Any], cut: int, autocast: Callable[..., Any], inner: Any
) -> Check:
    """The logits after a skip depend on its size.

    Rotary positions are relative: shifting all of them changes the logits only by rounding, and
    halving the skips must change them more. It does not if the model ignores `position_ids`, if its
    full-attention layers have no positions (Cohere 2, EXAONE 4), or if the mask separates the
    chunks and only the state of other layers crosses the skip (Qwen 3 Next without a mask). Runs in
    float32 if the weights and the attention implementation allow it, because rounding is smallest
    there.
    """
    attention = inner.config._attn_implementation or ""
    mixed = attention.startswith(("flash", FLEX)) or "/" in attention  # a kernel of the Hub
    mixed = mixed or any(p.dtype != torch.float32 for p in inner.parameters())
    if not mixed:  # the mask was made for bf16
        inputs = {**inputs, "attention_mask": _in_float32(inputs.get("attention_mask"))}
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    length = inputs["position_ids"].shape[1]
    kept = torch.arange(cut, length, max(1, (length - cut) // _PROBED))  # to save memory
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
    shift = int((positions - plain)[0, -1])
    if "llama_4_scaling_beta" in (getattr(inner.config, "rope_parameters", None) or {}):
        shift = 1  # queries also grow with their own position (Ministral 3)
    skipped = logits(positions)
    effect = float((logits(plain + (positions - plain) // 2) - skipped).abs().mean())
    rounding = float((logits(positions + shift) - skipped).abs().mean())
    takes_effect = effect > 1.5 * rounding
    detail = "the skips change the logits by more than rounding does"
    if not takes_effect and inputs.get("attention_mask") is None:
        detail = (
            "the size of a skip does not change the logits: the attention mask separates the "
            "chunks, so PoSE would teach nothing; send an attention_mask of ones with position_ids"
        )
    elif not takes_effect:
        detail = (
            "the size of a skip does not change the logits: the layers that look far back have no "
            "positions to learn, so PoSE would teach nothing"
        )
    numbers = {"effect": effect, "rounding": rounding}
    return Check(name="skips take effect", passed=takes_effect, detail=detail, numbers=numbers)


def _in_float32(mask: Any) -> Any:
    """The mask, or the masks by layer type, in float32 if additive."""
    if isinstance(mask, dict):
        return {kind: _in_float32(one) for kind, one in mask.items()}
    return mask.float() if mask is not None and mask.is_floating_point() else mask


def _check_sliding(config: Any, batch: dict[str, Any]) -> Check:
    reach, window = sliding_reach(config, batch), config.sliding_window
    detail = "sliding layers see only distances that ordinary text has"
    if reach >= window:
        detail = (
            f"sliding layers see {reach:,} positions back across a skip, but only {window - 1:,} "
            "in ordinary text: send a mask for each layer type "
            "(models.attention.masks.with_layer_masks)"
        )
    numbers = {"reach": reach, "sliding_window": window}
    return Check(name="sliding layers", passed=reach < window, detail=detail, numbers=numbers)


@contextmanager
def _embeddings(model: Any) -> Iterator[list[torch.Tensor]]:
    """Capture a forward pass's input embeddings as a leaf, to take gradients at."""
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
