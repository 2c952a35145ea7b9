"""The RoPE keys of a GGUF file: what llama.cpp will compute from them, and how to fix them.

Frequencies are computed from the file's keys as in llama.cpp's C code, and compared with those that
config.json requires.

This relies on the llama.cpp in llama-cpp-python 0.3.36; {arch} is the architecture:

src/llama-model.cpp, load_hparams   `{arch}.context_length`; `.rope.freq_base`, 10000; and of
    `.rope.scaling.`: `type`, linear unless given; `factor`, 1; `original_context_length`, the
    context length; `attn_factor`, 1. Few architectures read `yarn_beta_fast` and similar keys, and
    llama does not: there the ramp goes from 32 rotations to 1, with its ends rounded to pairs.
src/llama-context.cpp, ggml rope_yarn   yarn multiplies cos and sin by attn_factor x
    (1 + 0.1 ln factor) whatever config.json says; other types by attn_factor.
src/models/llama.cpp   a tensor `rope_freqs.weight` (d/2,) divides each pair's frequency, unless the
    type is longrope. The converter writes it for llama3, but it can hold any fixed frequencies, so
    scalings without keys (yarn with another ramp, longrope with one list) are written this way.
src/models/phi3.cpp   beyond the original context `rope_factors_long.weight` divides them.
conversion/base.py   max_position_embeddings becomes `context_length`, though linear keeps L there;
    attention_factor becomes `yarn_attn_factor`, which is not read.

Letters: d = rotary dimension, T = target length
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from skipwise.errors import Check
from skipwise.export.gguf.file import rewrite, set_numbers
from skipwise.export.gguf.requirements import Requirements, read_requirements
from skipwise.export.gguf.tokenizer import text_ends
from skipwise.models.convert.gguf_file import TABLE, llama_cpp_rope, read_file
from skipwise.pose.rope import Unscaled

# these read more keys (yarn_log_multiplier, yarn_beta_fast) or compute the factor themselves
_OWN_WAY = {"deepseek2", "deepseek32", "deepseek4", "glm-dsa", "grok", "laguna", "mistral3"}


def check_gguf(file: Path, folder: Path) -> list[Check]:
    """Compare what llama.cpp will compute from a GGUF file with the model folder it was made from.

    Raises:
        SkipwiseError: not a GGUF file, or a folder whose config Skipwise cannot read.
    """
    requirements = read_requirements(folder)
    keys, tables = read_file(file)
    length = keys.get(f"{keys['general.architecture']}.context_length", 0)
    T = requirements.target_length
    detail = f"{length:,} tokens" + ("" if length == T else f", and the model's is {T:,}")
    checks = [
        _check_frequencies(requirements, keys, tables),
        _check_attention(requirements, keys, tables),
        Check(name="gguf context length", passed=length == T, detail=detail),
    ]
    ends = text_ends(folder)
    flag = keys.get("tokenizer.ggml.add_bos_token", keys.get("tokenizer.ggml.model") == "llama")
    if "add_bos_token" in ends:
        same = flag == ends["add_bos_token"]
        words = {True: "begins with BOS", False: "begins without BOS"}
        detail = f"a text {words[flag]}"
        detail += "" if same else f", and in training it {words[not flag]}"
        checks.append(Check(name="gguf tokenizer", passed=same, detail=detail))
    return checks


def _check_frequencies(
    requirements: Requirements, keys: dict[str, Any], tables: dict[str, np.ndarray]
) -> Check:
    name, scaling, architecture = "gguf rope", requirements.scaling, keys["general.architecture"]
    if architecture in _OWN_WAY and not isinstance(scaling, Unscaled):
        detail = f"llama.cpp has its own scaling for {architecture}, which Skipwise does not "
        detail += "compute: compare its answers at full length with those of transformers"
        return Check(name=name, passed=False, detail=detail)
    have, want = llama_cpp_rope(keys, tables)[0], requirements.inv_freq()
    if len(have) != len(want):
        detail = f"{len(have)} pairs, and the config says {len(want)}"
        return Check(name=name, passed=False, detail=detail)
    scaled = f"{architecture}.rope.scaling"
    factor = keys.get(f"{scaled}.factor", 1.0)
    found = f"{keys[f'{scaled}.type']} by {factor:g}" if f"{scaled}.type" in keys else "no type"
    found += f", theta {keys.get(f'{architecture}.rope.freq_base', 10000.0):,.0f}"
    found += " and a table" if tables else ""
    worst = int(np.abs(have / want - 1).argmax())
    same, what = np.allclose(have, want, rtol=1e-5, atol=0), f"{scaling.name} by {scaling.factor:g}"
    computed = f"the frequencies of {what}"
    if not same:
        computed = f"{have[worst]:.4g} for the frequency of pair {worst} of {len(want)}, and "
        computed += f"{what} has {want[worst]:.4g}"
    detail = f"{found}: llama.cpp has {computed}"
    return Check(name=name, passed=same, detail=detail)


def _check_attention(
    requirements: Requirements, keys: dict[str, Any], tables: dict[str, np.ndarray]
) -> Check:
    have, want = llama_cpp_rope(keys, tables)[1], requirements.scaling.attention_factor
    same = abs(have - want) <= 1e-5 * want
    detail = f"{have:.4f}" + ("" if same else f", and the config says {want:.4f}")
    return Check(name="gguf attention factor", passed=same, detail=detail)


def fix_rope_keys(file: Path, folder: Path) -> list[str]:
    """Correct the RoPE keys that the converter wrote, in place if only numbers change.

    Returns:
        The keys and tensors that were changed.
    """
    requirements = read_requirements(folder)
    keys, tables = read_file(file)
    architecture = keys["general.architecture"]
    if architecture in _OWN_WAY:
        return []
    wanted = _rope_keys(requirements, architecture)
    changed = {key: value for key, value in wanted.items() if not _same(keys.get(key), value)}
    table = _table(requirements)
    if table is None or (TABLE in tables and np.allclose(tables[TABLE], table, rtol=1e-5)):
        tensors = {}
    else:
        tensors = {TABLE: table}
    numbers = {k: v for k, v in changed.items() if isinstance(v, int | float) and k in keys}
    if not changed and not tensors:
        return []
    if numbers == changed and not tensors:
        set_numbers(file, numbers)
    else:
        # llama.cpp does not read these today; if it did later, they would apply twice
        unread = [k for k in keys if k.startswith(f"{architecture}.rope.scaling.yarn_")]
        rewrite(file, {**dict.fromkeys(unread), **changed}, tensors)
    return [*changed, *tensors]


def _rope_keys(requirements: Requirements, architecture: str) -> dict[str, Any]:
    """The keys as they should be. None for a key that should be absent."""
    rope: dict[str, Any] = {}
    if not requirements.own_keys:
        rope = {"type": None, "factor": None, "original_context_length": None}
        rope |= requirements.scaling.gguf_keys() or {}
    factor = requirements.attn_factor
    rope["attn_factor"] = None if abs(factor - 1) < 1e-6 else factor
    wanted = {f"{architecture}.rope.scaling.{key}": value for key, value in rope.items()}
    wanted[f"{architecture}.rope.freq_base"] = requirements.info.rope_theta
    wanted[f"{architecture}.context_length"] = requirements.target_length
    return wanted


def _table(requirements: Requirements) -> np.ndarray | None:
    """What each pair's frequency is divided by (d/2,), if the file needs a table."""
    if not requirements.by_table:
        return None
    plain = Unscaled().inv_freq(requirements.info.rope_theta, requirements.info.rotary_dim)
    return (plain / requirements.inv_freq()).astype(np.float32)


def _same(have: Any, want: Any) -> bool:
    if isinstance(have, int | float) and isinstance(want, int | float):
        return math.isclose(have, want, rel_tol=1e-6)  # float32 in the file
    return have == want
