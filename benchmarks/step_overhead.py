"""What a PoSE step costs beside a plain Trainer step of the same model and length.

python benchmarks/step_overhead.py [--rounds 30]
python benchmarks/step_overhead.py --width 2048 --length 8192 --batch 1     (for a GPU)

Five trainers, each set up as `skipwise train` does it, take one step each in every round, in
rotating order, so that noise of the machine meets all of them:

  plain          transformers.Trainer on windows of the same length with default positions
  pose           PoSE as published: no key weights, no distillation
  pose_weighted  the defaults without distillation: key weights (flex_attention, on a CPU a mask)
  default        everything that runs by default: key weights and distillation
  taught_quarter the same with one example in four distilled

A step is one micro-batch: forward, backward, gradient clipping, update. The result has the median
of the ratios to the plain step of the same round, and their quartiles. Bars: pose and pose_weighted
at most 1.01, default 1.15 (not met). The bundled model is used, or with --width a random Llama.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import BENCHMARKS, SMOKE, make_parser, write_result
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer

from skipwise.config.parse import parse_recipe
from skipwise.config.run_folder import RunFolder
from skipwise.errors import require
from skipwise.models.load import load_model
from skipwise.models.prepared import prepare_model
from skipwise.pipeline.quickstart import MODEL
from skipwise.training.inputs import dummy_data
from skipwise.training.setup import enable_checkpointing, set_up

PUBLISHED = {"content": "uniform", "key_weights": "none"}
CASES = {
    "pose": {"positions": PUBLISHED, "distillation": {"weight": 0}},
    "pose_weighted": {"distillation": {"weight": 0}},
    "default": {},
    "taught_quarter": {"distillation": {"every": 4}},
}
WINDOW = 256  # tokens, of the bundled model
WARM_UP = 5  # rounds that do not count


class PlainWindows(torch.utils.data.Dataset):
    """Windows of random tokens, as a stock causal-LM data set gives them."""

    def __init__(self, vocab_size, length, count):
        self.ids = torch.randint(3, vocab_size, (count, length), generator=torch.manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, k):
        ids = self.ids[k]
        return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def save_random_llama(folder, width, layers, length):
    """Random weights of a width, 32,000 tokens of vocabulary, heads of 128 in groups of four."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=max(1, width // 512),
        max_position_embeddings=length,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)


def make_pose_trainer(recipe, folder, count):
    """The trainer of a run, with its preflight passed, on random tokens."""
    prepared = prepare_model(recipe)
    data = dummy_data(prepared)
    data.dataset.num_examples = count
    folder.mkdir()
    training = set_up(prepared, data, RunFolder(folder))
    require(training.checks)
    return training.trainer


def make_plain_trainer(recipe, arguments, count):
    """transformers.Trainer with the same model, arguments and length."""
    prepared = prepare_model(recipe)
    model = load_model(
        prepared.source,
        prepared.config,
        prepared.load,
        dtype=torch.float32,
        attn_implementation="sdpa",
    )
    model.config.use_cache = False
    if recipe.training.gradient_checkpointing:
        enable_checkpointing(model)
    windows = PlainWindows(prepared.info.vocab_size, recipe.train_length, count)
    return Trainer(model=model, args=arguments, train_dataset=windows)


def stepper(trainer):
    """A function that makes one step and returns its seconds."""
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


def measure(tree, rounds, folder):
    """Seconds of each round's step by case, and the attention that each case trains with."""
    count = (rounds + WARM_UP) * tree["training"]["micro_batch_size"]
    trainers = {}
    for name, changes in CASES.items():
        recipe = parse_recipe({**tree, **changes})
        trainers[name] = make_pose_trainer(recipe, folder / name, count)
    trainers["plain"] = make_plain_trainer(recipe, trainers["pose"].args, count)
    attention = {name: t.model.config._attn_implementation for name, t in trainers.items()}
    steppers = {name: stepper(trainer) for name, trainer in trainers.items()}
    names, times = list(steppers), {name: [] for name in steppers}
    for i in range(rounds + WARM_UP):
        for name in np.roll(names, -i):
            times[name].append(steppers[name]())
    return {name: np.array(values[WARM_UP:]) for name, values in times.items()}, attention


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--length", type=int, default=WINDOW, help="L, tokens of an example")
    parser.add_argument("--factor", type=int, default=8, help="target over the model's window")
    parser.add_argument("--batch", type=int, default=16, help="examples of a step")
    parser.add_argument("--width", type=int, help="of a random Llama")
    parser.add_argument("--layers", type=int, default=4, help="of the random Llama")
    args = parser.parse_args()
    if args.smoke:
        args.rounds, args.length, args.batch = 2, 32, 2
    with tempfile.TemporaryDirectory() as scratch:
        model = MODEL
        if args.width:
            model = Path(scratch, "model")
            save_random_llama(model, args.width, args.layers, args.length)
        tree = {
            "model": str(model),
            "train_length": args.length,
            "target_length": args.factor * (args.length if args.width else WINDOW),
            "rope": {"type": "yarn"},
            "training": {
                "micro_batch_size": args.batch,
                "global_batch_size": args.batch,
                "gradient_checkpointing": bool(args.width),
            },
            "trainer": {"report_to": "none"},
        }
        times, attention = measure(tree, args.rounds, Path(scratch))
    shape = {key: getattr(args, key) for key in ("length", "factor", "batch", "width", "layers")}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    figures = {"pairs": args.rounds, "gpu": gpu, **shape, "attention": attention}
    figures |= {f"milliseconds_{name}": 1e3 * float(np.median(t)) for name, t in times.items()}
    for name in CASES:
        ratios = times[name] / times["plain"]
        figures[f"ratio_{name}"] = float(np.median(ratios))
        figures[f"quartiles_{name}"] = np.quantile(ratios, [0.25, 0.75]).tolist()
    print(write_result("step_overhead", figures, folder=SMOKE if args.smoke else BENCHMARKS))


if __name__ == "__main__":
    main()
