"""What PoSE saves: memory and time of a training step beside full-length fine-tuning, on one GPU.

PYTHONPATH=src python research/gpu/method_cost.py [--minutes 5] [--layers 32] [--smoke]

Mistral-7B's shape with random weights, 8k extended to 16k, 32k and 128k. PoSE trains at 8k whatever
the target; `full` trains T tokens. Two modes: all weights (float32 under bf16 autocast, as
transformers.Trainer keeps them) and LoRA of rank 16 on a bf16 base, which trains norms and
embedding as well. Both with gradient checkpointing, the loss in slices, fused AdamW, one example a
pass. What is written for each case:

  seconds        of an example (forward and backward) and of an update, medians after a warm-up;
                 a step of any batch is so many examples and one update
  peaks          what the allocator handed out in forward, backward and update, GiB: in steps of
                 one example, and of two, where gradients stand while the second one is computed
  predicted      what `skipwise plan` says of the same, and its ratio to the measured (bar: within
                 15 %); predicted_total_gib, which holds the runtime, stands beside device_used_gib

`hours_same_tokens` is 1,000 steps of 64 x 8k tokens; `hours_same_examples` 1,000 steps of 64
examples. One model serves all cases of a mode; peaks are counted from zero for each.
"""

import gc
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, MistralConfig

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from common import RESEARCH, SMOKE, make_parser, write_result

from skipwise.config.parse import parse_recipe
from skipwise.config.recipe import LoRASettings, Recipe
from skipwise.config.samplers import make_sampler
from skipwise.data.collator import ExampleCollator
from skipwise.data.corpus import build_corpus
from skipwise.data.dataset import PoSEDataset
from skipwise.data.token_cache import TokenStore
from skipwise.models.hf_config import model_info_of
from skipwise.models.lora import add_lora, num_parameters
from skipwise.models.scaled_config import scaled_config, scaling_for
from skipwise.planning.flops import step_flops
from skipwise.planning.gpus import find_gpu
from skipwise.planning.job import make_job, read_model
from skipwise.planning.memory import GIB, GPU_FRAGMENTATION, GPU_RUNTIME, predict_memory
from skipwise.training.chunked_loss import chunk_loss
from skipwise.training.setup import enable_checkpointing

MISTRAL_7B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,  # L
    "sliding_window": None,
}
TINY = {
    **MISTRAL_7B,
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 64,
}
# (method, T / L), by what is worth knowing first
CASES = [("pose", 4), ("full", 2), ("full", 4), ("pose", 2), ("pose", 16)]
STEPS, BATCH = 1000, 64  # the paper's run
# where the plan's phases happen
PHASES = {
    "forward": ("forward",),
    "backward": ("loss", "backward", "end of backward"),
    "update": ("update",),
}


@dataclass
class Meter:
    """Seconds and peak memory of each phase of a step."""

    device: torch.device
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    peaks: dict[str, int] = field(default_factory=dict)  # bytes

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
            self.peaks[name] = max(peak, self.peaks.get(name, 0))
        self.seconds[name].append(time.perf_counter() - started)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=5, help="no case begins after these")
    parser.add_argument("--case-seconds", type=float, default=30, help="no step begins after these")
    parser.add_argument("--steps", type=int, default=2, help="of two examples, in each case")
    parser.add_argument("--layers", type=int, help="fewer than 32, for a smaller card")
    parser.add_argument("--modes", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    args = parser.parse_args()
    ends = time.monotonic() + 60 * args.minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = dict(TINY if args.smoke else MISTRAL_7B)
    if args.layers:
        shape["num_hidden_layers"] = args.layers
    config = MistralConfig(**shape)
    figures: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "default"),
        "shape": shape,
        "rows": [],
    }
    results = SMOKE if args.smoke else RESEARCH
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)  # for the plan, which reads a config alone
        for mode in args.modes:
            for row in measure_mode(mode, config, folder, device, ends, args):
                print(json.dumps(row), flush=True)
                figures["rows"].append(row)
                figures["summary"] = summary(figures["rows"])
                write_result("method_cost", figures, folder=results, show=False)
    print(json.dumps(figures["summary"], indent=1))


