"""Tokenize documents once, into a cache whose fingerprint covers everything that affects the ids.

Small texts are tokenized in this process, where the tokenizer's threads use every core. Large texts
are read and tokenized by a pool of processes. Only this process writes, in document order, so the
files do not depend on the number of processes or on how often tokenization was killed and resumed
(token_cache.py).

Memory: two shards of text and their ids per process, some hundred megabytes.
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

from skipwise.config.machine import cache_folder, check_disk_space, num_cores
from skipwise.data import token_cache
from skipwise.data.chat import Spans, encode_conversation, spans_in_store, spans_of
from skipwise.data.chat_records import Conversation, ConversationError
from skipwise.data.files import has_records, size_of
from skipwise.data.progress import TokenBar, warn_of_disk_space
from skipwise.data.readers import BadRecord, BadRecords, Source, fingerprint_fields, list_files
from skipwise.data.shards import Shard, read_shards
from skipwise.data.token_cache import StoreProgress, TokenStore, TokenWriter, is_complete
from skipwise.errors import SkipwiseError, system_errors
from skipwise.models.separator import Separator, own_separator, special_ids

_FORMAT = 4  # version of the cache format; increase it when the files change
_PIECE = 1 << 20  # most characters of one input to the tokenizer; longer texts are split
_BATCH = 1 << 22  # characters per call of the tokenizer
_LARGE = 1 << 28  # bytes of text above which a process pool is faster
_WAITING = 1 << 30  # most bytes of text waiting in the process pool
_MOST_BYTES = 16  # of plain text in a token, on average
_SAVE_SECONDS = 2.0  # most work that a kill may lose


def tokenize_source(
    source: Source,
    tokenizer: Any,
    *,
    separator: Separator | None = None,
    special_tokens: str = "control",
    on_bad_record: str = "skip",
    num_proc: int | None = None,
    cache: Path | None = None,
    progress: bool = True,
) -> TokenStore:
    """The tokens of a source, from the cache if it was tokenized before.

    It resumes after a kill. If several processes need the same source, one tokenizes it.

    Args:
        tokenizer: a transformers tokenizer.
        separator: the tokens around each document. Defaults to those that the tokenizer adds.
            Conversations get none: the chat template writes what begins and ends them.
        special_tokens: as `data.special_tokens`; of text only.
        on_bad_record: `skip` or `stop`.
        num_proc: processes. Defaults to the number of cores for a large source, else to 1.
        cache: folder. Defaults to $SKIPWISE_CACHE, then ~/.cache/skipwise.

    Raises:
        SkipwiseError: nothing to read, a bad record with `stop`, a file too large for memory, a
            source that changed meanwhile, a full disk.
    """
    separator = separator or own_separator(tokenizer)
    encoder = _Encoder(tokenizer=tokenizer, separator=separator, special_tokens=special_tokens)
    fields = fingerprint_fields(source)
    key = [_FORMAT, _PIECE, on_bad_record, fields, tokenizer_fingerprint(tokenizer)]
    key += [separator.begin, separator.end, special_tokens]
    key += [getattr(tokenizer, "chat_template", None)]
    fingerprint = hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:32]
    folder = (cache or cache_folder()) / "tokens" / fingerprint
    if is_complete(folder):
        return token_cache.open_store(folder)
    fix = "free some space, or set SKIPWISE_CACHE to a larger disk; finished work is kept"
    try:
        with system_errors(folder.parent, fix), token_cache.lock_unfinished(folder) as part:
            if not is_complete(folder):  # no other process was faster
                token_cache.remove_abandoned(folder.parent)
                with TokenWriter(part, _dtype(tokenizer)) as writer:
                    _tokenize(source, encoder, writer, on_bad_record, num_proc, progress)
                    if fingerprint_fields(source) != fields:
                        raise SkipwiseError(f"{source.path} changed while it was read: try again")
                    writer.finish(folder, source.path)
    except BrokenProcessPool as error:
        raise SkipwiseError(
            f"{source.path}: a tokenizer process was killed, often because memory ran out\n"
            "type data.num_proc=N with fewer processes; finished work is kept"
        ) from error
    return token_cache.open_store(folder)


def encode(
    tokenizer: Any,
    text: str,
    separator: Separator | None = None,
    special_tokens: str = "control",
) -> list[int]:
    """Token ids of one text as a document, the same as in training."""
    separator = separator or own_separator(tokenizer)
    encoder = _Encoder(tokenizer=tokenizer, separator=separator, special_tokens=special_tokens)
    return _encode_batch(encoder, [text])[0].tolist()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of everything that decides the ids of a text, without the tokens around it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    inner = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    inner = json.dumps({k: v for k, v in inner.items() if k != "post_processor"})
    options = [type(tokenizer).__name__, tokenizer.special_tokens_map]
    return hashlib.sha256((inner + json.dumps(options, default=str)).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class _Encoder:
    """How texts become documents."""

    tokenizer: Any
    separator: Separator
    special_tokens: str = "control"


@dataclass(frozen=True, kw_only=True)
class _EncodedShard:
    """The tokens of a shard's documents."""

    tokens: np.ndarray  # (sum L_x,)
    lengths: np.ndarray  # (n,) L_x
    bad: list[tuple[int, BadRecord]]  # with the number of documents before each
    num_special: int  # control tokens that the texts spell
    chat: list[Spans | None]  # (n,) of the conversations among the documents


