"""RoPE scalings: the frequencies they give, and the config they become. Numpy only.

Pair j of a rotary embedding rotates by theta_j = theta^(-2j/d) per position. A scaling lowers these
frequencies, so that angles at T stay in the range seen in training at L. Each class has one
scaling's arithmetic, and the config that makes transformers and other runtimes compute the same.
A new scaling is a subclass of `Scaling`, listed in `SCALINGS`.

Shapes:  d = dim, the rotary dimension (head_dim x partial_rotary_factor); inv_freq is (d/2,)
Letters: L = original_length, T = target_length, f = factor = T / L
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from skipwise.errors import SkipwiseError


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """A scaling, and what other modules need to know about it. A subclass overrides what differs.

    The fields of a subclass are the options in a recipe, and the keys in `rope_parameters`.
    """

    name: ClassVar[str]  # of `rope.type` in a recipe
    is_rope_type: ClassVar[bool] = True  # also of `rope_type` in configs
    auto_candidate: ClassVar[bool] = False  # `rope.type: auto` measures it
    extendable: ClassVar[bool] = False  # a model scaled with it can be scaled further
    keeps_length: ClassVar[bool] = False  # max_position_embeddings is L; see `keeps_length` below
    follows_length: ClassVar[bool] = False  # changes with the length of the text: inference only
    factor_from_lengths: ClassVar[bool] = False  # a config may leave f out
    factor: float
    attention_factor: ClassVar[float] = 1.0  # multiplies cos and sin

    @property
    def trainable(self) -> bool:
        """Whether the frequencies of a short batch are those at T."""
        return not self.follows_length

    def theta(self, theta: float, dim: int) -> float:
        """The theta that a config states."""
        return theta

    def inv_freq(self, theta: float, dim: int) -> np.ndarray:
        """(d/2,) float64: the frequencies at T."""
        return _frequencies(self.theta(theta, dim), dim)

    def to_config(
        self, *, theta: float, dim: int, original_length: int, target_length: int
    ) -> dict[str, Any]:
        """The keys of a config that change.

        Raises:
            SkipwiseError: values that do not fit the model.
        """
        self.check(dim)
        parameters = {"rope_type": "default", "rope_theta": self.theta(theta, dim)}
        if self.is_rope_type:
            parameters |= {"rope_type": self.name, **self.options()}
        length = original_length if self.keeps_length else self.window(target_length)
        return {"max_position_embeddings": length, "rope_parameters": parameters}

    def options(self) -> dict[str, Any]:
        """The keys of `rope_parameters` beside type and theta: fields that are not the default."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        options = {k: v for k, v in options.items() if v != getattr(type(self), k, None)}
        length = options.pop("original_length", None)
        if length is not None and not self.follows_length:
            options["original_max_position_embeddings"] = length
        if options.get("attention_factor") == self.default_attention_factor():
            del options["attention_factor"]  # which every runtime computes; some read no other
        return {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}

    def default_attention_factor(self) -> float:
        return 1.0

    def check(self, dim: int) -> None:
        """Raise SkipwiseError if no config of this rotary dimension can have these values."""

    def window(self, stated: int) -> int:
        """T, of a config with this scaling and `max_position_embeddings: stated`."""
        return round(stated * self.factor) if self.keeps_length else stated

    def extended(self, window: int, target_length: int) -> Scaling:
        """This scaling, which reaches `window`, up to a longer target.

        Raises:
            SkipwiseError: it has no form for a longer window.
        """
        if not self.extendable:
            raise SkipwiseError(
                "its frequencies were chosen for its own length: none are known for a longer one"
            )
        return dataclasses.replace(self, factor=self.factor * (target_length / window))

    def gguf_keys(self) -> dict[str, str | int | float] | None:
        """llama.cpp's keys under `rope.scaling`. None if it needs a table of frequencies."""
        return None


@dataclass(frozen=True, kw_only=True)
class Unscaled(Scaling):
    """RoPE as it was trained; Su et al. 2021, arXiv 2104.09864."""

    name: ClassVar[str] = "default"
    factor: float = 1.0

    def gguf_keys(self) -> dict[str, str | int | float]:
        return {}


@dataclass(frozen=True, kw_only=True)
class Linear(Scaling):
    """Position interpolation: all frequencies divided by f; Chen et al. 2023, arXiv 2306.15595."""

    name: ClassVar[str] = "linear"
    auto_candidate: ClassVar[bool] = True
    extendable: ClassVar[bool] = True
    keeps_length: ClassVar[bool] = True

    def inv_freq(self, theta: float, dim: int) -> np.ndarray:
        return _frequencies(theta, dim) / self.factor

    def gguf_keys(self) -> dict[str, str | int | float]:
        return {"type": "linear", "factor": self.factor}