def measure_mode(
    mode: str, config: Any, folder: str, device: torch.device, ends: float, args: Any
) -> Iterator[dict[str, Any]]:
    """A row for each case of a mode, all on one model."""
    if mode == "lora" and importlib.util.find_spec("peft") is None:
        yield {"mode": mode, "failed": "not measured: peft is not installed"}
        return
    L = config.max_position_embeddings
    started = time.monotonic()
    longest = recipe_of(folder, mode, "pose", max(f for _, f in CASES) * L, 1)
    try:
        model = make_model(mode, config, longest, device)
    except Exception as error:  # of peft or memory: what was measured before is kept
        yield {"mode": mode, "failed": f"not measured: {type(error).__name__}: {error}"}
        return
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=2e-5, weight_decay=0.0, fused=True
    )
    print(f"{mode}: {num_parameters(model):,} parameters, {time.monotonic() - started:.0f} s")
    for method, factor in CASES[:2] if args.smoke else CASES:
        row: dict[str, Any] = {"mode": mode, "method": method, "target_length": factor * L}
        if time.monotonic() > ends:
            yield {**row, "failed": "not measured: out of time"}
            continue
        predicted = [predict(recipe_of(folder, mode, method, factor * L, n)) for n in (1, 2)]
        recipe = recipe_of(folder, mode, method, factor * L, 1)
        try:
            row |= measure(model, optimizer, recipe, L, predicted, device, args)
        except torch.OutOfMemoryError:
            row |= {"failed": "out of memory", "memory": predicted}
        except Exception as error:
            row |= {"failed": f"{type(error).__name__}: {error}"}
        optimizer.zero_grad(set_to_none=True)
        give_back(device)
        yield row
    del model, optimizer
    give_back(device)


