"""The scaled config first, then the weights into it, then LoRA.

Changing a loaded model's config leaves its `inv_freq` as it was, and the change is saved: so the
config is made before the model, and the preflight compares what the model computes with `rope.py`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from skipwise.config.recipe import ModelSettings
from skipwise.errors import Check, SkipwiseError
from skipwise.models.attention.masks import FLEX
from skipwise.models.hf_config import first_line, is_local


def load_tokenizer(model: str, settings: ModelSettings) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(Path(model).expanduser()) if is_local(model) else model,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
        )
    except Exception as error:  # many kinds again
        raise SkipwiseError(
            f"the tokenizer of {model} could not be loaded\n{first_line(error)}"
        ) from error


def load_model(
    model: str,
    config: Any,
    settings: ModelSettings,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    device_map: Any = None,
    quantization: Any = None,
) -> Any:
    """The causal language model with safetensors weights and the given config.

    Raises:
        SkipwiseError: no safetensors, weights that do not fit the config, out of memory.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(model).expanduser()
    if folder.is_dir():
        check_weights(folder, settings)
    try:
        both: Any = AutoModelForCausalLM.from_pretrained(
            str(folder) if folder.is_dir() else model,
            config=config,
            dtype=dtype,
            revision=settings.revision,
            attn_implementation=attn_implementation,
            device_map=device_map if quantization is None else {"": best_device()},
            quantization_config=quantization,
            use_safetensors=settings.use_safetensors,
            trust_remote_code=settings.trust_remote_code,
            output_loading_info=True,
        )
    except SkipwiseError:
        raise
    except Exception as error:  # a broken file, a missing kernel, a wrong shape
        raise SkipwiseError(
            f"the weights of {model} could not be loaded\n{first_line(error)}"
        ) from error
    loaded, info = both
    missing = sorted(info["missing_keys"])
    if missing:
        raise SkipwiseError(
            f"{model} lacks {len(missing)} of the model's weights, {missing[0]} among them"
        )
    return loaded


def has_persistent_buffers(config: Any, settings: ModelSettings) -> bool:
    """Whether there are buffers among the weights, as routers of experts have; on no device."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=settings.trust_remote_code
        )
    return any(
        buffer is not None and name not in module._non_persistent_buffers_set
        for module in model.modules()
        for name, buffer in module._buffers.items()
    )


def load_for_evaluation(
    model: str, config: Any, settings: ModelSettings, *, dtype: torch.dtype
) -> Any:
    """The model on the best device, or spread as `load.device_map` says; raises as `load_model`."""
    asked = settings.attn_implementation
    loaded = load_model(
        model,
        config,
        settings,
        dtype=dtype,
        # flex_attention is of training: cached keys and short queries are sdpa's
        attn_implementation=None if asked in ("auto", "flex_attention") else asked,
        device_map=settings.device_map,
    )
    if settings.device_map is None:
        loaded.to(best_device())
    return loaded.eval()


def check_weights(folder: Path, settings: ModelSettings) -> None:
    """Refuse a folder without weights of the wanted kind."""
    wanted = "*.safetensors" if settings.use_safetensors else "*.bin"
    if any(folder.glob(wanted)):
        return
    other = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.safetensors")])
    if not other:
        raise SkipwiseError(
            f"{folder} holds no weights\ngive a folder or hub name with its weights in "
            "safetensors; skipwise check reads a config.json alone"
        )
    raise SkipwiseError(
        f"{folder} holds {other[0]}, and weights are read from {wanted[2:]}\n"
        + (
            "type load.use_safetensors=false to read it (with weights_only: nothing in it is run)"
            if settings.use_safetensors
            else "leave load.use_safetensors out"
        )
    )


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
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def attention_for(
    settings: ModelSettings, weights: str, hybrid: bool = False, config: Any = None
) -> str | None:
    """The attention implementation to train on; None: transformers' own choice, sdpa, else eager.

    Sliding layers beside full ones need one that takes a mask for each kind. Importance weights
    need flex_attention, or one that takes an additive mask: `mask_reason` says which.

    Args:
        config: of the model; None: without flex_attention.

    Raises:
        SkipwiseError: the implementation asked for cannot do it.
    """
    asked = settings.attn_implementation
    needs = "positions.key_weights: importance" if weights != "none" else ""
    needs = needs or ("a model with sliding layers beside full ones" if hybrid else "")
    if needs and asked.startswith("flash"):
        raise SkipwiseError(
            f"load.attn_implementation: {asked} takes no mask of pairs, which {needs} needs\n"
            "type load.attn_implementation=sdpa"
        )
    if asked == "flex_attention" and weights == "none":
        raise SkipwiseError(
            f"load.attn_implementation: {asked} is for positions.key_weights: importance, and "
            "without them slower than sdpa\nleave it out"
        )
    if weights != "none" and asked in ("auto", "flex_attention"):
        reason = mask_reason(settings, config)
        if not reason:
            return FLEX
        if asked == "flex_attention":
            raise SkipwiseError(f"load.attn_implementation: {asked}: {reason}\nleave it out")
    return None if asked == "auto" else asked


def mask_reason(settings: ModelSettings, config: Any) -> str:
    """Why importance weights take a mask of pairs and not flex_attention; "": they do not."""
    from skipwise.models.attention.flex import unsupported_by_machine, unsupported_by_model

    if settings.attn_implementation not in ("auto", "flex_attention"):
        return "load.attn_implementation says so"
    if config is None:
        return "no config was given"
    if settings.trust_remote_code and "AutoModelForCausalLM" in (
        getattr(config, "auto_map", None) or {}
    ):
        return "the model brings code of its own"
    return unsupported_by_machine() or unsupported_by_model(config)


def check_kernel(settings: ModelSettings, weights: str, config: Any) -> list[Check]:
    """A line of the preflight: how importance weights reach the attention, and why so.

    Args:
        config: of the model as loaded.
    """
    if weights == "none":
        return []
    used = config._attn_implementation
    reason = f"by a mask of pairs through {used}: {mask_reason(settings, config)}"
    detail = "by flex_attention, without a mask of pairs" if used == FLEX else reason
    return [Check(name="importance weights", passed=True, detail=detail)]
