"""Checkpoints: rotated by step, listed file by file, and unpickled only where trusted."""

import os
import pickle
import shutil
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from skipwise.config.parse import parse_recipe
from skipwise.config.run_folder import RunFolder, open_run
from skipwise.errors import SkipwiseError
from skipwise.training.checkpoints import (
    check_trusted,
    damage,
    finished_checkpoint,
    last_checkpoint,
    mark_complete,
    remove_incomplete,
    remove_old,
)

STEPS = 6


def make_recipe(tiny, text_folder, *overrides):
    tree = {
        "model": str(tiny),
        "target_length": 256,
        "data": {"sources": [str(text_folder)]},
        "training": {
            "num_steps": STEPS,
            "global_batch_size": 2,
            "micro_batch_size": 2,
            "learning_rate": 1e-3,
            "save_steps": 2,
        },
        "trainer": {"report_to": "none"},
    }
    return parse_recipe(tree, list(overrides))


def train_into(folder, recipe):
    from skipwise.models.prepared import prepare_model
    from skipwise.pipeline.stages import prepare_run, train_run

    run = open_run(folder, recipe, "test")
    prepared = prepare_model(recipe)
    train_run(prepared, prepare_run(prepared, run), run)
    return run


def weights(run):
    return load_file(finished_checkpoint(run, STEPS) / "model.safetensors")


@pytest.fixture(scope="module")
def straight(tiny, text_folder, tmp_path_factory):
    return train_into(tmp_path_factory.mktemp("straight") / "run", make_recipe(tiny, text_folder))


