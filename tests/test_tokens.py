"""Token caches: killed and gone on with, shared, cut short, full disks; the bytes are the same."""

import errno
import gzip
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from skipwise.data import readers, tokenize
from skipwise.data.readers import parse_sources
from skipwise.data.shards import read_shards
from skipwise.data.token_cache import TokenWriter
from skipwise.data.tokenize import encode, tokenize_source
from skipwise.errors import SkipwiseError
from skipwise.pipeline.quickstart import MODEL

# Small shards and a progress file for each, so that a small corpus is interrupted many times.
SCRIPT = """
import os, sys, time
from pathlib import Path
from skipwise.data import shards, tokenize
shards._SHARD, tokenize._SAVE_SECONDS = 2000, 0.0
encode_shard = tokenize._encode_shard

def slow(tokenizer, shard):
    with open(sys.argv[3] + ".log", "a") as log:
        log.write(f"{os.getpid()}\\n")
    time.sleep(float(sys.argv[5]))
    return encode_shard(tokenizer, shard)

tokenize._encode_shard = slow
if __name__ == "__main__":
    from transformers import AutoTokenizer
    from skipwise.data.readers import parse_sources
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    (source,) = parse_sources([sys.argv[2]])
    print("ready", flush=True)
    tokenize.tokenize_source(
        source, tokenizer, cache=Path(sys.argv[3]), num_proc=int(sys.argv[4]), progress=False
    )
"""


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr("skipwise.data.shards._SHARD", 5000)
    monkeypatch.setattr("skipwise.data.tokenize._SAVE_SECONDS", 0.0)


def text_of(i: int) -> str:
    return "".join(f"x{i}_{j} = {i * j}\n" for j in range(i % 40))


