"""What importance weights cost in attention: flex_attention and the additive mask, beside sdpa.

python research/gpu/weighted_attention.py [--lengths 2048 8192] [--minutes 5]

A query adds w_c to its logits for the keys of an earlier chunk c, and 0 inside its own chunk:

  unweighted  sdpa without weights, the baseline
  mask        the weights as an additive (B, 1, L, L) mask through sdpa
  flex        flex_attention with two numbers a token, as `skipwise train` runs it on a GPU

Measured in one attention layer (forward and backward) and in a training step of a Llama of four
layers, in turns with the unweighted one. Kernels that were tried and lost are in the table of
docs/method.md and in results/weighted_attention_2026-11-26.json; their code is in the history.
On a CPU, flex_attention has no backward pass: there it runs forward only, and in no step.

Shapes:  B = batch, L = tokens, N = chunks, H = heads (K of keys), D = their width
"""

import gc
import json
import math
import sys
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from common import RESEARCH, SMOKE, make_parser, write_result

from skipwise.models.attention.flex import flex_attention_forward
from skipwise.models.attention.masks import FLEX, pack_key_weights, with_chunk_weights
from skipwise.pose.samplers import PoSE

NAMES = ("unweighted", "mask", "flex")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
CHECKED = 8192  # tokens up to which a layer is compared with float32 arithmetic
WIDE = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000}
NARROW = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 64}


def make_chunks(length, num_chunks, rng, batch=1):
    """chunk_ids, key_weights (B, L) as the collator sends them, and position_ids (B, L)."""
    sampler = PoSE(train_length=length, target_length=16 * length, num_chunks=num_chunks)
    examples = [sampler.sample(rng, 16 * length) for _ in range(batch)]
    rows = {
        "chunk_ids": np.stack([e.chunk_ids() for e in examples]),
        "key_weights": np.stack([np.repeat(e.log_weights(), e.lengths) for e in examples]),
        "position_ids": np.stack([e.position_ids() for e in examples]),
    }
    made = {name: torch.from_numpy(values).to(DEVICE) for name, values in rows.items()}
    return {**made, "key_weights": made["key_weights"].float()}


def with_attention_mask(name, batch):
    """The batch with what carries its chunks to the attention, as the Trainer makes it."""
    if name == "flex":
        return pack_key_weights(batch)
    if name == "mask":
        return with_chunk_weights(batch, DTYPE)
    kept = {key: value for key, value in batch.items() if key not in ("chunk_ids", "key_weights")}
    return {**kept, "attention_mask": None}


def attention(name, qkv, mask, scale):
    """(B, L, H, D) from queries (B, H, L, D), keys and values (B, K, L, D)."""
    groups = qkv[0].shape[1] // qkv[1].shape[1]
    module = SimpleNamespace(num_key_value_groups=groups, is_causal=True)
    forward = flex_attention_forward if name == "flex" else sdpa_attention_forward
    return forward(module, *qkv, mask, scaling=scale)[0]


def reference(qkv, grad, chunks, scale, weighted):
    """out, dq, dk, dv in float32, a key head at a time."""
    q, k, v = qkv
    length, group = q.shape[2], q.shape[1] // k.shape[1]
    same = chunks["chunk_ids"][:, :, None] == chunks["chunk_ids"][:, None, :]
    bias = chunks["key_weights"][:, None, :].masked_fill(same, 0.0)[:, None] * float(weighted)
    future = torch.ones(length, length, dtype=torch.bool, device=DEVICE).triu(1)
    bias = bias.masked_fill(future, -math.inf)
    found = []
    for head in range(k.shape[1]):
        own = slice(head * group, (head + 1) * group)
        parts = (q[:, own], k[:, head : head + 1], v[:, head : head + 1])
        q_, k_, v_ = (t.detach().float().requires_grad_() for t in parts)
        out = ((q_ @ k_.transpose(-1, -2)) * scale + bias).softmax(-1) @ v_
        upstream = grad.transpose(1, 2)[:, own].float()
        found.append([out.detach(), *torch.autograd.grad(out, (q_, k_, v_), upstream)])
    out, *grads = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return [out.transpose(1, 2), *grads]


def seconds_of(work):
    """Seconds of one call; on a GPU until it has finished."""
    for_gpu = torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None
    for_gpu()
    started = time.perf_counter()
    work()
    for_gpu()
    return time.perf_counter() - started


def peak_mib(work):
    """What a call needs beside what is there already, MiB; 0 on a CPU."""
    if DEVICE.type != "cuda":
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20)


