"""What a model folder requires, and whether llama.cpp can compute it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from skipwise.config.parse import load_run_recipe
from skipwise.config.recipe import ModelSettings
from skipwise.errors import SkipwiseError
from skipwise.models.hf_config import complete, read_config
from skipwise.models.model_info import ModelInfo, read_model_info
from skipwise.pose.rope import SCALINGS, Scaling, keeps_length

_TABLE_CLASSES = {"LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"}  # become llama
_OWN_KEYS = {("longrope", "Phi3ForCausalLM")}  # llama.cpp's converter writes these itself


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """What the folder's config.json requires."""

    info: ModelInfo
    architecture: str  # the class's name
    target_length: int  # T

    @property
    def scaling(self) -> Scaling:
        return self.info.scaling

    @property
    def by_table(self) -> bool:
        """Whether llama.cpp has no keys for this scaling and needs a table of frequencies."""
        return self.scaling.gguf_keys() is None and not self.own_keys

    @property
    def own_keys(self) -> bool:
        return (self.scaling.name, self.architecture) in _OWN_KEYS

    @property
    def attn_factor(self) -> float:
        """The key's value: llama.cpp's yarn multiplies by a factor of its own already."""
        keys = self.scaling.gguf_keys() or {}
        own = 1 + 0.1 * math.log(self.scaling.factor) if keys.get("type") == "yarn" else 1.0
        return self.scaling.attention_factor / own

    def inv_freq(self) -> np.ndarray:
        return self.scaling.inv_freq(self.info.rope_theta, self.info.rotary_dim)


def read_requirements(folder: Path) -> Requirements:
    """RoPE and length of a model folder.

    Raises:
        SkipwiseError: Skipwise cannot read the model, or its scaling follows the text's length.
    """
    raw = read_config(str(folder), ModelSettings())
    config = complete(raw)
    parameters = config.get("rope_parameters") or {}
    parameters = parameters.get("full_attention") or parameters
    kind = SCALINGS.get(parameters.get("rope_type", "default"))
    stated = config.get("max_position_embeddings") or 0
    given = stated if kind and kind.keeps_length else 0
    info = read_model_info(config, given or None, ask=False)
    if kind is not None and kind.follows_length:
        raise SkipwiseError(
            f"llama.cpp has no {kind.name} scaling, whose frequencies change with the length of "
            "the text\ntype rope.type=yarn method=none for one that needs no training either"
        )
    recipe = folder / "skipwise_recipe.yaml"
    if recipe.is_file():
        target = load_run_recipe(recipe, ["load.trust_remote_code=false"]).target_length
    else:
        states_L = keeps_length(kind, info.family)
        target = info.scaling.window(stated) if states_L else info.original_length
    return Requirements(
        info=info, architecture=(raw.get("architectures") or [""])[0], target_length=target
    )


def refuse(requirements: Requirements) -> None:
    """Refuse what llama.cpp cannot compute, before minutes of conversion.

    Raises:
        SkipwiseError: why, and what can be converted.
    """
    scaling, architecture = requirements.scaling, requirements.architecture
    portable = "type rope.type=yarn without options, linear or ntk, which every runtime computes"
    if not scaling.trainable:
        raise SkipwiseError(
            f"llama.cpp would choose {scaling.name}'s short_factor or long_factor by the size of "
            f"its buffer, and transformers chooses by the length of the text\n{portable}"
        )
    if requirements.by_table and architecture not in _TABLE_CLASSES:
        raise SkipwiseError(
            f"llama.cpp has no keys for this {scaling.name} scaling, and takes no table of "
            f"frequencies for {architecture}\n{portable}"
        )
    if requirements.info.nested and abs(requirements.attn_factor - 1) > 1e-6:
        raise SkipwiseError(
            f"llama.cpp would also multiply the sliding layers of {architecture} by the attention "
            f"factor {scaling.attention_factor:g}\nleave attention_factor out"
        )
