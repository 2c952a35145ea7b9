"""Checkpoints: complete or removed, never partial.

A checkpoint has many files, under some engines written by several processes. The last file,
`complete`, is written when all others exist. A folder without it was interrupted, and is removed
before training resumes. Old checkpoints are removed only after a new one is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from skipwise.config.machine import is_main_process, world_size
from skipwise.config.recipe import Recipe
from skipwise.config.run_folder import RunFolder, write_text
from skipwise.errors import SkipwiseError

_COMPLETE = "complete"


def mark_complete(folder: Path, step: int, engine: str, micro_batch_size: int = 1) -> None:
    """Mark that all files of the checkpoint are written, by which engine and processes."""
    metadata = {"step": step, "engine": engine, "num_processes": world_size()}
    metadata["micro_batch_size"] = micro_batch_size
    write_text(folder / _COMPLETE, json.dumps(metadata) + "\n")


def last_checkpoint(run: RunFolder) -> Path | None:
    """The newest complete checkpoint."""
    complete = [folder.parent for folder in run.checkpoints.glob(f"checkpoint-*/{_COMPLETE}")]
    return max(complete, key=lambda folder: int(folder.name.rsplit("-", 1)[1]), default=None)


def trained_micro_batch(run: RunFolder) -> int | None:
    """The micro batch of the last checkpoint; None without one."""
    last = last_checkpoint(run)
    found = json.loads((last / _COMPLETE).read_text(encoding="utf-8")) if last else None
    return found.get("micro_batch_size") if isinstance(found, dict) else None


def remove_incomplete(run: RunFolder) -> None:
    """Remove interrupted checkpoints. Not safe while another run writes into the folder."""
    for folder in run.checkpoints.glob("checkpoint-*") if is_main_process() else []:
        if not (folder / _COMPLETE).exists():
            shutil.rmtree(folder, ignore_errors=True)


def finished_checkpoint(run: RunFolder, num_steps: int) -> Path | None:
    """The complete checkpoint of the last step; None if training has not reached it."""
    folder = run.checkpoints / f"checkpoint-{num_steps}"
    return folder if (folder / _COMPLETE).exists() else None


def trained_checkpoint(run: RunFolder, recipe: Recipe) -> Path | None:
    """The final checkpoint of the last stage; None if training is not complete."""
    if not recipe.full_length.fraction:
        return finished_checkpoint(run, recipe.training.num_steps)
    if not run.finish.recipe_file.exists():
        return None
    return finished_checkpoint(run.finish, run.finish.recipe().training.num_steps)


def num_processes_of(checkpoint: Path, engine: str) -> int:
    """The number of processes that wrote a checkpoint.

    Raises:
        SkipwiseError: another engine wrote it, and this one cannot read its optimizer state.
    """
    metadata = json.loads((checkpoint / _COMPLETE).read_text(encoding="utf-8"))
    if not isinstance(metadata, dict):  # written by an older version, with one process
        metadata = {"engine": "one process", "num_processes": 1}
    by = metadata["engine"]
    unsharded = ("one process", "ddp")  # their optimizer files are the same
    if by != engine and not (by in unsharded and engine in unsharded):
        fix = f"pass --engine {'ddp' if by in unsharded else by}"
        if by.endswith("launcher"):
            fix = "use the same accelerate configuration"
        raise SkipwiseError(
            f"{checkpoint} was written by engine {by}, and {engine} cannot read its optimizer\n"
            f"{fix} to resume, or another --out to start again"
        )
    return metadata["num_processes"]


def keep_candidate(checkpoint: Path, folder: Path) -> None:
    """Hard-link a checkpoint's weights and configs into a folder that is kept."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for file in checkpoint.iterdir():
        weights = file.suffix == ".safetensors" or file.name.endswith(".safetensors.index.json")
        if weights or file.name in ("config.json", "adapter_config.json"):
            try:
                os.link(file, part / file.name)
            except OSError:  # a file system without hard links
                shutil.copyfile(file, part / file.name)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def check_disk_space(run: RunFolder, num_bytes: int) -> None:
    """Check free disk space before a checkpoint is written or an old one removed.

    Raises:
        SkipwiseError: there is too little; says how much is free and how much is needed.
    """
    free = shutil.disk_usage(run.path).free
    if free < num_bytes:
        raise SkipwiseError(
            f"the disk of {run.path} has {free / 2**30:.1f} GiB left, and a checkpoint takes "
            f"{num_bytes / 2**30:.1f}\nfree space and run the command again; it resumes from "
            f"{resume_point(run)}"
        )


def checkpoint_bytes(model: Any, optimizer: Any, checkpoint: Path | None) -> int:
    """Size of the next checkpoint: that of the last one, or of trained weights and optimizer."""
    if checkpoint is not None:
        files = [file for file in checkpoint.rglob("*") if file.is_file()]
        return sum(f.stat().st_size for f in files if "_universal" not in str(f))
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = sum(_num_elements(p) * p.element_size() for p in parameters)
    states = sum(
        _num_elements(value) * value.element_size()
        for state in getattr(optimizer, "state", {}).values()
        for value in state.values()
        if hasattr(value, "element_size")
    )
    return weights + states


def resume_point(run: RunFolder) -> str:
    """Where a run would resume, for a message."""
    newest = last_checkpoint(run)
    return newest.name if newest else "step 0 (no checkpoint yet)"


def _num_elements(tensor: Any) -> int:
    return getattr(tensor, "ds_numel", None) or tensor.numel()
