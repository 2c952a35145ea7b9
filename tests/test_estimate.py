"""The estimate of a whole run: printed before its first long phase, compared when it has ended."""

import dataclasses
import re
import time
from types import SimpleNamespace

import pytest
from test_extend import make_recipe

from skipwise.config.parse import parse_recipe
from skipwise.config.run_folder import RunFolder
from skipwise.pipeline.estimate import estimate_run
from skipwise.pipeline.extend import extend
from skipwise.pipeline.quickstart import MODEL
from skipwise.planning.flops import step_flops
from skipwise.planning.job import make_jobs, read_model
from skipwise.preflight import step
from skipwise.training import callbacks


@pytest.mark.extended
def test_the_estimate_of_training_is_within_a_factor_of_two(
    text_folder, tmp_path, capfd, monkeypatch
):
    # seconds of the processor, since tests share the machine
    monkeypatch.setattr(step, "time", SimpleNamespace(perf_counter=time.process_time))
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=time.process_time))
    tree = {
        "model": str(MODEL),
        "target_length": 512,
        "train_length": 64,
        "rope": {"type": "yarn"},
        "attention_temperature": 1.0,
        "data": {"sources": [str(text_folder)]},
        "training": {"num_steps": 6, "global_batch_size": 8},
        "eval": {"tasks": ["passkey"], "passkey_samples": 2, "untrained": False},
        "trainer": {"report_to": "none"},
    }
    run = extend(parse_recipe(tree), tmp_path / "run")
    said = capfd.readouterr().err
    line = re.search(r"^about .+ on this machine: training (.+), evaluation (.+)$", said, re.M)
    assert line and said.index("micro batch") < line.start() < said.index("[2/6]")
    estimate = run.metadata()["estimate"]
    took = estimate["took"]
    assert took["training"] == pytest.approx(run.metadata()["training"]["seconds"], abs=0.1)
    assert 0.5 < estimate["training"] / took["training"] < 2
    assert took["evaluation"] > 0 and estimate["evaluation"] > 0


def test_it_is_the_plans_operations_at_the_rate_of_the_timed_pass(tiny, text_folder, tmp_path):
    settings = ["training.micro_batch_size=auto", "training.num_steps=40"]
    settings += ["full_length.fraction=0.25", "eval.tasks=[passkey]", "eval.passkey_samples=10"]
    recipe = make_recipe(tiny, text_folder, *settings, "eval.context_lengths=[64]")
    run = RunFolder(tmp_path)
    estimate_run(recipe, run)
    assert "estimate" not in run.metadata()  # no pass was timed
    run.update(batch={"micro_batch_size": 2, "tried": {"1": 9.0, "2": 0.5}})
    estimate_run(recipe, run, num_processes=2)
    training = dataclasses.replace(recipe.training, micro_batch_size=2)
    shape = read_model(recipe)
    first, last = make_jobs(dataclasses.replace(recipe, training=training), *shape, num_gpus=2)
    assert last is not None and (first.num_steps, first.global_batch_size) == (30, 4)
    example = step_flops(first) / 4  # in half a second
    seconds = 30 * 4 * 0.5 / 2 + last.num_steps * step_flops(last) / example * 0.5 / 2
    found = run.metadata()["estimate"]
    assert found["training"] == pytest.approx(seconds, abs=0.1)
    a = shape[1]
    forward = 2 * a.active_parameters + a.num_layers * 2 * a.num_heads * 2 * a.head_dim * 32
    tokens = 3 * 10 * 64  # base, untrained and trained; half of 64 keys on the mean
    assert found["evaluation"] == pytest.approx(tokens * forward / example * 0.5, abs=0.051)
    run.update(batch={"micro_batch_size": 2, "tried": {"2": 5.0}})
    estimate_run(recipe, run)
    assert run.metadata()["estimate"] == found  # a run that goes on keeps it
