"""PoSE in a transformers Trainer of your own: your records and arguments, our collator and checks.

python examples/transformers_trainer.py MODEL TEXTS.jsonl --to 2048 --steps 20
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from skipwise import PoSE, PoSECollator, PreflightCallback, finalize_checkpoint
from skipwise.models.prepared import load_scaled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("texts", type=Path, help='lines of {"text": ...}')
    parser.add_argument("--to", type=int, default=2048, help="target length in tokens")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="trainer-out")
    args = parser.parse_args()

    # The scaled config comes first and the weights into it, never the other way round.
    model, tokenizer, info = load_scaled(args.model, args.to, rope_type="yarn")

    # Records are whole documents, not cut to the window: the collator cuts them anew each epoch.
    lines = args.texts.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    records = [{"input_ids": ids} for ids in tokenizer(texts, verbose=False)["input_ids"]]

    sampler = PoSE(train_length=info.original_length, target_length=args.to, content="aligned")
    collator = PoSECollator(sampler, seed=0, config=model.config)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.out,
            max_steps=args.steps,
            per_device_train_batch_size=2,
            learning_rate=1e-4,
            logging_steps=5,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=records,
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=[PreflightCallback(collator, info=info)],  # stops a run that would be void
    )
    trainer.train()
    trainer.save_model(args.out)
    finalize_checkpoint(args.out, args.to)  # readable by transformers 4, vLLM and llama.cpp, too


if __name__ == "__main__":
    main()
