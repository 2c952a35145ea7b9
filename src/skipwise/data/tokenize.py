"""Documents to token ids, once: a flat file of them under a fingerprint of all that decides it.

Small texts are tokenized in this process, where the tokenizer's own threads use every core; large
ones by a pool of processes that read the files themselves. This process alone writes, in the
documents' order, so that the files do not depend on the number of processes nor on how often
tokenization was killed and taken up again (`token_store.py`).

In memory are two chunks of text and their ids a process, some hundred megabytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from skipwise.data.progress import TokenBar, warn_of_disk_space
from skipwise.data.readers import BadRecord, BadRecords, Source, describe, list_files
from skipwise.data.shards import Shard, read_shards
from skipwise.data.token_cache import (
    Progress,
    TokenStore,
    TokenWriter,
    is_complete,
    open_store,
    part_of,
    remove_abandoned,
)
from skipwise.errors import SkipwiseError

_FORMAT = 2  # of the cache: raise it when what is written changes
_PIECE = 1 << 20  # characters handed to the tokenizer at once; longer texts are cut at line ends
_BATCH = 1 << 22  # characters in a call of the tokenizer
_LARGE = 1 << 28  # bytes of text from which on processes pay
_WAITING = 1 << 30  # bytes of text handed to processes and not yet back, at most
_SAVE_SECONDS = 2.0  # of work that a kill may lose


def tokenize_source(
    source: Source,
    tokenizer: Any,
    *,
    on_bad_record: str = "skip",
    num_proc: int | None = None,
    cache: Path | None = None,
    progress: bool = True,
) -> TokenStore:
    """The tokens of a source, from the cache where it was tokenized before.

    Killed, it goes on where it was. Of several processes that ask for the same, one tokenizes.

    Args:
        tokenizer: a transformers tokenizer; its special tokens are added as it does by default.
        on_bad_record: `skip` or `stop`.
        num_proc: processes; None: as many as cores for a large source, else none.
        cache: folder; None: $SKIPWISE_CACHE, else ~/.cache/skipwise.

    Raises:
        SkipwiseError: nothing to read, a bad record where `stop` is asked, a file too large to be
            held, a source that changed meanwhile, a full disk.
    """
    described = describe(source)
    key = [_FORMAT, _PIECE, on_bad_record, described, tokenizer_fingerprint(tokenizer)]
    fingerprint = hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:32]
    folder = (cache or cache_folder()) / "tokens" / fingerprint
    if is_complete(folder):
        return open_store(folder)
    try:
        with part_of(folder) as part:
            if not is_complete(folder):  # else another process was faster
                remove_abandoned(folder.parent)
                with TokenWriter(part, _dtype(tokenizer)) as writer:
                    _tokenize(source, tokenizer, writer, on_bad_record, num_proc, progress)
                    if describe(source) != described:
                        raise SkipwiseError(f"{source.path} changed while it was read: try again")
                    writer.finish(folder, source.path)
    except BrokenProcessPool as error:
        raise SkipwiseError(
            f"{source.path}: a tokenizer process was ended from outside, often for memory\n"
            "type data.num_proc=N with fewer processes; what was done is kept"
        ) from error
    except OSError as error:
        raise SkipwiseError(
            f"{folder.parent} cannot be written: {error.strerror or error}\n"
            "set SKIPWISE_CACHE to a folder with room, or make room: what was done is kept"
        ) from error
    return open_store(folder)


def cache_folder() -> Path:
    given = os.environ.get("SKIPWISE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given).expanduser() if given else Path(base) / "skipwise"


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of one text, as training sees it."""
    return _encode_batch(tokenizer, [text])[0].tolist()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Everything that decides what ids a text gets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    inner = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    options = [type(tokenizer).__name__, tokenizer.special_tokens_map]
    options += [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")]
    return hashlib.sha256((inner + json.dumps(options, default=str)).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    """A chunk's documents."""

    tokens: np.ndarray  # (sum L_x,)
    lengths: np.ndarray  # (n,) L_x
    bad: list[BadRecord]


def _tokenize(
    source: Source,
    tokenizer: Any,
    writer: TokenWriter,
    on_bad_record: str,
    num_proc: int | None,
    shown: bool,
) -> None:
    """Append what is left of the source to the writer, saving now and then."""
    size = sum(p.stat().st_size for p in list_files(source)) if source.is_local else None
    if num_proc is None:
        num_proc = _num_cores() if size is not None and size >= _LARGE else 1
    now = writer.progress
    bad = BadRecords(
        policy="stop" if on_bad_record == "stop" else "skip",
        count=now.num_bad_records,
        first=list(now.bad_records),
    )
    bar = TokenBar(source, size, now, shown)
    saved = time.monotonic()
    is_warned = False
    shards = iter(()) if now.is_complete else read_shards(source, now.position)
    work = _encode_all(shards, tokenizer, num_proc)
    try:
        for shard, encoded in work:
            now = _append(writer, now, shard, encoded, bad, source.max_tokens)
            bar.update(now)
            if now.is_complete:
                break
            if time.monotonic() - saved > _SAVE_SECONDS:
                writer.save(now)
                free = shutil.disk_usage(writer.part).free
                is_warned = is_warned or warn_of_disk_space(now, size, writer.dtype.itemsize, free)
                saved = time.monotonic()
        now = dataclasses.replace(now, is_complete=True)
    finally:
        work.close()
        bar.close()
        writer.save(now)  # on Ctrl-C and at a bad record as well
    if not now.num_documents and bad.count:
        raise SkipwiseError(
            f"{source.path}: none of its {bad.count} records could be read\n{bad.first[0]}"
        )


def _append(
    writer: TokenWriter,
    now: Progress,
    shard: Shard,
    encoded: _Encoded,
    bad: BadRecords,
    max_tokens: int | None,
) -> Progress:
    """Write a chunk's documents, up to the one that makes `max_tokens` full."""
    for record in encoded.bad:
        bad.add(record)
    tokens, lengths = encoded.tokens, encoded.lengths
    is_complete = False
    if max_tokens is not None:
        ends = now.num_tokens + np.cumsum(lengths)
        is_complete = bool(len(ends)) and bool(ends[-1] >= max_tokens)
        lengths = lengths[: int(np.searchsorted(ends, max_tokens)) + 1]
        tokens = tokens[: int(lengths.sum())]
    writer.append(tokens, lengths)
    return dataclasses.replace(
        now,
        position=shard.end,
        is_complete=is_complete,
        num_tokens=now.num_tokens + len(tokens),
        num_documents=now.num_documents + len(lengths),
        num_bad_records=bad.count,
        bad_records=list(bad.first),
        num_bytes=shard.done,
    )


def _encode_all(
    shards: Iterator[Shard], tokenizer: Any, num_proc: int
) -> Generator[tuple[Shard, _Encoded], None, None]:
    """Chunks and their tokens in order."""
    if num_proc <= 1:
        for shard in shards:
            yield shard, _encode_shard(tokenizer, shard)
        return
    context = multiprocessing.get_context("spawn")  # fork after torch's threads can hang
    pool = ProcessPoolExecutor(
        num_proc, mp_context=context, initializer=_start_worker, initargs=(tokenizer,)
    )
    waiting: deque[tuple[Shard, Future[_Encoded]]] = deque()
    size = 0
    try:
        for shard in shards:
            waiting.append((shard, pool.submit(_work, shard)))
            size += shard.size
            while len(waiting) > 2 * num_proc or (size > _WAITING and waiting):
                first, future = waiting.popleft()
                size -= first.size
                yield first, future.result()
        for shard, future in waiting:
            yield shard, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(tokenizer: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    globals()["_worker_tokenizer"] = tokenizer
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker of a killed process would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(shard: Shard) -> _Encoded:
    return _encode_shard(globals()["_worker_tokenizer"], shard)


def _encode_shard(tokenizer: Any, shard: Shard) -> _Encoded:
    outcomes = list(shard.read())
    texts = [text for text in outcomes if isinstance(text, str) and text.strip()]
    bad = [record for record in outcomes if isinstance(record, BadRecord)]
    dtype = _dtype(tokenizer)
    ids = [tokens.astype(dtype) for tokens in _encode_batch(tokenizer, texts)]
    lengths = np.array([len(tokens) for tokens in ids], np.int64)
    return _Encoded(tokens=np.concatenate([np.zeros(0, dtype), *ids]), lengths=lengths, bad=bad)


def _encode_batch(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    """Ids of each text; one longer than a piece is cut at line ends and joined again."""
    cuts = [_cut(text) for text in texts]
    first = _ids(tokenizer, [pieces[0] for pieces in cuts])
    later = [piece for pieces in cuts for piece in pieces[1:]]
    # Special tokens stand at the start of the text only.
    rest = _ids(tokenizer, later, add_special_tokens=False)
    return [
        np.concatenate([next(first), *itertools.islice(rest, len(pieces) - 1)]) for pieces in cuts
    ]


def _ids(tokenizer: Any, pieces: list[str], **options: Any) -> Iterator[np.ndarray]:
    """Ids of each piece, from calls of the tokenizer that are large, and bounded."""
    begin = size = 0
    for i, piece in enumerate(pieces):
        size += len(piece)
        if size >= _BATCH or i + 1 == len(pieces):
            for ids in tokenizer(pieces[begin : i + 1], verbose=False, **options)["input_ids"]:
                yield np.asarray(ids, np.uint32)
            begin, size = i + 1, 0


def _cut(text: str) -> list[str]:
    pieces = []
    start = 0
    while len(text) - start > _PIECE:
        end = text.rfind("\n", start + _PIECE // 2, start + _PIECE) + 1 or start + _PIECE
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _dtype(tokenizer: Any) -> np.dtype:
    return np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
