"""Text for real_size.py: the Python source and documentation of the interpreter that runs.

Every *.py, *.md and *.rst of the standard library and site-packages, each content once; files that
hold data rather than text are left out. A document is a folder: its files in path order, each under
a line with its path. That is natural long text, in which files refer to each other, and hundreds of
folders have more than 32k tokens, which hardly any file has. One folder in 16, by the hash of its
path, is kept for evaluation. Copies inside other files (transformers repeats code from model to
model) are not looked for: all arms see the same.

A share of passkey prompts keeps the skill that the evaluation looks at. They are put together from
token ids, many thousands a second.

Shapes:  n = prompts, L = tokens of a row
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from skipwise.data.token_cache import TokenStore
from skipwise.evaluation.tasks import passkey

END = "</s>"
BYTES_PER_TOKEN = 3.6  # of such text, to choose folders by; what comes out is counted
_SUFFIXES = (".py", ".md", ".rst")
_SKIPPED = {"__pycache__", "site-packages", "dist-packages"}
_KEY = "81501"
_SAMPLE = 12_000_000  # characters that the tokenizer is trained on

_worker: dict[str, Any] = {}  # the tokenizer, in a process of the pool


@dataclass(frozen=True, kw_only=True)
class Text:
    tokenizer: Any
    train: TokenStore
    held_out: TokenStore
    facts: dict[str, Any]


def make_text(folder: Path, *, num_tokens: int, vocab_size: int, only: str = "") -> Text:
    """Find, choose, split and tokenize; kept in `folder`.

    Args:
        num_tokens: about the most that are taken, folder by folder in the order of their hashes.
        only: of the standard library, the packages whose names begin like this (for --smoke).
    """
    if not (folder / "text.json").exists():
        _write_text(folder, num_tokens, vocab_size, only)
    stores = [
        TokenStore(
            tokens=np.load(folder / f"{part}.npy", mmap_mode="r"),
            offsets=np.load(folder / f"{part}_offsets.npy"),
        )
        for part in ("train", "held_out")
    ]
    return Text(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"),
            eos_token=END,
            clean_up_tokenization_spaces=False,
        ),
        train=stores[0],
        held_out=stores[1],
        facts=json.loads((folder / "text.json").read_text()),
    )


def _write_text(folder: Path, num_tokens: int, vocab_size: int, only: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # for the training; encoding has processes
    paths = list(_files(only))
    with _pool() as pool:
        looks = pool.map(_look, [path for _, path in paths], chunksize=64)
    seen: set[bytes] = set()
    folders: dict[str, list[tuple[str, Path]]] = {}
    sizes: dict[str, int] = {}
    for (name, path), (size, digest) in zip(paths, looks, strict=True):
        if size and digest not in seen:
            seen.add(digest)
            parent = str(Path(name).parent)
            folders.setdefault(parent, []).append((name, path))
            sizes[parent] = sizes.get(parent, 0) + size
    chosen, total = [], 0.0
    for name in sorted(folders, key=_hash):
        if total >= num_tokens:
            break
        chosen.append(name)
        total += sizes[name] / BYTES_PER_TOKEN
    train = [name for name in chosen if not is_held_out(name)]
    tokenizer = _train_tokenizer([folders[name] for name in train], vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    facts: dict[str, Any] = {"files": len(paths), "files_taken": len(seen)}
    for part, names in (("train", train), ("held_out", [n for n in chosen if is_held_out(n)])):
        files = [file for name in names for file in folders[name]]
        with _pool(str(folder / "tokenizer.json")) as pool:
            encoded = iter(pool.map(_encode, files, chunksize=8))
        end = np.array([tokenizer.token_to_id(END)], np.uint16)
        documents = [
            np.concatenate([*itertools.islice(encoded, len(folders[name])), end]) for name in names
        ]
        lengths = [len(ids) for ids in documents]
        np.save(folder / f"{part}.npy", np.concatenate(documents))
        np.save(folder / f"{part}_offsets.npy", np.cumsum([0, *lengths]))
        facts[part] = {
            "documents": len(lengths),
            "tokens": sum(lengths),
            "documents_of_32k": sum(n >= 32768 for n in lengths),
            "median": int(np.median(lengths)),
        }
    size = sum(sizes[name] for name in chosen)
    facts["bytes_per_token"] = round(
        size / (facts["train"]["tokens"] + facts["held_out"]["tokens"]), 2
    )
    (folder / "text.json").write_text(json.dumps(facts))


def is_held_out(name: str) -> bool:
    return _hash(name) % 16 == 0


def _hash(name: str) -> int:
    return zlib.crc32(name.encode())


def _files(only: str) -> Iterator[tuple[str, Path]]:
    """(path below its root, path), each file once."""
    kinds = ("stdlib",) if only else ("stdlib", "platstdlib", "purelib", "platlib")
    for root in dict.fromkeys(Path(sysconfig.get_path(kind)).resolve() for kind in kinds):
        for at, inner, names in os.walk(root):
            inner[:] = sorted(set(inner) - _SKIPPED)
            if only and Path(at) == root:
                inner[:] = [name for name in inner if name.startswith(only)]
            for name in sorted(names):
                if name.endswith(_SUFFIXES):
                    yield str(Path(at, name).relative_to(root)), Path(at, name)


def _look(path: Path) -> tuple[int, bytes]:
    """(size, digest) of a file's text; size 0 where it is not taken."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return 0, b""
    lines = text.splitlines()
    is_data = (
        len(raw) > 1_000_000
        or len(text) > 120 * max(1, len(lines))
        or max(map(len, lines), default=0) > 5000
        or sum(map(text.count, "0123456789")) > 0.2 * len(text)
    )
    return (0 if is_data else len(raw)), hashlib.blake2b(raw, digest_size=16).digest()


