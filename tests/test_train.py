"""Training: what a killed, stopped or failing run leaves behind, and what it ends with."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from additive_mask import additive_mask
from safetensors.torch import load_file
from transformers import TrainingArguments

from skipwise.cli import main
from skipwise.config.parse import parse_recipe
from skipwise.config.recipe import ModelSettings
from skipwise.config.run_folder import RunFolder, open_run
from skipwise.errors import RunStopped, SkipwiseError
from skipwise.models.load import compute_dtype
from skipwise.models.prepared import prepare_model
from skipwise.pipeline.checks import check_run
from skipwise.pipeline.stages import prepare_run, train_run
from skipwise.training import callbacks as callbacks_module
from skipwise.training import trainer as training_module
from skipwise.training.arguments import training_arguments
from skipwise.training.callbacks import read_metrics
from skipwise.training.checkpoints import finished_checkpoint, last_checkpoint

STEPS = 12


def make_recipe(tiny, text_folder, *overrides):
    tree = {
        "model": str(tiny),
        "target_length": 256,
        "positions": {"content": "aligned"},
        "data": {"sources": [str(text_folder)]},
        "training": {
            "num_steps": STEPS,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": 1e-3,
            "save_steps": 4,
        },
        "trainer": {"report_to": "none"},
    }
    return parse_recipe(tree, list(overrides))


def run_training(recipe, folder):
    prepared = prepare_model(recipe)
    run = open_run(folder, recipe, "test")
    inputs = prepare_run(prepared, run)
    train_run(prepared, inputs, run)
    return run


def weights(run: RunFolder):
    folder = finished_checkpoint(run, STEPS)
    assert folder is not None
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def stop_at(step, number):
    """A callback's on_step_end that gets a signal at a step."""
    plain = callbacks_module.RunCallback.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            os.kill(os.getpid(), number)
        return plain(self, args, state, control, **kwargs)

    return on_step_end


