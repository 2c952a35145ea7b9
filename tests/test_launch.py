"""Several processes on one machine: what their ends mean, without training."""

import itertools
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from skipwise.config.parse import parse_recipe
from skipwise.config.run_folder import open_run
from skipwise.errors import RunStopped, SkipwiseError
from skipwise.training.distributed import launcher as launch_module
from skipwise.training.distributed.engines import check_engine, set_fsdp2_mixed_precision
from skipwise.training.distributed.launcher import launch, launched


def ending(*codes):
    """Processes that end with these codes."""
    programs = [
        f"import os, signal; os.kill(os.getpid(), {-code})"
        if code < 0
        else f"raise SystemExit({code})"
        for code in codes
    ]
    return [subprocess.Popen([sys.executable, "-c", program]) for program in programs]


@pytest.mark.parametrize(
    ("codes", "signals", "first"),
    [
        ((0, 0), [], None),
        ((75, 75), [], None),
        ((0, 75), [], None),
        ((0, 2), [], 1),
        ((-signal.SIGKILL, 0), [], 0),
        ((-signal.SIGTERM, 75), [signal.SIGTERM], None),
        ((-signal.SIGTERM, 75), [], 0),
    ],
)
def test_which_process_failed_first(codes, signals, first):
    assert launch_module._wait(ending(*codes), signals) == first


def test_processes_that_the_launcher_ends_have_not_failed(monkeypatch):
    processes = ending(75)
    processes += [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])]
    times = itertools.count(0, 30)
    monkeypatch.setattr(launch_module.time, "monotonic", lambda: next(times))
    assert launch_module._wait(processes, []) is None
    assert [process.returncode for process in processes] == [75, -signal.SIGKILL]


def test_a_killed_process_is_the_cause_of_the_others_failure():
    processes = ending(2, -signal.SIGKILL)
    for process in processes:
        process.wait()
    assert launch_module._first_failure(processes, []) == 1


@pytest.fixture
def ends(monkeypatch):
    """`launch` with processes that end as told."""

    def run(*codes):
        processes = iter(ending(*codes))
        with monkeypatch.context() as patch:
            patch.setattr(launch_module.subprocess, "Popen", lambda *a, **k: next(processes))
            launch(["train"], len(codes))

    return run


def test_a_stop_of_any_process_is_a_stop(ends):
    ends(0, 0)
    with pytest.raises(RunStopped):
        ends(75, 0)
    with pytest.raises(RunStopped):
        ends(75, 75)
    with pytest.raises(SkipwiseError, match=r"process 1 of 2 was killed \(signal 9\)"):
        ends(0, -signal.SIGKILL)
    with pytest.raises(SkipwiseError, match="process 1 of 2 failed: exit code 1"):
        ends(0, 1)


def test_what_all_processes_say_is_said_once(ends, capsys):
    with pytest.raises(SkipwiseError, match="process 0 of 3 failed, for the reason above"):
        ends(2, 2, 2)
    assert capsys.readouterr().err == ""


def test_real_processes_get_their_place(tmp_path, capfd):
    with pytest.raises(SkipwiseError, match="process 0 of 2 failed, for the reason above"):
        launch(["train", str(tmp_path / "nowhere")], 2)
    assert capfd.readouterr().err.count("missing target length") == 1


def test_accelerates_launcher_for_one_process_is_a_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    assert not launched()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert launched()


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_a_model_that_no_engine_has_wrapped_fails_the_check(engine):
    model = torch.nn.Linear(2, 2)
    check = check_engine(engine, SimpleNamespace(model=model, model_wrapped=model))
    assert not check.passed and "2 of 2 trained tensors are not" in check.detail


def test_fsdp_sums_gradients_in_float32_and_leaves_the_loss_as_it_is():
    plugin = SimpleNamespace(fsdp_version=2, mixed_precision_policy="accelerate's")
    state = SimpleNamespace(fsdp_plugin=plugin)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(state=state))
    set_fsdp2_mixed_precision(trainer, torch.float32)
    assert plugin.mixed_precision_policy == "accelerate's"
    set_fsdp2_mixed_precision(trainer, torch.bfloat16)
    policy = plugin.mixed_precision_policy
    assert policy.param_dtype == torch.bfloat16 and policy.reduce_dtype == torch.float32
    assert policy.output_dtype is None


def test_another_engine_goes_on_with_the_same_run(tmp_path):
    def make(**keys):
        return parse_recipe({"model": "m", "target_length": 256, **keys})

    run = open_run(tmp_path / "run", make(), "test")
    assert open_run(run.path, make(engine="ddp"), "test").recipe().engine == "ddp"
    with pytest.raises(SkipwiseError, match="another recipe"):
        open_run(run.path, make(engine="ddp", seed=1), "test")
