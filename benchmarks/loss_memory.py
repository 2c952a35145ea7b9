"""Peak memory of a training step with logits in slices, beside plain transformers.Trainer.

    python benchmarks/loss_memory.py [--length 8192] [--vocabulary 32000] [--steps 2]

Each runs in a process of its own on the same random Llama (4 layers, width 256, gradient
checkpointing) and the same batch of one example. Peak is the largest resident memory of the second
step over what the process held before it (model, gradients, optimizer), by the kernel's own
count (VmHWM); `first_step_mib` is the same for the first step, which makes the optimizer's states.
"""

import json
import tempfile
import time
from pathlib import Path

import torch
from common import BENCHMARKS, SMOKE, make_parser, run_child, write_result
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from skipwise.training.chunked_loss import chunk_loss
from skipwise.training.trainer import PoSETrainer


def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


class Steps(TrainerCallback):
    """Peak memory and time of each step."""

    def __init__(self):
        self.before, self.started = 0.0, 0.0
        self.seconds, self.peaks = [], []

    def on_step_begin(self, args, state, control, **kwargs):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        self.before = status("VmRSS")
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.started)
        self.peaks.append(round(status("VmHWM") - self.before))


def measure(kind, length, vocabulary, steps):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=length,
    )
    model = LlamaForCausalLM(config)
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, vocabulary, (length,))
    ones = torch.ones_like(ids)
    positions = torch.arange(length)
    item = {"input_ids": ids, "labels": ids, "position_ids": positions, "attention_mask": ones}
    trainer_class = Trainer
    if kind == "slices":
        chunk_loss(model)
        trainer_class = PoSETrainer
    watch = Steps()
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out,
            max_steps=steps,
            per_device_train_batch_size=1,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=1,
            remove_unused_columns=False,
        )
        trainer = trainer_class(model, arguments, train_dataset=[item] * steps, callbacks=[watch])
        if kind == "slices":
            trainer.base_config = config
        trainer.train()
    loss = trainer.state.log_history[0]["loss"]
    return {
        "peak_mib": watch.peaks[-1],
        "first_step_mib": watch.peaks[0],
        "seconds": round(watch.seconds[-1], 2),
        "loss": loss,
    }


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", choices=["plain", "slices"])
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(given.only, given.length, given.vocabulary, given.steps)))
        return
    if given.smoke:
        given.length, given.vocabulary = 64, 256
    figures = {"length": given.length, "vocabulary": given.vocabulary}
    sizes = ("--length", given.length, "--vocabulary", given.vocabulary, "--steps", given.steps)
    for kind in ("plain", "slices"):
        figures[kind] = run_child(*sizes, "--only", kind)
    figures["ratio_of_peaks"] = round(
        figures["slices"]["peak_mib"] / max(1, figures["plain"]["peak_mib"]), 3
    )
    figures["ratio_of_seconds"] = round(
        figures["slices"]["seconds"] / figures["plain"]["seconds"], 3
    )
    write_result("loss_memory", figures, folder=SMOKE if given.smoke else BENCHMARKS)


if __name__ == "__main__":
    main()
