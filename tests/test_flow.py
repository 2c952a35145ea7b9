"""What is done once in a run: each count is of the work itself, not of a wrapper around it."""

import pytest

from skipwise.config.parse import parse_recipe
from skipwise.errors import SkipwiseError
from skipwise.models import prepared as prepared_module
from skipwise.models.prepared import prepare_model, rescale
from skipwise.pipeline.checks import validate
from skipwise.pipeline.extend import extend
from skipwise.training import full_length_stage, inputs


def counted(monkeypatch, module, name):
    calls, plain = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: (calls.append(1), plain(*a, **k))[1])
    return calls


@pytest.mark.extended
def test_a_default_extend_prepares_the_model_once_and_loads_the_data_once(
    tiny, text_folder, tmp_path, monkeypatch
):
    """With both searches, of the scaling and of the temperature, and a stage at full length."""
    configs = counted(monkeypatch, prepared_module, "config_of")
    tokenizers = counted(monkeypatch, prepared_module, "load_tokenizer")
    corpora = counted(monkeypatch, inputs, "build_corpus")
    stages = counted(monkeypatch, full_length_stage, "full_length_stage")
    tree = {
        "model": str(tiny),
        "target_length": 128,
        "data": {"sources": [str(text_folder)]},
        "training": {"num_steps": 10, "global_batch_size": 4, "micro_batch_size": 4},
        "full_length": {"fraction": 0.2},
        "eval": {"tasks": []},
    }
    run = extend(parse_recipe(tree, ["eval.tasks=[passkey]", "eval.passkey_samples=1"]), tmp_path)
    metadata = run.metadata()
    assert "measured" in metadata["rope_choice"] and "searched" in metadata["temperature"]
    assert metadata["finish"]["num_steps"] == 2  # a fifth of 10
    assert [len(calls) for calls in (configs, tokenizers, corpora, stages)] == [1, 1, 1, 1]


def test_a_rescaled_model_is_the_one_prepared_with_that_scaling(tiny):
    tree = {"model": str(tiny), "target_length": 256, "data": {"sources": ["-"]}}
    first = prepare_model(parse_recipe(tree, ["method=none"]))
    for name in ("linear", "ntk", "llama3", "yarn"):
        mine = rescale(first, name)
        want = prepare_model(parse_recipe(tree, ["method=none", f"rope.type={name}"]))
        assert mine.scaling == want.scaling and mine.recipe == want.recipe
        assert mine.scaled.to_dict() == want.scaled.to_dict()
    assert first.scaled.rope_parameters["rope_type"] == "yarn"  # unchanged by the others


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.global_batch_size=3"], "not a multiple"),
        (["data.sources=[nowhere.txt]"], "nowhere.txt"),
        (["full_length.fraction=0.001"], "fewer tokens"),
        (["target_length=32"], "not longer"),
        (["positions.num_chunks=65"], "1 .. 64 chunks"),
    ],
)
def test_every_mistake_shows_before_anything_is_written(
    tiny, text_folder, tmp_path, overrides, words
):
    tree = {
        "model": str(tiny),
        "target_length": 128,
        "data": {"sources": [str(text_folder)]},
        "training": {"num_steps": 4, "global_batch_size": 4, "micro_batch_size": 2},
    }
    recipe = parse_recipe(tree, overrides)
    with pytest.raises(SkipwiseError, match=words):
        validate(recipe)
    with pytest.raises(SkipwiseError, match=words):
        extend(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