@dataclass(frozen=True, kw_only=True)
class NTK(Scaling):
    """NTK-aware: theta' = theta f^(d/(d-2)), which divides the lowest frequency by f.

    A config has it as the default type with theta', the way Code Llama's theta was raised (Rozière
    et al. 2023, arXiv 2308.12950). Source: bloc97 2023, "NTK-Aware Scaled RoPE", r/LocalLLaMA.
    """

    name: ClassVar[str] = "ntk"
    is_rope_type: ClassVar[bool] = False
    auto_candidate: ClassVar[bool] = True

    def theta(self, theta: float, dim: int) -> float:
        return theta * self.factor ** (dim / (dim - 2))


@dataclass(frozen=True, kw_only=True)
class YaRN(Scaling):
    """NTK-by-parts: high frequencies are kept, low ones interpolated by f.

    A pair with more than beta_fast rotations over L is kept, one with fewer than beta_slow is
    interpolated, with a linear ramp between. cos and sin are multiplied by 0.1 ln(f) + 1.
    Source: Peng et al. 2023, arXiv 2309.00071, sections 3.2 to 3.4.

    Raises:
        SkipwiseError: the ramp is empty or would interpolate no pair.
    """

    name: ClassVar[str] = "yarn"
    auto_candidate: ClassVar[bool] = True
    extendable: ClassVar[bool] = True
    factor_from_lengths: ClassVar[bool] = True
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # round the ends of the ramp to pairs, as in the authors' code
    attention_factor: float = None  # type: ignore[assignment]  # defaults to 0.1 ln(f) + 1
    mscale: float | None = None  # DeepSeek: both set, attention_factor is the ratio of
    mscale_all_dim: float | None = None  # 0.1 mscale ln(f) + 1 and the same of mscale_all_dim

    def __post_init__(self) -> None:
        if self.beta_fast <= self.beta_slow:
            raise SkipwiseError(
                f"beta_fast {self.beta_fast:g} is not above beta_slow {self.beta_slow:g}: "
                "the ramp falls from the fast pairs to the slow ones, 32 and 1 by default"
            )
        if self.beta_slow * 2 * math.pi > self.original_length:  # runtimes would scale nothing
            raise SkipwiseError(
                f"no pair makes as many as beta_slow {self.beta_slow:g} rotations in "
                f"{self.original_length} tokens, so none would be interpolated: leave it at 1"
            )
        if self.attention_factor is None:
            object.__setattr__(self, "attention_factor", self.default_attention_factor())

    def default_attention_factor(self) -> float:
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
        """The pair, as a real number, that makes so many rotations over L positions."""
        return (
            dim * math.log(self.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))
        )

    def check(self, dim: int) -> None:
        """f L must be an integer: transformers 4.51 to 4.55 compute f from the two lengths."""
        L = self.original_length
        reach = round(self.factor * L)
        if reach / L != self.factor:
            raise SkipwiseError(
                f"the RoPE factor {self.factor!r} x {L} tokens is {self.factor * L!r}, and yarn "
                f"needs a whole number: leave rope.factor out, or give {reach / L!r} for {reach} "
                "tokens"
            )

    def window(self, stated: int) -> int:
        return round(self.factor * self.original_length)

    def extended(self, window: int, target_length: int) -> YaRN:
        default = dataclasses.replace(self, attention_factor=None)
        if self.attention_factor != default.attention_factor:
            raise SkipwiseError(
                f"its attention_factor of {self.attention_factor:g} is not the default, so the "
                "factor for a longer target is not known"
            )
        factor = target_length / self.original_length
        return dataclasses.replace(default, factor=factor, attention_factor=None)

    def gguf_keys(self) -> dict[str, str | int | float] | None:
        """llama.cpp has the default ramp only."""
        if (self.beta_fast, self.beta_slow, self.truncate) != (32, 1, True):
            return None
        keys = {"type": "yarn", "factor": self.factor}
        return {**keys, "original_context_length": self.original_length}


@dataclass(frozen=True, kw_only=True)
class Llama3(Scaling):
    """Llama 3.1's: long wavelengths interpolated by f, short ones kept, others blended linearly.

    Source: meta-llama/llama-models, `apply_scaling` in models/llama3/model.py.

    Raises:
        SkipwiseError: the ramp is empty.
    """

    name: ClassVar[str] = "llama3"
    auto_candidate: ClassVar[bool] = True
    extendable: ClassVar[bool] = True
    original_length: int
    low_freq_factor: float = 1.0  # rotations over L up to which a pair is interpolated by f
    high_freq_factor: float = 4.0  # rotations over L from which a pair is kept

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

    def options(self) -> dict[str, Any]:
        low, high = self.low_freq_factor, self.high_freq_factor
        return {**super().options(), "low_freq_factor": low, "high_freq_factor": high}


