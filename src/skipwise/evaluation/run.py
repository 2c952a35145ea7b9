"""Evaluate any model: a folder, a hub name, or the model of a run; optionally with a baseline.

Results of a run go into its folder, those of a model into an evaluation folder of its own;
`skipwise report` reads both. A second evaluation measures only what is missing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from skipwise.config.machine import is_main_process, machine, versions, world_size
from skipwise.config.parse import parse_recipe, with_typed_kernel
from skipwise.config.recipe import (
    EvalSettings,
    ModelSettings,
    Recipe,
    context_lengths,
    with_known_revision,
)
from skipwise.config.run_folder import RunFolder, read_json, write_json
from skipwise.data.chat import ChatSpans, check_template
from skipwise.data.corpus import build_corpus
from skipwise.data.readers import describe_left_out, parse_sources
from skipwise.data.token_cache import TokenStore
from skipwise.data.tokenize import encode, tokenize_source, tokenizer_fingerprint
from skipwise.errors import SkipwiseError
from skipwise.evaluation import evaluator
from skipwise.evaluation.fingerprint import files_identity
from skipwise.evaluation.processes import of_main_process
from skipwise.evaluation.tasks.key_tokens import Evaluator, vocabulary
from skipwise.models.convert.gguf import local_source
from skipwise.models.hf_config import load_config
from skipwise.models.identity import base_identity, check_same_base
from skipwise.models.load import (
    build_without_weights,
    check_memory,
    compute_dtype,
    load_for_evaluation,
    load_tokenizer,
)
from skipwise.models.model_info import check_reach
from skipwise.models.separator import (
    Separator,
    find_separator,
    own_separator,
    separator_of,
    with_begin,
)
from skipwise.report.rows import RUN_MODELS, Rows

# keys of `data.` that decide how the text of a model as it is becomes tokens
_TEXT_KEYS = ("data.text_field", "data.separator", "data.special_tokens")
NO_PERPLEXITY = (
    "eval.evaluator does not take effect without perplexity, whose tokens it chooses\n"
    "add perplexity to eval.tasks, or leave it out"
)


def evaluate(
    model_or_run: str,
    *,
    lengths: list[int],
    tasks: list[str],
    data: list[str],
    overrides: list[str],
    baseline: str | None = None,
    out: str | Path | None = None,
    command: str = "skipwise eval",
) -> tuple[Rows, RunFolder]:
    """Tidy rows of a model, and of a baseline, and the folder that holds them.

    Args:
        model_or_run: model folder, hub name, or run folder (its exported model, lengths and text).
        lengths: context lengths. Defaults to the run's own.
        tasks: as `eval.tasks`. Defaults to the run's own, or to all of Skipwise's.
        data: text for perplexity and haystacks. Defaults to the run's own.
        baseline: a model to measure first, for comparison; `base` is the run's own base model.
        out: the evaluation folder of a model. Defaults to runs/eval-NAME. A run is its own.

    Raises:
        SkipwiseError: a run without a model, a model without lengths, an unknown task.
    """
    recipe, run, is_run = _recipe_and_folder(model_or_run, tasks, overrides, out)
    own_run = run if is_run else None
    evaluator.check_settings(recipe.eval)
    lengths = lengths or _own_lengths(recipe, own_run)
    if not lengths and any(t.lengths != "none" for t in evaluator.find_tasks(recipe.eval.tasks)):
        raise SkipwiseError("at which context lengths? type --lengths 4k..32k")
    labels = _labels(recipe, run, is_run, baseline)
    if is_run and baseline == "base":
        _check_base(recipe, run)
    eval_models = _eval_models(recipe, own_run, labels, lengths)  # before a folder is made
    settings = eval_settings(recipe, own_run)
    evaluator.check_tasks(evaluator.find_tasks(settings.tasks), settings, load=not run.results())
    for eval_model in eval_models if settings.chat_template is True else ():
        check_template(eval_model.tokenizer, f"eval.chat_template, {eval_model.label}")
    chooser = None
    if any(task.name == "perplexity" for task in evaluator.find_tasks(settings.tasks)):
        base = _base_of(recipe, run) if is_run and recipe.eval.evaluator is None else None
        chooser = make_evaluator(recipe, base, eval_models[-1].tokenizer, lengths, run)
    elif any(override.startswith("eval.evaluator=") for override in overrides):
        raise SkipwiseError(NO_PERPLEXITY)
    parse_sources(data, recipe.data.text_field)
    named = any(override.startswith("eval.tasks=") for override in overrides)
    asked = evaluator.find_tasks(settings.tasks if named else tasks)
    need_text = [task.name for task in asked if task.text == "required"]
    no_text = f"{' and '.join(need_text)} need text: type --data PATH"
    if not is_run:
        if need_text and not data:
            raise SkipwiseError(no_text)
        _open_evaluation(run, labels, baseline, command)
    longest = recipe  # conversations are joined up to its target length
    if own_run is None or data:
        longest = dataclasses.replace(recipe, target_length=max([1, *lengths]))
    rows: Rows = []
    with run.lock():
        for eval_model in eval_models:
            around = eval_model.separator
            documents = evaluation_documents(longest, eval_model.tokenizer, own_run, data, around)
            if need_text and not documents:
                raise SkipwiseError(no_text)
            texts, save = evaluator.Texts(documents=documents), run.write_results
            rows += evaluator.evaluate_model(
                eval_model,
                texts,
                lengths,
                settings,
                done=of_main_process(run.results()),
                save=save,
                evaluator=chooser,
            )
    if not rows:
        raise SkipwiseError(
            "nothing was measured: no prompt fits these lengths, and no document is that long\n"
            "type other --lengths, or --data with longer documents"
        )
    return rows, run


def _recipe_and_folder(
    model_or_run: str, tasks: list[str], overrides: list[str], out: str | Path | None
) -> tuple[Recipe, RunFolder, bool]:
    """The recipe of a run or of a model as it is, the results folder, and whether it is a run."""
    run = RunFolder(model_or_run)
    is_run = run.recipe_file.exists()
    if is_run:
        recipe = with_known_revision(run.recipe(), run.metadata().get("identity") or {})
        if not run.model.is_dir():
            trained = recipe.method == "none" or run.metadata().get("training")
            verb = "export" if trained else "extend"
            raise SkipwiseError(f"{run.path} has no model yet: type skipwise {verb} {run.path}")
        if out is not None:
            raise SkipwiseError(f"--out: the results of a run go into it, {run.path}")
        tree = dataclasses.asdict(recipe)
    else:
        tree = {"model": model_or_run, "target_length": 1}
        for key in (override.partition("=")[0] for override in overrides):
            if key.split(".")[0] not in ("eval", "load") and key not in _TEXT_KEYS:
                raise SkipwiseError(
                    f"{key} does not take effect on a model as it is: only eval. and load. keys do"
                    "\ntype skipwise extend to change a model, --data for text"
                )
        run = RunFolder(out or Path("runs") / f"eval-{_name(model_or_run).replace('/', '-')}")
    if tasks:
        tree["eval"] = {**tree.get("eval", {}), "tasks": tasks}
    return with_typed_kernel(parse_recipe(tree, overrides), overrides), run, is_run


def _check_base(recipe: Recipe, run: RunFolder) -> None:
    """SkipwiseError if the base is another model than the one that the run began with."""
    known = {} if run.converted.is_dir() else run.metadata().get("identity") or {}
    if "base" in known:
        now = base_identity(recipe.model, recipe.load.revision)
        check_same_base(recipe.model, known["base"], now, run.path, "leave --baseline out")


def _eval_models(
    recipe: Recipe, run: RunFolder | None, labels: dict[str, str], lengths: list[int]
) -> list[evaluator.EvalModel]:
    if recipe.load.device_map and world_size() > 1:
        raise SkipwiseError("each process has a whole model: leave load.device_map out")
    own_folders = (str(run.model), str(run.converted)) if run else ()
    load, load_own = recipe.load, recipe.load.of_own_folder()
    other = dataclasses.replace(load, revision=None) if run else load  # the commit is the base's
    chosen = run.metadata().get("separator") if run else None
    separator = separator_of(chosen) if chosen else recipe.data.separator
    known = (recipe.model, *own_folders) if run else labels.values()
    return [
        make_eval_model(
            label,
            model,
            load_own if model in own_folders else load if model == recipe.model else other,
            lengths,
            separator=separator if model in known else "auto",
        )
        for label, model in labels.items()
    ]


def make_eval_model(
    label: str,
    model: str,
    settings: ModelSettings,
    lengths: list[int],
    tokenizer: Any = None,
    separator: Separator | str = "auto",
) -> evaluator.EvalModel:
    """A model to measure with its own config, and with its own tokenizer unless one is given.

    Args:
        separator: the tokens around documents and before prompts, or a name of `data.separator`;
            `auto` is what the tokenizer adds.

    Raises:
        SkipwiseError: the config cannot be read, or has no positions for a length.
    """
    model = local_source(model)
    config = load_config(model, settings)
    check_reach(config.to_dict(), max(lengths, default=0))
    if settings.attn_implementation not in ("auto", "flex_attention"):
        build_without_weights(config, settings)
    dtype = compute_dtype(settings)
    check_memory(config, max(lengths, default=0), dtype)
    tokenizer = tokenizer or load_tokenizer(model, settings)
    if separator == "auto":
        separator = own_separator(tokenizer)
    elif isinstance(separator, str):
        separator = find_separator(separator, tokenizer, config)
    tokenizer = with_begin(tokenizer, separator.begin)
    weights = [
        files_identity(model),
        None,  # was the revision as typed: that of the same commit has the same results
        getattr(config, "_commit_hash", None) or settings.revision,  # of a hub model
        str(dtype),
        settings.attn_implementation,
    ]
    return evaluator.EvalModel(
        label=label,
        load=lambda: load_for_evaluation(model, config, settings, dtype=dtype),
        tokenizer=tokenizer,
        separator=separator,
        identity=[*weights, tokenizer_fingerprint(tokenizer), separator.begin],
        weights=weights,
    )


def make_evaluator(
    recipe: Recipe,
    base: evaluator.EvalModel | None,
    tokenizer: Any,
    lengths: Sequence[int],
    run: RunFolder | None = None,
) -> Evaluator | None:
    """What chooses LongPPL's key tokens: the model of `eval.evaluator`, or else the base.

    Args:
        base: of a run. None where there is none.
        tokenizer: of the model to measure.
        run: keeps what was chosen.

    Raises:
        SkipwiseError: the model named cannot be read, has another vocabulary or a shorter window.
    """
    named, found = recipe.eval.evaluator, base
    if named is not None:
        found = _named_evaluator(named, recipe, tokenizer, max(lengths, default=0))
    if found is None or not lengths:
        return None
    name = "the base"
    if named:
        name = "a local model" if Path(named).expanduser().exists() else named
    return Evaluator(
        name=name,
        load=found.load,
        weights=found.weights,
        vocabulary=vocabulary(found.tokenizer),
        original_length=run.metadata().get("original_length") if run else None,
        is_base=not named,
        chosen=of_main_process(read_json(run.key_tokens, {}) if run else {}),
        save=functools.partial(write_json, run.key_tokens) if run and is_main_process() else None,
    )


def _named_evaluator(
    name: str, recipe: Recipe, tokenizer: Any, longest: int
) -> evaluator.EvalModel:
    """Loaded like the model, but from its newest revision and never with code of its own."""
    settings = dataclasses.replace(recipe.load.of_own_folder(), trust_remote_code=False)
    fix = f"\nname a model of {Path(recipe.model).name}'s family, or leave eval.evaluator out"
    try:
        config = load_config(local_source(name), settings).get_text_config()
        window = getattr(config, "max_position_embeddings", None)
        if window and window < longest:
            raise SkipwiseError(f"it reads {window:,} tokens, and has to read {longest:,}{fix}")
        found = make_eval_model("evaluator", name, settings, [longest])
    except SkipwiseError as error:
        raise SkipwiseError(f"eval.evaluator: {name}: {error}") from error
    if vocabulary(found.tokenizer) != vocabulary(tokenizer):
        raise SkipwiseError(f"eval.evaluator: {name} has another vocabulary than the model{fix}")
    return found


def _base_of(recipe: Recipe, run: RunFolder) -> evaluator.EvalModel | None:
    """The base of a run, to choose key tokens; None, and said, where it is gone."""
    converted = run.converted.is_dir()
    model = str(run.converted) if converted else recipe.model
    settings = recipe.load.of_own_folder() if converted else recipe.load
    try:
        return make_eval_model("before", model, settings, [])
    except SkipwiseError as error:
        reason = str(error).partition("\n")[0]
        print(f"left out: LongPPL, which the base would choose ({reason})", file=sys.stderr)
        return None


def eval_settings(recipe: Recipe, run: RunFolder | None) -> EvalSettings:
    """The recipe's, with `chat_template: auto` decided by the text that the run trains on."""
    settings = recipe.eval
    if settings.chat_template != "auto":
        return settings
    data = {} if run is None else run.metadata().get("data", {})
    return dataclasses.replace(settings, chat_template=bool(data.get("num_conversations")))


