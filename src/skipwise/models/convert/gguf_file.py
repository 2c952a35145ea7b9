"""What a GGUF file says: its keys, its frequencies as llama.cpp computes them, and their scaling.

This relies on the llama.cpp in llama-cpp-python 0.3.36; export/gguf/keys.py has the places.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from skipwise.errors import SkipwiseError, install
from skipwise.pose.rope import Linear, Llama3, LongRoPE, Scaling, Unscaled, YaRN

TABLE = "rope_freqs.weight"


def read_file(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(keys without the tokenizer's lists, tensors that divide RoPE's frequencies).

    Raises:
        SkipwiseError: not a GGUF file.
    """
    try:
        reader = open_gguf(file)
    except (OSError, ValueError, IndexError) as error:
        raise SkipwiseError(f"{file} is not a complete GGUF file: {error}") from error
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


def open_gguf(file: Path, mode: str = "r") -> Any:
    """A reader of the file that ends where the file does, whatever length a list claims."""

    class Reader(gguf_package().GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **named: Any) -> Any:
            if count and offset >= len(self.data):
                raise ValueError("it ends before its keys do")
            return super()._get(offset, dtype, count, *order, **named)

    return Reader(file, mode)


def gguf_package() -> Any:
    """llama.cpp's package for reading and writing these files.

    Raises:
        SkipwiseError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise SkipwiseError(f"the gguf package is missing\n{install('gguf')}") from error
    return gguf


def llama_cpp_rope(keys: dict[str, Any], tables: dict[str, np.ndarray]) -> tuple[np.ndarray, float]:
    """llama.cpp's inv_freq (d/2,) beyond the original context, and its factor on cos and sin."""
    key = own_keys(keys)
    kind = key.get("rope.scaling.type", "linear")
    factor = 1.0 if kind == "none" else key.get("rope.scaling.factor", 0.0) or 1.0
    long = kind == "longrope" or keys["general.architecture"] == "phi3"
    table = tables.get("rope_factors_long.weight" if long else TABLE, 1.0)
    theta, dim = _theta_and_dim(key)
    plain = Unscaled().inv_freq(theta, dim) / table
    attention = float(key.get("rope.scaling.attn_factor", 1.0))
    if kind != "yarn":
        return plain / factor, attention
    length = key.get("rope.scaling.original_context_length", key.get("context_length", 0))
    yarn = YaRN(factor=factor, original_length=length)
    return yarn.inv_freq(theta, dim) / table, attention * yarn.attention_factor


def scaling_of(keys: dict[str, Any], tables: dict[str, np.ndarray]) -> Scaling:
    """The scaling of a file. A table without a name is llama3 if that gives it, else longrope."""
    key = own_keys(keys)
    window, kind = key["context_length"], key.get("rope.scaling.type", "linear")
    L = key.get("rope.scaling.original_context_length") or window
    factor = float(key.get("rope.scaling.factor") or 1.0)
    inv_freq, attention = llama_cpp_rope(keys, tables)
    if tables:
        theta, dim = _theta_and_dim(key)
        factors = Unscaled().inv_freq(theta, dim) / inv_freq
        for length in (2**k for k in range(8, 21)) if factors.max() > 1 and attention == 1 else ():
            llama3 = Llama3(factor=round(float(factors.max()), 5), original_length=length)
            if np.allclose(llama3.inv_freq(theta, dim), inv_freq, rtol=1e-5, atol=0):
                return llama3
        short = tables.get("rope_factors_short.weight", factors)
        return LongRoPE(
            factor=max(1.0, window / L),
            original_length=L,
            long_factor=tuple(factors.tolist()),
            short_factor=tuple(short.tolist()),
            attention_factor=attention,
        )
    if kind == "yarn":
        names = ("beta_fast", "beta_slow")
        betas = {n: key[k] for n in names if (k := f"rope.scaling.yarn_{n}") in key}
        return YaRN(factor=factor, original_length=L, attention_factor=attention, **betas)
    return Linear(factor=factor) if kind == "linear" and factor != 1 else Unscaled()


def own_keys(keys: dict[str, Any]) -> dict[str, Any]:
    """The keys of the architecture, without its name."""
    prefix = f"{keys['general.architecture']}."
    return {k.removeprefix(prefix): v for k, v in keys.items() if k.startswith(prefix)}


def _theta_and_dim(key: dict[str, Any]) -> tuple[float, int]:
    head_dim = key.get("attention.key_length")
    if head_dim is None:
        head_dim = key.get("embedding_length", 0) // np.max(key.get("attention.head_count", 1))
    theta = float(key.get("rope.freq_base", 10000.0))
    return theta, int(key.get("rope.dimension_count", head_dim))
