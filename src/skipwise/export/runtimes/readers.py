"""What each runtime loads from a config: its RoPE, its frequencies, and its maximum length.

One function per runtime, each written after this runtime's code:

- transformers 5:  5.23.0, modeling_rope_utils.py and configuration_utils.py
- transformers 4:  4.57.6, modeling_rope_utils.py and the config classes
- vLLM:            0.33.0 (runs transformers 5), config/model.py `_get_and_verify_max_len`,
                   transformers_utils/{config,model_arch_config_convertor}.py,
                   model_executor/layers/rotary_embedding/
- SGLang:          0.5.23 (runs transformers 5), srt/utils/hf_transformers/common.py
                   `get_context_length`, srt/layers/rotary_embedding/, srt/models/llama.py
- llama.cpp:       as in llama-cpp-python 0.3.36, conversion/{base,llama}.py (which runs
                   transformers 4.57.6) and src/llama-context.cpp

Three more are after code of 2026 that was read and not run here: DeepSeek's yarn (vLLM and SGLang
`deepseek_yarn`, llama.cpp src/models/deepseek2.cpp), Hunyuan's alpha (`DynamicNTKAlpha...`,
conversion/hunyuan.py) and Gemma 4's proportional RoPE (`_proportional`). Not modelled: mrope
sections, a model's own code.

Shapes:  d = rotary dimension; inv_freq is (d/2,), at the end of the window
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from skipwise.errors import SkipwiseError
from skipwise.export.runtimes.folder import ModelFolder
from skipwise.models.compatibility import LENGTH_KEYS
from skipwise.models.hf_config import complete
from skipwise.pose.rope import SCALINGS, Linear, LongRoPE, Unscaled, keeps_length
from skipwise.pose.rope_config import from_rope_parameters

T5, T4, VLLM, SGLANG, LLAMA_CPP = "transformers 5", "transformers 4", "vLLM", "SGLang", "llama.cpp"

NOT_COMPUTED = "cannot be computed"

# Types that transformers 4 and 5, vLLM and SGLang all know; add a new one where a runtime has it.
KNOWN_TYPES = ("default", "linear", "yarn", "llama3", "longrope", "dynamic")
_NEEDED = {  # keys without which transformers refuses a type
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
_NOT_MULTIPLIED = ("yarn", "llama3")  # types whose length vLLM does not multiply by a factor
_TYPES = ("full_attention", "sliding_attention")
_OTHER_TYPES = ("proportional",)  # a type of transformers 5 that pose/rope.py does not have
_PHI3 = ("phi3", "phi4_multimodal")  # call longrope su or yarn, and keep L at the top level
_ALPHA = "hunyuan"  # of the families whose own classes read alpha
_NO_HEAD_DIM = ("mixtral", "minimax")  # classes that leave head_dim at None
_NEVER_WITHOUT = ("ministral", "hunyuan_v1_dense", "hunyuan_v1_moe")  # classes that always need it
_LLAMA_CPP_LLAMA3 = (  # converters derived from LlamaModel, and EXAONE's own
    *("llama", "mistral", "mixtral", "smollm3", "arcee", "apertus", "granite", "granitemoe"),
    *("exaone4", "ministral3", "llama4_text", "afmoe", "exaone_moe"),
)
SGLANG_LENGTH_KEYS = LENGTH_KEYS[:4]
LLAMA_CPP_WITHOUT_ROPE = (  # converters that write neither theta nor scaling: 10,000 and none
    *("gpt_neox", "gemma", "gemma2", "phi", "falcon", "stablelm", "minicpm3", "orion"),
)
_GGUF = """
mistral=llama mixtral=llama deepseek_v2=deepseek2 deepseek_v3=deepseek2 glm4_moe_lite=deepseek2
youtu=deepseek2 qwen2_moe=qwen2moe qwen3_moe=qwen3moe qwen3_next=qwen3next qwen3_5_text=qwen35
qwen3_5_moe_text=qwen35moe glm=chatglm glm4_moe=glm4moe glm_moe_dsa=glm-dsa phi=phi2
ernie4_5_moe=ernie4_5-moe cohere=command-r olmo3=olmo2 gpt_neox=gptneox gpt_oss=gpt-oss
hunyuan_v1_dense=hunyuan-dense hunyuan_v1_moe=hunyuan-moe granitemoehybrid=granitehybrid
granitemoeshared=granitemoe minimax_m2=minimax-m2 ministral3=mistral3 falcon_h1=falcon-h1
mimo_v2_flash=mimo2 lfm2_moe=lfm2moe exaone_moe=exaone-moe
"""  # llama.cpp's name of an architecture, where it is not model_type without _text
_LLAMA_CPP_LONGROPE = ("phi3", "phimoe", "minicpm", "minicpm3")
_THETA_4 = {"cohere": 1e4, "olmo3": 1e4, "falcon_h1": 1e5, "persimmon": 25e3}  # where 5 differs
_NEW_IN_5 = """
afmoe axk1 axk2 bailing_hybrid beam cohere2_moe cwm deepseek_v32 deepseek_v4 dots3_note_text
exaone_moe flint gemma4_text gemma4_unified_text glm4_moe_lite glm_moe_dsa granite_swa
granitemoe_swa hrm_text hy_v3 hy_v4 hyperclovax internlm3 iquestcoder jais2 kolibri1 laguna
lfm2_moe lfm3 mellum mimo_v2_flash minicpm3 minimax_m2 minimax_m3_vl_text ministral3 nanochat
olmo_hybrid qwen3_5_moe_text qwen3_5_text qwen4_exp_text solar_open youtu zaya
"""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one runtime loads."""

    runtime: str
    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    original_length: int | None = None  # L, where the type has one
    attention_factor: float = 1.0
    max_length: int | None = None  # what it serves, or the model's length as it reads it
    sliding_theta: float | None = None  # of the sliding layers, if RoPE is set per layer type
    inv_freq: np.ndarray | None = field(default=None, compare=False, repr=False)  # (d/2,)
    error: str | None = None  # why it does not load

    def same_pairs(self, other: Reading) -> bool:
        """Whether the frequencies are equal to float32 precision."""
        have, want = self.inv_freq, other.inv_freq
        if have is None or want is None or have.shape != want.shape:
            return False
        return np.allclose(have, want, rtol=1e-5, atol=0)

    def same_rope(self, other: Reading) -> bool:
        """Whether both compute the same cos and sin."""
        same_factor = abs(self.attention_factor - other.attention_factor) < 1e-5
        same_sliding = self.sliding_theta == other.sliding_theta
        return self.same_pairs(other) and same_factor and same_sliding


