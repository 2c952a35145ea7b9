"""`data.separator: auto`: measure on the base model which separator it was trained with.

The beginnings of some training documents are packed into windows, once with each separator that the
tokenizer has. The loss is that of the texts' own tokens, the same with every separator. The lowest
perplexity wins if it is at least 0.5 % below that of the tokenizer's own separator. Conversations
are not measured: the chat template writes what begins and ends them.

Shapes:  W = tokens of a window
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from typing import Any

import torch

from skipwise.config.machine import is_main_process
from skipwise.config.progress import Progress
from skipwise.config.run_folder import RunFolder
from skipwise.data.chat_records import Conversation
from skipwise.data.readers import BadRecords
from skipwise.data.shards import read_documents
from skipwise.data.tokenize import encode
from skipwise.errors import Check, SkipwiseError
from skipwise.evaluation.prefill import logits_in_slices
from skipwise.models.load import compute_dtype, free_memory, load_for_evaluation
from skipwise.models.prepared import PreparedModel
from skipwise.models.separator import Separator, candidates, describe, separator_of
from skipwise.pipeline.search import TOO_MUCH, fit_search
from skipwise.training.checkpoints import last_checkpoint
from skipwise.training.error_hints import is_out_of_memory
from skipwise.training.inputs import find_sources

_LEAST_GAIN = 0.005  # of the perplexity
_WINDOWS = 8
_LONGEST = 512  # most tokens of a window
_PER_WINDOW = 4  # least number of documents in a window
_AROUND = 4  # tokens of a window that are kept free for each separator
_MOST_READ = 10_000  # documents and conversations
_CHARACTERS = 16  # characters read for each token that is wanted
_TOO_HIGH = 700.0  # nats


def with_chosen_separator(prepared: PreparedModel, run: RunFolder) -> PreparedModel:
    """The model with the separator that this run chose before, if it did."""
    entry = run.metadata().get("separator")
    return dataclasses.replace(prepared, separator=separator_of(entry)) if entry else prepared


def choose_separator(
    prepared: PreparedModel, run: RunFolder, only_check: bool = False
) -> PreparedModel:
    """The model with a measured separator where `data.separator` is auto. Measured once in a run.

    A run that `skipwise train` has trained keeps the separator it was trained with: the tokenizer's
    own. That one is also the choice where there is nothing to measure on.

    Args:
        only_check: say what will be measured, unless it takes a few seconds only.
    """
    if "separator" not in run.metadata():
        run.update(separator=_choose(prepared, run, only_check))
    return with_chosen_separator(prepared, run)


def separator_check(run: RunFolder) -> list[Check]:
    """The preflight's line on the separator that this run chose."""
    entry = run.metadata().get("separator")
    if entry is None:
        return []
    numbers, detail = entry["perplexity"], entry["detail"]
    return [Check(name="separator", passed=True, detail=detail, numbers=numbers)]


def _choose(prepared: PreparedModel, run: RunFolder, only_check: bool = False) -> dict[str, Any]:
    """The entry of run.json: the tokens, the perplexity of each separator, one line of text."""
    why = ""
    found = candidates(prepared.tokenizer, prepared.config)
    width = min(prepared.info.original_length, _LONGEST)
    search = fit_search(prepared, [width], _WINDOWS, passes=len(found), quick=only_check)
    if prepared.recipe.data.separator != "auto":
        why = "as data.separator says"
    elif last_checkpoint(run) is not None:
        why = "not measured: training had started with it"
    elif only_check and len(found) > 1 and (search is None or not prepared.recipe.data.sources):
        names = ", ".join(_words(prepared, separator) for separator in found)
        why = f"auto: extend will measure {names} on its text"
    elif not prepared.recipe.data.sources:
        why = "not measured: there is no text"
    elif search is None:
        why = f"not measured: {TOO_MUCH}"
    measured: list[tuple[Separator, float]] = []
    try:
        with Progress("measure separators", None, shown=is_main_process()):
            measured = [] if why or search is None else _measure(prepared, search.num_windows)
    except Exception as error:  # no text that can be read, or out of memory
        if not isinstance(error, SkipwiseError) and not is_out_of_memory(error):
            raise
        why = "not measured: " + str(error).partition("\n")[0]
    finally:
        free_memory()
    chosen = prepared.separator
    if measured:
        own, lowest = measured[0], min(measured, key=lambda pair: pair[1])
        chosen, value = lowest if lowest[1] <= own[1] * (1 - _LEAST_GAIN) else own
        others = [f"{_words(prepared, s)} {p:.4g}" for s, p in measured if s != chosen]
        why = "; ".join([f"perplexity {value:.4g}", *([", ".join(others)] if others else [])])
    return {
        **dataclasses.asdict(chosen),
        "detail": f"{_words(prepared, chosen)} between documents, {why}",
        "perplexity": {_words(prepared, separator): value for separator, value in measured},
    }


