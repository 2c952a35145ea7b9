"""What sliding and state layers should see at a skip, measured on tiny models.

python benchmarks/hybrid_layers.py BASE_FOLDER... [--steps 200] [--target 2048]
python benchmarks/hybrid_layers.py BASE_FOLDER... --settings untrained skip reset full-length

A hybrid model has layers that look back a window of tokens (Gemma 2 and 3, Olmo 3, gpt-oss, ...),
or that carry a state (Gated DeltaNet, Mamba 2, short convolutions), beside layers that see all. In
training with skips, what does a sliding or state layer see at a skip?

  skip    the tokens before it, at the skipping distance (the window counts tokens)
  cut     nothing: what lies before the skip is further away than the window
  plain   the tokens before it, as if they were its neighbours (plain positions in these layers)

A state has no positions, so for state layers there are two: skip, where the state runs on over the
skip, and reset, where it starts again after the skip.

BASE_FOLDERs are made by research/tiny_model/train.py --family. All settings train the same
examples.
"""

import argparse
import json
import math
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import BENCHMARKS, SMOKE, make_parser, write_result
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from skipwise.config.machine import cpu_has_bf16
from skipwise.config.parse import parse_recipe
from skipwise.config.recipe import EvalSettings
from skipwise.data.collator import ExampleCollator
from skipwise.data.corpus import build_corpus
from skipwise.data.dataset import PoSEDataset
from skipwise.data.readers import parse_sources
from skipwise.data.tokenize import tokenize_source
from skipwise.evaluation.evaluator import EvalModel, Texts, evaluate_model
from skipwise.models.attention.masks import with_chunk_weights
from skipwise.models.load import load_model
from skipwise.models.prepared import prepare_model
from skipwise.pipeline.quickstart import MODEL, make_recipe
from skipwise.pipeline.quickstart.corpus import modules
from skipwise.pose.samplers import FullLength, PoSE

