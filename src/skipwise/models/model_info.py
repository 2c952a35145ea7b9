"""What a model's config says: its RoPE, its context window, and whether it can be extended.

This depends on the config's keys, not on a list of families: transformers gives every decoder with
RoPE a `rope_parameters` dictionary. What differs between families is in `config_defaults.json`,
written by tools/make_config_defaults.py. No torch, so that `skipwise check` reads a config.json
fast.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from skipwise.errors import SkipwiseError
from skipwise.pose.rope import SCALINGS, Scaling, Unscaled, keeps_length
from skipwise.pose.rope_config import counts_from, from_rope_parameters, unread_keys

F = TypeVar("F", bound=Callable[..., Any])
_FULL, _SLIDING, _CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
PROPORTIONAL = "proportional"  # Gemma 4: a share of the pairs, with the exponents of all
_RECURRENT = {"linear_attention", "mamba", "mamba2", "recurrent", "hybrid", "conv"}
_OTHER_POSITIONS = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gpt_bigcode", "opt"), "learned absolute positions"),
    **dict.fromkeys(("bloom", "mpt"), "ALiBi"),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv"), "no attention"),
}
_SWITCHES = {"position_embedding_type": "rope", "use_mem_rope": True}  # the value that means RoPE
_OTHER_PARTS = ("vision_config", "audio_config", "thinker_config")
LENGTHS = ("seq_length", "seq_len", "max_seq_len", "max_seq_length", "max_sequence_length")
LENGTHS += ("model_max_length", "n_positions", "n_ctx")  # lengths beside max_position_embeddings
_IGNORES_SHARE = "ignores_partial_rotary_factor"
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
    rope_theta: float  # of default RoPE; a proportional one has the same frequencies with another
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
    notes: str = ""  # keys of the config that decide something unseen, or that are not read

    @property
    def rope_type(self) -> str:
        return self.rope_parameters.get("rope_type", "default")


@cache
def _of_transformers() -> dict[str, Any]:
    """Written by tools/make_config_defaults.py."""
    return json.loads(Path(__file__).with_name("config_defaults.json").read_text(encoding="utf-8"))


def defaults() -> dict[str, dict[str, Any]]:
    """Config class defaults of every RoPE decoder family in transformers."""
    return _of_transformers()["families"]


def explains_wrong_types(read: F) -> F:
    """Turn what a config with values of the wrong type raises into a SkipwiseError.

    A config.json can come from anybody, and has hundreds of keys.
    """

    @wraps(read)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return read(*args, **kwargs)
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            raise SkipwiseError(
                f"the config of this model has a value of the wrong kind ({error})\n"
                "correct its config.json, or give another model"
            ) from error

    return cast(F, checked)


@explains_wrong_types
def read_model_info(
    config: Mapping[str, Any], original_length: int | None = None, *, ask: bool = True
) -> ModelInfo:
    """Read a config: transformers' `to_dict()`, or the result of `hf_config.complete`.

    Args:
        original_length: the length that the model was trained at, if its config is wrong
            (Mistral-7B-v0.1 says 32k but was trained at 8k). The length before the config's own
            scaling means that this scaling was not trained, so it is replaced.
        ask: refuse a config whose keys disagree about the length; otherwise it is what
            max_position_embeddings says.

    Raises:
        SkipwiseError: the model cannot be extended; says why and what to do.
    """
    family = config.get("model_type", "unknown")
    known = defaults().get(family, {})
    check_extendable(config)
    parameters = dict(config["rope_parameters"])
    nested = isinstance(parameters.get(_FULL), Mapping)
    parameters = dict(parameters[_FULL] if nested else parameters)
    if "rope_type" in parameters:
        parameters.pop("type", None)  # its older name, which transformers keeps
    parameters = {k: v for k, v in parameters.items() if v is not None}
    stated: int = _get(config, "max_position_embeddings") or original_length or 0
    if not stated:
        raise SkipwiseError(
            f"the config of this {family} model does not say its length: type original_length=..."
        )
    for key in ("vocab_size", "hidden_size", "num_attention_heads"):
        if not _get(config, key):
            raise SkipwiseError(f"the config of this {family} model is incomplete: it has no {key}")
    hidden, heads = _get(config, "hidden_size"), _get(config, "num_attention_heads")
    head_dim = _full_head_dim(config) or hidden // heads
    plain = parameters.get("rope_type", "default") == "default"
    if plain and "partial_rotary_factor" in parameters and known.get(_IGNORES_SHARE):
        parameters["partial_rotary_factor"] = 1.0  # said to scaled modules, which read it
    rotary_dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    if not 2 <= rotary_dim <= head_dim or rotary_dim % 2:
        raise SkipwiseError(
            f"this {family} model cannot be extended: RoPE would rotate {rotary_dim} of a head's "
            f"{head_dim} dimensions\ngive head_dim and partial_rotary_factor as its base has them"
        )
    parameters, notes = _without_alpha(parameters, rotary_dim, known)
    theta = float(parameters.get("rope_theta", 10000.0))
    computed, refused = parameters, known.get("refused_rope_types", ())
    if parameters.get("rope_type") == PROPORTIONAL:
        theta, rotary_dim, computed = _as_default(parameters, head_dim, family)
        refused = [name for name in SCALINGS if name != "ntk"]
    _refuse_unread(config, theta, rotary_dim)
    scaling, length, more = _trained(computed, config, stated, original_length, ask)
    layers = set(config.get("layer_types") or [])
    window = config.get("sliding_window")
    if config.get("use_sliding_window", True) is False or (layers and _SLIDING not in layers):
        window = None
    return ModelInfo(
        family=family,
        original_length=length,
        rope_theta=theta,
        rope_parameters=parameters,
        scaling=scaling,
        nested=nested,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        sliding_window=window,
        hybrid=_SLIDING in layers and _FULL in layers,
        lists_layers=bool(layers) and "use_sliding_window" not in config,
        recurrent=bool(layers & _RECURRENT),
        vocab_size=config["vocab_size"],
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        refused_types=tuple(refused),
        notes="; ".join(filter(None, (notes, more))),
    )


def check_extendable(config: Mapping[str, Any]) -> None:
    """Refuse models without RoPE, and models that Skipwise cannot extend, with a SkipwiseError."""
    family = config.get("model_type", "unknown")
    if config.get("is_encoder_decoder"):
        raise SkipwiseError(
            f"{family} is an encoder-decoder, and PoSE extends decoders\n"
            "choose a decoder with RoPE: Llama, Mistral, Qwen, Gemma, Phi, GPT-NeoX, ..."
        )
    text = config.get("text_config")
    if text is not None or has_other_parts(config):
        refuse_text_model(family, text)
        raise SkipwiseError(
            f"{family} contains a language model and other parts, and only the language model has "
            "a window to extend\ntype load.text_only=true to extend that, without the other parts"
        )
    if config.get("quantization_config") is not None:
        raise SkipwiseError(
            f"this {family} checkpoint is quantised, and its weights cannot be trained\n"
            "give the original checkpoint, which is not quantised"
        )
    check_positions(config)
    parameters = config.get("rope_parameters")
    if not parameters:
        raise SkipwiseError(_refusal(family, "no RoPE settings"))
    for key, on in _SWITCHES.items():
        if key in defaults().get(family, {}) and config.get(key) != on:
            value = json.dumps(config.get(key))
            raise SkipwiseError(_refusal(family, f"no positions ({key} is {value})"))
    layers = set(config.get("layer_types") or [])
    if layers and layers <= _RECURRENT - {"hybrid"}:
        raise SkipwiseError(_refusal(family, "no attention layer"))
    if config.get("attention_window_size"):  # RecurrentGemma
        layers = {_SLIDING, "recurrent"}
    per_type = [k for k, value in parameters.items() if isinstance(value, Mapping) or k == _FULL]
    if (per_type and not isinstance(parameters.get(_FULL), Mapping)) or (
        layers & {_SLIDING, _CHUNKED} and _FULL not in layers and layers != {_SLIDING}
    ):
        raise SkipwiseError(
            f"{family} has no full-attention layer with RoPE (its layers: "
            f"{', '.join(sorted(layers or per_type))}), and only such layers can look further back"
            "\nchoose another model"
        )
    if defaults().get(family, {}).get("rotates_if_sliding") and {_SLIDING, _FULL} <= layers:
        raise SkipwiseError(
            f"{family} has RoPE only in its sliding layers: the full layers, which look far back, "
            "have no positions to learn\nchoose another model"
        )
    if _CHUNKED in layers:
        raise SkipwiseError(
            f"{family} has RoPE only in layers that see a chunk at a time, so there is no far "
            "position to learn\nchoose another model"
        )


def check_positions(config: Mapping[str, Any]) -> None:
    """Refuse a model with other positions than RoPE, with a SkipwiseError."""
    family = config.get("model_type", "unknown")
    if config.get("alibi") or family in _OTHER_POSITIONS:
        raise SkipwiseError(_refusal(family, _OTHER_POSITIONS.get(family, "ALiBi")))
    if family in _of_transformers()["without_rope"]:  # whatever its config.json says
        raise SkipwiseError(_refusal(family, "no RoPE settings"))


def check_reach(config: Mapping[str, Any], length: int) -> None:
    """Refuse, with a SkipwiseError, to evaluate learned positions beyond their table's end."""
    family = config.get("model_type", "unknown")
    stated = _get(config, "max_position_embeddings")
    if _OTHER_POSITIONS.get(family, "").startswith("learned") and stated and length > stated:
        raise SkipwiseError(
            f"{family} has {stated:,} learned positions, and cannot be measured at {length:,} "
            f"tokens\ntype --lengths up to {stated}"
        )


