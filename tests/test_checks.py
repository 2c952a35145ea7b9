"""The preflight: each way to void a run is caught, and a sound run passes."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from skipwise.config.parse import dump_recipe, parse_recipe
from skipwise.config.recipe import LoRASettings, ModelSettings, Recipe
from skipwise.config.run_folder import RunFolder, write_text
from skipwise.errors import SkipwiseError, require
from skipwise.models.attention.masks import with_chunk_weights
from skipwise.models.hf_config import load_config, model_info_of
from skipwise.models.load import load_model
from skipwise.models.prepared import prepare_model
from skipwise.models.scaled_config import scaled_config, scaling_for
from skipwise.preflight.batch import check_batch, check_labels, check_tokenizer
from skipwise.preflight.config import check_config
from skipwise.preflight.model import check_model
from skipwise.training.inputs import dummy_data
from skipwise.training.setup import enable_checkpointing, set_up

T = 256


@pytest.fixture(scope="module")
def prepared(tiny):
    recipe = {"model": str(tiny), "target_length": T, "positions": {"content": "aligned"}}
    return prepare_model(parse_recipe(recipe))


@pytest.fixture(scope="module")
def model(prepared):
    return load_model(prepared.recipe.model, prepared.scaled, ModelSettings(), dtype=torch.float32)


@pytest.fixture
def batch(prepared):
    return make_batch(prepared)


def make_batch(prepared):
    data = dummy_data(prepared)
    return with_chunk_weights(data.collator(data.items(4)), torch.float32)


def passed(checks):
    return {check.name: check.passed for check in checks}


def test_a_sound_set_up_passes_every_check(prepared, model, batch):
    checks = check_config(prepared.info, prepared.scaling, T)
    checks += check_model(model, model.config, prepared.info, prepared.scaling, T)
    checks += check_batch(model, batch)
    checks += [check_tokenizer(prepared.tokenizer, prepared.info.vocab_size, batch)]
    checks += [check_labels(dummy_data(prepared).items(8))]
    assert all(passed(checks).values()), checks
    require(checks)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_dropped_mask_cuts_the_chunks_off_and_is_caught(
    prepared, batch, attention, checkpointing
):
    model = load_model(
        prepared.recipe.model,
        prepared.scaled,
        ModelSettings(),
        dtype=torch.float32,
        attn_implementation=attention,
    )
    if checkpointing:
        enable_checkpointing(model)
    assert passed(check_batch(model, batch))["chunks see each other"]
    del batch["attention_mask"]
    found = passed(check_batch(model, batch))
    assert found == {"chunks see each other": False, "no look ahead": True}
    with pytest.raises(SkipwiseError, match="attention_mask of ones"):
        require(check_batch(model, batch))


def test_importance_weights_pass_and_a_mask_that_is_not_causal_is_caught(prepared, model):
    recipe = dataclasses.replace(
        prepared.recipe,
        positions=dataclasses.replace(prepared.recipe.positions, key_weights="importance"),
    )
    batch = make_batch(dataclasses.replace(prepared, recipe=recipe))
    assert all(passed(check_batch(model, batch)).values())
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    assert not passed(check_batch(model, batch))["no look ahead"]


def test_unscaled_frequencies_are_caught(prepared):
    unscaled = LlamaForCausalLM.from_pretrained(prepared.recipe.model)
    unscaled.config.rope_parameters = prepared.scaled.rope_parameters  # too late: it is built
    found = passed(check_model(unscaled, unscaled.config, prepared.info, prepared.scaling, T))
    assert found == {"rope": False, "attention window": True, "positions": False}


def test_a_lost_attention_factor_is_caught(prepared):
    model = load_model(prepared.recipe.model, prepared.scaled, ModelSettings(), dtype=torch.float32)
    model.model.rotary_emb.attention_scaling = 1.0
    assert not passed(check_model(model, model.config, prepared.info, prepared.scaling, T))["rope"]


def test_frequencies_cast_to_bfloat16_are_caught_and_a_bfloat16_load_is_sound(prepared):
    cast = load_model(prepared.recipe.model, prepared.scaled, ModelSettings(), dtype=torch.float32)
    found = passed(check_model(cast.bfloat16(), cast.config, prepared.info, prepared.scaling, T))
    assert not found["rope"] and not found["positions"]
    loaded = load_model(
        prepared.recipe.model, prepared.scaled, ModelSettings(), dtype=torch.bfloat16
    )
    assert all(
        passed(check_model(loaded, loaded.config, prepared.info, prepared.scaling, T)).values()
    )


def test_a_sliding_window_that_hides_the_rest_is_taken_off_and_caught_where_left_on(tmp_path):
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        sliding_window=64,
        head_dim=16,
    )
    model = MistralForCausalLM(config)
    facts = model_info_of(config)
    assert facts.sliding_window == 64 and not facts.hybrid
    scaling = scaling_for(Recipe(model="-", target_length=T), facts)
    assert not passed(check_model(model, config, facts, scaling, T))["attention window"]
    scaled = scaled_config(config, facts, scaling, T)
    assert scaled.sliding_window is None and config.sliding_window == 64
    assert all(passed(check_model(MistralForCausalLM(scaled), scaled, facts, scaling, T)).values())


def test_a_label_after_a_jump_is_caught(prepared):
    items = dummy_data(prepared).items(8)
    jumped = next(item for item in items if item["example"].jumps().any())
    cut = int(jumped["example"].lengths[0])
    assert jumped["labels"][cut] == -100
    jumped["labels"][cut] = jumped["input_ids"][cut]
    assert not check_labels(items).passed


def test_another_models_tokenizer_is_caught(prepared, batch):
    assert not check_tokenizer(prepared.tokenizer, 1000, batch).passed


def test_an_added_token_without_a_row_is_allowed_while_no_text_holds_it(prepared, batch):
    size = len(prepared.tokenizer)
    tokenizer = copy.deepcopy(prepared.tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    unused = check_tokenizer(tokenizer, size, batch, lambda: size - 1)
    assert unused.passed
    assert f"no text holds [PAD] (id {size:,})" in unused.detail
    assert check_tokenizer(tokenizer, size, batch).passed  # what a trainer's callback can see
    used = check_tokenizer(tokenizer, size, batch, lambda: size)
    assert not used.passed
    assert f"the text holds [PAD] (id {size:,})" in used.detail
    assert f"resize_token_embeddings({size + 1})" in used.detail
    row = {**batch, "input_ids": torch.full_like(batch["input_ids"], size)}
    assert not check_tokenizer(tokenizer, size, row).passed
    assert check_tokenizer(tokenizer, size + 1, row).passed


def test_the_largest_token_of_the_text_decides_in_a_run(prepared, tmp_path):
    tokenizer = copy.deepcopy(prepared.tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    padded = dataclasses.replace(prepared, tokenizer=tokenizer)
    data = dummy_data(padded)
    assert data.corpus.largest_token() == data.corpus.stores[0].tokens.max() < len(tokenizer) - 1
    run = RunFolder(tmp_path)
    write_text(run.recipe_file, dump_recipe(padded.recipe))
    checks = {check.name: check for check in set_up(padded, data, run).checks}
    assert checks["tokenizer"].passed and "no text holds [PAD]" in checks["tokenizer"].detail
    data.corpus.stores[0].tokens[:] = len(tokenizer) - 1
    checks = {check.name: check for check in set_up(padded, data, run).checks}
    assert not checks["tokenizer"].passed and "the text holds [PAD]" in checks["tokenizer"].detail


def test_precision_is_not_judged_where_the_number_of_frequencies_differs(prepared, model):
    narrow = dataclasses.replace(prepared.info, rotary_dim=prepared.info.rotary_dim // 2)
    checks = check_model(model, prepared.scaled, narrow, prepared.scaling, T)
    assert [check.name for check in checks if not check.passed] == ["rope"]
    assert "frequencies, and the config says" in checks[0].detail
    assert "positions" not in {check.name for check in checks}


def test_a_factor_that_does_not_reach_the_target_is_caught(prepared):
    recipe = parse_recipe({"model": "-", "target_length": T, "rope": {"factor": 2}})
    assert not check_config(prepared.info, scaling_for(recipe, prepared.info), T)[0].passed


def test_weights_that_are_not_finite_are_caught(prepared, batch):
    model = load_model(prepared.recipe.model, prepared.scaled, ModelSettings(), dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))
    (first, *_) = check_batch(model, batch)
    assert not first.passed and "not finite" in first.detail


def test_the_check_leaves_the_model_as_it_was(prepared, model, batch):
    was = model.training
    check_batch(model, batch)
    assert model.training == was
    assert all(p.grad is None for p in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


def test_folders_that_are_no_models_say_what_they_are(tmp_path):
    with pytest.raises(SkipwiseError, match="no such folder"):
        load_config("./nowhere", ModelSettings())
    with pytest.raises(SkipwiseError, match=r"no config\.json"):
        load_config(str(tmp_path), ModelSettings())
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SkipwiseError, match="LoRA adapter"):
        load_config(str(tmp_path), ModelSettings())
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(SkipwiseError, match="not JSON"):
        load_config(str(tmp_path), ModelSettings())


def test_weights_that_are_not_safetensors_or_missing_are_refused(tiny, tmp_path, prepared):
    import shutil

    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SkipwiseError, match=r"load\.use_safetensors=false to read it"):
        load_model(str(folder), prepared.scaled, ModelSettings(), dtype=torch.float32)
    (folder / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(SkipwiseError, match="could not be loaded"):
        load_model(str(folder), prepared.scaled, ModelSettings(), dtype=torch.float32)


def test_lora_trains_norms_and_embeddings_in_float32_and_passes(prepared, batch):
    from skipwise.models.lora import add_lora

    base = load_model(prepared.recipe.model, prepared.scaled, ModelSettings(), dtype=torch.bfloat16)
    model = add_lora(base, LoRASettings(rank=4))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("embed_tokens" in n for n in trained) and any("layernorm" in n for n in trained)
    assert any("lora_A" in n for n in trained) and not any("lm_head" in n for n in trained)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all(
        passed(check_batch(model, batch, lambda: torch.autocast("cpu", torch.bfloat16))).values()
    )


def test_the_tokenizer_of_the_plan_is_the_models(prepared, tiny):
    assert len(prepared.tokenizer) == len(AutoTokenizer.from_pretrained(tiny)) == 1024
    assert np.isclose(prepared.scaling.factor, T / 64)
