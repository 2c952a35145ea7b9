"""Trainer callbacks: metrics and checkpoints in the run folder, and stopping on a signal.

`RunCallback` writes metrics and progress, marks complete checkpoints, and raises if the loss is not
finite. `StopCallback` saves and stops after the step in which Ctrl-C, SIGTERM or SIGHUP arrived.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from skipwise.config.machine import on_signals, process_memory, world_size
from skipwise.config.progress import Progress
from skipwise.config.recipe import Recipe
from skipwise.config.run_folder import RunFolder, write_text
from skipwise.config.stages import is_full_length_stage
from skipwise.errors import SkipwiseError, is_number
from skipwise.models.compatibility import make_portable
from skipwise.training.checkpoints import (
    decisions,
    keep_candidate,
    mark_complete,
    remove_old,
    resume_point,
)
from skipwise.training.chunked_loss import Distillation


@dataclass(frozen=True, kw_only=True)
class StageOffset:
    """Steps and tokens of earlier stages; metrics continue from these counts."""

    num_steps: int = 0
    num_tokens: int = 0
    checkpoint: Path | None = None  # initial weights of this stage; None: the base model's


class RunCallback(TrainerCallback):
    """Writes metrics and progress, marks complete checkpoints, checks that the loss is finite."""

    def __init__(
        self,
        run: RunFolder,
        recipe: Recipe,
        train_length: int,
        engine: str,
        config: Any,
        offset: StageOffset | None = None,
    ) -> None:
        self.run, self.recipe, self.train_length = run, recipe, train_length
        self.offset = offset or StageOffset()
        self.phase = "finish" if is_full_length_stage(recipe) else "train"
        self.distillation: Distillation | None = None
        self.engine, self.config = engine, config  # config of the model, without wrappers
        self.preflight: Callable[[], None] = lambda: None  # runs once the model is wrapped
        self.write_down: Callable[[], None] = lambda: None  # before the last checkpoint is marked
        self.bar: Progress | None = None
        self.loss = math.nan
        self.started = 0.0
        self.seconds_before = 0.0
        self.decided: dict[str, Any] = {}  # see `checkpoints.decisions`

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.preflight()
        if not state.is_world_process_zero:
            return
        self.decided = decisions(self.run)
        done = self.offset.num_steps + state.global_step
        kept = [m for m in read_metrics(self.run) if m["step"] <= done]
        self.seconds_before = kept[-1]["seconds"] if kept else 0.0
        write_text(self.run.metrics_file, "".join(json.dumps(m) + "\n" for m in kept))
        self.started = time.monotonic()
        label = "train at full length" if self.phase == "finish" else "train"
        self.bar = Progress(label, args.max_steps, unit=" steps", done=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs.get("logs") or {}
        if "loss" not in logs:
            return
        loss = logs["loss"]
        if not math.isfinite(loss) or not math.isfinite(logs.get("grad_norm", 0.0)):
            what = "loss" if not math.isfinite(loss) else "gradient"
            section = "full_length" if self.phase == "finish" else "training"
            raise SkipwiseError(
                f"the {what} is not finite at step {state.global_step}; the run can resume from "
                f"{resume_point(self.run)}\n"
                f"set {section}.learning_rate={args.learning_rate / 4:g}, more "
                "training.warmup_steps, or load.dtype=float32, with another --out"
            )
        divergence = self._divergence(args)
        if not state.is_world_process_zero:
            return
        tokens = state.global_step * examples_per_step(args) * self.train_length
        metrics = {
            "step": self.offset.num_steps + state.global_step,
            "loss": loss,
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "num_tokens": self.offset.num_tokens + tokens,
            "seconds": round(self.seconds_before + time.monotonic() - self.started, 3),
            **({"phase": self.phase} if self.phase == "finish" else {}),
            **divergence,
        }
        with self.run.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        self.loss = loss

    def _divergence(self, args: Any) -> dict[str, float]:
        """Mean KL(base || model) over the step's distilled tokens, over all processes."""
        if self.distillation is None:
            return {}
        sums = torch.tensor(self.distillation.take_divergence(), device=args.device)
        if world_size() > 1:
            torch.distributed.all_reduce(sums)
        divergence, count = sums.tolist()
        return {"distillation": divergence / count} if count else {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.advance(state.global_step - self.bar.done, self._describe(args, state))
        if state.global_step >= args.max_steps:
            control.should_save = True

    def _describe(self, args: Any, state: Any) -> str:
        """`step 40 of 240, loss 1.234, 16,384 tokens a second`; the loss is of the last log."""
        assert self.bar is not None
        tokens = examples_per_step(args) * self.train_length
        seconds = time.monotonic() - self.started
        rate = (state.global_step - self.bar.first) * tokens / max(seconds, 1e-9)
        loss = f"loss {self.loss:.3f}, " if math.isfinite(self.loss) else ""
        step = f"step {state.global_step:,} of {args.max_steps:,}"
        return f"{step}, {loss}{rate:,.0f} tokens a second"

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if world_size() > 1:
            torch.distributed.barrier()  # every process has written its files
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if not any(folder.glob("*.safetensors")) and self.engine == "one process":
                raise SkipwiseError(f"{folder} holds no weights: it was removed while it was saved")
            if not (folder / "config.json").exists():  # LoRA: the scaled config of the base
                self.config.save_pretrained(folder)
            make_portable(folder, self.recipe.target_length)
            if self.recipe.export.checkpoint != "last":
                step = self.offset.num_steps + state.global_step
                keep_candidate(folder, self.run.candidates / f"step-{step}")
            if state.global_step >= args.max_steps:
                self.write_down()  # a kill after the mark would lose it
            size = args.per_device_train_batch_size
            mark_complete(
                folder,
                state.global_step,
                self.engine,
                self.recipe,
                micro_batch_size=size,
                decided=self.decided,
            )
            remove_old(self.run, self.recipe.training.save_total_limit)
        if world_size() > 1:
            torch.distributed.barrier()  # a process that ends first has the others killed

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()


class StopCallback(TrainerCallback):
    """Save and stop after the step in which any process received a signal."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        asked = self.asked
        if world_size() > 1:
            flag = torch.tensor(float(asked), device=args.device)
            torch.distributed.all_reduce(flag)
            asked = bool(flag > 0)
        if asked:
            control.should_save = control.should_training_stop = True


@contextmanager
def stop_on_signals(trainer: Trainer) -> Iterator[StopCallback]:
    """Ctrl-C, SIGTERM and SIGHUP save and stop; a second Ctrl-C stops at once."""
    stop = next(cb for cb in trainer.callback_handler.callbacks if isinstance(cb, StopCallback))

    def handle(number: int) -> None:
        if stop.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.asked = True
        with suppress(OSError):
            message = "\nstopping after this step, saving a checkpoint ..."
            print(message, file=sys.stderr, flush=True)

    with on_signals(handle, signal.SIGINT, signal.SIGTERM):
        yield stop


@contextmanager
def tensorboard_in(folder: Path) -> Iterator[None]:
    """Set TensorBoard's folder, which the Trainer's constructor reads from the environment."""
    name = "TENSORBOARD_LOGGING_DIR"
    user_folder = os.environ.get(name)
    os.environ[name] = user_folder or str(folder)
    try:
        yield
    finally:
        if user_folder is None:
            del os.environ[name]


def read_metrics(run: RunFolder) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without those that are none: a kill cuts off the last."""
    if not run.metrics_file.is_file():
        return []
    metrics = []
    for line in run.metrics_file.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, RecursionError):
            found = json.loads(line)
            found = found if isinstance(found, dict) else {}
            given = all(found.get(key) is not None for key in ("step", "seconds"))
            if given and all(is_number(found.get(key)) for key in ("step", "seconds", "loss")):
                metrics.append(found)
    return metrics


def peak_memory_gib() -> float:
    """Peak memory so far, of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return process_memory("VmHWM") / 2**30


def examples_per_step(arguments: TrainingArguments) -> int:
    per_process = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return per_process * arguments.world_size
