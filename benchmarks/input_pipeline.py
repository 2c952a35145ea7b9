"""What sampling, cutting and collating cost: share of a quickstart step, and tokens a second.

python benchmarks/input_pipeline.py

Bars: under 1 % of a quickstart training step; at least 50 million tokens a second on one core at
L = 8,192 (T = 32,768, batch of 8).
"""

import statistics
import time

import numpy as np
import torch
from common import BENCHMARKS, SMOKE, make_parser, write_result

from skipwise.config.parse import parse_recipe
from skipwise.data.collator import ExampleCollator
from skipwise.data.corpus import build_corpus
from skipwise.data.dataset import PoSEDataset
from skipwise.data.token_cache import TokenStore
from skipwise.models.attention.masks import with_chunk_weights
from skipwise.models.load import attention_for, compute_dtype, load_model
from skipwise.models.prepared import prepare_model
from skipwise.pipeline.quickstart import MODEL, make_recipe
from skipwise.pose.samplers import PoSE
from skipwise.training.inputs import dummy_data, load_training_data

SMALL = {
    "model": str(MODEL),
    "target_length": 512,
    "training": {"global_batch_size": 1},
    "load": {"dtype": "float32"},
}


def seconds_per_batch(dataset, collator, batch, num_batches):
    times = []
    for i in range(num_batches):
        start = time.perf_counter()
        collator([dataset[k] for k in range(i * batch, (i + 1) * batch)])
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def long_windows(content, num_tokens, num_batches, L=8192, T=32768, batch=8):
    tokens = np.random.default_rng(0).integers(0, 32000, num_tokens).astype(np.uint16)
    offsets = np.arange(0, len(tokens) + 1, 50_000)
    corpus = build_corpus(
        [TokenStore(tokens=tokens, offsets=offsets)], [None], min_length=L, target_length=T
    )
    sampler = PoSE(train_length=L, target_length=T, content=content)
    dataset = PoSEDataset(corpus, sampler, seed=0, num_examples=10**9)
    return batch * L / seconds_per_batch(dataset, ExampleCollator("none"), batch, num_batches)


def quickstart_shares(smoke):
    """Pairs in one run: seconds to make a batch beside those of the step it feeds."""
    recipe = parse_recipe(SMALL) if smoke else make_recipe()
    prepared = prepare_model(recipe)
    data = dummy_data(prepared) if smoke else load_training_data(prepared, None)
    num_rounds, num_batches = (3, 4) if smoke else (12, 20)
    model = load_model(
        recipe.model,
        prepared.scaled,
        recipe.load,
        dtype=torch.float32,
        attn_implementation=attention_for(recipe.load, recipe.positions.key_weights),
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    dtype = compute_dtype(recipe.load)
    making, stepping = [], []
    for _ in range(num_rounds):
        size = recipe.training.global_batch_size
        making.append(seconds_per_batch(data.dataset, data.collator, size, num_batches))
        batch = with_chunk_weights(data.collator(data.items(size)), torch.float32)
        start = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        stepping.append(time.perf_counter() - start)
    pairs = [a / b for a, b in zip(making[2:], stepping[2:], strict=True)]
    return {
        "milliseconds_per_batch": 1e3 * statistics.median(making),
        "milliseconds_per_step": 1e3 * statistics.median(stepping[2:]),
        "share_of_step": statistics.median(pairs),
    }


def main():
    args = make_parser(__doc__).parse_args()
    size = (200_000, 4) if args.smoke else (20_000_000, 200)
    torch.set_num_threads(1)
    rates = {
        f"million_tokens_per_second_{content}": round(long_windows(content, *size) / 1e6, 1)
        for content in ("uniform", "contiguous", "aligned")
    }
    torch.set_num_threads(2)
    figures = {**rates, "quickstart": quickstart_shares(args.smoke)}
    print(write_result("input_pipeline", figures, folder=SMOKE if args.smoke else BENCHMARKS))


if __name__ == "__main__":
    main()
