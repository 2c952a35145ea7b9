"""From a recipe to training data: sources, tokens, examples, held-out documents, their checks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from skipwise.config.machine import is_main_process
from skipwise.config.recipe import Recipe
from skipwise.config.run_folder import RunFolder, write_text
from skipwise.config.stages import first_stage
from skipwise.data.chat import spans_of
from skipwise.data.collator import ExampleCollator
from skipwise.data.corpus import Corpus, build_corpus
from skipwise.data.dataset import PoSEDataset
from skipwise.data.readers import Source, describe_left_out, parse_sources
from skipwise.data.token_cache import TokenStore
from skipwise.data.tokenize import tokenize_source
from skipwise.errors import Check, SkipwiseError
from skipwise.models.prepared import PreparedModel
from skipwise.pose.samplers import Sampler
from skipwise.preflight.batch import check_documents, check_labels
from skipwise.preflight.config import check_config
from skipwise.training.checkpoints import last_checkpoint, trained_checkpoint

_PROBE = 256  # tokens of a short probe


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Documents, and the examples that a sampler cuts from them."""

    corpus: Corpus
    sampler: Sampler
    dataset: PoSEDataset
    collator: ExampleCollator
    num_bad_records: int
    bad_records: list[str]
    digest: str  # hash of all tokens of the sources
    num_conversations: int = 0
    assistant_fraction: float = 0.0  # of the conversations' tokens
    num_special: int = 0  # control tokens that the text spells
    digests: dict[str, str] = field(default_factory=dict)  # of each source
    short: PoSEDataset | None = None  # examples to probe that are shorter, see `with_short_probe`

    def items(self, size: int) -> list[dict[str, Any]]:
        """The first examples of the run."""
        return [self.dataset[k] for k in range(min(size, len(self.dataset)))]

    @property
    def probe_length(self) -> int:
        """Tokens of `probe_batch`."""
        return (self.dataset if self.short is None else self.short).sampler.train_length

    def passes(self, size: int, recipe: Recipe) -> Iterator[tuple[dict[str, Any], float]]:
        """Batches of `size` examples like those of a step, and the share of its passes like each.

        With a teacher (training/distillation.py) the last examples of a step are not taught.
        """
        total, every = recipe.training.global_batch_size, recipe.distillation.every
        taught = max(size / total, 1 / every)
        shares = {0: taught, total - size: 1 - taught}
        if self.collator.base_length is None or taught == 1:
            shares = {0: 1.0}
        for first, share in shares.items():
            items = [self.dataset[k % len(self.dataset)] for k in range(first, first + size)]
            numbered = [{**item, "number": first + i} for i, item in enumerate(items)]
            yield self.collator(numbered), share

    def probe_batch(self) -> dict[str, Any]:
        """A batch of one example: among the first 16, the one with a cut closest to its middle."""

        def distance(item: dict[str, Any]) -> float:
            starts, lengths = item["example"].position_starts, item["example"].lengths
            cuts = np.cumsum(lengths)[:-1][np.diff(starts) != lengths[:-1]]
            return float(np.abs(cuts - len(item["labels"]) / 2).min()) if len(cuts) else np.inf

        items = self.items(16) if self.short is None else [self.short[k] for k in range(16)]
        return self.collator([{**min(items, key=distance), "number": 0}])  # 0 is always taught


def with_short_probe(data: TrainingData) -> TrainingData:
    """The data with a probe batch of at most 256 tokens, whose skips reach the target as before.

    It finds what a batch of train_length tokens finds: a mask, positions and windows that are wrong
    are so across any skip. On a CPU, a batch of 8k takes minutes.
    """
    settings: dict[str, Any] = dataclasses.asdict(data.sampler)  # type: ignore[call-overload]
    length = max(_PROBE, 4 * settings.get("num_chunks", 1))
    if length >= settings.get("train_length", 0):  # the full-length sampler has none: no skips
        return data
    sampler = type(data.sampler)(**{**settings, "train_length": length})
    short = PoSEDataset(data.corpus, sampler, seed=data.dataset.seed, num_examples=16)
    return dataclasses.replace(data, short=short)


