"""rope.type: auto is measured before training, once, and only a clear gain leaves YaRN."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from skipwise.config.parse import dump_recipe, parse_recipe
from skipwise.config.progress import Progress
from skipwise.config.run_folder import RunFolder, write_text
from skipwise.errors import SkipwiseError
from skipwise.models import load
from skipwise.models.prepared import prepare_model
from skipwise.pipeline import choose_scaling as scaling_module
from skipwise.pipeline.choose_scaling import choose_scaling, with_chosen_scaling
from skipwise.pipeline.search import Search
from skipwise.pipeline.stages import export_again
from skipwise.training.checkpoints import mark_complete


@pytest.fixture
def made(tiny, text_folder, tmp_path):
    """A plan and its run folder."""

    def make(*overrides):
        data = {"sources": [str(text_folder)]}
        tree = {"model": str(tiny), "target_length": 256, "data": data}
        recipe = parse_recipe(tree, list(overrides))
        run = RunFolder(tmp_path / "run")
        run.path.mkdir(exist_ok=True)
        write_text(run.recipe_file, dump_recipe(recipe))
        return prepare_model(recipe), run

    return make


BAR = Progress("measure scalings", None, shown=False)


def search(*contexts):
    return Search(contexts=contexts, num_windows=8, num_candidates=4)


def measured(monkeypatch, losses):
    """What is measured of each scaling is given; the names that were asked for are returned."""
    asked = []

    def of_one(prepared, name, documents, search, bar, best_loss):
        asked.append((name, [len(d) for d in documents], list(search.contexts)))
        if isinstance(losses[name], Exception):
            raise losses[name]
        row = {"type": name, "temperature": 1.0, "loss": losses[name], "perplexity": []}
        return {**row, "passkeys": 0, "num_passkeys": 0}

    monkeypatch.setattr(scaling_module, "_of_one", of_one)
    return asked


def test_the_lowest_loss_is_taken_stored_and_not_measured_again(made, monkeypatch, capsys):
    asked = measured(monkeypatch, {"yarn": 2.0, "llama3": 1.9, "ntk": 1.95, "linear": 4.0})
    prepared, run = made()
    assert prepared.scaling.name == "yarn"
    chosen = choose_scaling(prepared, run)
    assert [name for name, *_ in asked] == ["yarn", "llama3", "ntk", "linear"]
    assert all(min(lengths) >= 256 for _, lengths, _ in asked)
    assert asked[0][2] == [64, 128, 256]
    assert chosen.scaling.name == chosen.recipe.rope.type == "llama3"
    assert chosen.scaled.rope_parameters["rope_type"] == "llama3"
    assert "llama3" in capsys.readouterr().err
    facts = json.loads((run.path / "run.json").read_text())["rope_choice"]
    assert facts["type"] == "llama3" and len(facts["measured"]) == 4
    assert choose_scaling(prepared, run).scaling.name == "llama3" and len(asked) == 4
    assert with_chosen_scaling(prepared, run).recipe.rope.type == "llama3"


def test_a_gain_within_the_noise_leaves_yarn(made, monkeypatch):
    measured(monkeypatch, {"yarn": 2.0, "llama3": 1.995, "ntk": 2.1, "linear": 4.0})
    prepared, run = made()
    assert choose_scaling(prepared, run).scaling.name == "yarn"


@pytest.mark.parametrize(
    ("overrides", "name"), [(["rope.type=linear"], "linear"), (["rope.type=ntk"], "ntk")]
)
def test_a_type_that_is_given_is_not_measured(made, monkeypatch, overrides, name):
    asked = measured(monkeypatch, {})
    prepared, run = made(*overrides)
    chosen = choose_scaling(prepared, run)
    assert chosen is prepared and chosen.scaling.name == name and not asked
    assert "rope_choice" not in run.metadata()


def test_what_the_train_verb_has_trained_unmeasured_is_not_rescaled(made, monkeypatch):
    asked = measured(monkeypatch, {"yarn": 2.0, "llama3": 1.0, "ntk": 2.0, "linear": 2.0})
    prepared, run = made()
    folder = run.checkpoints / "checkpoint-4"
    folder.mkdir(parents=True)
    mark_complete(folder, 4, "one process")
    assert choose_scaling(prepared, run).scaling.name == "yarn" and not asked
    assert with_chosen_scaling(prepared, run).recipe.rope.type == "yarn"


def test_the_target_is_measured_where_it_is_no_doubling(made, monkeypatch):
    asked = measured(monkeypatch, {"yarn": 2.0, "llama3": 2.0, "ntk": 2.0, "linear": 2.0})
    for target, contexts in ((96, [64, 96]), (160, [64, 128, 160])):
        prepared, run = made(f"target_length={target}")
        run.update(rope_choice=None)
        scaling_module._measure(prepared)
        assert asked[-1][2] == contexts


def test_what_cannot_be_measured_is_left_out_and_named(made, monkeypatch):
    wrong, full = SkipwiseError("it knows no llama3\ntype"), torch.OutOfMemoryError("out of memory")
    measured(monkeypatch, {"yarn": 2.0, "llama3": wrong, "ntk": full, "linear": 1.0})
    prepared, run = made()
    assert choose_scaling(prepared, run).scaling.name == "linear"
    found = run.metadata()["rope_choice"]
    assert "llama3 left out (it knows no llama3)" in found["detail"]
    assert found["left_out"].keys() == {"llama3", "ntk"}
    measured(monkeypatch, dict.fromkeys(("yarn", "llama3", "ntk", "linear"), full))
    assert scaling_module._measure(prepared)["detail"] == "yarn, not measured: out of memory"
    measured(monkeypatch, dict.fromkeys(("yarn", "llama3", "ntk", "linear"), ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        scaling_module._measure(prepared)


def test_a_model_that_is_spread_is_measured_spread(made, monkeypatch):
    real, maps = load.load_model, []

    def spy(*arguments, device_map=None, **more):
        maps.append(device_map)
        return real(*arguments, **more)

    monkeypatch.setattr(load, "load_model", spy)
    prepared, _ = made("load.device_map=auto")
    documents = [np.arange(3, 403) for _ in range(4)]
    scaling_module._of_one(prepared, "yarn", documents, search(64, 128), BAR)
    assert maps == ["auto"]


def test_an_export_before_the_choice_makes_it(made, monkeypatch):
    measured(monkeypatch, {"yarn": 2.0, "llama3": 1.0, "ntk": 2.0, "linear": 2.0})
    _, run = made("method=none")
    export_again(run, ["hf"])
    config = json.loads((run.model / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "llama3"
    assert run.metadata()["rope_choice"]["type"] == "llama3"


def test_without_text_of_its_own_it_is_yarn_and_says_so(made, monkeypatch):
    asked = measured(monkeypatch, {})
    prepared, run = made("method=none", "attention_temperature=1.0")
    assert choose_scaling(prepared, run).scaling.name == "yarn" and not asked
    assert "no text to spare" in run.metadata()["rope_choice"]["detail"]


def test_each_scaling_is_put_on_the_base_and_measured_at_its_best_temperature(made):
    prepared, _ = made()
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, 900, 600) for _ in range(4)]
    rows = [
        scaling_module._of_one(prepared, n, documents, search(64, 128, 256), BAR)
        for n in ("yarn", "linear")
    ]
    for row in rows:
        assert len(row["perplexity"]) == 3 and row["temperature"] in (1.0, 1.2, 1.4)
        assert row["loss"] == pytest.approx(np.mean(np.log(row["perplexity"])))
        assert row["num_passkeys"] == 10
    assert rows[0]["perplexity"] != rows[1]["perplexity"]
    fixed = dataclasses.replace(
        prepared, recipe=dataclasses.replace(prepared.recipe, attention_temperature=1.0)
    )
    assert (
        scaling_module._of_one(fixed, "yarn", documents, search(64, 128), BAR)["temperature"] == 1.0
    )


@pytest.mark.parametrize(
    ("losses", "best_loss", "asked", "kept"),
    [
        ([2.0, 1.9, 1.8], 1.5, [1.0, 1.2, 1.4], 1.4),
        ([2.0, 1.9, 1.95], 1.51, [1.0, 1.2, 1.4], 1.2),
        ([2.0, 2.1, 1.0], math.inf, [1.0, 1.2], 1.0),  # it rises: no higher one is measured
        ([2.0, 1.0, 1.0], 1.49, [1.0], 1.0),  # 0.51 nats behind
    ],
)
def test_no_more_is_measured_than_decides(made, monkeypatch, losses, best_loss, asked, kept):
    prepared, _ = made()
    seen = []
    monkeypatch.setattr(scaling_module.QueryWeights, "set", lambda self, t: seen.append(t))

    def perplexity(*args, **kwargs):
        return [{"value": math.exp(losses[(1.0, 1.2, 1.4).index(seen[-1])])}]

    monkeypatch.setattr(scaling_module, "perplexity", perplexity)
    row = scaling_module._of_one(prepared, "yarn", [], search(64), BAR, best_loss)
    assert (row["temperature"], row["loss"]) == (kept, pytest.approx(losses[asked.index(kept)]))
    measured = seen[1:] if len(asked) == 1 else seen[1:-1]  # to try it, and to ask for passkeys
    assert measured == asked and ("passkeys" in row) == (len(asked) > 1)


@pytest.mark.extended
def test_on_the_bundled_model_the_choice_is_what_training_confirms(tmp_path):
    """research/study: llama3 before yarn before ntk before linear, trained and untrained."""
    from skipwise.pipeline.quickstart import make_recipe

    recipe = make_recipe(["target_length=1024", "rope.type=auto", "attention_temperature=auto"])
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    write_text(run.recipe_file, dump_recipe(recipe))
    chosen = choose_scaling(prepare_model(recipe), run)
    rows = sorted(run.metadata()["rope_choice"]["measured"], key=lambda row: row["loss"])
    assert [row["type"] for row in rows] == ["llama3", "yarn", "ntk", "linear"]
    assert chosen.scaling.name == "llama3"
