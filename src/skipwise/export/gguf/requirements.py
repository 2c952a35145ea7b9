"""What a model folder asks for, and whether llama.cpp can compute it."""

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
from skipwise.pose.rope import LongRoPE, Scaling, YaRN

_TABLE_CLASSES = {"LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"}  # become llama


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """What the folder's config.json asks for."""

    info: ModelInfo
    architecture: str  # the class's name
    target_length: int  # T

    @property
    def scaling(self) -> Scaling:
        return self.info.scaling

    @property
    def by_table(self) -> bool:
        """Whether only a table of frequencies says it: llama.cpp has no keys for this scaling."""
        scaling = self.scaling
        if isinstance(scaling, YaRN):
            return (scaling.beta_fast, scaling.beta_slow, scaling.truncate) != (32, 1, True)
        return scaling.name == "llama3" or (
            isinstance(scaling, LongRoPE) and self.architecture in _TABLE_CLASSES
        )

    @property
    def attn_factor(self) -> float:
        """The key's value: what yarn does not multiply by on its own."""
        own = 1.0
        if isinstance(self.scaling, YaRN) and not self.by_table:
            own += 0.1 * math.log(self.scaling.factor)
        return self.scaling.attention_factor / own

    def inv_freq(self) -> np.ndarray:
        return self.scaling.inv_freq(self.info.rope_theta, self.info.rotary_dim)


def read_requirements(folder: Path) -> Requirements:
    """RoPE and length of a model folder.

    Raises:
        SkipwiseError: no model that Skipwise can read, or dynamic scaling.
    """
    raw = read_config(str(folder), ModelSettings())
    config = complete(raw)
    parameters = config.get("rope_parameters") or {}
    parameters = parameters.get("full_attention") or parameters
    linear = parameters.get("rope_type") == "linear"
    stated = config.get("max_position_embeddings") or 0
    info = read_model_info(
        config, (stated if linear else 0) or None
    )  # L, which read_model_info would ask for
    if info.rope_type == "dynamic":
        raise SkipwiseError(
            "llama.cpp has no dynamic scaling, whose frequencies grow with the text\n"
            "type rope.type=yarn method=none for one that needs no training either"
        )
    recipe = folder / "skipwise_recipe.yaml"
    if recipe.is_file():
        target = load_run_recipe(recipe).target_length
    else:
        target = round(stated * info.scaling.factor) if linear else info.original_length
    return Requirements(
        info=info, architecture=(raw.get("architectures") or [""])[0], target_length=target
    )


def refuse(requirements: Requirements) -> None:
    """What llama.cpp cannot compute, before minutes of conversion.

    Raises:
        SkipwiseError: why, and what can be converted.
    """
    scaling, architecture = requirements.scaling, requirements.architecture
    portable = "type rope.type=yarn without options, linear or ntk, which every runtime computes"
    if not scaling.trainable:
        raise SkipwiseError(
            f"llama.cpp would take {scaling.name}'s short_factor or long_factor by the size of its "
            f"buffer, and transformers takes them by the length of the text\n{portable}"
        )
    if (requirements.by_table and architecture not in _TABLE_CLASSES) or (
        isinstance(scaling, LongRoPE) and architecture not in {*_TABLE_CLASSES, "Phi3ForCausalLM"}
    ):
        special = " with these options" if isinstance(scaling, YaRN) else ""
        raise SkipwiseError(
            f"llama.cpp cannot compute {scaling.name}{special} for {architecture}\n{portable}"
        )
    if requirements.info.nested and abs(requirements.attn_factor - 1) > 1e-6:
        raise SkipwiseError(
            f"llama.cpp would multiply the sliding layers of {architecture} by the attention "
            f"factor {scaling.attention_factor:g} too\nleave attention_factor out"
        )
