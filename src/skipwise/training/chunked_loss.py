"""Next-token loss computed in slices, without materializing all logits.

With 8,192 tokens and a vocabulary of 128k, float32 logits take 4 GiB, and a plain loss holds about
three copies: more than the activations under gradient checkpointing. Here the backbone runs once.
Then the head runs on one slice of hidden states at a time; each slice's logits are dropped after
use and computed again in the backward pass. Some families change the logits (soft-capping in
Gemma 2, a scale in Cohere and Granite). So each slice goes through the model's own `forward`, with
the backbone replaced by its output.

`chunk_loss` replaces `forward` on the loaded model, as accelerate does for autocast. Wrappers (DDP,
FSDP2, DeepSpeed, peft) call it as usual, and nothing of it is saved.

With a `Distillation` the model also learns the base model's predictions in the first chunk of each
example, where text and positions are those of an ordinary short text.

Shapes:  B = batch, L = tokens per example, V = vocabulary, C = tokens per slice,
         S = tokens of the longest first chunk in the batch
Source:  distillation by KL(teacher || student), Hinton et al. 2015, arXiv 1503.02531
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax, nll_loss, pad
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

from skipwise.config.batch import SLICE
from skipwise.errors import SkipwiseError
from skipwise.pose.samplers import IGNORE_INDEX


@dataclass(kw_only=True)
class Distillation:
    """The teacher of the first chunks, and the KL divergence summed since `take_divergence`."""

    teacher: Any  # the base model (teacher.py), in eval mode, not a submodule of the model
    weight: float  # of the divergence per distilled token, relative to the loss per label
    together: bool = False  # the teacher is sharded, and some passes of a step have none taught
    _kl: list[torch.Tensor] = field(default_factory=list)  # sums over distilled tokens
    _counts: list[torch.Tensor] = field(default_factory=list)

    @torch.no_grad()
    def run_teacher(self, input_ids: torch.Tensor, first_lengths: torch.Tensor) -> Any:
        """Output of the teacher's backbone for the first S tokens, at positions 0 .. S-1."""
        ids = input_ids[:, : int(first_lengths.max())]
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return self.teacher._modules[self.teacher.base_model_prefix](
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=positions,
            use_cache=False,
        )

    def rows(self, first_lengths: torch.Tensor) -> torch.Tensor | None:
        """Indices of the examples that are taught; None if there are none in any process.

        A process without one runs a sharded teacher for its first example, because the others wait.
        """
        taught = first_lengths.nonzero()[:, 0]
        if self.together:
            count = torch.tensor([len(taught)], device=first_lengths.device)
            torch.distributed.all_reduce(count)
            if count.item() and not len(taught):
                return torch.zeros_like(first_lengths[:1])
        return taught if len(taught) else None

    def logits(self, output: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        """The function from a slice of the states in `run_teacher`'s output to logits (B, C, V)."""
        head = self.teacher.get_output_embeddings()
        return torch.no_grad()(_logits_function(self.teacher, self.teacher.forward, output, head))

    def add(self, divergence: torch.Tensor, count: torch.Tensor) -> None:
        self._kl.append(divergence)
        self._counts.append(count)

    def take_divergence(self) -> tuple[float, float]:
        """(sum of KL(teacher || model), number of distilled tokens) since the last call."""
        divergence, count = (float(sum(values)) for values in (self._kl, self._counts))
        self._kl.clear()
        self._counts.clear()
        return divergence, count


def full_loss_reason(model: Any) -> str:
    """Why a model's loss cannot be computed in slices; "" if it can."""
    if getattr(model.config, "output_router_logits", False):
        return "omits this model's router loss (output_router_logits)"
    if model.base_model_prefix not in model._modules or model.get_output_embeddings() is None:
        return f"finds no output head after a backbone in {type(model).__name__}"
    return ""


def chunk_loss(model: Any, distillation: Distillation | None = None) -> None:
    """Make the model compute its loss in slices whenever it gets labels.

    With labels the output holds `loss` alone. Without labels `forward` is unchanged. As in
    transformers, `num_items_in_batch` divides the summed loss; without it the loss is the mean.

    Args:
        distillation: adds w KL(teacher || model) at the first `first_lengths` (B,) tokens of each
            example; 0 and a batch without `first_lengths` are not distilled.

    Raises:
        SkipwiseError: the model adds a router loss, or its backbone or head cannot be found.
    """
    if reason := full_loss_reason(model):
        raise SkipwiseError(f"training.loss: chunked {reason}\nset training.loss=full")
    original, name = model.forward, model.base_model_prefix

    def forward(
        self: Any, *args: Any, labels: Any = None, first_lengths: Any = None, **kwargs: Any
    ) -> Any:
        if labels is None:
            return original(*args, **kwargs)
        count = kwargs.pop("num_items_in_batch", None)
        kwargs.pop("return_dict", None)  # peft sends it
        teacher = None
        if distillation is not None and first_lengths is not None:
            rows = distillation.rows(first_lengths)
            if rows is not None:
                teacher = _TeacherTargets(distillation, kwargs["input_ids"], first_lengths, rows)
        output = self._modules[name](*args, **kwargs)
        head = self.get_output_embeddings()
        head_forward, patched = head.forward, "forward" in vars(head)
        # One call of the head: a sharded head is gathered once per call.
        head.forward = lambda hidden: _sliced_loss(
            _logits_function(self, original, output, head, head_forward), hidden, labels, teacher
        )
        try:
            total = head(output[0])
        finally:
            if patched:
                head.forward = head_forward
            else:
                del head.forward
        if count is None:
            count = (labels[:, 1:] != IGNORE_INDEX).sum()
        loss = total / (count.to(total.device) if torch.is_tensor(count) else count)
        return CausalLMOutputWithPast(loss=loss)

    model.forward = MethodType(forward, model)


class _ForwardProxy(torch.nn.Module):
    """A module with another `forward`. All other attributes are those of the original module."""

    def __init__(self, module: Any, forward: Callable[..., Any]) -> None:
        super().__init__()
        object.__setattr__(self, "module", module)  # not as a submodule
        self.forward = forward

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "module"), name)


