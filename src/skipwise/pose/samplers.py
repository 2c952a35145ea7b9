"""Position samplers: simulate a long context inside a short training window.

For each example a sampler decides how the window is cut into chunks, at which position each chunk
starts, and which tokens of the document it holds. All randomness comes from the `rng` argument, so
example k of a run is a pure function of `default_rng([seed, k])`. A new sampler is a class with the
attributes of `Sampler`, listed in `SAMPLERS` at the end.

Shapes:  L = train_length,  T = target_length,  N = num_chunks,  L_x = tokens in the document
Source:  PoSE, Zhu et al. 2024, arXiv 2309.10400, section 3.2; RandPos, Ruoss et al. 2023,
         arXiv 2305.16843; CREAM, Wu et al. 2024, arXiv 2406.07138, section 3; EndPrompt, arXiv
         2605.14589
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np

from skipwise.errors import SkipwiseError

IGNORE_INDEX = -100  # the label that transformers' and torch's cross entropy skip


@dataclass(frozen=True, kw_only=True)
class Example:
    """The chunks of one training example of L tokens; all arrays are int64."""

    lengths: np.ndarray  # (N,) tokens in each chunk, sum L
    position_starts: np.ndarray  # (N,) position of each chunk's first token, increasing
    text_starts: np.ndarray  # (N,) index in the document of each chunk's first token
    ending: tuple[int, ...] = ()  # token ids in place of the text's last ones

    @classmethod
    def contiguous(cls, num_tokens: int, text_start: int = 0) -> Example:
        """One chunk at positions 0, 1, 2, .."""
        length, position, text = (np.array([n]) for n in (num_tokens, 0, text_start))
        return cls(lengths=length, position_starts=position, text_starts=text)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def position_ids(self) -> np.ndarray:
        """(L,) int64, strictly increasing, within 0 .. T-1."""
        return _expand(self.lengths, self.position_starts)

    def jumps(self) -> np.ndarray:
        """(N,) bool: the chunk's text does not continue that of the chunk before it."""
        ends = self.text_starts[:-1] + self.lengths[:-1]
        return np.concatenate([[False], self.text_starts[1:] != ends])

    def take(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cut the example out of a document.

        Args:
            tokens: (L_x,) token ids of the document, L_x >= the reach of `text_starts`.

        Returns:
            `input_ids` and `labels`, both (L,) int64. Labels are not shifted (the model does that);
            the first label after a jump in the text is -100, as nothing before it predicts it.
        """
        jumps = self.jumps()
        if not jumps.any():  # contiguous text: a slice
            start = int(self.text_starts[0])
            input_ids = tokens[start : start + self.num_tokens].astype(np.int64)
        elif len(self.lengths) <= 64:
            input_ids = np.empty(self.num_tokens, np.int64)
            at = 0
            for length, start in zip(self.lengths.tolist(), self.text_starts.tolist(), strict=True):
                input_ids[at : at + length] = tokens[start : start + length]
                at += length
        else:
            input_ids = tokens[_expand(self.lengths, self.text_starts)].astype(np.int64)
        if self.ending and tokens.dtype != np.bool_:  # else which tokens of a text are masked
            input_ids[-len(self.ending) :] = self.ending
        labels = input_ids.copy()
        if jumps.any():
            labels[_offsets(self.lengths)[jumps]] = IGNORE_INDEX
        return input_ids, labels

    def chunk_ids(self) -> np.ndarray:
        """(L,) int64: the index of each token's chunk."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def log_weights(self) -> np.ndarray:
        """(N,) float32: log weight of each chunk's keys for the queries of later chunks.

        The l_i keys of chunk i represent every position from its start to the next chunk's start.
        Adding log((start_{i+1} - start_i) / l_i) to their attention logits restores the softmax
        denominator of the full-length sequence in expectation. The last chunk has weight 0.
        """
        weights = np.zeros(len(self.lengths), np.float32)
        weights[:-1] = np.log(np.diff(self.position_starts) / self.lengths[:-1])
        return weights


class Sampler(Protocol):
    """What Skipwise needs of a sampler.

    A sampler is a frozen dataclass. Its fields are the lengths and the keys of a recipe's
    `positions` that it takes. Other keys of `positions` are errors if they are set.
    """

    name: ClassVar[str]  # of `method` in a recipe
    has_chunks: ClassVar[bool]  # runs of consecutive tokens, for key weights and distillation
    is_baseline: ClassVar[bool]  # trained as published: `auto` adds nothing to it

    @property
    def train_length(self) -> int: ...
    @property
    def target_length(self) -> int: ...
    def sample(self, rng: np.random.Generator, num_tokens: int) -> Example: ...


@dataclass(frozen=True, kw_only=True)
class PoSE:
    """Positional skip-wise sampler: N chunks, each shifted by its own skipping bias.

    chunk_lengths:  `random` is the paper's text (any cut), `first-half` the authors' released code
                    for N = 2 (a first chunk of 1 .. (L+1)//2 tokens).
    skips:          `sequential` is the paper's u_i ~ U{u_{i-1} .. T-L}. `sorted` takes N-1 sorted
                    uniforms on 0 .. T-L, which for N > 2 does not pile up at the far end.
    content:        `uniform` shifts the text by biases of its own (the paper), `contiguous` takes
                    one text without jumps, `aligned` the text at the chunk's own positions.
    The paper reads a document from its start. Here the T tokens of which an example reads L have a
    random start, so that all of a longer document is used. Up to T tokens the two are the same.
    """

    name: ClassVar[str] = "pose"
    has_chunks: ClassVar[bool] = True
    is_baseline: ClassVar[bool] = False

    train_length: int
    target_length: int
    num_chunks: int = 2  # N, the paper's choice
    chunk_lengths: Literal["random", "first-half"] = "random"
    skips: Literal["sequential", "sorted"] = "sequential"
    content: Literal["uniform", "contiguous", "aligned"] = "uniform"
    unskipped_fraction: float = 0.0  # of examples at positions 0 .. L-1

    def __post_init__(self) -> None:
        _check_lengths(self.train_length, self.target_length)
        check_choice("chunk_lengths", self.chunk_lengths, ("random", "first-half"))
        check_choice("skips", self.skips, ("sequential", "sorted"))
        check_choice("content", self.content, ("uniform", "contiguous", "aligned"))
        if not 1 <= self.num_chunks <= self.train_length:
            raise SkipwiseError(
                f"num_chunks is {self.num_chunks}: a window of {self.train_length} tokens has "
                f"1 .. {self.train_length} chunks; the paper takes 2"
            )
        if self.chunk_lengths == "first-half" and self.num_chunks != 2:
            raise SkipwiseError(
                f"chunk_lengths=first-half is defined for num_chunks=2, not {self.num_chunks}: "
                "type chunk_lengths=random"
            )
        if not 0.0 <= self.unskipped_fraction <= 1.0:
            raise SkipwiseError(
                f"unskipped_fraction is {self.unskipped_fraction}: give a fraction, 0 .. 1"
            )

    def sample(self, rng: np.random.Generator, num_tokens: int) -> Example:
        """Draw one example from a document of `num_tokens` >= L tokens."""
        L, T = self.train_length, self.target_length
        _check_document(num_tokens, L)
        if self.unskipped_fraction and rng.random() < self.unskipped_fraction:
            return Example.contiguous(L, int(rng.integers(num_tokens - L + 1)))
        lengths = self._lengths(rng)
        biases = self._biases(rng, T - L)
        window = min(T, num_tokens)
        base = int(rng.integers(num_tokens - window + 1))
        if self.content == "uniform":
            text_biases = self._biases(rng, window - L)
        elif self.content == "contiguous":
            text_biases = np.full_like(biases, rng.integers(window - L + 1))
        else:
            text_biases = np.minimum(biases, window - L)
        offsets = _offsets(lengths)
        text_starts = base + offsets + text_biases
        return Example(lengths=lengths, position_starts=offsets + biases, text_starts=text_starts)

    def _lengths(self, rng: np.random.Generator) -> np.ndarray:
        L, N = self.train_length, self.num_chunks
        if N == 2:
            end = (L + 1) // 2 + 1 if self.chunk_lengths == "first-half" else L
            first = int(rng.integers(1, end))
            return np.array([first, L - first])
        cuts = np.sort(rng.choice(L - 1, N - 1, replace=False)) + 1
        return np.diff(np.concatenate([[0], cuts, [L]]))

    def _biases(self, rng: np.random.Generator, room: int) -> np.ndarray:
        """(N,) int64 skipping biases, u_0 = 0, non-decreasing, at most `room`."""
        biases = np.zeros(self.num_chunks, np.int64)
        if self.skips == "sorted":
            biases[1:] = np.sort(rng.integers(0, room + 1, self.num_chunks - 1))
        else:
            for i in range(1, self.num_chunks):
                biases[i] = rng.integers(biases[i - 1], room + 1)
        return biases


@dataclass(frozen=True, kw_only=True)
class RandPos:
    """Baseline: L of the T positions, drawn without replacement and sorted; contiguous text."""

    name: ClassVar[str] = "randpos"
    has_chunks: ClassVar[bool] = False
    is_baseline: ClassVar[bool] = True

    train_length: int
    target_length: int

    def __post_init__(self) -> None:
        _check_lengths(self.train_length, self.target_length)

    def sample(self, rng: np.random.Generator, num_tokens: int) -> Example:
        L = self.train_length
        _check_document(num_tokens, L)
        positions = np.sort(rng.choice(self.target_length, L, replace=False))
        text = int(rng.integers(num_tokens - L + 1)) + np.arange(L)
        return Example(lengths=np.ones(L, np.int64), position_starts=positions, text_starts=text)


@dataclass(frozen=True, kw_only=True)
class FullLength:
    """Baseline: T tokens at positions 0 .. T-1, which PoSE is compared with."""

    name: ClassVar[str] = "full"
    has_chunks: ClassVar[bool] = False
    is_baseline: ClassVar[bool] = True

    target_length: int

    def __post_init__(self) -> None:
        _check_lengths(self.target_length, self.target_length)

    @property
    def train_length(self) -> int:
        return self.target_length

    def sample(self, rng: np.random.Generator, num_tokens: int) -> Example:
        _check_document(num_tokens, self.target_length)
        start = int(rng.integers(num_tokens - self.target_length + 1))
        return Example.contiguous(self.target_length, start)


@dataclass(frozen=True, kw_only=True)
class CREAM:
    """Baseline of three chunks: head and tail at the ends of the window, a middle that moves.

    Head and tail have L//3 or 4f tokens each, with equal probability. The middle ends at
    x L - tail, where x is drawn from a Gaussian truncated to [1, f] and centred on (f+2)/2. Its
    sigma is `sigma` at f = 8 and grows with f. The authors' released code centres x on (f+1)/2 with
    sigma 1.5 at every f, and then draws the end uniformly below x L. That moves the middle towards
    the start: at f = 8 to about 3 L.
    """

    name: ClassVar[str] = "cream"
    has_chunks: ClassVar[bool] = True
    is_baseline: ClassVar[bool] = True

    train_length: int
    target_length: int
    content: Literal["contiguous", "aligned"] = "contiguous"
    sigma: float = 3.0

    def __post_init__(self) -> None:
        _check_lengths(self.train_length, self.target_length)
        check_choice("content", self.content, ("contiguous", "aligned"))
        if self.train_length < 9:
            raise SkipwiseError(f"train_length is {self.train_length}: CREAM needs 9 or more")
        if self.sigma <= 0:
            raise SkipwiseError(f"sigma is {self.sigma}: give a number above 0")

    def sample(self, rng: np.random.Generator, num_tokens: int) -> Example:
        L, T = self.train_length, self.target_length
        _check_document(num_tokens, L)
        f = T / L
        ends = L // 3 if rng.random() < 0.5 else min(round(4 * f), L // 3)
        normal = statistics.NormalDist((f + 2) / 2, self.sigma * f / 8)
        low, high = normal.cdf(1.0), normal.cdf(f)
        x = normal.inv_cdf(low + (high - low) * rng.random()) if high > low else 1.0
        middle_end = min(max(round(x * L) - ends, L - ends), T - ends)
        lengths = np.array([ends, L - 2 * ends, ends])
        positions = np.array([0, middle_end - (L - 2 * ends), T - ends])
        window = min(T, num_tokens)
        base = int(rng.integers(num_tokens - window + 1))
        offsets = _offsets(lengths)
        if self.content == "contiguous":
            text_biases = np.full(3, rng.integers(window - L + 1))
        else:
            text_biases = np.minimum(positions - offsets, window - L)
        text_starts = base + offsets + text_biases
        return Example(lengths=lengths, position_starts=positions, text_starts=text_starts)


@dataclass(frozen=True, kw_only=True)
class EndPrompt:
    """Baseline: L - c tokens of text from position 0 on, and a prompt of c at the window's end.

    The prompt is the same in all examples, 18 to 20 tokens. No label is masked. As published it
    goes with linear scaling by ceil(T / L), 20 warm-up steps and a constant learning rate of 2e-5.
    Where no prompt is given, the text goes on in its place.
    """

    name: ClassVar[str] = "endprompt"
    has_chunks: ClassVar[bool] = True
    is_baseline: ClassVar[bool] = True

    train_length: int
    target_length: int
    prompt: tuple[int, ...] = ()  # its token ids

    def __post_init__(self) -> None:
        _check_lengths(self.train_length, self.target_length)
        if self.train_length <= self.num_prompt_tokens:
            raise SkipwiseError(
                f"train_length is {self.train_length}: EndPrompt needs more than the "
                f"{self.num_prompt_tokens} tokens of its prompt"
            )

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt) or 20

    def sample(self, rng: np.random.Generator, num_tokens: int) -> Example:
        L, c = self.train_length, self.num_prompt_tokens
        _check_document(num_tokens, L)
        start = int(rng.integers(num_tokens - L + 1))
        return Example(
            lengths=np.array([L - c, c]),
            position_starts=np.array([0, self.target_length - c]),
            text_starts=np.array([start, start + L - c]),
            ending=self.prompt,
        )


