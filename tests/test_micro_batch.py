"""`training.micro_batch_size: auto`: the same training, at the size that is fastest and fits."""

import json

import pytest
import torch
from test_train import make_recipe, run_training

from skipwise.config.run_folder import RunFolder
from skipwise.training.callbacks import read_metrics
from skipwise.training.checkpoints import last_checkpoint


def losses(run):
    return [line["loss"] for line in read_metrics(run)]


def test_auto_trains_the_same_examples_as_one_by_one(tiny, text_folder, tmp_path):
    steps = ["training.num_steps=4", "training.global_batch_size=8"]
    one = run_training(
        make_recipe(tiny, text_folder, *steps, "training.micro_batch_size=1"), tmp_path / "one"
    )
    auto = run_training(
        make_recipe(tiny, text_folder, *steps, "training.micro_batch_size=auto"), tmp_path / "auto"
    )
    taken = auto.metadata()["training"]["micro_batch_size"]
    assert taken > 1 and taken == auto.metadata()["batch"]["micro_batch_size"]
    assert json.loads((last_checkpoint(auto) / "complete").read_text())["micro_batch_size"] == taken
    assert losses(auto) == pytest.approx(losses(one), abs=1e-5)
