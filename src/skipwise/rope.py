"""RoPE scalings: the frequencies they give, and the config they become. Numpy only.

Pair j of a rotary embedding turns by theta_j = theta^(-2j/d) for each position; a scaling slows
pairs down so that angles at T stay where training at L has been. Each class holds one scaling's
arithmetic and the config that makes transformers (and what reads its configs) compute the same.

Shapes:  d = dim, the rotary dimension (head_dim x partial_rotary_factor); inv_freq is (d/2,)
Letters: L = original_length, T = target_length, f = factor = T / L
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from skipwise.errors import SkipwiseError


class Scaling(Protocol):
    """What the rest of the package asks of a scaling."""

    name: ClassVar[str]
    trainable: ClassVar[bool]

    @property
    def factor(self) -> float: ...
    @property
    def attention_factor(self) -> float: ...
    def inv_freq(self, theta: float, dim: int) -> np.ndarray: ...
    def to_config(
        self, *, theta: float, dim: int, original_length: int, target_length: int
    ) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Unscaled:
    """RoPE as it was trained; Su et al. 2021, arXiv 2104.09864."""

    name: ClassVar[str] = "default"
    trainable: ClassVar[bool] = True
    factor: float = 1.0
    attention_factor: ClassVar[float] = 1.0  # on cos and sin

    def inv_freq(self, theta: float, dim: int) -> np.ndarray:
        return _frequencies(theta, dim)

    def to_config(
        self, *, theta: float, dim: int, original_length: int, target_length: int
    ) -> dict[str, Any]:
        return _config(target_length, rope_type="default", rope_theta=theta)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Position interpolation: every pair f times slower; Chen et al. 2023, arXiv 2306.15595."""

    name: ClassVar[str] = "linear"
    trainable: ClassVar[bool] = True
    attention_factor: ClassVar[float] = 1.0
    factor: float

    def inv_freq(self, theta: float, dim: int) -> np.ndarray:
        return _frequencies(theta, dim) / self.factor

    def to_config(
        self, *, theta: float, dim: int, original_length: int, target_length: int
    ) -> dict[str, Any]:
        """`max_position_embeddings` stays L: vLLM multiplies it by the factor."""
        return _config(original_length, rope_type="linear", rope_theta=theta, factor=self.factor)


@dataclass(frozen=True, kw_only=True)
class NTK:
    """NTK-aware: theta' = theta f^(d/(d-2)), so that the slowest pair is f times slower.

    Source: bloc97 2023, "NTK-aware scaled RoPE"; transformers has no type of this name, it is the
    default one with theta'.
    """

    name: ClassVar[str] = "ntk"
    trainable: ClassVar[bool] = True
    attention_factor: ClassVar[float] = 1.0
    factor: float

    def theta(self, theta: float, dim: int) -> float:
        return theta * self.factor ** (dim / (dim - 2))

    def inv_freq(self, theta: float, dim: int) -> np.ndarray:
        return _frequencies(self.theta(theta, dim), dim)

    def to_config(
        self, *, theta: float, dim: int, original_length: int, target_length: int
    ) -> dict[str, Any]:
        return _config(target_length, rope_type="default", rope_theta=self.theta(theta, dim))


@dataclass(frozen=True, kw_only=True)
class YaRN:
    """NTK by parts: pairs that turn often over L stay, those that do not turn once are slowed by f.

    Between beta_fast and beta_slow turns over L lies a linear ramp. cos and sin are multiplied by
    0.1 ln(f) + 1. Source: Peng et al. 2023, arXiv 2309.00071, sections 3.2 and 3.4.
    """

    name: ClassVar[str] = "yarn"
    trainable: ClassVar[bool] = True
    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # the ramp's ends at whole pairs, as in the authors' code

    @property
    def attention_factor(self) -> float:
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def inv_freq(self, theta: float, dim: int) -> np.ndarray:
        plain = _frequencies(theta, dim)
        low, high = (self._pair(turns, theta, dim) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high += 0.001 if high == low else 0.0
        slowed = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
        return plain * (1.0 - slowed) + plain / self.factor * slowed

    def _pair(self, turns: float, theta: float, dim: int) -> float:
        """The pair, as a real number, that turns so many times over L positions."""
        return dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def to_config(
        self, *, theta: float, dim: int, original_length: int, target_length: int
    ) -> dict[str, Any]:
        """`attention_factor` is left out: every runtime computes the default one by itself."""
        options = {
            key: getattr(self, key)
            for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0), ("truncate", True))
            if getattr(self, key) != default
        }
        return _config(
            round(self.factor * original_length),
            rope_type="yarn",
            rope_theta=theta,
            factor=self.factor,
            original_max_position_embeddings=original_length,
            **options,
        )


@dataclass(frozen=True, kw_only=True)
class Llama3:
    """Llama 3.1's: long waves slowed by f, short ones kept, a ramp in frequency between them.

    Source: meta-llama/llama-models, `apply_scaling`.
    """

    name: ClassVar[str] = "llama3"
    trainable: ClassVar[bool] = True
    attention_factor: ClassVar[float] = 1.0
    factor: float
    original_length: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def inv_freq(self, theta: float, dim: int) -> np.ndarray:
        plain = _frequencies(theta, dim)
        turns = self.original_length * plain / (2 * math.pi)  # over L
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return plain * kept + plain / self.factor * (1.0 - kept)

    def to_config(
        self, *, theta: float, dim: int, original_length: int, target_length: int
    ) -> dict[str, Any]:
        return _config(
            target_length,
            rope_type="llama3",
            rope_theta=theta,
            factor=self.factor,
            original_max_position_embeddings=original_length,
            low_freq_factor=self.low_freq_factor,
            high_freq_factor=self.high_freq_factor,
        )


