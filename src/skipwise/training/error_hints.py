"""What ended a training run, as the setting to change.

Engines fail with traces of hundreds of lines, of which one matters. Here the known ones are told
by their words, each with what to type; the trace stays behind it as its cause.
"""

from __future__ import annotations

import errno
import re
from typing import Any

import torch

from skipwise.config.machine import world_size
from skipwise.config.recipe import Recipe
from skipwise.config.run_folder import RunFolder
from skipwise.config.stages import is_full_length_stage
from skipwise.errors import SkipwiseError
from skipwise.planning import next_change
from skipwise.training.checkpoints import resume_point

_KNOWN = (  # (words of the error, what it means, what to type)
    (
        r"nccl.*(timeout|timed out)|watchdog.*timeout|timed out waiting for|socket timeout"
        r"|connection (closed|reset) by peer",
        "a process waited in vain for another one",
        "look at the first error of the others; if none failed, type trainer.ddp_timeout=7200",
    ),
    (
        r"address already in use|eaddrinuse",
        "the port on which the processes meet is taken",
        "set MASTER_PORT to another one, or type accelerate launch --main_process_port 0",
    ),
    (
        r"nccl error|nccl.*unhandled",
        "the GPUs could not speak with each other",
        "set NCCL_DEBUG=INFO to see why; NCCL_P2P_DISABLE=1 helps where GPUs have no direct link",
    ),
    (
        r"device-side assert",
        "a token id or a position is out of range on the GPU",
        "type skipwise check, or set CUDA_LAUNCH_BLOCKING=1 to see where",
    ),
    (
        r"cuda_home|\bnvcc\b|cpuadam|cpu_adam|error building extension|\bninja\b",
        "DeepSpeed could not compile what it needs",
        "install a compiler and the CUDA toolkit of torch's version, or type --engine fsdp2",
    ),
    (
        r"\bbitsandbytes\b",
        "bitsandbytes is needed and missing, or does not know this device",
        "pip install 'skipwise[qlora]', or leave out lora.quantization and 8-bit optimizers",
    ),
    (
        r"\bliger|use_liger",
        "Liger kernels are needed and missing",
        "pip install liger-kernel, or leave out trainer.use_liger_kernel",
    ),
    (
        r"flash.?attn|flashattention|flash_attention",
        "FlashAttention is needed and missing, or does not take this model or dtype",
        "pip install flash-attn, or type load.attn_implementation=sdpa",
    ),
    (
        r"no kernel image is available",
        "this torch was not built for this GPU",
        "install the torch build for it: pytorch.org/get-started",
    ),
    (
        r"flex_attention|inductor|backendcompilerfailed|find c compiler|out of resource",
        "a kernel could not be compiled for this GPU",
        "type load.attn_implementation=sdpa, where importance weights are on, and leave out "
        "trainer.torch_compile",
    ),
)


def explained(error: BaseException, recipe: Recipe, run: RunFolder) -> SkipwiseError | None:
    """The error for the user, or None where nothing is known of it."""
    if isinstance(error, SkipwiseError):
        return error
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return _disk_full(run)
    if re.search(r"no space left|os error 28|unexpected pos \d+ vs", str(error), re.IGNORECASE):
        return _disk_full(run)  # in the words of safetensors and torch.save
    if is_out_of_memory(error):
        return out_of_memory(recipe)
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
        return None  # their words are paths
    text = f"{type(error).__name__}: {error}"
    for words, meaning, mend in _KNOWN:
        if re.search(words, text, re.IGNORECASE):
            line = _telling_line(str(error), words)
            return SkipwiseError(f"{meaning} ({line})\n{mend}")
    return None


def _disk_full(run: RunFolder) -> SkipwiseError:
    return SkipwiseError(
        f"the disk of {run.path} is full: the checkpoint could not be written\n"
        f"make room and type the command again: it goes on at {resume_point(run)}"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory was full, or this machine's."""
    words = r"out of memory|(can't|cannot) allocate memory|bad_alloc|CUBLAS_STATUS_ALLOC_FAILED"
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(
        isinstance(error, RuntimeError) and re.search(words, str(error), re.IGNORECASE)
    )


def out_of_memory(recipe: Recipe) -> SkipwiseError:
    """What to change first; the same order in which `skipwise plan` looks for what fits."""
    change = next_change(recipe, world_size())
    mend = f"type {change}" if change else "take a GPU with more memory, or more of them"
    return SkipwiseError(
        f"{'the GPU' if torch.cuda.is_available() else 'this machine'} is out of memory at "
        f"{recipe.training.micro_batch_size} x {recipe.train_length or 'L'} tokens a process"
        f"{', in the full-length finish' if is_full_length_stage(recipe) else ''}\n{mend}; "
        "skipwise plan RECIPE tells what fits"
    )


def _telling_line(text: str, words: str) -> Any:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = [line for line in lines if re.search(words, line, re.IGNORECASE)]
    return (found or lines or ["no word"])[0][:160]
