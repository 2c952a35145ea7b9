"""LoRA and QLoRA through peft: target modules, precision, and loading adapters."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from skipwise.config.recipe import LoRASettings
from skipwise.errors import SkipwiseError, install


def quantization_for(lora: LoRASettings | None, dtype: torch.dtype, engine: str) -> Any:
    """The bitsandbytes configuration of QLoRA, or None.

    Source: QLoRA, Dettmers et al. 2023, arXiv 2305.14314: NF4 with double quantisation.

    Raises:
        SkipwiseError: bitsandbytes is missing, or the engine cannot shard such weights.
    """
    if lora is None or lora.quantization == "none":
        return None
    if "zero3" in engine or "deepspeed" in engine:
        raise SkipwiseError(
            f"lora.quantization: {lora.quantization}: DeepSpeed cannot shard quantised weights\n"
            "type --engine ddp, or --engine fsdp2"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        what = f"lora.quantization: {lora.quantization} needs bitsandbytes"
        raise SkipwiseError(f"{what}\n{install('qlora')}")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if "fsdp" in engine else torch.uint8,  # FSDP shards floats
    )


def num_parameters(model: Any, trainable: bool = False) -> int:
    """Parameters of a model, also if it is sharded or quantised."""
    total = 0
    for parameter in model.parameters():
        if trainable and not parameter.requires_grad:
            continue
        count = getattr(parameter, "ds_numel", None) or parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * parameter.element_size()  # packed
        total += count
    return total


def add_lora(model: Any, settings: LoRASettings, cast: bool = True) -> Any:
    """Add LoRA to the linear layers; norms and embeddings train fully if the settings say so.

    Args:
        cast: keep trainable parameters in float32; DeepSpeed does that itself.

    Source: LongLoRA, Chen et al. 2023, arXiv 2309.12307, section 3.3.
    """
    from peft import LoraConfig, get_peft_model

    fully_trained: set[str] = set()
    left_out = []
    embeddings = model.get_input_embeddings()
    for name, module in model.named_modules():
        is_norm = "norm" in type(module).__name__.lower()
        if (settings.train_norms and is_norm) or (
            settings.train_embeddings and module is embeddings
        ):
            fully_trained.add(name.rsplit(".", 1)[-1])
        if "router" in type(module).__name__.lower():
            left_out.append(name)  # some are linear layers that return more than a tensor
        if hasattr(module, "ssm_state_size"):
            left_out.append(f"{name}.out_proj")  # Mamba's kernels read its weight alone
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules) or "all-linear",
        exclude_modules=None if settings.target_modules else left_out or None,
        modules_to_save=sorted(fully_trained) or None,
        ensure_weight_tying=settings.train_embeddings and bool(model.config.tie_word_embeddings),
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise SkipwiseError(f"lora: {error}") from error
    for parameter in adapted.parameters():
        if cast and parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def load_adapter(model: Any, checkpoint: Path) -> None:
    """Load a checkpoint's adapter and fully trained modules into a model with LoRA.

    Under DeepSpeed, rank 0 distributes the sharded parameters to the other ranks.

    Raises:
        SkipwiseError: the checkpoint holds another adapter.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    sharded = [p for p in model.parameters() if p.requires_grad and hasattr(p, "ds_id")]
    gathered: Any = nullcontext()
    if sharded:
        from deepspeed.runtime.zero import GatheredParameters

        gathered = GatheredParameters(sharded, modifier_rank=0)
    states = load_peft_weights(str(checkpoint), device="cpu")
    with gathered:
        result = set_peft_model_state_dict(model, states)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    wrong = [*result.unexpected_keys, *trained.intersection(result.missing_keys)]
    if wrong:
        raise SkipwiseError(f"{checkpoint} does not hold the recipe's adapter: {wrong[0]}")