def read_all(folder: ModelFolder) -> tuple[Reading, ...]:
    """Every runtime's reading, transformers 5 first."""
    readers = (transformers_5, transformers_4, vllm, sglang, llama_cpp)
    return tuple(reader(folder) for reader in readers)


def transformers_5(folder: ModelFolder) -> Reading:
    """`rope_scaling` wins over `rope_parameters`, `rope_type` over `type`, the top level's L over
    the one inside."""
    p, sliding = parameters_5(folder)
    error = _refused(folder, p) or _no_width(folder, p)
    return _reading(T5, folder, p, folder.length, sliding=sliding, error=error)


def transformers_4(folder: ModelFolder) -> Reading:
    """Reads `rope_scaling` and `rope_theta` at the top level, and not `rope_parameters`.
    `type` wins over `rope_type`; longrope takes L from the top level, all others from inside."""
    p, error = _parameters_4(folder)
    if folder.family in _NEW_IN_5.split():
        error = f"{folder.family} is not in transformers 4.57"
    sliding = None
    if folder.nested:
        own = 10000.0 if folder.family.startswith(("gemma3", "modernbert")) else p["rope_theta"]
        sliding = float(folder.raw.get(_spelled(folder, "rope_local_base_freq")) or own)
    return _reading(T4, folder, p, folder.length, sliding=sliding, error=error)


def vllm(folder: ModelFolder) -> Reading:
    """Loads with transformers 5 and computes its own cos and sin. `dynamic` stays as at L, longrope
    takes its attention factor from the lengths."""
    p, sliding = parameters_5(folder)
    given = given_parameters(folder)
    conflict = None
    alike = ("dynamic" if p.get("alpha") else p["rope_type"], p["rope_type"], "su", "mrope")
    if given.get("type", p["rope_type"]) not in alike:
        conflict = f"type is {given['type']!r} and rope_type {p['rope_type']!r}"
    if p["rope_type"] == "su":
        p["rope_type"] = "longrope"
    error = conflict or _refused(folder, p, "ntk") or _bad_factor(p)
    length = _vllm_length(folder, p)
    p = _served(folder, p)
    name, factor = p["rope_type"], p.get("factor")
    out = _reading(VLLM, folder, p, length, sliding=sliding, error=error)
    if name == "ntk" and factor:  # its own formula: theta f, and frequencies divided by f^(2/d)
        dim, f = _dim(folder, p), float(factor)
        inv_freq = Unscaled().inv_freq(p["rope_theta"] * f, dim) / f ** (2 / dim)
        return dataclasses.replace(out, inv_freq=inv_freq, factor=f)
    if name == "dynamic" and out.inv_freq is not None:
        plain = Unscaled().inv_freq(p["rope_theta"], _dim(folder, p))
        return dataclasses.replace(out, inv_freq=plain)
    return out


