"""PoSE in TRL's SFTTrainer: long conversations, answers trained on, prompts masked.

python examples/trl_sft.py MODEL CHATS.jsonl --to 2048 --steps 20 [--lora]

Needs `pip install '.[trl]'`.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from skipwise import PoSE, PoSECollator, PreflightCallback, finalize_checkpoint
from skipwise.models.prepared import load_scaled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("chats", type=Path, help='lines of {"prompt": ..., "completion": ...}')
    parser.add_argument("--to", type=int, default=2048, help="target length in tokens")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--out", default="sft-out")
    args = parser.parse_args()

    model, tokenizer, info = load_scaled(args.model, args.to, rope_type="yarn")
    lines = args.chats.read_text(encoding="utf-8").splitlines()

    sampler = PoSE(train_length=info.original_length, target_length=args.to, content="aligned")
    collator = PoSECollator(sampler, seed=0)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=args.out,
            max_length=args.to,  # of a record; the collator takes train_length tokens out of it
            max_steps=args.steps,
            per_device_train_batch_size=2,
            learning_rate=1e-4,
            logging_steps=5,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
        data_collator=collator,  # without it TRL sends neither skips nor a mask that fits them
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, target_modules="all-linear") if args.lora else None,
        callbacks=[PreflightCallback(collator, info=info)],
    )
    trainer.train()

    # An adapter does not carry the rescaled positions: merge it.
    whole = trainer.model.merge_and_unload() if args.lora else trainer.model
    whole.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    finalize_checkpoint(args.out, args.to)


if __name__ == "__main__":
    main()
