"""Load models and tokenizers, and choose dtype, device and attention implementation.

The scaled config is made before the model, because changing the config of a loaded model would not
change its `inv_freq`. The preflight compares the model's frequencies with `pose.rope`.
"""

from __future__ import annotations

import copy
import gc
import inspect
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch

from skipwise.config.machine import cpu_has_bf16, is_main_process, of_launcher
from skipwise.config.progress import Progress
from skipwise.config.recipe import ModelSettings
from skipwise.errors import Check, SkipwiseError, first_line, is_no_memory
from skipwise.models.attention.masks import FLEX
from skipwise.models.hf_config import READ_BIN, is_local

_OF_LAYER = re.compile(r"(^|\.)(layers|h|blocks)\.\d+\.")
# Buffers of older versions, other modalities, and layers that predict a second token
_UNUSED = re.compile(r"inv_freq|masked_bias|\.attn\.bias$|vision|visual|audio|image|talker")
_SECOND = re.compile(r"mtp|\.(eh_proj|enorm|hnorm|shared_head)\.")


def load_tokenizer(model: str, settings: ModelSettings) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(Path(model).expanduser()) if is_local(model) else model,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
        )
    except Exception as error:  # transformers raises many types
        if is_no_memory(error):
            raise
        raise SkipwiseError(
            f"the tokenizer of {model} could not be loaded: {first_line(error)}\n"
            "copy its tokenizer files again from where the model came from"
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
    """Load a causal language model's weights into the given config.

    Raises:
        SkipwiseError: no safetensors, weights that do not fit the config, out of memory.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations import hub_kernels

    folder = Path(model).expanduser()
    if folder.is_dir():
        check_weights(folder, settings)
    others = settings.is_hub_kernel and settings.trust_remote_code  # not of kernels-community alone
    others = others and hasattr(hub_kernels, "allow_all_hub_kernels")  # an older one asks nobody
    try:
        with Progress(f"load {folder.resolve().name}", None, shown=is_main_process()):
            result: Any = AutoModelForCausalLM.from_pretrained(
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
                **({"allow_all_kernels": True} if others else {}),
            )
    except Exception as error:  # a broken file, a missing kernel, a wrong shape
        if is_no_memory(error):
            raise
        reason = first_line(error)
        if "mismatched" in str(error):  # it refers to a report that is not shown
            reason = "their shapes are not those of its config.json: restore the one they belong to"
        raise SkipwiseError(f"the weights of {model} could not be loaded\n{reason}") from error
    loaded, info = result
    missing = sorted(info["missing_keys"])
    if missing:
        raise SkipwiseError(f"{model} has no weights for {len(missing)} tensors, e.g. {missing[0]}")
    _check_all_used(model, loaded, info["unexpected_keys"])
    return loaded


def _check_all_used(model: str, loaded: Any, unexpected: Iterable[str]) -> None:
    """Refuse weights of the decoder that a wrong config leaves out without a word."""
    names = [name for name in sorted(unexpected) if not _UNUSED.search(name)]
    unused = [name for name in names if _OF_LAYER.search(name)]
    if unused and not any(map(_SECOND.search, names)):
        raise SkipwiseError(
            f"{model} has {len(unused)} tensors that its config.json does not use, e.g. {unused[0]}"
            "\nrestore the config.json that belongs to the weights"
        )
    around = [loaded.get_input_embeddings(), loaded.get_output_embeddings()]
    tensors = [getattr(layer, "weight", None) for layer in around]
    known = all(tensor is not None and not tensor.is_meta for tensor in tensors)
    ties = loaded.config.get_text_config(decoder=True).tie_word_embeddings
    ties = ties and known and bool(getattr(loaded, "_tied_weights_keys", None))
    if ties and tensors[0] is not tensors[1]:
        raise SkipwiseError(
            f"{model} has an output layer of its own, and its config.json ties it to the "
            "embeddings\nset tie_word_embeddings to false in config.json"
        )


def build_without_weights(config: Any, settings: ModelSettings) -> Any:
    """The model on the meta device; SkipwiseError if `load.attn_implementation` cannot run here."""
    from transformers import AutoModelForCausalLM

    asked = settings.attn_implementation
    attention = None if asked in ("auto", "flex_attention") or settings.is_hub_kernel else asked
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                copy.deepcopy(config),
                attn_implementation=attention,
                trust_remote_code=settings.trust_remote_code,
            )
    except Exception as error:  # what a wrong value of the config leads to
        missing = isinstance(error, ImportError)
        if is_no_memory(error) or (missing and attention is None):
            raise
        what = f"load.attn_implementation={asked}: {first_line(error)}\nleave it out, or install it"
        if attention is None or not isinstance(error, ImportError | ValueError):
            what = f"no model can be built from this config.json: {type(error).__name__}: "
            what += f"{first_line(error)}\ncompare it with the one that was published"
        raise SkipwiseError(what) from error


def has_persistent_buffers(config: Any, settings: ModelSettings) -> bool:
    """Whether the model saves buffers with its weights, as expert routers do; loads nothing."""
    return any(
        buffer is not None and name not in module._non_persistent_buffers_set
        for module in build_without_weights(config, settings).modules()
        for name, buffer in module._buffers.items()
    )


def load_for_evaluation(
    model: str, config: Any, settings: ModelSettings, *, dtype: torch.dtype
) -> Any:
    """Load on the best device, or spread by `load.device_map`; raises as `load_model`."""
    check_hub_kernel(settings)
    asked, device_map = settings.attn_implementation, settings.device_map
    # flex_attention is for training; sdpa handles cached keys and short queries
    attention = None if asked in ("auto", "flex_attention") else asked
    options: Any = {"attn_implementation": attention, "device_map": device_map}
    loaded = load_model(model, config, settings, dtype=dtype, **options)
    if device_map is None:
        loaded.to(best_device())
    return loaded.eval()


def check_hub_kernel(settings: ModelSettings) -> None:
    """Refuse a kernel of the Hub that cannot be loaded, or whose owner nobody has trusted."""
    from transformers.utils import import_utils

    name, trusted = settings.attn_implementation, settings.trust_remote_code
    if settings.is_hub_kernel and not (trusted or name.startswith("kernels-community/")):
        raise SkipwiseError(
            f"load.attn_implementation: {name} is code that kernels-community did not publish\n"
            "read it, and type load.trust_remote_code=true if you trust it"
        )
    if settings.is_hub_kernel and not import_utils.is_kernels_available():
        raise SkipwiseError(
            f"load.attn_implementation: {name} is a kernel of the Hub, which needs a package\n"
            f"pip install 'kernels~={import_utils.KERNELS_MIN_VERSION}'"
        )


def check_weights(folder: Path, settings: ModelSettings) -> None:
    """Refuse a folder without weights in the requested format."""
    wanted = "*.safetensors" if settings.use_safetensors else "*.bin"
    if any(folder.glob(wanted)):
        return
    other = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.safetensors")])
    if not other:
        raise SkipwiseError(
            f"{folder} has no weights\ngive a folder or hub name with safetensors weights; "
            "only skipwise check works with a config.json alone"
        )
    fix = READ_BIN if settings.use_safetensors else "leave load.use_safetensors out"
    raise SkipwiseError(f"{folder} has {other[0]} but no {wanted[2:]} weights\n{fix}")


def check_memory(config: Any, length: int, dtype: torch.dtype) -> None:
    """Refuse a length whose KV cache alone, of one sequence, is larger than this machine's memory.

    Raises:
        SkipwiseError: how much it takes, and the longest length that fits.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", 1)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    types = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    per_token = 2 * heads * width * dtype.itemsize * types.count("full_attention")
    per_token = max(per_token, 64)  # the prompt itself, as text and as token ids
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    memory = sum(torch.cuda.get_device_properties(i).total_memory for i in gpus)
    memory += os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if os.name == "posix" else 0
    if length * per_token > memory > 0:
        raise SkipwiseError(
            f"{length:,} tokens take {length * per_token / 2**30:,.0f} GiB of KV cache, and this "
            f"machine has {memory / 2**30:,.0f} GiB\ngive lengths up to {memory // per_token:,}"
        )


def compute_dtype(settings: ModelSettings) -> torch.dtype:
    """The dtype to compute in: the recipe's, else bf16 if the hardware has it (not emulated)."""
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float32
    if torch.backends.mps.is_available():
        return torch.float32
    return torch.bfloat16 if cpu_has_bf16() else torch.float32


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", of_launcher("LOCAL_RANK", 0))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def attention_for(
    settings: ModelSettings, weights: str, hybrid: bool = False, config: Any = None
) -> str | None:
    """The attention implementation for training, or None for transformers' choice (sdpa or eager).

    A hybrid model needs one that takes a mask for each layer type. Importance weights need
    flex_attention, or one that takes an additive mask; `mask_reason` decides.

    Args:
        config: of the model. Without it flex_attention is not used.

    Raises:
        SkipwiseError: the recipe's implementation cannot do this.
    """
    check_hub_kernel(settings)
    asked = settings.attn_implementation
    needs = "positions.key_weights: importance" if weights != "none" else ""
    needs = needs or ("a model with sliding and full layers" if hybrid else "")
    if needs and not settings.takes_mask:
        raise SkipwiseError(
            f"load.attn_implementation: {asked} takes no (L, L) mask, which {needs} needs\n"
            "type load.attn_implementation=sdpa"
        )
    if asked == "flex_attention" and weights == "none":
        raise SkipwiseError(
            f"load.attn_implementation: {asked} is only for positions.key_weights: importance; "
            "otherwise sdpa is faster\nleave it out"
        )
    if weights != "none" and asked in ("auto", "flex_attention"):
        reason = mask_reason(settings, config)
        if not reason:
            return FLEX
        if asked == "flex_attention":
            raise SkipwiseError(f"load.attn_implementation: {asked}: {reason}\nleave it out")
    return None if asked == "auto" else asked


