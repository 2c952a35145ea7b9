"""The finish: its tokens, where it begins, what it trains on, and what stops it before PoSE."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from skipwise.cli import main
from skipwise.config.parse import dump_recipe, parse_recipe
from skipwise.config.run_folder import RunFolder, open_run
from skipwise.config.stages import full_length_stage
from skipwise.errors import RunStopped, SkipwiseError
from skipwise.models.prepared import prepare_model
from skipwise.pipeline.extend import extend
from skipwise.pipeline.stages import prepare_run, train_run
from skipwise.planning import next_change
from skipwise.training import callbacks as callbacks_module
from skipwise.training import trainer as training_module
from skipwise.training.callbacks import StageOffset, read_metrics
from skipwise.training.checkpoints import finished_checkpoint, last_checkpoint, trained_checkpoint
from skipwise.training.full_length_stage import make_full_length_stage
from skipwise.training.inputs import load_training_data
from skipwise.training.setup import set_up

L, T, STEPS, BATCH = 64, 256, 12, 4
FIRST, LAST = 8, 4  # steps before the finish, and its own: an example of T tokens each
RATE = 5e-4


def make_recipe(tiny, text_folder, *overrides):
    tree = {
        "model": str(tiny),
        "target_length": T,
        "attention_temperature": 1.0,
        "rope": {"type": "yarn"},
        "data": {"sources": [str(text_folder)]},
        "load": {"dtype": "float32"},
        "training": {
            "num_steps": STEPS,
            "global_batch_size": BATCH,
            "micro_batch_size": 2,
            "learning_rate": 1e-3,
            "save_steps": 2,
        },
        "distillation": {"weight": 0},
        "full_length": {"fraction": 0.34, "learning_rate": RATE},
        "eval": {"tasks": ["passkey"], "passkey_samples": 2},
        "trainer": {"report_to": "none"},
    }
    return parse_recipe(tree, list(overrides))


def run_training(recipe, folder):
    prepared = prepare_model(recipe)
    run = open_run(folder, recipe, "test")
    inputs = prepare_run(prepared, run)
    train_run(prepared, inputs, run)
    return run


def weights(folder):
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def trained(run):
    folder = trained_checkpoint(run, run.recipe())
    assert folder is not None and folder.parent == run.finish.checkpoints
    return weights(folder)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def in_phase(phase, step, act):
    """A callback's on_step_end that acts at a step of a part of the training."""
    plain = callbacks_module.RunCallback.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if self.phase == phase and state.global_step == step and args.max_steps > 1:
            act()
        return plain(self, args, state, control, **kwargs)

    return on_step_end


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def recorded(monkeypatch):
    """The inputs of every pass from now on."""
    seen, plain = [], training_module.PoSETrainer.training_step

    def training_step(self, model, inputs, *rest, **kwargs):
        seen.append(inputs)
        return plain(self, model, inputs, *rest, **kwargs)

    monkeypatch.setattr(training_module.PoSETrainer, "training_step", training_step)
    return seen


