"""Checkpoints: complete and whole, or not used.

A checkpoint has many files, under some engines written by several processes. The last file,
`complete`, is written when all others are on the disk. It lists their sizes and digests. A folder
without it was interrupted, and is removed before training resumes; one that differs from its list
is damaged, is set aside, and the checkpoint before it is used. Old checkpoints are removed, in the
order of their steps, only after a new one is complete.

`complete` also says what decided the run: the base, the text, the training length, the scaling, the
separator, the micro batch and the temperature. run.json has the same. What it lost is taken from
here; where it says something else, the run does not go on.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from skipwise.config import machine
from skipwise.config.machine import is_main_process, world_size
from skipwise.config.recipe import Recipe
from skipwise.config.run_folder import RunFolder
from skipwise.config.trust import is_sealed, seal
from skipwise.errors import SkipwiseError
from skipwise.models.identity import base_identity, check_same_base, digests
from skipwise.models.prepared import PreparedModel

_COMPLETE = "complete"
_TRUST = "SKIPWISE_TRUST_CHECKPOINTS"
_SAFE_ENGINES = ("one process", "ddp", "fsdp2")  # torch loads their files with weights_only
_ENGINE_KEYS = ("deepspeed", "fsdp", "fsdp_config", "accelerator_config", "parallelism_config")
_SEPARATOR = ("name", "begin", "end", "between")
_LENGTH = ("train_length", "num_gpus")
_known: dict[tuple[Any, ...], str] = {}  # damage by folder and the sizes and times of its files


def unpickles(engine: str, recipe: Recipe | None = None) -> bool:
    """Whether loading a checkpoint can run code: DeepSpeed and FSDP's sharded format unpickle."""
    changed = recipe is not None and any(key in recipe.trainer for key in _ENGINE_KEYS)
    return engine not in _SAFE_ENGINES or changed


def mark_complete(
    folder: Path,
    step: int,
    engine: str,
    recipe: Recipe | None = None,
    num_processes: int | None = None,
    micro_batch_size: int = 1,
    decided: dict[str, Any] | None = None,
) -> None:
    """Write the list of the checkpoint's files, after all of them are on the disk.

    Args:
        decided: see `decisions`.
    """
    files = _files(folder)
    for path in (*files.values(), *(p for p in folder.rglob("*") if p.is_dir())):
        _sync(path)
    metadata = {
        "step": step,
        "engine": engine,
        "num_processes": num_processes or world_size(),
        "micro_batch_size": micro_batch_size,
        "full": (full := unpickles(engine, recipe)),  # whether pickles are read completely
        "files": digests(files, _whole(files, full)),
        **({"decided": decided} if decided else {}),
    }
    _write_mark(folder, metadata)


def _write_mark(folder: Path, metadata: dict[str, Any]) -> None:
    """Write `complete`, sealed where loading the checkpoint can run code."""
    metadata = {key: value for key, value in metadata.items() if key != "seal"}
    if metadata.get("full"):
        with suppress(SkipwiseError):  # no place for a key: the user is asked when it is loaded
            metadata["seal"] = seal(metadata)
    part = folder / f"{_COMPLETE}.part"
    part.write_text(json.dumps(metadata) + "\n", encoding="utf-8")
    _sync(part)
    os.replace(part, folder / _COMPLETE)
    _sync(folder)


def mark_again(folder: Path, engine: str, recipe: Recipe) -> None:
    """Mark a checkpoint whose files were converted, with what its mark said before."""
    known = _read_mark(folder) or {}
    kept = {k: known[k] for k in ("num_processes", "micro_batch_size", "decided") if k in known}
    mark_complete(folder, _step(folder) or 0, engine, recipe, **kept)


