"""A position sampler is added in one place: a class outside the package, listed in `SAMPLERS`."""

import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from test_train import make_recipe, run_training

from skipwise.cli import main
from skipwise.config.distillation import WEIGHT, distillation_weight
from skipwise.config.parse import dump_recipe, parse_recipe
from skipwise.config.samplers import make_sampler, resolve_auto
from skipwise.errors import SkipwiseError
from skipwise.pose.samplers import SAMPLERS, Example
from skipwise.training.callbacks import read_metrics

BASE = {"model": "m", "target_length": 256}


@dataclass(frozen=True, kw_only=True)
class Halves:
    """Two halves of contiguous text, the second one at the far end of the target window."""

    name: ClassVar[str] = "halves"
    has_chunks: ClassVar[bool] = True
    is_baseline: ClassVar[bool] = False

    train_length: int
    target_length: int
    unskipped_fraction: float = 0.0

    def sample(self, rng: np.random.Generator, num_tokens: int) -> Example:
        L = self.train_length
        far = 0 if rng.random() < self.unskipped_fraction else self.target_length - L
        start = int(rng.integers(num_tokens - L + 1))
        return Example(
            lengths=np.array([L // 2, L - L // 2]),
            position_starts=np.array([0, L // 2 + far]),
            text_starts=start + np.array([0, L // 2]),
        )


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "halves", Halves)


def test_a_recipe_names_it_with_the_keys_that_it_takes_and_no_others():
    recipe = parse_recipe(BASE, ["method=halves", "positions.unskipped_fraction=0.5"])
    made = make_sampler(recipe, 64)
    assert made == Halves(train_length=64, target_length=256, unskipped_fraction=0.5)
    assert "method: halves" in dump_recipe(recipe)
    with pytest.raises(SkipwiseError, match=r"halves does not take positions\.num_chunks"):
        make_sampler(parse_recipe(BASE, ["method=halves", "positions.num_chunks=3"]), 64)
    known = "one of pose, full, randpos, cream, endprompt, halves, no"
    with pytest.raises(SkipwiseError, match=known):
        parse_recipe(BASE, ["method=halved"])


@pytest.mark.parametrize("is_baseline", [False, True])
@pytest.mark.parametrize("has_chunks", [False, True])
def test_its_attributes_decide_what_auto_adds_to_it(is_baseline, has_chunks, monkeypatch):
    monkeypatch.setattr(Halves, "is_baseline", is_baseline)
    monkeypatch.setattr(Halves, "has_chunks", has_chunks)
    recipe = resolve_auto(parse_recipe(BASE, ["method=halves"]))
    added = has_chunks and not is_baseline
    assert recipe.positions.key_weights == ("importance" if added else "none")
    weight, why = distillation_weight(recipe)
    assert weight == (WEIGHT if added else 0.0) and bool(why) != added
    make_sampler(recipe, 64)


def test_the_command_line_lists_and_draws_it(capsys):
    with pytest.raises(SystemExit):
        main(["positions", "--help"])
    assert "halves" in capsys.readouterr().out
    arguments = ["positions", "--length", "64", "--to", "256", "method=halves"]
    assert main(arguments) == 0
    assert "32 at 0  32 at 224" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    shown = dict(zip(facts["distances"], facts["coverage"], strict=True))
    assert shown[20] == 1.0 and shown[100] == 0.0 and shown[200] == 1.0


def test_a_model_trains_with_it(tiny, text_folder, tmp_path):
    recipe = make_recipe(tiny, text_folder, "method=halves", "training.num_steps=3")
    run = run_training(recipe, tmp_path / "run")
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3]
    assert run.metadata()["training"]["method"] == "halves"
    assert run.recipe().method == "halves"
