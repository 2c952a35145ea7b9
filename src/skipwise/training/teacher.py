"""The base model as it was, the teacher of self-distillation (loss.py), beside the one that trains.

Full fine-tuning changes every weight, so the teacher is loaded once more. Under LoRA the base's
weights stay as they are: the teacher is built anew from the base's own config, with its own RoPE,
windows and scales, around the very same tensors, and takes no memory. It has neither adapters nor
trained copies of norms and embeddings, for peft puts those into the model that trains alone.

An engine that shards the model takes its tensors away and gives them back a layer at a time, so
there the teacher has weights of its own, under LoRA too, and is sharded by FSDP2 whatever the
engine is: layer by layer, with the embedding and the head whole in every process.
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

    That is the config as it is, but where `original_length` says that its scaling never was.
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
    """The base loaded once more, frozen; raises as `load_model`.

    Args:
        config: the base's own.
        dtype: of its weights: that of the arithmetic.
        model: the one that trains, whose attention implementation it gets.
    """
    teacher = load_model(source, config, settings, dtype=dtype, attn_implementation=_kernel(model))
    return teacher.requires_grad_(False).eval()


def load_sharded_teacher(
    source: str,
    config: Any,
    settings: ModelSettings,
    dtype: torch.dtype,
    model: Any,
    offload: bool = False,
) -> Any:
    """The base loaded by the first process, its layers sharded over all; as `load_teacher`.

    Args:
        offload: keep the layers on the CPU between their passes.
    """
    from accelerate import init_empty_weights
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    device = best_device()
    with _outside_zero():
        if is_main_process():
            teacher = load_teacher(source, config, settings, dtype, model)
        else:
            config = copy.deepcopy(config)
            config._attn_implementation = _kernel(model)
            with init_empty_weights(include_buffers=False):
                teacher = type(model)(config).requires_grad_(False).eval()
    mesh = init_device_mesh(device.type, (world_size(),))
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    layers = set(teacher._no_split_modules or ())
    inside_first = reversed(list(teacher.modules()))
    for layer in [m for m in inside_first if type(m).__name__ in layers]:
        _hand_out(layer, device)
        fully_shard(layer, mesh=mesh, offload_policy=policy)
        # Each is the root of its own sharding. A root would stay whole after a forward pass, and
        # be gathered on a stream of its own, whose memory no other can use.
        layer.register_forward_pre_hook(lambda layer, *_: layer.unshard(), prepend=True)
        layer.register_forward_hook(lambda layer, *_: layer.reshard())
    _hand_out(teacher, device)
    return teacher


def _hand_out(module: Any, device: torch.device) -> None:
    """Give every process the first one's parameters, where not sharded yet, and buffers."""
    from torch.distributed import broadcast, broadcast_object_list
    from torch.distributed.tensor import DTensor

    parameters = dict(module.named_parameters(remove_duplicate=False))
    found = {name: p for name, p in parameters.items() if not isinstance(p, DTensor)}
    found |= dict(module.named_buffers(remove_duplicate=False))
    info = [[(name, x.shape, x.dtype, id(x)) for name, x in found.items()]]
    broadcast_object_list(info, device=device)
    whole: dict[int, torch.Tensor] = {}  # by the first process's tensor: some are tied
    for name, shape, dtype, of in info[0]:
        if of not in whole:
            value = torch.empty(shape, dtype=dtype, device=device)
            if is_main_process():
                value.copy_(found[name])
            broadcast(value, 0)
            held = name in parameters
            whole[of] = torch.nn.Parameter(value, requires_grad=False) if held else value
        parent, _, leaf = name.rpartition(".")
        owner = module.get_submodule(parent)
        (owner._parameters if name in parameters else owner._buffers)[leaf] = whole[of]


@contextmanager
def _outside_zero() -> Iterator[None]:
    """Load whole weights where transformers would have DeepSpeed part them."""
    from transformers.integrations import deepspeed

    held = deepspeed._hf_deepspeed_config_weak_ref  # no public name reads it
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held


def teacher_sharing_weights(model: Any, config: Any) -> Any:
    """A model of another config around the weights of a loaded one, before LoRA goes into that.

    Args:
        config: the base's own.

    Raises:
        SkipwiseError: a weight of the one has no place in the other.
    """
    from accelerate import init_empty_weights

    config = copy.deepcopy(config)
    config._attn_implementation = _kernel(model)
    with init_empty_weights(include_buffers=False):
        teacher = type(model)(config)
    found = dict(model.named_modules())
    for name, module in list(teacher.named_modules()):
        own = found.get(name)
        if own is not None and type(own) is not type(module) and own._parameters:
            parent, _, leaf = name.rpartition(".")  # a quantised layer keeps more than its weight
            teacher.get_submodule(parent)._modules[leaf] = own
            continue
        for kind in ("_parameters", "_buffers"):
            mine, theirs = vars(module)[kind], vars(own)[kind] if own is not None else {}
            for key in mine:
                if key not in module._non_persistent_buffers_set and key in theirs:
                    mine[key] = theirs[key]
    lacking = [name for name, tensor in teacher.state_dict().items() if tensor.is_meta]
    if lacking:
        raise SkipwiseError(
            f"distillation.weight: the base cannot be built around the loaded weights, which "
            f"have no {lacking[0]}\ntype distillation.weight=0"
        )
    return teacher.eval()


def place_teacher(teacher: Any, device: torch.device) -> None:
    """To the device of the model; weights that are the model's own are there already."""
    for parameter in teacher.parameters():
        if parameter.device != device:
            parameter.data = parameter.data.to(device)
    for module in teacher.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def _kernel(model: Any) -> str:
    """The attention implementation beside a model's; without importance weights flex is sdpa."""
    used = model.config._attn_implementation
    return "sdpa" if used == FLEX else used