def _tokenize(
    source: Source,
    encoder: _Encoder,
    writer: TokenWriter,
    on_bad_record: str,
    num_proc: int | None,
    shown: bool,
) -> None:
    """Append the rest of the source to the writer, and save from time to time."""
    size = sum(map(size_of, list_files(source))) if source.is_local else None
    if num_proc is None:
        num_proc = num_cores() if size is not None and size >= _LARGE else 1
    now = writer.progress
    bad = BadRecords(
        policy="stop" if on_bad_record == "stop" else "skip",
        count=now.num_bad_records,
        first=list(now.bad_records),
    )
    bar = TokenBar(source, size, now, shown)
    _check_disk_space(source, writer)
    saved, is_warned = time.monotonic(), False
    shards = iter(()) if now.is_complete else read_shards(source, now.position)
    work = _encode_all(shards, encoder, num_proc)
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
        found = f"none of its {bad.count} records could be read\n{bad.first[0]}"
        raise SkipwiseError(f"{source.path}: {found}")


def _check_disk_space(source: Source, writer: TokenWriter) -> None:
    """Ask for the room that the rest of the plain texts takes in any language, and no more."""
    texts = [f for f in list_files(source) if not has_records(f)] if source.is_local else []
    count = max(0, sum(map(size_of, texts)) - writer.progress.num_bytes) / _MOST_BYTES
    count = min(count, source.max_tokens or count)
    where, fix = writer.part.parent, "free some space, or set SKIPWISE_CACHE to a larger disk"
    what = f"{source.path} as tokens, at the least,"
    check_disk_space(where, count * writer.dtype.itemsize, what, fix)


def _append(
    writer: TokenWriter,
    now: StoreProgress,
    shard: Shard,
    encoded: _EncodedShard,
    bad: BadRecords,
    max_tokens: int | None,
) -> StoreProgress:
    """Write a shard's documents, up to the one that reaches `max_tokens`."""
    tokens, lengths = encoded.tokens, encoded.lengths
    is_complete = False
    if max_tokens is not None:
        ends = now.num_tokens + np.cumsum(lengths)
        is_complete = bool(len(ends)) and bool(ends[-1] >= max_tokens)
        lengths = lengths[: int(np.searchsorted(ends, max_tokens)) + 1]
        tokens = tokens[: int(lengths.sum())]
    for before, record in encoded.bad:
        if not is_complete or before < len(lengths):  # what follows is not needed
            bad.add(record)
    chat = spans_in_store(encoded.chat[: len(lengths)], lengths, now.num_tokens)
    writer.append(tokens, lengths, chat)
    return dataclasses.replace(
        now,
        position=shard.end,
        is_complete=is_complete,
        num_tokens=now.num_tokens + len(tokens),
        num_documents=now.num_documents + len(lengths),
        num_bad_records=bad.count,
        bad_records=list(bad.first),
        num_special=now.num_special + encoded.num_special,
        num_bytes=shard.done,
        num_conversations=now.num_conversations + chat.num_conversations,
        num_chat_tokens=now.num_chat_tokens + chat.num_tokens,
        num_masked=now.num_masked + len(chat.masked),
        num_markers=now.num_markers + len(chat.markers),
    )


def _encode_all(
    shards: Iterator[Shard], encoder: _Encoder, num_proc: int
) -> Generator[tuple[Shard, _EncodedShard], None, None]:
    """Shards and their tokens, in order."""
    if num_proc <= 1:
        for shard in shards:
            yield shard, _encode_shard(encoder, shard)
        return
    context = multiprocessing.get_context("spawn")  # fork after torch's threads can hang
    pool = ProcessPoolExecutor(
        num_proc, mp_context=context, initializer=_start_worker, initargs=(encoder,)
    )
    waiting: deque[tuple[Shard, Future[_EncodedShard]]] = deque()
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


def _start_worker(encoder: _Encoder) -> None:
    for name in ("SIGINT", "SIGHUP"):  # the parent ends its workers
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    globals()["_worker_encoder"] = encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent dies; otherwise it would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(shard: Shard) -> _EncodedShard:
    return _encode_shard(globals()["_worker_encoder"], shard)


