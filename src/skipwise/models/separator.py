"""The tokens around documents: how each begins and ends, and what joins packed ones.

A model knows the separator that it was trained with: BOS, EOS, both, or a blank line. Tokenizers
do not say which. Some add BOS or EOS to every text, some add neither, and the EOS of a chat model
is often another token than the one between the documents of its pretraining.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from skipwise.errors import SkipwiseError


@dataclass(frozen=True, kw_only=True)
class Separator:
    """The token ids around a document's text."""

    name: str  # as `data.separator`
    begin: tuple[int, ...] = ()  # before the text of each document and prompt
    end: tuple[int, ...] = ()  # after the text of each document
    between: tuple[int, ...] = ()  # only between documents that are packed

    def documents(self, texts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of documents and their lengths, of (n,) texts that follow each other.

        A beginning or end that a text has already is not added.
        """
        own = lengths
        for added, at_end in ((self.begin, False), (self.end, True)):
            places = np.cumsum(lengths) - (0 if at_end else lengths)
            first, lacks = places - len(added) * at_end, own < len(added)
            for i, token in enumerate(added):
                lacks[~lacks] = texts[first[~lacks] + i] != token
            tokens = np.tile(np.array(added, texts.dtype), lacks.sum())
            texts = np.insert(texts, np.repeat(places[lacks], len(added)), tokens)
            lengths = lengths + len(added) * lacks
        return texts, lengths


def added_tokens(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the tokenizer itself puts before and after every text."""
    full, bare = (
        tokenizer(["a"], add_special_tokens=special, verbose=False)["input_ids"][0]
        for special in (True, False)
    )
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start]), tuple(full[start + len(bare) :])
    return (), ()


def own_separator(tokenizer: Any) -> Separator:
    """Exactly what the tokenizer itself puts around every text."""
    begin, end = added_tokens(tokenizer)
    return Separator(name="auto", begin=begin, end=end)


def special_ids(tokenizer: Any) -> list[int]:
    """Ids of the control tokens; one for unknown text only is none."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    found = {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id}  # GPT-2 has one token for all three
    return sorted(found - ({tokenizer.unk_token_id} - ends))


def candidates(tokenizer: Any, *configs: Any) -> list[Separator]:
    """The separators that the model may know. The first is the tokenizer's own, and the default.

    Args:
        configs: config and generation config of the model, whose BOS and EOS may be other tokens.
    """
    before, after = added_tokens(tokenizer)
    begins, ends = [[ids] if ids else [] for ids in (before, after)]
    known = special_ids(tokenizer)
    for owner in (tokenizer, *configs):
        for ids, key in ((begins, "bos_token_id"), (ends, "eos_token_id")):
            value = getattr(owner, key, None)
            for i in value if isinstance(value, list | tuple) else [value]:
                if i in known and (i,) not in ids:
                    ids.append((i,))
    begin = begins[0] if begins else ()
    found = [Separator(name="bos", begin=begin)] if begin else []
    found += [Separator(name="eos", end=end) for end in ends]
    if begin:
        found += [Separator(name="eos-bos", begin=begin, end=e) for e in ends if e != begin]
    blank = _blank_line(tokenizer)
    found += [Separator(name="blank-line", between=blank)] if blank else []
    own = "eos-bos" if before else "eos"
    if own not in {separator.name for separator in found}:
        own = "bos" if before else "none"
    found += [Separator(name="none")] if own == "none" else []
    return sorted(found, key=lambda separator: separator.name != own)


def find_separator(name: str, tokenizer: Any, *configs: Any) -> Separator:
    """The separator that `data.separator` names; for `auto` the tokenizer's own.

    Raises:
        SkipwiseError: the tokenizer has no such token.
    """
    found = candidates(tokenizer, *configs)
    if name == "auto":
        return found[0]
    if name == "none":
        return Separator(name="none")
    for separator in found:
        if separator.name == name:
            return separator
    names = ", ".join(dict.fromkeys(s.name for s in found if s.name != "none"))
    raise SkipwiseError(
        f"data.separator: {name}: the tokenizer has no such tokens\n"
        f"choose from auto, {names + ', ' if names else ''}none"
    )


def with_begin(tokenizer: Any, begin: tuple[int, ...]) -> Any:
    """The tokenizer, or a copy, that puts exactly these ids before a text and none after it."""
    from tokenizers.processors import TemplateProcessing

    if added_tokens(tokenizer) == (begin, ()):
        return tokenizer
    made = copy.deepcopy(tokenizer)
    backend = getattr(made, "backend_tokenizer", None)
    if backend is None:
        made.build_inputs_with_special_tokens = lambda ids, pair=None: [*begin, *ids]
        return made
    token: Any = {"id": "begin", "ids": begin, "tokens": made.convert_ids_to_tokens(list(begin))}
    template = {"single": ["begin", "$A"], "special_tokens": [token]} if begin else {"single": "$A"}
    backend.post_processor = TemplateProcessing(**template)
    return made


def describe(separator: Separator, tokenizer: Any) -> str:
    """BOS, EOS, EOS+BOS, a blank line; another EOS than the tokenizer's with its text."""
    words = {"eos-bos": "EOS+BOS", "blank-line": "a blank line", "none": "nothing"}
    name = words.get(separator.name, separator.name.upper())
    if separator.end and separator.end != (tokenizer.eos_token_id,):
        name += f" ({''.join(tokenizer.convert_ids_to_tokens(list(separator.end)))})"
    return name


def _blank_line(tokenizer: Any) -> tuple[int, ...]:
    """The ids of two line ends after a text; none if the tokenizer cannot say them."""
    texts = ["a", "a\n\n", "\n\n"]
    options: Any = {"add_special_tokens": False, "verbose": False}
    before, both, alone = tokenizer(texts, **options)["input_ids"]
    ids = both[len(before) :] if both[: len(before)] == before else alone
    return tuple(ids) if ids and tokenizer.decode(ids).strip(" ") == "\n\n" else ()


def separator_of(entry: dict[str, Any]) -> Separator:
    """The separator of an entry in run.json."""
    ids = {key: tuple(entry[key]) for key in ("begin", "end", "between")}
    return Separator(name=entry["name"], **ids)
