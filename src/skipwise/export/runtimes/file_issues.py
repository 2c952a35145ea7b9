"""Issues in the files around the config: tokenizer, generation settings, adapters, weights."""

from __future__ import annotations

from collections.abc import Iterator

from skipwise.export.runtimes.folder_report import ALL, FolderReport, Issue, describe
from skipwise.export.runtimes.readers import T4, T5


def find_file_issues(report: FolderReport) -> Iterator[Issue]:
    for check in (_tokenizer, _generation, _adapter, _weights):
        yield from check(report)


def _tokenizer(report: FolderReport) -> Iterator[Issue]:
    settings, tokens = report.folder.tokenizer, report.folder.tokenizer_length
    if settings is None:
        return
    if settings.get("tokenizer_class") == "TokenizersBackend":
        what = "tokenizer_class is TokenizersBackend, which transformers 4 does not have"
        fix = 'set tokenizer_class to "PreTrainedTokenizerFast" in tokenizer_config.json'
        yield Issue(name="tokenizer class", runtimes=(T4,), what=what, fix=fix)
    multiplied = report.keeps_length and tokens == report.folder.length
    if tokens and tokens < report.window and not (multiplied and not report.original_length):
        what = f"the tokenizer's model_max_length is {tokens:,} and the window "
        what += f"{report.window:,}: it warns about longer text, and cuts it with truncation=True"
        fix = f"set model_max_length to {report.window} in tokenizer_config.json"
        yield Issue(name="tokenizer length", runtimes=(T5, T4), what=what, fix=fix)


def _generation(report: FolderReport) -> Iterator[Issue]:
    folder = report.folder
    settings = {"config.json": folder.raw, "generation_config.json": folder.generation}
    for file, values in settings.items():
        if values.get("use_cache") is False:
            what = f"use_cache is false in {file}: each new token reads the whole prompt again"
            yield Issue(name="use_cache", runtimes=(T5, T4), what=what, fix="set it to true")
    limit = folder.generation.get("max_length")
    if isinstance(limit, int) and limit < report.window:
        what = f"max_length is {limit:,} in generation_config.json: generate stops there, prompt "
        what += "included, unless max_new_tokens is given"
        yield Issue(name="generation length", runtimes=(T5, T4), what=what, fix="remove max_length")


def _adapter(report: FolderReport) -> Iterator[Issue]:
    folder = report.folder
    if folder.base is None:
        return
    name = folder.base or "a base that is not named"
    if folder.own_config is not None and folder.raw == folder.own_config:
        known = "whose config is not on this machine; peft does not read this folder's config.json"
    elif report.rope_type == "default" or folder.own_config is not None:
        known = f"which is {describe(report.reference)}"
    else:
        return
    what = f"this is an adapter, which has no RoPE of its own: a runtime loads that of {name}, "
    what += known
    fix = "merge it (skipwise export, or peft's merge_and_unload) and share the merged model, or "
    fix += "load the base with config= of the scaled config.json"
    yield Issue(name="adapter", runtimes=ALL, what=what, fix=fix)


def _weights(report: FolderReport) -> Iterator[Issue]:
    missing = report.folder.missing_weights
    if missing:
        what = f"the index lists {len(missing)} files that the folder lacks, first {missing[0]}"
        yield Issue(name="weights", runtimes=ALL, what=what, fix="copy them into the folder")
