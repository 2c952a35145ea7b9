"""Documents to token ids, once: a flat file of them under a fingerprint of all that decides it.

Small texts are tokenized in this process, where the tokenizer's own threads use every core; large
ones by a pool of processes. A cache is written beside its place and moved there when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from skipwise.documents import BadRecords, Source, describe, list_files, read_documents
from skipwise.errors import SkipwiseError

_FORMAT = 1  # of the cache: raise it when what is written changes
_PIECE = 1 << 20  # characters handed to the tokenizer at once; longer texts are cut at line ends
_BATCH = 1 << 22  # characters in a batch of documents
_LARGE = 1 << 28  # bytes of text from which on processes pay


@dataclass(frozen=True, kw_only=True)
class TokenStore:
    """Tokens of all documents, one after another."""

    tokens: np.ndarray  # (sum L_x,) uint16 or uint32
    offsets: np.ndarray  # (num_documents + 1,) int64
    num_bad_records: int = 0
    bad_records: list[str] = field(default_factory=list)  # the first few, by name

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    def document(self, i: int) -> np.ndarray:
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]


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

    Args:
        tokenizer: a transformers tokenizer; its special tokens are added as it does by default.
        on_bad_record: `skip` or `stop`.
        num_proc: processes; None: as many as cores for a large source, else none.
        cache: folder; None: $SKIPWISE_CACHE, else ~/.cache/skipwise.

    Raises:
        SkipwiseError: nothing to read, a bad record where `stop` is asked, a full disk.
    """
    key = [_FORMAT, _PIECE, on_bad_record, describe(source), tokenizer_fingerprint(tokenizer)]
    fingerprint = hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:32]
    folder = (cache or cache_folder()) / "tokens" / fingerprint
    if not (folder / "meta.json").exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=f"{fingerprint}.part", dir=folder.parent))
        except OSError as error:
            raise SkipwiseError(
                f"{folder.parent} cannot be written: {error.strerror}\n"
                "set SKIPWISE_CACHE to a folder with room"
            ) from error
        try:
            _tokenize(source, tokenizer, part, on_bad_record, num_proc, progress)
            if folder.exists():  # a broken one
                shutil.rmtree(folder)
            os.replace(part, folder)
        except OSError as error:
            if not (folder / "meta.json").exists():  # else another process was faster
                raise SkipwiseError(
                    f"{folder.parent}: {error.strerror or error}\n"
                    "set SKIPWISE_CACHE to a folder with room"
                ) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    offsets = np.load(folder / "offsets.npy")
    dtype = np.dtype(meta["dtype"])
    empty = np.zeros(0, dtype)
    return TokenStore(
        tokens=np.memmap(folder / "tokens.bin", dtype, "r") if offsets[-1] else empty,
        offsets=offsets,
        num_bad_records=meta["num_bad_records"],
        bad_records=meta["bad_records"],
    )


def cache_folder() -> Path:
    given = os.environ.get("SKIPWISE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given).expanduser() if given else Path(base) / "skipwise"


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of one text, as training sees it."""
    return _encode_batch(tokenizer, [text])[0].tolist()


def _tokenize(
    source: Source,
    tokenizer: Any,
    folder: Path,
    on_bad_record: str,
    num_proc: int | None,
    progress: bool,
) -> None:
    bad = BadRecords(policy="stop" if on_bad_record == "stop" else "skip")
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    size = sum(p.stat().st_size for p in list_files(source)) if source.is_local else None
    if num_proc is None:
        num_proc = (os.cpu_count() or 1) if size is not None and size >= _LARGE else 1
    lengths: list[int] = []
    bar = tqdm(
        desc=f"tokenize {Path(source.path).name}",
        unit=" tokens",
        unit_scale=True,
        disable=None if progress else True,
        delay=1,
    )
    with (folder / "tokens.bin").open("wb") as file, bar:
        for ids in _encode_all(_batches(source, bad), tokenizer, num_proc):
            for tokens in ids:
                file.write(tokens.astype(dtype).tobytes())
                lengths.append(len(tokens))
                bar.update(len(tokens))
        file.flush()
        os.fsync(file.fileno())
    if not lengths and bad.count:
        raise SkipwiseError(
            f"{source.path}: none of its {bad.count} records could be read\n{bad.first[0]}"
        )
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
    meta = {
        "dtype": np.dtype(dtype).name,
        "num_bad_records": bad.count,
        "bad_records": bad.first,
        "source": source.path,
    }
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _batches(source: Source, bad: BadRecords) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for _, text in read_documents(source, bad):
        if not text.strip():
            continue
        batch.append(text)
        size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_all(
    batches: Iterator[list[str]], tokenizer: Any, num_proc: int
) -> Iterator[list[np.ndarray]]:
    if num_proc <= 1:
        for batch in batches:
            yield _encode_batch(tokenizer, batch)
        return
    context = multiprocessing.get_context("spawn")  # fork after torch's threads can hang
    with ProcessPoolExecutor(
        num_proc, mp_context=context, initializer=_start_worker, initargs=(tokenizer,)
    ) as pool:
        waiting: list[Any] = []
        for batch in batches:
            waiting.append(pool.submit(_work, batch))
            if len(waiting) > 2 * num_proc:  # bounds the memory
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def _start_worker(tokenizer: Any) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    globals()["_worker_tokenizer"] = tokenizer


def _work(batch: list[str]) -> list[np.ndarray]:
    return _encode_batch(globals()["_worker_tokenizer"], batch)


def _encode_batch(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    """Ids of each text; one longer than a piece is cut at a line end and joined again."""
    pieces: list[str] = []
    owners: list[int] = []
    for i, text in enumerate(texts):
        cut = _cut(text)
        pieces += cut
        owners += [i] * len(cut)
    ids = tokenizer(pieces, verbose=False)["input_ids"]
    out: list[list[np.ndarray]] = [[] for _ in texts]
    for owner, piece, tokens in zip(owners, pieces, ids, strict=True):
        if out[owner]:  # special tokens stand at the start of the text only
            tokens = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        out[owner].append(np.asarray(tokens, np.uint32))
    return [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in out]


def _cut(text: str) -> list[str]:
    pieces = []
    start = 0
    while len(text) - start > _PIECE:
        end = text.rfind("\n", start + _PIECE // 2, start + _PIECE) + 1 or start + _PIECE
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Everything that decides what ids a text gets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    inner = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    options = [type(tokenizer).__name__, tokenizer.special_tokens_map]
    options += [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")]
    return hashlib.sha256((inner + json.dumps(options, default=str)).encode()).hexdigest()
