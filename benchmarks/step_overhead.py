"""What a PoSE step costs beside a plain Trainer step of the same model and length.

python benchmarks/step_overhead.py [--pairs 30]

Two Trainers on the quickstart's model, one fed by Skipwise, one by plain windows of the same text
with default positions; their steps alternate, so that noise of the machine meets both. Bar: the
median ratio of a pair is at most 1.01. The ratio with importance weights is given as well.
"""

import argparse
import dataclasses
import statistics
import time

import torch
from common import write_result
from transformers import Trainer, TrainingArguments

from skipwise.models.load import compute_dtype, load_model
from skipwise.models.prepared import prepare_model
from skipwise.pipeline.quickstart import make_recipe
from skipwise.training.inputs import load_training_data
from skipwise.training.trainer import PoSETrainer


class PlainWindows(torch.utils.data.Dataset):
    """The same documents' first windows, as a stock causal-LM data set would give them."""

    def __init__(self, dataset, length):
        self.dataset, self.length = dataset, length

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, k):
        ids = torch.from_numpy(self.dataset.document(k)[: self.length].astype("int64"))
        return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def make_trainer(cls, prepared, dataset, collator, steps):
    recipe = prepared.recipe
    dtype = compute_dtype(recipe.load)
    torch.manual_seed(0)
    model = load_model(
        recipe.model, prepared.scaled, recipe.load, dtype=torch.float32, attn_implementation="sdpa"
    )
    arguments = TrainingArguments(
        output_dir="/tmp/step_overhead",
        max_steps=steps,
        per_device_train_batch_size=recipe.training.micro_batch_size,
        bf16=dtype == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=10**6,
        dataloader_pin_memory=False,
    )
    collate = {"data_collator": collator} if collator else {}
    return cls(model=model, args=arguments, train_dataset=dataset, **collate)


def stepper(trainer):
    """One call, one whole step: next batch, forward, backward, clip, update."""
    trainer.create_optimizer_and_scheduler(10**6)
    model, optimizer, loader = trainer.accelerator.prepare(
        trainer.model, trainer.optimizer, trainer.get_train_dataloader()
    )
    trainer.model_wrapped = model
    trainer.current_gradient_accumulation_steps = 1  # the Trainer's loop sets it
    batches = iter(loader)

    def step():
        start = time.perf_counter()
        trainer.training_step(model, next(batches))
        trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30)
    pairs = parser.parse_args().pairs
    recipe = make_recipe()
    weighted = prepare_model(recipe)
    plain_positions = dataclasses.replace(recipe.positions, weights="none")
    prepared = prepare_model(dataclasses.replace(recipe, positions=plain_positions))
    steps = pairs + 5
    steppers = {}
    for name, its_plan in (("pose", prepared), ("pose_weighted", weighted)):
        data = load_training_data(its_plan, None)
        steppers[name] = stepper(
            make_trainer(PoSETrainer, its_plan, data.dataset, data.collator, steps)
        )
    windows = PlainWindows(data.dataset, data.sampler.train_length)
    steppers["plain"] = stepper(make_trainer(Trainer, prepared, windows, None, steps))
    times = {name: [] for name in steppers}
    names = list(steppers)
    for i in range(steps):
        for name in names[i % 3 :] + names[: i % 3]:  # the order moves round
            times[name].append(steppers[name]())
    kept = {name: values[5:] for name, values in times.items()}
    figures = {f"milliseconds_{n}": 1e3 * statistics.median(v) for n, v in kept.items()}
    for name in ("pose", "pose_weighted"):
        ratios = [a / b for a, b in zip(kept[name], kept["plain"], strict=True)]
        figures[f"ratio_{name}"] = statistics.median(ratios)
    print(write_result("step_overhead", {"pairs": pairs, **figures}))


if __name__ == "__main__":
    main()
