"""Keys that had other names before the first release: an error names the new one, a run is read."""

import dataclasses

import pytest
import yaml

from skipwise.config.parse import (
    RENAMED_KEYS,
    RENAMED_VALUES,
    dump_recipe,
    load_recipe,
    load_run_recipe,
    parse_recipe,
)
from skipwise.config.recipe import Recipe
from skipwise.config.run_folder import RunFolder, open_run
from skipwise.errors import SkipwiseError

BASE = {"model": "base", "target_length": 1024, "data": {"sources": ["text"]}}

OLD = """
model: base
target_length: 1024
temperature: 1.1
positions: {num_chunks: 2, cut: first-half, gaps: sorted, plain_fraction: 0.2, weights: none}
data: {sources: [text]}
training: {num_steps: 50, batch_size: 4, loss: whole, distillation: 2.0}
finish: {share: 0.1, learning_rate: 1.0e-05}
eval: {tasks: [pose-table, passkey], passkey_trials: 7, needle_trials: 9, select: needles}
"""


def fields_of(cls, where=""):
    found = set()
    for field in dataclasses.fields(cls):
        name = f"{where}{field.name}"
        found.add(name)
        if dataclasses.is_dataclass(field.default):
            found |= fields_of(type(field.default), f"{name}.")
    return found


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_an_old_key_is_an_error_that_names_the_new_one(old, new):
    with pytest.raises(SkipwiseError, match=f"renamed: .*{old} is now {new}"):
        parse_recipe(BASE, [f"{old}=1"])
    assert new in fields_of(Recipe) and old not in fields_of(Recipe)


@pytest.mark.parametrize("key", ["training.loss", "export.checkpoint"])
def test_an_old_value_is_an_error_that_names_the_new_one(key):
    ((old, new),) = RENAMED_VALUES[key].items()
    with pytest.raises(SkipwiseError, match=f"{key}: {old} was renamed: type {key}={new}"):
        parse_recipe(BASE, [f"{key}={old}"])


def test_a_run_folder_of_old_names_is_read_with_every_value(tmp_path):
    (tmp_path / "recipe.yaml").write_text(OLD)
    with pytest.raises(SkipwiseError, match="renamed"):
        load_recipe(tmp_path / "recipe.yaml")
    recipe = load_run_recipe(tmp_path / "recipe.yaml")
    positions = recipe.positions
    assert recipe.attention_temperature == 1.1
    assert (positions.chunk_lengths, positions.skips) == ("first-half", "sorted")
    assert (positions.unskipped_fraction, positions.key_weights) == (0.2, "none")
    assert (recipe.training.micro_batch_size, recipe.training.loss) == (4, "full")
    assert recipe.distillation.weight == 2.0
    assert (recipe.full_length.fraction, recipe.full_length.learning_rate) == (0.1, 1e-5)
    assert recipe.eval.tasks == ("short-benchmarks", "passkey")
    assert (recipe.eval.passkey_samples, recipe.eval.needle_samples) == (7, 9)
    assert recipe.export.checkpoint == "needle"
    run = RunFolder(tmp_path)
    assert run.recipe() == recipe
    again = parse_recipe(yaml.safe_load(dump_recipe(recipe)))
    assert open_run(tmp_path, again, "test").path == tmp_path  # the same recipe, not another one
