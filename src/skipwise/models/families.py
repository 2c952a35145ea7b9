"""What a model's config says: its RoPE, its window, and why it cannot be extended if it cannot.

Facts are found by what a config holds, not by a list of family names: transformers gives every
decoder with RoPE settings a `rope_parameters` dictionary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipwise.errors import SkipwiseError
from skipwise.recipe import ModelSettings

_FULL, _SLIDING = "full_attention", "sliding_attention"
_OTHER_POSITIONS = {
    "gpt2": "learned absolute positions",
    "opt": "learned absolute positions",
    "gpt_bigcode": "learned absolute positions",
    "bloom": "ALiBi",
    "mpt": "ALiBi",
}


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What extension needs to know of a model."""

    family: str  # model_type
    original_length: int  # L, max_position_embeddings unless the recipe says otherwise
    rope_theta: float
    rope_parameters: dict[str, Any]  # of the full-attention layers
    nested: bool  # whether the config holds rope_parameters per layer type
    head_dim: int
    rotary_dim: int
    sliding_window: int | None
    hybrid: bool  # sliding layers beside full ones, by design
    vocab_size: int
    tied_embeddings: bool

    @property
    def rope_type(self) -> str:
        return self.rope_parameters.get("rope_type", "default")


def load_config(model: str, settings: ModelSettings) -> Any:
    """The model's config by transformers.

    Raises:
        SkipwiseError: no such folder or hub name, an adapter, remote code that was not asked for.
    """
    from transformers import AutoConfig

    folder = Path(model).expanduser()
    if folder.is_dir():
        _check_folder(folder)
    elif folder.exists() or model.startswith((".", "/", "~")):
        raise SkipwiseError(f"{model}: no such folder\ngive the folder of a model, or its hub name")
    try:
        return AutoConfig.from_pretrained(
            str(folder) if folder.is_dir() else model,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
        )
    except Exception as error:  # transformers and the hub raise many kinds
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "" if folder.is_dir() else ": it is no folder here, and the hub did not give it"
        raise SkipwiseError(f"{model} could not be read{where}\n{first}") from error


def read_facts(config: Any, original_length: int | None = None) -> ModelFacts:
    """Facts of a transformers config.

    Args:
        original_length: what the model was really trained at, where its config says otherwise
            (Mistral-7B-v0.1 says 32k and was trained at 8k).

    Raises:
        SkipwiseError: the model cannot be extended; says why and what to do.
    """
    family = getattr(config, "model_type", "unknown")
    if getattr(config, "is_encoder_decoder", False):
        raise SkipwiseError(f"{family} is an encoder-decoder: Skipwise extends decoders with RoPE")
    if getattr(config, "text_config", None) is not None:
        raise SkipwiseError(
            f"{family} wraps a language model with other parts: extend its text model alone"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise SkipwiseError(
            f"this {family} checkpoint is quantised: give the unquantised one it was made from"
        )
    if getattr(config, "alibi", False):
        raise SkipwiseError(_refusal(family, "ALiBi"))
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        raise SkipwiseError(_refusal(family, _OTHER_POSITIONS.get(family, "no RoPE settings")))
    nested = isinstance(parameters.get(_FULL), dict)
    parameters = dict(parameters[_FULL] if nested else parameters)
    length = original_length or getattr(config, "max_position_embeddings", None)
    if not length:
        raise SkipwiseError(
            f"the config of this {family} model does not say its length: type original_length=..."
        )
    heads = getattr(config, "num_attention_heads", 1)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    layers = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    return ModelFacts(
        family=family,
        original_length=length,
        rope_theta=float(parameters.get("rope_theta", 10000.0)),
        rope_parameters=parameters,
        nested=nested,
        head_dim=head_dim,
        rotary_dim=int(head_dim * parameters.get("partial_rotary_factor", 1.0)),
        sliding_window=window if not layers or _SLIDING in layers else None,
        hybrid=_SLIDING in layers and _FULL in layers,
        vocab_size=config.vocab_size,
        tied_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
    )


def check_unscaled(facts: ModelFacts) -> None:
    """Refuse a model that is scaled already: a second scaling on top would shrink the first."""
    if facts.rope_type != "default":
        raise SkipwiseError(
            f"this {facts.family} model is already scaled with {facts.rope_type} "
            f"({ {k: v for k, v in facts.rope_parameters.items() if k != 'rope_type'} })\n"
            "a second scaling would not give what was asked: extend the model it was made from"
        )


def _refusal(family: str, positions: str) -> str:
    return (
        f"{family} has {positions}, and PoSE extends rotary position embeddings (RoPE) only\n"
        "choose a RoPE model: Llama, Mistral, Qwen, Gemma, Phi, GPT-NeoX, ..."
    )


def _check_folder(folder: Path) -> None:
    if (folder / "config.json").exists():
        try:
            json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise SkipwiseError(f"{folder / 'config.json'} is not JSON: {error}") from error
        return
    if (folder / "adapter_config.json").exists():
        raise SkipwiseError(f"{folder} is a LoRA adapter: merge it into its base, and give that")
    raise SkipwiseError(f"{folder} holds no config.json: it is not the folder of a model")