BATCH, LEARNING_RATE = 16, 3e-4
SLIDING = ["untrained", "skip", "cut", "plain", "cut+weights", "plain+weights", "full-length"]
STATE = ["untrained", "skip", "skip+weights", "reset", "reset+weights", "full-length"]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("bases", nargs="*", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--target", type=int, default=2048)
    parser.add_argument("--settings", nargs="+", choices=sorted({*SLIDING, *STATE}))
    parser.add_argument("--name", default="hybrid_layers")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.smoke:
            args.steps, args.target = 1, 512
            args.bases = [Path(scratch, family) for family in ("gemma3_text", "lfm2")]
            args.sources, args.eval_sources = make_smoke_inputs(args.bases, Path(scratch))
        else:
            data = make_recipe().data
            args.sources, args.eval_sources = data.sources, data.eval_sources
        if not args.bases:
            parser.error("no BASE_FOLDER")
        rows: dict[str, Any] = {}
        for base in args.bases:
            rows[base.name] = {}
            sliding = "sliding_attention" in AutoConfig.from_pretrained(base).layer_types
            settings = args.settings or (SLIDING if sliding else STATE)
            for setting in settings[1::2] if args.smoke else settings:
                rows[base.name][setting] = measure(base, setting, args)
                print(base.name, setting, rows[base.name][setting], flush=True)
    folder = SMOKE if args.smoke else BENCHMARKS
    figures = {"steps": args.steps, "target": args.target, "rows": rows}
    write_result(args.name, figures, folder=folder)


def make_smoke_inputs(bases: list[Path], folder: Path) -> tuple[list[str], list[str]]:
    """Random hybrid models of two layers; files to train on and to evaluate."""
    own = {
        "gemma3_text": {"sliding_window": 64, "layer_types": ["sliding_attention"]},
        "lfm2": {"layer_types": ["conv"]},
    }
    for base in bases:
        own[base.name]["layer_types"].append("full_attention")
        config = AutoConfig.for_model(
            base.name,
            vocab_size=1024,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=None,
            **own[base.name],
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(base)
    files = folder / "train.jsonl", folder / "eval.jsonl"
    texts = islice((text for _, text in modules() if len(text) > 20_000), 4)
    lines = [json.dumps({"text": text[:20_000]}) + "\n" for text in texts]
    files[0].write_text("".join(lines[:3]))
    files[1].write_text(lines[3])
    return [str(files[0])], [str(files[1])]


def measure(base: Path, setting: str, args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity and passkey by context length after one training."""
    torch.manual_seed(0)
    tree = {"model": str(base), "target_length": args.target, "rope": {"type": "yarn"}}
    prepared = prepare_model(parse_recipe(tree))
    model = load_model(str(base), prepared.scaled, prepared.load, dtype=torch.float32)
    length = prepared.info.original_length
    lengths = [n for n in (length, 2 * length, 4 * length) if n < args.target] + [args.target]
    if setting != "untrained":
        train(model, prepared, setting, args.sources, args)
    documents = [
        store.document(i)
        for source in parse_sources(args.eval_sources)
        for store in [tokenize_source(source, prepared.tokenizer)]
        for i in range(store.num_documents)
    ]
    count = 2 if args.smoke else 40
    settings = EvalSettings(
        tasks=("perplexity", "passkey"), perplexity_windows=count, passkey_samples=count
    )
    model.to(torch.float32)
    eval_model = EvalModel(label=setting, load=lambda: model, tokenizer=prepared.tokenizer)
    texts = Texts(documents=documents)
    with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
        found = evaluate_model(eval_model, texts, lengths, settings, progress=False)
    return {
        task: [
            round(
                float(
                    np.mean([r["value"] for r in found if (r["task"], r["context_length"]) == at])
                ),
                3,
            )
            for at in [(task, length) for length in lengths]
        ]
        for task in ("perplexity", "passkey")
    }


def train(model: Any, prepared: Any, setting: str, sources: Any, args: argparse.Namespace) -> None:
    """PoSE as the quickstart trains it, with one treatment of the sliding layers."""
    length, window = prepared.info.original_length, prepared.info.sliding_window
    kind, _, weights = setting.partition("+")
    sampler: Any = PoSE(train_length=length, target_length=args.target, content="aligned")
    batch = BATCH
    if kind == "full-length":
        sampler, batch = FullLength(target_length=args.target), BATCH * length // args.target
    parsed = parse_sources(sources)
    corpus = build_corpus(
        [tokenize_source(source, prepared.tokenizer) for source in parsed],
        [source.weight for source in parsed],
        min_length=args.target if kind == "full-length" else length,
        target_length=args.target,
    )
    dataset = PoSEDataset(corpus, sampler, seed=0, num_examples=args.steps * batch)
    reset = {"cut": torch.full((batch,), length)}
    if kind == "plain":
        plain_positions(model)
    if kind == "reset":
        reset_states(model, reset)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    started = time.time()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((step + 1) / 10, 1 - step / args.steps)
        items = [dataset[step * batch + i] for i in range(batch)]
        ids, labels, positions = (
            torch.from_numpy(np.stack([item[key] for item in items]))
            for key in ("input_ids", "labels", "position_ids")
        )
        skips = positions.diff(dim=1) != 1
        reset["cut"] = torch.where(skips.any(1), skips.int().argmax(1) + 1, length)
        masks: Any = make_masks(items, positions, kind, bool(weights), window or length)
        if not window:
            masks = masks["full_attention"]
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
            loss = model(
                ids, labels=labels, position_ids=positions, attention_mask=masks, use_cache=False
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert math.isfinite(loss.item())
    for hook in getattr(model, "plain_hooks", []):
        hook.remove()
    for module in model.modules():
        module.__dict__.pop("forward", None)  # of reset_states
    print(f"  {setting}: loss {loss.item():.3f}, {time.time() - started:.0f} s", flush=True)


def make_masks(
    items: list[Any], positions: torch.Tensor, kind: str, weights: bool, window: int
) -> dict[str, torch.Tensor]:
    """Additive masks (B, 1, L, L) for the full and the sliding layers."""
    low = torch.finfo(torch.bfloat16).min
    index = torch.arange(positions.shape[1])
    causal = (index[:, None] >= index).expand(len(items), 1, -1, -1)
    counted = positions if kind == "cut" else index.expand_as(positions)
    near = (counted[:, :, None] - counted[:, None, :] < window)[:, None]
    zeros = torch.zeros(causal.shape)
    full = zeros.masked_fill(~causal, low)
    if weights:
        full = with_chunk_weights(ExampleCollator("importance")(items), torch.float32)
        full = full["attention_mask"]
    return {
        "full_attention": full,
        "sliding_attention": zeros.masked_fill(~(causal & near), low),
    }


def plain_positions(model: Any) -> None:
    """Sliding layers turn by plain positions (for this measurement only)."""
    inner = model.model

    def hook(layer: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
        hidden = arguments[0]
        index = torch.arange(hidden.shape[1])[None].expand(hidden.shape[0], -1)
        nested = hasattr(inner.rotary_emb, "sliding_attention_inv_freq")
        kinds = ("sliding_attention",) if nested else ()
        keywords["position_embeddings"] = inner.rotary_emb(hidden, index, *kinds)
        return arguments, keywords

    model.plain_hooks = [
        layer.register_forward_pre_hook(hook, with_kwargs=True)
        for layer, kind in zip(inner.layers, model.config.layer_types, strict=True)
        if kind == "sliding_attention"
    ]


def reset_states(model: Any, reset: dict[str, torch.Tensor]) -> None:
    """State layers start again at token `cut` (B,) of each row (for this measurement only).

    A layer reads the row, and the row from its cut on; the second result replaces the first there.
    """

    def from_cut(module: Any, hidden: torch.Tensor) -> torch.Tensor:
        run, cut = type(module).forward, reset["cut"]
        index = torch.arange(hidden.shape[1])
        late = ((index + cut[:, None]) % hidden.shape[1])[:, :, None].expand_as(hidden)
        back = ((index - cut[:, None]) % hidden.shape[1])[:, :, None].expand_as(hidden)
        again = run(module, hidden.gather(1, late)).gather(1, back)
        return torch.where(index[:, None] < cut[:, None, None], run(module, hidden), again)

    for module in model.modules():
        if any(isinstance(child, torch.nn.Conv1d) for child in module.children()):
            module.forward = lambda hidden_states, *args, module=module, **keys: from_cut(
                module, hidden_states
            )


if __name__ == "__main__":
    main()
