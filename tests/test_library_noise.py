"""What libraries print when they are imported or load a model does not reach the user."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import skipwise
from skipwise import commands

OURS = (
    r"left out: ",
    r"\[\d/\d\] |about .* on this machine: ",  # a stage of extend, its estimate
    r"  (ok  |warn|FAIL) ",  # a check
    r"  (rope|temperature|rescaled without training|checkpoint)[ :]",
    r"(tokenize|load|probe|measure|search|evaluate|train|export|convert)\b.*(: | it/s)",  # progress
)


def lines_of(*arguments, cwd):
    source = str(Path(skipwise.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "skipwise", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": source, "SKIPWISE_CACHE": str(cwd / "cache")},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr.splitlines()


def strangers(lines):
    return [line for line in lines if line and not any(re.match(ours, line) for ours in OURS)]


@pytest.mark.extended
def test_check_prints_checks_on_stdout_and_nothing_of_a_library_on_stderr(tiny, tmp_path):
    out, err = lines_of("check", str(tiny), "--to", "256", cwd=tmp_path)
    assert not strangers(err)
    found = [line for line in out if line and not line.startswith(("ok   ", "warn ", "next: "))]
    assert not found


@pytest.mark.extended
def test_a_run_with_lora_its_training_and_evaluation_print_only_our_lines(
    tiny, text_folder, tmp_path
):
    steps = ["training.num_steps=2", "training.global_batch_size=8", "eval.passkey_samples=2"]
    steps += ["eval.tasks=[passkey]", "training.warmup_steps=1", "full_length.fraction=0.5"]
    data = ["--to", "256", "--data", str(text_folder), "--lora"]
    for arguments in (
        ["extend", str(tiny), *data, *steps, "--out", "runs/a"],
        ["eval", "runs/a/model", "--lengths", "128", "--json", "--tasks", "passkey"],
    ):
        out, err = lines_of(*arguments, cwd=tmp_path)
        if "--json" in arguments:
            json.loads("\n".join(out))
            err = [line for line in err if not line.startswith(("results ", "report ", "model, "))]
        assert not strangers(err), arguments


def test_only_the_note_on_an_optional_kernel_is_silenced(caplog):
    """bitsandbytes imports a kernel at its start, on CPUs with AVX-512 BF16."""
    commands._silence_libraries()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "no kernels")
    logger.warning("the CPU library was compiled without AVX-512")
    logging.getLogger("bitsandbytes.cextension").warning("no library for this CUDA version")
    assert [record.getMessage() for record in caplog.records] == [
        "the CPU library was compiled without AVX-512",
        "no library for this CUDA version",
    ]
