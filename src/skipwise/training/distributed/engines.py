"""Engines, which distribute training over processes: DDP, FSDP2 and DeepSpeed ZeRO-3.

A launcher (`--gpus N`, `accelerate launch`, torchrun) starts the processes. The recipe's `engine`
sets their TrainingArguments, from the JSON files in this folder; accelerate does the rest. With
`engine: auto`, an accelerate configuration with FSDP or DeepSpeed is used as it is.

                weights   gradients   optimizer     on the GPU
ddp             full      full        full          everything
fsdp2, zero3    sharded   sharded     sharded       everything
zero3-offload   sharded   sharded     sharded       the layer that runs
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from skipwise.config.machine import is_main_process, of_launcher, world_size
from skipwise.config.recipe import SHARDED_ENGINES, LoRASettings, Recipe
from skipwise.errors import Check, SkipwiseError, install

_OURS = "SKIPWISE_DEEPSPEED"  # set if init_cpu_backend, not a launcher, chose DeepSpeed
_KINDS = {"fsdp2": "fsdp", "zero3": "deepspeed", "zero3-offload": "deepspeed"}
_WAIT = timedelta(days=2)  # for the process that tokenizes the data


def engine_of(recipe: Recipe) -> str:
    """ddp, fsdp2, zero3, zero3-offload, `one process`, or the launcher's engine.

    Raises:
        SkipwiseError: the launcher's configuration and the recipe disagree, or the engine needs a
            launcher or a package that is not installed.
    """
    launched = _launcher_engine()
    if recipe.engine == "auto":
        if launched is not None:
            return f"{launched} of the launcher"
        return _unsharded()
    if launched is not None and launched != _KINDS.get(recipe.engine):
        raise SkipwiseError(
            f"the recipe says engine: {recipe.engine} and the launcher's configuration {launched}\n"
            "set engine=auto to use the launcher's, or launch without a configuration"
        )
    if recipe.engine.startswith("zero3"):
        check_deepspeed(f"engine: {recipe.engine}")
    if recipe.engine in SHARDED_ENGINES and "WORLD_SIZE" not in os.environ:
        raise SkipwiseError(
            f"engine: {recipe.engine} shards the model over processes that a launcher starts\n"
            "pass --gpus N, or use accelerate launch or torchrun"
        )
    return _unsharded() if recipe.engine == "ddp" else recipe.engine


def check_deepspeed(what: str) -> None:
    """Raise a SkipwiseError if DeepSpeed, which `what` needs, is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        fix = f"{install('deepspeed')}, or pass --engine fsdp2"
        raise SkipwiseError(f"{what} needs DeepSpeed\n{fix}")


def is_kind(engine: str, kind: str) -> bool:
    """Whether an engine is of kind `fsdp` or `deepspeed`, also if the launcher chose it."""
    return _KINDS.get(engine, engine).startswith(kind)


def engine_arguments(
    engine: str, cpu: bool, *, respread: bool = False, load_once: bool = False
) -> dict[str, Any]:
    """The TrainingArguments of an engine.

    Args:
        respread: resume from a checkpoint that `convert_to_universal_checkpoint` converted.
        load_once: see `cpu_ram_efficient_loading`.
    """
    values: dict[str, Any] = {}
    if engine == "ddp":
        values["ddp_find_unused_parameters"] = False
        if cpu:
            values["ddp_backend"] = "gloo"
    elif engine == "fsdp2":
        config = {**_config(engine), "cpu_ram_efficient_loading": load_once}
        values.update(fsdp=True, fsdp_config=config)
    elif engine in SHARDED_ENGINES:
        values["deepspeed"] = _config(engine)
        if respread:
            values["deepspeed"]["checkpoint"] = {"load_universal": True}
    if engine in SHARDED_ENGINES and cpu:
        values.update(use_cpu=False, accelerator_config={"use_configured_state": True})
    return values


