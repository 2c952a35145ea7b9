"""What the operating system refuses ends in one to three lines, in every verb."""

import errno
import io
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from skipwise import commands
from skipwise.cli import build_parser, main
from skipwise.config import machine, run_folder
from skipwise.config.machine import check_disk_space, give_umask_mode
from skipwise.config.parse import parse_recipe
from skipwise.config.run_folder import RunFolder
from skipwise.errors import SkipwiseError, is_no_memory, is_no_space, system_error, system_errors

VERBS = {
    "quickstart": [],
    "extend": ["m", "--to", "1k"],
    "check": ["m", "--to", "1k"],
    "plan": ["m", "--to", "1k"],
    "recipes": [],
    "positions": [],
    "train": ["m", "--to", "1k"],
    "eval": ["m"],
    "report": ["m"],
    "export": ["m"],
    "publish": ["m", "me/m"],
}
ERRORS = {
    "full": (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "/a/b", "free some space"),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded", "/a/b"), "/a/b", "free some space"),
    "rights": (OSError(errno.EACCES, "Permission denied", "/a/b"), "/a/b", "--out"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "/a/b"), "/a/b", "--out"),
    "files": (OSError(errno.EMFILE, "Too many open files", "/a/b"), "/a/b", "ulimit -n"),
    "name": (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 400), "xxx", "shorter name"),
    "gone": (FileNotFoundError(errno.ENOENT, "No such file or directory", "/a"), "/a", "check the"),
    "folder": (IsADirectoryError(errno.EISDIR, "Is a directory", "/a/b"), "/a/b", "in the way"),
    "disk": (OSError(errno.EIO, "Input/output error", "/a/b"), "/a/b", "check the disk"),
    "two lines": (OSError(errno.ENOENT, "No such file or directory", "a\nb"), r"a\nb", "check the"),
    "memory": (MemoryError(), "out of memory", "training.micro_batch_size=1"),
    "arrays": (MemoryError("Unable to allocate 9 TiB for an array"), "9 TiB", "eval.batch_tokens"),
    "cannot map": (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory", "num_proc"),
    "deep": (RecursionError("maximum recursion depth exceeded"), "nested too deep", "remove it"),
    "user": (RuntimeError("Could not determine home directory."), "no such user", "without ~"),
    "nul": (ValueError("embedded null byte"), "NUL", "another name"),
    "own words": (
        OSError("Can't load the model at x\nfor a reason\nand more"),
        "load the model",
        "",
    ),
}