@pytest.fixture(scope="module")
def straight(tiny, text_folder, tmp_path_factory):
    """A run that nothing disturbed."""
    os.environ["SKIPWISE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    folder = tmp_path_factory.mktemp("straight") / "run"
    return run_training(make_recipe(tiny, text_folder), folder)


def test_the_loss_falls_and_every_step_is_written_down(straight):
    metrics = read_metrics(straight)
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert metrics[-1]["num_tokens"] == STEPS * 4 * 64
    facts = straight.metadata()["training"]
    assert facts["num_tokens"] == STEPS * 4 * 64 and facts["mode"] == "full"


def test_examples_are_read_in_the_order_of_their_numbers(tiny, text_folder, tmp_path, monkeypatch):
    from skipwise.data.dataset import PoSEDataset

    seen = []
    plain = PoSEDataset.__getitem__
    monkeypatch.setattr(
        PoSEDataset, "__getitem__", lambda self, k: (seen.append(k), plain(self, k))[1]
    )
    recipe = make_recipe(tiny, text_folder, "training.num_steps=3")
    run_training(recipe, tmp_path / "run")
    assert seen[-12:] == list(range(12))  # the preflight reads the first ones before


def test_old_checkpoints_are_removed(straight):
    names = sorted(p.name for p in straight.checkpoints.glob("checkpoint-*"))
    assert names == ["checkpoint-12", "checkpoint-8"]


def test_what_training_took_is_written_down_before_its_last_checkpoint_counts(
    tiny, text_folder, tmp_path, monkeypatch
):
    # A run that is killed after the mark is done, and is not trained again.
    plain = callbacks_module.mark_complete

    def killed(folder, step, *rest, **more):
        plain(folder, step, *rest, **more)
        if step == STEPS:
            raise KeyboardInterrupt

    monkeypatch.setattr(callbacks_module, "mark_complete", killed)
    with pytest.raises(KeyboardInterrupt):
        run_training(make_recipe(tiny, text_folder), tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    assert finished_checkpoint(run, STEPS)
    facts, last = run.metadata()["training"], read_metrics(run)[-1]
    assert facts["num_steps"] == STEPS and facts["num_tokens"] == last["num_tokens"]
    assert facts["seconds"] == last["seconds"] > 0


def test_text_that_changed_since_a_checkpoint_is_refused(tiny, text_folder, tmp_path, monkeypatch):
    texts = tmp_path / "texts"
    shutil.copytree(text_folder, texts)
    (file, *_) = sorted(file for file in texts.rglob("*") if file.is_file())
    recipe, kept = make_recipe(tiny, texts), file.read_bytes()
    monkeypatch.setattr(callbacks_module.RunCallback, "on_step_end", stop_at(5, signal.SIGINT))
    with pytest.raises(RunStopped):
        run_training(recipe, tmp_path / "run")
    monkeypatch.undo()
    held_out = RunFolder(tmp_path / "run").eval_documents.read_bytes()
    file.write_bytes(kept.replace(b"return", b"retura", 1))
    with pytest.raises(SkipwiseError, match=r"text has changed since .*run started to train"):
        run_training(recipe, tmp_path / "run")
    assert RunFolder(tmp_path / "run").eval_documents.read_bytes() == held_out
    file.write_bytes(kept)  # read again, for it is newer, and the same
    run = run_training(recipe, tmp_path / "run")
    data = run.metadata()["data"]
    file.write_bytes(kept.replace(b"return", b"retura", 1))
    run_training(recipe, tmp_path / "run")  # nothing is left to train
    assert run.metadata()["data"] == data and run.eval_documents.read_bytes() == held_out


@pytest.mark.extended
def test_a_run_killed_in_the_middle_ends_with_bit_identical_weights(
    straight, tiny, text_folder, tmp_path
):
    recipe_file = straight.recipe_file
    command = [sys.executable, "-m", "skipwise", "train", str(recipe_file), "--out"]
    process = subprocess.Popen([*command, str(tmp_path / "run")], stderr=subprocess.DEVNULL)
    run = RunFolder(tmp_path / "run")
    deadline = time.time() + 120
    while len(read_metrics(run)) < 7 and time.time() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 7 <= len(read_metrics(run)) < STEPS
    broken = run.checkpoints / "checkpoint-9"  # as a kill in the middle of a save leaves it
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"half")
    resumed = run_training(make_recipe(tiny, text_folder), run.path)
    assert equal(weights(resumed), weights(straight))
    assert [m["step"] for m in read_metrics(resumed)] == list(range(1, STEPS + 1))
    assert [m["loss"] for m in read_metrics(resumed)] == [m["loss"] for m in read_metrics(straight)]


def test_a_folder_that_another_process_trains_into_is_left_alone(tiny, text_folder, tmp_path):
    recipe = make_recipe(tiny, text_folder, "training.num_steps=1")
    prepared, run = prepare_model(recipe), open_run(tmp_path / "run", recipe, "test")
    inputs = prepare_run(prepared, run)
    half = run.checkpoints / "checkpoint-3"  # as the other writes it
    half.mkdir(parents=True)
    with run.training_lock():
        check_run(prepared, inputs, run)  # of the same command, typed again
        with pytest.raises(SkipwiseError, match="another process is training into"):
            train_run(prepared, inputs, run)
    assert half.exists() and last_checkpoint(run) is None
    train_run(prepared, inputs, run)
    assert not half.exists() and last_checkpoint(run).name == "checkpoint-1"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_stops_and_the_run_goes_on_to_the_same_weights(
    straight, tiny, text_folder, tmp_path, monkeypatch, number
):
    recipe = make_recipe(tiny, text_folder)
    with monkeypatch.context() as patch:
        patch.setattr(callbacks_module.RunCallback, "on_step_end", stop_at(5, number))
        with pytest.raises(RunStopped, match="stopped at step 5 of 12"):
            run_training(recipe, tmp_path / "run")
    assert last_checkpoint(RunFolder(tmp_path / "run")).name == "checkpoint-5"
    assert equal(weights(run_training(recipe, tmp_path / "run")), weights(straight))


def test_one_process_trains_on_one_gpu_of_many(tiny, text_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "_setup_devices", torch.device("cpu"))
    monkeypatch.setattr(TrainingArguments, "_n_gpu", 4, raising=False)
    recipe = make_recipe(tiny, text_folder)
    made = training_arguments(recipe, RunFolder(tmp_path), torch.float32)
    assert made.n_gpu == 1 and made.train_batch_size == made.per_device_train_batch_size


def test_accumulation_gives_the_weights_of_one_large_batch(straight, tiny, text_folder, tmp_path):
    recipe = make_recipe(tiny, text_folder, "training.micro_batch_size=4", "load.dtype=float32")
    whole = weights(run_training(recipe, tmp_path / "whole"))
    recipe = make_recipe(tiny, text_folder, "training.micro_batch_size=1", "load.dtype=float32")
    parts = weights(run_training(recipe, tmp_path / "parts"))
    for name, tensor in whole.items():
        assert torch.allclose(tensor, parts[name], atol=2e-4), name


def test_a_loss_that_is_not_finite_stops_with_what_to_try(tiny, text_folder, tmp_path, monkeypatch):
    plain = torch.optim.AdamW.step

    def diverge(self, *args, **kwargs):
        found = plain(self, *args, **kwargs)
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data.mul_(1e30)
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", diverge)
    recipe = make_recipe(tiny, text_folder)
    with pytest.raises(SkipwiseError, match=r"not finite at step \d+.*\n.*learning_rate"):
        run_training(recipe, tmp_path / "run")
    assert len(read_metrics(RunFolder(tmp_path / "run"))) < STEPS


def test_a_full_disk_names_the_place_to_go_on_from(tiny, text_folder, tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    recipe = make_recipe(tiny, text_folder)
    with monkeypatch.context() as patch:
        plain = training_module.PoSETrainer._save_checkpoint

        def save(self, *args, **kwargs):
            return (full if self.state.global_step > 4 else plain)(self, *args, **kwargs)

        patch.setattr(training_module.PoSETrainer, "_save_checkpoint", save)
        with pytest.raises(SkipwiseError, match=r"full.*\n.*checkpoint-4"):
            run_training(recipe, tmp_path / "run")
    run_training(recipe, tmp_path / "run")


def test_a_failed_check_stops_the_run_before_it_starts(tiny, text_folder, tmp_path, monkeypatch):
    from skipwise.data.collator import ExampleCollator

    plain = ExampleCollator.__call__

    def without_mask(self, items):
        batch = plain(self, items)
        del batch["attention_mask"]
        return batch

    monkeypatch.setattr(ExampleCollator, "__call__", without_mask)
    recipe = make_recipe(tiny, text_folder, "positions.key_weights=none")
    prepared = prepare_model(recipe)
    run = open_run(tmp_path / "run", recipe, "test")
    inputs = prepare_run(prepared, run)
    with pytest.raises(SkipwiseError, match="chunk 2 gets no gradient from chunk 1"):
        check_run(prepared, inputs, run)
    with pytest.raises(SkipwiseError, match="chunk 2 gets no gradient from chunk 1"):
        train_run(prepared, inputs, run)
    assert not read_metrics(run)
    failed = [c for c in run.metadata()["checks"] if not c["passed"]]
    assert [c["name"] for c in failed] == ["chunks see each other"]


def test_the_train_verb_writes_a_failed_check_down(
    tiny, text_folder, tmp_path, monkeypatch, capsys
):
    from skipwise.config.parse import dump_recipe
    from skipwise.data.collator import ExampleCollator

    plain = ExampleCollator.__call__
    monkeypatch.setattr(
        ExampleCollator,
        "__call__",
        lambda self, items: {k: v for k, v in plain(self, items).items() if k != "attention_mask"},
    )
    (tmp_path / "r.yaml").write_text(
        dump_recipe(make_recipe(tiny, text_folder, "positions.key_weights=none"))
    )
    out = tmp_path / "run"
    assert main(["train", str(tmp_path / "r.yaml"), "--out", str(out)]) == 2
    assert "FAIL chunks see each other" in capsys.readouterr().err
    failed = [c["name"] for c in RunFolder(out).metadata()["checks"] if not c["passed"]]
    assert failed == ["chunks see each other"]
    assert not read_metrics(RunFolder(out))


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("trainer.max_steps=3", "set by training.num_steps"),
        ("trainer.no_such_thing=3", "not an argument"),
        ("training.micro_batch_size=3", "not a multiple"),
        ("training.lr_scheduler=nonsense", "refuses the training settings"),
    ],
)
def test_training_settings_that_do_not_fit_are_errors(tiny, text_folder, tmp_path, override, word):
    recipe = make_recipe(tiny, text_folder, override)
    with pytest.raises(SkipwiseError, match=word):
        training_arguments(recipe, RunFolder(tmp_path), compute_dtype(ModelSettings()))


