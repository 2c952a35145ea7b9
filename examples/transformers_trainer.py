"""PoSE in a transformers Trainer of your own: Skipwise's data set and collator, your arguments.

python examples/transformers_trainer.py MODEL TEXT_FOLDER --to 2048 --steps 20
"""

import argparse

import torch
from transformers import Trainer, TrainingArguments

from skipwise import PoSE
from skipwise.data import PositionCollator, PositionDataset, build_corpus
from skipwise.documents import parse_sources
from skipwise.prepare import load_scaled
from skipwise.tokens import tokenize_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("texts")
    parser.add_argument("--to", type=int, default=2048, help="target length in tokens")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="trainer-out")
    args = parser.parse_args()

    model, tokenizer, facts = load_scaled(args.model, args.to, rope_type="yarn")
    L = facts.original_length
    stores = [tokenize_source(source, tokenizer) for source in parse_sources([args.texts])]
    corpus = build_corpus(stores, [None], min_length=L, target_length=args.to)
    dataset = PositionDataset(
        corpus,
        PoSE(train_length=L, target_length=args.to),
        seed=0,
        num_examples=args.steps * 2,
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.out,
            max_steps=args.steps,
            per_device_train_batch_size=2,
            learning_rate=1e-4,
            logging_steps=5,
            save_strategy="no",
            remove_unused_columns=False,  # position_ids would be kept, the example's facts not
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=dataset,
        data_collator=PositionCollator(
            config=model.config
        ),  # sends the attention mask with the skips
    )
    trainer.train()
    trainer.save_model(args.out)


if __name__ == "__main__":
    main()
