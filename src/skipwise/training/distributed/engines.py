"""Engines: what spreads training over processes. DDP, FSDP2 and DeepSpeed ZeRO-3, by accelerate.

A launcher (`--gpus N`, `accelerate launch`, torchrun) starts the processes; the recipe's `engine`
says what they do, through the TrainingArguments made here from the JSON files of this folder. With
`engine: auto` an accelerate configuration that chose FSDP or DeepSpeed is left as it is.

                weights   gradients   optimizer     on the GPU
ddp             whole     whole       whole         everything
fsdp2, zero3    sharded   sharded     sharded       everything
zero3-offload   sharded   sharded     sharded       what a layer needs while it runs
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

from skipwise.config.machine import is_main_process, world_size
from skipwise.config.recipe import SHARDED_ENGINES, LoRASettings, Recipe
from skipwise.errors import Check, SkipwiseError

_OURS = "SKIPWISE_DEEPSPEED"  # in the environment: `init_cpu_backend` has set what a launcher sets
_KINDS = {"fsdp2": "fsdp", "zero3": "deepspeed", "zero3-offload": "deepspeed"}
_WAIT = timedelta(days=2)  # for the process that tokenizes


def engine_of(recipe: Recipe) -> str:
    """ddp, fsdp2, zero3, zero3-offload, `one process`, or what the launcher has chosen.

    Raises:
        SkipwiseError: the launcher's configuration chose another one than the recipe; the engine
            needs a launcher, or a package that is not installed.
    """
    launched = _launcher_engine()
    if recipe.engine == "auto":
        if launched is not None:
            return f"{launched} of the launcher"
        return _plain()
    if launched is not None and launched != _KINDS.get(recipe.engine):
        raise SkipwiseError(
            f"the recipe says engine: {recipe.engine} and the launcher's configuration {launched}\n"
            "type engine=auto to take the launcher's, or launch without a configuration"
        )
    if recipe.engine.startswith("zero3") and importlib.util.find_spec("deepspeed") is None:
        raise SkipwiseError(
            f"engine: {recipe.engine} needs DeepSpeed\n"
            "pip install 'skipwise[deepspeed]', or type --engine fsdp2"
        )
    if recipe.engine in SHARDED_ENGINES and "WORLD_SIZE" not in os.environ:
        raise SkipwiseError(
            f"engine: {recipe.engine} shards the model over processes that a launcher starts\n"
            "type --gpus N, or start it with accelerate launch or torchrun"
        )
    return _plain() if recipe.engine == "ddp" else recipe.engine


def is_kind(engine: str, kind: str) -> bool:
    """Whether an engine is of `fsdp` or `deepspeed`, the launcher's choice among them."""
    return _KINDS.get(engine, engine).startswith(kind)


def engine_arguments(
    engine: str, cpu: bool, *, respread: bool = False, load_once: bool = False
) -> dict[str, Any]:
    """The TrainingArguments of an engine.

    Args:
        respread: go on from a checkpoint that `convert_to_universal_checkpoint` has prepared.
        load_once: see `cpu_ram_efficient_loading`.
    """
    values: dict[str, Any] = {}
    if engine == "ddp":
        values["ddp_find_unused_parameters"] = False
        if cpu:
            values["ddp_backend"] = "gloo"
    elif engine == "fsdp2":
        config = {**_shipped(engine), "cpu_ram_efficient_loading": load_once}
        values.update(fsdp=True, fsdp_config=config)
    elif engine in SHARDED_ENGINES:
        values["deepspeed"] = _shipped(engine)
        if respread:
            values["deepspeed"]["checkpoint"] = {"load_universal": True}
    if engine in SHARDED_ENGINES and cpu:
        values.update(use_cpu=False, accelerator_config={"use_configured_state": True})
    return values