def _words(prepared: PreparedModel, separator: Separator) -> str:
    return describe(separator, prepared.tokenizer)


def _measure(prepared: PreparedModel, num_windows: int) -> list[tuple[Separator, float]]:
    """The perplexity of the same texts with each separator, the tokenizer's own first."""
    windows = _windows(prepared, num_windows)
    dtype = compute_dtype(prepared.recipe.load)
    config = copy.deepcopy(prepared.config)  # loading changes it
    model = load_for_evaluation(prepared.source, config, prepared.load, dtype=dtype)
    size = model.get_input_embeddings().weight.shape[0]
    found = candidates(prepared.tokenizer, prepared.config, model.generation_config)
    found = [s for s in found if max((*s.begin, *s.end, *s.between, 0)) < size]
    return [(separator, _perplexity(model, windows, separator)) for separator in found]


def _windows(prepared: PreparedModel, num_windows: int) -> list[list[list[int]]]:
    """The beginnings of texts, as token ids, for each window.

    Raises:
        SkipwiseError: there is no text.
    """
    settings = prepared.recipe.data
    width = min(prepared.info.original_length, _LONGEST)
    longest = max(1, width // _PER_WINDOW - _AROUND)
    streams = [read_documents(s, BadRecords()) for s in find_sources(prepared.recipe)]
    windows: list[list[list[int]]] = []
    room = num_conversations = 0
    documents = itertools.chain.from_iterable(itertools.zip_longest(*streams, fillvalue=""))
    for text in itertools.islice(documents, _MOST_READ):
        if isinstance(text, Conversation):
            num_conversations += 1
            continue
        head = encode(
            prepared.tokenizer,
            text[: _CHARACTERS * longest],
            Separator(name="none"),
            settings.special_tokens,
        )[:longest]
        if not head:
            continue
        if room < len(head) + _AROUND:
            if len(windows) == num_windows:
                break
            windows.append([])
            room = width
        windows[-1].append(head)
        room -= len(head) + _AROUND
    if sum(map(len, windows)) < 2:
        if num_conversations:
            raise SkipwiseError("the chat template writes what begins and ends a conversation")
        raise SkipwiseError("there are not two documents")
    return windows


@torch.inference_mode()
def _perplexity(model: Any, windows: list[list[list[int]]], separator: Separator) -> float:
    """Perplexity of the texts' own tokens but each window's first, which may follow nothing."""
    total, count = 0.0, 0
    for heads in windows:
        ids: list[int] = []
        own: list[int] = []
        for head in heads:
            ids += separator.begin
            own += range(len(ids), len(ids) + len(head))
            ids += [*head, *separator.end, *separator.between]
        row, targets = torch.tensor(ids, device=model.device), torch.tensor(own[1:])
        for logits in logits_in_slices(model, row[None], targets - 1) if len(targets) else ():
            want = row[targets[: logits.shape[1]].to(row.device)].to(logits.device)
            loss = torch.nn.functional.cross_entropy(logits[0].float(), want, reduction="sum")
            total, count = total + float(loss), count + len(want)
            targets = targets[logits.shape[1] :]
    mean = total / max(1, count)
    return math.exp(min(mean, _TOO_HIGH) if math.isfinite(mean) else _TOO_HIGH)