def sglang(folder: ModelFolder) -> Reading:
    """Loads with transformers 5 and computes its own cos and sin. yarn reads `attn_factor` and not
    `attention_factor`; longrope takes its attention factor from the lengths."""
    p, sliding = parameters_5(folder)
    error, length = _refused(folder, p) or _bad_factor(p), _sglang_length(folder, p)
    p, times = _served(folder, p), 1.0
    if p["rope_type"] == "yarn" and not folder.latent_attention:
        times = float(p.get("attn_factor", 1.0))
        p = {k: v for k, v in p.items() if k != "attention_factor"}
    out = _reading(SGLANG, folder, p, length, sliding=sliding, error=error)
    return dataclasses.replace(out, attention_factor=out.attention_factor * times)


def llama_cpp(folder: ModelFolder) -> Reading:
    """Its conversion/base.py runs transformers 4.57.6 on the config and then prefers
    `rope_parameters` to `rope_scaling`. yarn has the default attention factor and the default ramp,
    whatever the config says; some classes do not convert llama3, some no RoPE at all."""
    given = dict(folder.raw.get("rope_parameters") or {})
    older, _ = _parameters_4(folder)
    if "rope_parameters" not in folder.raw:
        given = {k: v for k, v in older.items() if k != "partial_rotary_factor"}
    sliding = given.get("sliding_attention") or {}
    p = dict(given.get("full_attention") or given)
    p.setdefault("rope_theta", older["rope_theta"])
    p["rope_type"] = p.get("rope_type", p.get("type", "default"))
    p["partial_rotary_factor"] = p.get("partial_rotary_factor", _partial(folder, p))
    p.setdefault("original_max_position_embeddings", top_length(folder))
    name, error, scaled = p["rope_type"], None, True
    if name == "yarn" and p.get("factor") and not p["original_max_position_embeddings"]:
        error = "its converter needs original_max_position_embeddings for yarn"
    if name == "llama3":
        p.setdefault("low_freq_factor", 1.0)
        p.setdefault("high_freq_factor", 4.0)
        p["factor"] = p.get("factor") or 8.0
        p["original_max_position_embeddings"] = p["original_max_position_embeddings"] or 8192
        scaled = folder.family in _LLAMA_CPP_LLAMA3
    elif name in ("longrope", "su"):
        scaled = folder.family in _LLAMA_CPP_LONGROPE
        p = _by_lengths(p) | {"rope_type": "longrope"}
    elif name in ("linear", "yarn"):
        scaled = bool(p.get("factor"))
    else:
        scaled = False
    if name == "dynamic" and folder.family.startswith(_ALPHA):
        p = _with_alpha(folder, p)
    latent = folder.latent_attention or folder.family == "ministral3"
    latent = latent and p.get("mscale_all_dim")
    if name == "yarn":
        unread = ("attention_factor", "mscale", "mscale_all_dim", "truncate")
        unread += ("beta_fast", "beta_slow")  # converted, and not read by most models
        p = {k: v for k, v in p.items() if k not in unread}
        if latent:  # its log multiplier is in the attention scale, and cos and sin stay as they are
            p["attention_factor"] = 1.0
    if folder.family in LLAMA_CPP_WITHOUT_ROPE:
        p, scaled = {"rope_theta": 10000.0, "partial_rotary_factor": _partial(folder, {})}, False
        error = None
    if not scaled and name not in _OTHER_TYPES:  # it still converts, without a warning
        p = {k: p[k] for k in ("rope_theta", "partial_rotary_factor") if k in p}
        p["rope_type"] = "default"
    theta = sliding.get("rope_theta", folder.raw.get("rope_local_base_freq"))
    if folder.nested and theta is None:
        theta = transformers_4(folder).sliding_theta
    length = 2048 if folder.family == "falcon" else folder.length  # whatever Falcon's config says
    out = _reading(LLAMA_CPP, folder, p, length, error=error)
    theta = float(theta) if folder.nested and theta is not None else None
    return dataclasses.replace(out, sliding_theta=theta)


