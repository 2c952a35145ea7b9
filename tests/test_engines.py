"""Engines on two real processes over gloo train what one process trains, and go on from it."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec

import forked
import pytest
import torch
import yaml
from safetensors.torch import load_file

from skipwise.cli import main
from skipwise.config.parse import parse_recipe
from skipwise.config.recipe import LoRASettings
from skipwise.config.run_folder import RunFolder
from skipwise.errors import SkipwiseError
from skipwise.models.lora import num_parameters
from skipwise.training.callbacks import read_metrics
from skipwise.training.checkpoints import last_checkpoint, mark_complete, num_processes_of
from skipwise.training.distributed import engines, launcher
from skipwise.training.distributed.engines import engine_of, keep_rope_in_float32

STEPS = 20
ENGINES = ["ddp", "fsdp2", "zero3"]
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="no DeepSpeed")
ZERO3 = [pytest.mark.extended, needs_deepspeed]
EACH = [pytest.param(e, marks=ZERO3 if e == "zero3" else ()) for e in ENGINES]


@pytest.fixture(scope="module")
def recipe_file(tiny, text_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    os.environ["SKIPWISE_CACHE"] = str(folder / "cache")
    tree = {
        "model": str(tiny),
        "target_length": 256,
        "positions": {"content": "aligned"},
        "data": {"sources": [str(text_folder)]},
        "load": {"dtype": "float32"},
        "training": {
            "num_steps": STEPS,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": 1e-3,
            "save_steps": 8,
            "loss": "chunked",
        },
        "trainer": {"report_to": "none"},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def start(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "skipwise", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def skipwise(*arguments):
    """stdout and stderr of a verb in this process; those that it launches are forked."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(launcher, "subprocess", forked.training)
        patch.setenv("OMP_NUM_THREADS", "1")
        code = main([*map(str, arguments)])
    assert code == 0, err.getvalue()
    return out.getvalue(), err.getvalue()


def losses(folder):
    return [m["loss"] for m in read_metrics(RunFolder(folder))]


def weights(folder, step=STEPS):
    (file,) = (folder / "checkpoints" / f"checkpoint-{step}").glob("*.safetensors")
    return load_file(file)


def assert_close(a, b, atol):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.allclose(tensor.float(), b[name].float(), atol=atol), name