def evaluation_documents(
    recipe: Recipe,
    tokenizer: Any,
    run: RunFolder | None,
    data: list[str] | None = None,
    separator: Separator | None = None,
) -> list[np.ndarray]:
    """Token ids of the documents to measure with: given, named by the recipe, or held out.

    Without training (`method: none`) these are all sources, except the text on which a temperature
    is searched.

    Args:
        separator: the tokens around each document. Defaults to those that the tokenizer adds.
    """
    settings = recipe.data
    sources = data or settings.eval_sources
    if sources:
        return _documents(sources, recipe, tokenizer, separator)
    if recipe.method == "none" and settings.sources:
        documents = _documents(settings.sources, recipe, tokenizer, separator)
        searched = recipe.attention_temperature == "auto"
        return _split_for_search(documents, recipe.target_length)[0] if searched else documents
    if run is None or not run.eval_documents.exists():
        return []
    lines = run.eval_documents.read_text(encoding="utf-8").splitlines()
    held_out = [json.loads(line) for line in lines]
    own = load_tokenizer(str(run.model), ModelSettings()) if run.model.is_dir() else tokenizer
    if tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(own):
        return [_held_out(document) for document in held_out]
    if any("masked" in document for document in held_out):
        raise SkipwiseError(
            f"the evaluation text of {run.path} is conversations, written by another chat template"
            "\ntype --data FILE with conversations, for the tokenizer to write them itself"
        )
    texts = [document["text"] for document in held_out]  # a baseline may have another tokenizer
    return [np.array(encode(tokenizer, text, separator), np.int64) for text in texts]


