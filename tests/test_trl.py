"""TRL's SFTTrainer with PoSE: it trains, and each way in which it would void a run is caught."""

import pytest
from other_trainers import POSE, L, T, loaded, make_records, stopped
from transformers import AutoModelForCausalLM

from skipwise import PoSECollator
from skipwise.integrations.preflight_callback import PreflightCallback

pytestmark = pytest.mark.extended


def make_sft(model, tokenizer, records, folder, collator=None, callback=None, **settings):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    arguments = {
        "max_length": T,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
        **settings,
    }
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(folder), **arguments),
        train_dataset=Dataset.from_list(records),
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=[callback or PreflightCallback(collator, report=lambda check: None)],
    )


def test_trl_with_its_own_collator_is_caught(tiny, tmp_path):
    model, tokenizer, _ = loaded(tiny)
    callback = PreflightCallback(target_length=T, report=lambda check: None)
    trainer = make_sft(model, tokenizer, make_records(), tmp_path, callback=callback)
    assert "no position_ids in the trainer's batches" in stopped(trainer)


def test_trl_dropping_the_position_ids_of_a_data_set_is_caught(tiny, tmp_path):
    model, tokenizer, _ = loaded(tiny)
    batch = PoSECollator(POSE)(make_records())
    rows = [
        {"input_ids": ids.tolist(), "labels": labels.tolist(), "position_ids": places.tolist()}
        for ids, labels, places in zip(
            batch["input_ids"], batch["labels"], batch["position_ids"], strict=True
        )
    ]
    callback = PreflightCallback(target_length=T, report=lambda check: None)
    trainer = make_sft(model, tokenizer, rows, tmp_path, callback=callback)
    assert "no position_ids in the trainer's batches" in stopped(trainer)


def test_an_unscaled_model_in_trl_is_caught(tiny, tmp_path):
    _, tokenizer, _ = loaded(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    trainer = make_sft(model, tokenizer, make_records(), tmp_path, PoSECollator(POSE))
    assert "the model's config has a window of 64 tokens" in stopped(trainer)


def test_short_conversations_in_trl_are_caught_and_train_when_packed(tiny, tmp_path):
    model, tokenizer, _ = loaded(tiny)
    short = make_records(40, 30)
    trainer = make_sft(model, tokenizer, short, tmp_path, PoSECollator(POSE))
    assert "pack the records" in stopped(trainer)
    packed = {"packing": True, "packing_strategy": "wrapped"}
    collator = PoSECollator(POSE)
    trainer = make_sft(loaded(tiny)[0], tokenizer, short, tmp_path, collator, **packed)
    trainer.train()
    assert trainer.state.global_step == 3


def test_trl_trains_on_the_answers_and_masks_the_prompts(tiny, tmp_path):
    model, tokenizer, facts = loaded(tiny)
    seen = []

    class Watching(PoSECollator):
        def __call__(self, records):
            batch = super().__call__(records)
            seen.append((records, batch))
            return batch

    chats = [
        {"prompt": f"value_{i} = {i}\n" * 30, "completion": f"the answer is {i}"} for i in range(8)
    ]
    collator = Watching(POSE)
    callback = PreflightCallback(collator, info=facts, report=lambda check: None)
    make_sft(model, tokenizer, chats, tmp_path, collator, callback).train()
    records, batch = seen[-1]
    for record, labels in zip(records, batch["labels"], strict=True):
        answer = {t for t in record["labels"] if t != -100}
        kept = labels[labels != -100].tolist()
        assert kept and set(kept) <= answer and len(kept) < L / 2
