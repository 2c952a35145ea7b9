"""What a model's config says: its RoPE, its window, and why it cannot be extended if it cannot.

Facts are found by what a config holds, not by a list of family names: transformers gives every
decoder with RoPE settings a `rope_parameters` dictionary. No torch here: `skipwise check` reads a
config.json in a blink.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from skipwise.errors import SkipwiseError
from skipwise.pose.rope import Scaling, Unscaled
from skipwise.pose.rope_config import from_rope_parameters

_FULL, _SLIDING, _CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
_RECURRENT = {"linear_attention", "mamba", "mamba2", "recurrent", "hybrid", "conv"}
_OTHER_POSITIONS = {
    "gpt2": "learned absolute positions",
    "gpt_neo": "learned absolute positions",
    "gpt_bigcode": "learned absolute positions",
    "opt": "learned absolute positions",
    "bloom": "ALiBi",
    "mpt": "ALiBi",
    "mamba": "no attention",
    "mamba2": "no attention",
    "falcon_mamba": "no attention",
    "rwkv": "no attention",
}
_ALIASES = {  # what older config classes call it
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
    rope_parameters: dict[str, Any]  # of the full-attention layers, as the config has them
    scaling: Scaling  # that the weights were trained with: Unscaled, or one to be carried on
    nested: bool  # whether the config holds rope_parameters per layer type
    head_dim: int
    rotary_dim: int
    sliding_window: int | None
    hybrid: bool  # sliding layers beside full ones, by design
    lists_layers: bool  # says layer by layer which are sliding, and has no other switch for it
    recurrent: bool  # layers that carry a state beside attention
    vocab_size: int
    tied_embeddings: bool
    refused_types: tuple[str, ...] = ()  # rope_types that the family's config class turns down

    @property
    def rope_type(self) -> str:
        return self.rope_parameters.get("rope_type", "default")


def read_model_info(config: Mapping[str, Any], original_length: int | None = None) -> ModelInfo:
    """Facts of a config: of transformers' `to_dict()`, or of `configs.complete`.

    Args:
        original_length: what the model was really trained at, where its config says otherwise
            (Mistral-7B-v0.1 says 32k and was trained at 8k). The length before the config's own
            scaling says that this scaling was not trained: it is replaced.

    Raises:
        SkipwiseError: the model cannot be extended; says why and what to do.
    """
    family = config.get("model_type", "unknown")
    check_extendable(config)
    parameters = dict(config["rope_parameters"])
    nested = isinstance(parameters.get(_FULL), Mapping)
    parameters = dict(parameters[_FULL] if nested else parameters)
    if "rope_type" in parameters:
        parameters.pop("type", None)  # its older name, which transformers keeps beside it
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
            raise SkipwiseError(f"the config of this {family} model lacks {key}: it is not whole")
    head_dim = config.get("head_dim") or _get(config, "hidden_size") // _get(
        config, "num_attention_heads"
    )
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
    """Refuse what has no RoPE to extend, or more than Skipwise can extend.

    Raises:
        SkipwiseError: one sentence why, one what to do.
    """
    family = config.get("model_type", "unknown")
    if config.get("is_encoder_decoder"):
        raise SkipwiseError(
            f"{family} is an encoder-decoder, and PoSE extends decoders\n"
            "choose a decoder with RoPE: Llama, Mistral, Qwen, Gemma, Phi, GPT-NeoX, ..."
        )
    if config.get("text_config") is not None:
        raise SkipwiseError(
            f"{family} wraps a language model with other parts, and only the language model has a "
            "window to extend\ntype load.text_only=true to extend that, without the other parts"
        )
    if config.get("quantization_config") is not None:
        raise SkipwiseError(
            f"this {family} checkpoint is quantised, and its weights cannot be trained\n"
            "give the unquantised one it was made from"
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
    """Refuse to measure a model where it has no positions: learned ones end.

    Raises:
        SkipwiseError: the length is beyond the model's table of positions.
    """
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
    window = present.window(stated)
    if present.keeps_length and given is None:  # it should be L, and models differ
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
    """The value under its own name, or the one that an older config class has for it."""
    return next((config[k] for k in (key, *_ALIASES.get(key, ())) if config.get(k)), None)
