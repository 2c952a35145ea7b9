"""The recipe of the stage at full length: its tokens, its batch, its errors, its plan."""

import dataclasses
import json

import pytest

from skipwise.cli import main
from skipwise.config.parse import parse_recipe
from skipwise.config.stages import first_stage, full_length_stage
from skipwise.errors import SkipwiseError
from skipwise.planning import find_gpu, make_plan


def made(*overrides):
    return parse_recipe({"model": "m", "target_length": "32k"}, list(overrides))


@pytest.mark.parametrize("share", [0.02, 0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("factor", [2, 4, 5, 16])
@pytest.mark.parametrize("processes", [1, 3, 8])
def test_the_tokens_of_both_parts_are_those_of_training(share, factor, processes):
    recipe = made(f"target_length={factor * 8192}", f"full_length.fraction={share}")
    first, finish = (
        first_stage(recipe).training,
        full_length_stage(recipe, 8192, processes).training,
    )
    step = 64 * 8192
    of_finish = finish.num_steps * finish.global_batch_size * factor * 8192
    total = first.num_steps * first.global_batch_size * 8192 + of_finish
    longest = max(step, finish.global_batch_size * factor * 8192)
    assert abs(total - 1000 * step) < longest
    assert abs(of_finish - share * 1000 * step) < longest
    assert finish.global_batch_size % processes == 0 and finish.micro_batch_size == 1


def test_the_recipe_of_the_finish_in_figures():
    recipe = made(
        "full_length.fraction=0.1", "training.lr_scheduler=cosine", "positions.num_chunks=3"
    )
    finish = full_length_stage(recipe, 8192, 8)
    settings = finish.training
    assert first_stage(recipe).training.num_steps == 900
    assert (settings.num_steps, settings.global_batch_size) == (100, 16)  # 64 x 8k / 32k
    assert (settings.learning_rate, settings.warmup_steps) == (2e-5 / 3, 1)  # 10 of 1,000
    assert settings.lr_scheduler == "linear" and settings.save_steps == 100
    assert finish.method == "full" and finish.positions.key_weights == "none"
    assert full_length_stage(
        made("full_length.fraction=0.1", "full_length.learning_rate=1e-6"), 8192
    ).training == (dataclasses.replace(settings, learning_rate=1e-6))
    warm = made("full_length.fraction=0.1", "training.warmup_steps=500")
    assert full_length_stage(warm, 8192).training.warmup_steps == 10  # a tenth at most
    assert full_length_stage(made(), 8192) is None and first_stage(made()) == made()


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["full_length.fraction=1"], "give at least 0 and below 1"),
        (["full_length.fraction=0.9999"], "leaves none for the first stage"),
        (["full_length.fraction=0.1", "method=full"], "is at full length already"),
        (["full_length.fraction=0.1", "method=none"], "trains nothing"),
        (["full_length.learning_rate=1e-5"], r"does not take effect with full_length\.fraction: 0"),
        (["full_length.fraction=-0.1"], "give at least 0"),
        (
            ["full_length.fraction=0.1", "training.num_steps=10", "training.global_batch_size=1"],
            r"fewer tokens than an example of 32k\ntype full_length\.fraction=0\.4 or more",
        ),
        (
            ["full_length.fraction=0.1", "training.num_steps=4", "training.global_batch_size=1"],
            r"training\.num_steps=40 or more",
        ),
    ],
)
def test_a_finish_that_cannot_be_is_refused(overrides, word):
    with pytest.raises(SkipwiseError, match=word):
        recipe = made(*overrides)
        first_stage(recipe)
        full_length_stage(recipe, 8192)


def test_the_share_that_an_error_names_is_enough():
    short = ["training.num_steps=10", "training.global_batch_size=1"]
    with pytest.raises(SkipwiseError):
        full_length_stage(made("full_length.fraction=0.3", *short), 8192)
    assert full_length_stage(made("full_length.fraction=0.4", *short), 8192).training.num_steps == 1
    with pytest.raises(SkipwiseError, match=r"2 examples.*\ntype full_length\.fraction=0\.8"):
        full_length_stage(made("full_length.fraction=0.4", *short), 8192, 2)


def test_a_finish_that_was_begun_keeps_its_batch():
    recipe = made("full_length.fraction=0.1")
    assert full_length_stage(recipe, 8192, 3).training.global_batch_size == 15
    assert (
        full_length_stage(recipe, 8192, 5, batch=15).training
        == full_length_stage(recipe, 8192, 3).training
    )
    with pytest.raises(SkipwiseError, match=r"batches of 15.*4 processes.*\n.*15, 5, 3, 1"):
        full_length_stage(recipe, 8192, 4, batch=15)


def test_the_plan_shows_both_parts(tmp_path, capsys):
    from test_plan import MISTRAL

    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    asked = ["plan", str(tmp_path), "--to", "128k", "--gpus", "8", "--engine", "fsdp2"]
    assert main([*asked, "full_length.fraction=0.1"]) == 0
    out = capsys.readouterr().out
    assert "full-length peak" in out and "1 x 131,072 tokens" in out and "no: full_length={}" in out
    settings = [f"model={tmp_path}", "target_length=128k", "engine=fsdp2"]
    settings += ["training.micro_batch_size=1"]  # auto fills the GPU with short examples
    with_it = make_plan(made(*settings, "full_length.fraction=0.1"), num_gpus=8)
    without = make_plan(made(*settings), num_gpus=8)
    assert with_it.memory == without.memory and with_it.job.num_steps == 900
    stage = with_it.full_length.job
    assert stage.num_steps == 50 and stage.length == 131072
    for row, plain in zip(with_it.gpus, without.gpus, strict=True):
        assert row.memory.total > 3 * plain.memory.total and row.hours > 1.1 * plain.hours
    lower = make_plan(made(*settings, "full_length.fraction=0.02"), num_gpus=8)
    assert [r.memory for r in lower.gpus] == [r.memory for r in with_it.gpus]
    a100 = make_plan(
        made(*settings, "full_length.fraction=0.1"), num_gpus=8, gpu=find_gpu("A100-80GB")
    )
    assert a100.gpus[0].change == "training.gradient_checkpointing=offload"
