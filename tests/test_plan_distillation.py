"""What distillation costs, as the plan counts it: a copy of the base, and its forward pass."""

import dataclasses
import json

import pytest
from test_plan import MISTRAL

from skipwise.config.parse import parse_recipe
from skipwise.planning import next_change, predict_memory
from skipwise.planning.flops import step_flops
from skipwise.planning.job import make_job, read_model


@pytest.fixture
def mistral(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    return tmp_path


def job_of(folder, *settings):
    recipe = parse_recipe({"model": str(folder), "target_length": 32768}, list(settings))
    return make_job(recipe, *read_model(recipe))


def test_the_plan_counts_the_copy_and_under_lora_there_is_none(mistral):
    plain, taught = (job_of(mistral, f"distillation.weight={w}") for w in (0, 3))
    assert predict_memory(taught).parts["teacher"] == 2 * plain.architecture.num_parameters
    assert "teacher" not in predict_memory(plain).parts
    lora = job_of(mistral, "distillation.weight=3", "lora={}")
    assert lora.distilled_fraction and "teacher" not in predict_memory(lora).parts


@pytest.mark.parametrize("lora", [[], ["lora={}"]])
def test_an_engine_that_shards_has_a_share_of_a_copy_under_lora_too(mistral, lora):
    a = job_of(mistral).architecture
    whole = 2 * (a.embedding + a.head + a.final)
    for engine, share in (("fsdp2", 1 / 4), ("zero3", 1 / 4), ("zero3-offload", 0)):
        settings = ["distillation.weight=3", f"engine={engine}", *lora]
        recipe = parse_recipe({"model": str(mistral), "target_length": 32768}, settings)
        memory = predict_memory(make_job(recipe, *read_model(recipe), num_gpus=4))
        want = whole + share * (2 * a.num_parameters - whole)
        assert memory.parts["teacher"] == pytest.approx(want, rel=1e-9)
    untaught = parse_recipe(
        {"model": str(mistral), "target_length": 32768},
        ["distillation.weight=0", "engine=zero3-offload", *lora],
    )
    less = predict_memory(make_job(untaught, *read_model(untaught), num_gpus=4)).host
    assert memory.host - less == 2 * a.num_parameters - whole


def test_the_plan_counts_a_forward_pass_over_half_of_the_tokens(mistral):
    settings = [
        "training.loss=chunked",
        "positions.key_weights=none",
        "positions.chunk_lengths=random",
    ]
    plain, taught = (job_of(mistral, f"distillation.weight={w}", *settings) for w in (0, 3))
    assert (
        taught.distilled_fraction == pytest.approx(0.5, abs=0.03) and plain.distilled_fraction == 0
    )
    half = dataclasses.replace(taught, distilled_fraction=0.5)
    a = taught.architecture
    head = a.vocab_size * a.hidden_size
    attention = 4.0 * a.num_heads * a.head_dim * a.num_layers * 8192 / 2
    token = 0.5 * 2 * (a.active_parameters + head) + 0.25 * attention
    more = step_flops(half) - step_flops(plain)
    assert more == pytest.approx(taught.tokens_per_step * token, rel=1e-9)
    quarter = job_of(mistral, "distillation.weight=3", "distillation.every=4", *settings)
    quarter = dataclasses.replace(quarter, distilled_fraction=0.5)
    more = step_flops(quarter) - step_flops(plain)
    assert more == pytest.approx(taught.tokens_per_step * token / 4, rel=1e-9)
    first_half = job_of(mistral, "distillation.weight=3", "positions.chunk_lengths=first-half")
    assert first_half.distilled_fraction == pytest.approx(0.25, abs=0.03)
    pairs = job_of(mistral, "distillation.weight=3", *settings, "training.micro_batch_size=2")
    assert pairs.distilled_fraction == pytest.approx(2 / 3, abs=0.03)  # the longer of two


def test_a_run_without_room_is_told_to_do_without_the_copy(mistral):
    tree = {"model": str(mistral), "target_length": 32768}
    recipe = parse_recipe(tree, ["distillation.weight=3"])
    assert next_change(recipe, 4) == "distillation.weight=0"
    assert next_change(parse_recipe(tree, ["distillation.weight=auto", "lora={}"])) == (
        "lora.train_embeddings=false"
    )