_ALL = (PoSE, FullLength, RandPos, CREAM, EndPrompt)
SAMPLERS: dict[str, type[Sampler]] = {cls.name: cls for cls in _ALL}


def _expand(lengths: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(L,): starts[i], starts[i]+1, ... for each chunk in turn."""
    out = np.arange(int(lengths.sum()))
    if len(lengths) > 64:
        return out + np.repeat(starts - _offsets(lengths), lengths)
    at = 0
    for length, start in zip(lengths.tolist(), starts.tolist(), strict=True):
        out[at : at + length] += start - at
        at += length
    return out


def _offsets(lengths: np.ndarray) -> np.ndarray:
    """(N,): how many tokens come before each chunk, the paper's st_i."""
    return np.cumsum(lengths) - lengths


def _check_lengths(train_length: int, target_length: int) -> None:
    if train_length < 2:
        raise SkipwiseError(f"train_length is {train_length}: give 2 tokens or more")
    if target_length < train_length:
        raise SkipwiseError(
            f"target_length {target_length} is below train_length {train_length}: "
            "the target is the longer of the two"
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SkipwiseError(f"{name} is {value!r}: choose one of {', '.join(choices)}")


def _check_document(num_tokens: int, length: int) -> None:
    if num_tokens < length:
        raise SkipwiseError(f"a document of {num_tokens} tokens is too short: {length} are needed")