def test_an_optimizer_that_would_not_be_used_is_an_error(tiny, text_folder, tmp_path):
    recipe = make_recipe(tiny, text_folder, "trainer.optim=adafactor")
    with pytest.raises(SkipwiseError, match="zero3-offload has its own optimizer"):
        training_arguments(recipe, RunFolder(tmp_path), torch.float32, "zero3-offload")


def test_masks_of_importance_weights_are_made_a_pass_at_a_time(tiny, text_folder, tmp_path):
    from skipwise.training.setup import set_up

    recipe = make_recipe(tiny, text_folder, "positions.key_weights=importance")
    prepared = prepare_model(recipe)
    run = open_run(tmp_path / "run", recipe, "test")
    inputs = prepare_run(prepared, run)
    training = set_up(prepared, inputs.data, run)
    assert all(check.passed for check in training.checks)
    fetched = next(iter(training.trainer.get_train_dataloader()))  # a whole step's are held
    assert all(tensor.dim() <= 2 for tensor in fetched.values())
    made = training.trainer._prepare_inputs(fetched)["attention_mask"]
    want = additive_mask([inputs.data.dataset[k]["example"] for k in range(2)], made.min().item())
    assert torch.allclose(made.float(), torch.from_numpy(want), rtol=1e-2)


def test_the_trainer_section_passes_arguments_through(tiny, text_folder, tmp_path):
    recipe = make_recipe(tiny, text_folder, "trainer.adam_beta2=0.9", "trainer.optim=adafactor")
    arguments = training_arguments(recipe, RunFolder(tmp_path), torch.float32)
    assert arguments.adam_beta2 == 0.9 and arguments.optim == "adafactor"


