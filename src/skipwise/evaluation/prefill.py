"""Forward passes of an evaluation: memory is the key-value cache and little else.

Chunked prefill: long contexts go through the model in chunks, into a preallocated cache (a growing
cache holds a layer twice while it grows). Only requested positions get logits, a slice at a time:
the full logits tensor is never materialized. Positions count up from 0, and a mask of ones is
always passed, except for padding.

Some models lose their state between chunks, or count padding as tokens. `reading` tries each way on
a few tokens; a slower way replaces what a model cannot do.

Shapes:  B = batch, S = tokens, K = positions that get logits, V = vocabulary
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from skipwise.config.batch import EVALUATION_LOGITS as _LOGITS

PREFILL = 4096  # tokens of a row in one chunk, at most
_LEAST_PIECE = 64
_LEAST_MASK = 12 << 20  # bytes


class PreallocatedLayer(DynamicLayer):
    """A layer's keys and values in preallocated tensors."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.key_room = self.value_room = torch.empty(0)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        if not self.is_initialized or end > self.room:
            self._make_room(key_states, value_states, max(end, self.room))
        self.key_room[:, :, begin:end] = key_states
        self.value_room[:, :, begin:end] = value_states
        self.keep(end)
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def keep(self, tokens: int) -> None:
        """Keep only the first tokens; the next update overwrites the rest."""
        self.keys, self.values = self.key_room[:, :, :tokens], self.value_room[:, :, :tokens]

    def batch_repeat(self, rows: int) -> PreallocatedLayer:
        """The same tokens in several rows."""
        made = PreallocatedLayer(self.room)
        if self.is_initialized and self.keys is not None and self.values is not None:
            keys, values = (
                t.expand(rows, -1, -1, -1) if len(t) == 1 else t for t in (self.keys, self.values)
            )
            made._make_room(keys, values, self.room)
            made.update(keys, values)
        return made

    def _make_room(self, key_states: torch.Tensor, value_states: torch.Tensor, room: int) -> None:
        old = self.key_room, self.value_room, self.get_seq_length()
        self.dtype, self.device, self.room = key_states.dtype, key_states.device, room
        for name, states in (("key_room", key_states), ("value_room", value_states)):
            rows, heads, _, width = states.shape
            setattr(self, name, states.new_empty(rows, heads, room, width))
        self.is_initialized = True
        if old[2]:
            self.key_room[:, :, : old[2]] = old[0][:, :, : old[2]]
            self.value_room[:, :, : old[2]] = old[1][:, :, : old[2]]
        self.keep(old[2])