def find_sources(recipe: Recipe) -> list[Source]:
    """The text sources of the recipe.

    Raises:
        SkipwiseError: the recipe names none, or one does not exist.
    """
    settings = recipe.data
    if recipe.method != "none" and not settings.sources:
        raise SkipwiseError("no text to train on: type --data FILE, FOLDER or hub name")
    if settings.held_out != "auto":
        if settings.eval_sources:
            raise SkipwiseError(
                "data.held_out has no effect with data.eval_sources: leave out one of them"
            )
        whole = float(settings.held_out).is_integer()
        if settings.held_out < 0 or (settings.held_out > 1 and not whole):
            given = f"data.held_out={settings.held_out}"
            raise SkipwiseError(f"{given}: give a number of documents, or a share such as 0.05")
    parse_sources(settings.eval_sources, settings.text_field)
    return parse_sources(settings.sources, settings.text_field)


def load_training_data(
    prepared: PreparedModel, run: RunFolder | None, progress: bool = True
) -> TrainingData:
    """Tokenize the sources, hold out documents, and build the data set.

    Args:
        run: gets the held-out documents, as `eval_documents.jsonl`.

    Raises:
        SkipwiseError: no sources, no readable text, no document long enough, or text that changed
            since the run started to train on it.
    """
    recipe = prepared.recipe
    settings = recipe.data
    sampler = prepared.sampler()
    sources = find_sources(recipe)
    on_bad_record, num_proc = settings.on_bad_record, settings.num_proc
    read = partial(tokenize_source, on_bad_record=on_bad_record, num_proc=num_proc)
    around = {"separator": prepared.separator, "special_tokens": settings.special_tokens}
    stores = [read(source, prepared.tokenizer, **around, progress=progress) for source in sources]
    found = [store.digest() for store in stores]
    digest = hashlib.sha256("".join(found).encode()).hexdigest()[:16]
    digests = {source.path: one for source, one in zip(sources, found, strict=True)}
    changed = False if run is None else text_changed(run, digest)
    if run is not None and changed and not trained_checkpoint(run, recipe):
        fix = "restore the old text, or type another --out to start again"
        before = run.metadata()["data"].get("digests", {})
        which = [path for path, one in digests.items() if before.get(path, one) != one]
        which = f": {', '.join(which)[:200]}" if which else ""
        raise SkipwiseError(
            f"the text has changed since {run.path} started to train on it{which}\n{fix}"
        )
    corpus = build_corpus(
        stores,
        [source.weight for source in sources],
        min_length=sampler.train_length,
        target_length=recipe.target_length,
        short_documents=settings.short_documents,
        between=prepared.separator.between,
        num_held_out=0 if settings.eval_sources else settings.held_out,
    )
    if run is not None and not settings.eval_sources and is_main_process() and not changed:
        _write_held_out(run, corpus, prepared.tokenizer)
    training = first_stage(recipe).training
    num_examples = training.num_steps * training.global_batch_size
    return TrainingData(
        corpus=corpus,
        sampler=sampler,
        dataset=PoSEDataset(corpus, sampler, seed=recipe.seed, num_examples=num_examples),
        collator=ExampleCollator(recipe.positions.key_weights),
        num_bad_records=sum(store.num_bad_records for store in stores),
        bad_records=[line for store in stores for line in store.bad_records][:5],
        digest=digest,
        digests=digests,
        num_conversations=sum(store.chat.num_conversations for store in stores),
        assistant_fraction=sum(store.chat.num_labels for store in stores)
        / max(1, sum(store.chat.num_tokens for store in stores)),
        num_special=sum(store.num_special for store in stores),
    )


def dummy_data(prepared: PreparedModel) -> TrainingData:
    """Examples of random token ids, to check a model without text."""
    recipe = prepared.recipe
    sampler = prepared.sampler()
    rng = np.random.default_rng(recipe.seed)
    size = min(prepared.info.vocab_size, len(prepared.tokenizer))
    tokens = rng.integers(0, size, recipe.target_length).astype(np.uint32)
    store = TokenStore(tokens=tokens, offsets=np.array([0, len(tokens)]))
    corpus = build_corpus([store], [None], min_length=1, target_length=recipe.target_length)
    return TrainingData(
        corpus=corpus,
        sampler=sampler,
        dataset=PoSEDataset(corpus, sampler, seed=recipe.seed, num_examples=16),
        collator=ExampleCollator(recipe.positions.key_weights),
        num_bad_records=0,
        bad_records=[],
        digest=store.digest(),
    )