@dataclass(frozen=True, kw_only=True)
class LongRoPE(Scaling):
    """A factor for each pair; Ding et al. 2024, arXiv 2402.13753.

    A model switches from `short_factor` to `long_factor` when a batch is longer than L. A PoSE
    batch is short but has far positions, so training needs one list: `short_factor` defaults to
    `long_factor`, and two different lists are not `trainable`. The authors find theirs by an
    evolutionary search, which Skipwise does not run; `make_scaling` says what it takes instead.
    """

    name: ClassVar[str] = "longrope"
    factor_from_lengths: ClassVar[bool] = True
    original_length: int
    long_factor: tuple[float, ...]  # (d/2,)
    short_factor: tuple[float, ...] = None  # type: ignore[assignment]  # defaults to long_factor
    attention_factor: float = None  # type: ignore[assignment]  # defaults to sqrt(1 + ln f / ln L)

    def __post_init__(self) -> None:
        if self.short_factor is None:
            object.__setattr__(self, "short_factor", self.long_factor)
        if self.attention_factor is None:
            object.__setattr__(self, "attention_factor", self.default_attention_factor())

    def default_attention_factor(self) -> float:
        return math.sqrt(1.0 + math.log(max(self.factor, 1.0)) / math.log(self.original_length))

    @property
    def trainable(self) -> bool:
        return self.short_factor == self.long_factor

    def inv_freq(self, theta: float, dim: int) -> np.ndarray:
        self.check(dim)
        return _frequencies(theta, dim) / np.array(self.long_factor)

    def check(self, dim: int) -> None:
        for name in ("short_factor", "long_factor"):
            if len(getattr(self, name)) != dim // 2:
                raise SkipwiseError(
                    f"{name} has {len(getattr(self, name))} numbers and the model has {dim // 2} "
                    "pairs: give one number per pair, or leave it out"
                )

    def to_config(
        self, *, theta: float, dim: int, original_length: int, target_length: int
    ) -> dict[str, Any]:
        """L is also at the top level, where transformers 4 reads it."""
        lengths = {"original_length": original_length, "target_length": target_length}
        config = super().to_config(theta=theta, dim=dim, **lengths)
        return {**config, "original_max_position_embeddings": original_length}


@dataclass(frozen=True, kw_only=True)
class Dynamic(Scaling):
    """NTK with a theta that grows with the longest position seen so far: inference only.

    Source: emozilla 2023, "Dynamically Scaled RoPE", r/LocalLLaMA.
    """

    name: ClassVar[str] = "dynamic"
    keeps_length: ClassVar[bool] = True
    follows_length: ClassVar[bool] = True
    original_length: int

    def inv_freq(self, theta: float, dim: int, length: float | None = None) -> np.ndarray:
        """After a sequence of `length` tokens, by default T = f L. Up to L nothing is scaled."""
        f, L = self.factor, self.original_length
        grown = f * max(f * L if length is None else length, L) / L - (f - 1)
        return _frequencies(theta * grown ** (dim / (dim - 2)), dim)


# In the order in which `rope.type: auto` prefers them.
SCALINGS: dict[str, type[Scaling]] = {
    cls.name: cls for cls in (Unscaled, YaRN, Llama3, LongRoPE, NTK, Linear, Dynamic)
}


def keeps_length(scaling: Scaling | type[Scaling] | None, family: str) -> bool:
    """Whether a config of this model_type states L as max_position_embeddings, and servers
    multiply it by f. The one place that knows: it is asked when a config is written and read.

    Gemma 3 states T: its released configs do, and vLLM multiplies for every model_type but those
    with "gemma3" in it (`_get_and_verify_max_len`), SGLang for none of them. `dynamic` states L
    there as well, because transformers computes its frequencies from max_position_embeddings.
    """
    if scaling is None or not scaling.keeps_length:
        return False
    return scaling.follows_length or "gemma3" not in family


def scalings_for(refused: tuple[str, ...] = ()) -> list[str]:
    """Names of the scalings to extend a model with, the preferred first, without the refused."""
    usable = [n for n, cls in SCALINGS.items() if cls is not Unscaled and not cls.follows_length]
    return [name for name in usable if name not in refused]


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
        theta, dim: Of the model. Needed for longrope without `long_factor`: each pair then gets
            YaRN's factor. That is our choice, not the paper's search.
        options: `beta_fast`, `low_freq_factor`, ... as in a transformers config. None is unset.

    Raises:
        SkipwiseError: an unknown name or option, a factor below 1, an invalid value.
    """
    if name not in SCALINGS:
        raise SkipwiseError(f"rope.type is {name!r}: choose one of {', '.join(SCALINGS)}")
    cls: Any = SCALINGS[name]
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
        factors = _frequencies(theta, dim) / yarn.inv_freq(theta, dim)
        given["long_factor"] = tuple(factors.tolist())
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


def _frequencies(theta: float, dim: int) -> np.ndarray:
    """(d/2,) float64: theta^(-2j/d)."""
    return theta ** -(np.arange(0, dim, 2) / dim)