def new_cache(model: Any, room: int) -> Any:
    """An empty cache with room for some tokens; sliding-window and state layers keep their own."""
    cache: Any = DynamicCache(config=model.config)
    cache.layers = [
        PreallocatedLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    cache.num_tokens = 0  # counted here: state layers do not count
    return cache


def holds_all(cache: Any) -> bool:
    """Whether every layer holds every key, so that padding can be masked and tokens removed."""
    return all(isinstance(layer, PreallocatedLayer) for layer in cache.layers)


def batch_repeat(cache: Any, rows: int) -> Any:
    """A cache for several rows that continue from the same tokens; for one row, the same cache.

    After one row, `crop` restores the cache. Layers with a window or a state are copied, because
    they cannot be cropped.
    """
    if rows == 1 and holds_all(cache):
        return cache
    made = copy.copy(cache)
    made.layers = []
    for layer in cache.layers:
        if isinstance(layer, PreallocatedLayer):
            made.layers.append(layer.batch_repeat(rows))
        else:
            made.layers.append(copy.deepcopy(layer))
            if rows > 1:
                made.layers[-1].reorder_cache(torch.zeros(rows, dtype=torch.long))
    return made


def crop(cache: Any, tokens: int) -> None:
    """Remove everything after the first tokens, from the layers that can."""
    cache.num_tokens = tokens
    for layer in cache.layers:
        if isinstance(layer, PreallocatedLayer) and layer.is_initialized:
            layer.keep(tokens)


def prefill(model: Any, input_ids: torch.Tensor, past: Any) -> None:
    """Put tokens (B, S) into the cache."""
    start, total = 0, past.num_tokens + input_ids.shape[1]
    while start < input_ids.shape[1]:
        piece = input_ids[:, start : start + prefill_chunk_size(model, total, len(input_ids))]
        _forward(model, piece, past, torch.tensor([piece.shape[1] - 1]))
        start += piece.shape[1]


def logits_at(
    model: Any, input_ids: torch.Tensor, positions: torch.Tensor, *, past: Any = None
) -> torch.Tensor:
    """Logits at some positions of a context.

    Args:
        input_ids: (B, S) the tokens after `past`.
        positions: (K,) indices in `input_ids`, ascending.
        past: key-value cache of the tokens before, if any.

    Returns:
        (B, K, V) in the model's dtype.
    """
    return torch.cat(list(logits_in_slices(model, input_ids, positions, past=past)), 1)


def logits_in_slices(
    model: Any, input_ids: torch.Tensor, positions: torch.Tensor, *, past: Any = None
) -> Iterator[torch.Tensor]:
    """The logits of `logits_at` in slices (B, k, V) of the positions."""
    rows = len(input_ids)
    before = past.num_tokens if past is not None else 0
    end, start = int(positions[-1]) + 1, 0
    if not reading(model).pieces:
        yield _forward(
            model, input_ids if past is not None else input_ids[:, :end], past, positions
        )
        return
    piece = prefill_chunk_size(model, before + end, rows)
    if before == 0 and _one_pass(model, end):
        piece = end
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    most = max(1, _LOGITS // (rows * vocabulary))
    whole = end <= piece and len(positions) <= most
    if past is None and not whole:
        past = new_cache(model, end)
    if past is not None and end > piece:
        start = int(positions[0])
        prefill(model, input_ids[:, :start], past)
    while start < end:
        stop = end
        inside = positions[(positions >= start) & (positions < start + piece)]
        if len(inside) > most:
            stop = int(inside[most])
        stop = min(stop, start + piece)
        asked = positions[(positions >= start) & (positions < stop)] - start
        keep = asked if len(asked) else torch.tensor([stop - start - 1])
        logits = _forward(model, input_ids[:, start:stop], past, keep)
        if len(asked):
            yield logits
        start = stop


def next_logits(
    model: Any, input_ids: torch.Tensor, position_ids: torch.Tensor, mask: torch.Tensor, past: Any
) -> torch.Tensor:
    """(B, V) logits after one more token (B, 1) at position (B, 1); `mask` is (B, kv)."""
    out = model(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=mask,
        past_key_values=past,
        use_cache=True,
    )
    past.num_tokens += input_ids.shape[1]
    return out.logits[:, -1]


def prefill_chunk_size(model: Any, total: int, rows: int = 1) -> int:
    """Tokens that go through the model at once, in front of a cache of up to `total` tokens.

    A chunk needs a mask of chunk x total (with eager attention, the scores of every head). Its size
    keeps this within a twentieth of the memory of a cache of `total` tokens.
    """
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None) or 1
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = config.to_dict().get("head_dim") or config.hidden_size // heads
    itemsize = getattr(model, "dtype", torch.float32).itemsize
    cache = 2 * config.num_hidden_layers * kv_heads * width * itemsize * total * rows
    pair = 1 + itemsize
    if _is_eager(config):
        pair += 2 * heads * max(4, itemsize)
    room = max(_LEAST_MASK, cache // 20)
    return min(PREFILL, max(_LEAST_PIECE, room // (pair * max(1, total) * rows)))


def _one_pass(model: Any, tokens: int) -> bool:
    """Whether a whole context goes through at once: without a cache attention needs no mask.

    That is faster, and beyond `PREFILL` tokens done where the widest part of a layer (three of the
    MLP's activations and three of the hidden states) takes no more memory than the cache would.
    Other devices than these may hold all scores of a head at once.
    """
    if tokens <= PREFILL or _is_eager(model.config):
        return not _is_eager(model.config)
    known = model.config.get_text_config(decoder=True).to_dict()
    types = set(known.get("layer_types") or ())
    sliding = types - {"full_attention"} if types else known.get("sliding_window")
    sparse = any("experts" in key and value for key, value in known.items())
    if sliding or sparse or model.device.type not in ("cpu", "cuda"):
        return False
    heads, layers = known.get("num_attention_heads"), known.get("num_hidden_layers")
    hidden, inner = known.get("hidden_size"), known.get("intermediate_size")
    if not (heads and layers and hidden and inner):
        return False
    width = known.get("head_dim") or hidden // heads
    return 3 * (inner + hidden) <= 2 * layers * width * (known.get("num_key_value_heads") or heads)


def _is_eager(config: Any) -> bool:
    return getattr(config, "_attn_implementation", None) == "eager"


def _forward(
    model: Any, input_ids: torch.Tensor, past: Any, positions: torch.Tensor
) -> torch.Tensor:
    before = past.num_tokens if past is not None else 0
    rows, tokens = input_ids.shape
    device = input_ids.device
    positions = positions.to(device)
    arguments: dict[str, Any] = {
        "input_ids": input_ids,
        "position_ids": torch.arange(before, before + tokens, device=device).expand(rows, -1),
        "attention_mask": torch.ones(rows, before + tokens, dtype=torch.long, device=device),
        "use_cache": past is not None,
    }
    if past is not None:
        arguments["past_key_values"] = past
        past.num_tokens += tokens
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(**arguments, logits_to_keep=positions).logits
    return model(**arguments).logits[:, positions]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The ways to run a model that give the logits of a plain forward pass."""

    pieces: bool  # several tokens after a cached prefix, also one shared by rows
    padding: bool  # rows of unequal length, with padding between prompt and answer
    steps: bool  # one token at a time after a prompt


_READINGS: WeakKeyDictionary[Any, Reading] = WeakKeyDictionary()


def reading(model: Any) -> Reading:
    """How the model can be run, tried on random tokens at the first call."""
    found = _READINGS.get(model)
    if found is None:
        _READINGS[model] = Reading(pieces=True, padding=True, steps=True)  # to try it
        config = model.config.get_text_config(decoder=True)
        steps = _agrees(model, _by_steps)
        # learned positions and ALiBi may count cache slots, padding included
        rotary = bool(getattr(config, "rope_parameters", None))
        found = Reading(
            pieces=steps and _agrees(model, _by_pieces),  # an answer is read by steps
            padding=steps and rotary and _agrees(model, _by_padding),
            steps=steps,
        )
        _READINGS[model] = found
        if not found.pieces:
            print(
                f"{config.model_type} has no usable KV cache: each trial is a full forward pass"
                + ("" if steps else " per token of its answer"),
                file=sys.stderr,
            )
    return found


@torch.inference_mode()
def _agrees(model: Any, way: Callable[[Any, torch.Tensor], Any]) -> bool:
    """Whether a way of running the model gives the logits of plain passes, up to rounding."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (2, 58), generator=generator)
    try:
        have, want = way(model, ids.to(model.device))
    except Exception:  # models raise anything on an unusual call
        return False
    error, want = (have.float() - want.float()).abs(), want.float()
    if have.dtype == torch.float32:
        return float(error.max()) <= 1e-3 * max(float(want.abs().max()), 1e-6)
    return float(error.mean()) <= 0.03 * max(float(want.std()), 1e-6)


def _plain(model: Any, ids: torch.Tensor, first: int) -> torch.Tensor:
    return _forward(model, ids, None, torch.arange(first, ids.shape[1]))


def _by_pieces(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.cat([ids[:1, :32].expand(2, -1), ids[:, 32:]], 1)
    base = new_cache(model, 64)
    for piece in (ids[:1, :20], ids[:1, 20:32]):
        _forward(model, piece, base, torch.tensor([piece.shape[1] - 1]))
    have = _forward(model, ids[:, 32:], batch_repeat(base, 2), torch.arange(26))
    return have, _plain(model, ids, 32)


def _by_steps(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cache = new_cache(model, 64)
    _forward(model, ids[:, :50], cache, torch.tensor([49]))
    have = []
    for at in range(50, 54):
        positions = torch.full((2, 1), at, device=ids.device)
        mask = torch.ones(2, at + 1, dtype=torch.long, device=ids.device)
        have.append(next_logits(model, ids[:, at : at + 1], positions, mask, cache))
    return torch.stack(have, 1), _plain(model, ids[:, :54], 50)


def _by_padding(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cache = new_cache(model, 64)
    if not holds_all(cache):
        raise ValueError("layers with a window or a state")
    _forward(model, ids[:, :50], cache, torch.tensor([49]))  # the first row ends at 30
    mask = torch.ones(2, 51, dtype=torch.long, device=ids.device)
    mask[0, 30:50] = 0
    positions = torch.tensor([[30], [50]], device=ids.device)
    have = next_logits(model, ids[:, 50:51], positions, mask, cache)
    short = torch.cat([ids[:1, :30], ids[:1, 50:51]], 1)
    want = [_plain(model, short, 30), _plain(model, ids[1:, :51], 50)]
    return have, torch.cat(want)[:, 0]
