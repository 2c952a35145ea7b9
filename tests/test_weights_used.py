"""Weights and config.json that do not belong together; odd values in the JSON of a run."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from skipwise.config.recipe import ModelSettings
from skipwise.config.run_folder import RunFolder
from skipwise.errors import SkipwiseError
from skipwise.models.hf_config import load_config
from skipwise.models.load import build_without_weights, load_model
from skipwise.report.load import read_rows, read_run


@pytest.fixture
def model(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "m")


def load(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    config = AutoConfig.from_pretrained(folder)
    return load_model(str(folder), config, ModelSettings(), dtype=torch.float32)


def add_weights(folder, without=(), **tensors):
    file = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if name not in without}
    save_file({**kept, **tensors}, file, metadata={"format": "pt"})


def test_layers_that_the_config_leaves_out_are_named(model):
    with pytest.raises(SkipwiseError, match=r"9 tensors .* does not use, e\.g\. model\.layers\.1"):
        load(model, num_hidden_layers=1)


def test_so_is_a_bias_but_no_old_buffer_and_no_other_modality(model):
    place = "model.layers.0.self_attn"
    add_weights(model, **{f"{place}.rotary_emb.inv_freq": torch.ones(8)})
    add_weights(model, **{"vision_tower.layers.0.fc.weight": torch.ones(8)})
    load(model)
    second = {"model.layers.2.enorm.weight": torch.ones(32)}
    second |= {"model.layers.2.mlp.up_proj.weight": torch.ones(64, 32)}
    add_weights(model, **second)  # a layer that predicts a second token
    load(model)
    add_weights(model, without=second, **{f"{place}.q_proj.bias": torch.ones(32)})
    with pytest.raises(SkipwiseError, match=r"1 tensors .*q_proj\.bias"):
        load(model)


@pytest.mark.parametrize("changes", [{"vocab_size": 2000}, {"intermediate_size": 32}])
def test_shapes_that_are_not_the_configs_are_told(model, changes):
    with pytest.raises(SkipwiseError, match="their shapes are not those of its"):
        load(model, **changes)


def test_why_a_config_is_refused_is_told_to_the_end(model):
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": [1]}))
    with pytest.raises(SkipwiseError, match=r"'rms_norm_eps': \S+"):
        load_config(str(model), ModelSettings())


def test_an_output_layer_that_the_config_ties_is_named(model):
    with pytest.raises(SkipwiseError, match="set tie_word_embeddings to false"):
        load(model, tie_word_embeddings=True)


@pytest.mark.parametrize("changes", [{"hidden_act": "nope"}, {"base_model_tp_plan": 3}])
def test_a_config_that_no_model_can_be_built_from_is_an_error(model, changes):
    config = AutoConfig.from_pretrained(model)
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(SkipwiseError, match="no model can be built from this"):
        build_without_weights(config, ModelSettings())
    with pytest.raises(SkipwiseError, match="no model can be built from this"):
        build_without_weights(config, ModelSettings(attn_implementation="eager"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("checks", [-1]),
        ("checks", [{"name": "x"}]),
        ("exported_files", {"a": 1}),
        ("files", [[]]),
        ("gguf_files", {"a.gguf": []}),
        ("identity", {"base": []}),
        ("card_files", [None]),
        ("target_length", "1"),
        ("target_length", [1]),
        ("stages", {"train": [None]}),
    ],
)
def test_an_odd_value_of_run_json_is_named(tmp_path, key, value):
    (tmp_path / "run.json").write_text(
        json.dumps({"exported_files": {"a": [1, ""]}, "checks": None, key: value})
    )
    for read in (read_run, lambda folder: RunFolder(folder).metadata()):
        with pytest.raises(SkipwiseError, match=f"has {key}: "):
            read(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("high", [[]]), ("low", [1]), ("metric", -1), ("text", [None]), ("model", 0), ("task", None)],
)
def test_so_is_one_of_a_row(tmp_path, key, value):
    row = {"model": "m", "task": "t", "metric": "x", "value": 1.0, "low": None}
    file = tmp_path / "results.json"
    file.write_text(json.dumps([row]))
    assert read_rows(tmp_path) == RunFolder(tmp_path).results() == [row]
    file.write_text(json.dumps([{**row, key: value}]))
    with pytest.raises(SkipwiseError, match=f"has a wrong {key}"):
        read_rows(tmp_path)
    with pytest.raises(SkipwiseError, match="has no result rows"):
        RunFolder(tmp_path).results()
