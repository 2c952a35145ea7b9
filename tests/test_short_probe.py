"""Without a GPU `skipwise check` probes a short batch, which finds what a full one finds."""

import copy

import pytest
import torch
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from skipwise.config.parse import dump_recipe, parse_recipe
from skipwise.config.run_folder import RunFolder, write_text
from skipwise.models.attention.masks import with_chunk_weights, with_layer_masks
from skipwise.models.load import load_model
from skipwise.models.prepared import prepare_model
from skipwise.pipeline.checks import check
from skipwise.pipeline.quickstart import MODEL
from skipwise.preflight.batch import check_batch
from skipwise.preflight.model import check_model
from skipwise.training.inputs import dummy_data, with_short_probe
from skipwise.training.setup import set_up

L, T = 1024, 4096
SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": L,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=512)),
    "gemma-64": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, **SLIDING, sliding_window=64)),
    "gemma-512": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SHAPE, **SLIDING, sliding_window=512)
    ),
    "moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SHAPE, num_experts=16, num_experts_per_tok=1, moe_intermediate_size=16)
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        made[name] = tmp_path_factory.mktemp(name)
        make().save_pretrained(made[name])
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(made[name])
    return made


def recipe_of(folder, *overrides):
    return parse_recipe({"model": str(folder), "target_length": T}, list(overrides))


def parts(folder, short, *overrides):
    """(the prepared model, its weights, the batch that is probed)"""
    prepared = prepare_model(recipe_of(folder, "positions.key_weights=none", *overrides))
    data = dummy_data(prepared)
    data = with_short_probe(data) if short else data
    model = load_model(str(folder), prepared.scaled, prepared.load, dtype=torch.float32)
    batch = with_chunk_weights(data.probe_batch(), torch.float32)
    return prepared, model, with_layer_masks(model.config, batch)


def passed(checks):
    return {check.name: check.passed for check in checks}


both = pytest.mark.parametrize("short", [False, True])


@both
@pytest.mark.parametrize("name", MODELS)
def test_a_sound_model_of_each_kind_passes(folders, name, short):
    _, model, batch = parts(folders[name], short)
    assert batch["input_ids"].shape == (1, 256 if short else L)
    assert L < int(batch["position_ids"].max()) < T
    found = passed(check_batch(model, batch))
    assert all(found.values())
    assert ("sliding layers" in found) == name.startswith("gemma")


@both
@pytest.mark.parametrize("name", ["llama", "moe"])
def test_chunks_that_a_missing_mask_separates_are_caught(folders, name, short):
    _, model, batch = parts(folders[name], short)
    del batch["attention_mask"]
    assert not passed(check_batch(model, batch))["chunks see each other"]


@both
def test_a_mask_that_is_not_causal_is_caught(folders, short):
    _, model, batch = parts(folders["llama"], short)
    batch["attention_mask"] = torch.zeros(1, 1, *[batch["input_ids"].shape[1]] * 2)
    assert not passed(check_batch(model, batch))["no look ahead"]


@both
def test_positions_that_do_not_reach_the_layers_are_caught(folders, short, monkeypatch):
    _, model, batch = parts(folders["llama"], short)
    rotate = model.model.rotary_emb.forward
    plain = torch.arange(batch["input_ids"].shape[1])[None]
    monkeypatch.setattr(model.model.rotary_emb, "forward", lambda x, **_: rotate(x, plain))
    assert not passed(check_batch(model, batch))["skips take effect"]


@both
@pytest.mark.parametrize("name", ["gemma-64", "gemma-512"])  # shorter and longer than the batch
def test_windows_that_count_tokens_are_caught(folders, name, short):
    _, model, batch = parts(folders[name], short)
    del batch["attention_mask"]
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    assert not passed(check_batch(model, batch))["sliding layers"]


@both
def test_a_window_left_on_in_every_layer_is_caught(folders, short):
    prepared, _, _ = parts(folders["mistral"], short)
    config = copy.deepcopy(prepared.scaled)
    config.sliding_window = 512
    model = load_model(str(folders["mistral"]), config, prepared.load, dtype=torch.float32)
    found = check_model(model, config, prepared.info, prepared.scaling, T)
    assert not passed(found)["attention window"]


@both
@pytest.mark.parametrize("where", ["mlp", "lm_head", "one expert"])
def test_weights_that_are_not_finite_are_caught(folders, short, where, tmp_path):
    """Also those of an expert to which no token of the batch goes."""
    folder = tmp_path / "broken"
    model = MODELS["moe" if where == "one expert" else "llama"]()
    names = {"mlp": "layers.0.mlp.up_proj", "lm_head": "lm_head", "one expert": "gate_up_proj"}
    for name, parameter in model.named_parameters():
        if names[where] in name:
            parameter.data[3] = torch.inf
    if where == "one expert":
        for layer in model.model.layers:
            layer.mlp.gate.weight.data.zero_()  # all tokens go to the same one
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    prepared = prepare_model(recipe_of(folder))
    data = dummy_data(prepared)
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    write_text(run.recipe_file, dump_recipe(prepared.recipe))
    checks = set_up(prepared, with_short_probe(data) if short else data, run).checks
    found = [one for one in checks if not one.passed]
    assert any("finite" in one.detail for one in found), found


def test_a_short_probe_has_the_methods_of_the_run(folders):
    for override in ("method=randpos", "method=cream", "positions.num_chunks=80"):
        prepared = prepare_model(recipe_of(folders["llama"], override))
        data = with_short_probe(dummy_data(prepared))
        positions = data.probe_batch()["position_ids"][0]
        assert len(positions) == data.probe_length == (320 if "80" in override else 256)
        assert bool((positions.diff() > 0).all()) and L < int(positions[-1]) < T
    prepared = prepare_model(recipe_of(folders["llama"], "method=full"))
    data = dummy_data(prepared)
    assert with_short_probe(data) is data


def test_check_says_what_it_probed_and_what_auto_will_measure(folders):
    found = {one.name: one.detail for one in check(recipe_of(folders["llama"]))}
    assert found["probed"].startswith("256 tokens with positions up to 4,095")
    assert "training probes 1,024" in found["probed"]
    assert "scaled by 4" in found["lengths"]
    assert found["rope.type"].startswith("auto: extend will measure yarn, llama3, ntk and linear")
    assert found["attention_temperature"].startswith("auto: extend will search 1 to 1.4")
    assert found["separator"].split(", auto: ")[1].startswith("extend will measure")
    found = {
        one.name: one.detail
        for one in check(
            recipe_of(
                folders["llama"], "rope.type=ntk", "attention_temperature=1.1", "data.separator=eos"
            )
        )
    }
    assert "ntk by 4" in found["lengths"]
    assert not {"rope.type", "attention_temperature"} & found.keys()
    assert "auto" not in found["separator"]