def _held_out(document: dict[str, Any]) -> np.ndarray:
    tokens = np.array(document["tokens"], np.int64)
    if "masked" not in document:
        return tokens
    return ChatSpans(masked=np.array(document["masked"])).attach(tokens, np.arange(len(tokens)))


def documents_for_search(
    recipe: Recipe, tokenizer: Any, separator: Separator | None = None
) -> list[np.ndarray]:
    """Token ids on which `method: none` searches a temperature, none of them evaluation text."""
    documents = _documents(recipe.data.sources, recipe, tokenizer, separator)
    if recipe.data.eval_sources:
        return documents
    return _split_for_search(documents, recipe.target_length)[1]


def _documents(
    sources: Any, recipe: Recipe, tokenizer: Any, separator: Separator | None
) -> list[np.ndarray]:
    settings = recipe.data
    options: dict[str, Any] = {
        "separator": separator,
        "special_tokens": settings.special_tokens,
        "on_bad_record": settings.on_bad_record,
    }
    parsed = parse_sources(sources, settings.text_field)
    stores = [tokenize_source(s, tokenizer, **options, progress=False) for s in parsed]
    bad = [record for store in stores for record in store.bad_records]
    count = sum(store.num_bad_records for store in stores)
    left_out = [describe_left_out(parsed)]
    left_out += [f"{count:,} unreadable records ({record})" for record in bad[:1]]
    if any(left_out):
        print(f"left out of the text: {', '.join(filter(None, left_out))}", file=sys.stderr)
    between, length = separator.between if separator else (), recipe.target_length
    return [document for store in stores for document in _joined(store, length, between)]


