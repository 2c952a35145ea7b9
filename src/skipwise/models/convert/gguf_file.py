"""What a GGUF file says: its keys, its frequencies as llama.cpp computes them, and their scaling.

This relies on the llama.cpp in llama-cpp-python 0.3.36; export/gguf/keys.py has the places.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from skipwise.errors import SkipwiseError
from skipwise.pose.rope import Linear, Llama3, LongRoPE, Scaling, Unscaled, YaRN

TABLE = "rope_freqs.weight"


def read_file(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(keys without the tokenizer's lists, tensors that divide RoPE's frequencies).

    Raises:
        SkipwiseError: not a GGUF file.
    """
    reader = open_file(file)
    arrays = gguf_package().GGUFValueType.ARRAY
    keys = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not (name.startswith("tokenizer.") and field.types[0] == arrays)
    }
    tables = {
        t.name: np.array(t.data, dtype=np.float64)
        for t in reader.tensors
        if t.name.startswith(("rope_freqs", "rope_factors"))
    }
    return keys, tables


def open_file(file: Path) -> Any:
    try:
        return gguf_package().GGUFReader(file)
    except (OSError, ValueError, IndexError) as error:
        raise SkipwiseError(f"{file} is not a complete GGUF file: {error}") from error


def gguf_package() -> Any:
    """llama.cpp's package for reading and writing these files.

    Raises:
        SkipwiseError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise SkipwiseError(
            'the gguf package is missing\ntype pip install "skipwise[gguf]"'
        ) from error
    return gguf


def llama_cpp_rope(keys: dict[str, Any], tables: dict[str, np.ndarray]) -> tuple[np.ndarray, float]:
    """llama.cpp's inv_freq (d/2,) beyond the original context, and its factor on cos and sin."""
    architecture = keys["general.architecture"]

    def key(name: str, default: Any) -> Any:
        return keys.get(f"{architecture}.{name}", default)

    kind = key("rope.scaling.type", "linear")
    factor = 1.0 if kind == "none" else key("rope.scaling.factor", 0.0) or 1.0
    table = tables.get("rope_factors_long.weight" if _switches(keys) else TABLE, 1.0)
    plain = _plain(keys) / table
    attention = float(key("rope.scaling.attn_factor", 1.0))
    if kind != "yarn":
        return plain / factor, attention
    length = key("rope.scaling.original_context_length", key("context_length", 0))
    yarn = YaRN(factor=factor, original_length=length)
    theta, dim = float(key("rope.freq_base", 10000.0)), 2 * len(plain)
    return yarn.inv_freq(theta, dim) / table, attention * yarn.attention_factor


def scaling_of(keys: dict[str, Any], tables: dict[str, np.ndarray]) -> Scaling:
    """The scaling that a file's keys and tables are.

    A table holds no name: it is llama3's where its formula gives the same numbers, else longrope
    with one list.
    """
    prefix = f"{keys['general.architecture']}."
    scaled = {k.removeprefix(f"{prefix}rope.scaling."): v for k, v in keys.items()}
    window = keys[f"{prefix}context_length"]
    L = scaled.get("original_context_length") or window
    factor = float(scaled.get("factor") or 1.0)
    inv_freq, attention = llama_cpp_rope(keys, tables)
    if tables:
        factors = _plain(keys) / inv_freq
        found = _llama3(factors, _plain(keys)) if attention == 1 else None
        if found and np.allclose(found.inv_freq(*_theta_and_dim(keys)), inv_freq, rtol=1e-5):
            return found
        short = tables.get("rope_factors_short.weight", factors)
        return LongRoPE(
            factor=max(1.0, window / L),
            original_length=L,
            long_factor=tuple(factors.tolist()),
            short_factor=tuple(short.tolist()),
            attention_factor=attention,
        )
    if scaled.get("type", "linear") == "linear" and factor != 1:
        return Linear(factor=factor)
    if scaled.get("type") == "yarn":
        options = {
            k: scaled[f"yarn_{k}"] for k in ("beta_fast", "beta_slow") if f"yarn_{k}" in scaled
        }
        return YaRN(factor=factor, original_length=L, attention_factor=attention, **options)
    return Unscaled()


def _llama3(factors: np.ndarray, plain: np.ndarray) -> Llama3 | None:
    """Llama 3's scaling from its table: pairs on the ramp give its length and upper end.

    With s = (1/factor - 1/f) / (1 - 1/f) on the ramp, s (high - low) = rotations over L - low. Only
    ratios follow from it, so low is 1, as in all released models.
    """
    f = float(factors.max())
    if f <= 1:
        return None
    kept = (1 / factors - 1 / f) / (1 - 1 / f)
    ramp = (kept > 1e-3) & (kept < 1 - 1e-3)
    if ramp.sum() < 2:
        return Llama3(factor=f, original_length=8192)
    slope, offset = np.polyfit(plain[ramp] / (2 * math.pi), kept[ramp], 1)
    if slope <= 0 or offset >= 0:
        return None
    high = round(1 - 1 / float(offset), 4)
    L = round(float(slope) * (high - 1))
    return Llama3(factor=round(f, 5), original_length=L, high_freq_factor=high)


def _plain(keys: dict[str, Any]) -> np.ndarray:
    """(d/2,) frequencies without scaling."""
    return Unscaled().inv_freq(*_theta_and_dim(keys))


def _theta_and_dim(keys: dict[str, Any]) -> tuple[float, int]:
    prefix = f"{keys['general.architecture']}."
    head_dim = keys.get(f"{prefix}attention.key_length")
    if head_dim is None:
        heads = np.max(keys.get(f"{prefix}attention.head_count", 1))
        head_dim = keys.get(f"{prefix}embedding_length", 0) // heads
    theta = float(keys.get(f"{prefix}rope.freq_base", 10000.0))
    return theta, int(keys.get(f"{prefix}rope.dimension_count", head_dim))


def _switches(keys: dict[str, Any]) -> bool:
    """Whether llama.cpp takes one of two tables by the size of its buffer."""
    architecture = keys["general.architecture"]
    return keys.get(f"{architecture}.rope.scaling.type") == "longrope" or architecture == "phi3"
