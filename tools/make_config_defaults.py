"""Write src/skipwise/models/config_defaults.json: what transformers' config classes default to.

python tools/make_config_defaults.py

For every causal language model whose config has rope_parameters: those of the defaults that
`skipwise.models.model_info` reads, and the rope_types that the class turns down or renames. What a
class reads under another name, and what it ignores, is found by trying: each key is given to the
class, and the config that it makes is compared with the default one. `without_rope` names the
others, and `multimodal` the models of which transformers has no causal language model class.
"""

import contextlib
import copy
import importlib
import inspect
import io
import json
import re
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from skipwise.models.hf_config import SHAPE
from skipwise.pose.rope import make_scaling

FILE = Path(__file__).parents[1] / "src/skipwise/models/config_defaults.json"
KEYS = ("max_position_embeddings", "sliding_window", "use_sliding_window", "tie_word_embeddings")
KEYS += ("original_max_position_embeddings",)
KEYS += SHAPE  # wrappers leave these out of their text_config
ROTATES_IF_SLIDING = re.compile(
    r"if self\.(sliding_window is|is_local)[^\n]*:\n([^\n]*= position_embeddings\n)?"
    r"[^\n]*= apply_rotary_pos_emb\("
)
SWITCHES = ("position_embedding_type", "use_mem_rope")  # recorded with null as well
SPELLINGS = {  # keys that some class reads, under the value that is tried
    "head_dim": 48,
    "qk_rope_head_dim": 48,
    "kv_channels": 48,
    "attention_head_dim": 48,
    "rotary_dim": 32,
    "d_model": 4800,
    "n_embed": 4800,
    "n_heads": 24,
    "max_seq_len": 5000,
    "model_max_length": 5000,
    "rope_theta": 77777.0,
    "global_rope_theta": 77777.0,
    "rotary_emb_base": 77777.0,
    "local_rope_theta": 77777.0,
    "partial_rotary_factor": 0.375,
    "rotary_pct": 0.375,
    "layer_types": ["linear_attention", "full_attention"],
    "layers_block_type": ["linear_attention", "full_attention"],
    "full_attn_idxs": [1],
    "attn_layer_indices": [1],
}
TYPES = ("linear", "yarn", "llama3", "longrope", "dynamic")


def entry(family: str) -> dict[str, Any] | None:
    """The family's line of the table; None where it has no RoPE settings."""
    config_class = CONFIG_MAPPING[family]
    try:
        config = config_class()
    except Exception as error:
        print(f"{family}: {str(error).splitlines()[0]}")
        return None
    if not getattr(config, "rope_parameters", None) or not hasattr(config, "hidden_size"):
        return None
    out: dict[str, Any] = {k: read(config, k) for k in KEYS if read(config, k) is not None}
    out["rope_parameters"] = dict(sorted(config.rope_parameters.items()))
    if read(config, "layer_types"):
        kinds = list(config.layer_types)
        out["layer_types"] = sorted(set(kinds))
        period = next(n for n in range(1, len(kinds) + 1) if kinds[n:] == kinds[:-n])
        if 1 < period <= len(kinds) // 2:
            out["layer_pattern"] = kinds[:period]
    layers = config.to_dict().get("per_layer_config") or {}
    wide = {layer["head_dim"] for layer in layers.values() if "head_dim" in layer}
    if wide:  # of the full-attention layers (Gemma 4)
        (out["global_head_dim"],) = wide
    # a head_dim that does not follow the width is the class's own
    with contextlib.suppress(Exception):
        heads = config.num_attention_heads
        wide, wider = (read(config_class(hidden_size=heads * n), "head_dim") for n in (1000, 2000))
        if wide == wider is not None:
            out["head_dim"] = wide
        elif wide not in (None, 1000):
            out["head_dim_ratio"] = wide // 1000
    out |= {key: read(config, key) for key in SWITCHES if hasattr(config, key)}
    keys = spellings(config_class, config)
    if keys:
        out["keys"] = keys
    with contextlib.suppress(Exception):
        own = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
        own = {} if "rope_type" not in config.rope_parameters else own
        halves = rotary(config_class(partial_rotary_factor=0.375, **copy.deepcopy(own)))
        if len(halves) == len(rotary(config_class(**own))) and "partial_rotary_factor" not in keys:
            out["ignores_partial_rotary_factor"] = True
    with contextlib.suppress(Exception):
        dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0}
        size = {"head_dim": 64} if read(config, "head_dim") is None else {}
        plain = rotary(config_class(rope_parameters=dict(dynamic), **size))
        if not plain.equal(rotary(config_class(rope_parameters={**dynamic, "alpha": 9.0}, **size))):
            out["reads_alpha"] = True
    module = type(config).__module__.replace("configuration_", "modeling_")
    with contextlib.suppress(ImportError):
        if ROTATES_IF_SLIDING.search(inspect.getsource(importlib.import_module(module))):
            out["rotates_if_sliding"] = True
    refused = [name for name in TYPES if not takes(config_class, config, name)]
    if refused:
        out["refused_rope_types"] = refused
    return out


