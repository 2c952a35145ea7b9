"""Where runtimes would read a folder differently or wrongly, each with its fix.

Fix an issue before you share the folder. A note (in table.py) is only worth knowing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from skipwise.export.runtimes.file_issues import find_file_issues
from skipwise.export.runtimes.folder import ModelFolder
from skipwise.export.runtimes.folder_report import ALL, FolderReport, Issue, describe, names_length
from skipwise.export.runtimes.readers import (
    KNOWN_TYPES,
    LLAMA_CPP,
    LLAMA_CPP_WITHOUT_ROPE,
    NOT_COMPUTED,
    SGLANG,
    SGLANG_LENGTH_KEYS,
    T4,
    T5,
    VLLM,
    Reading,
    gguf_architecture,
    given_parameters,
    top_length,
)
from skipwise.models.compatibility import LENGTH_KEYS
from skipwise.models.hf_config import complete
from skipwise.pose.rope_config import with_legacy_rope_keys

_TO_GGUF = "convert it with skipwise export --to gguf, which writes what is missing"
_NAMES_L = ("yarn", "llama3", "longrope")  # types that count from original_max_position_embeddings


def find_issues(report: FolderReport) -> tuple[Issue, ...]:
    checks = (_type, _spellings, _original, _lengths, _attention, _portable, _dual_chunks, _window)
    found = [issue for check in checks for issue in check(report)]
    found += list(_unreadable(report, found))
    found += list(_unexplained(report, found))
    return (*found, *find_file_issues(report))


def _type(report: FolderReport) -> Iterator[Issue]:
    """Types that no version of transformers has, and two names that differ."""
    given, name = given_parameters(report.folder), report.rope_type
    if name == "ntk":
        fix = 'set rope_type to "default" and rope_theta to theta x factor^(d/(d-2))'
        factor, plain = report.parameters.get("factor"), report.readings[VLLM]
        if factor and plain.inv_freq is not None:
            dim = 2 * len(plain.inv_freq)
            theta = plain.rope_theta * factor ** (dim / (dim - 2))
            fix = f'set rope_type to "default" and rope_theta to {theta!r}, and remove factor'
        what = "only vLLM knows rope_type ntk, with its own formula; transformers and SGLang do "
        what += "not load it, and llama.cpp's converter drops it without a warning"
        yield Issue(name="rope_type", runtimes=ALL, what=what, fix=fix)
    if name == "su":
        what = "rope_type su is an older name of longrope, and only vLLM and Phi-3 know it"
        yield Issue(name="rope_type", runtimes=(T5, T4, SGLANG), what=what, fix='write "longrope"')
    both = given.get("type"), given.get("rope_type")
    if None not in both and both[0] != both[1] and both != ("su", "longrope"):
        what = f"type is {both[0]} and rope_type {both[1]} in one dictionary: transformers 5 "
        what += "takes rope_type, transformers 4 type, vLLM neither"
        fix = "make them equal, or remove type"
        yield Issue(name="rope_type", runtimes=(T4, VLLM), what=what, fix=fix)


def _spellings(report: FolderReport) -> Iterator[Issue]:
    """The older keys missing beside the newer ones, or different from them."""
    raw, four, reference = report.folder.raw, report.readings[T4], report.reference
    older = raw.get("rope_scaling") or {}
    newer = raw.get("rope_parameters") or {}
    newer = newer.get("full_attention") or newer
    theta_key = "rotary_emb_base" if report.folder.family.startswith("gpt_neox") else "rope_theta"
    top, inside = raw.get(theta_key), newer.get("rope_theta")
    if older and newer:
        keys = _differing(report.folder.family, older, newer)
        if keys:
            what = f"rope_scaling says {_describe(older, keys)}, rope_parameters says "
            what += f"{_describe(newer, keys)}: transformers, vLLM and SGLang take rope_scaling, "
            what += "llama.cpp's converter takes rope_parameters"
            fix = "delete the wrong one; if neither is right, write the scaling that the weights "
            fix += "were trained with under both names"
            yield Issue(name="two spellings", runtimes=ALL, what=what, fix=fix)
            return
    if top is not None and inside is not None and top != inside:
        what = f"{theta_key} is {top:,.0f} at the top level, which transformers 4 takes, and "
        what += f"{inside:,.0f} in rope_parameters; "
        what += f"transformers 5 takes {reference.rope_theta:,.0f}"
        fix = f"set both to the theta that the weights were trained with: the {theta_key} of "
        fix += "the base, changed only by ntk"
        yield Issue(name="two spellings", runtimes=(T4,), what=what, fix=fix)
    dropped = older and top is None and older.get("rope_theta") is None and inside is not None
    if dropped and inside != reference.rope_theta:
        what = f"rope_scaling has no {theta_key} beside it, so all runtimes but llama.cpp take "
        what += f"theta {reference.rope_theta:,.0f} and not the {inside:,.0f} of rope_parameters"
        fix = f'add "{theta_key}": {inside!r} beside rope_scaling'
        yield Issue(name="two spellings", runtimes=ALL, what=what, fix=fix)
        return
    if not newer or four.error or reference.error or four.same_rope(reference):
        return
    missing = ["rope_scaling"] if reference.rope_type != "default" and not older else []
    missing += [theta_key] if top is None and four.rope_theta != reference.rope_theta else []
    if not missing:
        return
    verb = "is" if len(missing) == 1 else "are"
    spelled = with_legacy_rope_keys({**raw, "rope_parameters": _completed(report)})
    keys = [*missing, "rope_local_base_freq"]
    added = {key: spelled[key] for key in keys if key in spelled and spelled[key] != raw.get(key)}
    added = {k: v for k, v in added.items() if v is not None}
    what = f"transformers 5 reads {describe(reference)}; transformers 4 reads {describe(four)}: "
    what += f"{' and '.join(missing)} {verb} missing beside rope_parameters"
    fix = "transformers 4 has no keys for it: serve this model with transformers 5"
    if added:
        fix = f"add to config.json {json.dumps(added)[1:-1]}"
    yield Issue(
        name="older spelling missing", runtimes=(T4,), what=what, fix=fix, inherent=not added
    )


def _completed(report: FolderReport) -> dict[str, Any]:
    """rope_parameters with the type and thetas that transformers 5 adds."""
    given = report.folder.raw["rope_parameters"]
    added = {key: report.parameters[key] for key in ("rope_type", "rope_theta")}
    if "full_attention" not in given:
        return {**{k: v for k, v in given.items() if k != "type"}, **added}
    sliding = {"rope_type": "default", **(given.get("sliding_attention") or {})}
    sliding["rope_theta"] = report.reference.sliding_theta
    return {"full_attention": {**given["full_attention"], **added}, "sliding_attention": sliding}


def _original(report: FolderReport) -> Iterator[Issue]:
    """original_max_position_embeddings missing, in the wrong place, or wrong."""
    folder, name = report.folder, report.rope_type
    given = given_parameters(folder)
    if name not in _NAMES_L or not given:
        return
    inside, top = given.get("original_max_position_embeddings"), top_length(folder)
    factor = report.parameters.get("factor") or 1.0
    if name == "longrope":
        if not folder.raw.get("original_max_position_embeddings") and top is None:
            what = "longrope has no original_max_position_embeddings at the top level, the only "
            what += f"place where transformers 4 looks: it counts from {folder.length:,}"
            fix = 'add "original_max_position_embeddings": '
            fix += f"{inside or report.original_length or 'L'} beside max_position_embeddings"
            yield Issue(name="original length", runtimes=(T4,), what=what, fix=fix)
    elif not inside:
        guess = report.original_length or top or round(folder.length / factor)
        four = "fails" if name == "llama3" else f"{folder.length:,}"
        cpp = "8,192" if name == "llama3" else "fails"
        what = f"{name} has no original_max_position_embeddings inside: transformers 5, vLLM and "
        what += f"SGLang count from {top or folder.length:,}, transformers 4: {four}, "
        what += f"llama.cpp: {f'{top:,}' if top else cpp}"
        fix = f'add "original_max_position_embeddings": {guess} to rope_parameters and '
        fix += "rope_scaling, if the weights were trained at that length"
        runtimes = (T4, LLAMA_CPP) if top else ALL
        yield Issue(name="original length", runtimes=runtimes, what=what, fix=fix)
    if inside and top and inside != top and "original_max_position_embeddings" in folder.raw:
        what = f"original_max_position_embeddings is {top:,} at the top level, where transformers"
        what += f" 5, vLLM and SGLang look first, and {inside:,} inside, where llama.cpp does, and "
        what += "transformers 4 for any type but longrope"
        fix = "make them equal"
        yield Issue(name="original length", runtimes=(T4, LLAMA_CPP), what=what, fix=fix)
    read = report.reference.original_length
    if report.original_length and read and read != report.original_length and inside:
        L = report.original_length
        what = f"the config counts from {read:,} tokens, and the model was trained at {L:,}"
        fix = f"set original_max_position_embeddings to {L}"
        yield Issue(name="original length", runtimes=ALL, what=what, fix=fix)


def _lengths(report: FolderReport) -> Iterator[Issue]:
    """Lengths that make a runtime serve more or less than the window."""
    folder, name, length = report.folder, report.rope_type, report.folder.length
    factor = report.parameters.get("factor") or 1.0
    named = names_length(folder) and report.parameters.get("factor")
    if name == "yarn" and named and length != report.window:
        beyond = f", and vLLM has no angles beyond {report.window:,}" * (length > report.window)
        what = f"yarn reaches {factor:g} x {report.window / factor:,.0f} = {report.window:,} "
        what += f"tokens and max_position_embeddings is {length:,}: vLLM and SGLang serve that many"
        what += f"{beyond}; transformers 4.51 to 4.55 compute another factor from it"
        fix = f"set max_position_embeddings to {report.window}"
        yield Issue(name="length", runtimes=(VLLM, SGLANG, LLAMA_CPP), what=what, fix=fix)
    if report.keeps_length:
        yield from _multiplied(report, factor)
    for runtime in (VLLM, SGLANG):
        reading, key = report.readings[runtime], _other_length(folder, runtime)
        if key and not reading.error and folder.raw[key] != length:
            what = f"{runtime} takes {key} {folder.raw[key]:,}, not max_position_embeddings "
            what += f"{length:,}, and serves {reading.max_length:,} tokens"
            fix = f"remove {key} from config.json"
            yield Issue(name="other length", runtimes=(runtime,), what=what, fix=fix)


def _multiplied(report: FolderReport, factor: float) -> Iterator[Issue]:
    length, name = report.folder.length, report.rope_type
    tokens = report.folder.tokenizer_length
    L = report.original_length
    if L and length != L:
        what = f"{name} needs the length before scaling, and max_position_embeddings is "
        what += f"{length:,}: vLLM and SGLang multiply it by {factor:g} and serve "
        what += f"{length * factor:,.0f} tokens"
        fix = f"set max_position_embeddings to {L}"
        yield Issue(name="length", runtimes=(VLLM, SGLANG), what=what, fix=fix)
    elif not L and factor > 1 and tokens == length:
        what = "max_position_embeddings and the tokenizer's model_max_length are both "
        what += f"{length:,}, and vLLM and SGLang multiply the first by {factor:g} ({name}): they "
        what += f"serve {length * factor:,.0f} tokens"
        fix = f"if {length:,} is the window with the scaling, set max_position_embeddings to "
        fix += f"{round(length / factor)}; if it is the one before scaling, set the tokenizer's "
        fix += f"model_max_length to {round(length * factor)}"
        yield Issue(name="length", runtimes=(VLLM, SGLANG), what=what, fix=fix)


def _attention(report: FolderReport) -> Iterator[Issue]:
    """Options of yarn that some runtimes do not read."""
    p, reference = report.parameters, report.reference
    if report.rope_type != "yarn" or reference.error:
        return
    A, readings = reference.attention_factor, report.readings.values()
    same = [r for r in readings if not r.error and r.rope_type == "yarn"]
    same = [r for r in same if r.factor == reference.factor]  # a difference of its own
    differing = [r for r in same if abs(r.attention_factor - A) > 1e-5]
    runtimes = tuple(r.runtime for r in differing)
    default = 0.1 * math.log(max(reference.factor, 1.0)) + 1.0
    explicit = p.get("attention_factor") is not None
    name = "attention_factor" if explicit else "mscale and mscale_all_dim"
    if differing and report.folder.latent_attention:
        have = ", ".join(f"{r.runtime} computes {r.attention_factor:.4f}" for r in differing)
        what = f"transformers makes it {A:.4f}; {have}"
        fix = "write mscale and mscale_all_dim as the model's base has them, without other factors"
        yield Issue(
            name="attention factor",
            runtimes=runtimes,
            what=what,
            fix=fix,
            inherent=not p.get("attn_factor"),  # which training ignores, so it can be removed
        )
    elif differing and abs(A - default) > 1e-5:
        key = f"{gguf_architecture(report.folder.family)}.rope.scaling.attn_factor"
        readers = "transformers and vLLM 0.33" if explicit else "transformers, vLLM and SGLang"
        what = f"{name} makes it {A:.4f} for {readers}; {', '.join(runtimes)} and vLLM up to 0.15 "
        what += f"compute {default:.4f}"
        fix = f"remove it if the weights were trained with {default:.4f}; if not, GGUF needs "
        fix += f"{key} = {A / default:.6f} (skipwise export --to gguf writes it)"
        fix += f", and SGLang attn_factor = {A / default:.6f}" if SGLANG in runtimes else ""
        yield Issue(name="attention factor", runtimes=runtimes, what=what, fix=fix, inherent=True)
    elif differing and p.get("attn_factor"):
        computed = differing[0].attention_factor
        what = f"only SGLang and vLLM up to 0.15 read attn_factor {p['attn_factor']:g} and "
        what += f"compute {computed:.4f}; the others compute {A:.4f}"
        fix = f'remove it; or, if the weights were trained with {computed:.4f}, add "attention_'
        fix += f'factor": {computed:.6g}, which transformers reads'
        yield Issue(name="attention factor", runtimes=runtimes, what=what, fix=fix)
    ramp = [key for key in ("truncate", "beta_fast", "beta_slow") if p.get(key) is not None]
    cpp = report.readings[LLAMA_CPP]
    if ramp and cpp.rope_type == "yarn" and not cpp.same_pairs(reference):
        what = f"{', '.join(f'{key} {p[key]}' for key in ramp)}: llama.cpp's yarn ramp goes "
        what += "from 32 rotations to 1, with its ends rounded to pairs"
        yield Issue(name="ramp", runtimes=(LLAMA_CPP,), what=what, fix=_TO_GGUF, inherent=True)


def _portable(report: FolderReport) -> Iterator[Issue]:
    """Types that mean something else in each runtime."""
    name, folder, cpp = report.rope_type, report.folder, report.readings[LLAMA_CPP]
    if name == "dynamic":
        what = "dynamic follows the longest position seen in transformers, stays unscaled in "
        what += "vLLM, is fixed at the full factor in SGLang, and is dropped by llama.cpp"
        fix = "extend with rope.type=yarn, or serve it with transformers"
        yield _inherent(VLLM, SGLANG, LLAMA_CPP, what=what, fix=fix)
    dropped = not cpp.error and cpp.rope_type == "default" and name != "default"
    if folder.family in LLAMA_CPP_WITHOUT_ROPE:
        if not cpp.same_rope(report.reference):
            what = f"llama.cpp's converter writes no RoPE for {folder.family}: it uses theta "
            what += f"10,000 without scaling, and the config has {describe(report.reference)}"
            fix = f"{_TO_GGUF}, or start llama.cpp with {_flags(report.reference)}"
            yield _inherent(LLAMA_CPP, what=what, fix=fix)
    elif dropped and name not in ("dynamic", "ntk", "su", "proportional"):
        what = f"llama.cpp's converter drops {name} for {folder.family} without a warning"
        fix = f"{_TO_GGUF} if it can, or extend with rope.type=yarn"
        yield _inherent(LLAMA_CPP, what=what, fix=fix)
    if name == "longrope":
        pair = report.readings[VLLM], report.readings[SGLANG]
        for r in (r for r in pair if not r.error and not r.same_rope(report.reference)):
            have, want = r.attention_factor, report.reference.attention_factor
            what = f"{r.runtime} takes longrope's attention factor from the lengths, {have:.4f}, "
            what += f"and transformers has {want:.4f}"
            fix = "leave attention_factor out and set factor to max_position_embeddings / "
            fix += "original_max_position_embeddings"
            yield _inherent(r.runtime, what=what, fix=fix)


def _inherent(*runtimes: str, what: str, fix: str) -> Issue:
    return Issue(name="not portable", runtimes=runtimes, what=what, fix=fix, inherent=True)


def _dual_chunks(report: FolderReport) -> Iterator[Issue]:
    """A key that vLLM and SGLang test before the scaling."""
    if report.folder.dual_chunks and not report.readings[VLLM].same_rope(report.reference):
        what = "vLLM and SGLang drop the scaling, because dual_chunk_attention_config is set: they "
        what += f"compute theta alone, and transformers {describe(report.reference)}"
        fix = "remove dual_chunk_attention_config from config.json"
        yield Issue(name="dual chunk attention", runtimes=(VLLM, SGLANG), what=what, fix=fix)


def _flags(reading: Reading) -> str:
    """llama.cpp's command-line flags in place of the keys of a GGUF file."""
    flags = f"--rope-freq-base {reading.rope_theta:.0f}"
    if reading.rope_type in ("linear", "yarn"):
        flags += f" --rope-scaling {reading.rope_type} --rope-scale {reading.factor:g}"
    if reading.rope_type == "yarn":
        flags += f" --yarn-orig-ctx {reading.original_length}"
    return flags