def _encode_shard(encoder: _Encoder, shard: Shard) -> _EncodedShard:
    outcomes = list(shard.read())
    texts = [text for text in outcomes if isinstance(text, str) and text.strip()]
    tokens, lengths = _encode_batch(encoder, texts)
    bad: list[tuple[int, BadRecord]] = []
    conversations: dict[int, np.ndarray] = {}  # by number among the documents
    count = 0
    for outcome in outcomes if len(texts) < len(outcomes) else ():
        if isinstance(outcome, BadRecord):
            bad.append((count, outcome))
        elif isinstance(outcome, Conversation):
            try:
                conversations[count] = encode_conversation(encoder.tokenizer, outcome)
                count += 1
            except ConversationError as error:
                bad.append((count, dataclasses.replace(outcome.place, why=str(error))))
        else:
            count += bool(outcome.strip())
    dtype, separator = _dtype(encoder.tokenizer), encoder.separator
    special = special_ids(encoder.tokenizer)
    spelled = int(np.isin(tokens, special).sum())
    around = len(texts) * int(np.isin(separator.begin + separator.end, special).sum())
    chat: list[Spans | None] = [None] * len(texts)
    if conversations:
        rest = iter(np.split(tokens, np.cumsum(lengths)[:-1]))
        documents = [conversations[i] if i in conversations else next(rest) for i in range(count)]
        tokens, lengths = np.concatenate(documents), np.array([len(one) for one in documents])
        chat = [spans_of(one) for one in documents]
    return _EncodedShard(
        tokens=tokens.astype(dtype),
        lengths=lengths,
        bad=bad,
        num_special=spelled - around,
        chat=chat,
    )


def _encode_batch(encoder: _Encoder, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of the texts as documents, and the (n,) lengths of these.

    Long texts are tokenized in pieces, split at lines.
    """
    options: dict[str, Any] = {"add_special_tokens": False}
    if encoder.special_tokens == "text":
        options["split_special_tokens"] = True
    if max(map(len, texts), default=0) <= _PIECE:
        tokens, lengths = _ids(encoder.tokenizer, texts, **options)
    else:
        split = [_split(text) for text in texts]
        tokens, lengths = _ids(encoder.tokenizer, list(itertools.chain(*split)), **options)
        counts = np.array([len(pieces) for pieces in split])
        lengths = np.add.reduceat(lengths, np.cumsum(counts) - counts)
    return encoder.separator.documents(tokens, lengths)


def _ids(tokenizer: Any, pieces: list[str], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all pieces and the length of each, from large but bounded calls."""
    options["verbose"] = False
    backend = _whole_backend(tokenizer)
    if backend is not None:
        tokenizer("a", **options)  # truncation, padding and control tokens of the backend
    flat, lengths = [np.zeros(0, np.uint32)], [np.zeros(0, np.int64)]
    calls = np.cumsum([len(piece) for piece in pieces]) // _BATCH
    begins = np.flatnonzero(np.diff(calls, prepend=-1)).tolist()
    for texts in (pieces[a:b] for a, b in itertools.pairwise([*begins, len(pieces)])):
        if backend is not None:
            ids = [x.ids for x in backend.encode_batch_fast(texts, add_special_tokens=False)]
        else:
            ids = tokenizer(texts, **options)["input_ids"]
        flat.append(np.fromiter(itertools.chain.from_iterable(ids), np.uint32))
        lengths.append(np.fromiter(map(len, ids), np.int64))
    return np.concatenate(flat), np.concatenate(lengths)


def _whole_backend(tokenizer: Any) -> Any:
    """The Rust tokenizer, if the class adds nothing to it but masks, dearer than a short text."""
    from transformers import PreTrainedTokenizerFast as Plain

    names = ("__call__", "_encode_plus", "_batch_encode_plus")
    same = all(getattr(type(tokenizer), n, None) is getattr(Plain, n, None) for n in names)
    return tokenizer.backend_tokenizer if same else None


def _split(text: str) -> tuple[str, ...]:
    if len(text) <= _PIECE:
        return (text,)
    pieces, start = [], 0
    while len(text) - start > _PIECE:
        end = text.rfind("\n", start + _PIECE // 2, start + _PIECE) + 1 or start + _PIECE
        pieces.append(text[start:end])
        start = end
    return (*pieces, text[start:])


def _dtype(tokenizer: Any) -> np.dtype:
    largest = max(tokenizer.get_vocab().values(), default=0)  # ids can have gaps
    return np.dtype(np.uint16 if largest < 1 << 16 else np.uint32)
