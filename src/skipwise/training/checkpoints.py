"""Checkpoints that are whole or not there: what marks them, what goes on from them, room for them.

A checkpoint is written file by file, by several processes under some engines. Its last file is
`complete`, written when all the others are there; a folder without it is what a kill has left, and
is removed before training goes on. Old checkpoints are removed after the new one, so that there is
always one to go on from.
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

_WHOLE = "complete"


def mark_complete(folder: Path, step: int, engine: str) -> None:
    """Say that every file of the checkpoint is written, and by what."""
    metadata = {"step": step, "engine": engine, "num_processes": world_size()}
    write_text(folder / _WHOLE, json.dumps(metadata) + "\n")


def last_checkpoint(run: RunFolder) -> Path | None:
    """The newest checkpoint that was written to its end."""
    whole = [folder.parent for folder in run.checkpoints.glob(f"checkpoint-*/{_WHOLE}")]
    return max(whole, key=lambda folder: int(folder.name.rsplit("-", 1)[1]), default=None)


def remove_incomplete(run: RunFolder) -> None:
    """Remove what a kill has left; not while another process trains, which may be writing it."""
    for folder in run.checkpoints.glob("checkpoint-*") if is_main_process() else []:
        if not (folder / _WHOLE).exists():
            shutil.rmtree(folder, ignore_errors=True)


def finished_checkpoint(run: RunFolder, num_steps: int) -> Path | None:
    """The checkpoint of the last step, where training has reached it."""
    folder = run.checkpoints / f"checkpoint-{num_steps}"
    return folder if (folder / _WHOLE).exists() else None


def trained_checkpoint(run: RunFolder, recipe: Recipe) -> Path | None:
    """The checkpoint that all training ends in, that of the finish where there is one."""
    if not recipe.full_length.fraction:
        return finished_checkpoint(run, recipe.training.num_steps)
    if not run.finish.recipe_file.exists():
        return None
    return finished_checkpoint(run.finish, run.finish.recipe().training.num_steps)


def num_processes_of(checkpoint: Path, engine: str) -> int:
    """How many processes wrote a checkpoint.

    Raises:
        SkipwiseError: another engine wrote it, whose optimizer this one cannot read.
    """
    metadata = json.loads((checkpoint / _WHOLE).read_text(encoding="utf-8"))
    if not isinstance(metadata, dict):  # of an older version: one process
        metadata = {"engine": "one process", "num_processes": 1}
    by = metadata["engine"]
    plain = ("one process", "ddp")  # whose optimizer states are the same file
    if by != engine and not (by in plain and engine in plain):
        mend = f"type --engine {'ddp' if by in plain else by}"
        if by.endswith("launcher"):
            mend = "start it with the same accelerate configuration"
        raise SkipwiseError(
            f"{checkpoint} was written by engine {by}, and {engine} cannot read its optimizer\n"
            f"{mend} to go on, or another --out to begin anew"
        )
    return metadata["num_processes"]


def keep_candidate(checkpoint: Path, folder: Path) -> None:
    """Link a checkpoint's weights and configs into a folder that outlives it."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for file in checkpoint.iterdir():
        weights = file.suffix == ".safetensors" or file.name.endswith(".safetensors.index.json")
        if weights or file.name in ("config.json", "adapter_config.json"):
            try:
                os.link(file, part / file.name)
            except OSError:  # a file system without links
                shutil.copyfile(file, part / file.name)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def check_disk_space(run: RunFolder, num_bytes: int) -> None:
    """Refuse to begin a checkpoint that the disk has no room for.

    Raises:
        SkipwiseError: before anything is written or removed; says how much is missing.
    """
    free = shutil.disk_usage(run.path).free
    if free < num_bytes:
        raise SkipwiseError(
            f"the disk of {run.path} has {free / 2**30:.1f} GiB left, and a checkpoint takes "
            f"{num_bytes / 2**30:.1f}\nmake room and type the command again: it goes on at "
            f"{resume_point(run)}"
        )


def checkpoint_bytes(model: Any, optimizer: Any, checkpoint: Path | None) -> int:
    """Bytes that the next checkpoint takes: those of the last one, or what is held to be saved."""
    if checkpoint is not None:
        files = [file for file in checkpoint.rglob("*") if file.is_file()]
        return sum(f.stat().st_size for f in files if "_universal" not in str(f))
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = sum(_numbers(p) * p.element_size() for p in parameters)
    states = sum(
        _numbers(value) * value.element_size()
        for state in getattr(optimizer, "state", {}).values()
        for value in state.values()
        if hasattr(value, "element_size")
    )
    return weights + states


def resume_point(run: RunFolder) -> str:
    """Where a run would go on, for a message."""
    newest = last_checkpoint(run)
    return newest.name if newest else "none: it starts anew"


def _numbers(tensor: Any) -> int:
    return getattr(tensor, "ds_numel", None) or tensor.numel()
