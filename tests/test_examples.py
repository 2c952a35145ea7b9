"""The examples run as they are written."""

import importlib
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from hub_stand_in import TOKEN, Hub

EXAMPLES = Path(__file__).parents[1] / "examples"
T = 256


def run(name, *arguments):
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def assert_portable(folder):
    """The folder is scaled in both spellings, ready to generate, and loads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((folder / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == config["rope_scaling"]["rope_type"] == "yarn"
    assert config["max_position_embeddings"] == T and config["use_cache"] is True
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).model_max_length == T
    return model


def assert_trained(folder, base):
    """The weights are others than the base's, adapters included."""
    from transformers import AutoModelForCausalLM

    trained = assert_portable(folder).state_dict()
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert trained.keys() == before.keys()
    assert any(not torch.equal(trained[name].float(), before[name].float()) for name in before)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Prompts of some hundred tokens with short answers."""
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    lines = [
        {
            "prompt": "".join(f"def f{i}_{j}(x): return x + {i * j}\n" for j in range(8)),
            "completion": f" f{i}_7 returns x + {i * 7}",
        }
        for i in range(12)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.extended
def test_the_plain_loop_trains_and_saves_a_scaled_model(tiny, tmp_path):
    text = tmp_path / "book.txt"
    text.write_text("".join(f"value_{i} = {i * i}\n" for i in range(400)))
    out = run("plain_loop.py", tiny, text, "--to", T, "--steps", 12, "--out", tmp_path / "model")
    losses = [float(line.rsplit(" ", 1)[1]) for line in out.splitlines() if "loss" in line]
    assert len(losses) == 12 and min(losses[-3:]) < losses[0]
    assert_trained(tmp_path / "model", tiny)


@pytest.mark.extended
def test_the_trainer_example_checks_trains_and_saves_a_portable_model(tiny, text_folder, tmp_path):
    texts, out = text_folder / "part.jsonl", tmp_path / "model"
    said = run("transformers_trainer.py", tiny, texts, "--to", T, "--steps", 6, "--out", out)
    assert "ok   chunks see each other" in said and "FAIL" not in said
    assert_trained(out, tiny)


@pytest.mark.extended
@pytest.mark.parametrize("lora", [[], ["--lora"]])
def test_the_trl_example_checks_trains_and_saves_a_portable_model(tiny, chats, tmp_path, lora):
    pytest.importorskip("trl")
    out = tmp_path / "model"
    said = run("trl_sft.py", tiny, chats, "--to", T, "--steps", 4, "--out", out, *lora)
    assert "ok   chunks see each other" in said and "FAIL" not in said
    assert_trained(out, tiny)


@pytest.mark.extended
def test_the_job_extends_and_pushes_when_asked(tiny, text_folder, tmp_path):
    small = ["training.num_steps=2", "training.global_batch_size=2", "rope.type=yarn"]
    small += ["eval.tasks=[passkey]", "eval.passkey_samples=2", "attention_temperature=1.0"]
    command = [EXAMPLES / "hub_job.py", tiny, "--to", T, "--data", text_folder, *small]
    hub = Hub()
    home = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}

    def job(*more, token=TOKEN):
        done = subprocess.run(
            [sys.executable, *map(str, (*command, *more))],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, **home, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0"},
        )
        return done.returncode, done.stdout, done.stderr

    code, _, err = job("--push", "me/long", token="hf_" + "y" * 34)
    assert code != 0 and "Invalid" in err and not (tmp_path / "run").exists()
    code, out, err = job()
    assert code == 0, err[-2000:]
    assert "| passkey " in out and hub.repositories == {}
    assert_trained(tmp_path / "run/model", tiny)
    code, out, err = job("--push", "me/long")  # the run is there: only the upload is left
    assert code == 0, err[-2000:]
    assert hub.private["me/long"] and f"{hub.url}/me/long" in out
    assert {"config.json", "model.safetensors", "README.md"} <= set(hub.repositories["me/long"])


def test_the_header_of_the_job_names_this_package_and_its_python():
    tomllib = pytest.importorskip("tomllib")
    text = (EXAMPLES / "hub_job.py").read_text()
    block = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", text)
    header = tomllib.loads(re.sub("(?m)^# ?", "", block["content"]))  # as PEP 723 reads it
    project = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text())["project"]
    assert header["requires-python"] == project["requires-python"]
    assert header["dependencies"] == [f"{project['name']}[hub]"]
    path = header["tool"]["uv"]["sources"][project["name"]]["path"]
    assert (EXAMPLES / path / "pyproject.toml").exists()


def axolotl_config(tiny, text_folder, out):
    """The example's YAML on the tiny model, as Axolotl reads it."""
    cfg = yaml.safe_load((EXAMPLES / "axolotl.yaml").read_text())
    cfg["base_model"], cfg["output_dir"] = str(tiny), str(out)
    cfg["skipwise"]["target_length"] = T
    cfg["datasets"][0]["path"] = str(text_folder / "part.jsonl")
    cfg |= {"gradient_accumulation_steps": 1, "max_steps": 4, "bf16": False}
    return cfg