def check_trusted(checkpoint: Path, engine: str, recipe: Recipe | None = None) -> None:
    """Refuse a checkpoint that this user did not write, if loading it can run code.

    Each of its files must be listed with its full digest, and the list sealed with the user's key.
    """
    trusted = os.environ.get(_TRUST) == "1" or not is_main_process()
    if trusted or not unpickles(engine, recipe):
        return
    metadata, files = _read_mark(checkpoint) or {}, _files(checkpoint)
    listed = metadata.get("files", {})
    for name in [n for n in files if n not in listed and "_universal" in n.split("/")[0]]:
        files.pop(name).unlink()  # left by a conversion that was interrupted
    signature = metadata.pop("seal", None)
    if not is_sealed(metadata, signature) or listed != digests(files, _whole(files, True)):
        raise SkipwiseError(
            f"{checkpoint} was not written by you on this machine, and engine {engine} could run "
            f"code that is hidden in it\nif you trust its source, type {_TRUST}=1 before the "
            "command; else choose another --out"
        )


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint that is marked complete; empty if nothing. Told once."""
    mark, files = folder / _COMPLETE, _files(folder)
    stats = {name: path.stat() for name, path in {_COMPLETE: mark, **files}.items()}
    key = (str(folder), *((n, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for n, s in stats.items()))
    if key not in _known:
        _known[key] = _find_damage(_read_mark(folder), files)
        if _known[key] and is_main_process():
            print(
                f"{folder} is damaged: {_known[key]}; it is not used", file=sys.stderr, flush=True
            )
    return _known[key]


def _find_damage(metadata: dict[str, Any] | None, files: dict[str, Path]) -> str:
    if metadata is None:
        return f"{_COMPLETE} cannot be read"
    listed = metadata.get("files", {})
    if missing := [name for name in listed if name not in files]:
        return f"{missing[0]} is missing"
    full = bool(metadata.get("full"))
    found = digests({name: files[name] for name in listed}, _whole(listed, full))
    changed = [name for name in listed if found[name] != listed[name]]
    return f"{changed[0]} has changed" if changed else ""


def last_checkpoint(run: RunFolder) -> Path | None:
    """The newest checkpoint that is complete and not damaged."""
    return next(
        (folder for folder in reversed(complete_checkpoints(run)) if not damage(folder)), None
    )


def trained_micro_batch(run: RunFolder) -> int | None:
    """The micro batch of the last checkpoint, if there is one."""
    last = last_checkpoint(run)
    return (_read_mark(last) or {}).get("micro_batch_size") if last else None


def remove_incomplete(run: RunFolder) -> None:
    """Remove interrupted checkpoints and set damaged ones aside.

    Not safe while another run writes into the folder.
    """
    for folder in sorted(run.checkpoints.glob("checkpoint-*")) if is_main_process() else []:
        if _step(folder) is None:  # of the user
            continue
        if not (folder / _COMPLETE).exists():
            shutil.rmtree(folder, ignore_errors=True)
        elif damage(folder):
            for before in run.checkpoints.glob("damaged-*"):  # one is enough to look at
                shutil.rmtree(before, ignore_errors=True)
            os.replace(folder, folder.with_name(f"damaged-{folder.name}"))


def remove_old(run: RunFolder, num_kept: int) -> None:
    """Remove all but the newest complete checkpoints, by their steps: clocks can be wrong."""
    for folder in complete_checkpoints(run)[:-num_kept]:
        (folder / _COMPLETE).unlink()
        shutil.rmtree(folder, ignore_errors=True)


def complete_checkpoints(run: RunFolder) -> list[Path]:
    """The checkpoints that are marked complete, the oldest first; their files are not read."""
    folders = [mark.parent for mark in run.checkpoints.glob(f"checkpoint-*/{_COMPLETE}")]
    return sorted((f for f in folders if _step(f) is not None), key=lambda f: _step(f) or 0)


def _step(folder: Path) -> int | None:
    step = folder.name.removeprefix("checkpoint-")
    return int(step) if step.isascii() and step.isdigit() else None


def _read_mark(folder: Path) -> dict[str, Any] | None:
    """The list of a checkpoint; None if it is cut off or of another shape."""
    try:
        metadata = json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if isinstance(metadata, int):  # written by an older version, with one process
        return {"engine": "one process", "num_processes": 1}
    types = {"step": int, "engine": str, "num_processes": int}
    fits = isinstance(metadata, dict) and isinstance(metadata.get("files", {}), dict)
    return metadata if fits and all(isinstance(metadata.get(k), types[k]) for k in types) else None


def _files(folder: Path) -> dict[str, Path]:
    """The files of a checkpoint by their names, without its mark."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in found}
    return {n: path for n, path in names.items() if n not in (_COMPLETE, f"{_COMPLETE}.part")}


def _whole(names: Iterable[str], full: bool) -> list[str]:
    """The files that are read completely: with `full` those that can hold a pickle."""
    return [name for name in names if full and not name.endswith((".safetensors", ".json"))]


