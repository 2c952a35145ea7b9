"""How well `skipwise plan` predicts peak memory, on a CPU.

python benchmarks/plan_accuracy.py [--only WORD] [--held]

Each case trains three steps in a process of its own, the way `skipwise train` goes (measure.py),
and its peak resident memory is set beside the prediction from the config. The runtime (libraries)
is measured in the same process before the model is there; all else comes from the model of what is
held. Models: the quickstart's (3.4 M parameters) with its own recipe, and a random Llama of 99.5 M
with a vocabulary of 32,000. --held measures once more with every block given back at once
(MALLOC_MMAP_THRESHOLD_), to tell the model's error from the heap's.

Bar: predicted within 15 % of measured in every case.
"""

import os
import tempfile
from pathlib import Path

import yaml
from common import BENCHMARKS, SMOKE, make_parser, write_result

from skipwise.config.parse import dump_recipe, parse_recipe
from skipwise.config.recipe import Recipe
from skipwise.pipeline.profile import measure
from skipwise.pipeline.quickstart import MODEL, make_recipe
from skipwise.planning.gpus import find_gpu
from skipwise.planning.job import make_job, read_model
from skipwise.planning.memory import GIB, LATE_IMPORTS, predict_memory

QUICKSTART = (
    "",
    "training.micro_batch_size=4",
    "training.gradient_checkpointing=true",
    "positions.key_weights=none",
    "training.loss=chunked",
    "lora={}",
    "lora={} training.gradient_checkpointing=true",
    "load.dtype=float32",
    "distillation.weight=3",
)
FULL = (
    "train_length=1024",
    "train_length=1024 training.gradient_checkpointing=false",
    "train_length=1024 positions.key_weights=importance",
    "train_length=1024 positions.key_weights=importance training.gradient_checkpointing=false",
    "train_length=1024 training.global_batch_size=2",
    "train_length=1024 distillation.weight=3",
    "train_length=1024 load.dtype=float32",
    "train_length=1024 trainer.optim=adafactor",
    "train_length=1024 load.attn_implementation=eager training.gradient_checkpointing=false",
    "train_length=2048",
    "train_length=2048 training.loss=full",
    "train_length=2048 training.gradient_checkpointing=false",
    "train_length=2048 positions.key_weights=importance training.loss=full",
)
LORA = (
    "train_length=1024",
    "train_length=1024 training.gradient_checkpointing=false",
    "train_length=1024 lora.train_embeddings=false",
    "train_length=2048",
    "train_length=2048 training.loss=full",
    "train_length=2048 positions.key_weights=importance training.gradient_checkpointing=false",
)
LLAMA = {
    "model_type": "llama",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL = {
    "model": str(MODEL),
    "target_length": 512,
    "training": {"global_batch_size": 1},
    "distillation": {"weight": 0},
    "trainer": {"report_to": "none"},
}


def save_llama(folder: Path) -> None:
    """99.5 M random weights, in bf16 as such models are published."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)


def compare(name: str, recipe: Recipe, settings: str, held: bool) -> dict:
    """One case: measured and predicted bytes."""
    facts, architecture = read_model(recipe)
    job = make_job(recipe, facts, architecture, gpu=find_gpu("cpu"))
    taken = measure(recipe)
    predicted = predict_memory(job, runtime=taken.runtime_bytes + LATE_IMPORTS)
    row = {
        "model": name,
        "settings": settings,
        "measured_gib": round(taken.peak_bytes / GIB, 3),
        "predicted_gib": round(predicted.total / GIB, 3),
        "ratio": round(predicted.total / taken.peak_bytes, 3),
        "phase": predicted.phase,
        "seconds_per_step": round(taken.seconds_per_step, 2),
    }
    if held:
        alone = _with_nothing_kept(recipe)
        without = predicted.total - predicted.parts.get("kept by malloc", 0.0)
        row["held_measured_gib"] = round(alone / GIB, 3)
        row["held_predicted_gib"] = round(without / GIB, 3)
        row["held_ratio"] = round(without / alone, 3)
    print(row, flush=True)
    return row


def _with_nothing_kept(recipe: Recipe) -> int:
    """Peak where malloc gives every block back at once; slower."""
    threshold = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    os.environ.update(threshold)
    try:
        return measure(recipe).peak_bytes
    finally:
        for key in threshold:
            del os.environ[key]


def quickstart_tree() -> dict:
    """The quickstart's recipe without distillation, which one of the cases adds."""
    return yaml.safe_load(dump_recipe(make_recipe(["distillation.weight=0"])))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--only", default="", help="cases whose name or settings hold this word")
    parser.add_argument("--held", action="store_true", help="measure without malloc's heap as well")
    given = parser.parse_args()
    base = {} if given.smoke else quickstart_tree()
    with tempfile.TemporaryDirectory() as folder:
        llama = {
            "model": folder,
            "target_length": 16384,
            "training": {"global_batch_size": 1},
            "distillation": {"weight": 0},
            "trainer": {"report_to": "none"},
        }
        cases = [("quickstart", base, s) for s in QUICKSTART]
        cases += [("llama-100m", llama, s) for s in FULL]
        cases += [("llama-100m", llama, f"lora={{}} {s}") for s in LORA]
        if given.smoke:
            cases = [("quickstart", SMALL, "training.loss=chunked")]
        else:
            save_llama(Path(folder))
        rows = [
            compare(name, parse_recipe(tree, settings.split()), settings, given.held)
            for name, tree, settings in cases
            if given.only in f"{name} {settings}"
        ]
    ratios = [row["ratio"] for row in rows]
    held = [row["held_ratio"] for row in rows if "held_ratio" in row]
    figures = {
        "within_15_percent": sum(0.85 <= ratio <= 1.15 for ratio in ratios),
        "cases": len(rows),
        "lowest": min(ratios),
        "highest": max(ratios),
        **({"held_lowest": min(held), "held_highest": max(held)} if held else {}),
        "rows": rows,
    }
    write_result("plan_accuracy", figures, folder=SMOKE if given.smoke else BENCHMARKS)


if __name__ == "__main__":
    main()
