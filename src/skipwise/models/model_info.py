"""What a model's config says: its RoPE, its context window, and whether it can be extended.

This depends on the config's keys, not on a list of families: transformers gives every decoder with
RoPE a `rope_parameters` dictionary. No torch, so that `skipwise check` reads a config.json fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from skipwise.errors import SkipwiseError
from skipwise.pose.rope import Scaling, Unscaled, keeps_length
from skipwise.pose.rope_config import from_rope_parameters

_FULL, _SLIDING, _CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
_RECURRENT = {"linear_attention", "mamba", "mamba2", "recurrent", "hybrid", "conv"}
_OTHER_POSITIONS = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gpt_bigcode", "opt"), "learned absolute positions"),
    **dict.fromkeys(("bloom", "mpt"), "ALiBi"),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv"), "no attention"),
}
_ALIASES = {  # names in older config classes
    "hidden_size": ("d_model", "n_embd"),
    "num_attention_heads": ("n_heads", "n_head"),
    "max_position_embeddings": ("max_seq_len", "n_positions"),
}


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What extension needs to know of a model."""

    family: str  # model_type
    original_length: int  # L, the window the weights were trained for
    rope_theta: float
    rope_parameters: dict[str, Any]  # from the config, of the full-attention layers
    scaling: Scaling  # that the weights were trained with: Unscaled, or one to extend further
    nested: bool  # the config has rope_parameters by layer type
    head_dim: int
    rotary_dim: int
    sliding_window: int | None
    hybrid: bool  # sliding and full layers, by design
    lists_layers: bool  # only layer_types says which layers are sliding
    recurrent: bool  # some layers have a recurrent state
    vocab_size: int
    tied_embeddings: bool
    refused_types: tuple[str, ...] = ()  # rope_types that the family's config class rejects

    @property
    def rope_type(self) -> str:
        return self.rope_parameters.get("rope_type", "default")


def read_model_info(config: Mapping[str, Any], original_length: int | None = None) -> ModelInfo:
    """Read a config: transformers' `to_dict()`, or the result of `hf_config.complete`.

    Args:
        original_length: the length that the model was trained at, if its config is wrong
            (Mistral-7B-v0.1 says 32k but was trained at 8k). The length before the config's own
            scaling means that this scaling was not trained, so it is replaced.

    Raises:
        SkipwiseError: the model cannot be extended; says why and what to do.
    """
    family = config.get("model_type", "unknown")
    check_extendable(config)
    parameters = dict(config["rope_parameters"])
    nested = isinstance(parameters.get(_FULL), Mapping)
    parameters = dict(parameters[_FULL] if nested else parameters)
    if "rope_type" in parameters:
        parameters.pop("type", None)  # its older name, which transformers keeps
    stated: int = _get(config, "max_position_embeddings") or original_length or 0
    if not stated:
        raise SkipwiseError(
            f"the config of this {family} model does not say its length: type original_length=..."
        )
    try:
        present = from_rope_parameters(parameters, max_position_embeddings=stated)
    except SkipwiseError as error:
        raise SkipwiseError(f"this {family} model cannot be extended: {error}") from error
    scaling, length = _trained(present, stated, original_length, family)
    for key in ("vocab_size", "hidden_size", "num_attention_heads"):
        if not _get(config, key):
            raise SkipwiseError(f"the config of this {family} model is incomplete: it has no {key}")
    hidden, heads = _get(config, "hidden_size"), _get(config, "num_attention_heads")
    head_dim = config.get("head_dim") or hidden // heads
    layers = set(config.get("layer_types") or [])
    window = config.get("sliding_window")
    if config.get("use_sliding_window", True) is False or (layers and _SLIDING not in layers):
        window = None
    return ModelInfo(
        family=family,
        original_length=length,
        rope_theta=float(parameters.get("rope_theta", 10000.0)),
        rope_parameters=parameters,
        scaling=scaling,
        nested=nested,
        head_dim=head_dim,
        rotary_dim=int(head_dim * parameters.get("partial_rotary_factor", 1.0)),
        sliding_window=window,
        hybrid=_SLIDING in layers and _FULL in layers,
        lists_layers=bool(layers) and "use_sliding_window" not in config,
        recurrent=bool(layers & _RECURRENT),
        vocab_size=config["vocab_size"],
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        refused_types=tuple(config.get("refused_rope_types", ())),
    )


