"""What a model folder asks for, and whether llama.cpp can compute it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from skipwise.config.parse import load_recipe
from skipwise.config.recipe import ModelSettings
from skipwise.errors import SkipwiseError
from skipwise.models.hf_config import complete, read_config
from skipwise.models.model_info import ModelFacts, read_facts
from skipwise.pose.rope import LongRoPE, Scaling, YaRN

_TABLE_CLASSES = {"LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"}  # become llama


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the folder's config.json asks for."""

    facts: ModelFacts
    architecture: str  # the class's name
    target_length: int  # T

    @property
    def scaling(self) -> Scaling:
        return self.facts.scaling

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
        return self.scaling.inv_freq(self.facts.rope_theta, self.facts.rotary_dim)


def read_asked(folder: Path) -> Asked:
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
    facts = read_facts(
        config, (stated if linear else 0) or None
    )  # L, which read_facts would ask for
    if facts.rope_type == "dynamic":
        raise SkipwiseError(
            "llama.cpp has no dynamic scaling, whose frequencies grow with the text\n"
            "type rope.type=yarn method=none for one that needs no training either"
        )
    recipe = folder / "skipwise_recipe.yaml"
    if recipe.is_file():
        target = load_recipe(recipe).target_length
    else:
        target = round(stated * facts.scaling.factor) if linear else facts.original_length
    return Asked(
        facts=facts, architecture=(raw.get("architectures") or [""])[0], target_length=target
    )


def refuse(asked: Asked) -> None:
    """What llama.cpp cannot compute, before minutes of conversion.

    Raises:
        SkipwiseError: why, and what can be converted.
    """
    scaling, architecture = asked.scaling, asked.architecture
    portable = "type rope.type=yarn without options, linear or ntk, which every runtime computes"
    if not scaling.trainable:
        raise SkipwiseError(
            f"llama.cpp would take {scaling.name}'s short_factor or long_factor by the size of its "
            f"buffer, and transformers takes them by the length of the text\n{portable}"
        )
    if (asked.by_table and architecture not in _TABLE_CLASSES) or (
        isinstance(scaling, LongRoPE) and architecture not in {*_TABLE_CLASSES, "Phi3ForCausalLM"}
    ):
        special = " with these options" if isinstance(scaling, YaRN) else ""
        raise SkipwiseError(
            f"llama.cpp cannot compute {scaling.name}{special} for {architecture}\n{portable}"
        )
    if asked.facts.nested and abs(asked.attn_factor - 1) > 1e-6:
        raise SkipwiseError(
            f"llama.cpp would multiply the sliding layers of {architecture} by the attention "
            f"factor {scaling.attention_factor:g} too\nleave attention_factor out"
        )
