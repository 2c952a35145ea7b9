"""Faults of the files around the config: tokenizer, generation settings, adapters, weights."""

from __future__ import annotations

from collections.abc import Iterator

from skipwise.export.runtimes.folder_report import ALL, Case, Fault, describe
from skipwise.export.runtimes.readers import T4, T5


def find_file_faults(case: Case) -> Iterator[Fault]:
    for check in (_tokenizer, _generation, _adapter, _weights):
        yield from check(case)


def _tokenizer(case: Case) -> Iterator[Fault]:
    settings, tokens = case.folder.tokenizer, case.folder.tokenizer_length
    if settings is None:
        return
    if settings.get("tokenizer_class") == "TokenizersBackend":
        yield Fault(
            name="tokenizer class",
            runtimes=(T4,),
            what="tokenizer_class is TokenizersBackend, which transformers 4 does not have",
            mend='set tokenizer_class to "PreTrainedTokenizerFast" in tokenizer_config.json',
        )
    multiplied = case.rope_type in ("linear", "dynamic") and tokens == case.folder.length
    if tokens and tokens < case.window and not (multiplied and not case.original_length):
        yield Fault(
            name="tokenizer length",
            runtimes=(T5, T4),
            what=f"the tokenizer's model_max_length is {tokens:,} and the window {case.window:,}: "
            "it warns of longer text, and cuts it where truncation=True",
            mend=f"set model_max_length to {case.window} in tokenizer_config.json",
        )


def _generation(case: Case) -> Iterator[Fault]:
    settings = {"config.json": case.folder.raw, "generation_config.json": case.folder.generation}
    for file, values in settings.items():
        if values.get("use_cache") is False:
            yield Fault(
                name="use_cache",
                runtimes=(T5, T4),
                what=f"use_cache is false in {file}: each new token reads the whole prompt again",
                mend="set it to true",
            )
    limit = case.folder.generation.get("max_length")
    if isinstance(limit, int) and limit < case.window:
        yield Fault(
            name="generation length",
            runtimes=(T5, T4),
            what=f"max_length is {limit:,} in generation_config.json: generate stops there, prompt "
            "included, unless max_new_tokens is given",
            mend="take max_length out",
        )


def _adapter(case: Case) -> Iterator[Fault]:
    folder = case.folder
    if folder.base is None:
        return
    name = folder.base or "a base that is not named"
    if folder.own_config is not None and folder.raw == folder.own_config:
        known = "its config.json is not read for the model, and that of the base is not here"
    elif case.rope_type == "default" or folder.own_config is not None:
        known = f"there it is {describe(case.reference)}"
    else:
        return
    yield Fault(
        name="adapter",
        runtimes=ALL,
        what=f"this is an adapter, and an adapter carries no RoPE: what is loaded is that of "
        f"{name}, and {known}",
        mend="merge it (skipwise export, or peft's merge_and_unload) and hand that over, or load "
        "the base with config= of the scaled config.json",
    )


def _weights(case: Case) -> Iterator[Fault]:
    missing = case.folder.missing_weights
    if missing:
        yield Fault(
            name="weights",
            runtimes=ALL,
            what=f"the index names {len(missing)} files that are not here, the first {missing[0]}",
            mend="copy them into the folder",
        )