def _train_tokenizer(folders: list[list[tuple[str, Path]]], vocab_size: int) -> Tokenizer:
    """Byte-level BPE in which every digit is a token, as in Llama's tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()

    def sample() -> Iterator[str]:
        yield from [passkey.prompt("81501", 10, 0.5)] * 200
        left = _SAMPLE
        for files in folders:
            for name, path in files:
                if left <= 0:
                    return
                text = _marked(name, path)
                left -= len(text)
                yield text

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(), trainer)
    return tokenizer


def _marked(name: str, path: Path) -> str:
    return f"# {name}\n{path.read_text(encoding='utf-8')}\n"


def _pool(tokenizer_file: str = "") -> Any:
    context = multiprocessing.get_context("fork")  # before CUDA is there
    return context.Pool(os.cpu_count(), _start, (tokenizer_file,))


def _start(tokenizer_file: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if tokenizer_file:
        _worker["tokenizer"] = Tokenizer.from_file(tokenizer_file)


def _encode(file: tuple[str, Path]) -> np.ndarray:
    """(tokens,) uint16 of a file."""
    return np.array(_worker["tokenizer"].encode_batch_fast([_marked(*file)])[0].ids, np.uint16)


class Prompts:
    """Passkey prompts with their answers, of exactly so many tokens.

    The filler is the evaluation's sentences half of the time, else a stretch of `stream`. The
    template is cut at digits and line ends, where no token reaches across.
    """

    def __init__(self, tokenizer: Any, stream: np.ndarray) -> None:
        self.stream = stream

        def ids(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        template = passkey.prompt(_KEY, 2, 0.5, ("<filler>",)).split("<filler>")
        opening, needle, query = ([ids(piece) for piece in part.split(_KEY)] for part in template)
        self.opening, self.needle = opening[0], needle
        self.question = [[*query[0], *ids(" ")], ids(".\n")]  # its answer follows, and an end
        self.digits = {digit: ids(digit) for digit in "0123456789"}
        self.bare = [ids(sentence) for sentence in passkey.FILLER]
        self.spaced = [ids(f" {sentence}") for sentence in passkey.FILLER]
        self.shortest = len(self._whole(_KEY, [], [])) + len(self.bare[0])

    def rows(self, length: int, count: int, *, most: int, seed: int) -> np.ndarray:
        """(n, L) uint16; a row holds 1, 2 or 4 prompts, at most `most`, as far as they fit."""
        rng = np.random.default_rng(seed)
        choices = [k for k in (1, 2, 4) if k <= most and length // k >= self.shortest]
        assert choices, f"a prompt needs {self.shortest} tokens"
        rows = np.empty((count, length), np.uint16)
        for row in rows:
            edges = np.linspace(0, length, int(rng.choice(choices)) + 1).astype(int)
            for begin, end in itertools.pairwise(edges):
                row[begin:end] = self._prompt(int(end - begin), rng)
        return rows

    def _prompt(self, length: int, rng: np.random.Generator) -> list[int]:
        key, depth = str(rng.integers(10_000, 100_000)), float(rng.random())
        free = length - len(self._whole(key, [], []))
        if rng.random() < 0.5:
            before, after = [], []
            number = max(0, free * len(self.spaced) // sum(map(len, self.spaced)) - 4)
            while True:
                cut = round(depth * number)
                more = self._sentences(0, cut), self._sentences(cut, number - cut)
                if len(more[0]) + len(more[1]) > free:
                    break
                (before, after), number = more, number + 1
        else:
            start, cut = int(rng.integers(len(self.stream) - free)), round(depth * free)
            text = self.stream[start : start + free].tolist()
            before, after = text[:cut], text[cut:]
        ids = self._whole(key, before, after)
        return (ids + self._sentences(0, length - len(ids)))[:length]

    def _sentences(self, first: int, count: int) -> list[int]:
        """Sentences in turn, the first one without a space before it."""
        if not count:
            return []
        kinds = [(first + i) % len(self.spaced) for i in range(count)]
        rest = (self.spaced[kind] for kind in kinds[1:])
        return [*self.bare[kinds[0]], *itertools.chain.from_iterable(rest)]

    def _whole(self, key: str, before: list[int], after: list[int]) -> list[int]:
        digits = [token for digit in key for token in self.digits[digit]]
        needle = [*self.needle[0], *digits, *self.needle[1], *digits, *self.needle[2]]
        asked = [*self.question[0], *digits, *self.question[1]]
        return [*self.opening, *before, *needle, *after, *asked]