def said_by(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert 1 <= len(lines) <= 3 and lines[0].startswith("skipwise: "), lines
    return "\n".join(lines)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", ["full", "rights", "memory", "deep"])
def test_every_verb_tells_it_in_lines(verb, kind, monkeypatch, capsys):
    error, words, fix = ERRORS[kind]

    def refuse(args):
        raise error

    monkeypatch.setattr(commands, f"{verb}_verb", refuse)
    assert main([verb, *VERBS[verb]]) == 2
    said = said_by(capsys)
    assert words in said and fix in said


def test_the_list_of_verbs_is_complete():
    (verbs,) = [a for a in build_parser()._actions if a.dest == "verb"]
    assert set(VERBS) == set(verbs.choices)


@pytest.mark.parametrize("kind", ERRORS)
def test_each_kind_has_its_place_and_its_fix(kind, monkeypatch, capsys):
    error, words, fix = ERRORS[kind]

    def refuse(args):
        raise error

    monkeypatch.setattr(commands, "recipes_verb", refuse)
    assert main(["recipes"]) == 2
    said = said_by(capsys)
    assert words in said and fix in said and len(said) < 700


LIBRARIES = [  # as safetensors 0.8, torch 2.13, oneDNN, tokenizers, Arrow and ld.so say it
    ("I/O error: No space left on device (os error 28)", is_no_space),
    ("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0", is_no_space),
    ("PytorchStreamWriter failed writing file data/0: file write failed", is_no_space),
    ("No usable temporary directory found in ['/tmp', '/var/tmp']", is_no_space),
    ("could not create a primitive", is_no_memory),
    (
        "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory",
        is_no_memory,
    ),
    ("unable to mmap 512 bytes from file <x>: Cannot allocate memory (12)", is_no_memory),
    ("malloc of size 8388608 failed", is_no_memory),
    ("libtorch_cpu.so: failed to map segment from shared object", is_no_memory),
    ("can't start new thread", is_no_memory),
    ("std::bad_alloc", is_no_memory),
]


@pytest.mark.parametrize(("words", "kind"), LIBRARIES, ids=[words[:20] for words, _ in LIBRARIES])
def test_libraries_words_are_known(words, kind):
    error = RuntimeError(words)
    assert kind(error)
    assert not (is_no_memory if kind is is_no_space else is_no_space)(error)
    assert len(str(system_error(error)).splitlines()) == 2


@pytest.mark.parametrize(
    "error", [KeyError("x"), ValueError("x"), RuntimeError("some bug"), AssertionError()]
)
def test_what_is_a_fault_of_the_program_keeps_its_trace(error, monkeypatch):
    def fail(args):
        raise error

    assert system_error(error) is None
    monkeypatch.setattr(commands, "recipes_verb", fail)
    with pytest.raises(type(error)):
        main(["recipes"])


def test_our_own_errors_are_not_explained_again():
    assert system_error(SkipwiseError("the GPU is out of memory\nset it smaller")) is None
    with pytest.raises(SkipwiseError, match=r"^mine$"), system_errors("/a"):
        raise SkipwiseError("mine")


def caught(work):
    try:
        work()
    except Exception as error:
        return str(system_error(error))
    raise AssertionError("nothing was refused")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_the_path_of_a_write_that_failed_is_found_in_the_traceback(tmp_path):
    link = tmp_path / "weights.bin"
    link.symlink_to("/dev/full")

    def by_path():
        link.write_text("x" * 10)

    def by_file():
        with link.open("wb") as opened:
            opened.write(b"x" * 10)
            opened.flush()

    for work in (by_path, by_file):
        said = caught(work)
        assert said.startswith(f"{link}: no space left") and "free some space" in said


def test_the_path_of_text_that_is_not_text_is_found(tmp_path):
    file = tmp_path / "run.json"
    file.write_bytes(b'{"name": "caf\xe9"}')
    assert caught(lambda: file.read_text(encoding="utf-8")).startswith(f"{file}: not UTF-8 text")
    file.write_text('{"a": ')

    def read(path):
        return json.loads(path.read_text())

    assert caught(lambda: read(file)).startswith(f"{file}: damaged: Expecting value")
    file.write_text("[" * 100_000)
    assert caught(lambda: read(file)) == f"{file}: nested too deep\nfix or remove it"


def skipwise(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "skipwise", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        **options,
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_results_that_do_not_reach_stdout_are_an_error():
    with open("/dev/full", "w") as full:
        done = skipwise("recipes", stdout=full)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("skipwise: standard output: no space left on the disk\n")
    assert len(done.stderr.splitlines()) == 2


def test_real_limits_of_the_system_are_told(tmp_path):
    done = skipwise("report", "x" * 300, stdout=subprocess.PIPE)
    assert done.returncode == 2 and "shorter name" in done.stderr, done.stderr
    program = """
        import resource, sys
        from skipwise import cli, commands
        def verb(args):
            resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
            files = [open(sys.argv[1]) for _ in range(20)]
        commands.recipes_verb = verb
        sys.exit(cli.main(["recipes"]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), __file__], capture_output=True, text=True
    )
    assert done.returncode == 2 and "too many open files\ntype ulimit -n" in done.stderr


CLOSED = r"""
import os, pty, signal, sys, time
pid, master = pty.fork()
if not pid:
    from skipwise import cli, commands
    def verb(args):
        try:
            print("ready", flush=True)
            time.sleep(30)
        finally:
            print("a line for a terminal that is gone", file=sys.stderr, flush=True)
            signal.raise_signal(signal.SIGHUP)  # a shell sends it again
            open(sys.argv[1], "w").write("saved")
    commands.recipes_verb = verb
    if sys.argv[2] == "nohup":
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    code = cli.main(["recipes"])
    os._exit(code)
heard = b""
while b"ready\r\n" not in heard:
    heard += os.read(master, 100)
os.close(master)
if sys.argv[2] == "nohup":
    time.sleep(1)
    assert os.waitpid(pid, os.WNOHANG)[0] == 0
    os.kill(pid, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
@pytest.mark.parametrize("kind", ["plain", "nohup"])
def test_a_closed_terminal_stops_and_saves_as_sigterm_does(tmp_path, kind):
    file = tmp_path / "done"
    done = subprocess.run(
        [sys.executable, "-c", CLOSED, str(file), kind], capture_output=True, text=True, timeout=60
    )
    if kind == "plain":
        assert done.stdout == "75\n" and file.read_text() == "saved", done.stderr
    else:  # it was alive a second later
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_umask_decides_who_reads_what_safetensors_wrote(tmp_path, mask, mode):
    import torch
    from safetensors.torch import save_file

    old = os.umask(mask)
    try:
        save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text("{}")
        give_umask_mode(tmp_path)
        assert os.umask(mask) == mask
    finally:
        os.umask(old)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == {mode}


def test_disk_space_is_asked_with_the_figures(tmp_path, monkeypatch):
    free = type("Usage", (), {"free": 3 * 2**30})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: free)
    check_disk_space(tmp_path / "not" / "yet", 3 * 2**30, "the model")
    with pytest.raises(SkipwiseError) as told:
        check_disk_space(tmp_path / "not" / "yet", 3.5 * 2**30, "the model")
    assert f"disk of {tmp_path} has 3.0 GiB left, and the model takes 3.5\n" in str(told.value)
    assert "type the same command again" in str(told.value)


def little_space(monkeypatch, free):
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)


def test_tokens_are_not_begun_on_a_disk_without_room(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    from skipwise.data.readers import parse_sources
    from skipwise.data.tokenize import tokenize_source
    from skipwise.pipeline.quickstart import MODEL

    book = tmp_path / "book.txt"
    book.write_text("word " * 64_000)  # 320,000 bytes: at the least 20,000 tokens of 2 bytes
    (source,) = parse_sources([str(book)], "text")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    little_space(monkeypatch, 39_000)
    with pytest.raises(SkipwiseError, match="SKIPWISE_CACHE"):
        tokenize_source(source, tokenizer, cache=tmp_path / "cache", progress=False)
    assert not list((tmp_path / "cache").rglob("meta.json"))
    little_space(monkeypatch, 40_000)
    store = tokenize_source(source, tokenizer, cache=tmp_path / "cache", progress=False)
    assert len(store.tokens) > 20_000


def test_an_export_is_not_begun_on_a_disk_without_room(tiny, tmp_path, monkeypatch):
    from skipwise.config.parse import parse_recipe
    from skipwise.export.hf import export_model
    from skipwise.models.prepared import prepare_model

    recipe = parse_recipe({"model": str(tiny), "target_length": 256, "method": "none"})
    run = RunFolder(tmp_path / "run")
    run.model.mkdir(parents=True)
    (run.model / "old").write_text("old")
    size = (tiny / "model.safetensors").stat().st_size
    little_space(monkeypatch, size - 4096)  # its header is less
    with pytest.raises(SkipwiseError, match="the model takes"):
        export_model(prepare_model(recipe), run, None)
    assert [file.name for file in run.path.rglob("*")] == ["model", "old"]


def refuse_writes(monkeypatch, folder, number=errno.EROFS):
    """As in a folder of another user, or on a read-only disk; root may write anywhere."""
    plain, make = io.open, Path.mkdir

    def opened(file, mode="r", *rest, **options):
        inside = isinstance(file, str | Path) and str(file).startswith(str(folder))
        if inside and set(mode) & set("wax+"):
            raise OSError(number, os.strerror(number), str(file))
        return plain(file, mode, *rest, **options)

    def made(self, *arguments, **options):
        if str(self).startswith(str(folder)) and not self.is_dir():
            raise OSError(number, os.strerror(number), str(self))
        make(self, *arguments, **options)

    monkeypatch.setattr(io, "open", opened)
    monkeypatch.setattr(Path, "mkdir", made)


@pytest.fixture
def evaluation(tmp_path):
    """A folder of results, as `skipwise eval` makes one."""
    run = RunFolder(tmp_path / "runs" / "eval")
    run.path.mkdir(parents=True)
    row = {"model": "m", "task": "passkey", "metric": "exact match", "context_length": 64}
    numbers = {"value": 1.0, "low": 0.9, "high": 1.0, "num_samples": 20, "depth": 0.5}
    run.write_results([{**row, **numbers, "num_correct": 20}])
    run.update(name="eval", kind="evaluation", models={"m": {"name": "m"}})
    return run


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_read_only_folder_is_reported_on_the_terminal_or_elsewhere(
    evaluation, tmp_path, monkeypatch, capsys, number
):
    refuse_writes(monkeypatch, evaluation.path, number)
    assert main(["report", str(evaluation.path)]) == 0
    out = capsys.readouterr().out
    assert "passkey" in out and "read-only" in out and "--out page.html" in out
    assert not evaluation.report.exists()
    page = tmp_path / "elsewhere" / "page.html"
    page.parent.mkdir()
    assert main(["report", str(evaluation.path), "--out", str(page)]) == 0
    assert "passkey" in page.read_text() and f"report  {page}" in capsys.readouterr().out
    assert [file.name for file in page.parent.iterdir()] == ["page.html"]


def test_a_folder_that_is_only_read_needs_no_lock_and_an_update_of_nothing_no_write(
    evaluation, monkeypatch
):
    refuse_writes(monkeypatch, evaluation.path)
    with evaluation.lock():
        evaluation.update(kind="evaluation", name="eval")
        with pytest.raises(OSError, match="Read-only"):
            evaluation.update(name="other")


WRITER = """
import sys, time
from pathlib import Path
from skipwise.config.run_folder import RunFolder
run, name = RunFolder(sys.argv[1]), sys.argv[2]
while not (run.path / "go").exists():
    time.sleep(0.001)
for i in range(150):
    run.update(**{f"{name}{i}": i})
    run.update_entry("stages", **{f"{name}{i}": i})
    run.update(reproduce=lambda old: [*(old or []), f"{name}{i}"])
"""


def test_two_processes_that_write_run_json_at_once_lose_nothing(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, name], stderr=subprocess.PIPE) for name in "ab"]
    time.sleep(0.5)
    (tmp_path / "go").touch()
    for writer in writers:
        assert (writer.wait(), writer.stderr.read()) == (0, b"")
    facts = RunFolder(tmp_path).metadata()
    expected = {f"{name}{i}": i for name in "ab" for i in range(150)}
    assert {k: v for k, v in facts.items() if k not in ("stages", "reproduce")} == expected
    assert facts["stages"] == expected and sorted(facts["reproduce"]) == sorted(expected)
    assert not list(tmp_path.glob("*.part"))


