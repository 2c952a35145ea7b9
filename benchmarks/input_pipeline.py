"""What sampling, cutting and collating cost: share of a quickstart step, and tokens a second.

python benchmarks/input_pipeline.py

Bars: under 1 % of a quickstart training step; at least 50 million tokens a second on one core at
L = 8,192 (T = 32,768, batch of 8).
"""

import statistics
import time

import numpy as np
import torch
from common import write_result

from skipwise.data.collator import ExampleCollator
from skipwise.data.corpus import build_corpus
from skipwise.data.dataset import PoSEDataset
from skipwise.data.token_cache import TokenStore
from skipwise.models.attention.masks import with_chunk_weights
from skipwise.models.load import attention_for, compute_dtype, load_model
from skipwise.models.prepared import prepare_model
from skipwise.pipeline.quickstart import make_recipe
from skipwise.pose.samplers import PoSE
from skipwise.training.inputs import load_training_data


def seconds_per_batch(dataset, collator, batch, num_batches):
    times = []
    for i in range(num_batches):
        start = time.perf_counter()
        collator([dataset[k] for k in range(i * batch, (i + 1) * batch)])
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def long_windows(content, weights="none", L=8192, T=32768, batch=8):
    tokens = np.random.default_rng(0).integers(0, 32000, 20_000_000).astype(np.uint16)
    offsets = np.arange(0, len(tokens) + 1, 50_000)
    corpus = build_corpus(
        [TokenStore(tokens=tokens, offsets=offsets)], [None], min_length=L, target_length=T
    )
    sampler = PoSE(train_length=L, target_length=T, content=content)
    dataset = PoSEDataset(corpus, sampler, seed=0, num_examples=10**9)
    return batch * L / seconds_per_batch(dataset, ExampleCollator(weights), batch, 200)


def quickstart_shares():
    """Pairs in one run: seconds of a batch's making beside those of the step it feeds."""
    recipe = make_recipe()
    prepared = prepare_model(recipe)
    data = load_training_data(prepared, None)
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
    for _ in range(12):
        size = recipe.training.global_batch_size
        making.append(seconds_per_batch(data.dataset, data.collator, size, 20))
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
    torch.set_num_threads(1)
    rates = {
        f"million_tokens_per_second_{content}": round(long_windows(content) / 1e6, 1)
        for content in ("uniform", "contiguous", "aligned")
    }
    torch.set_num_threads(torch.get_num_threads())
    torch.set_num_threads(2)
    print(write_result("input_pipeline", {**rates, "quickstart": quickstart_shares()}))


if __name__ == "__main__":
    main()