def parameters_5(folder: ModelFolder) -> tuple[dict[str, Any], float | None]:
    """(rope_parameters of the full layers in transformers 5, theta of the sliding ones)."""
    raw = {k: v for k, v in folder.raw.items() if k != "auto_map"}
    p, sliding = complete(raw)["rope_parameters"], None
    if isinstance(p.get("full_attention"), dict):
        known = folder.known.get("rope_parameters") or {}
        theta = [(given.get(k) or {}).get("rope_theta") for k in _TYPES for given in (p, known)]
        sliding = float(theta[2] or theta[3] or 10000.0)
        full = theta[0] or folder.raw.get("rope_theta") or theta[1] or 10000.0
        p = {**p["full_attention"], "rope_theta": full}
    p = {"rope_type": "default", **p, "rope_theta": float(p["rope_theta"])}
    given = given_parameters(folder)
    name = given.get("rope_type", given.get("type"))
    if folder.family.startswith(_ALPHA):
        p = _with_alpha(folder, p)
    if name == "su" and folder.family not in _PHI3:
        p["rope_type"] = "su"  # only Phi-3's class knows this older name
    if folder.family in _PHI3 and name in ("su", "yarn"):
        p["rope_type"] = "longrope"
    if folder.family in _PHI3 and name == "su":  # renamed after L is put inside
        keep = "original_max_position_embeddings" in given
        kept = {k: v for k, v in p.items() if k != "original_max_position_embeddings"}
        return p if keep else kept, sliding
    if p["rope_type"] in ("yarn", "llama3", "longrope", "su"):
        inside = p.get("original_max_position_embeddings")
        outside = None if folder.nested else top_length(folder)
        p["original_max_position_embeddings"] = outside or inside or folder.length
    return p, sliding


def _spelled(folder: ModelFolder, fact: str) -> str:
    """The older key that the family's class reads for it."""
    return next((k for k, name in folder.known.get("keys", {}).items() if name == fact), fact)


def gguf_architecture(family: str) -> str:
    """The prefix of llama.cpp's keys for this model_type."""
    names = {name: prefix for name, _, prefix in (x.partition("=") for x in _GGUF.split())}
    return names.get(family, family.removesuffix("_text"))


def _with_alpha(folder: ModelFolder, p: dict[str, Any]) -> dict[str, Any]:
    """`dynamic` with a fixed alpha is no scaling, with theta alpha^(d/(d-2)) as theta."""
    if p["rope_type"] != "dynamic" or not p.get("alpha"):
        return p
    dim = _dim(folder, p)
    theta = p["rope_theta"] * p["alpha"] ** (dim / (dim - 2))
    return {**p, "rope_type": "default", "rope_theta": theta}


def _served(folder: ModelFolder, p: dict[str, Any]) -> dict[str, Any]:
    """The parameters that the `get_rope` of vLLM and SGLang computes with."""
    if folder.dual_chunks:  # tested before the type: theta alone
        kept = {k: p[k] for k in ("rope_theta", "partial_rotary_factor") if k in p}
        return {**kept, "rope_type": "default"}
    if p["rope_type"] == "longrope":
        return _by_lengths(p)
    if p["rope_type"] == "yarn" and folder.latent_attention and p.get("factor"):
        log = 0.1 * math.log(max(p["factor"], 1.0))
        times = 1.0 + log * (1.0 if p.get("mscale") is None else p["mscale"])
        times *= p.get("attn_factor", 1.0) / (1.0 + log * (p.get("mscale_all_dim") or 0.0))
        return {**p, "mscale": None, "mscale_all_dim": None, "attention_factor": times}
    return _with_alpha(folder, p)  # whatever the family


def given_parameters(folder: ModelFolder) -> dict[str, Any]:
    """The dictionary that transformers 5 takes: the older one if there are both."""
    p = folder.raw.get("rope_scaling") or folder.raw.get("rope_parameters") or {}
    full = p.get("full_attention")
    return full if isinstance(full, dict) else p


