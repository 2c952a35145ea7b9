"""Next-token loss of which the logits never stand whole.

Logits of 8,192 tokens and a vocabulary of 128k take 4 GiB in float32, and a plain loss holds them
about three times: more than a model's activations under gradient checkpointing. Here the model's
backbone runs once, and its head on a slice of the hidden states at a time, each slice's logits
being dropped and computed again in the backward pass. What stands between hidden states and logits
differs by family (soft-capping in Gemma 2, a scale in Cohere and Granite), so it is not written
down again here: the model's own forward runs on each slice, with the backbone's output put in.

It replaces `forward` on the one loaded model, as accelerate does for autocast: wrappers (DDP,
FSDP2, DeepSpeed, peft) call it like the plain one, and nothing of it is saved.

With a `Distillation` the model also learns what its base says of the first chunk of each example:
there positions and text are those of an ordinary short text, so the base is right as it was.

Shapes:  B = batch, L = tokens of an example, V = vocabulary, C = tokens of a slice,
         S = tokens of the longest first chunk of the batch
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
    """A teacher of the first chunks, and what the model was apart from it since last asked."""

    teacher: Any  # the base (models/teacher.py), in evaluation mode, no part of the model
    weight: float  # w, of the divergence at a taught token beside the loss at a label
    _kl: list[torch.Tensor] = field(default_factory=list)  # sums over taught tokens
    _counts: list[torch.Tensor] = field(default_factory=list)

    @torch.no_grad()
    def read(self, input_ids: torch.Tensor, first_lengths: torch.Tensor) -> Any:
        """What the teacher's backbone makes of the first S tokens, at positions 0 .. S-1."""
        ids = input_ids[:, : int(first_lengths.max())]
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return self.teacher._modules[self.teacher.base_model_prefix](
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=positions,
            use_cache=False,
        )

    def logits(self, output: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        """From what `read` gave, what makes logits (B, C, V) of a slice of its states."""
        head = self.teacher.get_output_embeddings()
        return torch.no_grad()(_head_of(self.teacher, self.teacher.forward, output, head))

    def add(self, apart: torch.Tensor, count: torch.Tensor) -> None:
        self._kl.append(apart)
        self._counts.append(count)

    def take_divergence(self) -> tuple[float, float]:
        """(sum of KL(teacher || model), taught tokens) of the passes since it was last taken."""
        apart, count = (float(sum(found)) for found in (self._kl, self._counts))
        self._kl.clear()
        self._counts.clear()
        return apart, count


def full_loss_reason(model: Any) -> str:
    """Why a model's loss cannot be computed in slices; "": it can."""
    if getattr(model.config, "output_router_logits", False):
        return "leaves out the router's loss (output_router_logits) of this model"
    if model.base_model_prefix not in model._modules or model.get_output_embeddings() is None:
        return f"finds no head of its own behind a backbone in {type(model).__name__}"
    return ""


def chunk_loss(model: Any, distillation: Distillation | None = None) -> None:
    """Make the model compute its loss in slices whenever it is given labels.

    With labels the output holds `loss` alone; without them `forward` is the plain one. As in
    transformers, `num_items_in_batch` divides the sum of the loss; without it the mean is taken.

    Args:
        distillation: adds w KL(teacher || model) at the first tokens of each example, as many as
            the batch's `first_lengths` (B,) say; a batch without them is not taught.

    Raises:
        SkipwiseError: the model adds another loss to its own (experts with a router loss), or
            keeps its backbone where it cannot be found.
    """
    if why := full_loss_reason(model):
        raise SkipwiseError(f"training.loss: chunked {why}\ntype training.loss=full")
    plain, name = model.forward, model.base_model_prefix

    def forward(
        self: Any, *args: Any, labels: Any = None, first_lengths: Any = None, **kwargs: Any
    ) -> Any:
        if labels is None:
            return plain(*args, **kwargs)
        count = kwargs.pop("num_items_in_batch", None)
        kwargs.pop("return_dict", None)  # peft sends it
        lesson = None
        if distillation is not None and first_lengths is not None:
            base = distillation.read(kwargs["input_ids"], first_lengths)
            lesson = _TeacherTargets(distillation, base, first_lengths)
        output = self._modules[name](*args, **kwargs)
        head = self.get_output_embeddings()
        bare, own = head.forward, "forward" in vars(head)
        # The head is called once, for a sharded one is gathered around its call.
        head.forward = lambda hidden: _in_slices(
            _head_of(self, plain, output, head, bare), hidden, labels, lesson
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


class _TeacherTargets:
    """What the teacher says of a batch, a slice of tokens at a time."""

    def __init__(self, distillation: Distillation, output: Any, first_lengths: torch.Tensor):
        self.distillation, self.first_lengths = distillation, first_lengths
        self.states = output[0]  # (B, S, width)
        self.logits = distillation.logits(output)

    def divergence(self, ours: torch.Tensor, start: int) -> torch.Tensor:
        """The sum of KL(teacher || model) over the taught tokens among C.

        The prediction at token i is taught where that token is in the first chunk: it needs no
        token behind i.

        Args:
            ours: (B, C, V) log-probabilities of the model.
            start: the first of the C tokens.
        """
        states = self.states[:, start : start + ours.shape[1]]
        size = states.shape[1]
        theirs = log_softmax(self.logits(states).float(), -1)
        apart = kl_div(ours[:, :size], theirs, reduction="none", log_target=True).sum(-1)
        index = torch.arange(start, start + size, device=apart.device)
        return apart.where(index < self.first_lengths[:, None], 0.0).sum()


def _in_slices(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    labels: torch.Tensor,
    lesson: _TeacherTargets | None,
) -> torch.Tensor:
    """The sum of the loss over all labels, the head on C tokens at a time.

    Args:
        head: logits (B, C, V) of a slice of hidden states.
        hidden: (B, L, width) what the backbone gave, as the head gets it.
    """
    targets = pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].to(hidden.device)  # of each position

    def loss(
        states: torch.Tensor, wanted: torch.Tensor, start: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ours = log_softmax(head(states).float(), -1)
        rows = ours.view(-1, ours.shape[-1])
        total = nll_loss(rows, wanted.reshape(-1), ignore_index=IGNORE_INDEX, reduction="sum")
        if lesson is None or start >= lesson.states.shape[1]:
            return total, None
        apart = lesson.divergence(ours, start)
        return total + lesson.distillation.weight * apart, apart.detach()

    step = max(1, SLICE // hidden.shape[0])
    starts = range(0, hidden.shape[1], step)
    slices = zip(hidden.split(step, 1), targets.split(step, 1), starts, strict=True)
    parts: list[Any] = [
        checkpoint(loss, *each, use_reentrant=False, preserve_rng_state=False) for each in slices
    ]
    if lesson is not None:
        apart = torch.stack([apart for _, apart in parts if apart is not None]).sum()
        lesson.distillation.add(apart, lesson.first_lengths.sum())
    return torch.stack([total for total, _ in parts]).sum()


def _head_of(
    model: Any,
    plain: Callable[..., Any],
    output: Any,
    head: Any,
    bare: Callable[..., Any] | None = None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What stands between hidden states and logits in a model, for a slice of states (B, C, width).

    Args:
        plain: the model's own forward.
        output: all that the backbone gave.
        bare: the head's own forward, without what a wrapper hooks around it.
    """
    name = model.base_model_prefix
    parent, leaf = _place(model, head)
    own = bare or head.forward

    def logits(states: torch.Tensor) -> torch.Tensor:
        shown = copy.copy(output)
        shown["last_hidden_state"] = states
        backbone = model._modules[name]
        model._modules[name] = _StandIn(backbone, lambda *args, **kwargs: shown)
        parent._modules[leaf] = _StandIn(head, own)
        try:
            ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
            return plain(input_ids=ids, use_cache=False).logits
        finally:
            model._modules[name] = backbone
            parent._modules[leaf] = head

    return logits


def _place(model: Any, head: Any) -> tuple[Any, str]:
    """(the module that holds the head, its name there)."""
    for parent in model.modules():
        for leaf, child in parent._modules.items():
            if child is head:
                return parent, leaf
    raise AssertionError("the head is no part of the model")