class _TeacherTargets:
    """The teacher's predictions for the R taught examples, one slice of tokens at a time."""

    def __init__(
        self,
        distillation: Distillation,
        input_ids: torch.Tensor,
        first_lengths: torch.Tensor,
        rows: torch.Tensor,
    ):
        self.distillation, self.rows = distillation, rows
        self.first_lengths = first_lengths[rows]
        output = distillation.run_teacher(input_ids[rows], self.first_lengths.clamp(min=1))
        self.states = output[0]  # (R, S, width)
        self.logits = distillation.logits(output)

    def divergence(self, ours: torch.Tensor, start: int) -> torch.Tensor:
        """The sum of KL(teacher || model) over those of the C tokens that are in the first chunk.

        The prediction at token i uses no later token, so only i itself must be in the first chunk.

        Args:
            ours: (B, C, V) log-probabilities of the model.
            start: index of the first of the C tokens.
        """
        states = self.states[:, start : start + ours.shape[1]]
        size = states.shape[1]
        theirs = log_softmax(self.logits(states).float(), -1)
        ours = ours[:, :size] if len(self.rows) == len(ours) else ours[self.rows, :size]
        divergence = kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
        index = torch.arange(start, start + size, device=divergence.device)
        return divergence.where(index < self.first_lengths[:, None], 0.0).sum()


def _sliced_loss(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    labels: torch.Tensor,
    teacher: _TeacherTargets | None,
) -> torch.Tensor:
    """The loss summed over all labels; the head runs on C tokens at a time.

    Args:
        head: function from a slice of hidden states to logits (B, C, V).
        hidden: (B, L, width) input of the head.
    """
    targets = pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].to(hidden.device)

    def loss(
        states: torch.Tensor, target: torch.Tensor, start: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ours = log_softmax(head(states).float(), -1)
        rows = ours.view(-1, ours.shape[-1])
        total = nll_loss(rows, target.reshape(-1), ignore_index=IGNORE_INDEX, reduction="sum")
        if teacher is None or start >= teacher.states.shape[1]:
            return total, None
        divergence = teacher.divergence(ours, start)
        return total + teacher.distillation.weight * divergence, divergence.detach()

    step = max(1, SLICE // hidden.shape[0])
    starts = range(0, hidden.shape[1], step)
    slices = zip(hidden.split(step, 1), targets.split(step, 1), starts, strict=True)
    losses: list[Any] = [
        checkpoint(loss, *each, use_reentrant=False, preserve_rng_state=False) for each in slices
    ]
    if teacher is not None:
        divergence = torch.stack([kl for _, kl in losses if kl is not None]).sum()
        teacher.distillation.add(divergence, teacher.first_lengths.sum())
    return torch.stack([total for total, _ in losses]).sum()


def _logits_function(
    model: Any,
    forward: Callable[..., Any],
    output: Any,
    head: Any,
    head_forward: Callable[..., Any] | None = None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function from hidden states (B, C, width) to logits that the model itself computes.

    Args:
        forward: the model's original `forward`.
        output: the full output of the backbone.
        head_forward: the head's original `forward`. Defaults to the current one.
    """
    name = model.base_model_prefix
    parent, leaf = _parent_of(model, head)
    forward_of_head = head_forward or head.forward

    def logits(states: torch.Tensor) -> torch.Tensor:
        sliced = copy.copy(output)
        sliced["last_hidden_state"] = states
        backbone = model._modules[name]
        model._modules[name] = _ForwardProxy(backbone, lambda *args, **kwargs: sliced)
        parent._modules[leaf] = _ForwardProxy(head, forward_of_head)
        try:
            ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
            return forward(input_ids=ids, use_cache=False).logits
        finally:
            model._modules[name] = backbone
            parent._modules[leaf] = head

    return logits


def _parent_of(model: Any, head: Any) -> tuple[Any, str]:
    """(the module that contains the head, the head's name in it)."""
    for parent in model.modules():
        for leaf, child in parent._modules.items():
            if child is head:
                return parent, leaf
    raise AssertionError("the head is not a submodule of the model")
