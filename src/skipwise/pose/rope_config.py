"""RoPE settings in a config.json: read into a scaling, and written in both spellings."""

from __future__ import annotations

import copy
from typing import Any

from skipwise.errors import SkipwiseError
from skipwise.pose.rope import NAMES, SCALINGS, Scaling, make_scaling


def from_rope_parameters(
    rope_parameters: dict[str, Any],
    *,
    max_position_embeddings: int,
    original_length: int | None = None,
) -> Scaling:
    """The scaling that an existing config holds; ntk reads as `Unscaled`, its theta' as theta.

    Args:
        rope_parameters: as transformers 5 holds them, or the older `rope_scaling`.
        max_position_embeddings: of the config. It is L where the parameters do not name one, and
            T in a yarn or longrope config without a factor.
        original_length: L, where the caller knows better.

    Raises:
        SkipwiseError: parameters per layer type, an unknown type or key, no factor.
    """
    if isinstance(rope_parameters.get("full_attention"), dict):
        raise SkipwiseError("these rope_parameters are per layer type: give those of one type")
    name = rope_parameters.get("rope_type", rope_parameters.get("type", "default"))
    if name not in SCALINGS or name == "ntk":
        known = ", ".join(known for known in NAMES if known != "ntk")
        raise SkipwiseError(
            f"the config's rope_type is {name!r}, which Skipwise cannot compute: it knows {known}"
        )
    stored = rope_parameters.get("original_max_position_embeddings")
    length = original_length or stored or max_position_embeddings
    factor = 1.0 if name == "default" else rope_parameters.get("factor")
    if factor is None and name in ("yarn", "longrope"):
        factor = max_position_embeddings / length
    read = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor")
    read += ("original_max_position_embeddings",)
    options = {key: value for key, value in rope_parameters.items() if key not in read}
    if factor is None:
        raise SkipwiseError(f"the config's rope_type is {name} and it has no factor: add it")
    if name == "longrope" and "long_factor" not in options:
        raise SkipwiseError("the config's rope_type is longrope and it has no long_factor: add it")
    return make_scaling(name, factor=factor, original_length=length, **options)


def with_legacy_rope_keys(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with RoPE spelled for transformers 5 and for everything older.

    transformers 5 reads and writes `rope_parameters`; transformers 4, vLLM and llama.cpp's
    converter read `rope_theta` and `rope_scaling`, and take a model without them for unscaled.
    transformers 5 lets the older spelling win, so the two must say the same.

    Settings per layer type stay as they are, and are spelled out where transformers 4 had words
    for them: gemma3_text, and olmo3 with one theta. Elsewhere (also under a `text_config`) no
    `rope_scaling` is added: transformers 4 cannot load such a model as it was trained.
    """
    out = copy.deepcopy(config)
    parameters = out.get("rope_parameters") or {}
    family = out.get("model_type")
    if isinstance(parameters.get("full_attention"), dict):
        full, sliding = parameters["full_attention"], parameters.get("sliding_attention") or {}
        one_theta = sliding.get("rope_theta") == full.get("rope_theta")
        # transformers 4 leaves the sliding layers unscaled
        if sliding.get("rope_type") != "default" or not (
            family == "gemma3_text" or (family == "olmo3" and one_theta)
        ):
            return out
        if family == "gemma3_text":
            out["rope_local_base_freq"] = sliding["rope_theta"]
        parameters = full
    elif "rope_type" not in parameters:
        return out
    moved = ("rope_theta", "partial_rotary_factor")
    out |= {key: parameters[key] for key in moved if key in parameters}
    if family in ("gpt_neox", "gpt_neox_japanese"):  # 4 and 5 read these, and not rope_theta
        out["rotary_emb_base"] = parameters["rope_theta"]
        out["rotary_pct"] = parameters.get("partial_rotary_factor", 1.0)
    scaling = {key: value for key, value in parameters.items() if key not in moved}
    scaling["type"] = scaling["rope_type"]  # its name before transformers 4.43
    # three families refuse other keys in transformers 4; f and L follow from the top level
    if family == "phi3" and "attention_factor" not in scaling:
        scaling = {k: v for k, v in scaling.items() if k in ("type", "short_factor", "long_factor")}
    if family in ("olmo", "olmo2") and scaling["type"] in ("linear", "dynamic"):
        del scaling["rope_type"]
    plain = set(scaling) <= {"rope_type", "type"}
    out["rope_scaling"] = None if plain else copy.deepcopy(scaling)
    return out
