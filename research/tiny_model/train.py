"""Train the quickstart's base model from scratch: 3.4 M parameters, context 256.

python research/tiny_model/train.py OUT_FOLDER [--steps 2400] [--family gemma3_text] [--width 256]

OUT_FOLDER holds the tokenizer (make_tokenizer.py) and receives config.json and model.safetensors
(bf16). Three quarters of each batch are windows of the standard library's source, one quarter
passkey prompts. About 20 minutes on two cores. The modules kept for evaluation
(skipwise.pipeline.quickstart.corpus.held_out) are never seen. The bundled model is a copy of
OUT_FOLDER. Other families, with sliding layers of 64 tokens or with state layers, are for
benchmarks/hybrid_layers.py.
"""

import math
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from common import make_parser

from skipwise.config.machine import cpu_has_bf16
from skipwise.models.compatibility import make_portable
from skipwise.pipeline.quickstart import corpus

BATCH, PASSKEYS = 16, 4
FAMILIES = ("llama", "gemma2", "gemma3_text", "cohere2", "qwen3_next", "bamba", "lfm2")


def family_settings(family: str, head_dim: int) -> dict[str, Any]:
    """Settings of one family for 4 layers and 4 heads: every second layer sees the full context."""
    if family in ("gemma2", "gemma3_text", "cohere2"):
        types = ["sliding_attention", "full_attention"] * 2
        return {"head_dim": head_dim, "sliding_window": 64, "layer_types": types}
    if family == "qwen3_next":  # Gated DeltaNet
        return {
            "head_dim": head_dim,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": head_dim,
            "linear_value_head_dim": head_dim,
            "num_experts": 0,
        }
    if family == "bamba":  # Mamba 2
        mamba = {"mamba_n_heads": 8, "mamba_d_head": head_dim, "mamba_d_state": head_dim}
        return {"attn_layer_indices": [1, 3], "mamba_chunk_size": 64, **mamba}
    if family == "lfm2":  # short convolutions
        types = ["conv", "full_attention"] * 2
        return {"layer_types": types, "block_auto_adjust_ff_dim": False}
    return {}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("out", type=Path, metavar="OUT_FOLDER")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--length", type=int, default=256, help="context of the base")
    args = parser.parse_args()
    num_modules, num_prompts, batch, num_passkeys = None, 6000, BATCH, PASSKEYS
    if args.smoke:
        args.steps, num_modules, num_prompts, batch, num_passkeys = 1, 20, 2, 2, 1
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    modules = islice(corpus.modules(), num_modules)
    sources = [text for name, text in modules if not corpus.held_out(name)]
    stream = np.concatenate([np.array(ids) for ids in tokenizer(sources)["input_ids"]])
    documents = [
        corpus.passkey_document(tokenizer, args.length, rng, sources) for _ in range(num_prompts)
    ]
    prompts = np.array(tokenizer(documents)["input_ids"])
    print(f"{len(stream):,} tokens of source, {len(prompts):,} prompts", flush=True)
    config = AutoConfig.for_model(
        args.family,
        vocab_size=len(tokenizer),
        hidden_size=args.width,
        intermediate_size=args.width * 43 // 16,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=args.length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        **family_settings(args.family, args.width // 4),
    )
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    start = time.time()
    for step in range(args.steps):
        share = min(1.0, (step + 1) / 100) * (
            0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        )
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * share
        starts = rng.integers(len(stream) - args.length, size=batch - num_passkeys)
        rows = [stream[s : s + args.length] for s in starts]
        rows += list(prompts[rng.integers(len(prompts), size=num_passkeys)])
        ids = torch.from_numpy(np.stack(rows).astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(f"{step + 1} loss {loss.item():.3f} {time.time() - start:.0f} s", flush=True)
    model.to(torch.bfloat16)
    model.config.use_cache = True
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    model.save_pretrained(args.out)
    make_portable(args.out)


if __name__ == "__main__":
    main()