def _sync(path: Path) -> None:
    """Write a file or folder to the disk, as far as the system can."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def finished_checkpoint(run: RunFolder, num_steps: int) -> Path | None:
    """The complete checkpoint of the last step; None if training has not reached it."""
    folder = run.checkpoints / f"checkpoint-{num_steps}"
    return folder if (folder / _COMPLETE).exists() and not damage(folder) else None


def trained_checkpoint(run: RunFolder, recipe: Recipe) -> Path | None:
    """The final checkpoint of the last stage; None if training is not complete."""
    if not recipe.full_length.fraction:
        return finished_checkpoint(run, recipe.training.num_steps)
    if not run.finish.recipe_file.exists():
        return None
    return finished_checkpoint(run.finish, run.finish.recipe().training.num_steps)


def decisions(run: RunFolder) -> dict[str, Any]:
    """What has decided a run, as run.json has it."""
    metadata = (run.parent or run).metadata()
    separator, data = metadata.get("separator", {}), metadata.get("data", {})
    length = metadata.get("train_length_choice", {})
    found = {
        "identity": metadata.get("identity", {}),
        "rope": metadata.get("rope", {}),
        "rope_choice": {k: v for k, v in metadata.get("rope_choice", {}).items() if k == "type"},
        "train_length_choice": {k: length[k] for k in _LENGTH if k in length},
        "separator": {k: separator[k] for k in _SEPARATOR if k in separator},
        "data": {k: data[k] for k in ("digest", "digests") if k in data},
    }
    return json.loads(json.dumps({key: value for key, value in found.items() if value}))


def known_decisions(run: RunFolder) -> tuple[str, dict[str, Any]]:
    """The name of the newest checkpoint of all stages, and what decided the run, as it says."""
    last = last_checkpoint(run.finish) or last_checkpoint(run)
    decided = (_read_mark(last) or {}).get("decided") if last else None
    return (last.name, decided) if last and isinstance(decided, dict) else ("", {})


def known_identity(run: RunFolder) -> dict[str, Any]:
    """What the base and the text of a run are, of run.json or else of its newest checkpoint."""
    return run.metadata().get("identity") or known_decisions(run)[1].get("identity", {})


def resume_decisions(prepared: PreparedModel, run: RunFolder) -> None:
    """Compare the base with the one that the run began with, and fill in what run.json has lost.

    Raises:
        SkipwiseError: another base model.
    """
    name, decided = known_decisions(run)
    base = base_identity(prepared.recipe.model, prepared.recipe.load.revision)
    for known in (run.metadata().get("identity") or {}, decided.get("identity", {})):
        if "base" in known:
            fix = "type another --out to start again"
            check_same_base(prepared.recipe.model, known["base"], base, run.path, fix)
    metadata = run.metadata()
    lost = {key: value for key, value in decided.items() if key not in metadata}
    if is_main_process() and lost:
        print(f"run.json has lost {', '.join(lost)}: taken from {name}", file=sys.stderr)
        for key in ("rope_choice", "separator", "temperature", "train_length_choice"):
            if key in lost:
                lost[key] = {"detail": f"as {name} says", "perplexity": {}, **lost[key]}
        run.update(**lost)
    run.update_entry("identity", base=base)
    micro_batch = metadata.get("batch", {}).get("micro_batch_size")
    size = trained_micro_batch(run)  # the stage at full length has its own
    if last := size and micro_batch not in (None, size) and last_checkpoint(run):
        print(f"micro batch {micro_batch}; {last.name} was trained with {size}", file=sys.stderr)


def check_decisions(run: RunFolder) -> None:
    """Compare run.json, of which `prepare_run` has written what will be used, with the checkpoint.

    Raises:
        SkipwiseError: another scaling, separator or text than it was trained with.
    """
    name, decided = known_decisions(run)
    now = decisions(run)
    for key in ("train_length_choice", "rope_choice", "rope", "separator", "data"):
        if key in decided and now.get(key, {}) != decided[key]:
            raise SkipwiseError(
                f"{run.path / 'run.json'} says {key} {_brief(now.get(key))}, and {name} was "
                f"trained with {_brief(decided[key])}\nremove run.json: what decided the run is in "
                "its checkpoints; or restore the text, or type another --out to start again"
            )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def add_decision(checkpoint: Path | None, **decided: Any) -> None:
    """Write what was decided after training into the mark of a checkpoint."""
    known = _read_mark(checkpoint) if checkpoint is not None else None
    if checkpoint is not None and known is not None and is_main_process():
        trusted = "seal" not in known or is_sealed(
            {k: v for k, v in known.items() if k != "seal"}, known["seal"]
        )
        if trusted:
            _write_mark(checkpoint, {**known, "decided": {**known.get("decided", {}), **decided}})


def num_processes_of(checkpoint: Path, engine: str) -> int:
    """The number of processes that wrote a checkpoint.

    Raises:
        SkipwiseError: another engine wrote it, and this one cannot read its optimizer state.
    """
    metadata = _read_mark(checkpoint) or {"engine": "unknown", "num_processes": 0}
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
    """Hard-link a checkpoint's weights and configs into a folder that is kept, with their list."""
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
    listed = digests(_files(part))
    _write_mark(part, {"step": 0, "engine": "", "num_processes": 1, "files": listed})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def check_disk_space(run: RunFolder, num_bytes: int) -> None:
    """Check free disk space before a checkpoint is written or an old one removed.

    Raises:
        SkipwiseError: there is too little; says how much is free and how much is needed.
    """
    done = complete_checkpoints(run)  # not read: this runs at every save
    newest = done[-1].name if done else "step 0 (no checkpoint yet)"
    fix = f"free space and run the command again; it resumes from {newest}"
    machine.check_disk_space(run.path, num_bytes, "a checkpoint", fix)


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
