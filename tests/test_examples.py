"""The examples run as they are written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *arguments):
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_plain_loop_trains_and_saves_a_scaled_model(tiny, tmp_path):
    text = tmp_path / "book.txt"
    text.write_text("".join(f"value_{i} = {i * i}\n" for i in range(400)))
    out = run("plain_loop.py", tiny, text, "--to", 256, "--steps", 12, "--out", tmp_path / "model")
    losses = [float(line.rsplit(" ", 1)[1]) for line in out.splitlines() if "loss" in line]
    assert len(losses) == 12 and min(losses[-3:]) < losses[0]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "yarn"


@pytest.mark.slow
def test_the_trainer_example_trains_and_saves(tiny, text_folder, tmp_path):
    out = tmp_path / "model"
    run("transformers_trainer.py", tiny, text_folder, "--to", 256, "--steps", 6, "--out", out)
    assert (out / "model.safetensors").exists()