def measure(
    model: Any,
    optimizer: Any,
    recipe: Recipe,
    original_length: int,
    predicted: list[dict[str, Any]],
    device: torch.device,
    args: Any,
) -> dict[str, Any]:
    """One case: a warm-up step, a step of one example, steps of two."""
    sampler = make_sampler(recipe, original_length)
    examples = make_examples(sampler, model.config.vocab_size)
    begun = time.monotonic()
    step(model, optimizer, examples, 1, Meter(device))
    one, two = Meter(device), Meter(device)
    step(model, optimizer, examples, 1, one)
    failed = ""
    try:
        for done in range(args.steps):
            if done and time.monotonic() - begun > args.case_seconds:
                break
            step(model, optimizer, examples, 2, two)
    except torch.OutOfMemoryError:  # one example may fit where gradients beside it do not
        failed = "out of memory"
    forward, backward, update = (one.seconds[name] + two.seconds[name] for name in PHASES)
    passes = [sum(both) for both in zip(forward, backward, strict=False)]
    example, of_update = statistics.median(passes), statistics.median(update)
    length = sampler.train_length
    flops_per_second = predicted[0]["flops"] / example
    in_time = {
        "same_tokens": BATCH * original_length / length * example + of_update,
        "same_examples": BATCH * example + of_update,
    }
    row = {
        "train_length": length,
        "seconds_per_example": round(example, 4),
        "forward_seconds": round(statistics.median(forward), 4),
        "update_seconds": round(of_update, 4),
        "passes": [round(x, 4) for x in passes],
        "tokens_per_second": round(length / example),
        **{f"seconds_per_step_{key}": round(x, 2) for key, x in in_time.items()},
        **{f"hours_{key}": round(STEPS * x / 3600, 2) for key, x in in_time.items()},
        "tflops": round(flops_per_second / 1e12, 1),
    }
    if device.type != "cuda":
        return row | {"memory": predicted}
    free, total = torch.cuda.mem_get_info()
    row["utilisation_of_h100"] = round(flops_per_second / 1e12 / find_gpu("H100").tflops, 3)
    row["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
    row["allocation_retries"] = torch.cuda.memory_stats().get("num_alloc_retries", 0)
    row["device_used_gib"] = round((total - free) / GIB, 2)
    row["memory"] = [
        beside(one.peaks, predicted[0]),
        {"failed": failed, **predicted[1]} if failed else beside(two.peaks, predicted[1]),
    ]
    return row


def make_examples(sampler: Any, vocab_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of one example, cut from random tokens by the library's data set."""
    T = sampler.target_length
    tokens = np.random.default_rng(0).integers(3, vocab_size, 2 * T, np.uint16)
    store = TokenStore(tokens=tokens, offsets=np.array([0, len(tokens)]))
    corpus = build_corpus([store], [None], min_length=1, target_length=T)
    dataset = PoSEDataset(corpus, sampler, seed=0, num_examples=1 << 20)
    collate = ExampleCollator()
    return (collate([dataset[k]]) for k in range(len(dataset)))


def step(model: Any, optimizer: Any, examples: Any, number: int, meter: Meter) -> None:
    """One update from so many examples, as the Trainer does it."""
    kind = meter.device.type
    bf16 = torch.autocast(kind, torch.bfloat16, kind == "cuda", cache_enabled=False)
    for _ in range(number):
        batch = {key: value.to(meter.device) for key, value in next(examples).items()}
        with meter.phase("forward"), bf16:
            loss = model(**batch, use_cache=False).loss / number
        with meter.phase("backward"):
            loss.backward()
        assert torch.isfinite(loss), "the loss is not finite"
    with meter.phase("update"):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def make_model(mode: str, config: Any, recipe: Recipe, device: torch.device) -> Any:
    """Random weights made on the device, set up as train.py does."""
    facts = model_info_of(config, None)
    scaling = scaling_for(recipe, facts)
    scaled = scaled_config(config, facts, scaling, recipe.target_length)
    frozen = mode == "lora" and device.type == "cuda"  # a CPU computes in float32
    dtype = torch.bfloat16 if frozen else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(
            scaled, dtype=dtype, attn_implementation="sdpa"
        )
    model.config.use_cache = False
    chunk_loss(model)
    if mode == "lora":
        model = add_lora(model, LoRASettings())
        model.enable_input_require_grads()
    enable_checkpointing(model)
    return model.to(device).train()


def recipe_of(folder: str, mode: str, method: str, target_length: int, batch: int) -> Recipe:
    """The case as a recipe of so many examples a step."""
    tree: dict[str, Any] = {
        "model": folder,
        "target_length": target_length,
        "method": method,
        "training": {"global_batch_size": batch, "loss": "chunked"},
        "distillation": {"weight": 0},
        "load": {"dtype": "bfloat16"},
    }
    return parse_recipe(tree | ({"lora": {}} if mode == "lora" else {}))


def predict(recipe: Recipe) -> dict[str, Any]:
    """The plan's memory, in total and as allocated in each phase (GiB), and a step's operations."""
    facts, architecture = read_model(recipe)
    job = make_job(recipe, facts, architecture)
    memory = predict_memory(job)

    def handed_out(names: tuple[str, ...]) -> float:
        most = max(memory.phases[name] for name in names)
        return round((most - GPU_RUNTIME) / (1 + GPU_FRAGMENTATION) / GIB, 2)

    return {
        "examples": job.accumulation,
        "total_gib": round(memory.gib, 2),
        "phase": memory.phase,
        "parts_gib": {kind: round(size / GIB, 2) for kind, size in memory.parts.items()},
        "handed_out_gib": {phase: handed_out(names) for phase, names in PHASES.items()},
        "flops": step_flops(job),
    }


def beside(peaks: dict[str, float], said: dict[str, Any]) -> dict[str, Any]:
    """Measured and predicted peaks in GiB, phase by phase, and the largest of each."""
    measured = {phase: round(peaks[phase] / GIB, 2) for phase in PHASES}
    expected = said["handed_out_gib"]
    return {
        "examples": said["examples"],
        "peak_gib": max(measured.values()),
        "measured_gib": measured,
        "predicted_gib": expected,
        "predicted_phase": said["phase"],
        "predicted_parts_gib": said["parts_gib"],
        "predicted_total_gib": said["total_gib"],
        "ratio": round(max(expected.values()) / max(*measured.values(), 0.01), 3),
        "ratios": {
            phase: round(expected[phase] / max(measured[phase], 0.01), 3) for phase in PHASES
        },
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """PoSE over full-length by mode and target; the plan's ratios; what failed."""
    good = {(r["mode"], r["method"], r["target_length"]): r for r in rows if "failed" not in r}
    pairs = []
    for (mode, method, target), full in good.items():
        pose = good.get((mode, "pose", target))
        if method != "full" or pose is None:
            continue
        pair = {"mode": mode, "target_length": target}
        for key in ("same_tokens", "same_examples"):
            name = f"seconds_per_step_{key}"
            pair[f"time_{key}"] = round(pose[name] / full[name], 3)
        peaks = [[m.get("peak_gib") for m in row["memory"]] for row in (pose, full)]
        pair["peaks_gib"] = {"pose": peaks[0], "full": peaks[1]}  # of one example, of two
        pairs.append(pair)
    ratios = [m["ratio"] for row in good.values() for m in row["memory"] if "ratio" in m]
    return {
        "pose_over_full": pairs,
        "plan_ratios": [min(ratios), max(ratios)] if ratios else None,
        "failed": [
            " ".join(str(row.get(key, "")) for key in ("mode", "method", "target_length", "failed"))
            for row in rows
            if "failed" in row
        ],
    }


def give_back(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