def check_extendable(config: Mapping[str, Any]) -> None:
    """Refuse models without RoPE, and models that Skipwise cannot extend, with a SkipwiseError."""
    family = config.get("model_type", "unknown")
    if config.get("is_encoder_decoder"):
        raise SkipwiseError(
            f"{family} is an encoder-decoder, and PoSE extends decoders\n"
            "choose a decoder with RoPE: Llama, Mistral, Qwen, Gemma, Phi, GPT-NeoX, ..."
        )
    if config.get("text_config") is not None:
        raise SkipwiseError(
            f"{family} contains a language model and other parts, and only the language model has "
            "a window to extend\ntype load.text_only=true to extend that, without the other parts"
        )
    if config.get("quantization_config") is not None:
        raise SkipwiseError(
            f"this {family} checkpoint is quantised, and its weights cannot be trained\n"
            "give the original checkpoint, which is not quantised"
        )
    if config.get("alibi"):
        raise SkipwiseError(_refusal(family, "ALiBi"))
    parameters = config.get("rope_parameters")
    if not parameters:
        raise SkipwiseError(_refusal(family, _OTHER_POSITIONS.get(family, "no RoPE settings")))
    layers = set(config.get("layer_types") or [])
    if config.get("attention_window_size"):  # RecurrentGemma
        layers = {_SLIDING, "recurrent"}
    per_type = [key for key, value in parameters.items() if isinstance(value, Mapping | None)]
    if (per_type and not isinstance(parameters.get(_FULL), Mapping)) or (
        layers & {_SLIDING, _CHUNKED} and _FULL not in layers and layers != {_SLIDING}
    ):
        raise SkipwiseError(
            f"{family} has no full-attention layer with RoPE (its layers: "
            f"{', '.join(sorted(layers or per_type))}), and only such layers can look further back"
            "\nchoose another model"
        )
    if _CHUNKED in layers:
        raise SkipwiseError(
            f"{family} has RoPE only in layers that see a chunk at a time, so there is no far "
            "position to learn\nchoose another model"
        )


def check_reach(config: Mapping[str, Any], length: int) -> None:
    """Refuse, with a SkipwiseError, to evaluate learned positions beyond their table's end."""
    family = config.get("model_type", "unknown")
    stated = _get(config, "max_position_embeddings")
    if _OTHER_POSITIONS.get(family, "").startswith("learned") and stated and length > stated:
        raise SkipwiseError(
            f"{family} has {stated:,} learned positions, and cannot be measured at {length:,} "
            f"tokens\ntype --lengths up to {stated}"
        )


def _trained(present: Scaling, stated: int, given: int | None, family: str) -> tuple[Scaling, int]:
    """(the scaling that the weights were trained with, their window L)."""
    if present.follows_length or (given and given == getattr(present, "original_length", None)):
        return Unscaled(), given or stated
    keeps = keeps_length(present, family)
    window = stated if present.keeps_length and not keeps else present.window(stated)
    if keeps and given is None:  # it should be L, and models differ
        raise SkipwiseError(
            f"this {family} model has {present.name} scaling by {present.factor:g}, and its config "
            f"does not say whether {stated:,} tokens is the window before or after scaling\n"
            f"type original_length={stated}, or original_length={window}: the window it has now"
        )
    return present, given or window


def _refusal(family: str, positions: str) -> str:
    return (
        f"{family} has {positions}, and PoSE extends rotary position embeddings (RoPE) only\n"
        "choose a RoPE model: Llama, Mistral, Qwen, Gemma, Phi, GPT-NeoX, ..."
    )


def _get(config: Mapping[str, Any], key: str) -> Any:
    """The value under the current name or an older one."""
    return next((config[k] for k in (key, *_ALIASES.get(key, ())) if config.get(k)), None)
