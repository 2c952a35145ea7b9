"""RoPE scalings: the frequencies they give, and the config they become. Numpy only.

Pair j of a rotary embedding turns by theta_j = theta^(-2j/d) for each position; a scaling slows
pairs down so that angles at T stay where training at L has been. Each class holds one scaling's
arithmetic and the config that makes transformers (and what reads its configs) compute the same:
`inv_freq` is what the model turns by at T, `attention_factor` multiplies cos and sin, and a scaling
that is not `trainable` changes its frequencies with the length of the batch.

Shapes:  d = dim, the rotary dimension (head_dim x partial_rotary_factor); inv_freq is (d/2,)
Letters: L = original_length, T = target_length, f = factor = T / L
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import numpy as np

from skipwise.errors import SkipwiseError


@dataclass(frozen=True, kw_only=True)
class Unscaled:
    """RoPE as it was trained; Su et al. 2021, arXiv 2104.09864."""

    name: ClassVar[str] = "default"
    trainable: ClassVar[bool] = True
    attention_factor: ClassVar[float] = 1.0
    factor: float = 1.0

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

    transformers has no type of this name: it is the default one with theta', the way Code Llama's
    theta was raised (Rozière et al. 2023, arXiv 2308.12950). Source: bloc97 2023, "NTK-Aware Scaled
    RoPE", r/LocalLLaMA.
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

    Between beta_fast and beta_slow turns over L lies a linear ramp, and cos and sin are multiplied
    by 0.1 ln(f) + 1. Source: Peng et al. 2023, arXiv 2309.00071, sections 3.2 to 3.4.

    Raises:
        SkipwiseError: the ramp is empty or would slow no pair.
    """

    name: ClassVar[str] = "yarn"
    trainable: ClassVar[bool] = True
    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # the ramp's ends at whole pairs, as in the authors' code
    attention_factor: float = None  # type: ignore[assignment]  # None: 0.1 ln(f) + 1
    mscale: float | None = None  # DeepSeek: both set, attention_factor is the ratio of
    mscale_all_dim: float | None = None  # 0.1 mscale ln(f) + 1 and the same of mscale_all_dim

    def __post_init__(self) -> None:
        if self.beta_fast <= self.beta_slow:
            raise SkipwiseError(
                f"beta_fast {self.beta_fast:g} is not above beta_slow {self.beta_slow:g}: "
                "the ramp falls from the fast pairs to the slow ones, 32 and 1 by default"
            )
        if self.beta_slow * 2 * math.pi > self.original_length:  # every runtime then scales nothing
            raise SkipwiseError(
                f"beta_slow {self.beta_slow:g} is more turns than any pair makes in "
                f"{self.original_length} tokens, so none would be slowed: leave it at 1"
            )
        if self.attention_factor is None:
            object.__setattr__(self, "attention_factor", self._attention_factor())

    def _attention_factor(self) -> float:
        log = math.log(max(self.factor, 1.0))
        if self.mscale and self.mscale_all_dim:
            return (0.1 * self.mscale * log + 1.0) / (0.1 * self.mscale_all_dim * log + 1.0)
        return 0.1 * log + 1.0

    def inv_freq(self, theta: float, dim: int) -> np.ndarray:
        plain = _frequencies(theta, dim)
        low, high = (
            self._dimension(rotations, theta, dim) for rotations in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high += 0.001 if high == low else 0.0
        interpolated = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
        return plain * (1.0 - interpolated) + plain / self.factor * interpolated

    def _dimension(self, rotations: float, theta: float, dim: int) -> float:
        """The pair, as a real number, that turns so many times over L positions."""
        return (
            dim * math.log(self.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))
        )

    def to_config(
        self, *, theta: float, dim: int, original_length: int, target_length: int
    ) -> dict[str, Any]:
        """`max_position_embeddings` is f L exactly: transformers 4.51 to 4.55 divide it by L for f.

        `attention_factor` is left out unless it was given: every runtime computes the default one,
        and vLLM and llama.cpp do not read a given one.

        Raises:
            SkipwiseError: f L is no whole number of tokens.
        """
        reach = round(self.factor * original_length)
        if reach / original_length != self.factor:
            raise SkipwiseError(
                f"the RoPE factor {self.factor!r} x {original_length} tokens is "
                f"{self.factor * original_length!r}, and yarn needs a whole number: leave "
                f"rope.factor out, or give {reach / original_length!r} for {reach} tokens"
            )
        options = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("factor", "original_length")
            and getattr(self, field.name) != field.default
        }
        if self.attention_factor == self._attention_factor():
            del options["attention_factor"]
        return _config(
            reach,
            rope_type="yarn",
            rope_theta=theta,
            factor=self.factor,
            original_max_position_embeddings=original_length,
            **options,
        )


