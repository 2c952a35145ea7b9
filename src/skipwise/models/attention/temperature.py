"""The attention temperature: multiply every attention logit by t, in the query weights.

    softmax(t q·k / sqrt(d)) = softmax((t q)·k / sqrt(d))        q = W x + b  ->  t W, t b

Attention trained on L keys is too flat over T keys, and t > 1 sharpens it. No config key for this
works in every runtime, but every runtime reads weights. A norm after the projection (Qwen 3,
Gemma 3, Olmo 2, ...) would cancel the factor, so t goes into the norm's weight. A soft cap on the
logits (Gemma 2) comes later: t multiplies what is capped. Sinks (gpt-oss) are logits and are
multiplied too. Sliding layers see as many keys as before and do not change.

The weights are found by name. Names can mislead, so the queries, keys and values that reach the
attention of each layer are compared before and after.

Source: Peng et al. 2024 (YaRN), arXiv 2309.00071, section 3.4, puts the same factor into cos and
sin and computes it from the length; here it is measured after training (choose_temperature.py).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from skipwise.errors import SkipwiseError

_ATTENDS = ("full_attention", "hybrid")  # hybrid: with a state beside it, as in Falcon H1
_NORMS = ("q_norm", "q_layernorm", "query_layernorm")  # after the projection, in some families
_SEPARATE = ("q_b_proj", "q_proj")  # q_b_proj: the second half of a low-rank projection
_FUSED = ("qkv_proj", "query_key_value")
_SDPA = torch.nn.functional.scaled_dot_product_attention
_MATMULS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.baddbmm)
_TOKENS = 8  # length of the text that the check runs on


@dataclass(frozen=True, kw_only=True, eq=False)
class QueryWeight:
    """A parameter with rows that make queries, and their values when the model was loaded."""

    parameter: torch.Tensor
    rows: torch.Tensor | None  # (R,) indices into the first dimension, or None for all rows
    offset: float  # the layer multiplies by weight + offset: 1 in Gemma's norms
    before: torch.Tensor

    @torch.no_grad()
    def set(self, t: float) -> None:
        """t (offset + before) - offset in float32, rounded to the parameter's dtype."""
        value = ((self.before.float() + self.offset) * t - self.offset).to(self.parameter.dtype)
        if self.rows is None:
            self.parameter.copy_(value)
        else:
            self.parameter[self.rows] = value


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionLayer:
    """An attention module and its query weights, which are empty for a sliding layer."""

    index: int
    module: torch.nn.Module
    weights: list[QueryWeight]

    @property
    def full(self) -> bool:
        return bool(self.weights)


class QueryWeights:
    """A model's query weights. `set` applies a temperature; 1 restores the loaded weights.

    Raises:
        SkipwiseError: no query weights can absorb a temperature; says why.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers = _attention_layers(model)

    def set(self, t: float) -> None:
        if any(parameter.is_meta for parameter in self.model.parameters()):
            raise _refusal(self.model, "load.device_map keeps some of them off the device")
        for layer in self.layers:
            for weight in layer.weights:
                weight.set(t)

    def check(self, t: float) -> None:
        """Set t, and compare the inputs of each layer's attention before and after.

        Raises:
            SkipwiseError: the queries of a full layer are not multiplied by t, or something else
                changed. The weights are restored.
        """
        calls = _calls(self.model, self.layers)
        self.set(1.0)
        before = [_operands(layer, call) for layer, call in zip(self.layers, calls, strict=True)]
        self.set(t)
        for layer, call, old in zip(self.layers, calls, before, strict=True):
            wrong = _difference(old, _operands(layer, call), t if layer.full else 1.0)
            if wrong:
                self.set(1.0)
                raise _refusal(self.model, f"{wrong} in layer {layer.index}")


def fold_temperature(model: Any, t: float) -> None:
    """Multiply every attention logit of the full layers by t, in the model's weights, and check it.

    Exact in float32. Rounding to bf16 changes a weight by at most 2^-8 of its value, and the
    queries by 0.16 % of their length: as much as computing them in bf16.

    Raises:
        SkipwiseError: the weights cannot absorb it: a norm without weights (nanochat), clipped
            queries (Olmo 1), or an unknown kind of attention.
    """
    QueryWeights(model).check(t)


def check_foldable(config: Any) -> None:
    """Refuse a model whose weights cannot absorb a temperature, without loading weights.

    A model with custom code is not built here; `fold_temperature` checks it later.

    Raises:
        SkipwiseError: as `fold_temperature`.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    QueryWeights(model)


def _attention_layers(model: Any) -> list[AttentionLayer]:
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "clip_qkv", None) is not None:
        raise _refusal(model, f"its queries are clipped at {config.clip_qkv:g}")
    types = getattr(config, "layer_types", None)
    full = {i for i in range(config.num_hidden_layers) if types is None or types[i] in _ATTENDS}
    layers = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        projection = next((child for child in (*_SEPARATE, *_FUSED) if child in children), None)
        index = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if projection is not None and index is not None:
            weights = _query_weights(model, module, projection) if index in full else []
            layers.append(AttentionLayer(index=index, module=module, weights=weights))
    missing = full - {layer.index for layer in layers}
    if missing or not full:
        what = f"of layer {min(missing)} is not known" if missing else "has no full layer"
        raise _refusal(model, f"the attention {what}")
    return layers


