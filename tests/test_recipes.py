"""Recipes: each loads, fits the hardware in its name by `skipwise plan`, and runs when shrunk."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from skipwise.cli import build_parser, main
from skipwise.config.parse import load_recipe
from skipwise.config.run_folder import RunFolder
from skipwise.models.hf_config import is_config_alone

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
SHAPES = {  # what the hub's config.json of each model says
    "mistralai/Mistral-7B-v0.1": ("mistral", 32000, 4096, 14336, 32, 32, 8, 32768, 1e4),
    "meta-llama/Llama-2-7b-hf": ("llama", 32000, 4096, 11008, 32, 32, 32, 4096, 1e4),
    "meta-llama/Meta-Llama-3-8B": ("llama", 128256, 4096, 14336, 32, 32, 8, 8192, 5e5),
    "Qwen/Qwen2.5-1.5B": ("qwen2", 151936, 1536, 8960, 28, 12, 2, 131072, 1e6),
    "TinyLlama/TinyLlama_v1.1": ("llama", 32000, 2048, 5632, 22, 32, 4, 2048, 1e4),
}
KEYS = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rope_theta"),
)
HARDWARE = {  # in a recipe's name: (a GPU of that memory, how many)
    "8xa6000": ("A6000", 8),
    "8xa100": ("A100-80GB", 8),
    "24gb": ("RTX-4090", 1),
}


def hardware_of(path):
    return next(value for end, value in HARDWARE.items() if path.stem.endswith(end))


@pytest.fixture
def config_folder(tmp_path):
    """A folder with the config.json of the recipe's model, as far as its shape goes."""

    def make(model):
        config = dict(zip(KEYS, SHAPES[model], strict=True))
        config["tie_word_embeddings"] = "Qwen" in model
        if "Mistral" in model:
            config["sliding_window"] = 4096
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert is_config_alone(str(tmp_path))
        return tmp_path

    return make


def test_there_is_a_recipe_for_each_hardware():
    assert len(RECIPES) >= 7 and {hardware_of(path) for path in RECIPES} == set(HARDWARE.values())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_its_first_lines_say_what_it_is_and_the_command(path):
    what, command = path.read_text().splitlines()[:2]
    recipe = load_recipe(path)
    _, number = hardware_of(path)
    assert "k to " in what and ("8 x" in what) == (number == 8)
    words = shlex.split(command.removeprefix("# "))
    assert words[:3] == ["skipwise", "extend", f"recipes/{path.name}"]
    given = build_parser().parse_args(words[1:])
    assert given.gpus == (number if number > 1 else None)
    lengths = re.search(r"(\d+)k to (\d+)k", what)
    assert lengths is not None and recipe.target_length == int(lengths[2]) * 1024


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_fits_the_hardware_it_names(path, config_folder, capsys):
    model = config_folder(load_recipe(path).model)
    name, number = hardware_of(path)
    arguments = [f"model={model}", "--gpus", str(number), "--gpu", name, "--json"]
    assert main(["plan", str(path), *arguments]) == 0
    (gpu,) = json.loads(capsys.readouterr().out)["gpus"]
    assert gpu["fits"], gpu


@pytest.mark.extended
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shrunk_to_a_tiny_model_it_trains_and_exports(path, tiny, text_folder, tmp_path):
    keys = yaml.safe_load(path.read_text())
    overrides = [
        *(f"model={tiny}", "target_length=256", f"data.sources=[{text_folder}]"),
        *(
            "training.num_steps=2",
            "training.warmup_steps=1",
            "training.global_batch_size=4",
            "engine=auto",
        ),
        *("eval.tasks=[passkey]", "eval.passkey_samples=2", "eval.context_lengths=[64,256]"),
        *("trainer.report_to=none", "load.dtype=float32", "eval.num_depths=2"),
        *([] if "rope" in keys else ["rope.type=yarn"]),
    ]
    overrides += ["original_length=64"] if "original_length" in keys else []
    overrides += ["train_length=32"] if "train_length" in keys else []
    assert main(["extend", str(path), "--out", str(tmp_path / "run"), *overrides]) == 0
    facts = RunFolder(tmp_path / "run").metadata()
    assert facts["status"] == "finished" and facts["target_length"] == 256
    assert (tmp_path / "run/model/model.safetensors").exists()
