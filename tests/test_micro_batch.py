"""`training.micro_batch_size: auto`: the same training, at the size that is fastest and fits."""

import json
import signal
from contextlib import nullcontext

import pytest
import torch
from test_train import make_recipe, run_training, stop_at

from skipwise.errors import RunStopped, SkipwiseError
from skipwise.preflight.step import describe_trial, time_pass
from skipwise.training import callbacks as callbacks_module
from skipwise.training import setup
from skipwise.training.callbacks import read_metrics
from skipwise.training.checkpoints import last_checkpoint
from skipwise.training.trainer import PoSETrainer

AUTO = (
    "training.micro_batch_size=auto",
    "training.num_steps=4",
    "training.global_batch_size=8",
    "training.save_steps=2",
)


def losses(run):
    return [line["loss"] for line in read_metrics(run)]


def size_of(run):
    return run.metadata()["batch"]["micro_batch_size"]


def timed(monkeypatch, seconds):
    """Passes take these seconds by their number of examples; None is out of memory."""
    tried = []

    def fake(model, inputs, autocast, reserve=0):
        size = len(inputs["input_ids"])
        tried.append(size)
        if seconds[size] is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return seconds[size]

    monkeypatch.setattr(setup, "time_pass", fake)
    return tried


@pytest.fixture(scope="module")
def one_by_one(tiny, text_folder, tmp_path_factory):
    settings = [*AUTO, "training.micro_batch_size=1"]
    return run_training(
        make_recipe(tiny, text_folder, *settings), tmp_path_factory.mktemp("one") / "run"
    )


def test_auto_trains_as_one_by_one_does(tiny, text_folder, tmp_path, one_by_one, monkeypatch):
    seconds = {1: 1.0, 2: 1.5, 4: 2.0, 8: 8.0}
    assert timed(monkeypatch, seconds) == []
    run = run_training(make_recipe(tiny, text_folder, *AUTO), tmp_path / "run")
    assert size_of(run) == run.metadata()["training"]["micro_batch_size"] == 4
    mark = json.loads((last_checkpoint(run) / "complete").read_text())
    assert mark["micro_batch_size"] == 4
    assert losses(run) == pytest.approx(losses(one_by_one), abs=1e-5)


def test_the_fastest_size_is_taken_and_said_in_a_line(tiny, text_folder, tmp_path, monkeypatch):
    tried = timed(monkeypatch, {1: 1.0, 2: 1.25, 4: 4.0, 8: 0.1})
    run = run_training(make_recipe(tiny, text_folder, *AUTO), tmp_path / "run")
    assert size_of(run) == 2 and tried == [1, 2, 4]  # 4 is so slow that 8 is not tried
    detail = describe_trial(run.metadata()["batch"]).detail
    assert detail == (
        "2 examples a pass: 0.625 s an example, 1.6 times as fast as one by one; "
        "4 at once is no faster"
    )


def test_out_of_memory_goes_down_and_says_what_helps_at_one(
    tiny, text_folder, tmp_path, monkeypatch
):
    tried = timed(monkeypatch, {1: 1.0, 2: 1.0, 4: None, 8: None})
    run = run_training(make_recipe(tiny, text_folder, *AUTO), tmp_path / "run")
    assert size_of(run) == 2 and tried == [1, 2, 4]
    timed(monkeypatch, dict.fromkeys((1, 2, 4, 8)))
    with pytest.raises(SkipwiseError, match="out of memory at 8 x"):
        run_training(make_recipe(tiny, text_folder, *AUTO), tmp_path / "none")


def test_a_real_pass_of_auto_is_timed(tiny, text_folder, tmp_path):
    run = run_training(make_recipe(tiny, text_folder, *AUTO), tmp_path / "run")
    tried = run.metadata()["batch"]["tried"]
    assert {"1", "2"} <= set(tried) and all(0 < seconds < 5 for seconds in tried.values())
    assert tried[str(size_of(run))] == min(tried.values())


@pytest.mark.parametrize("kept", ["run.json", "checkpoint"])
def test_a_run_that_goes_on_keeps_its_size(kept, tiny, text_folder, tmp_path, monkeypatch):
    recipe = make_recipe(tiny, text_folder, *AUTO)
    timed(monkeypatch, {1: 4.0, 2: 4.0, 4: 4.0, 8: 80.0})
    straight = run_training(recipe, tmp_path / "straight")
    with monkeypatch.context() as patch:
        patch.setattr(callbacks_module.RunCallback, "on_step_end", stop_at(2, signal.SIGTERM))
        with pytest.raises(RunStopped):
            run_training(recipe, tmp_path / "run")
    if kept == "checkpoint":
        facts = json.loads((tmp_path / "run/run.json").read_text())
        assert facts.pop("batch")["micro_batch_size"] == 4
        (tmp_path / "run/run.json").write_text(json.dumps(facts))
    tried = timed(monkeypatch, {1: 1.0, 2: 20.0, 4: 40.0, 8: 80.0})  # 1 would now be the fastest
    run = run_training(recipe, tmp_path / "run")
    assert tried == ([] if kept == "run.json" else [4])
    assert size_of(run) == 4 and losses(run) == losses(straight)


def test_out_of_memory_in_training_takes_half_the_next_time(
    tiny, text_folder, tmp_path, monkeypatch
):
    recipe = make_recipe(tiny, text_folder, *AUTO)
    timed(monkeypatch, {1: 4.0, 2: 4.0, 4: 4.0, 8: 4.0})

    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(PoSETrainer, "training_step", full)
        with pytest.raises(SkipwiseError, match=r"size 8, which auto.*\n.*again: it takes 4"):
            run_training(recipe, tmp_path / "run")
    run = run_training(recipe, tmp_path / "run")
    assert size_of(run) == run.metadata()["training"]["micro_batch_size"] == 4


def test_a_size_that_is_given_is_timed_and_kept(one_by_one):
    assert size_of(one_by_one) == 1 and set(one_by_one.metadata()["batch"]["tried"]) == {"1"}


def test_a_timed_pass_leaves_no_trace():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(8, 8)
            self.passes = 0

        def forward(self, input_ids, use_cache):
            assert self.training and torch.is_grad_enabled() and not use_cache
            self.passes += 1
            out = torch.nn.functional.dropout(self.layer(input_ids), 0.5)
            return type("Output", (), {"loss": out.sum()})

    model = Model().eval()
    before, state = model.layer.weight.clone(), torch.get_rng_state()
    seconds = time_pass(model, {"input_ids": torch.ones(2, 8)}, nullcontext)
    assert 0 < seconds < 1 and model.passes == 2 and not model.training
    assert model.layer.weight.grad is None and torch.equal(model.layer.weight, before)
    assert torch.equal(torch.get_rng_state(), state)
