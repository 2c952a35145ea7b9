"""What training writes into the run folder, and how a signal stops it.

`RunCallback` writes metrics and progress, marks complete checkpoints and stops at a loss that is
not finite. `StopCallback` saves and stops after the step in which Ctrl-C or SIGTERM arrived.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments

from skipwise.config.machine import process_memory, world_size
from skipwise.config.recipe import Recipe
from skipwise.config.run_folder import RunFolder, write_text
from skipwise.config.stages import is_full_length_stage
from skipwise.errors import SkipwiseError
from skipwise.models.compatibility import make_portable
from skipwise.training.checkpoints import keep_candidate, mark_complete, resume_point
from skipwise.training.chunked_loss import Distillation


@dataclass(frozen=True, kw_only=True)
class StageOffset:
    """What a run has trained before this part of it: its metrics go on from there."""

    num_steps: int = 0
    num_tokens: int = 0
    checkpoint: Path | None = None  # whose weights this part begins with; None: the base's


class RunCallback(TrainerCallback):
    """The run folder's side of training: metrics, progress, whole checkpoints, finite loss."""

    def __init__(
        self,
        run: RunFolder,
        recipe: Recipe,
        train_length: int,
        engine: str,
        config: Any,
        before: StageOffset | None = None,
    ) -> None:
        self.run, self.recipe, self.train_length = run, recipe, train_length
        self.before = before or StageOffset()
        self.phase = "finish" if is_full_length_stage(recipe) else "train"
        self.distillation: Distillation | None = None
        self.engine, self.config = engine, config  # config: of the model inside any wrapper
        self.preflight: Callable[[], None] = lambda: None  # once the model is wrapped
        self.write_down: Callable[[], None] = lambda: None  # before the last checkpoint is whole
        self.bar: tqdm | None = None
        self.started = 0.0
        self.seconds_before = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.preflight()
        if not state.is_world_process_zero:
            return
        done = self.before.num_steps + state.global_step
        kept = [m for m in read_metrics(self.run) if m["step"] <= done]
        self.seconds_before = kept[-1]["seconds"] if kept else 0.0
        write_text(self.run.metrics_file, "".join(json.dumps(m) + "\n" for m in kept))
        self.started = time.monotonic()
        self.bar = tqdm(
            total=args.max_steps,
            initial=state.global_step,
            desc=self.phase,
            unit=" steps",
            disable=None,
        )

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        loss = logs["loss"]
        if not math.isfinite(loss) or not math.isfinite(logs.get("grad_norm", 0.0)):
            what = "loss" if not math.isfinite(loss) else "gradient"
            raise SkipwiseError(
                f"the {what} is not finite at step {state.global_step}; the newest checkpoint is "
                f"{resume_point(self.run)}\n"
                f"try {'finish' if self.phase == 'finish' else 'training'}.learning_rate="
                f"{args.learning_rate / 4:g}, "
                "more training.warmup_steps, or load.dtype=float32, with another --out"
            )
        taught = self._divergence(args)
        if not state.is_world_process_zero:
            return
        tokens = state.global_step * examples_per_step(args) * self.train_length
        metrics = {
            "step": self.before.num_steps + state.global_step,
            "loss": loss,
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "num_tokens": self.before.num_tokens + tokens,
            "seconds": round(self.seconds_before + time.monotonic() - self.started, 3),
            **({"phase": self.phase} if self.phase == "finish" else {}),
            **taught,
        }
        with self.run.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

    def _divergence(self, args: Any) -> dict[str, float]:
        """The mean of KL(base || model) over the step's taught tokens, of all processes."""
        if self.distillation is None:
            return {}
        sums = torch.tensor(self.distillation.take_divergence(), device=args.device)
        if world_size() > 1:
            torch.distributed.all_reduce(sums)
        apart, count = sums.tolist()
        return {"distillation": apart / count}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
        if state.global_step >= args.max_steps:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if world_size() > 1:
            torch.distributed.barrier()  # every process has written its part
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if not (folder / "config.json").exists():  # of an adapter: its base's, as scaled
                self.config.save_pretrained(folder)
            make_portable(folder, self.recipe.target_length)
            if self.recipe.export.checkpoint != "last":
                step = self.before.num_steps + state.global_step
                keep_candidate(folder, self.run.candidates / f"step-{step}")
            if state.global_step >= args.max_steps:
                self.write_down()  # a kill after the mark would leave the run without it
            mark_complete(folder, state.global_step, self.engine)
        if world_size() > 1:
            torch.distributed.barrier()  # none ends, and has the others killed, before that

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()


class StopCallback(TrainerCallback):
    """Save and leave after the step in which a signal came, to any of the processes."""

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
    """Ctrl-C and SIGTERM save and stop; a second Ctrl-C stops at once."""
    stop = next(cb for cb in trainer.callback_handler.callbacks if isinstance(cb, StopCallback))
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        if stop.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.asked = True
        print("\nstopping after this step, and saving ...", file=sys.stderr, flush=True)

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def tensorboard_in(folder: Path) -> Iterator[None]:
    """TensorBoard's folder, which a Trainer reads from the environment when it is made."""
    name = "TENSORBOARD_LOGGING_DIR"
    given = os.environ.get(name)
    os.environ[name] = given or str(folder)
    try:
        yield
    finally:
        if given is None:
            del os.environ[name]


def read_metrics(run: RunFolder) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line cut off by a kill is left out."""
    if not run.metrics_file.exists():
        return []
    metrics = []
    for line in run.metrics_file.read_text(encoding="utf-8").splitlines():
        try:
            metrics.append(json.loads(line))
        except ValueError:
            continue
    return metrics


def peak_memory_gib() -> float:
    """Peak memory so far: of the accelerator where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return process_memory("VmHWM") / 2**30


def examples_per_step(arguments: TrainingArguments) -> int:
    held = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return held * arguments.world_size