@dataclass(frozen=True, kw_only=True)
class LongRoPE:
    """A factor of its own for each pair; Ding et al. 2024, arXiv 2402.13753.

    LongRoPE switches from `short_factor` to `long_factor` when a batch is longer than L. A batch of
    PoSE is L long and stands for T, so here both are the same list. The authors find theirs by an
    evolutionary search; `make_scaling` takes YaRN's slowing of each pair where none is given.
    """

    name: ClassVar[str] = "longrope"
    trainable: ClassVar[bool] = True
    factor: float
    original_length: int
    long_factor: tuple[float, ...]  # (d/2,)

    @property
    def attention_factor(self) -> float:
        if self.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))

    def inv_freq(self, theta: float, dim: int) -> np.ndarray:
        if len(self.long_factor) != dim // 2:
            raise SkipwiseError(
                f"long_factor has {len(self.long_factor)} numbers: the model has {dim // 2} pairs"
            )
        return _frequencies(theta, dim) / np.array(self.long_factor)

    def to_config(
        self, *, theta: float, dim: int, original_length: int, target_length: int
    ) -> dict[str, Any]:
        config = _config(
            target_length,
            rope_type="longrope",
            rope_theta=theta,
            factor=self.factor,
            original_max_position_embeddings=original_length,
            short_factor=list(self.long_factor),
            long_factor=list(self.long_factor),
        )
        return {**config, "original_max_position_embeddings": original_length}


@dataclass(frozen=True, kw_only=True)
class Dynamic:
    """NTK with the factor that the longest position seen so far asks for: inference only."""

    name: ClassVar[str] = "dynamic"
    trainable: ClassVar[bool] = False
    attention_factor: ClassVar[float] = 1.0
    factor: float
    original_length: int

    def inv_freq(self, theta: float, dim: int, length: int | None = None) -> np.ndarray:
        """At a sequence of `length` tokens; as a model is built, before any: L."""
        L = self.original_length
        grown = self.factor * max(length or L, L) / L - (self.factor - 1)
        return _frequencies(theta * grown ** (dim / (dim - 2)), dim)

    def to_config(
        self, *, theta: float, dim: int, original_length: int, target_length: int
    ) -> dict[str, Any]:
        """`max_position_embeddings` stays L, which the formula starts from."""
        return _config(original_length, rope_type="dynamic", rope_theta=theta, factor=self.factor)


_SCALINGS: dict[str, type] = {
    cls.name: cls for cls in (Unscaled, Linear, NTK, YaRN, Llama3, LongRoPE, Dynamic)
}
NAMES = tuple(_SCALINGS)


def make_scaling(
    name: str, *, factor: float, original_length: int, theta: float, dim: int, **options: Any
) -> Any:
    """The scaling of this name.

    Args:
        theta, dim: of the model; longrope's factors follow from them where none are given.
        options: `beta_fast`, `low_freq_factor`, ... as in a transformers config.

    Raises:
        SkipwiseError: an unknown name or option, a factor below 1.
    """
    if name not in _SCALINGS:
        raise SkipwiseError(f"rope.type is {name!r}: choose one of {', '.join(NAMES)}")
    if not math.isfinite(factor) or factor < 1:
        raise SkipwiseError(f"the RoPE factor is {factor}: give 1 or more")
    cls = _SCALINGS[name]
    fields = {f.name for f in dataclasses.fields(cls)}
    known = fields - {"factor", "original_length"}
    unknown = sorted(set(options) - known)
    if unknown:
        choice = f"choose from {', '.join(sorted(known))}" if known else "it has none"
        raise SkipwiseError(f"rope.options: {unknown[0]} is not an option of {name}: {choice}")
    if cls is LongRoPE:
        yarn = YaRN(factor=factor, original_length=original_length)
        slowing = _frequencies(theta, dim) / yarn.inv_freq(theta, dim)
        options = {"long_factor": tuple(options.get("long_factor") or slowing.tolist())}
    lengths = {"original_length": original_length} if "original_length" in fields else {}
    return cls(factor=float(factor), **lengths, **options)


def both_spellings(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with RoPE spelled for transformers 5 and for everything older.

    transformers 5 reads and writes `rope_parameters`; transformers 4, vLLM and llama.cpp's
    converter read `rope_theta` and `rope_scaling`, and take a model without them for unscaled.
    Settings for each layer type have no older spelling and stay as they are.
    """
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict) or "rope_type" not in parameters:
        return dict(config)
    out = dict(config)
    out["rope_theta"] = parameters["rope_theta"]
    if "partial_rotary_factor" in parameters:
        out["partial_rotary_factor"] = parameters["partial_rotary_factor"]
    moved = ("rope_theta", "partial_rotary_factor")
    scaling = {key: value for key, value in parameters.items() if key not in moved}
    if scaling["rope_type"] == "default":
        out["rope_scaling"] = None
    else:
        out["rope_scaling"] = {**scaling, "type": scaling["rope_type"]}
    return out


def _config(max_position_embeddings: int, **parameters: Any) -> dict[str, Any]:
    return {
        "max_position_embeddings": max_position_embeddings,
        "rope_parameters": parameters,
    }


def _frequencies(theta: float, dim: int) -> np.ndarray:
    """(d/2,) float64: theta^(-2j/d)."""
    return theta ** -(np.arange(0, dim, 2) / dim)