def checkpoint(folder, step, **files):
    """A checkpoint of small files, marked complete."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name, content in {"model": b"weights" * 99, "optimizer": b"state" * 99, **files}.items():
        (path / f"{name}.safetensors").write_bytes(content)
    mark_complete(path, step, "one process")
    return path


def test_old_checkpoints_are_removed_by_step_whatever_the_clock_says(tmp_path):
    run = RunFolder(tmp_path)
    future = time.time() + 3600
    for step in (2, 4, 6, 10):
        checkpoint(run.checkpoints, step)
        os.utime(run.checkpoints / f"checkpoint-{step}", (future, future))
        future -= 500
        remove_old(run, 2)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["checkpoint-10", "checkpoint-6"]


def test_a_clock_that_went_back_loses_no_checkpoint_and_the_run_ends_the_same(
    straight, tiny, text_folder, tmp_path
):
    shutil.copytree(straight.path, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    shutil.rmtree(run.checkpoints / "checkpoint-6")
    future = time.time() + 7200
    for folder in run.checkpoints.iterdir():
        os.utime(folder, (future, future))
    train_into(run.path, make_recipe(tiny, text_folder))
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    ours, theirs = weights(run), weights(straight)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def damages():
    def cut(file):
        file.write_bytes(file.read_bytes()[:-9])

    def flip(file):
        content, times = bytearray(file.read_bytes()), file.stat()
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

    names = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
    for name in names:
        yield f"{name} cut", name, cut
        yield f"{name} gone", name, lambda file: file.unlink()
    yield "weights flipped", "model.safetensors", flip
    yield "optimizer flipped", "optimizer.pt", flip
    yield "state cut", "trainer_state.json", cut
    yield "mark cut", "complete", cut
    yield "mark empty", "complete", lambda file: file.write_text("{}")
    yield "mark nested", "complete", lambda file: file.write_text("[" * 100_000)


@pytest.mark.parametrize(
    ("name", "harm"), [d[1:] for d in damages()], ids=[d[0] for d in damages()]
)
def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_is_used(
    straight, tmp_path, capsys, name, harm
):
    shutil.copytree(straight.checkpoints, tmp_path / "checkpoints")
    run = RunFolder(tmp_path)
    assert last_checkpoint(run).name == "checkpoint-6"
    harm(run.checkpoints / "checkpoint-6" / name)
    assert finished_checkpoint(run, STEPS) is None
    assert last_checkpoint(run).name == "checkpoint-4"
    said = capsys.readouterr().err
    assert "checkpoint-6 is damaged" in said and name in said and said.count("\n") == 1
    remove_incomplete(run)
    kept = sorted(p.name for p in run.checkpoints.iterdir())
    assert kept == ["checkpoint-4", "damaged-checkpoint-6"]


def test_a_run_with_a_damaged_checkpoint_ends_with_the_same_weights(
    straight, tiny, text_folder, tmp_path
):
    shutil.copytree(straight.path, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    (run.checkpoints / "checkpoint-6/optimizer.pt").unlink()
    train_into(run.path, make_recipe(tiny, text_folder))
    ours, theirs = weights(run), weights(straight)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_large_file_is_sampled_at_both_ends_and_in_between(tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    size = 80 << 20
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(size)
    mark_complete(folder, 1, "one process")
    assert damage(folder) == ""
    for place in (0, size - 1, size // 1024 * 300):
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        assert "has changed" in damage(folder), place
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(place)
            file.write(b"\0")


def test_the_mark_is_written_after_every_file_was_synced(tmp_path, monkeypatch):
    order = []
    sync, replace = os.fsync, os.replace
    folder = tmp_path / "checkpoint-1"
    (folder / "inner").mkdir(parents=True)
    for name in ("a.bin", "inner/b.bin"):
        (folder / name).write_bytes(b"1")
    named = {(folder / n).stat().st_ino: n for n in ("a.bin", "inner/b.bin", "inner", ".")}

    def note(descriptor):
        order.append(named.get(os.fstat(descriptor).st_ino, "mark"))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("renamed"), replace(a, b)))
    mark_complete(folder, 1, "one process")
    assert set(order[: order.index("mark")]) >= {"a.bin", "inner/b.bin", "inner"}
    assert order[-3:] == ["mark", "renamed", "."]


class Evil:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def sharded(folder, engine):
    """A checkpoint as DeepSpeed writes it: a pickle in a folder of its own."""
    inner = folder / "checkpoint-2" / "global_step2"
    inner.mkdir(parents=True)
    (inner / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(pickle.dumps({"a": 1}))
    (folder / "checkpoint-2" / "model.safetensors").write_bytes(b"w")
    mark_complete(folder / "checkpoint-2", 2, engine)
    return folder / "checkpoint-2"


@pytest.mark.parametrize(
    "engine", ["zero3", "zero3-offload", "deepspeed of the launcher", "fsdp of the launcher"]
)
def test_an_engine_that_unpickles_takes_only_what_this_user_wrote(tmp_path, monkeypatch, engine):
    own = sharded(tmp_path, engine)
    check_trusted(own, engine)
    left = own / "global_step2_universal" / "half.pt"  # of a conversion that was killed
    left.parent.mkdir()
    left.write_bytes(b"x")
    check_trusted(own, engine)
    assert not left.exists()
    planted = next(own.glob("global_step2/*.pt"))
    whole = planted.read_bytes()

    def refused():
        with pytest.raises(SkipwiseError, match="SKIPWISE_TRUST_CHECKPOINTS=1"):
            check_trusted(own, engine)

    planted.write_bytes(pickle.dumps(Evil("touch /tmp/never")))
    refused()
    mark = (own / "complete").read_text()
    os.environ["XDG_STATE_HOME"], mine = str(tmp_path / "else"), os.environ["XDG_STATE_HOME"]
    mark_complete(own, 2, engine)  # the attacker marks it with a key of his own
    os.environ["XDG_STATE_HOME"] = mine
    refused()
    (own / "complete").write_text(mark)
    planted.write_bytes(whole)
    check_trusted(own, engine)
    (own / "global_step2" / "bf16_zero_optim_states.pt").write_bytes(b"more")
    refused()
    monkeypatch.setenv("SKIPWISE_TRUST_CHECKPOINTS", "1")
    check_trusted(own, engine)  # the user typed it


@pytest.mark.parametrize("key", ["deepspeed", "fsdp", "fsdp_config", "accelerator_config"])
def test_a_recipe_that_changes_the_engine_in_trainer_is_no_way_around(tmp_path, key):
    tree = {"model": "m", "target_length": 64, "trainer": {key: {"x": 1}}}
    folder = checkpoint(tmp_path, 2)
    check_trusted(folder, "ddp", parse_recipe({"model": "m", "target_length": 64}))
    with pytest.raises(SkipwiseError, match="SKIPWISE_TRUST_CHECKPOINTS=1"):
        check_trusted(folder, "ddp", parse_recipe(tree))
    mark_complete(folder, 2, "ddp", parse_recipe(tree))
    check_trusted(folder, "ddp", parse_recipe(tree))


def test_the_key_is_the_users_own_and_nobody_else_can_read_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    sharded(tmp_path, "zero3")
    file = tmp_path / "skipwise" / "key"
    assert file.stat().st_mode & 0o777 == 0o600 and len(file.read_bytes()) == 32
    assert file.parent.stat().st_mode & 0o777 == 0o700


def test_planted_pickles_of_the_trainer_do_not_run(straight, tiny, text_folder, tmp_path):
    import torch

    ran = tmp_path / "ran"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        run = RunFolder(tmp_path / name)
        shutil.copytree(straight.path, run.path)
        shutil.rmtree(run.checkpoints / "checkpoint-6")
        torch.save(Evil(f"touch {ran}"), run.checkpoints / "checkpoint-4" / name)
        mark_complete(run.checkpoints / "checkpoint-4", 4, "one process")
        try:
            train_into(run.path, make_recipe(tiny, text_folder))
        except Exception as error:  # torch refuses; the file is not of this run
            assert "Evil" in str(error) or "weights_only" in str(error).lower(), error
        assert not ran.exists(), name
