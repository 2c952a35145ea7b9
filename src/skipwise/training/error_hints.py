"""Known errors of training runs, each with the setting to change.

Engines fail with tracebacks of hundreds of lines, of which one matters. Known errors are recognized
by their text. The traceback is kept as the cause of the new error.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch

from skipwise.config.batch import micro_batch
from skipwise.config.machine import world_size
from skipwise.config.recipe import Recipe
from skipwise.config.run_folder import RunFolder
from skipwise.config.stages import is_full_length_stage
from skipwise.errors import SkipwiseError, install, is_no_memory, is_no_space, system_error
from skipwise.planning import next_change
from skipwise.training.checkpoints import resume_point

_KNOWN = (  # (regex, meaning, fix)
    (
        r"nccl.*(timeout|timed out)|watchdog.*timeout|timed out waiting|socket timeout"
        r"|application timeout|connection (closed|reset) by peer|writev.*broken pipe",
        "another rank does not answer",
        "see the first error of the other ranks; if there is none, one hangs or is out of reach: "
        "the same command goes on from {resume}; set trainer.ddp_timeout=7200 to wait longer",
    ),
    (
        r"address already in use|eaddrinuse",
        "MASTER_PORT, the port of the process group, is in use",
        "set MASTER_PORT to another port, or run accelerate launch --main_process_port 0",
    ),
    (
        r"nccl error|nccl.*unhandled",
        "NCCL could not connect the GPUs",
        "set NCCL_DEBUG=INFO to see why; NCCL_P2P_DISABLE=1 helps where GPUs have no direct link",
    ),
    (
        r"device-side assert",
        "a token id or a position is out of range on the GPU",
        "run skipwise check, or set CUDA_LAUNCH_BLOCKING=1 to see where",
    ),
    (
        r"cuda_home|\bnvcc\b|cpuadam|cpu_adam|error building extension|\bninja\b",
        "DeepSpeed could not compile an extension",
        "install a compiler and the CUDA toolkit of torch's version, or pass --engine fsdp2",
    ),
    (
        r"\bbitsandbytes\b",
        "bitsandbytes is not installed, or does not support this device",
        f"{install('qlora')}, or remove lora.quantization and 8-bit optimizers",
    ),
    (
        r"flash.?attn|flashattention|flash_attention",
        "FlashAttention is not installed, or does not support this model or dtype",
        "pip install flash-attn, or set load.attn_implementation=sdpa",
    ),
    (
        r"no kernel image is available",
        "this torch was not built for this GPU",
        "install a torch build for this GPU: pytorch.org/get-started",
    ),
    (
        r"flex_attention|inductor|backendcompilerfailed|find c compiler|out of resource",
        "a kernel could not be compiled for this GPU",
        "set load.attn_implementation=sdpa if importance weights are on, and remove "
        "trainer.torch_compile",
    ),
)


def explain_error(error: BaseException, recipe: Recipe, run: RunFolder) -> SkipwiseError | None:
    """A known error as a `SkipwiseError` with the fix; None if the error is not known."""
    if isinstance(error, SkipwiseError):
        return error
    if is_no_space(error):
        fix = f"free space and run the command again; it resumes from {resume_point(run)}"
        return SkipwiseError(f"the disk of {run.path} is full\n{fix}")
    if is_out_of_memory(error):
        return out_of_memory(recipe, run)
    if getattr(error, "errno", None) is not None and not isinstance(error, ConnectionError):
        return system_error(error)  # its text is a path, which could match by accident
    text = f"{type(error).__name__}: {error}"
    for pattern, meaning, fix in _KNOWN:
        if re.search(pattern, text, re.IGNORECASE):
            line = _matching_line(str(error), pattern)
            fix = fix.format(resume=resume_point(run))
            return SkipwiseError(f"{meaning} ({line})\n{fix}")
    return system_error(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the GPU or of the machine was full."""
    return isinstance(error, torch.OutOfMemoryError) or is_no_memory(error)


def out_of_memory(recipe: Recipe, run: RunFolder) -> SkipwiseError:
    """The next setting to change, in the order of `skipwise plan`."""
    L = recipe.original_length or run.metadata().get("original_length")
    known = replace(recipe, original_length=L)
    change = next_change(known, world_size(), has_gpu=torch.cuda.is_available())
    fix = f"try {change}" if change else "use a GPU with more memory, or more GPUs"
    return SkipwiseError(
        f"{'the GPU' if torch.cuda.is_available() else 'this machine'} is out of memory at "
        f"{micro_batch(recipe.training)} x {recipe.train_length or 'L'} tokens per process"
        f"{', in the full-length stage' if is_full_length_stage(recipe) else ''}\n{fix}; "
        "skipwise plan RECIPE shows what fits"
    )


def _matching_line(text: str, pattern: str) -> Any:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = [line for line in lines if re.search(pattern, line, re.IGNORECASE)]
    return (found or lines or ["no message"])[0][:160]