def _window(report: FolderReport) -> Iterator[Issue]:
    """A sliding window in every layer, shorter than the context."""
    folder = report.folder
    window = folder.value("sliding_window")
    known = "sliding_window" in folder.known or not folder.known
    if not window or not known or folder.value("use_sliding_window", True) is False:
        return
    raw = {k: v for k, v in folder.raw.items() if k != "auto_map"}
    layers = set(complete(raw).get("layer_types") or [])
    if layers and ("sliding_attention" not in layers or "full_attention" in layers):
        return
    if window < report.window:
        where = "" if "sliding_window" in folder.raw else " (the class's default)"
        what = f"sliding_window is {window:,}{where} in every layer, and the window "
        what += f"{report.window:,}: tokens further back are hidden"
        fix = 'set "sliding_window": null, if the weights were trained without it'
        yield Issue(name="sliding window", runtimes=(T5, T4, VLLM, SGLANG), what=what, fix=fix)


def _unreadable(report: FolderReport, found: list[Issue]) -> Iterator[Issue]:
    """Runtimes that fail for reasons that no check above has reported."""
    reported = {runtime for issue in found for runtime in issue.runtimes}
    reasons: dict[str, list[str]] = {}
    for reading in report.readings.values():
        if reading.error and reading.runtime not in reported and not is_new_family(reading):
            reasons.setdefault(reading.error, []).append(reading.runtime)
    for reason, runtimes in reasons.items():
        if reason.startswith("the factor of linear"):
            fix = f"write {report.parameters['factor']}.0"
        elif "head_dim" in reason:
            fix = f'add "head_dim": {report.folder.head_dim}'
        elif "unknown" in reason:
            fix = f"use a runtime that knows it, or write a known type: {', '.join(KNOWN_TYPES)}"
        elif "has no " in reason:
            fix = "add it, as the model's base or its authors have it"
        else:
            fix = "export the model again, or write the scaling that it was trained with"
        verb = "" if reason.startswith(NOT_COMPUTED) else " cannot load it"
        what = f"{', '.join(runtimes)}{verb}: {reason}"
        yield Issue(
            name="does not load",
            runtimes=tuple(runtimes),
            what=what,
            fix=fix,
            inherent="and nothing else" in reason,  # keys that its older class refuses
        )


