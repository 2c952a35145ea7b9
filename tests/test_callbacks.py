"""Other trainers: what the collator draws, and each fault that the preflight stops a Trainer at."""

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    Gemma2Config,
    Gemma2ForCausalLM,
    Trainer,
    TrainingArguments,
)

from skipwise import CREAM, FullLength, PoSE, PoSECollator, RandPos, SkipwiseError
from skipwise.callbacks import PreflightCallback, finish_folder
from skipwise.data import PositionCollator
from skipwise.models.checks import check_batch
from skipwise.models.configs import facts_of
from skipwise.models.masks import sliding_reach
from skipwise.prepare import load_scaled
from skipwise.rope import Linear

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


# ---- the collator


@pytest.mark.parametrize(
    "sampler",
    [POSE, CREAM(train_length=L, target_length=T), RandPos(train_length=L, target_length=T)],
)
def test_a_batch_holds_the_records_own_tokens_at_skipping_positions_with_a_mask_of_ones(sampler):
    batch = PoSECollator(sampler)(make_records(4))
    keys = ("input_ids", "labels", "position_ids", "attention_mask")
    assert {k: tuple(v.shape) for k, v in batch.items()} == dict.fromkeys(keys, (4, L))
    assert (batch["attention_mask"] == 1).all()
    steps = batch["position_ids"].diff(dim=1)
    assert (steps >= 1).all() and (steps > 1).any() and batch["position_ids"].max() < T
    kept = batch["labels"] != -100
    assert (batch["labels"][kept] == batch["input_ids"][kept]).all() and kept.float().mean() > 0.9


def test_the_label_after_each_jump_of_the_text_is_masked():
    batch = PoSECollator(POSE)(make_records(8))
    jumps = batch["input_ids"].diff(dim=1) % 1000 != 1
    assert jumps.any()
    assert ((batch["labels"][:, 1:] == -100) == jumps).all()


def test_draws_depend_on_seed_epoch_and_tokens_alone():
    records = make_records(6)
    whole = PoSECollator(POSE, seed=3)(records)["position_ids"]
    alone = PoSECollator(POSE, seed=3)
    for row in (4, 0, 5):  # another order, another batch size, another collator
        assert torch.equal(alone([records[row]])["position_ids"][0], whole[row])
    assert len({tuple(row.tolist()) for row in whole}) == 6
    assert not torch.equal(PoSECollator(POSE, seed=4)(records)["position_ids"], whole)
    alone.set_epoch(1)
    assert not torch.equal(alone(records)["position_ids"], whole)
    alone.set_epoch(0)
    assert torch.equal(alone(records)["position_ids"], whole)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_draw_what_one_process_draws_and_anew_in_the_next_epoch(persistent):
    records = make_records(8)
    collator = PoSECollator(POSE)
    loader = DataLoader(
        records, batch_size=2, collate_fn=collator, num_workers=2, persistent_workers=persistent
    )
    for epoch in (0, 1):
        collator.set_epoch(epoch)
        positions = torch.cat([batch["position_ids"] for batch in loader])
        want = PoSECollator(POSE)
        want.set_epoch(epoch)
        assert torch.equal(positions, want(records)["position_ids"])


def test_a_masked_prompt_is_cut_as_the_tokens_are_and_stays_masked():
    records = make_records(8, 200)
    for record in records:
        record["labels"] = [-100] * 120 + record["input_ids"][120:]
    batch = PoSECollator(POSE)(records)
    for row, record in enumerate(records):
        index = (batch["input_ids"][row] - record["input_ids"][0]) % 1000  # place in the record
        want = torch.tensor(record["labels"])[index]
        jumps = torch.cat([torch.tensor([False]), index.diff() != 1])
        assert torch.equal(batch["labels"][row], want.where(~jumps, -100))
    assert (batch["labels"] != -100).any(1).all()


@pytest.mark.parametrize("key", ["completion_mask", "assistant_masks"])
def test_masks_that_older_trl_leaves_to_its_collator_become_labels(key):
    (record,) = make_records(1, 100)
    want = PoSECollator(POSE)([{**record, "labels": [-100] * 70 + record["input_ids"][70:]}])
    have = PoSECollator(POSE)([{**record, key: [0] * 70 + [1] * 30}])
    assert torch.equal(have["labels"], want["labels"])