@dataclass(frozen=True, kw_only=True)
class Llama3:
    """Llama 3.1's: long waves slowed by f, short ones kept, a ramp in frequency between them.

    Source: meta-llama/llama-models, `apply_scaling` in models/llama3/model.py.

    Raises:
        SkipwiseError: the ramp is empty.
    """

    name: ClassVar[str] = "llama3"
    trainable: ClassVar[bool] = True
    attention_factor: ClassVar[float] = 1.0
    factor: float
    original_length: int
    low_freq_factor: float = 1.0  # turns over L up to which a pair is slowed by f
    high_freq_factor: float = 4.0  # turns over L from which a pair is kept

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise SkipwiseError(
                f"high_freq_factor {self.high_freq_factor:g} is not above low_freq_factor "
                f"{self.low_freq_factor:g}: the ramp lies between them, 4 and 1 by default"
            )

    def inv_freq(self, theta: float, dim: int) -> np.ndarray:
        plain = _frequencies(theta, dim)
        rotations = self.original_length * plain / (2 * math.pi)  # over L
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = np.clip((rotations - low) / (high - low), 0.0, 1.0)
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
    """A slowing of its own for each pair; Ding et al. 2024, arXiv 2402.13753.

    A model switches from `short_factor` to `long_factor` where a batch goes beyond L. A PoSE batch
    is short and its positions are not, so training wants one list for both: `short_factor` is
    `long_factor` unless given, and two that differ are not `trainable`. The authors find theirs by
    an evolutionary search, which Skipwise does not run; see `make_scaling` for what it takes.
    """

    name: ClassVar[str] = "longrope"
    factor: float
    original_length: int
    long_factor: tuple[float, ...]  # (d/2,)
    short_factor: tuple[float, ...] = None  # type: ignore[assignment]  # None: long_factor
    attention_factor: float = None  # type: ignore[assignment]  # None: sqrt(1 + ln f / ln L)

    def __post_init__(self) -> None:
        if self.short_factor is None:
            object.__setattr__(self, "short_factor", self.long_factor)
        if self.attention_factor is None:
            object.__setattr__(self, "attention_factor", self._attention_factor())

    def _attention_factor(self) -> float:
        return math.sqrt(1.0 + math.log(max(self.factor, 1.0)) / math.log(self.original_length))

    @property
    def trainable(self) -> bool:
        return self.short_factor == self.long_factor

    def inv_freq(self, theta: float, dim: int) -> np.ndarray:
        self._check_pairs(dim)
        return _frequencies(theta, dim) / np.array(self.long_factor)

    def _check_pairs(self, dim: int) -> None:
        for name in ("short_factor", "long_factor"):
            if len(getattr(self, name)) != dim // 2:
                raise SkipwiseError(
                    f"{name} has {len(getattr(self, name))} numbers and the model has {dim // 2} "
                    "pairs: give one for each, or leave it out"
                )

    def to_config(
        self, *, theta: float, dim: int, original_length: int, target_length: int
    ) -> dict[str, Any]:
        """L also stands at the top level, where transformers 4 looks for it."""
        self._check_pairs(dim)
        given = self.attention_factor != self._attention_factor()
        config = _config(
            target_length,
            rope_type="longrope",
            rope_theta=theta,
            factor=self.factor,
            original_max_position_embeddings=original_length,
            short_factor=list(self.short_factor),
            long_factor=list(self.long_factor),
            **({"attention_factor": self.attention_factor} if given else {}),
        )
        return {**config, "original_max_position_embeddings": original_length}