def mask_reason(settings: ModelSettings, config: Any) -> str:
    """Why importance weights use an additive mask; empty if they use flex_attention."""
    from skipwise.models.attention.flex import unsupported_by_machine, unsupported_by_model

    if settings.attn_implementation not in ("auto", "flex_attention"):
        return "load.attn_implementation is set"
    if config is None:
        return "no config was given"
    own_classes = getattr(config, "auto_map", None) or {}
    if settings.trust_remote_code and "AutoModelForCausalLM" in own_classes:
        return "the model brings code of its own"
    return unsupported_by_machine() or unsupported_by_model(config)


def check_kernel(settings: ModelSettings, weights: str, config: Any) -> list[Check]:
    """The preflight's line on importance weights; `config` is the loaded model's."""
    if weights == "none":
        return []
    used, reason = config._attn_implementation, mask_reason(settings, config)
    detail = f"applied by an additive mask in {used}, because {reason}"
    if used == FLEX:
        detail = "applied by flex_attention"
    return [Check(name="importance weights", passed=True, detail=detail)]


def enable_checkpointing(model: Any, how: Literal["offload"] | bool = True) -> None:
    """Gradient checkpointing under the name that this transformers has for it.

    Without a GPU what it saves is in the CPU's memory anyway, and transformers cannot pin it there.

    Raises:
        SkipwiseError: the model has no checkpointing, or this transformers no `offload`.
    """
    from transformers import __version__

    new = getattr(model, "activation_checkpointing_enable", None)
    enable = new or model.gradient_checkpointing_enable
    offload = {"offload": True} if how == "offload" else {}
    if offload and "offload" not in inspect.signature(enable).parameters:
        raise SkipwiseError(
            f"training.gradient_checkpointing: offload needs transformers 5.16, and this is "
            f"{__version__}\ntype training.gradient_checkpointing=true"
        )
    try:
        enable({"use_reentrant": False}, **(offload if torch.cuda.is_available() else {}))
    except ValueError as error:
        raise SkipwiseError(f"{error}\ntype training.gradient_checkpointing=false") from error