def _joined(store: TokenStore, length: int, between: tuple[int, ...]) -> list[np.ndarray]:
    """The documents of a store; conversations are joined to `length` tokens if there are enough."""
    if not store.chat or len(store.tokens) < length:
        return [store.document(i) for i in range(store.num_documents)]
    lengths: dict[str, int] = {"min_length": length, "target_length": length}
    corpus = build_corpus([store], [None], **lengths, short_documents="pack", between=between)
    return [corpus.document(0, i) for i in range(corpus.num_documents)]


def _split_for_search(
    documents: list[np.ndarray], length: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(for evaluation, for search): alternate long documents, or two halves of the only one."""
    long_indices = [i for i, tokens in enumerate(documents) if len(tokens) >= length]
    if len(long_indices) == 1 and len(documents[long_indices[0]]) >= 2 * length:
        document = documents[long_indices[0]]
        half = len(document) // 2
        return [
            *documents[: long_indices[0]],
            document[:half],
            *documents[long_indices[0] + 1 :],
        ], [document[half:]]
    taken = set(long_indices[1::2])
    kept = [tokens for i, tokens in enumerate(documents) if i not in taken]
    return kept, [documents[i] for i in sorted(taken)]


def _own_lengths(recipe: Recipe, run: RunFolder | None) -> list[int]:
    if run is None:
        return list(recipe.eval.context_lengths)
    original = run.metadata().get("original_length", recipe.target_length)
    return list(context_lengths(recipe, original))


def _labels(recipe: Recipe, run: RunFolder, is_run: bool, baseline: str | None) -> dict[str, str]:
    """Label -> model to measure, the baseline first."""
    if is_run:
        base = str(run.converted) if run.converted.is_dir() else recipe.model
        first: dict[str, str] = {}
        if baseline == "base":
            first = {"before": base}
        elif baseline:  # another model than the run's base
            name = _name(baseline)
            first = {baseline if name in RUN_MODELS else name: baseline}
        return {**first, "after": str(run.model)}
    if baseline == "base":
        raise SkipwiseError("which baseline? type --baseline MODEL (a run knows its own)")
    name, other = (_name(model) if model else "" for model in (recipe.model, baseline))
    if baseline and other == name:
        name, other = recipe.model, baseline
    return {**({other: baseline} if baseline else {}), name: recipe.model}


def _name(model: str) -> str:
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def _resolved(model: str) -> str:
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else model


def _open_evaluation(
    run: RunFolder, labels: dict[str, str], baseline: str | None, command: str
) -> None:
    """On rank 0, create the evaluation folder, or add to an existing one."""
    if not is_main_process():
        return
    metadata = run.metadata()
    if not metadata and run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
        raise SkipwiseError(f"{run.path} exists and holds something else: type another --out")
    if metadata and metadata.get("kind") != "evaluation":
        raise SkipwiseError(f"{run.path} is not an evaluation folder: type another --out")
    run.path.mkdir(parents=True, exist_ok=True)
    models = {label: {"name": model} for label, model in labels.items()}
    for label, model in models.items():
        known = metadata.get("models", {}).get(label, model)["name"]
        if _resolved(known) != _resolved(model["name"]):
            raise SkipwiseError(
                f"{run.path} holds results of another {label} ({known})\ntype another --out"
            )
    run.update(
        name=run.path.name,
        kind="evaluation",
        models={**metadata.get("models", {}), **models},
        baseline=next(iter(labels)) if baseline else metadata.get("baseline"),
        command=command,
        machine=machine(),
        versions=versions(),
    )