def has_other_parts(config: Mapping[str, Any]) -> bool:
    """Whether it is a multimodal model, of which transformers has no causal class."""
    family = config.get("model_type")
    if family in defaults():
        return False
    own_class = "AutoModelForCausalLM" in (config.get("auto_map") or {})
    listed = family in _of_transformers()["multimodal"] and not own_class
    return listed or any(config.get(part) for part in _OTHER_PARTS)


def refuse_text_model(family: str, text: Mapping[str, Any] | None) -> None:
    """SkipwiseError if transformers has no class for the text model of a multimodal one alone."""
    inner = (text or {}).get("model_type")
    if inner not in defaults():
        part = f"its text model{f' ({inner})' if inner else ''}"
        raise SkipwiseError(
            f"{family} cannot be extended: transformers has no causal language model class for "
            f"{part}\nchoose a model of text: Llama, Mistral, Qwen 2.5, Qwen 3, Gemma, ..."
        )


def _refuse_unread(config: Mapping[str, Any], theta: float, rotary_dim: int) -> None:
    """SkipwiseError where a released key decides RoPE and the class in transformers ignores it."""
    family = config.get("model_type", "unknown")
    stated = (config.get("attn_config") or {}).get("rope_theta")
    if stated and stated != theta:  # DBRX
        raise SkipwiseError(
            f"{family}: transformers ignores attn_config.rope_theta {stated:,} and computes with "
            f'{theta:,.0f}\nwrite "rope_theta": {stated} into config.json, outside of attn_config'
        )
    stated = config.get("rotary_dim")
    if stated and stated < rotary_dim and family == "minimax":  # its class rotates whole heads
        raise SkipwiseError(
            f"{family}: transformers ignores rotary_dim {stated} and rotates {rotary_dim} "
            "dimensions of a head, so it computes another model\nchoose another model"
        )


