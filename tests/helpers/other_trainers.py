"""What the tests of other trainers share: records, a scaled model, a Trainer, how it stops."""

import pytest
from transformers import Trainer, TrainingArguments

from skipwise import PoSE, SkipwiseError
from skipwise.models.prepared import load_scaled

L, T = 64, 256
POSE = PoSE(train_length=L, target_length=T, content="aligned")


def make_records(count=12, length=400):
    """Tokens tell where they stand: token i of record r is (7 r + i) modulo the vocabulary."""
    return [{"input_ids": [(7 * r + i) % 1000 for i in range(length)]} for r in range(count)]


def loaded(tiny):
    model, tokenizer, facts = load_scaled(str(tiny), T, rope_type="yarn")
    return model, tokenizer, facts


def make_trainer(model, records, collator, callback, folder, cls=Trainer, **arguments):
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    return cls(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=records,
        data_collator=collator,
        callbacks=[callback],
    )


def stopped(trainer):
    """What the preflight says when it stops a run, before its first step."""
    with pytest.raises(SkipwiseError) as raised:
        trainer.train()
    assert trainer.state.global_step == 0
    return str(raised.value)
