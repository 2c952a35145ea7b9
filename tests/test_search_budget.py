"""A search costs at most 3 % of the training, or two minutes; what it measures shrinks to that."""

import dataclasses
import json

import pytest
import torch

from skipwise.config.parse import parse_recipe
from skipwise.models.prepared import prepare_model
from skipwise.pipeline import choose_scaling, choose_temperature, search
from skipwise.pipeline.search import Search, fit_search, flops_per_second
from skipwise.planning.architecture import read_architecture
from skipwise.planning.flops import forward_flops

LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}
N = 32 * (4 * 4096**2 + 3 * 4096 * 11008)  # weights that multiply each token, without the head
CONTEXTS = (4096, 8192, 16384, 32768)


@pytest.fixture
def large(tiny, tmp_path, monkeypatch):
    """A 7 B model from 4k to 32k on an H100: its config, and a tokenizer."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    prepared = prepare_model(parse_recipe({"model": str(tiny), "target_length": 256}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")

    def make(num_steps):
        tree = {"model": str(tmp_path), "target_length": 32768, "distillation": {"weight": 0}}
        training = {"num_steps": num_steps, "global_batch_size": 16}
        recipe = parse_recipe({**tree, "training": training})
        info = dataclasses.replace(prepared.info, original_length=4096, vocab_size=32000)
        return dataclasses.replace(prepared, recipe=recipe, info=info)

    return make


def cost(lengths, windows, candidates, passes, trials=0.0):
    """By hand: 2 operations a weight, and 2 x 2 d a key that a token sees, T / 2 of them."""
    one = [c * (2 * N + 32 * 4 * 4096 * c / 2) for c in lengths]
    return candidates * windows * (passes * sum(one) + trials * one[-1])


def test_operations_of_a_forward_pass_are_those_by_hand():
    architecture = read_architecture(LLAMA_7B)
    assert forward_flops(architecture, 8192) == pytest.approx(cost([8192], 1, 1, 1))


def test_a_long_training_pays_for_the_whole_search(large):
    found = fit_search(large(2000), CONTEXTS, 8, num_candidates=4, passes=3, trials=1.25)
    assert found == Search(contexts=CONTEXTS, num_windows=8, num_candidates=4)
    tokens = 2000 * 16 * 4096
    assert cost(CONTEXTS, 8, 4, 3, 1.25) <= 0.03 * tokens * 6 * N  # attention comes on top


def test_a_short_training_pays_for_a_part_that_fits_two_minutes(large):
    prepared, two_minutes = large(20), 120 * 0.4 * 989e12
    assert flops_per_second() == 0.4 * 989e12
    tokens = 20 * 16 * 4096
    assert 0.03 * tokens * 8 * (N + 4096 * 32000) < two_minutes  # so these decide
    found = fit_search(prepared, CONTEXTS, 8, num_candidates=4, passes=3, trials=1.25)
    note = (
        "4 windows of up to 16,384 tokens, within the larger of 3 % of the training and 2 minutes"
    )
    assert found == Search(contexts=(4096, 16384), num_windows=4, num_candidates=4, note=note)
    assert cost((4096, 16384), 4, 4, 3, 1.25) <= two_minutes < cost((4096, 32768), 4, 4, 3, 1.25)
    again = fit_search(prepared, CONTEXTS, 8, num_candidates=4, passes=3, trials=1.25)
    assert again == found  # arithmetic alone: no clock


def test_a_longer_training_never_measures_less(large):
    before = 0.0
    for steps in (1, 10, 100, 300, 1000, 3000):
        found = fit_search(large(steps), CONTEXTS, 8, num_candidates=4, passes=3, trials=1.25)
        own = cost(found.contexts, found.num_windows, found.num_candidates, 3, 1.25)
        assert own >= before
        before = own


def test_what_no_reduction_makes_cheap_enough_is_not_measured(large, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(search, "num_cores", lambda: 2)
    assert flops_per_second() * 120 < cost((4096, 8192), 2, 2, 3, 1.25)
    for steps, candidates in ((20, None), (30, 2), (40, 3), (50, 4)):
        found = fit_search(large(steps), CONTEXTS, 8, num_candidates=4, passes=3, trials=1.25)
        least = found and (found.contexts, found.num_windows, found.num_candidates)
        assert least == (candidates and ((4096, 8192), 2, candidates))
    assert fit_search(large(50), CONTEXTS, 8, passes=9, quick=True) is None


def test_a_tiny_models_searches_are_whole_on_one_core(tiny, monkeypatch):
    monkeypatch.setattr(search, "num_cores", lambda: 1)
    tree = {"model": str(tiny), "target_length": 256, "method": "none"}
    prepared = prepare_model(parse_recipe(tree))
    assert flops_per_second() == 5e10
    found = fit_search(prepared, (64, 128, 256), 8, num_candidates=4, passes=3, trials=1.25)
    assert found == Search(contexts=(64, 128, 256), num_windows=8, num_candidates=4)
    assert fit_search(prepared, (64,), 8, passes=5, quick=True).num_windows == 8


def test_the_searches_measure_what_the_budget_leaves(tiny, text_folder, tmp_path, monkeypatch):
    from skipwise.config.run_folder import RunFolder

    tree = {"model": str(tiny), "target_length": 256, "data": {"sources": [str(text_folder)]}}
    prepared, run = prepare_model(parse_recipe(tree)), RunFolder(tmp_path)
    asked = []

    def perplexity(model, documents, contexts, *, num_windows, **more):
        asked.append((tuple(contexts), num_windows))
        return [{"value": 9.0 - len(asked) / 100} for _ in contexts]

    monkeypatch.setattr(search, "flops_per_second", lambda: 0.0)
    monkeypatch.setattr(search, "_SHARE", 1e-3)
    monkeypatch.setattr(choose_scaling, "perplexity", perplexity)
    monkeypatch.setattr(choose_temperature, "perplexity", perplexity)
    entry = choose_scaling._measure(prepared)
    assert set(asked) == {((64, 256), 4)} and entry["measured"][0]["num_passkeys"] <= 5
    assert {"context_lengths": (64, 256), "num_windows": 4}.items() <= entry.items()
    assert "; 4 windows of up to 256 tokens" in entry["detail"]
    asked.clear()
    monkeypatch.setattr(search, "_SHARE", 1e-3 * 6 / 9)  # it measures 6 of the grid's 9
    entry = choose_temperature._search_of_run(prepared, run, None, None)
    assert set(asked) == {((64, 128), 16)}
    assert {"context_lengths": [64, 128], "num_windows": 16}.items() <= entry.items()
    assert "; 16 windows of up to 128 tokens" in entry["detail"]
    monkeypatch.setattr(search, "_SHARE", 0.0)
    assert "not measured: it costs more than 3 %" in choose_scaling._measure(prepared)["detail"]
    entry = choose_temperature._search_of_run(prepared, run, None, None)
    assert entry == {"value": 1.0, "detail": f"not searched, because {search.TOO_MUCH}"}