def test_lora_trains_and_goes_on_after_a_stop_to_the_same_adapter(
    tiny, text_folder, tmp_path, monkeypatch
):
    recipe = make_recipe(tiny, text_folder, "lora.rank=4")
    whole = run_training(recipe, tmp_path / "whole")
    assert whole.metadata()["training"]["mode"] == "lora"
    metrics = read_metrics(whole)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    with monkeypatch.context() as patch:
        patch.setattr(callbacks_module.RunCallback, "on_step_end", stop_at(5, signal.SIGINT))
        with pytest.raises(RunStopped):
            run_training(recipe, tmp_path / "parts")
    assert equal(weights(run_training(recipe, tmp_path / "parts")), weights(whole))


def test_the_train_verb_stops_at_a_stop_code_of_its_own(
    tiny, text_folder, tmp_path, monkeypatch, capsys
):
    def stopped(*args, **kwargs):
        raise RunStopped("stopped at step 3 of 12")

    monkeypatch.setattr("skipwise.pipeline.stages.train_run", stopped)
    file = tmp_path / "r.yaml"
    file.write_text(
        json.dumps(
            {
                "model": str(tiny),
                "target_length": 256,
                "data": {"sources": [str(text_folder)]},
                "training": {"global_batch_size": 4},
            }
        )
    )
    assert main(["train", str(file), "--out", str(tmp_path / "run")]) == 75
    assert "stopped at step 3" in capsys.readouterr().err


def test_a_disk_without_room_for_a_checkpoint_is_told_before_anything_is_touched(
    tiny, text_folder, tmp_path, monkeypatch
):
    from skipwise.training import checkpoints

    real = checkpoints.shutil.disk_usage
    recipe = make_recipe(tiny, text_folder)
    with monkeypatch.context() as patch:
        saved = []
        plain = checkpoints.check_disk_space

        def filling(run, num_bytes):
            saved.append(num_bytes)
            free = num_bytes - 1 if len(saved) > 1 else num_bytes
            patch.setattr(
                checkpoints.shutil, "disk_usage", lambda path: real(path)._replace(free=free)
            )
            plain(run, num_bytes)

        patch.setattr(training_module, "check_disk_space", filling)
        with pytest.raises(SkipwiseError, match=r"iB left.*\n.*resumes from checkpoint-4"):
            run_training(recipe, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    assert [p.name for p in run.checkpoints.glob("checkpoint-*")] == ["checkpoint-4"]
    size = sum(f.stat().st_size for f in run.checkpoints.rglob("*") if f.is_file())
    assert 0.5 * size < saved[0] <= size == saved[1]  # foretold from what is held, then known
    run_training(recipe, run.path)


def test_a_recipe_for_liger_leaves_the_loss_to_it(tiny, text_folder):
    from skipwise.training.setup import cuts_loss

    assert cuts_loss(make_recipe(tiny, text_folder), 8192, 32000)
    assert not cuts_loss(make_recipe(tiny, text_folder, "training.loss=full"), 8192, 32000)
    liger = "trainer.use_liger_kernel=true"
    assert not cuts_loss(make_recipe(tiny, text_folder, liger), 8192, 32000)
    with pytest.raises(SkipwiseError, match="both replace the loss"):
        cuts_loss(make_recipe(tiny, text_folder, liger, "training.loss=chunked"), 8192, 32000)


@pytest.mark.extended
def test_training_writes_lines_where_there_is_no_terminal(
    tiny, text_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("skipwise.config.progress.SECONDS", 0.0)
    run_training(make_recipe(tiny, text_folder), tmp_path / "run")
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("train: ")]
    pattern = rf"train: (\d+)%, step (\d+) of {STEPS}, (loss [\d.]+, )?[\d,]+ tokens a second, .*"
    steps = [int(re.fullmatch(pattern, line)[2]) for line in lines]
    assert steps == list(range(1, STEPS + 1)) and "loss" in lines[-1]
