"""PoSE in a training loop of your own: positions, labels and the mask are all there is to it.

python examples/plain_loop.py MODEL TEXT_FILE --to 2048 --steps 20
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from skipwise import PoSE, finalize_checkpoint
from skipwise.errors import require
from skipwise.models.attention.masks import with_layer_masks
from skipwise.models.prepared import load_scaled
from skipwise.preflight.batch import check_batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text", type=Path, help="one document, longer than the model's window")
    parser.add_argument("--to", type=int, default=2048, help="target length in tokens")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    model, tokenizer, info = load_scaled(args.model, args.to, rope_type="yarn")
    tokens = np.array(tokenizer(args.text.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    sampler = PoSE(train_length=info.original_length, target_length=args.to, content="aligned")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for step in range(args.steps):
        example = sampler.sample(np.random.default_rng([0, step]), len(tokens))
        input_ids, labels = (torch.from_numpy(a)[None] for a in example.take(tokens))
        batch = {
            "input_ids": input_ids,
            "labels": labels,
            "position_ids": torch.from_numpy(example.position_ids())[None],
            "attention_mask": torch.ones_like(input_ids),  # never without: see docs/method.md
        }
        batch = with_layer_masks(model.config, batch)  # of a model with sliding and full layers
        if step == 0:
            require(check_batch(model, batch))  # the chunks see each other
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1} loss {loss.item():.3f}", flush=True)
    if args.out:
        model.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
        finalize_checkpoint(
            args.out, args.to
        )  # readable by transformers 4, vLLM and llama.cpp, too


if __name__ == "__main__":
    main()