def init_cpu_backend(engine: str, cpu: bool) -> None:
    """Set up FSDP or DeepSpeed on CPUs, before TrainingArguments exist. On GPUs do nothing.

    On CPUs accelerate replaces FSDP by DDP, and DeepSpeed expects GPUs. The state is set by hand,
    so that a recipe for many GPUs can be tried on any machine.
    """
    if not cpu or engine not in SHARDED_ENGINES:
        return
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state()  # left by an earlier Trainer in this process
    if engine == "fsdp2":
        state = PartialState(cpu=True)
        # accelerate has no public way to use FSDP on CPUs
        state._shared_state["distributed_type"] = DistributedType.MULTI_XPU
        return
    os.environ.update(DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true", **{_OURS: "1"})
    import deepspeed.ops

    # a shared memory kernel that takes more than a minute to compile at first use
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    PartialState(backend="gloo")


def convert_to_universal_checkpoint(checkpoint: Path) -> None:
    """Convert a DeepSpeed checkpoint so that another number of processes can resume from it.

    Each process wrote its own optimizer shard. DeepSpeed's converter merges the shards into a
    "universal checkpoint" in the same folder.

    Raises:
        SkipwiseError: the converter failed. Quotes the last line of stderr.
    """
    group: Any = None
    if world_size() > 1:  # of its own, as it may take longer than the training's timeout
        group = torch.distributed.new_group(backend="gloo", timeout=_WAIT)
    if is_main_process() and not (checkpoint / "latest_universal").exists():
        step = (checkpoint / "latest").read_text(encoding="utf-8").strip()
        done = subprocess.run(
            [
                *(sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"),
                *("--input_folder", str(checkpoint / step)),
                *("--output_folder", str(checkpoint / f"{step}_universal")),
                *("--num_extract_workers", "1", "--num_merge_workers", "1"),
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise SkipwiseError(
                f"{checkpoint} cannot be converted for {world_size()} processes: {last}\n"
                "resume with as many processes as wrote it"
            )
    if group is not None:
        torch.distributed.barrier(group=group)


def unshare_step_counters(trainer: Any) -> None:
    """Give each of DeepSpeed's parameter groups its own step counter, after a conversion.

    DeepSpeed 0.19 loads one shared tensor into all groups. It would count each step once per group,
    and Adam's bias correction would be wrong.
    """
    for state in trainer.model_wrapped.optimizer.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def set_fsdp2_mixed_precision(trainer: Any, dtype: torch.dtype) -> None:
    """Reduce gradients in float32 and leave the model's outputs uncast.

    accelerate's default reduces gradients in bf16 and casts the outputs, with the loss, to bf16.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2 or dtype == torch.float32:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    plugin.mixed_precision_policy = policy


def check_engine(engine: str, trainer: Any) -> Check:
    """Check that the engine wraps the model: accelerate can fall back silently."""
    wrapped, inner = trainer.model_wrapped, trainer.model
    parameters = [p for p in inner.parameters() if p.requires_grad]
    if is_kind(engine, "fsdp"):
        from torch.distributed.tensor import DTensor

        sharded = sum(isinstance(p, DTensor) for p in parameters)
    elif is_kind(engine, "deepspeed"):
        sharded = sum(hasattr(p, "ds_id") for p in parameters)
    else:
        is_ddp = isinstance(wrapped, torch.nn.parallel.DistributedDataParallel)
        sharded = len(parameters) if is_ddp else 0
    total, done = len(parameters), "sharded" if engine != "ddp" else "synchronized"
    detail = f"{engine} over {world_size()} processes, all {sharded} trained tensors {done}"
    if sharded != total:
        detail = f"{engine}: {total - sharded} of {total} trained tensors are not {done}"
    return Check(name="engine", passed=sharded == total, detail=detail)


def cpu_ram_efficient_loading(engine: str, lora: LoRASettings | None, tied: bool) -> bool:
    """Whether only local rank 0 loads the weights and broadcasts the shards.

    Otherwise every rank holds the full model while loading. FSDP2 supports it, except for quantized
    weights, and for a tied embedding that trains beside LoRA (KeyError in accelerate 1.15).
    """
    if lora is not None and (lora.quantization != "none" or (tied and lora.train_embeddings)):
        return False
    return engine == "fsdp2"


@contextmanager
def loading(once: bool) -> Iterator[None]:
    """Set the variable that makes transformers load weights on local rank 0 alone."""
    name = "ACCELERATE_USE_FSDP"
    if not once or name in os.environ:
        yield
        return
    os.environ[name] = "true"
    try:
        yield
    finally:
        del os.environ[name]


def keep_rope_in_float32(model: Any) -> Callable[[], None]:
    """Copy the RoPE frequencies. The returned function restores them in float32.

    DeepSpeed casts all buffers to bf16, and bf16 frequencies make far positions silently wrong.
    """
    copies = [
        (module, name, buffer.detach().float().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if name.endswith("inv_freq") and buffer is not None
    ]

    def restore() -> None:
        for module, name, inv_freq in copies:
            buffer = module._buffers[name]
            if buffer.dtype != torch.float32:
                module._buffers[name] = inv_freq.to(buffer.device)

    return restore


@contextmanager
def main_process_first(recipe: Recipe) -> Iterator[None]:
    """Run on the main process first, then on the others; wait for all.

    The barriers have a process group of their own, because the work (tokenizing) may take longer
    than the timeout of the training's group. If a process fails, it ends, and the others with it.
    """
    group = _waiting_group(recipe) if world_size() > 1 else None

    def wait() -> None:
        if group is not None:
            torch.distributed.barrier(group=group)

    if not is_main_process():
        wait()
    yield
    if is_main_process():
        wait()
    wait()


def _waiting_group(recipe: Recipe) -> Any:
    import torch.distributed as dist

    init_cpu_backend(engine_of(recipe), on_cpu())
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(of_launcher("LOCAL_RANK", 0))
        seconds = int(recipe.trainer.get("ddp_timeout", 1800))  # the Trainer will use this group
        dist.init_process_group("gloo" if on_cpu() else "nccl", timeout=timedelta(seconds=seconds))
    return dist.new_group(backend="gloo", timeout=_WAIT)


def on_cpu() -> bool:
    """Whether this machine has no GPU for training."""
    return not torch.cuda.is_available() and not torch.backends.mps.is_available()


def place(recipe: Recipe) -> str:
    """The kind of machine that trains, as far as memory is concerned."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{world_size()} x {device}, {engine_of(recipe)}"


def of_main_process(value: Any) -> Any:
    """The value of rank 0, on every rank."""
    values = [value]
    if world_size() > 1 and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(values)
    return values[0]


def longest(seconds: float, device: torch.device) -> float:
    """The largest value of all ranks."""
    found = torch.tensor(seconds, device=device)
    if world_size() > 1:
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return float(found)


def _unsharded() -> str:
    return "ddp" if world_size() > 1 else "one process"


def _launcher_engine() -> str | None:
    """The engine of an accelerate configuration, from its environment variables."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return None if _OURS in os.environ else "deepspeed"
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return "fsdp"
    return None


def _config(engine: str) -> dict[str, Any]:
    return json.loads(Path(__file__).with_name(f"{engine}.json").read_text(encoding="utf-8"))