def check_data(
    prepared: PreparedModel, data: TrainingData, held_out: list[np.ndarray]
) -> list[Check]:
    """The checks that need no model: lengths, documents, held-out text, labels."""
    corpus, T = data.corpus, prepared.recipe.target_length
    left_out = []
    if corpus.num_short:
        done = {"drop": "dropped", "pack": "packed"}
        what = done.get(corpus.short_documents, "dropped, or packed if conversations")
        left_out.append(f"{corpus.num_short:,} shorter ones {what}")
    if data.num_bad_records:
        left_out.append(f"{data.num_bad_records:,} unreadable records ({data.bad_records[0]})")
    L, count = data.sampler.train_length, corpus.num_documents
    checks = [
        *check_config(prepared.info, prepared.scaling, T, prepared.recipe),
        check_documents(corpus.longest, count, L, T, ", ".join(left_out)),
        *_check_files(prepared.recipe),
        _check_held_out(corpus, held_out, T, bool(prepared.recipe.data.eval_sources)),
        check_labels(data.items(16)),
        *([_check_chat(data)] if data.num_conversations else []),
    ]
    if data.num_special:
        detail = f"the text spells {data.num_special:,} special tokens, such as EOS, which are read"
        detail += " as those tokens; data.special_tokens=text reads them as text"
        checks.append(Check(name="special tokens", passed=True, detail=detail))
    return checks


def data_metadata(prepared: PreparedModel, data: TrainingData, num_eval: int) -> dict[str, Any]:
    """The entry of run.json about the data."""
    settings = prepared.recipe.data
    sources = settings.sources
    found = parse_sources((*sources, *settings.eval_sources))
    return {
        "hub_sources": [source.path for source in found if not source.is_local],
        "sources": [s["path"] if isinstance(s, dict) else str(s) for s in sources],
        "num_documents": data.corpus.num_documents,
        "num_tokens": data.corpus.num_tokens,
        "num_short": data.corpus.num_short,
        "short_documents": data.corpus.short_documents,
        "num_bad_records": data.num_bad_records,
        "bad_records": data.bad_records,
        "num_eval_documents": num_eval,
        "num_conversations": data.num_conversations,
        "digest": data.digest,
        "digests": data.digests,
    }


def text_changed(run: RunFolder, digest: str) -> bool:
    """Whether the run has checkpoints that were trained on other text."""
    begun = last_checkpoint(run) or last_checkpoint(run.finish)
    return begun is not None and run.metadata().get("data", {}).get("digest", digest) != digest


def _check_files(recipe: Recipe) -> list[Check]:
    """What is left out of the folders of the sources, if anything is."""
    settings = recipe.data
    detail = describe_left_out(parse_sources((*settings.sources, *settings.eval_sources)))
    return [Check(name="left out", passed=True, detail=detail)] if detail else []


def _check_held_out(
    corpus: Corpus, held_out: list[np.ndarray], target_length: int, is_given: bool
) -> Check:
    """Check that there is evaluation text, and that no document of it is trained on."""
    usable = sum(len(tokens) >= target_length for tokens in held_out)
    copies, alike, others = corpus.count_leaks(held_out) if held_out else (0, 0, 0)
    detail = f"{len(held_out)} held-out documents, {usable} of at least the target length"
    repeats = copies and not is_given and corpus.num_documents == 1  # its end is held out
    if repeats:
        detail += ", which repeats text that is trained on: set data.eval_sources=..."
    elif copies:
        detail = f"{copies} of its documents are also trained on: remove them from data.sources"
    elif not held_out:
        why = "data.eval_sources holds none" if is_given else corpus.none_held_out
        detail = f"perplexity is not measured: {why}: set data.eval_sources=..."
    elif not usable:
        detail += ": perplexity is not measured there"
    elif is_given and (alike or others):
        detail += f"; {alike} documents of data.sources share most of their text with one, and "
        detail += f"{others} a passage"
    return Check(
        name="evaluation text",
        passed=not copies or bool(repeats),
        detail=detail,
        is_warning=bool(repeats) or not (copies or usable) or bool(is_given and alike),
    )


def _check_chat(data: TrainingData) -> Check:
    share = data.assistant_fraction
    detail = f"{data.num_conversations:,} conversations, {share:.0%} of tokens are the assistant's"
    numbers = {"num_conversations": data.num_conversations, "assistant_fraction": share}
    return Check(name="chat", passed=True, detail=detail.replace("%", " %"), numbers=numbers)


def _write_held_out(run: RunFolder, corpus: Corpus, tokenizer: Any) -> None:
    decode = partial(tokenizer.decode, skip_special_tokens=True)  # for another tokenizer
    documents = [{"text": decode(x), "tokens": x.tolist()} for x in corpus.held_out]
    for document, tokens in zip(documents, corpus.held_out, strict=True):
        if spans := spans_of(tokens):
            document["masked"] = spans[0].tolist()
    lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
    write_text(run.eval_documents, "".join(lines))