def test_an_example_holds_a_label_however_short_the_answer():
    for length, answer in ((400, 20), (4000, 1)):
        records = make_records(16, length)
        for record in records:
            record["labels"] = [-100] * (length - answer) + record["input_ids"][-answer:]
        labels = PoSECollator(POSE)(records)["labels"]
        assert (labels[:, 1:] != -100).any(1).all()


def test_padding_of_a_record_is_taken_off():
    (record,) = make_records(1, 100)
    padded = {
        "input_ids": [5] * 3 + record["input_ids"] + [5] * 7,
        "attention_mask": [0] * 3 + [1] * 100 + [0] * 7,
    }
    want, have = PoSECollator(POSE)([record]), PoSECollator(POSE)([padded])
    assert all(torch.equal(want[key], have[key]) for key in want)


def test_a_short_record_stays_whole_at_plain_positions_and_its_padding_is_masked():
    short, long = {"input_ids": list(range(10, 30))}, make_records(1)[0]
    batch = PoSECollator(POSE, pad_token_id=9)([short, long])
    assert batch["input_ids"][0].tolist() == [*range(10, 30)] + [9] * (L - 20)
    assert batch["labels"][0].tolist() == [*range(10, 30)] + [-100] * (L - 20)
    assert batch["attention_mask"][0].tolist() == [1] * 20 + [0] * (L - 20)
    assert batch["position_ids"][0].tolist() == [*range(L)]  # counts on: a zero would begin anew
    assert (batch["attention_mask"][1] == 1).all()
    alone = PoSECollator(POSE)([short])
    assert alone["input_ids"].shape == (1, 20)
    with pytest.raises(SkipwiseError, match="20 tokens is shorter than train_length 64"):
        PoSECollator(POSE, short_records="raise")([short])


def test_a_short_record_gives_the_loss_that_it_has_alone(tiny):
    model = loaded(tiny)[0].eval()
    short = {"input_ids": list(range(10, 30))}
    for weights in ("none", "importance"):
        batch = PoSECollator(POSE, weights=weights)([short, make_records(1)[0]])
        row = {key: value[:1] for key, value in batch.items()}
        ids = torch.tensor([short["input_ids"]])
        with torch.no_grad():
            assert torch.isclose(model(**row).loss, model(ids, labels=ids).loss, atol=1e-6)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"text": "words"}, "holds text, and no input_ids"),
        ({"input_ids": [1, 2, 3], "labels": [1, 2]}, "labels"),
        ({"input_ids": [[1, 2, 3]]}, "one sequence a record"),
        ({"input_ids": []}, "one sequence a record"),
    ],
)
def test_records_that_are_none_say_so(record, said):
    with pytest.raises(SkipwiseError, match=said):
        PoSECollator(POSE)([record])


def test_importance_weights_pass_the_preflight(tiny):
    model = loaded(tiny)[0]
    batch = PoSECollator(POSE, weights="importance")(make_records(4))
    assert batch["attention_mask"].shape == (4, 1, L, L)
    assert all(check.passed for check in check_batch(model, batch))
    with pytest.raises(SkipwiseError, match="choose one of none, importance"):
        PoSECollator(POSE, weights="some")  # type: ignore[arg-type]


def test_the_package_gives_the_collator_without_loading_torch_before():
    code = "import sys, skipwise; assert 'torch' not in sys.modules; skipwise.PoSECollator; "
    code += "assert 'torch' in sys.modules; skipwise.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "has no attribute 'nothing'" in done.stderr


# ---- the preflight in a Trainer


def test_a_sound_run_reports_every_check_and_draws_new_skips_each_epoch(tiny, tmp_path):
    model, _, facts = loaded(tiny)
    seen = []

    class Watching(PoSECollator):
        def __call__(self, records):
            batch = super().__call__(records)
            seen.append((self.epoch, batch["position_ids"][0].tolist()))
            return batch

    collator = Watching(POSE)
    callback = PreflightCallback(collator, facts=facts, report=lambda check: None)
    trainer = make_trainer(
        model, make_records(2), collator, callback, tmp_path, max_steps=-1, num_train_epochs=3
    )
    trainer.train()
    assert all(check.passed for check in callback.checks)
    assert {"rescaled", "rope", "positions skip", "labels", "chunks see each other"} <= {
        check.name for check in callback.checks
    }
    steps = seen[-3:]
    assert [epoch for epoch, _ in steps] == [0, 1, 2]
    assert len({tuple(positions) for _, positions in steps}) == 3


