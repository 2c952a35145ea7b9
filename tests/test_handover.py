"""What is handed over, through the command line: GGUF and the verdict on a folder."""

import json
import shutil

import pytest

from skipwise.cli import main
from skipwise.config.run_folder import RunFolder
from skipwise.errors import Check, SkipwiseError
from skipwise.models.compatibility import make_portable
from skipwise.pipeline import stages


@pytest.fixture
def portable(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    make_portable(folder, 64)
    return folder


def test_a_sound_folder_is_verified(portable, capsys):
    assert main(["export", "--verify", str(portable)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("transformers 5", "transformers 4", "vLLM", "llama.cpp"))
    assert main(["export", str(portable), "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["well"]


def test_a_scaling_in_one_spelling_is_found(portable, capsys):
    file = portable / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"].update(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=64
    )
    config["max_position_embeddings"] = 256
    for key in ("rope_scaling", "rope_theta"):
        config.pop(key, None)
    file.write_text(json.dumps(config))
    assert main(["export", "--verify", str(portable)]) == 2
    out = capsys.readouterr().out
    assert "FAIL" in out and "transformers 4" in out and "fix: " in out
    make_portable(portable, 256)
    assert main(["export", "--verify", str(portable)]) == 0


def test_a_folder_without_a_config_is_an_error(tmp_path, capsys):
    assert main(["export", "--verify", str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err


@pytest.mark.parametrize("max_length", [64, None])
def test_generation_stops_at_the_new_window(tiny, tmp_path, max_length):
    shutil.copytree(tiny, tmp_path / "model")
    settings = {"eos_token_id": 2} | ({"max_length": max_length} if max_length else {})
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps(settings))
    make_portable(tmp_path / "model", 256)
    assert json.loads(file.read_text()).get("max_length") == (256 if max_length else None)


def test_mistakes_are_told_before_anything_is_done(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    run = str(tmp_path / "run")
    for arguments, words in (
        (["--to", "onnx"], "choose from hf, gguf, adapter"),
        (["--to", "gguf", "--outtype", "q4"], "choose from f16"),
        (["--to", "gguf", "--llama-cpp", str(tmp_path)], "has no convert_hf_to_gguf.py"),
        ([], "not a run folder"),
    ):
        assert main(["export", run, *arguments]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_gguf_is_made_of_the_exported_folder_and_checked(tmp_path, monkeypatch, capsys):
    calls = []

    def convert(folder, out, outtype, *, converter, name):
        calls.append((folder, out, outtype, converter, name))
        out.write_bytes(b"GGUF")

    run = RunFolder(tmp_path / "run")
    run.model.mkdir(parents=True)
    recipe = type("Recipe", (), {"name": "mine", "model": "base", "target_length": 256})
    monkeypatch.setattr(RunFolder, "recipe", lambda self: recipe)
    monkeypatch.setattr(stages, "find_converter", lambda given: "script")
    monkeypatch.setattr(stages, "to_gguf", convert)
    check = Check(name="gguf rope", passed=True, detail="yarn by 4")
    monkeypatch.setattr(stages, "check_gguf", lambda file, folder: [check])
    (file,) = stages.export_again(run, ["gguf"], "q8_0", None)
    assert file == run.gguf / "mine-q8_0.gguf"
    assert calls == [(run.model, file, "q8_0", "script", "mine")]
    assert run.metadata()["checks"][0]["name"] == "gguf rope"
    with pytest.raises(SkipwiseError, match="choose from f16"):
        stages.export_again(run, ["gguf"], "q4", None)
