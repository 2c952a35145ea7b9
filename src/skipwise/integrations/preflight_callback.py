"""What another trainer needs from Skipwise beside the collator: the preflight, a portable folder.

Most faults that ruin a PoSE run leave the loss normal: a trainer that drops `position_ids`, a
missing mask, labels made again, a model that was never rescaled. `PreflightCallback` checks the
trainer's actual model and batches before the first step.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from transformers import TrainerCallback

from skipwise.errors import Check, SkipwiseError, require
from skipwise.integrations.collator import PoSECollator
from skipwise.models.compatibility import make_portable
from skipwise.models.hf_config import complete, to_dict
from skipwise.models.model_info import ModelInfo, read_model_info
from skipwise.pose.samplers import IGNORE_INDEX, FullLength
from skipwise.preflight.batch import check_batch, check_labels, check_tokenizer
from skipwise.preflight.model import check_model

_NUM_RECORDS = 16  # of the data set, collated for the preflight


class PreflightCallback(TrainerCallback):
    """Skipwise's checks on a trainer's own model and batches, and the collator's epochs.

    When training begins, the first records of the trainer's data set go through its own collator.
    The batch with the skip nearest its middle then goes through the model, forward and backward.
    The first training step also shows that positions and mask reach the model.

    Args:
        collator: The run's collator. Its epoch is set here, so that every epoch draws new skips.
        target_length: T, if the collator is not a `PoSECollator`.
        info: Of the model before it was rescaled (`load_scaled` returns it), whose frequencies must
            differ from the model's. By default only the window of the model's config is checked.
        report: Called with each check, on the main process.
    """

    def __init__(
        self,
        collator: PoSECollator | None = None,
        *,
        target_length: int | None = None,
        info: ModelInfo | None = None,
        report: Callable[[Check], None] = lambda check: print(check, flush=True),
    ) -> None:
        if collator is not None and not isinstance(collator, PoSECollator):
            raise SkipwiseError(
                f"collator is a {type(collator).__name__}, not a PoSECollator\n"
                "for a collator of your own give target_length= instead"
            )
        if target_length is None:
            if collator is None:
                raise SkipwiseError("give the run's PoSECollator, or target_length=")
            target_length = collator.sampler.target_length
        self.collator, self.target_length, self.info = collator, target_length, info
        self.report = report
        self.checks: list[Check] = []
        self._epoch = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start_epoch(int(state.epoch or 0))
        model = kwargs["model"]
        self.checks = _check_scaled(model, self.target_length, self.info)
        records, rows = _collated(kwargs["train_dataloader"])
        self.checks += _check_rows(rows, self.collator)
        if all(check.passed for check in self.checks):
            best = min(range(len(rows)), key=lambda i: _distance(rows[i]))
            row = dict(send_to_device(rows[best], args.device))
            tokenizer = kwargs.get("processing_class")
            if hasattr(tokenizer, "__len__"):
                size = model.get_input_embeddings().num_embeddings
                self.checks.append(check_tokenizer(tokenizer, size, row))
            self.checks += _check_open_labels(records, rows, self.collator)
            devices = [args.device] if args.device.type == "cuda" else []
            # The run's random state must not change.
            with torch.random.fork_rng(devices=devices), _without_reentry(model):
                self.checks += check_batch(model, row, lambda: _autocast(args))
        if state.is_world_process_zero:
            for check in self.checks:
                self.report(check)
        require(self.checks)
        if not args.torch_compile:  # a hook would be compiled with the model
            _watch_first_step(model)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start_epoch(self._epoch)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._epoch += 1

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        if self.collator is not None:
            self.collator.set_epoch(epoch)


def finalize_checkpoint(folder: str | Path, target_length: int) -> Path:
    """Make a folder saved by a trainer readable by every stock runtime.

    Writes both spellings of RoPE to its config (transformers 4 silently reads a transformers 5
    checkpoint as unscaled), turns the cache on again, and sets the tokenizer's length.

    Raises:
        SkipwiseError: a LoRA adapter, or a model whose window is below the target.
    """
    folder = Path(folder).expanduser()
    if (folder / "adapter_config.json").exists():
        raise SkipwiseError(
            f"{folder} has a LoRA adapter, which does not contain the rescaled RoPE\n"
            "merge it: trainer.model.merge_and_unload().save_pretrained(FOLDER), and give FOLDER"
        )
    file = folder / "config.json"
    if not file.is_file():
        raise SkipwiseError(f"{folder} has no config.json: save the model there first")
    config = json.loads(file.read_text(encoding="utf-8"))
    window = _window_of(complete(config), target_length)[1]
    if window < target_length:
        raise SkipwiseError(
            f"the model in {folder} has a window of {window:,} tokens, not {target_length:,}: it "
            "was saved with the config of its base\nsave the trained model with its scaled config"
        )
    make_portable(folder, target_length)
    return folder


def _check_scaled(model: Any, target_length: int, base: ModelInfo | None) -> list[Check]:
    """The config's window is the target, and the model computes what its config says."""
    config = model.config.get_text_config()
    info, window = _window_of(to_dict(config), target_length)
    scaling, reaches = info.scaling, window >= target_length
    detail = f"a window of {window:,} tokens, {scaling.name}"
    if not reaches:
        detail = f"the model's config has a window of {window:,} tokens, and positions go up to "
        detail += f"{target_length - 1:,}: load it by skipwise.models.prepared.load_scaled"
    elif base is not None:
        before = base.scaling.inv_freq(base.rope_theta, base.rotary_dim)
        have = scaling.inv_freq(info.rope_theta, info.rotary_dim)
        if have.shape == before.shape and np.allclose(have, before, rtol=1e-6, atol=0):
            reaches = False
            detail = "the frequencies are those of the base, whose window is "
            detail += f"{base.original_length:,}: load the model by "
            detail += "skipwise.models.prepared.load_scaled"
    rescaled = Check(name="rescaled", passed=reaches, detail=detail)
    return [rescaled, *check_model(model, config, info, scaling, target_length)]