@dataclass(frozen=True, kw_only=True)
class Dynamic:
    """NTK with the theta that the longest position seen so far asks for: inference only.

    Source: emozilla 2023, "Dynamically Scaled RoPE", r/LocalLLaMA.
    """

    name: ClassVar[str] = "dynamic"
    trainable: ClassVar[bool] = False
    attention_factor: ClassVar[float] = 1.0
    factor: float
    original_length: int

    def inv_freq(self, theta: float, dim: int, length: float | None = None) -> np.ndarray:
        """After a sequence of `length` tokens, T = f L unless given; up to L, where a loaded model
        starts, nothing is scaled."""
        f, L = self.factor, self.original_length
        grown = f * max(f * L if length is None else length, L) / L - (f - 1)
        return _frequencies(theta * grown ** (dim / (dim - 2)), dim)

    def to_config(
        self, *, theta: float, dim: int, original_length: int, target_length: int
    ) -> dict[str, Any]:
        """`max_position_embeddings` stays L: the formula starts from it, and vLLM multiplies it."""
        return _config(original_length, rope_type="dynamic", rope_theta=theta, factor=self.factor)


Scaling = Unscaled | Linear | NTK | YaRN | Llama3 | LongRoPE | Dynamic
SCALINGS: dict[str, Any] = {cls.name: cls for cls in get_args(Scaling)}
NAMES = tuple(SCALINGS)


def make_scaling(
    name: str,
    *,
    factor: float,
    original_length: int,
    theta: float | None = None,
    dim: int | None = None,
    **options: Any,
) -> Scaling:
    """The scaling of this name.

    Args:
        theta, dim: of the model. longrope without `long_factor` needs them: it then slows each pair
            by what YaRN slows it by at this factor. That is our choice, not the paper's search.
        options: `beta_fast`, `low_freq_factor`, ... as in a transformers config; None is unset.

    Raises:
        SkipwiseError: an unknown name or option, a factor below 1, a value that cannot be.
    """
    if name not in SCALINGS:
        raise SkipwiseError(f"rope.type is {name!r}: choose one of {', '.join(NAMES)}")
    cls = SCALINGS[name]
    if not _is_number(factor) or factor < 1 or (cls is Unscaled and factor != 1):
        wanted = "1 for default, which scales nothing" if cls is Unscaled else "1 or more"
        raise SkipwiseError(f"the RoPE factor is {factor!r}: give {wanted}")
    fields = {field.name for field in dataclasses.fields(cls)}
    known = sorted(fields - {"factor", "original_length"})
    given: dict[str, Any] = {"factor": float(factor)}
    if "original_length" in fields:
        given["original_length"] = original_length
    for key, value in options.items():
        if key not in known:
            choice = f"choose from {', '.join(known)}" if known else "it has none"
            raise SkipwiseError(f"rope.options: {key} is not an option of {name}: {choice}")
        if value is not None:
            given[key] = _option(key, value)
    if cls is LongRoPE and "long_factor" not in given:
        if theta is None or dim is None:
            raise SkipwiseError("longrope without long_factor needs the model's theta and dim")
        yarn = YaRN(factor=float(factor), original_length=original_length)
        slowing = _frequencies(theta, dim) / yarn.inv_freq(theta, dim)
        given["long_factor"] = tuple(slowing.tolist())
    return cls(**given)


def _option(key: str, value: Any) -> Any:
    """The option's value as the classes hold it."""
    if key in ("short_factor", "long_factor"):
        if isinstance(value, list | tuple) and all(_is_number(x) and x > 0 for x in value):
            return tuple(float(x) for x in value)
        raise SkipwiseError(f"{key} is {value!r}: give one number above 0 for each pair")
    if key == "truncate":
        if isinstance(value, bool):
            return value
        raise SkipwiseError(f"truncate is {value!r}: give true or false")
    if _is_number(value) and value > 0:
        return float(value)
    raise SkipwiseError(f"{key} is {value!r}: give a number above 0")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _config(max_position_embeddings: int, **parameters: Any) -> dict[str, Any]:
    return {
        "max_position_embeddings": max_position_embeddings,
        "rope_parameters": parameters,
    }


def _frequencies(theta: float, dim: int) -> np.ndarray:
    """(d/2,) float64: theta^(-2j/d)."""
    return theta ** -(np.arange(0, dim, 2) / dim)