@pytest.fixture(scope="module")
def alone(recipe_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    skipwise("train", recipe_file, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def trained(recipe_file, tmp_path_factory):
    """Runs of two processes, by engine."""
    made = {}

    def run(engine):
        if engine not in made:
            made[engine] = tmp_path_factory.mktemp(engine) / "run"
            arguments = ("--out", made[engine], "--gpus", 2, "--engine", engine)
            out, _ = skipwise("train", recipe_file, *arguments)
            assert out.count("trained:") == 1
        return made[engine]

    return run


@pytest.mark.extended
@pytest.mark.parametrize("engine", EACH)
def test_two_processes_have_the_loss_and_weights_of_one(alone, trained, engine):
    folder = trained(engine)
    want, have = losses(alone), losses(folder)
    assert len(have) == STEPS and want[-1] < want[0]
    assert max(abs(a - b) for a, b in zip(want, have, strict=True)) < 1e-5
    assert_close(weights(folder), weights(alone), 1e-5)
    facts = RunFolder(folder).metadata()
    assert facts["training"]["engine"] == engine and facts["training"]["num_processes"] == 2
    checks = {check["name"]: check for check in facts["checks"]}
    assert all(check["passed"] for check in checks.values())
    assert "over 2 processes" in checks["engine"]["detail"]
    assert {"rope", "positions", "chunks see each other", "no look ahead"} <= checks.keys()
    assert (
        facts["model"]["num_parameters"] == RunFolder(alone).metadata()["model"]["num_parameters"]
    )


@pytest.mark.extended
@pytest.mark.parametrize("engine", EACH)
def test_one_process_goes_on_where_two_were_stopped(alone, trained, engine, tmp_path):
    shutil.copytree(trained(engine), tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/checkpoint-20")
    skipwise("train", tmp_path / "run", "--gpus", 1)
    want, have = losses(alone), losses(tmp_path / "run")
    assert max(abs(a - b) for a, b in zip(want, have, strict=True)) < 1e-5
    assert_close(weights(tmp_path / "run"), weights(alone), 1e-5)


class Evil:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.extended
@needs_deepspeed
@pytest.mark.parametrize("processes", [2, 1], ids=["loaded", "converted"])
@pytest.mark.parametrize("kind", ["model_states", "optim_states"])
def test_a_planted_pickle_of_deepspeed_does_not_run(trained, tmp_path, kind, processes):
    run, ran = RunFolder(tmp_path / "run"), tmp_path / "ran"
    shutil.copytree(trained("zero3"), run.path)
    shutil.rmtree(run.checkpoints / "checkpoint-20")
    folder = run.checkpoints / "checkpoint-16"
    for planted in folder.glob(f"global_step16/*{kind}.pt"):
        torch.save({"module": Evil(ran)}, planted)
    mark = json.loads((folder / "complete").read_text())
    theirs = {**mark, "files": {}, "seal": "0" * 64}  # a mark that does not say it is damaged
    (folder / "complete").write_text(json.dumps(theirs))
    with redirect_stderr(io.StringIO()) as err, pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "subprocess", forked.training)
        code = main(["train", str(run.path), "--gpus", str(processes), "--engine", "zero3"])
    assert code == 2 and not ran.exists(), err.getvalue()


@pytest.mark.extended
@pytest.mark.parametrize("engine", EACH)
def test_what_an_engine_trained_is_exported(trained, engine):
    _, err = skipwise("export", trained(engine))
    assert "ok   reload" in err
    model = trained(engine) / "model"
    exported = load_file(model / "model.safetensors")
    assert_close(exported, weights(trained(engine)), 1e-6)
    assert json.loads((model / "config.json").read_text())["max_position_embeddings"] == 256


SHORT = ("training.num_steps=4", "training.save_steps=2", "--lora")


@pytest.fixture(scope="module")
def lora_alone(recipe_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "run"
    skipwise("train", recipe_file, "--out", folder, *SHORT)
    return folder


@pytest.mark.extended
@pytest.mark.parametrize("engine", EACH)
def test_lora_on_two_processes_goes_on_with_one(recipe_file, lora_alone, tmp_path, engine):
    arguments = ("--out", tmp_path / "run", "--gpus", 2, "--engine", engine)
    skipwise("train", recipe_file, *arguments, *SHORT)
    want = weights(lora_alone, 4)
    assert_close(weights(tmp_path / "run", 4), want, 1e-5)
    assert any("lora_A" in name for name in want) and any("norm" in name for name in want)
    shutil.rmtree(tmp_path / "run/checkpoints/checkpoint-4")
    skipwise("train", tmp_path / "run", "--gpus", 1)
    assert_close(weights(tmp_path / "run", 4), want, 1e-5)


@pytest.mark.extended
def test_torchrun_starts_the_same_training(alone, recipe_file, tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
            *("-m", "skipwise", "train", str(recipe_file), "--out", str(tmp_path / "run")),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert_close(weights(tmp_path / "run"), weights(alone), 1e-5)


def wait_for(condition, process, seconds=120):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.02)


LONG = ("training.num_steps=28", "training.save_steps=8")  # long enough to be stopped in


@pytest.mark.extended
def test_a_signal_to_the_launcher_saves_in_every_process(recipe_file, tmp_path):
    out = tmp_path / "run"
    process = start("train", recipe_file, "--out", out, "--gpus", 2, "--engine", "fsdp2", *LONG)
    wait_for(lambda: len(losses(out)) >= 2, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75 and "saved" in err, err
    stopped = last_checkpoint(RunFolder(out))
    assert stopped is not None and int(stopped.name.split("-")[1]) < 28
    skipwise("train", out)  # the recipe says fsdp2, so a process is started for it
    steps = [m["step"] for m in read_metrics(RunFolder(out))]
    assert steps == list(range(1, 29)) and weights(out, 28)


@pytest.mark.extended
def test_a_killed_process_ends_the_others_and_the_run_goes_on(recipe_file, tmp_path):
    out = tmp_path / "run"
    process = start("train", recipe_file, "--out", out, "--gpus", 2, *LONG)
    wait_for(lambda: len(losses(out)) >= 3, process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "was killed (signal 9)" in err and "--gpus" in err, err
    skipwise("train", out, "--gpus", 2)
    steps = [m["step"] for m in read_metrics(RunFolder(out))]
    assert steps == list(range(1, 29)) and weights(out, 28)


@pytest.mark.extended
def test_a_process_killed_while_all_save_loses_no_step_and_no_checkpoint(recipe_file, tmp_path):
    """The one that writes, as soon as the folder is there: the shards are gathered or written."""
    out, options = tmp_path / "run", ("--gpus", 2, "--engine", "fsdp2", *LONG)
    process = start("train", recipe_file, "--out", out, *options)
    folder = out / "checkpoints" / "checkpoint-16"
    wait_for(lambda: list(folder.parent.glob(f"*{folder.name}*")), process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[0]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "was killed (signal 9)" in err, err
    kept = last_checkpoint(RunFolder(out))
    assert kept is not None and kept.name in ("checkpoint-8", "checkpoint-16")
    skipwise("train", out)
    assert [m["step"] for m in read_metrics(RunFolder(out))] == list(range(1, 29))
    assert weights(out, 28)


@pytest.mark.extended
def test_a_process_that_does_not_answer_ends_the_others_in_lines(recipe_file, tmp_path):
    """As behind a network that is gone: it is there, and says nothing."""
    out, options = tmp_path / "run", ("--gpus", 2, *LONG)
    process = start("train", recipe_file, "--out", out, *options, "trainer.ddp_timeout=10")
    wait_for(lambda: len(losses(out)) >= 10, process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGSTOP)
    _, err = process.communicate(timeout=90)
    said = err[err.rindex("another rank does not answer") :]
    assert process.returncode == 2 and "goes on from checkpoint-" in said, err
    assert "Traceback" not in err and "process 0 of 2 failed" in said


def make(engine, **tree):
    return parse_recipe({"model": "m", "target_length": 256, "engine": engine, **tree})


def test_an_engine_that_shards_needs_processes(monkeypatch):
    with pytest.raises(SkipwiseError, match=r"processes.*\n.*--gpus N"):
        engine_of(make("fsdp2"))
    assert engine_of(make("ddp")) == engine_of(make("auto")) == "one process"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert engine_of(make("fsdp2")) == "fsdp2" and engine_of(make("auto")) == "ddp"


def test_a_launcher_that_chose_another_engine_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert engine_of(make("auto")) == "fsdp of the launcher"
    assert engine_of(make("fsdp2")) == "fsdp2"
    with pytest.raises(SkipwiseError, match=r"zero3 and the launcher's configuration fsdp"):
        engine_of(make("zero3"))


def test_a_missing_deepspeed_says_what_to_install(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SkipwiseError, match=r"\.\[deepspeed\]"):
        engine_of(make("zero3"))


def test_a_checkpoint_of_another_engine_is_refused(tmp_path):
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    mark_complete(folder, 4, "zero3")
    assert num_processes_of(folder, "zero3") == 1
    with pytest.raises(SkipwiseError, match=r"engine zero3.*\npass --engine zero3"):
        num_processes_of(folder, "ddp")
    (folder / "complete").write_text("4\n")  # of version 0.1
    assert num_processes_of(folder, "ddp") == 1


def test_only_the_first_process_loads_weights_under_fsdp2(monkeypatch):
    name = "ACCELERATE_USE_FSDP"
    monkeypatch.delenv(name, raising=False)
    for once in (True, False):
        with engines.loading(once):
            assert (os.environ.get(name) == "true") == once
        assert name not in os.environ
    lora, frozen = LoRASettings(), LoRASettings(train_embeddings=False)
    assert engines.cpu_ram_efficient_loading(
        "fsdp2", None, True
    ) and engines.cpu_ram_efficient_loading("fsdp2", lora, False)
    assert engines.cpu_ram_efficient_loading("fsdp2", frozen, True)
    assert not engines.cpu_ram_efficient_loading("fsdp2", lora, True)
    assert not engines.cpu_ram_efficient_loading("fsdp2", LoRASettings(quantization="nf4"), False)
    assert not engines.cpu_ram_efficient_loading("ddp", None, False)


@pytest.mark.extended
@pytest.mark.parametrize("mode", [(), ("--lora",)], ids=["full", "lora"])
def test_tied_embeddings_train_alike_under_fsdp2(recipe_file, tmp_path, tiny, mode):
    from transformers import LlamaForCausalLM

    model = tmp_path / "tied"
    shutil.copytree(tiny, model)
    tied = LlamaForCausalLM.from_pretrained(tiny, tie_word_embeddings=True)
    tied.tie_weights()
    tied.save_pretrained(model)
    short = ("training.num_steps=3", f"model={model}", *mode)
    skipwise("train", recipe_file, "--out", tmp_path / "one", *short)
    arguments = ("--gpus", 2, "--engine", "fsdp2")
    skipwise("train", recipe_file, "--out", tmp_path / "two", *arguments, *short)
    pairs = zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True)
    assert max(abs(a - b) for a, b in pairs) < 1e-5


def test_frequencies_are_float32_again_after_a_cast_of_the_model(tiny):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny)
    exact = model.model.rotary_emb.inv_freq.clone()
    restore = keep_rope_in_float32(model)
    model.bfloat16()  # what DeepSpeed does
    assert not torch.equal(model.model.rotary_emb.inv_freq.float(), exact)
    restore()
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, exact)


def test_more_gpus_than_there_are_is_an_error(recipe_file, monkeypatch, capsys):
    from skipwise import cli, commands

    monkeypatch.setattr(commands, "num_gpus", lambda: 2)
    assert cli.main(["train", str(recipe_file), "--gpus", "4"]) == 2
    assert "this machine has 2" in capsys.readouterr().err
    assert cli.main(["train", str(recipe_file), "--gpus", "0"]) == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train", str(recipe_file), "--gpus", "2"]) == 2
    assert "launcher has already started 2" in capsys.readouterr().err
    assert cli.main(["extend", str(recipe_file)]) == 2
    assert "extend starts its own processes" in capsys.readouterr().err


@pytest.mark.extended
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="no bitsandbytes")
def test_qlora_trains_packed_weights_and_exports_whole_ones(recipe_file, tmp_path):
    out = tmp_path / "run"
    lora = ("--lora", "lora.quantization=nf4", "training.num_steps=3")
    skipwise("train", recipe_file, "--out", out, *lora)
    facts = RunFolder(out).metadata()
    assert facts["training"]["mode"] == "qlora"
    _, err = skipwise("export", out)
    assert "ok   reload" in err
    whole = load_file(out / "model/model.safetensors")
    assert sum(t.numel() for t in whole.values()) == facts["model"]["num_parameters"]


@pytest.mark.extended
@needs_deepspeed
def test_quantised_weights_under_deepspeed_are_refused(recipe_file, tmp_path):
    arguments = ("--gpus", 2, "--engine", "zero3", "--lora", "lora.quantization=nf4")
    process = start("train", recipe_file, "--out", tmp_path / "run", *arguments)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "DeepSpeed cannot shard quantised weights" in err and "--engine fsdp2" in err


def test_parameters_of_a_plain_model_are_counted(tiny):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert num_parameters(model) == sum(p.numel() for p in model.parameters())