def _query_weights(model: Any, module: Any, projection: str) -> list[QueryWeight]:
    norm = next((n for n in _NORMS if isinstance(getattr(module, n, None), torch.nn.Module)), None)
    rows, offset = None, 0.0
    source = getattr(module, projection if norm is None else norm)
    if norm is not None:
        offset = _norm_offset(model, norm, source)
    elif projection in _FUSED:
        num_rows = source.weight.shape[0]
        rows = _query_rows(model, module, projection, num_rows).to(source.weight.device)
    found = [
        _query_weight(parameter, rows, offset if name.endswith("weight") else 0.0)
        for name, parameter in source.named_parameters()
    ]
    if isinstance(sinks := getattr(module, "sinks", None), torch.nn.Parameter):
        found.append(_query_weight(sinks, None, 0.0))
    return found


def _query_weight(parameter: Any, rows: torch.Tensor | None, offset: float) -> QueryWeight:
    before = parameter.detach()[slice(None) if rows is None else rows].clone()
    return QueryWeight(parameter=parameter, rows=rows, offset=offset, before=before)


def _query_rows(model: Any, module: Any, projection: str, num_rows: int) -> torch.Tensor:
    """The rows of a fused projection that make queries: the first rows of each group.

    A group is the full projection (Phi 3; Falcon with one key head), the heads that share a key
    head (newer Falcon), or one head (GPT-NeoX, Persimmon, older Falcon).
    """
    num_heads = model.config.get_text_config(decoder=True).num_attention_heads
    head_dim = getattr(module, "head_dim", None) or module.head_size
    num_groups = num_heads
    if getattr(module, "new_decoder_architecture", False):
        num_groups = module.num_kv_heads
    elif projection == "qkv_proj" or getattr(module, "multi_query", False):
        num_groups = 1
    per_group = num_heads // num_groups * head_dim
    return torch.arange(num_rows).view(num_groups, -1)[:, :per_group].flatten()


@torch.no_grad()
def _norm_offset(model: Any, name: str, norm: torch.nn.Module) -> float:
    """0 if a norm multiplies by its weight, 1 if by 1 + weight; measured on a copy."""
    probe = copy.deepcopy(norm).to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(0)
    for parameter in probe.parameters():
        parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    weights = {n: p for n, p in probe.named_parameters() if n.endswith("weight")}
    if not weights:
        raise _refusal(model, f"its {name} follows the projection and has no weight")
    shape = next(iter(weights.values())).shape
    states = torch.randn(1, len(weights), *shape, generator=generator)  # StableLM: one per head
    want = 2 * probe(states)
    before = {n: p.clone() for n, p in probe.named_parameters()}
    for offset in (0.0, 1.0):
        for n, parameter in probe.named_parameters():
            parameter.copy_(2 * before[n] + (offset if n in weights else 0.0))
        if torch.allclose(probe(states), want, rtol=1e-4, atol=1e-5):
            return offset
    raise _refusal(model, f"its {name} is not linear in its weight")


class _RecordOperands(TorchFunctionMode):
    """Record what the attention multiplies: queries and keys first, then values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = args[:3] if func is _SDPA else args[-2:]
        is_attention = func is _SDPA or func in _MATMULS
        activations = is_attention and all(x.dim() > 2 for x in operands)  # no weight matrix
        if activations and len(self.found) < 3:
            self.found += [x.detach() for x in (operands[-1:] if self.found else operands)]
        return func(*args, **(kwargs or {}))


def _calls(model: Any, layers: list[AttentionLayer]) -> list[tuple[Any, Any]]:
    """The arguments of each attention module in a forward pass over a few tokens."""
    calls: dict[int, tuple[Any, Any]] = {}

    def record(i: int) -> Any:
        def hook(_module: Any, args: Any, kwargs: Any) -> None:
            calls[i] = (args, kwargs)

        return hook

    hooks = [
        layer.module.register_forward_pre_hook(record(i), with_kwargs=True)
        for i, layer in enumerate(layers)
    ]
    size = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(3, size, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if len(calls) < len(layers):
        raise _refusal(model, "one of its attention modules is not called")
    return [calls[i] for i in range(len(layers))]


@torch.no_grad()
def _operands(layer: AttentionLayer, call: tuple[Any, Any]) -> list[torch.Tensor]:
    """Queries, keys and values as the attention gets them, after norms and rotation."""
    with _RecordOperands() as mode:
        layer.module(*call[0], **call[1])
    return mode.found


def _difference(old: list[torch.Tensor], new: list[torch.Tensor], t: float) -> str:
    """Which of queries, keys and values is wrong; empty if none is."""
    if len(old) != 3 or len(new) != 3:
        return "no product of queries and keys was found"
    names = ("queries are not multiplied by it", "keys change", "values change")
    if t == 1.0:
        names = ("queries change in spite of a sliding window", *names[1:])
    for name, factor, a, b in zip(names, (t, 1.0, 1.0), old, new, strict=True):
        bound = max(1e-5, 4 * torch.finfo(b.dtype).eps) * float(b.float().abs().max())
        if not float((factor * a.float() - b.float()).abs().max()) <= bound:
            return name
    return ""


def _refusal(model: Any, why: str) -> SkipwiseError:
    family = model.config.get_text_config(decoder=True).model_type
    return SkipwiseError(
        f"attention_temperature: the weights of this {family} model cannot absorb it: {why}\n"
        "type attention_temperature=1.0"
    )