def _window_of(config: dict[str, Any], target_length: int) -> tuple[ModelInfo, int]:
    """(facts of a config that may be scaled, the window that it states)."""
    # Weights quantised on loading are trained through an adapter.
    info = read_model_info({**config, "quantization_config": None}, target_length)
    return info, info.scaling.window(config.get("max_position_embeddings") or target_length)


def _collated(dataloader: Any) -> tuple[list[Any], list[dict[str, Any]]]:
    """(the first records of the trainer's data set, each of them as a batch of one).

    The dataloader itself is not started, because that would change the run's random state.
    """
    dataset = dataloader.dataset
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        records = [dataset[i] for i in range(min(_NUM_RECORDS, len(dataset)))]
    else:
        records = list(itertools.islice(iter(dataset), _NUM_RECORDS))
    return records, [dict(dataloader.collate_fn([record])) for record in records]


def _check_rows(rows: list[dict[str, Any]], collator: PoSECollator | None) -> list[Check]:
    """The batches have the needed keys, and positions that skip."""
    name = "positions skip"
    if not rows:
        return [Check(name=name, passed=False, detail="the data set is empty")]
    missing = [k for k in ("input_ids", "labels", "position_ids") if rows[0].get(k) is None]
    if missing:
        detail = f"no {' and no '.join(missing)} in the trainer's batches: give the trainer "
        detail += "data_collator=PoSECollator(...)"
        return [Check(name=name, passed=False, detail=detail)]
    num_skipping = sum(_distance(row) < np.inf for row in rows)
    may_be_plain = collator is not None and isinstance(collator.sampler, FullLength)
    detail = f"in {num_skipping} of the first {len(rows)} records"
    if not num_skipping:
        longest = max(int(row["input_ids"].shape[1]) for row in rows)
        length = collator.sampler.train_length if collator is not None else 0
        detail = f"in none of the first {len(rows)} records, so far positions are not trained: "
        if longest < length:
            detail += f"the longest has {longest:,} tokens, and train_length is {length:,}; pack "
            detail += "the records or take a smaller train_length"
        else:
            detail += "the trainer makes its own position_ids; "
            detail += "give it data_collator=PoSECollator(...)"
    return [Check(name=name, passed=num_skipping > 0 or may_be_plain, detail=detail)]


