"""The preflight in other trainers: each fault that it stops a Trainer at."""

from functools import partial

import numpy as np
import pytest
import torch
from other_trainers import POSE, L, T, loaded, make_records, make_trainer, stopped
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    Gemma2Config,
    Gemma2ForCausalLM,
    Trainer,
)

from skipwise import FullLength, PoSECollator, SkipwiseError
from skipwise.data.collator import ExampleCollator
from skipwise.integrations.preflight_callback import PreflightCallback, finalize_checkpoint
from skipwise.models.attention.masks import sliding_reach
from skipwise.models.hf_config import model_info_of
from skipwise.models.prepared import load_scaled
from skipwise.pose.rope import Linear


def test_a_sound_run_reports_every_check_and_draws_new_skips_each_epoch(tiny, tmp_path):
    model, _, facts = loaded(tiny)
    seen = []

    class Watching(PoSECollator):
        def __call__(self, records):
            batch = super().__call__(records)
            seen.append((self.epoch, batch["position_ids"][0].tolist()))
            return batch

    collator = Watching(POSE)
    callback = PreflightCallback(collator, info=facts, report=lambda check: None)
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
        "that the collator masks are not masked in the batch",
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


def test_a_collator_that_makes_new_labels_is_caught_by_the_data_sets_own_examples(tiny, tmp_path):
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

    def relabelled(rows):
        batch = ExampleCollator()(rows)
        return {**batch, "labels": batch["input_ids"].clone()}

    for collator, said in (
        (ExampleCollator(), None),
        (relabelled, "right after a gap in the text"),
    ):
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
    callback = PreflightCallback(collator, info=loaded(tiny)[2], report=lambda check: None)
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
    callback = PreflightCallback(collator, info=facts, report=lambda check: None)
    make_trainer(model, make_records(), collator, callback, tmp_path).train()
    assert all(check.passed for check in callback.checks)


@pytest.mark.extended
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
    callback = PreflightCallback(collator, info=facts, report=lambda check: None)
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
    from skipwise.models.scaled_config import scaled_config

    config = gemma(tmp_path)
    facts = model_info_of(config)
    scaled = scaled_config(config, facts, Linear(factor=T / L), T)
    for own in (False, True):
        model = Gemma2ForCausalLM.from_pretrained(tmp_path, config=scaled)
        collator = PoSECollator(POSE, config=model.config if own else None)
        callback = PreflightCallback(collator, info=facts, report=lambda check: None)
        trainer = make_trainer(model, make_records(), collator, callback, tmp_path / "out")
        if own:
            trainer.train()
            assert sliding_reach(model.config, collator(make_records(4))) < 16
        else:
            assert "send a mask for each layer type" in stopped(trainer)


def test_the_callback_says_what_it_needs():
    with pytest.raises(SkipwiseError, match="PoSECollator, or target_length"):
        PreflightCallback()
    with pytest.raises(SkipwiseError, match="ExampleCollator, not a PoSECollator"):
        PreflightCallback(ExampleCollator())  # type: ignore[arg-type]


# ---- the saved folder


def test_a_finished_folder_has_both_spellings_the_cache_and_the_tokenizers_length(tiny, tmp_path):
    import json

    model, tokenizer, _ = loaded(tiny)
    model.config.use_cache = False  # as a Trainer leaves it
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert finalize_checkpoint(str(tmp_path), T) == tmp_path
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["use_cache"] is True
    assert config["rope_scaling"]["rope_type"] == config["rope_parameters"]["rope_type"] == "yarn"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == T
    finalize_checkpoint(tmp_path, T)  # again: nothing more to do
    assert json.loads((tmp_path / "config.json").read_text()) == config
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("rope_type", ["linear", "ntk", "yarn", "llama3"])
def test_every_scaling_that_is_trained_finishes(tiny, tmp_path, rope_type):
    model, _, facts = load_scaled(str(tiny), T, rope_type=rope_type)
    model.save_pretrained(tmp_path)
    finalize_checkpoint(tmp_path, T)
    collator = PoSECollator(POSE)
    callback = PreflightCallback(collator, info=facts, report=lambda check: None)
    make_trainer(model, make_records(), collator, callback, tmp_path / "out").train()


def test_an_adapter_and_a_base_are_not_finished(tiny, tmp_path):
    import shutil

    with pytest.raises(SkipwiseError, match=r"no config\.json"):
        finalize_checkpoint(tmp_path, T)
    shutil.copytree(tiny, tmp_path / "base")
    with pytest.raises(SkipwiseError, match="a window of 64 tokens, not 256"):
        finalize_checkpoint(tmp_path / "base", T)
    (tmp_path / "base" / "adapter_config.json").write_text("{}")
    with pytest.raises(SkipwiseError, match="merge_and_unload"):
        finalize_checkpoint(tmp_path / "base", T)