def is_new_family(reading: Reading) -> bool:
    """A family that transformers 4 never had: nothing to fix."""
    return "is not in transformers 4" in (reading.error or "")


def _unexplained(report: FolderReport, found: list[Issue]) -> Iterator[Issue]:
    """Any other difference between runtimes."""
    reported = {runtime for issue in found for runtime in issue.runtimes}
    reference = report.reference
    for runtime, reading in report.readings.items():
        if runtime in reported or reading.error or reference.inv_freq is None:
            continue
        if not reading.same_rope(reference):
            what = f"{runtime} reads {describe(reading)}, transformers 5 {describe(reference)}"
            fix = f"write {describe(reference)} as rope_parameters, and also as rope_scaling and "
            fix += "rope_theta"
            yield Issue(name="other frequencies", runtimes=(runtime,), what=what, fix=fix)
        elif report.rope_type == "longrope":  # vLLM serves L by default: a note
            continue
        elif runtime in (VLLM, SGLANG) and reading.max_length != report.window:
            what = f"{runtime} serves {reading.max_length:,} tokens, "
            what += f"the window is {report.window:,}"
            yield Issue(name="length", runtimes=(runtime,), what=what, fix=_length_fix(report))


def _length_fix(report: FolderReport) -> str:
    """The max_position_embeddings that vLLM and SGLang make the window of."""
    served = [report.readings[runtime].max_length for runtime in (VLLM, SGLANG)]
    wanted = {round(report.folder.length * report.window / n) for n in served if n}
    if len(wanted) == 1:
        return f"set max_position_embeddings to {wanted.pop()}"
    return (
        "no max_position_embeddings is right for both vLLM and SGLang: extend with rope.type=yarn"
    )


