"""Passkey retrieval: five digits hidden at a depth of a long filler, asked for at the end.

Source: Mohtashami & Jaggi 2023, arXiv 2305.16300, section 4; the template is PoSE's.
"""

from __future__ import annotations

from collections.abc import Sequence

INTRO = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
QUERY = "What is the pass key? The pass key is"


def prompt(passkey: str, num_fillers: int, depth: float, filler: Sequence[str] = FILLER) -> str:
    """The question, ready for the answer to follow.

    Args:
        passkey: the digits to hide.
        num_fillers: filler sentences in all; the `filler` sentences repeat in turn.
        depth: share of them that stand before the needle, 0 .. 1.
    """
    before = round(depth * num_fillers)
    sentences = [filler[i % len(filler)] for i in range(num_fillers)]
    needle = f"The pass key is {passkey}. Remember it. {passkey} is the pass key."
    return "\n".join(
        [INTRO, " ".join(sentences[:before]), needle, " ".join(sentences[before:]), QUERY]
    )