def _check_open_labels(
    records: list[Any], rows: list[dict[str, Any]], collator: PoSECollator | None
) -> list[Check]:
    """Labels after jumps of the text and in masked prompts are also masked in the batch.

    Only Skipwise's own data set and collator say where the text jumps.
    """
    if collator is None:
        if not all(isinstance(r, dict) and "example" in r for r in records):
            return []
        pairs = zip(records, rows, strict=True)
        items = [{"example": r["example"], "labels": row["labels"][0].numpy()} for r, row in pairs]
        return [check_labels(items)]
    num_open = num_masked = 0
    for record, row in zip(records, rows, strict=True):
        want = collator([record])["labels"]
        have = row["labels"][:, : want.shape[1]]
        if have.shape != want.shape:
            detail = f"a batch of {row['labels'].shape[1]:,} tokens, and the collator makes "
            detail += f"{want.shape[1]:,}: give the trainer the same collator as the callback"
            return [Check(name="labels", passed=False, detail=detail)]
        masked = want == IGNORE_INDEX
        num_masked += int(masked.sum())
        num_open += int((masked & (have != IGNORE_INDEX)).sum())
    detail = f"{num_masked:,} masked in {len(rows)} records: prompts, padding, and the first after "
    detail += "each gap in the text"
    if num_open:
        detail = f"{num_open:,} that the collator masks are not masked in the batch, after a jump "
        detail += "of the text or in a prompt: the trainer makes its own labels after the collator"
    return [Check(name="labels", passed=num_open == 0, detail=detail)]


def _distance(row: dict[str, Any]) -> float:
    """From the middle of a batch of one to its nearest skip; infinite if nothing skips."""
    if row.get("position_ids") is None:
        return np.inf
    positions = row["position_ids"][0]
    cuts = torch.nonzero(positions.diff() != 1).flatten() + 1
    return float((cuts - len(positions) / 2).abs().min()) if len(cuts) else np.inf


def _watch_first_step(model: Any) -> None:
    """Fail in the first training step if positions or mask do not reach the model."""

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training:
            return  # an evaluation came first
        handle.remove()
        lost = [k for k in ("position_ids", "attention_mask") if kwargs.get(k) is None]
        if lost:
            raise SkipwiseError(
                f"{' and '.join(lost)} of the batch did not reach the model: the trainer removed "
                f"{'them' if len(lost) > 1 else 'it'}, and PoSE would have no effect\n"
                "turn off its packing and flattening; if that does not help, read its compute_loss"
            )

    handle = model.register_forward_pre_hook(look, with_kwargs=True)


@contextmanager
def _without_reentry(model: Any) -> Iterator[None]:
    """Non-reentrant gradient checkpointing, for gradients with respect to the embeddings.

    Reentrant checkpointing (the default of Axolotl and of peft's QLoRA) does not allow these; masks
    and positions are the same in both.
    """
    name = "_gradient_checkpointing_func"
    changed = []
    for module in model.modules():
        function = vars(module).get(name)
        # reentrant is torch's default
        if isinstance(function, partial) and function.keywords.get("use_reentrant", True):
            keywords = {**function.keywords, "use_reentrant": False}
            setattr(module, name, partial(function.func, *function.args, **keywords))
            changed.append((module, function))
    try:
        yield
    finally:
        for module, function in changed:
            setattr(module, name, function)


def _autocast(args: Any) -> Any:
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    return torch.autocast(args.device.type, dtype or torch.float32, enabled=dtype is not None)
