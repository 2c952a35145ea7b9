"""What a run checks of its own export: does every runtime load T tokens as they were trained?"""

from __future__ import annotations

from pathlib import Path

from skipwise.errors import Check, SkipwiseError
from skipwise.export.runtimes.readers import SGLANG, VLLM
from skipwise.export.runtimes.table import verify_folder
from skipwise.pose.rope import Scaling


def check_export(folder: Path, scaling: Scaling, target_length: int) -> Check:
    """Compare what runtimes load from an exported folder with the run that made it.

    It fails on what another config.json would avoid: a shorter window, a dropped scaling, other
    frequencies. What comes with the scaling itself or with the family (`Issue.inherent`: llama3
    outside Llama in llama.cpp, longrope, an attention factor) is in the detail of a check that
    passes: the user chose it, or has no other choice, and the other runtimes are right.
    """
    T = target_length
    L = round(T / scaling.factor) if scaling.keeps_length else None
    try:
        verdict = verify_folder(folder, L)
    except SkipwiseError as unread:
        reason = str(unread).splitlines()[0].replace(str(folder), "the model")
        return Check(name="runtimes", passed=True, detail=f"not compared: {reason}")
    wrong = [f"{issue.what}: {issue.fix}" for issue in verdict.issues if not issue.inherent]
    if verdict.window != T:
        stated = f"config.json states a window of {verdict.window:,} tokens, not {T:,}"
        wrong.append(f"{stated}: set max_position_embeddings to {T}")
    if wrong:
        return Check(name="runtimes", passed=False, detail="\n".join(wrong))
    told = [f"{issue.what}: {issue.fix}" for issue in verdict.issues]
    hit = {runtime for issue in verdict.issues for runtime in issue.runtimes}
    right = []
    for reading in verdict.readings:
        short = reading.runtime in (VLLM, SGLANG) and reading.max_length != T
        if not reading.error and reading.runtime not in hit and short:
            told.append(f"{reading.runtime} serves {reading.max_length:,} tokens by default")
        elif not reading.error and reading.runtime not in hit:
            right.append(reading.runtime)
    detail = f"{', '.join(right)} load {T:,} tokens with the trained frequencies"
    return Check(name="runtimes", passed=True, detail="; ".join([detail, *told]))