def _parameters_4(folder: ModelFolder) -> tuple[dict[str, Any], str | None]:
    """(the same for transformers 4, why it fails)."""
    raw, known = folder.raw, folder.known.get("rope_parameters") or {}
    default = known.get("full_attention") or known
    scaling, error = raw.get("rope_scaling"), None
    if "rope_scaling" not in raw and default.get("rope_type", "default") != "default":
        keep = ("rope_theta", "partial_rotary_factor")
        scaling = {k: v for k, v in default.items() if k not in keep}  # the class's own, as gpt_oss
    p = dict(scaling or {})
    if scaling is not None and "type" not in p and "rope_type" not in p:
        error = "rope_scaling has no rope_type"
    name = p.get("type") or p.get("rope_type") or "default"
    theta_key = _spelled(folder, "rope_theta")
    theta = _THETA_4.get(folder.family, default.get("rope_theta") or 10000.0)
    p |= {"rope_type": name, "rope_theta": float(raw.get(theta_key) or theta)}
    p["partial_rotary_factor"] = _partial(folder, {})
    if folder.family in _PHI3 and scaling:
        p["rope_type"] = name = "longrope" if name in ("su", "yarn") else name
        if set(scaling) != {"type", "short_factor", "long_factor"}:
            error = f"{folder.family} takes type, short_factor and long_factor, and nothing else"
    top = top_length(folder)
    if name == "longrope" and top:
        p |= {"original_max_position_embeddings": top, "factor": folder.length / top}
    elif name == "longrope":
        p["original_max_position_embeddings"] = folder.length
        lacks = "longrope has no factor, and no original_max_position_embeddings at the top level"
        error = error or (None if p.get("factor") else lacks)
    if name == "llama3" and not p.get("original_max_position_embeddings"):
        error = "llama3 has no original_max_position_embeddings inside rope_scaling"
    if name in _NEEDED and "factor" in _NEEDED[name] and p.get("factor") is None:
        error = f"{name} has no factor"
    if name not in KNOWN_TYPES:
        error = error or f"rope_type {name!r} is unknown"
    if folder.family.startswith(_ALPHA):
        p = _with_alpha(folder, p)
    return p, error or _lacks(p) or _no_width(folder, p, "mistral")


def _reading(
    runtime: str,
    folder: ModelFolder,
    p: dict[str, Any],
    max_length: int | None,
    *,
    sliding: float | None = None,
    error: str | None = None,
) -> Reading:
    """The reading of parameters that a runtime uses unchanged."""
    name, theta = p["rope_type"], float(p["rope_theta"])
    plain = Reading(
        runtime=runtime,
        rope_type=name,
        rope_theta=theta,
        max_length=max_length,
        sliding_theta=sliding,
        error=error,
    )
    scaling = SCALINGS.get(name)
    if name in _OTHER_TYPES and not error:
        factor = float(p.get("factor") or 1.0) if runtime == T5 else 1.0  # which only it reads
        return dataclasses.replace(plain, factor=factor, inv_freq=_proportional(folder, p, factor))
    if error or scaling is None or not scaling.is_rope_type:
        return plain
    fields = {f.name for f in dataclasses.fields(scaling)} | {"rope_type"}
    fields |= set() if scaling.follows_length else {"original_max_position_embeddings"}
    chosen = {k: v for k, v in p.items() if k in fields and v is not None}
    try:
        scaling = from_rope_parameters(chosen, max_position_embeddings=folder.length)
        if isinstance(scaling, LongRoPE) and scaling.original_length >= folder.length:
            # no text is longer than L
            scaling = dataclasses.replace(scaling, long_factor=scaling.short_factor)
        inv_freq = scaling.inv_freq(theta, _dim(folder, p))
    except (SkipwiseError, ValueError) as failed:  # ValueError: an odd number of dimensions
        return dataclasses.replace(plain, error=f"{NOT_COMPUTED}, {str(failed).splitlines()[0]}")
    return dataclasses.replace(
        plain,
        factor=scaling.factor,
        original_length=getattr(scaling, "original_length", None),
        attention_factor=scaling.attention_factor,
        inv_freq=inv_freq,
    )