def layer_rows(heads, length, num_chunks, rng):
    """Time, memory and error of forward and backward of one attention layer."""
    H, K, D = heads
    chunks = make_chunks(length, num_chunks, rng)
    made = [torch.randn(1, length, h, D, device=DEVICE, dtype=DTYPE) for h in (H, K, K, H)]
    *qkv, grad = [t.transpose(1, 2) for t in made]  # with the strides they have in a model
    qkv, grad = [t.requires_grad_() for t in qkv], grad.transpose(1, 2)
    key = {"heads": f"{H}/{K}x{D}", "length": length, "batch": 1, "chunks": num_chunks}
    base = None
    for name in NAMES:
        mask = with_attention_mask(name, chunks)["attention_mask"]
        backward = DEVICE.type == "cuda" or name != "flex"

        def once(name=name, mask=mask, backward=backward):
            given = qkv if backward else [t.detach() for t in qkv]
            out = attention(name, given, mask, D**-0.5)
            return [out, *torch.autograd.grad(out, given, grad)] if backward else [out]

        row = {**key, "name": name, "first_seconds": round(seconds_of(once), 2)}
        if length <= CHECKED:
            expected = reference(qkv, grad, chunks, D**-0.5, name != "unweighted")
            pairs = zip(("out", "dq", "dk", "dv"), once(), expected, strict=False)
            row["errors"] = {
                n: float(f"{(a.detach().float() - b).norm() / b.norm():.2g}") for n, a, b in pairs
            }
            del expected
        row["extra_mib"] = peak_mib(once)
        took = 1000 * median(seconds_of(once) for _ in range(8))
        base = base or took
        yield {**row, "milliseconds": round(took, 3), "ratio": round(took / base, 3)}


class Step:
    """Forward and backward of a model's loss, on chunks that differ from step to step."""

    def __init__(self, sizes, heads, length):
        H, K, D = heads
        config = LlamaConfig(
            **sizes,
            num_hidden_layers=4,
            num_attention_heads=H,
            num_key_value_heads=K,
            head_dim=D,
            max_position_embeddings=16 * length,
            use_cache=False,
        )
        torch.manual_seed(0)
        with torch.device(DEVICE):
            self.model = LlamaForCausalLM(config).to(DTYPE).train()
            self.ids = torch.randint(0, config.vocab_size, (1, length))
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def __call__(self, name, chunks):
        batch = with_attention_mask(name, {"input_ids": self.ids, "labels": self.ids, **chunks})
        if name == "unweighted":
            batch["attention_mask"] = torch.ones_like(self.ids)
        self.model.config._attn_implementation = FLEX if name == "flex" else "sdpa"
        self.model.zero_grad(set_to_none=True)
        loss = self.model(**batch).loss
        loss.backward()
        return float(loss.detach())

    def gradient(self):
        layer = self.model.model.layers[0].self_attn
        return torch.cat([p.grad.flatten().float() for p in layer.parameters()])


def step_row(step, kind, name, length, num_chunks, rng, pairs):
    """Median of the ratios of pairs (unweighted, this one), each on the same new chunks."""
    chunks = make_chunks(length, num_chunks, rng)
    expected, by_mask = step("mask", chunks), step.gradient()
    row = {"step": kind, "chunks": num_chunks, "name": name}
    row["loss_over_mask"] = round(step(name, chunks) - expected, 5)
    row["grad_off_mask"] = float(f"{(step.gradient() - by_mask).norm() / by_mask.norm():.2g}")
    del by_mask
    row["peak_mib"] = peak_mib(lambda: step(name, chunks))
    step("unweighted", chunks)
    ratios, bases = [], []
    for k in range(pairs):
        chunks = make_chunks(length, num_chunks, rng)
        order = ["unweighted", name] if k % 2 else [name, "unweighted"]
        took = [seconds_of(lambda which=which, c=chunks: step(which, c)) for which in order]
        base, ours = took if order[0] == "unweighted" else took[::-1]
        bases.append(base)
        ratios.append(ours / base)
    row["unweighted_milliseconds"] = round(1000 * median(bases), 1)
    row["ratio"], row["pairs"] = round(median(ratios), 4), pairs
    row["spread"] = [round(float(x), 4) for x in np.quantile(ratios, [0.25, 0.75])]
    return row


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--chunks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--pairs", type=int, default=12, help="of steps")
    parser.add_argument("--minutes", type=float, default=5, help="no length begins after these")
    args = parser.parse_args()
    heads, sizes = (32, 8, 128), WIDE
    if args.smoke:
        args.lengths, args.pairs, heads, sizes = [48], 2, (4, 2, 16), NARROW
    ends = time.monotonic() + 60 * args.minutes
    rng = np.random.default_rng(0)
    gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else None
    figures = {"layers": [], "steps": [], "notes": [{"gpu": gpu}]}
    torch._dynamo.config.recompile_limit = 64
    torch.manual_seed(0)

    def add(key, row):
        figures[key].append(row)
        print(json.dumps(row), flush=True)
        folder = SMOKE if args.smoke else RESEARCH
        write_result("weighted_attention", figures, folder=folder, show=False)

    for length in args.lengths:
        if time.monotonic() > ends:
            add("notes", {"length": length, "failed": "not measured: out of time"})
            continue
        for num_chunks in args.chunks:
            for row in layer_rows(heads, length, num_chunks, rng):
                add("layers", row)
        step = Step(sizes, heads, length)
        for num_chunks in args.chunks:
            for name in NAMES if DEVICE.type == "cuda" else NAMES[:2]:
                kind = f"hidden {sizes['hidden_size']}, L {length}, B 1"
                add("steps", step_row(step, kind, name, length, num_chunks, rng, args.pairs))
        del step
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
