"""The teacher of self-distillation: the base model without rescaling, beside the trained model.

Full fine-tuning changes every weight, so the teacher is loaded separately. LoRA leaves the base
weights unchanged, so the teacher is a second model around the same tensors, with the base's own
config (RoPE, windows, scales). It takes no extra memory. It has no adapters and no trained copies
of norms and embeddings, because peft adds those to the trained model alone.

An engine that shards the model frees its tensors and gathers one layer at a time. There the teacher
has its own weights, under LoRA too. FSDP2 shards it layer by layer under every engine, with the
embedding and the head complete in every process. See chunked_loss.py for the loss.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from skipwise.config.machine import is_main_process, world_size
from skipwise.config.recipe import ModelSettings
from skipwise.errors import SkipwiseError
from skipwise.models.attention.masks import FLEX
from skipwise.models.load import best_device, load_model
from skipwise.models.model_info import ModelInfo
from skipwise.models.scaled_config import scaled_config
from skipwise.pose.rope import Unscaled


def base_config(config: Any, info: ModelInfo) -> Any:
    """The config with the RoPE that the weights were trained with.

    It is the config unchanged, unless `original_length` says that its scaling was never trained.
    """
    rope = config.rope_parameters
    rope = rope["full_attention"] if info.nested else rope
    kind = rope.get("rope_type", "default")
    if not isinstance(info.scaling, Unscaled) or kind in ("default", "dynamic"):
        return copy.deepcopy(config)
    return scaled_config(config, info, info.scaling, info.original_length)


def load_teacher(
    source: str, config: Any, settings: ModelSettings, dtype: torch.dtype, model: Any
) -> Any:
    """Load the base model again, frozen. Raises what `load_model` raises.

    Args:
        config: the base model's own config.
        dtype: dtype of its weights, the compute dtype.
        model: the trained model; the teacher uses its attention implementation.
    """
    attention = _attention(model)
    teacher = load_model(source, config, settings, dtype=dtype, attn_implementation=attention)
    return teacher.requires_grad_(False).eval()


def load_sharded_teacher(
    source: str,
    config: Any,
    settings: ModelSettings,
    dtype: torch.dtype,
    model: Any,
    offload: bool = False,
) -> Any:
    """`load_teacher` on the main process, with the layers sharded over all processes.

    Args:
        offload: keep the layers on the CPU when they are not in use.
    """
    from accelerate import init_empty_weights
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    device = best_device()
    with _without_zero3_init():
        if is_main_process():
            teacher = load_teacher(source, config, settings, dtype, model)
        else:
            config = copy.deepcopy(config)
            config._attn_implementation = _attention(model)
            with init_empty_weights(include_buffers=False):
                teacher = type(model)(config).requires_grad_(False).eval()
    mesh = init_device_mesh(device.type, (world_size(),))
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    layers = set(teacher._no_split_modules or ())
    inside_first = reversed(list(teacher.modules()))
    for layer in [m for m in inside_first if type(m).__name__ in layers]:
        _broadcast_from_main(layer, device)
        fully_shard(layer, mesh=mesh, offload_policy=policy)
        # Each layer is its own FSDP root. A root stays gathered after a forward pass, and gathers
        # on its own CUDA stream, whose memory other streams cannot use.
        layer.register_forward_pre_hook(lambda layer, *_: layer.unshard(), prepend=True)
        layer.register_forward_hook(lambda layer, *_: layer.reshard())
    _broadcast_from_main(teacher, device)
    return teacher


def _broadcast_from_main(module: Any, device: torch.device) -> None:
    """Broadcast the main process's buffers and its parameters that are not sharded yet."""
    from torch.distributed import broadcast, broadcast_object_list
    from torch.distributed.tensor import DTensor

    parameters = dict(module.named_parameters(remove_duplicate=False))
    found = {name: p for name, p in parameters.items() if not isinstance(p, DTensor)}
    found |= dict(module.named_buffers(remove_duplicate=False))
    info = [[(name, x.shape, x.dtype, id(x)) for name, x in found.items()]]
    broadcast_object_list(info, device=device)
    received: dict[int, torch.Tensor] = {}  # by id on the main process: some tensors are tied
    for name, shape, dtype, key in info[0]:
        if key not in received:
            value = torch.empty(shape, dtype=dtype, device=device)
            if is_main_process():
                value.copy_(found[name])
            broadcast(value, 0)
            is_parameter = name in parameters
            received[key] = torch.nn.Parameter(value, False) if is_parameter else value
        parent, _, leaf = name.rpartition(".")
        owner = module.get_submodule(parent)
        (owner._parameters if name in parameters else owner._buffers)[leaf] = received[key]


@contextmanager
def _without_zero3_init() -> Iterator[None]:
    """Load complete weights where transformers would let DeepSpeed partition them."""
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref  # no public name reads it
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


def teacher_sharing_weights(model: Any, config: Any) -> Any:
    """A model with another config around the weights of a loaded model, before LoRA is added.

    Args:
        config: the base model's own config.

    Raises:
        SkipwiseError: the loaded model lacks a weight.
    """
    from accelerate import init_empty_weights

    config = copy.deepcopy(config)
    config._attn_implementation = _attention(model)
    with init_empty_weights(include_buffers=False):
        teacher = type(model)(config)
    found = dict(model.named_modules())
    for name, module in list(teacher.named_modules()):
        own = found.get(name)
        if own is not None and type(own) is not type(module) and own._parameters:
            parent, _, leaf = name.rpartition(".")  # a quantized layer has more than a weight
            teacher.get_submodule(parent)._modules[leaf] = own
            continue
        for kind in ("_parameters", "_buffers"):
            mine, theirs = vars(module)[kind], vars(own)[kind] if own is not None else {}
            for key in mine:
                if key not in module._non_persistent_buffers_set and key in theirs:
                    mine[key] = theirs[key]
    missing = [name for name, tensor in teacher.state_dict().items() if tensor.is_meta]
    if missing:
        raise SkipwiseError(
            f"distillation.weight: the teacher cannot use the loaded weights, which have no "
            f"{missing[0]}\nset distillation.weight=0"
        )
    return teacher.eval()


def move_teacher(teacher: Any, device: torch.device) -> None:
    """Move the teacher to a device. Weights shared with the model are there already."""
    for parameter in teacher.parameters():
        if parameter.device != device:
            parameter.data = parameter.data.to(device)
    for module in teacher.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def _attention(model: Any) -> str:
    """The teacher's attention implementation: the model's, or sdpa for flex_attention."""
    used = model.config._attn_implementation
    return "sdpa" if used == FLEX else used