def init_cpu_backend(engine: str, cpu: bool) -> None:
    """What has to be done before TrainingArguments are made: on GPUs nothing, they do it.

    On a CPU accelerate would run DDP where FSDP was asked for, and DeepSpeed takes it for a GPU
    machine; so their state is made by hand here. It lets a recipe for many GPUs be tried anywhere.
    """
    if not cpu or engine not in SHARDED_ENGINES:
        return
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state()  # of an earlier Trainer in this process
    if engine == "fsdp2":
        state = PartialState(cpu=True)
        # A private attribute, and the only way: accelerate has no FSDP on CPUs.
        state._shared_state["distributed_type"] = DistributedType.MULTI_XPU
        return
    os.environ.update(DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true", **{_OURS: "1"})
    import deepspeed.ops

    # a kernel for shared memory that is compiled at first use, for more than a minute
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    PartialState(backend="gloo")


def convert_to_universal_checkpoint(checkpoint: Path) -> None:
    """Make a DeepSpeed checkpoint readable for another number of processes than wrote it.

    Its optimizer lies there in as many parts as processes; DeepSpeed's own converter joins them to
    a "universal checkpoint" beside them.

    Raises:
        SkipwiseError: the converter failed; says its last line.
    """
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
            last = (done.stderr.strip().splitlines() or ["no word"])[-1]
            raise SkipwiseError(
                f"{checkpoint} cannot be spread over {world_size()} processes: {last}\n"
                "go on with as many processes as wrote it"
            )
    if world_size() > 1:
        torch.distributed.barrier()


def unshare_step_counters(trainer: Any) -> None:
    """Give each of DeepSpeed's parameter groups its own step count, after a conversion.

    Its loader (0.19) hands all of them the same tensor, which then counts every step once a group,
    and Adam's bias correction is off.
    """
    for state in trainer.model_wrapped.optimizer.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def set_fsdp2_mixed_precision(trainer: Any, dtype: torch.dtype) -> None:
    """FSDP2's mixed precision as other trainers have it.

    accelerate sums gradients over the GPUs in bf16, and casts what the model returns, the loss
    among it, to bf16.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2 or dtype == torch.float32:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32
    )


def check_engine(engine: str, trainer: Any) -> Check:
    """The wrapped model is what was asked for: accelerate has ways to fall back silently."""
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
    passed = sharded == len(parameters)
    done = "sharded" if engine != "ddp" else "in step"
    return Check(
        name="engine",
        passed=passed,
        detail=f"{engine} over {world_size()} processes, all {sharded} trained tensors {done}"
        if passed
        else f"{engine} was asked for, and {len(parameters) - sharded} of {len(parameters)} "
        f"trained tensors are not {done}",
    )


def cpu_ram_efficient_loading(engine: str, lora: LoRASettings | None, tied: bool) -> bool:
    """Whether the first process of a machine loads the weights, and hands them on when it shards
    them: else every process holds the whole model in memory while it loads.

    FSDP2 can, but for quantised weights, and for a tied embedding that trains beside LoRA, which
    accelerate ties anew (1.15: KeyError).
    """
    if lora is not None and (lora.quantization != "none" or (tied and lora.train_embeddings)):
        return False
    return engine == "fsdp2"


@contextmanager
def loading(once: bool) -> Iterator[None]:
    """What transformers looks for to load weights in the first process alone."""
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
    """Take copies of the RoPE frequencies; the function returned puts them back in float32.

    DeepSpeed casts a whole model to bf16, its buffers among it, and frequencies in bf16 ruin far
    positions without a word.
    """
    kept = [
        (module, name, buffer.detach().float().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if name.endswith("inv_freq") and buffer is not None
    ]

    def restore() -> None:
        for module, name, exact in kept:
            now = module._buffers[name]
            if now.dtype != torch.float32:
                module._buffers[name] = exact.to(now.device)

    return restore


class Turn:
    """The first process first, then the others, and none goes on before all are done.

    With barriers of their own, for what is done (tokenizing, on each machine) may take longer than
    any step of training, after which the training's own communication gives up. A process that
    fails ends, and with it the others. Alone there is nothing to wait for.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.group: Any = None
        if world_size() == 1:
            return
        import torch.distributed as dist

        init_cpu_backend(engine_of(recipe), on_cpu())
        if not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            seconds = int(recipe.trainer.get("ddp_timeout", 1800))  # the Trainer takes this group
            dist.init_process_group(
                "gloo" if on_cpu() else "nccl", timeout=timedelta(seconds=seconds)
            )
        self.group = dist.new_group(backend="gloo", timeout=_WAIT)

    def __enter__(self) -> Turn:
        if not is_main_process():
            self._wait()
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is None:
            if is_main_process():
                self._wait()
            self._wait()

    def _wait(self) -> None:
        if self.group is not None:
            torch.distributed.barrier(group=self.group)


def on_cpu() -> bool:
    """Whether this machine has no GPU to train on."""
    return not torch.cuda.is_available() and not torch.backends.mps.is_available()


def _plain() -> str:
    return "ddp" if world_size() > 1 else "one process"


def _launcher_engine() -> str | None:
    """What an accelerate configuration has chosen, by the environment it gives its processes."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return None if _OURS in os.environ else "deepspeed"
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return "fsdp"
    return None


def _shipped(engine: str) -> dict[str, Any]:
    return json.loads(Path(__file__).with_name(f"{engine}.json").read_text(encoding="utf-8"))
