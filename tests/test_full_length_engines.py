"""The finish on two real processes over gloo is that of one, and goes on from it."""

import os
import shutil
from importlib.util import find_spec

import pytest
from test_engines import assert_close, skipwise
from test_full_length_stage import LAST, make_recipe, trained

from skipwise.config.parse import dump_recipe
from skipwise.config.run_folder import RunFolder
from skipwise.training.callbacks import read_metrics

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="no DeepSpeed")
LORA = ("--lora",)
CASES = [
    ((), "ddp"),
    (LORA, "fsdp2"),
    pytest.param((), "zero3", marks=[pytest.mark.extended, needs_deepspeed]),
]


@pytest.fixture(scope="module")
def command(request, tiny, text_folder, tmp_path_factory):
    """(the verb with a recipe for two processes, what one process makes of it)"""
    folder = tmp_path_factory.mktemp("engines")
    os.environ["SKIPWISE_CACHE"] = str(folder / "cache")
    recipe = make_recipe(tiny, text_folder, "training.global_batch_size=8")
    (folder / "r.yaml").write_text(dump_recipe(recipe))
    command = ["train", str(folder / "r.yaml"), *request.param, "--out"]
    return command, started(*command, folder / "run")


def started(*arguments):
    skipwise(*arguments)
    return RunFolder(arguments[arguments.index("--out") + 1])


@pytest.mark.extended
@pytest.mark.parametrize(("command", "engine"), CASES, indirect=["command"])
def test_two_processes_finish_like_one_and_one_goes_on(command, tmp_path, engine):
    verb, one = command
    two = started(*verb, tmp_path / "run", "--gpus", 2, "--engine", engine)
    pairs = zip(read_metrics(one), read_metrics(two), strict=True)
    assert max(abs(a["loss"] - b["loss"]) for a, b in pairs) < 1e-5
    assert_close(trained(two), trained(one), 1e-5)
    finish = two.metadata()["finish"]
    assert (finish["num_processes"], finish["batch_size"]) == (2, 2)
    if engine != "ddp":  # one process reads no shards of an optimizer; test_engines has them
        return
    shutil.rmtree(two.finish.checkpoints / f"checkpoint-{LAST}")
    started(*verb, two.path, "--gpus", 1)
    assert_close(trained(two), trained(one), 1e-5)