def test_the_preflight_changes_nothing_in_the_run(tiny, tmp_path):
    weights = []
    for checked in (True, False):
        torch.manual_seed(0)
        model = loaded(tiny)[0]
        model.config.attention_dropout = 0.1
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        collator = PoSECollator(POSE)
        callback = PreflightCallback(collator, report=lambda check: None)
        trainer = make_trainer(model, make_records(), collator, callback, tmp_path)
        if not checked:
            trainer.remove_callback(callback)
        trainer.train()
        weights.append(model.model.layers[0].mlp.up_proj.weight.detach().clone())
    assert torch.equal(*weights)


def test_a_resumed_run_ends_as_one_that_was_not_stopped(tiny, tmp_path):
    ends = []
    for name, stop in (("whole", None), ("parts", 5)):
        model = loaded(tiny)[0]
        for resume in [False, True] if stop else [False]:
            collator = PoSECollator(POSE)
            callback = PreflightCallback(collator, report=lambda check: None)
            trainer = make_trainer(
                model,
                make_records(6),
                collator,
                callback,
                tmp_path / name,
                max_steps=9,  # three epochs; stopped within the second
                save_strategy="steps",
                save_steps=5,
            )
            if stop and not resume:
                trainer.add_callback(stop_after(stop))
            trainer.train(resume_from_checkpoint=resume)
        ends.append(model.model.layers[0].mlp.up_proj.weight.detach().clone())
    assert torch.equal(*ends)


def stop_after(step):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= step

    return Stop()


def stopped(trainer):
    """What the preflight says when it stops a run, before its first step."""
    with pytest.raises(SkipwiseError) as raised:
        trainer.train()
    assert trainer.state.global_step == 0
    return str(raised.value)


class Dropping:
    """A collator that goes wrong behind PoSECollator, as a trainer's own would."""

    def __init__(self, change):
        self.inner, self.change = PoSECollator(POSE), change

    def __call__(self, records):
        batch = self.inner(records)
        self.change(batch)
        return batch


