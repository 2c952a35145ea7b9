"""Write src/skipwise/models/config_defaults.json: what transformers' config classes default to.

python tools/make_config_defaults.py

For every causal language model whose config has rope_parameters: those of the defaults that
`skipwise.models.model_info` reads, and the rope_types that the class turns down or renames.
"""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from skipwise.models.hf_config import SHAPE
from skipwise.pose.rope import make_scaling

FILE = Path(__file__).parents[1] / "src/skipwise/models/config_defaults.json"
KEYS = ("max_position_embeddings", "sliding_window", "use_sliding_window", "tie_word_embeddings")
KEYS += SHAPE  # wrappers leave these out of their text_config
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
    plain = config.to_dict()
    out: dict[str, Any] = {key: plain[key] for key in KEYS if plain.get(key) is not None}
    out["rope_parameters"] = dict(sorted(plain["rope_parameters"].items()))
    if plain.get("layer_types"):
        out["layer_types"] = sorted(set(plain["layer_types"]))
    # a head_dim that does not follow the width is the class's own
    with contextlib.suppress(Exception):
        heads = config.num_attention_heads
        wider = config_class(hidden_size=heads * 1000).to_dict()
        if wider.get("head_dim") not in (None, 1000):
            out["head_dim"] = wider["head_dim"]
    refused = [name for name in TYPES if not takes(config_class, config, name)]
    if refused:
        out["refused_rope_types"] = refused
    return out


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
    lines = ",\n".join(f'  "{name}": {json.dumps(line)}' for name, line in families.items())
    FILE.write_text(
        f'{{\n "transformers": "{transformers.__version__}",\n "families": {{\n{lines}\n }}\n}}\n',
        encoding="utf-8",
    )
    print(f"{len(families)} families in {FILE}")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