def _differing(family: str, older: dict[str, Any], newer: dict[str, Any]) -> list[str]:
    """Keys in which the older and the newer dictionary differ."""
    moved = ("rope_theta", "partial_rotary_factor", "type", "rope_type")
    old = {k: v for k, v in older.items() if k not in moved and v is not None}
    new = {k: v for k, v in newer.items() if k not in moved and v is not None}
    fewer = ("phi3", "phi4_multimodal", "olmo", "olmo2")  # allowed in the older spelling
    keys = set(old) & set(new) if family in fewer else set(old) | set(new)
    names = [p.get("rope_type", p.get("type", "default")) for p in (older, newer)]
    differing = sorted(k for k in keys if old.get(k) != new.get(k))
    return (["rope_type"] if names[0] != names[1] else []) + differing


def _describe(p: dict[str, Any], keys: list[str]) -> str:
    """The type and the values of some keys."""
    name = p.get("rope_type", p.get("type", "default"))
    rest = [k for k in keys if k != "rope_type"]
    shown = [
        f"{k} {p[k] if not isinstance(p[k], list) else '[...]'}" if k in p else f"no {k}"
        for k in rest
    ]
    return " ".join([name, *([f"({', '.join(shown)})"] if shown else [])])


def _other_length(folder: ModelFolder, runtime: str) -> str | None:
    """The key that a runtime reads in place of max_position_embeddings."""
    if runtime == SGLANG:
        return next((k for k in SGLANG_LENGTH_KEYS if folder.raw.get(k)), None)
    found = [k for k in LENGTH_KEYS if folder.raw.get(k)]
    if "model_max_length" in found:
        return "model_max_length"
    shorter = [k for k in found if folder.raw[k] < folder.length]
    return min(shorter, key=lambda k: folder.raw[k]) if shorter else None
