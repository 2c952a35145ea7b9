"""The scaled config first, then the weights into it, then LoRA.

Changing a loaded model's config leaves its `inv_freq` as it was, and the change is saved: so the
config is made before the model, and the preflight compares what the model computes with `rope.py`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from skipwise.errors import SkipwiseError
from skipwise.models.families import ModelFacts, check_unscaled, load_config, read_facts
from skipwise.recipe import LoRASettings, ModelSettings, Recipe, parse_recipe
from skipwise.rope import Scaling, make_scaling


def scaling_for(recipe: Recipe, facts: ModelFacts) -> Scaling:
    """The RoPE scaling that the recipe asks for on this model.

    Raises:
        SkipwiseError: the target is not longer, the scaling cannot be trained with.
    """
    L, T = facts.original_length, recipe.target_length
    if T <= L:
        raise SkipwiseError(
            f"the target of {T:,} tokens is not longer than the model's {L:,}: type a longer --to"
        )
    scaling = make_scaling(
        recipe.rope.type,
        factor=recipe.rope.factor or T / L,
        original_length=L,
        theta=facts.rope_theta,
        dim=facts.rotary_dim,
        **recipe.rope.options,
    )
    if recipe.method != "none" and not scaling.trainable:
        raise SkipwiseError(
            f"rope.type: {recipe.rope.type} depends on the longest position seen so far and cannot "
            "be trained with\ntype rope.type=yarn, or method=none to use it untrained"
        )
    return scaling


def scaled_config(config: Any, facts: ModelFacts, scaling: Scaling, target_length: int) -> Any:
    """A copy of the config with the scaling in it, and without a window that would void it.

    Models that are sliding in every layer (Mistral-7B-v0.1) could not look back past the window;
    those with sliding layers beside full ones keep them, for they are local by design.
    """
    settings = scaling.to_config(
        theta=facts.rope_theta,
        dim=facts.rotary_dim,
        original_length=facts.original_length,
        target_length=target_length,
    )
    parameters = settings.pop("rope_parameters")
    if "partial_rotary_factor" in facts.rope_parameters:
        parameters["partial_rotary_factor"] = facts.rope_parameters["partial_rotary_factor"]
    scaled = copy.deepcopy(config)
    if facts.nested:
        scaled.rope_parameters = {**config.rope_parameters, "full_attention": parameters}
    else:
        scaled.rope_parameters = parameters
    for key, value in settings.items():
        setattr(scaled, key, value)
    if facts.sliding_window is not None and not facts.hybrid:
        scaled.sliding_window = None
        if getattr(scaled, "use_sliding_window", None):
            scaled.use_sliding_window = False
        if getattr(scaled, "layer_types", None):
            scaled.layer_types = ["full_attention"] * len(scaled.layer_types)
    return scaled


def load_tokenizer(model: str, settings: ModelSettings) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else model,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
        )
    except Exception as error:  # many kinds again
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SkipwiseError(f"the tokenizer of {model} could not be loaded\n{first}") from error


def load_model(
    model: str,
    config: Any,
    settings: ModelSettings,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
) -> Any:
    """The causal language model with safetensors weights and the given config.

    Raises:
        SkipwiseError: no safetensors, weights that do not fit the config, out of memory.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(model).expanduser()
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        other = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt")])
        what = f"only {other[0]}" if other else "no weights"
        raise SkipwiseError(
            f"{folder} holds {what}, and weights are read from safetensors\n"
            "save it once with transformers: model.save_pretrained(folder)"
        )
    try:
        both: Any = AutoModelForCausalLM.from_pretrained(
            str(folder) if folder.is_dir() else model,
            config=config,
            dtype=dtype,
            revision=settings.revision,
            attn_implementation=attn_implementation,
            use_safetensors=True,
            trust_remote_code=settings.trust_remote_code,
            output_loading_info=True,
        )
    except SkipwiseError:
        raise
    except Exception as error:  # a broken file, a missing kernel, a wrong shape
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SkipwiseError(f"the weights of {model} could not be loaded\n{first}") from error
    loaded, info = both
    missing = sorted(info["missing_keys"])
    if missing:
        raise SkipwiseError(
            f"{model} lacks {len(missing)} of the model's weights, {missing[0]} among them"
        )
    return loaded


def compute_dtype(settings: ModelSettings) -> torch.dtype:
    """The arithmetic's dtype: bf16 where the hardware has it, unless the recipe says."""
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if torch.backends.mps.is_available():
        return torch.float32
    avx512, amx = torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported
    return torch.bfloat16 if avx512() or amx() else torch.float32


def best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def attention_for(settings: ModelSettings, weights: str) -> str | None:
    """The attention implementation; importance weights need one that takes an additive mask."""
    asked = settings.attn_implementation
    if weights == "none":
        return None if asked == "auto" else asked
    if asked.startswith("flash"):
        raise SkipwiseError(
            f"load.attn_implementation: {asked} takes no additive mask, which "
            "positions.weights: importance needs\ntype load.attn_implementation=sdpa"
        )
    return "sdpa" if asked == "auto" else asked


def add_lora(model: Any, settings: LoRASettings) -> Any:
    """The model with LoRA on its linear layers; norms and embeddings train whole if asked.

    Source: LongLoRA, Chen et al. 2023, arXiv 2309.12307, section 3.3.
    """
    from peft import LoraConfig, get_peft_model

    whole: set[str] = set()
    for name, module in model.named_modules():
        if settings.train_norms and "norm" in type(module).__name__.lower():
            whole.add(name.rsplit(".", 1)[-1])
    embeddings = model.get_input_embeddings()
    if settings.train_embeddings:
        whole.add(next(n for n, m in model.named_modules() if m is embeddings).rsplit(".", 1)[-1])
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules) or "all-linear",
        modules_to_save=sorted(whole) or None,
        ensure_weight_tying=settings.train_embeddings and bool(model.config.tie_word_embeddings),
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise SkipwiseError(f"lora.target_modules: {error}") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def load_scaled(
    model: str, target_length: int, *, rope_type: str = "yarn", dtype: torch.dtype = torch.float32
) -> tuple[Any, Any, ModelFacts]:
    """A model with its window rescaled to a target, for a training loop of one's own.

    Returns:
        the model with its weights, its tokenizer, and its facts (`original_length` and others).

    Raises:
        SkipwiseError: the model cannot be extended so.
    """
    recipe = parse_recipe(
        {"model": model, "target_length": target_length, "rope": {"type": rope_type}}
    )
    config = load_config(model, recipe.load)
    facts = read_facts(config)
    check_unscaled(facts)
    scaled = scaled_config(config, facts, scaling_for(recipe, facts), target_length)
    loaded = load_model(model, scaled, recipe.load, dtype=dtype)
    return loaded, load_tokenizer(model, recipe.load), facts
