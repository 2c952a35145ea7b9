"""Bad input to recipe loading: refused in one to three lines, soon, and never half accepted."""

import os
import time
import typing

import pytest
import yaml
from bad_recipes import VALID, files, keys, outside, overrides

from skipwise.cli import main
from skipwise.config.parse import dump_recipe, load_recipe, load_run_recipe, parse_recipe
from skipwise.config.recipe import Range
from skipwise.data.files import list_folder
from skipwise.data.readers import parse_sources
from skipwise.errors import SkipwiseError

TOKEN = "hf_" + "Q" * 34

BASE = {"model": "m", "target_length": "32k"}


def attempt(file, override=None, load=load_recipe):
    """(the recipe or None, the message, seconds) of a file, or of an override."""
    started = time.monotonic()
    try:
        recipe = load(file) if override is None else parse_recipe(BASE, [override])
        message = ""
    except SkipwiseError as error:
        recipe, message = None, str(error)
    return recipe, message, time.monotonic() - started


def test_of_1500_bad_files_and_overrides_none_is_a_traceback_none_is_slow_none_out_of_range(
    tmp_path,
):
    file = tmp_path / "bad.yaml"
    accepted = refused = 0
    for content in files(800):
        file.write_bytes(content)
        recipe, message, seconds = attempt(file)
        accepted, refused = accepted + (recipe is not None), refused + (recipe is None)
        assert seconds < 10, content[:80]
        assert recipe is not None or 0 < len(message.splitlines()) <= 3, (content[:80], message)
        assert len(message) < 1500, message
        if recipe is not None:
            assert not outside(recipe), content[:80]
            assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe, content[:80]
    for override in overrides(700):
        recipe, message, seconds = attempt(None, override)
        accepted, refused = accepted + (recipe is not None), refused + (recipe is None)
        assert seconds < 10 and len(message.splitlines()) <= 3, override[:80]
        assert recipe is None or not outside(recipe), override[:80]
    assert accepted + refused >= 1500
    assert accepted > 100 and refused > 700  # it does make both kinds


def test_the_recipe_of_a_run_folder_is_read_as_carefully(tmp_path):
    file = tmp_path / "recipe.yaml"
    old = [b"full_length: 5\nfinish: {share: 0.1}\n", b"training: {loss: {a: 1}}\n", b"finish: 5\n"]
    old += [b"eval: {tasks: [{a: 1}], select: [b]}\n", b"temperature: {a: 1}\npositions: [cut]\n"]
    for content in (
        *files(300, seed=2),
        *(b"model: m\ntarget_length: 64\n" + more for more in old),
    ):
        file.write_bytes(content)
        recipe, message, seconds = attempt(file, load=load_run_recipe)
        assert seconds < 10 and len(message.splitlines()) <= 3, content[:80]
        assert recipe is None or not outside(recipe), content[:80]


def test_every_number_of_the_recipe_has_a_range_and_its_default_lies_inside():
    for key, hint in keys():
        types = set(typing.get_args(getattr(hint, "__origin__", hint)) or (hint,))
        types |= {getattr(hint, "__origin__", hint)}
        numeric = types & {int, float} or any(int in typing.get_args(t) for t in types)
        rules = [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Range)]
        assert not numeric or rules, f"{key} has no range"
    assert outside(parse_recipe({**BASE, "lora": {}})) == []


def test_the_ends_of_a_range_are_in_it_and_their_neighbours_are_not():
    for key, hint in keys():
        rule = next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Range)), None)
        if rule is None or key in ("target_length", "training.warmup_steps"):
            continue
        whole = float not in typing.get_args(hint.__origin__) and hint.__origin__ is not float
        for end, beyond in ((rule.low, -1), (rule.high, 1)):
            step = 1 if whole else 1e-6 * max(1, abs(end))
            inside, out = end, end + beyond * step
            if end in rule.excluded:
                inside, out = end - beyond * step, end
            assert attempt(None, f"{key}={inside}")[1] == "", key
            assert f"{key}" in attempt(None, f"{key}={out!r}")[1], key


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.learning_rate=nan", "training.learning_rate is nan: give above 0"),
        ("training.learning_rate=.inf", "training.learning_rate is inf"),
        ("training.max_grad_norm=.nan", "training.max_grad_norm is nan"),
        ("training.warmup_steps=1000000", "training.num_steps is 1,000"),
        ("training.save_steps=0", "training.save_steps is 0: give 1 to"),
        ("attention_temperature=1e10", "give 0.1 to 10"),
        ("rope.factor=0", "rope.factor is 0.0: give 1 to"),
        ("original_length=0", "original_length"),
        ("train_length=0", "train_length"),
        ("target_length=99999999999999999999", "2,147,483,647"),
        ("target_length=1e300", "2,147,483,647"),
        ("seed=99999999999999999999999", "seed is 99999999999999999999999: give 0 to"),
        ("lora.rank=0", "lora.rank is 0"),
        ("lora.dropout=2", "lora.dropout is 2.0"),
        ("data.sources=[{path: a, weight: .inf}]", "data.sources.weight is inf"),
        ("data.sources=[{path: a, weight: .nan}]", "data.sources.weight is nan"),
        ("data.sources=[{path: a, weight: true}]", "data.sources.weight is True"),
        ("data.sources=[{path: 5}, {path: null}]", "data.sources.path is None"),
        ("data.sources=[{path: a, text_field: [b]}]", "data.sources.text_field is"),
        ("eval.context_lengths=[0]", "eval.context_lengths"),
        ("eval.context_lengths=[-1]", "eval.context_lengths"),
        ("eval.context_lengths=5", "give 16 to"),
        ("eval.tasks=[]", "eval.tasks is empty"),
        ("eval.passkey_samples=1e12", "eval.passkey_samples"),
        ("name=../../escaped", "one plain file name"),
        ("name=/somewhere/absolute", "one plain file name"),
        ('name="a\\nb"', "one plain file name"),
        ("name=..", "one plain file name"),
        ("full_length.fraction=.nan", "full_length.fraction is nan"),
        ("rope.options={beta_fast: .inf}", "rope.options.beta_fast"),
        ("trainer={adam_beta1: .nan}", "trainer.adam_beta1"),
        ("trainer={a: {b: [.inf]}}", "trainer.a"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_key(override, words):
    with pytest.raises(SkipwiseError) as caught:
        parse_recipe(BASE, [override])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("seed: 1\nseed: 2\n", "'seed' is given twice (line 7)"),
        ("training: {num_steps: 5}\ntraining: {save_steps: 5}\n", "'training' is given twice"),
        ("eval: {seed: 1, seed: 1}\n", "'seed' is given twice"),
        ("rope: &a {options: *a}\n", "contains itself"),
        ("trainer: " + "[" * 50_000, "20 levels"),
        ("trainer: " + "{a: " * 5_000, "20 levels"),
        (
            "trainer:\n  a0: &a0 {x: 1}\n"
            + "".join(
                f"  a{n}: &a{n} {{{', '.join(f'k{i}: *a{n - 1}' for i in range(9))}}}\n"
                for n in range(1, 10)
            ),
            "more than 10,000 values",
        ),
    ],
    ids=["key", "section", "inner", "itself", "lists", "mappings", "bomb"],
)
def test_yaml_that_repeats_a_key_or_expands_too_far_is_refused_at_once(tmp_path, more, words):
    file = tmp_path / "recipe.yaml"
    file.write_text(VALID + more)
    _, message, seconds = attempt(file)
    assert words in message and seconds < 5


