"""What llama.cpp's converter cannot find out about a tokenizer itself."""

from __future__ import annotations

import json
from pathlib import Path

_REGEX = {  # of a Split in tokenizer.json, and llama.cpp's name for it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}


def text_ends(folder: Path) -> dict[str, bool]:
    """Whether the tokenizer puts BOS before a text, and EOS after it."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # of many kinds; the converter's own error says more
        return {}
    ids = tokenizer("a")["input_ids"]
    return {
        "add_bos_token": bool(ids) and ids[0] == tokenizer.bos_token_id,
        "add_eos_token": bool(ids) and ids[-1] == tokenizer.eos_token_id,
    }


def pre_tokenizer(folder: Path) -> str | None:
    """llama.cpp's name for the pre-tokenizer of this byte-level BPE. None if it has none.

    The converter recognises a tokenizer by a hash of its ids, so it does not know a newly trained
    tokenizer, however common its rules are.
    """
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    model, rules = tokenizer.get("model") or {}, tokenizer.get("pre_tokenizer") or {}
    steps = rules.get("pretokenizers", [rules])
    *before, last = steps
    if model.get("type") != "BPE" or tokenizer.get("normalizer") or last.get("type") != "ByteLevel":
        return None
    if last.get("add_prefix_space") or len(before) > 1:
        return None
    name = None
    if last.get("use_regex", True):
        digits = {"type": "Digits", "individual_digits": True}
        name = "smollm" if before == [digits] else None if before else "gpt-2"
    elif before and before[0].get("type") == "Split":
        split = before[0]
        if split.get("behavior") == "Isolated" and not split.get("invert"):
            name = _REGEX.get(split.get("pattern", {}).get("Regex", ""))
    whole_words = bool(model.get("ignore_merges"))  # words in the vocabulary stay unsplit
    return name if whole_words == (name == "llama-bpe") else None
