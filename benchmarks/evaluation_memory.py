"""Peak memory of an evaluation at a long context, against its key-value cache.

python benchmarks/evaluation_memory.py [--length 32k]

Each task runs in a process of its own: resident memory with the model loaded and warm at 256
tokens, then the peak at the full length. Their difference over the size of the keys and values of
one context in float32.

Bar: below 1.15 at 32,768 tokens.
"""

import json
import resource
from pathlib import Path

import numpy as np
from common import BENCHMARKS, SMOKE, make_parser, run_child, write_result

TASKS = ("perplexity", "passkey", "needle", "niah_single_numbers")


def run(task: str, length: int) -> dict:
    """One task at one length, a trial each: memory before, peak, cache."""
    from skipwise.config.recipe import EvalSettings
    from skipwise.evaluation.evaluator import EvalModel, Texts, evaluate_model
    from skipwise.models.prepared import load_scaled
    from skipwise.pipeline.quickstart import MODEL

    model, tokenizer, _ = load_scaled(str(MODEL), length, rope_type="yarn")
    rng = np.random.default_rng(0)
    texts = Texts(documents=[rng.integers(3, 1000, length + 4096).astype(np.uint16)])
    settings = EvalSettings(
        tasks=(task,),
        passkey_samples=2,
        needle_samples=2,
        num_depths=2,
        ruler_samples=1,
        perplexity_windows=1,
        perplexity_stride=128,
    )
    eval_model = EvalModel(label="it", load=lambda: model, tokenizer=tokenizer)
    evaluate_model(eval_model, texts, [512], settings, progress=False)
    before = resident()
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rows = evaluate_model(eval_model, texts, [length], settings, progress=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    config = model.config
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4 * length
    return {
        "task": task,
        "rows": len(rows),
        "cache_mib": round(cache / 2**20, 1),
        "before_mib": round(before / 2**20, 1),
        "peak_before_mib": round(peak_before / 2**20, 1),
        "peak_mib": round(peak / 2**20, 1),
        "over_cache": round((peak - before) / cache, 3),
    }


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    from skipwise.config.lengths import parse_length

    parser = make_parser(__doc__)
    parser.add_argument("--length", default="32k")
    parser.add_argument("--task", help="run this one here, and print its figures")
    given = parser.parse_args()
    length = parse_length(given.length)
    if given.task:
        print(json.dumps(run(given.task, length)))
        return
    tasks = TASKS
    if given.smoke:
        given.length, length, tasks = "768", 768, TASKS[-1:]
    rows = []
    for task in tasks:
        rows.append(run_child("--length", given.length, "--task", task))
        print(rows[-1], flush=True)
    figures = {"length": length, "rows": rows}
    write_result("evaluation_memory", figures, folder=SMOKE if given.smoke else BENCHMARKS)


if __name__ == "__main__":
    main()