def _proportional(folder: ModelFolder, p: dict[str, Any], factor: float) -> np.ndarray:
    """(head_dim/2,) default RoPE of a full head, in which only the first pairs rotate.

    Source: transformers 5, `_compute_proportional_rope_parameters`; `Gemma4RotaryEmbedding` of vLLM
    and SGLang; llama.cpp conversion/gemma.py, which divides the other pairs by 1e30.
    """
    assert folder.head_dim is not None
    inv_freq = Unscaled().inv_freq(p["rope_theta"], folder.head_dim) / factor
    inv_freq[int(p.get("partial_rotary_factor", 1.0) * folder.head_dim // 2) :] = 0.0
    return inv_freq


def _vllm_length(folder: ModelFolder, p: dict[str, Any]) -> int:
    """`derive_max_model_len_and_key`, then `_get_and_verify_max_len`."""
    lengths = [folder.raw[k] for k in LENGTH_KEYS if folder.raw.get(k)]
    length = min([folder.length, *lengths])
    length = folder.raw.get("model_max_length") or length  # Command-R's key
    if p["rope_type"] == "longrope":
        return top_length(folder) or int(length)
    linear_is_multiplied = keeps_length(Linear, folder.family)
    if p["rope_type"] in _NOT_MULTIPLIED or not linear_is_multiplied:
        return int(length)
    return int(length * (p.get("factor") or 1.0))


def _sglang_length(folder: ModelFolder, p: dict[str, Any]) -> int:
    """`get_context_length`: one factor, unless the parameters name L or are per layer type. Its
    own class for olmo3 reads the older, flat key."""
    length = next((folder.raw[k] for k in SGLANG_LENGTH_KEYS if folder.raw.get(k)), folder.length)
    named = p.get("original_max_position_embeddings") or p["rope_type"] == "llama3"
    flat = not folder.nested or (folder.family == "olmo3" and folder.raw.get("rope_scaling"))
    return int(length * (p.get("factor") or 1.0) if flat and not named else length)


def _refused(folder: ModelFolder, p: dict[str, Any], *more: str) -> str | None:
    """Why a runtime refuses a config for its type; `more` are types that only this one knows."""
    name = p["rope_type"]
    if name in folder.known.get("refused_rope_types", ()):
        return f"the config of {folder.family} takes no rope_type {name!r}"
    if name not in (*KNOWN_TYPES, *_OTHER_TYPES, *more):
        return f"rope_type {name!r} is unknown"
    return _lacks(p)


def _bad_factor(p: dict[str, Any]) -> str | None:
    """vLLM and SGLang read the factor of linear as a list unless it is a float, and use a yarn
    factor of null in arithmetic."""
    if p["rope_type"] == "yarn" and p.get("factor") is None:
        return "yarn has no factor"
    if p["rope_type"] == "linear" and isinstance(p.get("factor"), int):
        return f"the factor of linear is {p['factor']}, and only {p['factor']}.0 is taken"
    return None


def _by_lengths(p: dict[str, Any]) -> dict[str, Any]:
    """longrope with its attention factor computed from max_position_embeddings and L."""
    return {k: v for k, v in p.items() if k not in ("factor", "attention_factor")}


def _lacks(p: dict[str, Any]) -> str | None:
    lacking = [key for key in _NEEDED.get(p["rope_type"], ()) if key not in p]
    return f"{p['rope_type']} has no {' and no '.join(lacking)}" if lacking else None


def top_length(folder: ModelFolder) -> int | None:
    """L outside the parameters of the config; Phi-3's class has a default."""
    given = folder.raw.get("original_max_position_embeddings")
    return given or (4096 if folder.family in _PHI3 else None)


def _partial(folder: ModelFolder, p: dict[str, Any]) -> float:
    """The fraction of a head that rotates."""
    default = folder.known.get("rope_parameters") or {}
    default = (default.get("full_attention") or default).get("partial_rotary_factor")
    stated = [d.get("partial_rotary_factor") for d in (p, folder.raw)]
    width = folder.raw.get("rotary_dim") if "rotary_dim" in folder.known.get("keys", {}) else None
    if width and folder.head_dim:  # MiniMax M2
        stated.append(width / folder.head_dim)
    values = (*stated, folder.raw.get("rotary_pct"), default, 1.0)
    return float(next(value for value in values if value is not None))


def _dim(folder: ModelFolder, p: dict[str, Any]) -> int:
    assert folder.head_dim is not None  # read_folder refuses such a folder
    return int(folder.head_dim * _partial(folder, p))


def _no_width(folder: ModelFolder, p: dict[str, Any], *more: str) -> str | None:
    """An error if head_dim is None, which three rotary functions use unchecked."""
    if folder.raw.get("head_dim"):
        return None
    needs = p["rope_type"] in ("yarn", "dynamic", "longrope")
    if folder.family in _NEVER_WITHOUT or (needs and folder.family in (*_NO_HEAD_DIM, *more)):
        return f"{p['rope_type']} needs head_dim in the config of {folder.family}"
    return None