FAULTS = {
    "position_ids": (lambda b: b.pop("position_ids"), "no position_ids in the trainer's batches"),
    "labels": (lambda b: b.pop("labels"), "no labels in the trainer's batches"),
    "mask": (lambda b: b.pop("attention_mask"), "chunk 2 gets no gradient from chunk 1"),
    "plain": (
        lambda b: b.update(position_ids=torch.arange(L).expand(len(b["labels"]), -1)),
        "in none of the first 12 records.*makes its own position_ids",
    ),
    "open labels": (
        lambda b: b.update(labels=b["input_ids"].clone()),
        "stand open that the collator masks",
    ),
    "not causal": (
        lambda b: b.update(attention_mask=torch.zeros(len(b["labels"]), 1, L, L)),
        "the attention mask is not causal",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_batch_that_voids_the_run_is_caught_before_the_first_step(tiny, tmp_path, fault):
    import re

    change, said = FAULTS[fault]
    collator = Dropping(change)
    callback = PreflightCallback(collator.inner, report=lambda check: None)
    trainer = make_trainer(loaded(tiny)[0], make_records(), collator, callback, tmp_path)
    assert re.search(said, stopped(trainer), re.DOTALL)


def test_a_collator_that_makes_labels_anew_is_caught_by_the_data_sets_own_examples(tiny, tmp_path):
    tokens = np.arange(400) % 1000
    rng = np.random.default_rng(0)
    items = []
    for _ in range(8):
        example = POSE.sample(rng, len(tokens))
        input_ids, labels = example.take(tokens)
        items.append(
            {
                "input_ids": input_ids,
                "labels": labels,
                "position_ids": example.position_ids(),
                "example": example,
            }
        )

    def anew(rows):
        batch = PositionCollator()(rows)
        return {**batch, "labels": batch["input_ids"].clone()}

    for collator, said in ((PositionCollator(), None), (anew, "right after a jump of the text")):
        callback = PreflightCallback(target_length=T, report=lambda check: None)
        trainer = make_trainer(
            loaded(tiny)[0], items, collator, callback, tmp_path, remove_unused_columns=False
        )
        if said is None:
            trainer.train()
        else:
            assert said in stopped(trainer)


def test_the_trainers_own_collator_is_caught(tiny, tmp_path):
    model, tokenizer, _ = loaded(tiny)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    callback = PreflightCallback(PoSECollator(POSE), report=lambda check: None)
    trainer = make_trainer(model, make_records(), collator, callback, tmp_path)
    assert "no position_ids in the trainer's batches" in stopped(trainer)


def test_a_set_of_short_records_is_caught(tiny, tmp_path):
    collator = PoSECollator(POSE)
    callback = PreflightCallback(collator, report=lambda check: None)
    trainer = make_trainer(loaded(tiny)[0], make_records(8, 40), collator, callback, tmp_path)
    assert "the longest has 40 tokens, and train_length is 64" in stopped(trainer)


def test_full_length_training_may_have_plain_positions(tiny, tmp_path):
    collator = PoSECollator(FullLength(target_length=T))
    callback = PreflightCallback(collator, report=lambda check: None)
    make_trainer(loaded(tiny)[0], make_records(), collator, callback, tmp_path).train()


@pytest.mark.parametrize("window", [L, T])
def test_a_model_that_was_not_rescaled_is_caught(tiny, tmp_path, window):
    """Also where only the length in its config was raised: the facts of the base tell."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.config.max_position_embeddings = window
    collator = PoSECollator(POSE)
    callback = PreflightCallback(collator, facts=loaded(tiny)[2], report=lambda check: None)
    said = stopped(make_trainer(model, make_records(), collator, callback, tmp_path))
    assert ("a window of 64 tokens" if window == L else "frequencies are those of the base") in said


def test_a_config_that_was_rescaled_after_loading_is_caught(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    scaled = loaded(tiny)[0].config
    model.config.rope_parameters = scaled.rope_parameters
    model.config.max_position_embeddings = T
    collator = PoSECollator(POSE)
    callback = PreflightCallback(collator, report=lambda check: None)
    assert "inv_freq is not yarn" in stopped(
        make_trainer(model, make_records(), collator, callback, tmp_path)
    )


class ForgetfulTrainer(Trainer):
    """Takes the mask out between the collator and the model, as packing trainers do."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs.pop("attention_mask")
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_a_trainer_that_takes_the_mask_out_after_the_collator_is_caught(tiny, tmp_path):
    collator = PoSECollator(POSE)
    callback = PreflightCallback(collator, report=lambda check: None)
    trainer = make_trainer(
        loaded(tiny)[0], make_records(), collator, callback, tmp_path, cls=ForgetfulTrainer
    )
    assert "attention_mask of the batch did not reach the model" in stopped(trainer)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_passes_and_is_left_as_it_was(tiny, tmp_path, reentrant):
    collator = PoSECollator(POSE)
    callback = PreflightCallback(collator, report=lambda check: None)
    model = loaded(tiny)[0]
    make_trainer(
        model,
        make_records(),
        collator,
        callback,
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    ).train()
    functions = [
        vars(module)["_gradient_checkpointing_func"]
        for module in model.modules()
        if "_gradient_checkpointing_func" in vars(module)
    ]
    assert functions and all(isinstance(f, partial) for f in functions)
    assert {f.keywords["use_reentrant"] for f in functions} == {reentrant}


def test_bfloat16_passes(tiny, tmp_path):
    collator = PoSECollator(POSE)
    callback = PreflightCallback(collator, report=lambda check: None)
    make_trainer(loaded(tiny)[0], make_records(), collator, callback, tmp_path, bf16=True).train()
    assert all(check.passed for check in callback.checks)


def test_lora_passes(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model

    model, _, facts = loaded(tiny)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    collator = PoSECollator(POSE)
    callback = PreflightCallback(collator, facts=facts, report=lambda check: None)
    make_trainer(model, make_records(), collator, callback, tmp_path).train()
    assert all(check.passed for check in callback.checks)


def test_qlora_passes(tiny, tmp_path):
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    scaled, _, facts = loaded(tiny)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        tiny, config=scaled.config, quantization_config=nf4
    )
    model = prepare_model_for_kbit_training(model)  # switches reentrant checkpointing on
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    collator = PoSECollator(POSE)
    callback = PreflightCallback(collator, facts=facts, report=lambda check: None)
    make_trainer(model, make_records(), collator, callback, tmp_path).train()
    assert all(check.passed for check in callback.checks)


def gemma(folder):
    """A tiny Gemma 2 whose sliding layers see 16 tokens, saved."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=L,
        sliding_window=16,
    )
    Gemma2ForCausalLM(config).save_pretrained(folder)
    return config


def test_a_hybrid_model_needs_its_config_in_the_collator_and_the_preflight_asks_for_it(tmp_path):
    from skipwise.models.scaling import scaled_config

    config = gemma(tmp_path)
    facts = facts_of(config)
    scaled = scaled_config(config, facts, Linear(factor=T / L), T)
    for own in (False, True):
        model = Gemma2ForCausalLM.from_pretrained(tmp_path, config=scaled)
        collator = PoSECollator(POSE, config=model.config if own else None)
        callback = PreflightCallback(collator, facts=facts, report=lambda check: None)
        trainer = make_trainer(model, make_records(), collator, callback, tmp_path / "out")
        if own:
            trainer.train()
            assert sliding_reach(model.config, collator(make_records(4))) < 16
        else:
            assert "send a mask for each kind of layer" in stopped(trainer)


def test_the_callback_says_what_it_needs():
    with pytest.raises(SkipwiseError, match="PoSECollator, or target_length"):
        PreflightCallback()
    with pytest.raises(SkipwiseError, match="PositionCollator, not a PoSECollator"):
        PreflightCallback(PositionCollator())  # type: ignore[arg-type]


# ---- the saved folder


def test_a_finished_folder_has_both_spellings_the_cache_and_the_tokenizers_length(tiny, tmp_path):
    import json

    model, tokenizer, _ = loaded(tiny)
    model.config.use_cache = False  # as a Trainer leaves it
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert finish_folder(str(tmp_path), T) == tmp_path
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["use_cache"] is True
    assert config["rope_scaling"]["rope_type"] == config["rope_parameters"]["rope_type"] == "yarn"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == T
    finish_folder(tmp_path, T)  # again: nothing more to do
    assert json.loads((tmp_path / "config.json").read_text()) == config
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("rope_type", ["linear", "ntk", "yarn", "llama3"])
def test_every_scaling_that_is_trained_finishes(tiny, tmp_path, rope_type):
    model, _, facts = load_scaled(str(tiny), T, rope_type=rope_type)
    model.save_pretrained(tmp_path)
    finish_folder(tmp_path, T)
    collator = PoSECollator(POSE)
    callback = PreflightCallback(collator, facts=facts, report=lambda check: None)
    make_trainer(model, make_records(), collator, callback, tmp_path / "out").train()


def test_an_adapter_and_a_base_are_not_finished(tiny, tmp_path):
    import shutil

    with pytest.raises(SkipwiseError, match=r"no config\.json"):
        finish_folder(tmp_path, T)
    shutil.copytree(tiny, tmp_path / "base")
    with pytest.raises(SkipwiseError, match="reaches 64 tokens, not 256"):
        finish_folder(tmp_path / "base", T)
    (tmp_path / "base" / "adapter_config.json").write_text("{}")
    with pytest.raises(SkipwiseError, match="merge_and_unload"):
        finish_folder(tmp_path / "base", T)


# ---- in TRL's SFTTrainer


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
    callback = PreflightCallback(collator, facts=facts, report=lambda check: None)
    make_sft(model, tokenizer, chats, tmp_path, collator, callback).train()
    records, batch = seen[-1]
    for record, labels in zip(records, batch["labels"], strict=True):
        answer = {t for t in record["labels"] if t != -100}
        kept = labels[labels != -100].tolist()
        assert kept and set(kept) <= answer and len(kept) < L / 2
