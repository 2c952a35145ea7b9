"""Next-token loss of which the logits never stand whole.

Logits of 8,192 tokens and a vocabulary of 128k take 4 GiB in float32, and a plain loss holds them
about three times: more than a model's activations under gradient checkpointing. Here the model's
backbone runs once, and its head on a slice of the hidden states at a time, each slice's logits
being dropped and computed again in the backward pass. What stands between hidden states and logits
differs by family (soft-capping in Gemma 2, a scale in Cohere and Granite), so it is not written
down again here: the model's own forward runs on each slice, with the backbone's output put in.

It replaces `forward` on the one loaded model, as accelerate does for autocast: wrappers (DDP,
FSDP2, DeepSpeed, peft) call it like the plain one, and nothing of it is saved.

Shapes:  B = batch, L = tokens of an example, V = vocabulary, C = tokens of a slice
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

from skipwise.errors import SkipwiseError
from skipwise.positions import IGNORE_INDEX

SLICE = 512  # C: at 128k of vocabulary 0.8 GiB in the head (time: benchmarks/loss_memory.py)
_SMALL = 64 << 20  # bytes of float32 logits up to which slices save nothing worth having


def is_chunked(loss: str, batch_size: int, train_length: int, vocab_size: int) -> bool:
    """What `training.loss` means for a batch: auto cuts where the logits are large."""
    return loss == "chunked" or (
        loss == "auto" and batch_size * train_length * vocab_size * 4 > _SMALL
    )


def chunk_loss(model: Any) -> None:
    """Make the model compute its loss in slices whenever it is given labels.

    With labels the output holds `loss` alone; without them `forward` is the plain one. As in
    transformers, `num_items_in_batch` divides the sum of the loss; without it the mean is taken.

    Raises:
        SkipwiseError: the model adds another loss to its own (experts with a router loss), or
            keeps its backbone where it cannot be found.
    """
    if getattr(model.config, "output_router_logits", False):
        raise SkipwiseError(
            "training.loss: chunked leaves out the router's loss (output_router_logits) of this "
            "model\ntype training.loss=whole"
        )
    name = model.base_model_prefix
    if name not in model._modules or model.get_output_embeddings() is None:
        raise SkipwiseError(
            f"training.loss: chunked: {type(model).__name__} has no head of its own behind a "
            "backbone\ntype training.loss=whole"
        )
    plain = model.forward

    def forward(self: Any, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        if labels is None:
            return plain(*args, **kwargs)
        count = kwargs.pop("num_items_in_batch", None)
        kwargs.pop("return_dict", None)  # peft sends it
        output = self._modules[name](*args, **kwargs)
        head = self.get_output_embeddings()
        bare, own = head.forward, "forward" in vars(head)
        # The head is called once, for a sharded one is gathered around its call.
        head.forward = lambda hidden: _in_slices(
            self, plain, name, head, bare, hidden, output, labels
        )
        try:
            total = head(output[0])
        finally:
            if own:
                head.forward = bare
            else:
                del head.forward
        if count is None:
            count = (labels[:, 1:] != IGNORE_INDEX).sum()
        loss = total / (count.to(total.device) if torch.is_tensor(count) else count)
        return CausalLMOutputWithPast(loss=loss)

    model.forward = MethodType(forward, model)


class _StandIn(torch.nn.Module):
    """Stands in a module's place with another forward; everything else is the module's own."""

    def __init__(self, module: Any, forward: Callable[..., Any]) -> None:
        super().__init__()
        object.__setattr__(self, "module", module)  # not as a child: names and hooks stay its own
        self.forward = forward

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "module"), name)


def _in_slices(
    model: Any,
    plain: Callable[..., Any],
    name: str,
    head: Any,
    bare: Callable[..., Any],
    hidden: torch.Tensor,
    output: Any,
    labels: torch.Tensor,
) -> torch.Tensor:
    """The sum of the loss over all labels, the head on C tokens at a time.

    Args:
        plain: the model's own forward.
        name: of the backbone in the model.
        bare: the head's own forward, without what a wrapper hooks around it.
        hidden: (B, L, width) what the backbone gave, as the head gets it.
        output: all that the backbone gave.
    """
    targets = pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].to(hidden.device)  # of each position
    parent, leaf = _place(model, head)

    def loss(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        shown = copy.copy(output)
        shown["last_hidden_state"] = states
        backbone = model._modules[name]
        model._modules[name] = _StandIn(backbone, lambda *args, **kwargs: shown)
        parent._modules[leaf] = _StandIn(head, bare)
        try:
            ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
            logits = plain(input_ids=ids, use_cache=False).logits
        finally:
            model._modules[name] = backbone
            parent._modules[leaf] = head
        logits = logits.float().view(-1, logits.shape[-1])
        return cross_entropy(logits, wanted.reshape(-1), ignore_index=IGNORE_INDEX, reduction="sum")

    step = max(1, SLICE // hidden.shape[0])
    slices = zip(hidden.split(step, 1), targets.split(step, 1), strict=True)
    parts: list[Any] = [
        checkpoint(loss, states, wanted, use_reentrant=False, preserve_rng_state=False)
        for states, wanted in slices
    ]
    return torch.stack(parts).sum()


def _place(model: Any, head: Any) -> tuple[Any, str]:
    """(the module that holds the head, its name there)."""
    for parent in model.modules():
        for leaf, child in parent._modules.items():
            if child is head:
                return parent, leaf
    raise AssertionError("the head is no part of the model")
