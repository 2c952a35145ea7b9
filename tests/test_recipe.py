"""The recipe: typed, with the paper's defaults, and loud about what it does not know."""

import pytest
import yaml

from skipwise.config.lengths import format_length, parse_length
from skipwise.config.parse import dump_recipe, load_recipe, parse_recipe
from skipwise.config.recipe import context_lengths
from skipwise.config.run_folder import open_run
from skipwise.config.samplers import make_sampler, resolve_auto
from skipwise.errors import SkipwiseError
from skipwise.pose.samplers import CREAM, FullLength, PoSE, RandPos

BASE = {"model": "m", "target_length": "32k"}


def test_training_is_the_papers_by_default():
    recipe = parse_recipe(BASE)
    training = recipe.training
    assert (training.num_steps, training.global_batch_size) == (1000, 64)
    assert (training.learning_rate, training.warmup_steps) == (2e-5, 10)
    assert context_lengths(recipe, 8192) == (8192, 16384, 32768)


def test_the_published_positions_are_a_line_of_overrides():
    published = [
        "positions.content=uniform",
        "positions.chunk_lengths=random",
        "positions.key_weights=none",
    ]
    recipe = resolve_auto(parse_recipe(BASE, published))
    assert make_sampler(recipe, 8192) == PoSE(train_length=8192, target_length=32768)
    assert recipe.positions.key_weights == "none"


@pytest.mark.parametrize(
    ("overrides", "content", "weights"),
    [
        ([], "aligned", "importance"),
        (["load.attn_implementation=flash_attention_2"], "aligned", "none"),
        (["positions.num_chunks=1"], "aligned", "none"),
        (["method=cream"], "contiguous", "none"),
        (["method=full"], "uniform", "none"),
        (["method=randpos"], "uniform", "none"),
    ],
)
def test_auto_positions_are_settled_by_the_method(overrides, content, weights):
    recipe = resolve_auto(parse_recipe(BASE, overrides))
    found = recipe.positions
    assert (found.content, found.key_weights) == (content, weights)
    assert resolve_auto(recipe) == recipe
    make_sampler(recipe, 8192)


def test_yaml_round_trip_keeps_every_value(tmp_path):
    recipe = parse_recipe(
        {**BASE, "lora": {"rank": 8}, "data": {"sources": ["a", {"path": "b", "weight": 2}]}},
        [
            "training.learning_rate=5e-4",
            "eval.context_lengths=[4k, 8192]",
            "rope.options.beta_fast=16",
        ],
    )
    assert recipe.training.learning_rate == 5e-4
    assert recipe.eval.context_lengths == (4096, 8192)
    file = tmp_path / "r.yaml"
    file.write_text(dump_recipe(recipe))
    assert load_recipe(file) == recipe
    assert yaml.safe_load(dump_recipe(recipe))["positions"]["num_chunks"] == 2


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("training.num_step=3", "training.num_step is not a recipe key"),
        ("num_steps=3", "did you mean training.num_steps"),
        ("target_modules=[q]", "did you mean lora.target_modules"),
        ("training.num_steps=many", "a whole number"),
        ("training.num_steps=2.5", "a whole number"),
        ("training.num_steps=-1", "give 1 to 100,000,000"),
        ("training.gradient_checkpointing=3", "true or false"),
        ("positions.chunk_lengths=half", "choose one of random, first-half"),
        ("method=pse", "choose one of pose"),
        ("target_length=32kb", "not a length"),
        ("model.path.x=1", "no keys below"),
        ("lora=yes", "map keys"),
        ("num_steps", "not an override"),
    ],
)
def test_a_wrong_key_or_value_is_named(override, word):
    with pytest.raises(SkipwiseError, match=word):
        parse_recipe(BASE, [override])


def test_a_recipe_without_a_model_or_with_broken_yaml_is_an_error(tmp_path):
    with pytest.raises(SkipwiseError, match="has no model"):
        parse_recipe({"target_length": 3})
    file = tmp_path / "r.yaml"
    for text, word in (("a: [", "not YAML"), ("- 1", "not a recipe")):
        file.write_text(text)
        with pytest.raises(SkipwiseError, match=word):
            load_recipe(file)
    with pytest.raises(SkipwiseError, match="No such file"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "tokens"), [("32k", 32768), ("32768", 32768), ("1m", 2**20), (77, 77), ("1.5K", 1536)]
)
def test_lengths_read_as_people_write_them(text, tokens):
    assert parse_length(text) == tokens


def test_lengths_are_written_short_where_they_are_round():
    assert [format_length(n) for n in (32768, 1000, 1024, 100)] == ["32k", "1000", "1k", "100"]


def test_method_changes_the_sampler_and_nothing_else():
    def sampler(*overrides):
        return make_sampler(parse_recipe(BASE, list(overrides)), 8192)

    assert sampler("method=full") == FullLength(target_length=32768)
    assert sampler("method=randpos") == RandPos(train_length=8192, target_length=32768)
    assert isinstance(sampler("method=cream", "positions.content=aligned"), CREAM)
    assert sampler("train_length=4k").train_length == 4096


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=randpos", "positions.num_chunks=3"],
        ["method=full", "positions.key_weights=importance"],
        ["method=cream", "positions.chunk_lengths=first-half"],
    ],
)
def test_a_setting_that_would_not_take_effect_is_an_error(overrides):
    with pytest.raises(SkipwiseError, match="method"):
        make_sampler(parse_recipe(BASE, overrides), 8192)


def test_a_run_folder_takes_one_recipe_and_nothing_else(tmp_path):
    recipe = parse_recipe(BASE)
    run = open_run(tmp_path / "run", recipe, "skipwise extend m")
    assert open_run(tmp_path / "run", recipe, "again").metadata()["command"] == "skipwise extend m"
    assert run.recipe() == recipe
    with pytest.raises(SkipwiseError, match="another recipe"):
        open_run(tmp_path / "run", parse_recipe(BASE, ["seed=1"]), "x")
    (tmp_path / "run" / "results.json").write_text("{")
    with pytest.raises(SkipwiseError, match=r"results\.json is not JSON.*\nremove it"):
        run.results()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(SkipwiseError, match="not a run folder"):
        open_run(tmp_path / "other", recipe, "x")