def json_lines(numbers) -> bytes:
    return b"".join(json.dumps({"text": text_of(i)}).encode() + b"\n" for i in numbers)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Every kind of file, some of them with records that cannot be read."""
    folder = tmp_path_factory.mktemp("mixed")
    for i in range(30):
        (folder / f"a{i:02}.txt").write_text(text_of(i + 3))
    lines = json_lines(range(150)).splitlines(keepends=True)
    lines[70:70] = [b"nonsense\n", b"\n", b'{"other": 1}\n']
    lines[110:110] = [json.dumps({"text": text_of(39) * 20}).encode() + b"\n"]  # over many spans
    (folder / "b.jsonl").write_bytes(b"".join(lines))
    (folder / "c.bin").write_bytes(b"\x89\xfe\x00\x80")
    whole = gzip.compress(json_lines(range(200, 300)))
    (folder / "d.jsonl.gz").write_bytes(whole)
    (folder / "e.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "f.json").write_text(json.dumps([{"text": text_of(i)} for i in range(300, 360)]))
    table = pyarrow.table({"text": [text_of(i) if i % 50 else None for i in range(400, 600)]})
    pyarrow.parquet.write_table(table, folder / "g.parquet", row_group_size=30)
    (folder / "h.jsonl").write_bytes(json_lines(range(600, 640)).rstrip(b"\n"))
    return folder


def source_of(path, **options):
    return parse_sources([{"path": str(path), **options}])[0]


def files_of(cache) -> dict[str, bytes]:
    (folder,) = (cache / "tokens").iterdir()
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def interrupted(monkeypatch, after: int):
    """Let tokenization end by Ctrl-C after so many chunks."""
    append, calls = tokenize._append, []

    def failing(*args):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(1)
        return append(*args)

    monkeypatch.setattr(tokenize, "_append", failing)
    return calls


def start(tmp_path, *args) -> subprocess.Popen:
    script = tmp_path / "tokenize_it.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(script), str(MODEL), *map(str, args)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def num_saved(cache) -> int:
    for file in (cache / "tokens").glob("*.part/progress.json"):
        return json.loads(file.read_text())["num_documents"]
    return 0


def test_tokens_are_cached_until_the_text_or_the_tokenizer_changes(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    (tmp_path / "x.jsonl").write_text('{"text": "def f(): pass"}\n{"text": "x = 1"}\n')
    source = source_of(tmp_path / "x.jsonl")
    cache = tmp_path / "cache"

    def folders():
        return sorted(p.name for p in (cache / "tokens").iterdir())

    first = tokenize_source(source, tokenizer, cache=cache)
    assert first.document(1).tolist() == encode(tokenizer, "x = 1")
    (only,) = folders()
    tokenize_source(source, tokenizer, cache=cache)
    assert folders() == [only]
    tokenizer.add_tokens(["f(): p"])
    other = tokenize_source(source, tokenizer, cache=cache)
    assert other.document(0).tolist() != first.document(0).tolist()
    (tmp_path / "x.jsonl").write_text('{"text": "def f(): pass"}\n{"text": "x = 12"}\n')
    assert len(tokenize_source(source, tokenizer, cache=cache).document(1)) > 0
    assert len(folders()) == 3


def test_processes_chunks_and_files_read_in_them_change_no_byte(
    tmp_path, small_chunks, mixed, tokenizer, monkeypatch
):
    source = source_of(mixed)
    one = tokenize_source(source, tokenizer, cache=tmp_path / "a")
    tokenize_source(source, tokenizer, cache=tmp_path / "b", num_proc=2)
    monkeypatch.setattr("skipwise.data.shards._SHARD", 1 << 22)
    tokenize_source(source, tokenizer, cache=tmp_path / "c")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b") == files_of(tmp_path / "c")
    texts = [text_of(i + 3) for i in range(30)]
    for i, text in enumerate(texts):
        assert one.document(i).tolist() == encode(tokenizer, text)
    assert one.num_bad_records == 2 + 1 + 1 + 4
    broken = [mixed / "b.jsonl:71", mixed / "b.jsonl:73", mixed / "c.bin"]
    assert [line.split(": ")[0] for line in one.bad_records[:3]] == list(map(str, broken))


@pytest.mark.extended
def test_wherever_it_is_interrupted_the_resumed_cache_is_the_uninterrupted_one(
    tmp_path, small_chunks, mixed, tokenizer, monkeypatch
):
    source = source_of(mixed)
    tokenize_source(source, tokenizer, cache=tmp_path / "whole")
    whole = files_of(tmp_path / "whole")
    total = len(list(read_shards(source)))
    assert total > 30
    for after in range(total):
        cache = tmp_path / f"cut{after}"
        with monkeypatch.context() as patch:
            interrupted(patch, after)
            with pytest.raises(KeyboardInterrupt):
                tokenize_source(source, tokenizer, cache=cache)
        with monkeypatch.context() as patch:
            calls = interrupted(patch, -1)
            tokenize_source(source, tokenizer, cache=cache)
        assert files_of(cache) == whole
        assert len(calls) == total - after  # nothing is done twice


@pytest.mark.extended
@pytest.mark.parametrize("num_proc", [1, 2])
def test_killed_at_random_moments_it_goes_on_and_ends_with_the_same_bytes(
    tmp_path, small_chunks, mixed, tokenizer, num_proc
):
    store = tokenize_source(source_of(mixed), tokenizer, cache=tmp_path / "whole")
    cache = tmp_path / "killed"
    rng = random.Random(num_proc)
    reached = []
    for _ in range(2):
        wanted = num_saved(cache) + rng.randrange(20, store.num_documents // 4)
        process = start(tmp_path, mixed, cache, num_proc, 0.03)
        while num_saved(cache) < wanted and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.random() / 20)
        process.send_signal(signal.SIGKILL)
        process.wait()
        reached.append(num_saved(cache))
    assert reached == sorted(reached) and reached[0] > 0 and reached[1] < store.num_documents
    assert start(tmp_path, mixed, cache, num_proc, 0).wait() == 0
    assert files_of(cache) == files_of(tmp_path / "whole")
    workers = {int(pid) for pid in (tmp_path / "killed.log").read_text().split()}
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)  # none outlives the kill


@pytest.mark.extended
def test_of_two_processes_that_want_the_same_tokens_one_makes_them(
    tmp_path, small_chunks, mixed, tokenizer
):
    tokenize_source(source_of(mixed), tokenizer, cache=tmp_path / "whole")
    cache = tmp_path / "shared"
    both = [start(tmp_path, mixed, cache, 1, 0.01) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert files_of(cache) == files_of(tmp_path / "whole")  # and nothing else lies there
    pids = (tmp_path / "shared.log").read_text().split()
    assert len(set(pids)) == 1


@pytest.mark.extended
def test_of_two_processes_the_second_goes_on_where_the_first_was_killed(
    tmp_path, small_chunks, mixed, tokenizer
):
    tokenize_source(source_of(mixed), tokenizer, cache=tmp_path / "whole")
    cache = tmp_path / "shared"
    first = start(tmp_path, mixed, cache, 1, 0.03)
    while num_saved(cache) < 50:
        time.sleep(0.002)
    second = start(tmp_path, mixed, cache, 1, 0)
    first.kill()
    first.wait()
    assert second.wait() == 0
    assert files_of(cache) == files_of(tmp_path / "whole")


def test_a_full_disk_is_an_error_with_a_remedy_and_what_was_done_stays(
    tmp_path, small_chunks, mixed, tokenizer, monkeypatch
):
    source = source_of(mixed)
    tokenize_source(source, tokenizer, cache=tmp_path / "whole")
    append, calls = TokenWriter.append, []

    def full(self, *arrays):
        if len(calls) == 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        calls.append(1)
        append(self, *arrays)

    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(TokenWriter, "append", full)
        with pytest.raises(SkipwiseError, match=r"no space left.*\n.*SKIPWISE_CACHE"):
            tokenize_source(source, tokenizer, cache=cache)
    done = num_saved(cache)
    assert done > 0
    tokenize_source(source, tokenizer, cache=cache)
    assert files_of(cache) == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("tokens.bin", lambda content: b"short"),
        ("lengths.bin", lambda content: b""),
        ("progress.json", lambda content: b"{"),
        ("tokens.bin", lambda content: content + b"written, not told of"),
        ("lengths.bin", lambda content: content + b"written, not told of"),
    ],
)
def test_of_a_part_only_what_its_progress_tells_of_is_used(
    tmp_path, small_chunks, mixed, tokenizer, monkeypatch, name, damage
):
    source, cache = source_of(mixed), tmp_path / "cache"
    tokenize_source(source, tokenizer, cache=tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupted(patch, 12)
        with pytest.raises(KeyboardInterrupt):
            tokenize_source(source, tokenizer, cache=cache)
    (part,) = (cache / "tokens").glob("*.part")
    (part / name).write_bytes(damage((part / name).read_bytes()))
    tokenize_source(source, tokenizer, cache=cache)
    assert files_of(cache) == files_of(tmp_path / "whole")


def test_a_text_that_changed_after_the_kill_or_meanwhile_is_not_mixed(
    tmp_path, small_chunks, tokenizer, monkeypatch
):
    file, cache = tmp_path / "x.jsonl", tmp_path / "cache"
    file.write_bytes(json_lines(range(100)))
    with monkeypatch.context() as patch:
        interrupted(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            tokenize_source(source_of(file), tokenizer, cache=cache)
    file.write_bytes(json_lines(range(100, 180)))
    store = tokenize_source(source_of(file), tokenizer, cache=cache)
    texts = [text_of(i) for i in range(100, 180) if text_of(i)]
    assert [d.tolist() for d in map(store.document, range(store.num_documents))] == [
        encode(tokenizer, text) for text in texts
    ]
    append = tokenize._append

    def touching(*args):
        os.utime(file, ns=(1, 1))
        return append(*args)

    monkeypatch.setattr(tokenize, "_append", touching)
    with pytest.raises(SkipwiseError, match="changed while it was read"):
        os.utime(file)
        tokenize_source(source_of(file), tokenizer, cache=cache)


def test_parts_that_nobody_goes_on_with_are_removed_after_two_weeks(tmp_path, tokenizer):
    (tmp_path / "x.txt").write_text("x = 1\n")
    for name, days in (("old", 20), ("young", 2)):
        part = tmp_path / "cache/tokens" / f"{name}.part"
        part.mkdir(parents=True)
        (part.with_suffix(".lock")).write_bytes(b"")
        (part / "tokens.bin").write_bytes(b"x")
        for path in (part / "tokens.bin", part):
            os.utime(path, (time.time() - days * 86400,) * 2)
    tokenize_source(source_of(tmp_path / "x.txt"), tokenizer, cache=tmp_path / "cache")
    names = {path.name for path in (tmp_path / "cache/tokens").iterdir()}
    assert {"young.part", "young.lock"} < names and not {"old.part", "old.lock"} & names


@pytest.mark.extended
def test_max_tokens_takes_whole_documents_until_they_hold_so_many(
    tmp_path, small_chunks, mixed, tokenizer, monkeypatch
):
    whole = tokenize_source(source_of(mixed), tokenizer, cache=tmp_path / "whole")
    for limit in (1, 1000, int(whole.offsets[40]), int(whole.offsets[40]) + 1, 5000):
        source = source_of(mixed, max_tokens=limit)
        cache = tmp_path / str(limit)
        store = tokenize_source(source, tokenizer, cache=cache)
        count = int(np.argmax(whole.offsets >= limit))  # the first documents that hold the limit
        assert store.offsets.tolist() == whole.offsets[: count + 1].tolist()
        assert store.tokens.tolist() == whole.tokens[: store.offsets[-1]].tolist()
        tokenize_source(source, tokenizer, cache=tmp_path / f"{limit}b", num_proc=2)
        assert files_of(cache) == files_of(tmp_path / f"{limit}b")
    with monkeypatch.context() as patch:
        interrupted(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            tokenize_source(source, tokenizer, cache=tmp_path / "killed")
    tokenize_source(source, tokenizer, cache=tmp_path / "killed")
    assert files_of(tmp_path / "killed") == files_of(cache)
    more = source_of(mixed, max_tokens=10**9)
    assert tokenize_source(more, tokenizer, cache=cache).offsets[-1] == whole.offsets[-1]


def test_bad_records_behind_what_max_tokens_takes_are_not_counted(tmp_path, tokenizer):
    good, file = json.dumps({"text": "one two three four five six"}), tmp_path / "x.jsonl"
    lines = [good, "{broken", good, good, "{broken", '{"text": 7}', good]
    file.write_text("\n".join(lines) + "\n")
    each = int(tokenize_source(source_of(file), tokenizer, cache=tmp_path / "all").offsets[1])
    for count, num_bad in ((1, 0), (2, 1), (3, 1), (4, 3)):
        source = source_of(file, max_tokens=count * each)
        store = tokenize_source(source, tokenizer, cache=tmp_path / str(count))
        assert (store.num_documents, store.num_bad_records) == (count, num_bad)
    stop = {"on_bad_record": "stop", "cache": tmp_path / "stop"}
    assert tokenize_source(source_of(file, max_tokens=each), tokenizer, **stop).num_documents == 1
    with pytest.raises(SkipwiseError, match=r"x\.jsonl:2: not JSON"):
        tokenize_source(source_of(file, max_tokens=2 * each), tokenizer, **stop)


@pytest.mark.extended
@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_stream_of_the_hub_goes_on_after_an_interruption_and_reads_no_record_twice(
    tmp_path, small_chunks, tokenizer, monkeypatch, kind
):
    datasets = pytest.importorskip("datasets")
    load = datasets.load_dataset
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    texts = [text_of(i) or "y = 2\n" for i in range(300)]
    for name, some in (("a", texts[:170]), ("b", texts[170:])):
        table = pyarrow.table({"text": some, "url": ["u"] * len(some)})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=40)
        lines = "".join(json.dumps(row) + "\n" for row in table.to_pylist())
        (tmp_path / f"{name}.json").write_text(lines)
    files = [str(tmp_path / f"{name}.{kind}") for name in "ab"]

    def local(path, config, **options):
        assert options["streaming"]
        return load(kind, data_files=files, split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", local)
    source = source_of("someone/books")
    store = tokenize_source(source, tokenizer, cache=tmp_path / "whole", progress=False)
    assert [store.document(i).tolist() for i in range(300)] == [encode(tokenizer, t) for t in texts]
    for after in (1, 5, 9, 13):
        cache = tmp_path / f"cut{after}"
        with monkeypatch.context() as patch:
            interrupted(patch, after)
            with pytest.raises(KeyboardInterrupt):
                tokenize_source(source, tokenizer, cache=cache)
        tokenize_source(source, tokenizer, cache=cache)
        assert files_of(cache) == files_of(tmp_path / "whole")


@pytest.mark.extended
def test_a_stream_without_a_state_goes_on_by_the_number_of_the_record(
    tmp_path, small_chunks, tokenizer, monkeypatch
):
    datasets = pytest.importorskip("datasets")
    records = [{"text": text_of(i)} for i in range(200)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: iter(records))
    source = source_of("someone/books", max_tokens=20_000)
    tokenize_source(source, tokenizer, cache=tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupted(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            tokenize_source(source, tokenizer, cache=tmp_path / "cut")
    tokenize_source(source, tokenizer, cache=tmp_path / "cut")
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_stop_ends_at_the_first_broken_record_whatever_reads_it(
    tmp_path, small_chunks, mixed, tokenizer
):
    for num_proc in (1, 2):
        with pytest.raises(SkipwiseError, match=r"b\.jsonl:71: not JSON"):
            tokenize_source(
                source_of(mixed),
                tokenizer,
                cache=tmp_path / str(num_proc),
                num_proc=num_proc,
                on_bad_record="stop",
            )


def test_a_worker_ended_from_outside_is_an_error_with_a_remedy(
    tmp_path, small_chunks, mixed, tokenizer, monkeypatch
):
    append = tokenize._append

    def ending(*args):
        import multiprocessing

        for child in multiprocessing.active_children():
            child.kill()
        return append(*args)

    monkeypatch.setattr(tokenize, "_append", ending)
    with pytest.raises(SkipwiseError, match=r"was killed.*\n.*num_proc"):
        tokenize_source(source_of(mixed), tokenizer, cache=tmp_path, num_proc=2)


def test_a_pickled_store_names_its_files_and_holds_no_token(tmp_path, mixed, tokenizer):
    store = tokenize_source(source_of(mixed), tokenizer, cache=tmp_path)
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    assert np.array_equal(again.tokens, store.tokens)
    assert np.array_equal(again.offsets, store.offsets)
    assert again.bad_records == store.bad_records


def test_where_no_terminal_is_progress_is_a_line_now_and_then(
    tmp_path, small_chunks, mixed, tokenizer, monkeypatch, capsys
):
    monkeypatch.setattr("skipwise.config.progress.SECONDS", 0.0)
    tokenize_source(source_of(mixed), tokenizer, cache=tmp_path)
    lines = [line for line in capsys.readouterr().err.splitlines() if "million" in line]
    shares = [int(line.split(": ")[1].split("%")[0]) for line in lines]
    assert len(shares) >= 5 and shares == sorted(shares) and shares[-1] <= 100
    assert all(" left" in line for line in lines)


def test_a_file_is_known_by_where_it_is_whatever_leads_there(tmp_path):
    real, links = tmp_path / "real", tmp_path / "links"
    (real / "inner").mkdir(parents=True)
    links.mkdir()
    for path in (real / "a.txt", real / "inner" / "b.txt"):
        path.write_text("some text")
    (links / "c.txt").symlink_to(real / "a.txt")
    (links / "folder").symlink_to(real / "inner")
    (links / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    (tmp_path / "door").symlink_to(links)
    _, found, *_ = readers.fingerprint_fields(source_of(tmp_path / "door"))
    stats = {path: path.stat() for path in (real / "a.txt", real / "inner" / "b.txt")}
    expected = {(str(p.resolve()), s.st_size, s.st_mtime_ns) for p, s in stats.items()}
    gone = (links / "gone.txt").lstat()
    expected.add((str(tmp_path.resolve() / "nowhere.txt"), gone.st_size, gone.st_mtime_ns))
    assert set(found) == expected and len(found) == 3