@pytest.mark.extended
@pytest.mark.skipif(find_spec("axolotl") is None, reason="no Axolotl")
def test_the_axolotl_example_trains_in_axolotl_itself(tiny, text_folder, tmp_path):
    out, file = tmp_path / "model", tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(axolotl_config(tiny, text_folder, out)))
    done = subprocess.run(
        [sys.executable, "-m", "axolotl.cli.train", str(file)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "AXOLOTL_DO_NOT_TRACK": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ok   chunks see each other" in done.stdout and "FAIL" not in done.stdout
    assert_trained(out, tiny)


@pytest.fixture
def plugin(monkeypatch):
    """The plugin on a stand-in of Axolotl's base class, which does nothing in any of its hooks."""
    pytest.importorskip("pydantic")
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["axolotl.integrations.base"].BasePlugin = type("BasePlugin", (), {})  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "skipwise.integrations.axolotl", raising=False)
    module = importlib.import_module("skipwise.integrations.axolotl")
    yield module.SkipwisePlugin()
    sys.modules.pop("skipwise.integrations.axolotl", None)


def hooks_in_order(plugin, cfg, records):
    """What axolotl 0.19.0 does with a plugin, in its order, around a transformers Trainer."""
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        Trainer,
        TrainingArguments,
    )

    plugin.register(cfg)
    module, name = plugin.get_input_args().rsplit(".", 1)
    assert getattr(sys.modules[module], name)(**cfg).skipwise == cfg["skipwise"]
    config = AutoConfig.from_pretrained(cfg["base_model"])
    for key, value in cfg["model_config"].items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_pretrained(cfg["base_model"], config=config)
    tokenizer = AutoTokenizer.from_pretrained(cfg["base_model"])
    plugin.post_model_load(cfg, model)
    make, arguments = plugin.get_collator_cls_and_kwargs(cfg, is_eval=False)
    assert plugin.get_collator_cls_and_kwargs(cfg, is_eval=True) is None
    arguments = {"padding": True, "pad_to_multiple_of": 64, **arguments, "return_tensors": "pt"}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=cfg["output_dir"],
            max_steps=cfg["max_steps"],
            per_device_train_batch_size=cfg["micro_batch_size"],
            save_strategy="no",
            report_to=[],
            use_cpu=True,
        ),
        train_dataset=[{"input_ids": ids} for ids in tokenizer(records)["input_ids"]],
        data_collator=make(tokenizer, **arguments),
        callbacks=plugin.add_callbacks_pre_trainer(cfg, model),
        processing_class=tokenizer,
    )
    trainer.train()
    plugin.post_train(cfg, model)  # before the weights are saved
    trainer.save_model(cfg["output_dir"])
    plugin.post_train(cfg, model)
    return trainer


def test_the_axolotl_plugin_scales_checks_trains_and_finishes(
    plugin, tiny, text_folder, tmp_path, capsys
):
    cfg = axolotl_config(tiny, text_folder, tmp_path / "model")
    lines = (text_folder / "part.jsonl").read_text().splitlines()
    hooks_in_order(plugin, cfg, [json.loads(line)["text"] for line in lines])
    assert cfg["sequence_len"] == T
    assert cfg["model_config"]["rope_parameters"]["rope_type"] == "yarn"
    said = capsys.readouterr().out
    assert "ok   chunks see each other" in said and "FAIL" not in said
    assert_trained(tmp_path / "model", tiny)


def test_the_axolotl_plugin_may_read_its_own_yaml_again(plugin, tiny, text_folder, tmp_path):
    cfg = axolotl_config(tiny, text_folder, tmp_path)
    plugin.register(cfg)
    once = json.dumps(cfg)
    plugin.register(cfg)
    assert json.dumps(cfg) == once


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sample_packing": True}, "set sample_packing: false"),
        ({"batch_flattening": True}, "set batch_flattening: false"),
        ({"use_pose": True}, "Axolotl's own PoSE"),
        ({"skipwise": {}}, "but no target length"),
        ({"skipwise": {"target_length": T, "data": {}}}, "skipwise.data is set by Axolotl"),
        ({"skipwise": {"target_length": 32}}, "not longer than the model's"),
        ({"sequence_len": 32}, "cuts records shorter than train_length 64"),
        ({"model_config": {"rope_scaling": {"type": "linear"}}}, "leave it out"),
    ],
)
def test_the_axolotl_plugin_refuses_settings_that_void_pose(
    plugin, tiny, text_folder, tmp_path, changes, said
):
    from skipwise import SkipwiseError

    with pytest.raises(SkipwiseError, match=said):
        plugin.register(axolotl_config(tiny, text_folder, tmp_path) | changes)


def test_the_axolotl_plugin_tells_what_an_adapter_lacks(
    plugin, tiny, text_folder, tmp_path, capsys
):
    cfg = axolotl_config(tiny, text_folder, tmp_path)
    plugin.register(cfg)
    (tmp_path / "adapter_model.safetensors").touch()
    plugin.post_train(cfg, type("PeftModel", (), {"peft_config": {}})())
    assert "merge it" in capsys.readouterr().out


@pytest.mark.extended
def test_the_chat_example_answers_in_its_format_behind_its_old_window(tmp_path):
    sizes = ("--to", 512, "--base-steps", 30, "--steps", 2, "--batch-size", 4, "--chats", 30)
    out = run("chat.py", *sizes, "--out", tmp_path)
    (answered,) = (line for line in out.splitlines() if line.startswith("answered: "))
    assert answered.startswith("answered: Sure: ") and answered.endswith("<|im_end|>")
    run_json = json.loads((tmp_path / "run" / "run.json").read_text())
    (check,) = (check for check in run_json["checks"] if check["name"] == "chat")
    assert check["detail"].startswith("30 conversations, ")
    assert 0.2 < check["numbers"]["assistant_fraction"] < 0.6