def test_an_anchor_and_a_merge_in_a_recipe_still_work(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        VALID + "trainer: {a: &x {b: 1, c: 2}, d: {<<: *x, c: 3}, e: {<<: *x}, f: *x}\n"
    )
    tree = load_recipe(file).trainer
    assert tree["d"] == {"b": 1, "c": 3} and tree["e"] == tree["f"] == {"b": 1, "c": 2}


def test_a_recipe_is_a_regular_file_of_utf_8(tmp_path):
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "latin.yaml").write_bytes(VALID.encode() + "name: ü\n".encode("latin-1"))
    (tmp_path / "wide.yaml").write_bytes(VALID.encode("utf-16"))
    (tmp_path / "big.yaml").write_bytes(b"#" * 2_000_000)
    expected = {
        "fifo": "regular file",
        "folder": "regular file",
        "latin": "not UTF-8",
        "wide": "not UTF-8",
        "big": "larger than 1 MiB",
    }
    for name, words in expected.items():
        assert words in attempt(tmp_path / f"{name}.yaml")[1], name
    assert "regular file" in attempt("/dev/zero")[1]
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbf" + VALID.replace("\n", "\r\n").encode())
    assert load_recipe(tmp_path / "bom.yaml").target_length == 32768


def test_bad_values_reach_the_command_line_as_two_lines_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "m").mkdir()
    for arguments in (["--to", "99999999999999999999"], ["--to", "32k", "seed=1e30"]):
        assert main(["plan", str(tmp_path / "m"), *arguments]) == 2
        assert capsys.readouterr().err.startswith("skipwise: ")


def test_positions_of_the_longest_target_take_seconds_and_no_memory(capsys):
    started = time.monotonic()
    for arguments in (["--to", "2147483647"], ["--length", "1000m", "--to", "2147483647"]):
        assert main(["positions", *arguments, "--json"]) == 0
    for arguments in (["--to", "1e9", "num_chunks=3"], ["--to", "1e9", "method=randpos"]):
        assert main(["positions", *arguments]) == 2
        assert "is sampled, up to" in capsys.readouterr().err
    for arguments in (["--to", "1e12"], ["--to", "1e15"], ["--seed", "-1"], ["--draw", "folder"]):
        assert main(["positions", *arguments]) == 2
        assert len(capsys.readouterr().err.splitlines()) <= 3
    assert time.monotonic() - started < 30


def test_an_evaluation_beyond_memory_is_refused_before_a_prompt_is_built(tiny, tmp_path, capsys):
    started = time.monotonic()
    for lengths in ("2e9", "64..2e9", "1e18", "64..1e18"):
        out = str(tmp_path / "out")
        assert main(["eval", str(tiny), "--lengths", lengths, "--out", out]) == 2
        assert "tokens" in capsys.readouterr().err
    assert time.monotonic() - started < 60


def test_an_out_folder_that_no_system_can_make_is_refused(tiny, capsys):
    for out in ("x" * 300, "a\0b"):
        assert main(["train", str(tiny), "--to", "256", "--out", out]) == 2
        assert "--out" in capsys.readouterr().err


def test_a_pipe_in_a_folder_of_texts_is_left_out_and_as_a_source_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "a.txt").write_text("text")
    listing = list_folder(tmp_path)
    assert [p.name for p in listing.files] == ["a.txt"]
    assert [p.name for p in listing.left_out] == ["pipe.txt"]
    for name in (str(tmp_path / "pipe.txt"), "/dev/zero"):
        with pytest.raises(SkipwiseError, match=r"is a pipe or a device, .*\n.*to a file first"):
            parse_sources([name])


def test_a_token_that_was_typed_is_not_repeated(tiny, capsys):
    for thing in (f"https://me:{TOKEN}@host/x.txt", f"https://host/x?token={TOKEN}"):
        assert main(["eval", str(tiny), "--lengths", "128", "--data", thing]) == 2
        said = capsys.readouterr().err
        assert "no such file or folder" in said and "***" in said and TOKEN not in said