def without_rope(family: str) -> bool:
    """Whether the class alone, without parts that are models, has no RoPE settings."""
    with contextlib.suppress(Exception):
        config = CONFIG_MAPPING[family]()
        return not config.sub_configs and getattr(config, "rope_parameters", None) is None
    return False


def read(config: Any, key: str) -> Any:
    """An attribute, also of the other name that the class has for it; None if there is none."""
    try:
        return getattr(config, key, None)
    except RuntimeError:  # it differs between layers
        return None


def facts(config: Any) -> dict[str, Any]:
    """What `complete` works out, under the names that it uses."""
    parameters = config.rope_parameters
    full = parameters.get("full_attention", parameters) or {}
    keys = ("hidden_size", "num_attention_heads", "max_position_embeddings", "head_dim")
    share = full.get("partial_rotary_factor")
    return {
        **{key: read(config, key) for key in keys},
        "rope_theta": full.get("rope_theta"),
        "rope_local_base_freq": (parameters.get("sliding_attention") or {}).get("rope_theta"),
        "partial_rotary_factor": share,
        "rotary_width": share and share * (read(config, "head_dim") or 0),
        "layer_types": read(config, "layer_types"),
    }


def spellings(config_class: Any, config: Any) -> dict[str, str | None]:
    """Key in config.json: the name that the class reads it as, or None if it ignores it."""
    found: dict[str, str | None] = {}
    before = facts(config)
    for key, value in SPELLINGS.items():
        if key.startswith("layer"):
            value = (value * config.num_hidden_layers)[: config.num_hidden_layers]
        try:
            given = {key: value}
            after = facts(config_class(**given))
            if key == "rope_theta" and after == before and "rope_type" in config.rope_parameters:
                given["rope_parameters"] = {"rope_type": "default"}  # the class's own come first
                after = facts(config_class(**given))
        except Exception:
            continue
        changed = [fact for fact in after if after[fact] == value != before[fact]]
        if isinstance(value, list) and after["layer_types"] != before["layer_types"]:
            changed = ["layer_types" if key.startswith("layer") else "full_layers"]
        if changed and key not in changed:
            found[key] = changed[0]
        elif key in before and not changed and before[key] != value:
            found[key] = None
    return found


def rotary(config: Any) -> Any:
    """The frequencies that the family's rotary module computes for its full-attention layers."""
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    for name, found in vars(module).items():
        if inspect.isclass(found) and name.endswith("RotaryEmbedding") and "Vision" not in name:
            buffers = dict(found(config).named_buffers())
            return buffers.get("full_attention_inv_freq", buffers.get("inv_freq"))
    return None


def takes(config_class: Any, config: Any, name: str) -> bool:
    """Whether the config class keeps this rope_type as it is given."""
    parameters = dict(config.rope_parameters)
    nested = isinstance(parameters.get("full_attention"), dict)
    full = parameters["full_attention"] if nested else parameters
    plain = config.to_dict()
    head_dim = plain.get("head_dim") or config.hidden_size // config.num_attention_heads
    share = full.get("partial_rotary_factor", 1.0) if isinstance(full, dict) else 1.0
    dim = int(head_dim * share) // 2 * 2
    scaling = make_scaling(name, factor=4, original_length=8192, theta=10000.0, dim=dim)
    settings = scaling.to_config(theta=10000.0, dim=dim, original_length=8192, target_length=32768)
    if plain.get("head_dim", 0) is None:  # the scaled rotary modules do not work it out
        settings["head_dim"] = head_dim
    given = settings.pop("rope_parameters")
    if share != 1.0:
        given["partial_rotary_factor"] = share
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            made = config_class(
                rope_parameters={**parameters, "full_attention": given} if nested else given,
                **settings,
            )
            made.validate_rope()
    except Exception:
        return False
    kept = made.rope_parameters
    kept = kept.get("full_attention") if nested else kept
    return isinstance(kept, dict) and kept.get("rope_type") == name


def main() -> None:
    families = {}
    for family in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        found = entry(family)
        if found:
            families[family] = found
    rest = [family for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if family not in families]
    without = json.dumps(sorted(family for family in rest if without_rope(family)))
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    multimodal = json.dumps(sorted(set(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES) - causal))
    lines = ",\n".join(f'  "{name}": {json.dumps(line)}' for name, line in families.items())
    FILE.write_text(
        f'{{\n "transformers": "{transformers.__version__}",\n "families": {{\n{lines}\n }},\n'
        f' "without_rope": {without},\n "multimodal": {multimodal}\n}}\n',
        encoding="utf-8",
    )
    print(f"{len(families)} families in {FILE}")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