def test_a_part_of_a_process_that_was_killed_is_removed_and_of_one_that_lives_is_not(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, live = (tmp_path / f"run.json.{pid}.part" for pid in (ended.pid, os.getpid()))
    young = tmp_path / f"results.json.{ended.pid}.part"
    for part in (dead, live, young):
        part.write_text("half")
    for part in (dead, live):
        os.utime(part, (1, 1))
    run_folder.remove_parts(tmp_path)
    assert {part.name for part in tmp_path.iterdir()} == {live.name, young.name}


def test_a_run_that_goes_on_removes_old_parts_of_its_folder_and_of_its_model(tmp_path):
    recipe = parse_recipe({"model": "base", "target_length": "1k"})
    run = run_folder.open_run(tmp_path / "run", recipe, "x")
    run.model.mkdir()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    parts = [folder / f"README.md.{ended.pid}.part" for folder in (run.path, run.model)]
    for part in parts:
        part.write_text("half")
        os.utime(part, (1, 1))
    run_folder.open_run(run.path, recipe, "x")
    assert not any(part.exists() for part in parts)


def test_a_write_that_fails_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    file = tmp_path / "run.json"
    run_folder.write_text(file, "old")

    def refuse(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        run_folder.write_text(file, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert file.read_text() == "old"


@pytest.mark.parametrize(
    "content", ["[]", "5", '{"model": 5}', '{"checks": {}}', "[" * 99_999, "\0"]
)
def test_a_run_json_of_another_shape_is_told(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(SkipwiseError, match=r"run\.json") as told:
        RunFolder(tmp_path).metadata()
    assert len(str(told.value).splitlines()) == 2 and "remove it" in str(told.value)


def test_signals_are_as_before_after_a_command(monkeypatch):
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    assert main(["recipes"]) == 0
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("name", ["out of memory.txt", "no space left.txt"])
def test_words_in_a_path_are_not_the_reason(name):
    error = FileNotFoundError(errno.ENOENT, "No such file or directory", name)
    assert not is_no_memory(error) and not is_no_space(error)
    assert f"{name}: no such file or directory" in str(system_error(error))
