"""Checkpoint choice: the best of the saved ones is exported, by what was asked for."""

import json

import pytest
import torch
from safetensors.torch import load_file

from skipwise import select
from skipwise.errors import SkipwiseError
from skipwise.extend import extend
from skipwise.recipe import parse_recipe
from skipwise.run import RunFolder


def make_recipe(tiny, text_folder, *overrides):
    tree = {
        "model": str(tiny),
        "target_length": 256,
        "load": {"dtype": "float32"},
        "data": {"sources": [str(text_folder)]},
        "training": {
            "num_steps": 6,
            "global_batch_size": 2,
            "batch_size": 2,
            "learning_rate": 1e-3,
            "save_steps": 2,
            "save_total_limit": 2,
        },
        "eval": {"tasks": ["perplexity"], "perplexity_windows": 2, "select": "passkey"},
    }
    return parse_recipe(tree, list(overrides))


def weights(folder):
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor.float() for name, tensor in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scores", "chosen"),
    [({2: 0.2, 4: 0.9, 6: 0.5}, 4), ({2: 0.7, 4: 0.7, 6: 0.1}, 4), ({2: 0, 4: 0, 6: 0}, 6)],
)
def test_the_best_checkpoint_is_exported_and_of_equals_the_latest(
    scores, chosen, tiny, text_folder, tmp_path, monkeypatch
):
    kept = {}

    def score(plan, run, folder):
        step = int(folder.name.split("-")[1])
        kept[step] = weights(folder)
        return scores[step]

    monkeypatch.setattr(select, "_score", score)
    run = extend(make_recipe(tiny, text_folder), tmp_path / "run")
    # the Trainer keeps two checkpoints, and all three were there to choose from
    assert sorted(kept) == [2, 4, 6] and len(list(run.checkpoints.glob("checkpoint-*"))) == 2
    exported = weights(run.model)
    assert all(torch.equal(exported[name], kept[chosen][name]) for name in exported)
    other = next(step for step in kept if step != chosen)
    assert any(not torch.equal(exported[name], kept[other][name]) for name in exported)
    selection = run.facts()["selection"]
    assert selection["chosen"] == chosen and selection["higher_is_better"]
    assert [c["score"] for c in selection["candidates"]] == [scores[2], scores[4], scores[6]]
    assert [f.name for f in run.candidates.iterdir()] == [f"step-{chosen}"]


@pytest.mark.slow
@pytest.mark.parametrize("by", ["needles", "perplexity"])
def test_candidates_are_measured_once_and_a_kill_between_loses_nothing(
    by, tiny, text_folder, tmp_path, monkeypatch
):
    real, measured = select._score, []

    def interrupted(plan, run, folder):
        if len(measured) == 2:
            measured.append("killed")
            raise KeyboardInterrupt
        measured.append(folder.name)
        return real(plan, run, folder)

    monkeypatch.setattr(select, "_score", interrupted)
    recipe = make_recipe(tiny, text_folder, f"eval.select={by}")
    with pytest.raises(KeyboardInterrupt):
        extend(recipe, tmp_path / "run")
    run = extend(recipe, tmp_path / "run")
    assert measured == ["step-2", "step-4", "killed", "step-6"]
    selection = run.facts()["selection"]
    scores = {c["step"]: c["score"] for c in selection["candidates"]}
    assert len(scores) == 3 and all(score >= 0 for score in scores.values())
    if by == "perplexity":
        assert selection["chosen"] == min(scores, key=lambda s: (scores[s], -s))
        assert 1 < min(scores.values()) < 3000
    page = (run.report / "index.html").read_text()
    assert "chosen" in page


@pytest.mark.slow
def test_lora_candidates_are_adapters(tiny, text_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(select, "_score", lambda plan, run, folder: -int(folder.name[5:]))
    run = extend(make_recipe(tiny, text_folder, "lora.rank=2"), tmp_path / "run")
    assert run.facts()["selection"]["chosen"] == 2
    (folder,) = run.candidates.iterdir()
    assert (folder / "adapter_model.safetensors").exists()
    config = json.loads((run.model / "config.json").read_text())
    assert config["model_type"] == "llama"


def test_a_choice_that_needs_text_is_refused_before_training(tiny, tmp_path):
    recipe = parse_recipe({"model": str(tiny), "target_length": 256, "eval": {"select": "needles"}})
    with pytest.raises(SkipwiseError, match=r"needs evaluation text.*\ntype"):
        select.check_selection(recipe, [])
    select.check_selection(recipe, [torch.zeros(10).numpy()])
    by_loss = parse_recipe(
        {"model": str(tiny), "target_length": 256, "eval": {"select": "perplexity"}}
    )
    with pytest.raises(SkipwiseError, match="of 256 tokens"):
        select.check_selection(by_loss, [torch.zeros(10).numpy()])


def test_without_a_choice_nothing_is_kept(tiny, text_folder, tmp_path):
    run = extend(make_recipe(tiny, text_folder, "eval.select=last"), tmp_path / "run")
    assert not RunFolder(run.path).candidates.exists() and "selection" not in run.facts()