@pytest.fixture(scope="module")
def straight(tiny, text_folder, tmp_path_factory):
    """A run that nothing disturbed."""
    os.environ["SKIPWISE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return run_training(make_recipe(tiny, text_folder), tmp_path_factory.mktemp("finish") / "run")


@pytest.mark.extended
def test_what_is_trained_needs_no_processes_that_share_its_batch(
    straight, tiny, text_folder, tmp_path, monkeypatch
):
    shutil.copytree(straight.path, tmp_path / "run")
    done = []
    for stage in ("evaluate_run", "export_run", "report_run"):
        monkeypatch.setattr(
            f"skipwise.pipeline.extend.{stage}", lambda *_, s=stage, **__: done.append(s)
        )
    extend(make_recipe(tiny, text_folder), tmp_path / "run", num_processes=3)
    assert done == ["evaluate_run", "export_run", "evaluate_run", "report_run"]


def test_one_curve_goes_through_both_parts(straight):
    metrics = read_metrics(straight)
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    assert [m["num_tokens"] for m in metrics] == [BATCH * L * k for k in range(1, STEPS + 1)]
    assert [m.get("phase") for m in metrics] == [None] * FIRST + ["finish"] * LAST
    seconds = [m["seconds"] for m in metrics]
    assert seconds == sorted(seconds)
    rates = [m["learning_rate"] for m in metrics[FIRST:]]
    assert rates == pytest.approx([RATE, 0.75 * RATE, 0.5 * RATE, 0.25 * RATE])
    facts = straight.metadata()
    assert facts["training"]["num_steps"] == FIRST
    assert facts["training"]["num_tokens"] == FIRST * BATCH * L
    finish = facts["finish"]
    assert (finish["share"], finish["num_steps"], finish["num_tokens"]) == (0.34, LAST, LAST * T)
    assert 0 < finish["seconds"] < seconds[-1] and finish["peak_memory_gib"] > 0
    both = facts["training"]["seconds"] + finish["seconds"]
    assert both == pytest.approx(seconds[-1], abs=2e-3)


def test_the_finish_is_full_length_training_from_the_weights_of_pose(straight, tiny, text_folder):
    prepared = prepare_model(straight.recipe())
    finish = make_full_length_stage(prepared, load_training_data(prepared, None), straight)
    begins = finished_checkpoint(straight, FIRST)
    model = AutoModelForCausalLM.from_pretrained(begins, dtype=torch.float32).train()
    assert model.config.rope_parameters["factor"] == T / L
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    losses = []
    for k in range(LAST):
        ids = torch.from_numpy(finish.data.dataset[k]["input_ids"])[None]
        assert ids.shape == (1, T)
        loss = model(ids, labels=ids, use_cache=False).loss  # plain positions, all tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = RATE * (LAST - k) / LAST
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    logged = [m["loss"] for m in read_metrics(straight)[FIRST:]]
    assert logged == pytest.approx(losses, abs=1e-4)
    mine = model.state_dict()
    for name, tensor in trained(straight).items():
        assert torch.allclose(tensor, mine[name], atol=2e-5), name


@pytest.mark.extended
def test_what_the_trainer_is_given(tiny, text_folder, tmp_path, monkeypatch):
    seen = recorded(monkeypatch)
    run = run_training(make_recipe(tiny, text_folder), tmp_path / "run")
    lengths = [inputs["input_ids"].shape[1] for inputs in seen]
    assert lengths == [T] + [L] * (FIRST * 2) + [T] * LAST  # a trial first
    for inputs in (seen[0], *seen[-LAST:]):
        assert torch.equal(inputs["position_ids"], torch.arange(T)[None])
        assert inputs["attention_mask"].shape == (1, T) and bool(
            (inputs["attention_mask"] == 1).all()
        )
    skips = [bool((inputs["position_ids"].diff() != 1).any()) for inputs in seen[1:-LAST]]
    assert all(skips) and not (run.finish.path / "trial").exists()


def test_examples_depend_on_their_number_alone(straight, tiny, text_folder):
    def items(*overrides, processes=1):
        prepared = prepare_model(make_recipe(tiny, text_folder, *overrides))
        data = load_training_data(prepared, None)
        finish = make_full_length_stage(prepared, data, RunFolder("nowhere"), processes)
        assert finish.data.corpus.count_leaks(data.corpus.held_out)[:2] == (0, 0)
        return [finish.data.dataset[k]["input_ids"] for k in range(LAST)]

    plain = items()
    assert np.array_equal(plain, items(processes=2))
    assert np.array_equal(plain, items("training.micro_batch_size=4"))
    assert not np.array_equal(plain, items("seed=1"))
    full = prepare_model(make_recipe(tiny, text_folder, "method=full", "full_length={}"))
    own = load_training_data(full, None).dataset
    assert not np.array_equal(plain, [own[k]["input_ids"] for k in range(LAST)])


@pytest.mark.extended
@pytest.mark.parametrize(
    ("phase", "step", "message"),
    [
        ("train", 5, "stopped at step 5 of 8"),
        ("train", FIRST, "stopped after the last step"),
        ("finish", 3, "stopped at step 3 of 4, saved in .*finish"),
    ],
    ids=["before", "between", "inside"],
)
def test_a_stopped_run_goes_on_to_the_same_weights(
    straight, tiny, text_folder, tmp_path, monkeypatch, phase, step, message
):
    recipe = make_recipe(tiny, text_folder)
    with monkeypatch.context() as patch:
        act = in_phase(phase, step, interrupt)
        patch.setattr(callbacks_module.RunCallback, "on_step_end", act)
        with pytest.raises(RunStopped, match=message):
            run_training(recipe, tmp_path / "run")
    seen = recorded(monkeypatch)
    run = run_training(recipe, tmp_path / "run")
    assert equal(trained(run), trained(straight))
    left = FIRST - step if phase == "train" else 0
    lengths = [inputs["input_ids"].shape[1] for inputs in seen]
    assert lengths == [L] * (2 * left) + [T] * (LAST if phase == "train" else LAST - step)
    again, want = read_metrics(run), read_metrics(straight)
    assert [m["loss"] for m in again] == [m["loss"] for m in want]
    assert [m.get("phase") for m in again] == [m.get("phase") for m in want]


@pytest.mark.extended
def test_a_finish_that_died_goes_on_at_its_checkpoint(
    straight, tiny, text_folder, tmp_path, monkeypatch
):
    def die():
        raise RuntimeError("dead")

    recipe = make_recipe(tiny, text_folder)
    with monkeypatch.context() as patch:
        patch.setattr(callbacks_module.RunCallback, "on_step_end", in_phase("finish", 3, die))
        with pytest.raises(RuntimeError, match="dead"):
            run_training(recipe, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    assert last_checkpoint(run.finish).name == "checkpoint-2"
    assert trained_checkpoint(run, recipe) is None
    run_training(recipe, tmp_path / "run")
    assert equal(trained(run), trained(straight))


def test_what_a_finish_took_is_there_when_it_counts_as_done(
    tiny, text_folder, tmp_path, monkeypatch
):
    plain = callbacks_module.mark_complete

    def killed(folder, step, *rest, **more):
        plain(folder, step, *rest, **more)
        if "finish" in folder.parts and step == LAST:
            raise KeyboardInterrupt

    monkeypatch.setattr(callbacks_module, "mark_complete", killed)
    recipe = make_recipe(tiny, text_folder)
    with pytest.raises(KeyboardInterrupt):
        run_training(recipe, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    both = run.metadata()["training"]["seconds"] + run.metadata()["finish"]["seconds"]
    assert trained_checkpoint(run, recipe) and both == pytest.approx(
        read_metrics(run)[-1]["seconds"]
    )


@pytest.mark.extended
def test_a_killed_finish_ends_with_bit_identical_weights(straight, tmp_path):
    command = [sys.executable, "-m", "skipwise", "train", str(straight.recipe_file), "--out"]
    run = RunFolder(tmp_path / "run")
    process = subprocess.Popen([*command, str(run.path)], stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while len(read_metrics(run)) < FIRST + 3 and time.time() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert len(read_metrics(run)) >= FIRST + 3
    subprocess.run([*command, str(run.path)], check=True, capture_output=True)
    assert equal(trained(run), trained(straight))


@pytest.mark.extended
def test_an_adapter_goes_on_from_where_pose_left_it(tiny, text_folder, tmp_path, monkeypatch):
    from peft import get_peft_model_state_dict

    recipe = make_recipe(tiny, text_folder, "lora.rank=4")
    whole = run_training(recipe, tmp_path / "whole")
    assert whole.metadata()["finish"]["mode"] == "lora"
    begins = finished_checkpoint(whole, FIRST)
    prepared = prepare_model(recipe)
    data = load_training_data(prepared, None)
    finish = make_full_length_stage(prepared, data, RunFolder(tmp_path / "empty"))
    training = set_up(finish.prepared, finish.data, finish.run, StageOffset(checkpoint=begins))
    states = get_peft_model_state_dict(training.trainer.model)
    assert equal(states, weights(begins)) and any("lora_B" in name for name in states)
    moved = trained(whole)
    assert not any(torch.equal(states[name], moved[name]) for name in states if "lora_B" in name)
    with monkeypatch.context() as patch:
        act = in_phase("finish", 1, interrupt)
        patch.setattr(callbacks_module.RunCallback, "on_step_end", act)
        with pytest.raises(RunStopped):
            run_training(recipe, tmp_path / "parts")
    assert equal(trained(run_training(recipe, tmp_path / "parts")), moved)


@pytest.mark.parametrize("lora", [[], ["lora.rank=4"]], ids=["full", "lora"])
def test_the_teacher_of_the_finish_is_the_base(straight, tiny, text_folder, tmp_path, lora):
    recipe = make_recipe(tiny, text_folder, "distillation.weight=2", *lora)
    prepared = prepare_model(recipe)
    finish = make_full_length_stage(
        prepared, load_training_data(prepared, None), RunFolder(tmp_path / "empty")
    )
    before = StageOffset(checkpoint=None if lora else finished_checkpoint(straight, FIRST))
    training = set_up(finish.prepared, finish.data, finish.run, before)
    assert all(check.passed for check in training.checks)
    teacher = training.callback.distillation.teacher.state_dict()
    assert equal(teacher, AutoModelForCausalLM.from_pretrained(tiny).state_dict())


def test_text_without_long_documents_is_refused_before_anything_is_trained(tiny, tmp_path, capsys):
    lengths = [14] * 6 + [4] * 60  # lines: of 133 tokens, and below the 64 of an example
    lines = [
        {"text": "".join(f"x{i}{j} = {i * j}\n" for j in range(size))}
        for i, size in enumerate(lengths)
    ]
    (tmp_path / "short.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = make_recipe(tiny, tmp_path / "short.jsonl", "eval.tasks=[passkey]")
    with pytest.raises(SkipwiseError, match=r"documents of 256 tokens, and the longest.*\n.*pack"):
        extend(recipe, tmp_path / "run")
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    assert main(["train", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "train")]) == 2
    assert "full_length.fraction: 0.34 needs documents of 256 tokens" in capsys.readouterr().err
    for name in ("run", "train"):
        assert not read_metrics(RunFolder(tmp_path / name))
    packed = make_recipe(tiny, tmp_path / "short.jsonl", "data.short_documents=pack")
    prepared = prepare_model(packed)
    assert (
        make_full_length_stage(prepared, load_training_data(prepared, None), RunFolder(tmp_path))
        is not None
    )


def test_out_of_memory_at_full_length_shows_before_the_first_step(
    tiny, text_folder, tmp_path, monkeypatch
):
    plain = training_module.PoSETrainer.training_step

    def training_step(self, model, inputs, *rest, **kwargs):
        if inputs["input_ids"].shape[1] == T:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, model, inputs, *rest, **kwargs)

    monkeypatch.setattr(training_module.PoSETrainer, "training_step", training_step)
    for at, job in enumerate((extend, run_training)):
        run = tmp_path / f"run{at}"
        with pytest.raises(SkipwiseError, match=r"at 1 x 256 tokens.*full-length stage\n.*--lora"):
            job(make_recipe(tiny, text_folder), run)
        assert not read_metrics(RunFolder(run)) and not last_checkpoint(RunFolder(run))


def test_out_of_memory_in_the_finish_ends_with_leaving_it_out(tiny, text_folder):
    small = ["lora.train_embeddings=false", "lora.quantization=nf4", "trainer.optim=adamw_8bit"]
    recipe = make_recipe(tiny, text_folder, *small, "training.gradient_checkpointing=true")
    assert next_change(full_length_stage(recipe, L), has_gpu=False) == "full_length={}"


def test_a_dry_run_tries_a_step_and_trains_nothing(tiny, text_folder, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(dump_recipe(make_recipe(tiny, text_folder)))
    out = tmp_path / "run"
    assert main(["train", str(tmp_path / "r.yaml"), "--out", str(out), "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "ok   full-length step: tried: a pass of 256 tokens" in said
    assert "ok   full-length text: 10 documents of 256 tokens or more, 4 examples" in said
    assert not read_metrics(RunFolder(out)) and last_checkpoint(RunFolder(out)) is None
    assert last_checkpoint(RunFolder(out).finish) is None


def test_text_that_is_read_again_and_again_is_said(tiny, text_folder, tmp_path, capsys):
    recipe = make_recipe(tiny, text_folder, "training.num_steps=1200")
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    assert main(["check", str(tmp_path / "r.yaml")]) == 0
    assert "408 examples of them; each stretch of text is read about" in capsys.readouterr().out


@pytest.mark.extended
def test_the_whole_job_hands_over_what_the_finish_made(tiny, text_folder, tmp_path):
    run = extend(make_recipe(tiny, text_folder, "export.checkpoint=passkey"), tmp_path / "run")
    facts = run.metadata()
    steps = [c["step"] for c in facts["selection"]["candidates"]]
    assert steps == [2, 4, 6, 8, 10, 12]  # of both parts
    names = {check["name"] for check in facts["checks"] if check["passed"]}
    assert {"full-length text", "full-length step", "chunks see each other"} <= names
    page = (run.report / "index.html").read_text()
    assert "From step 9 on examples have full length" in page
    assert "Then 34 % of all tokens at full length" in page
    card = (run.model / "README.md").read_text()
    assert "then at full length: 4 steps of 1 examples of 256 tokens (1,024 in all)" in card


def test_the_last_checkpoint_of_the_finish_is_exported(straight, capsys):
    assert main(["export", str(straight.path)]) == 0
    assert equal(load_file(straight.model / "model.safetensors"), trained(straight))