def _full_head_dim(config: Mapping[str, Any]) -> int | None:
    """head_dim of the full-attention layers, which may have their own (Gemma 4)."""
    layers, found = config.get("layer_types") or [], config.get("global_head_dim")
    for layer, own in (config.get("per_layer_config") or {}).items():
        if layers[int(layer) :][:1] == [_FULL]:
            found = own.get("head_dim") or found
    return found or config.get("head_dim")


def _as_default(
    parameters: dict[str, Any], head_dim: int, family: str
) -> tuple[float, int, dict[str, Any]]:
    """(theta, rotary dimension, parameters) of default RoPE with proportional RoPE's frequencies.

    Its pairs j < r have theta^(-2j/head_dim), and the other pairs do not rotate.
    Source: transformers 5, `_compute_proportional_rope_parameters`.
    """
    if parameters.get("factor", 1.0) != 1.0:
        raise SkipwiseError(
            f"this {family} model cannot be extended: its proportional RoPE has a factor already, "
            "which only transformers reads\nchoose the model it was made from"
        )
    rotary_dim = int(parameters.get("partial_rotary_factor", 1.0) * head_dim // 2) * 2
    theta = float(parameters.get("rope_theta", 10000.0)) ** (rotary_dim / head_dim)
    return theta, rotary_dim, {"rope_type": "default", "rope_theta": theta}


def _without_alpha(
    parameters: dict[str, Any], dim: int, known: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """(parameters with theta' = theta alpha^(d/(d-2)), what was done), for families with `alpha`.

    Source: Tencent Hunyuan; it is NTK-aware scaling that was trained, and no length counts.
    """
    alpha = parameters.get("alpha")
    if not (known.get("reads_alpha") and alpha and parameters.get("rope_type") == "dynamic"):
        return parameters, ""
    theta = float(parameters.get("rope_theta", 10000.0)) * float(alpha) ** (dim / (dim - 2))
    done = f"alpha {alpha:g} makes rope_theta {theta:,.0f}, and its other scaling keys do nothing"
    return {"rope_type": "default", "rope_theta": theta}, done


def _trained(
    parameters: dict[str, Any],
    config: Mapping[str, Any],
    stated: int,
    given: int | None,
    ask: bool,
) -> tuple[Scaling, int, str]:
    """(the scaling that the weights were trained with, their window L, notes)."""
    what = f"this {config.get('model_type', 'unknown')} model"
    if given and given == counts_from(parameters, stated):
        return Unscaled(), given, ""  # replaced, so its keys do not count
    try:
        present = from_rope_parameters(parameters, max_position_embeddings=stated)
    except SkipwiseError as error:
        raise SkipwiseError(f"{what} cannot be extended: {error}") from error
    notes = unread_keys(parameters)
    if present.follows_length:
        present = Unscaled()
    dual = (config.get("dual_chunk_attention_config") or {}).get("original_max_position_embeddings")
    if dual and dual < stated and given is None and isinstance(present, Unscaled):
        served = f"dual_chunk_attention_config serves {stated:,} tokens in chunks, with weights"
        served += f" trained at {dual:,}"
        return present, dual, "; ".join(filter(None, (notes, served)))
    keeps = keeps_length(present, config.get("model_type", "unknown"))
    window = stated if present.keeps_length and not keeps else present.window(stated)
    if ask and given is None:
        _ask_length(config, parameters, present, stated, what)
    return present, given or window, notes


def _ask_length(
    config: Mapping[str, Any], parameters: dict[str, Any], present: Scaling, stated: int, what: str
) -> None:
    """SkipwiseError, with what to type, if the config does not tell L."""
    keeps = keeps_length(present, config.get("model_type", "unknown"))
    window, before = present.window(stated), getattr(present, "original_length", stated)
    if present.keeps_length and not keeps:  # Gemma 3: stated is the window
        window, before = stated, stated
    scaled = f"{what} has {present.name} scaling by {present.factor:g}, and its config"
    if keeps:  # it should be L, and models differ
        raise SkipwiseError(
            f"{scaled} does not say whether {stated:,} tokens is the window before or after "
            f"scaling\ntype original_length={stated}, or original_length={window}: the window it "
            "has now"
        )
    if present.factor > 1 and window <= before and not present.keeps_length:
        reach = round(present.factor * before)
        raise SkipwiseError(
            f"{scaled} says max_position_embeddings {stated:,}, which is not above the {before:,} "
            f"before scaling\ntype original_length={reach}, or the window it was trained for; or "
            f"original_length={before} if it was never trained with this scaling"
        )
    if before != stated < 0.95 * window and not parameters.get("finetuned"):
        raise SkipwiseError(
            f"{scaled} says max_position_embeddings {stated:,}, where the scaling reaches "
            f"{window:,} tokens\ntype original_length={stated}, or original_length={window}: the "
            "window it was trained for"
        )
    keys = LENGTHS if present.factor > 1 else (*LENGTHS, "original_max_position_embeddings")
    known = defaults().get(config.get("model_type", ""), {})  # Phi-3's class has one of its own
    dual = config.get("dual_chunk_attention_config") or {}  # here it does not name L
    found = {"chunk_size": dual.get("chunk_size"), **{key: config.get(key) for key in keys}}
    lengths = {
        key: int(length)
        for key, length in found.items()
        if isinstance(length, int | float)
        and 0 < length < 1e9
        and length not in (stated, window, before, known.get(key))
    }
    if lengths:
        others = " and ".join(f"{key} {length:,}" for key, length in lengths.items())
        typed = [f"original_length={n}" for n in dict.fromkeys((window, *lengths.values()))]
        raise SkipwiseError(
            f"{what} has max_position_embeddings {stated:,} and {others}, and its weights were "
            f"trained at one of them\ntype {', or '.join(typed)}"
        )


def _refusal(family: str, positions: str) -> str:
    return (
        f"{family} has {positions}, and PoSE extends rotary position embeddings (RoPE) only\n"
        "choose a RoPE model: Llama, Mistral, Qwen, Gemma, Phi, GPT-NeoX, ..."
    )


def _get(config: Mapping[str, Any], key: str) -> Any:
    """The value under the current name or an older one."""
    return next((config[k] for k in (key, *_ALIASES.get(key, ())) if config.get(k)), None)
