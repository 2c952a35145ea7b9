"""The command line: light to start, and short about what a user can mend."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

import skipwise
from skipwise.cli import build_parser, main
from skipwise.commands import _out_folder
from skipwise.config.machine import cache_folder
from skipwise.config.parse import parse_recipe
from skipwise.config.run_folder import RunFolder
from skipwise.config.trust import seal
from skipwise.errors import SkipwiseError


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-c", *arguments], capture_output=True, text=True, check=True
    ).stdout


def test_import_and_help_load_neither_torch_nor_transformers():
    code = """
import sys, skipwise
try:
    from skipwise.cli import main; main(['--help'])
except SystemExit: pass
main(['positions', '--length', '64', '--to', '256'])
heavy = {'torch', 'transformers', 'matplotlib', 'datasets', 'pyarrow'} & set(sys.modules)
assert not heavy, heavy
print('light')
"""
    assert run(code).endswith("light\n")


def test_every_public_name_can_be_imported():
    assert "load_scaled" in skipwise.__all__
    assert all(getattr(skipwise, name) for name in skipwise.__all__)


def test_help_shows_the_example_before_the_options(capsys):
    for arguments in (["--help"], ["eval", "--help"]):
        with pytest.raises(SystemExit):
            main(arguments)
        out = capsys.readouterr().out
        assert out.index("skipwise eval ./my-model") < out.index("--help")


def test_every_verb_has_help_with_an_example_and_at_most_nine_options(capsys):
    parser = build_parser()
    (verbs,) = [a for a in parser._actions if a.dest == "verb"]
    for name, sub in verbs.choices.items():
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert f"skipwise {name}" in capsys.readouterr().out
        assert len([a for a in sub._actions if a.option_strings]) - 1 <= 9


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["extend", "./nowhere", "--to", "32k"], "no such folder"),
        (["extend", "./nowhere"], "--to 32k"),
        (["extend", "./nowhere", "--to", "far"], "not a length"),
        (["extend", "recipe.yaml"], "No such file"),
        (["report", "./nowhere"], "not a run folder"),
        (["export", "./nowhere"], "not a run folder"),
        (["eval", "./nowhere"], "--lengths"),
        (["eval", "./nowhere", "--lengths", "1k"], "no such folder"),
        (["positions", "--length", "8k", "--to", "4k"], "target is the longer"),
        (["positions", "num_chunk=3"], "not a recipe key"),
    ],
)
def test_a_mistake_ends_with_code_2_and_at_most_three_lines(arguments, word, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert word in error and error.startswith("skipwise: ") and len(error.splitlines()) <= 3


def test_check_prints_a_line_a_check_and_json_on_demand(tiny, text_folder, capsys):
    assert main(["check", str(tiny), "--to", "256", "--data", str(text_folder)]) == 0
    out = capsys.readouterr().out
    assert "ok   chunks see each other" in out and "next: skipwise extend" in out
    assert main(["check", str(tiny), "--to", "256", "--json", "training.global_batch_size=4"]) == 0
    assert all(check["passed"] for check in json.loads(capsys.readouterr().out))


def test_data_may_be_followed_by_settings(tiny, text_folder, capsys):
    arguments = ["check", str(tiny), "--to", "256", "--data", str(text_folder), "rope.type=linear"]
    assert main(arguments) == 0
    assert "linear by 4" in capsys.readouterr().out


def test_positions_prints_draws_and_gives_json(tmp_path, capsys):
    arguments = ["positions", "--length", "64", "--to", "256", "num_chunks=3", "skips=sorted"]
    assert main([*arguments, "--draw", str(tmp_path / "p.png")]) == 0
    assert "distance" in capsys.readouterr().out
    assert (tmp_path / "p.png").stat().st_size > 5000
    assert main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert sum(facts["examples"][0]["lengths"]) == 64 and facts["coverage"][0] > 0.9


def test_eval_measures_any_folder(tiny, text_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # its folder is runs/eval-tiny-llama
    code = main(
        [
            "eval",
            str(tiny),
            "--lengths",
            "64,128",
            "--data",
            str(text_folder),
            "--json",
            "eval.passkey_samples=2",
            "eval.perplexity_windows=4",
        ]
    )
    rows = json.loads(capsys.readouterr().out)
    assert code == 0
    assert {(r["task"], r["context_length"]) for r in rows} >= {
        ("perplexity", 64),
        ("passkey", 128),
    }


def test_what_was_left_out_of_the_data_is_said(tiny, tmp_path, capsys):
    long = json.dumps({"text": "x = 1\n" * 300})
    (tmp_path / "x.jsonl").write_text(f'{long}\n{{"text": "short"}}\nbroken\n')
    assert main(["check", str(tiny), "--to", "256", "--data", str(tmp_path / "x.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "1 shorter ones dropped" in out and "1 unreadable records" in out
    assert "x.jsonl:3: not JSON" in out


def test_a_launcher_variable_that_is_no_number_is_named(monkeypatch, tiny, capsys):
    for name, value in (("WORLD_SIZE", ""), ("RANK", "abc"), ("RANK", "1")):
        monkeypatch.setenv(name, value)
        assert main(["check", str(tiny), "--to", "256"]) == 2
        said = capsys.readouterr().err
        assert f"{name}={value} in the environment" in said and f"unset {name}" in said
        monkeypatch.delenv(name)


def test_a_home_folder_that_the_shell_left_and_a_dot_are_resolved(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    assert RunFolder("~/runs/x").path == tmp_path / "runs/x"
    recipe = parse_recipe({"model": ".", "target_length": "1k"})
    assert recipe.run_name == f"{tmp_path.name}-1k"
    assert _out_folder(recipe, argparse.Namespace(out="~/a")) == tmp_path / "a"
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text("model: base\ntarget_length: 1k\n")
    typed = argparse.Namespace(out=None, thing="~/run")
    assert _out_folder(recipe, typed) == tmp_path / "run"


def test_a_cache_that_is_named_needs_no_home(monkeypatch, tmp_path):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("SKIPWISE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    with pytest.raises(SkipwiseError, match="set XDG_STATE_HOME"):
        seal("x")
