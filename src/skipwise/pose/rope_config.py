"""The RoPE settings of a config.json: read into a scaling, and written in both spellings."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

from skipwise.errors import SkipwiseError
from skipwise.pose.rope import SCALINGS, Scaling, make_scaling

_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor")
_COMMON += ("original_max_position_embeddings",)
# What the attention of some families reads beside RoPE; it stays as it was trained.
CARRIED = ("partial_rotary_factor", "mrope_section", "mrope_interleaved", "llama_4_scaling_beta")
_COMPUTED = {  # (rope_type, key) without effect in transformers: what other runtimes do with it
    ("yarn", "attn_factor"): "SGLang and vLLM up to 0.15 multiply the attention factor by it",
    ("yarn", "extrapolation_factor"): "SGLang and vLLM multiply the ramp by it",
    ("yarn", "apply_yarn_scaling"): "vLLM leaves the attention factor of yarn out if it is false",
    ("dynamic", "alpha"): "SGLang and vLLM raise rope_theta by it",
    ("longrope", "short_mscale"): "SGLang and vLLM take it for the attention factor",
    ("longrope", "long_mscale"): "SGLang and vLLM take it for the attention factor",
}


def unread_keys(rope_parameters: dict[str, Any]) -> str:
    """What to say of keys from which transformers computes nothing; empty if there are none."""
    name = _name(rope_parameters)
    read = (*_COMMON, "llama_4_scaling_beta")
    unread = [key for key in rope_parameters if key not in (*read, *_options(name))]
    said, quiet = [], []
    for key in unread:
        value, computed = rope_parameters[key], _COMPUTED.get((name, key))
        if computed and value not in (None, 1):
            said.append(f"{key} {json.dumps(value)} has no effect in transformers, but {computed}")
        else:
            quiet.append(key)
    return "; ".join([*said, *([f"nothing is computed from {', '.join(quiet)}"] if quiet else [])])


def counts_from(rope_parameters: dict[str, Any], max_position_embeddings: int) -> int | None:
    """The length before the scaling of a config; None if its type counts from no length."""
    scaling = SCALINGS.get(_name(rope_parameters))
    if scaling is None or "original_length" not in {f.name for f in dataclasses.fields(scaling)}:
        return None
    return rope_parameters.get("original_max_position_embeddings") or max_position_embeddings


def from_rope_parameters(
    rope_parameters: dict[str, Any], *, max_position_embeddings: int
) -> Scaling:
    """The scaling of an existing config. ntk is read as `Unscaled` with theta' as theta.

    Args:
        rope_parameters: As in transformers 5, or the older `rope_scaling`.
        max_position_embeddings: Of the config. It is L if the parameters have none, and T in a yarn
            or longrope config without a factor.

    Raises:
        SkipwiseError: parameters per layer type, an unknown type, no factor, an option that is no
            number. Keys that the type does not have are passed over: see `unread_keys`.
    """
    if isinstance(rope_parameters.get("full_attention"), dict):
        raise SkipwiseError("these rope_parameters are per layer type: give those of one type")
    name = _name(rope_parameters)
    known = {cls.name: cls for cls in SCALINGS.values() if cls.is_rope_type}
    if name not in known:
        raise SkipwiseError(
            f"the config's rope_type is {name!r}, which Skipwise cannot compute: it knows "
            f"{', '.join(known)}"
        )
    stored = rope_parameters.get("original_max_position_embeddings")
    length = stored or max_position_embeddings
    factor = 1.0 if name == "default" else rope_parameters.get("factor")
    if factor is None and known[name].factor_from_lengths:
        factor = max_position_embeddings / length
    options = {key: rope_parameters.get(key) for key in _options(name)}
    options = {k: v for k, v in options.items() if v or not k.startswith("mscale")}  # 0 is unset
    given: dict[str, Any] = {"factor": factor, "original_length": length, **options}
    for field in dataclasses.fields(known[name]):
        if field.default is dataclasses.MISSING and given.get(field.name) is None:
            what = f"the config's rope_type is {name} and it has no {field.name}: add it"
            raise SkipwiseError(what)
    return make_scaling(name, **given)


def _name(rope_parameters: dict[str, Any]) -> str:
    return rope_parameters.get("rope_type", rope_parameters.get("type", "default"))


def _options(name: str) -> list[str]:
    """The keys that transformers computes from for this rope_type, beside the common ones."""
    fields = dataclasses.fields(SCALINGS[name]) if name in SCALINGS else ()
    return [f.name for f in fields if f.name not in ("factor", "original_length")]


def with_legacy_rope_keys(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with the RoPE keys of transformers 5 and the older ones.

    transformers 5 reads and writes `rope_parameters`. transformers 4, vLLM and llama.cpp's
    converter read `rope_theta` and `rope_scaling`, and load a model without them as unscaled.
    transformers 5 prefers the older keys, so the two must agree.

    Settings per layer type are kept. The older keys are added if transformers 4 has keys for them:
    for gemma3_text, and for olmo3 with one theta. Other families, and a model under `text_config`,
    get no `rope_scaling`: transformers 4 cannot load such a model as it was trained.
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
    # in transformers 4 four families refuse other keys; f and L follow from the top level
    if family in ("phi3", "phi4_multimodal") and "attention_factor" not in scaling:
        scaling = {k: v for k, v in scaling.items() if k in ("type", "short_factor", "long_factor")}
    if family in ("olmo", "olmo2") and scaling["type"] in ("linear", "dynamic"):
        del scaling["rope_type"]
    plain = set(scaling) <= {"rope_type", "type"}
    out["rope_scaling"] = None if plain else copy.deepcopy(scaling)
    return out
