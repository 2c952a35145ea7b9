"""A recipe to what training needs: facts, scaled config, tokens, examples, and their checks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skipwise.config.distillation import distillation_weight
from skipwise.config.recipe import ModelSettings, Recipe, make_sampler, parse_recipe, settled
from skipwise.config.run_folder import RunFolder, is_main_process, write_text
from skipwise.config.stages import finish_part, first_part
from skipwise.data.dataset import Corpus, PositionCollator, PositionDataset, build_corpus
from skipwise.data.readers import Source, parse_sources
from skipwise.data.tokenize import TokenStore, tokenize_source
from skipwise.errors import SkipwiseError
from skipwise.models.attention.temperature import check_foldable
from skipwise.models.convert import Conversion, conversion_for, convert_model, load_sentencepiece
from skipwise.models.hf_config import config_of, facts_of, is_local, read_config
from skipwise.models.load import attention_for, check_weights, load_model, load_tokenizer
from skipwise.models.model_info import ModelFacts
from skipwise.models.scaled_config import scaled_config, scaling_for
from skipwise.pose.rope import Scaling
from skipwise.pose.samplers import Sampler
from skipwise.preflight.config import Check, check_config
from skipwise.preflight.model import check_documents, check_labels
from skipwise.training.checkpoints import newest_checkpoint, trained_checkpoint

_NUM_HELD_OUT = 8  # documents kept for evaluation where the recipe names none


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """What a recipe makes of a model, before any weight is loaded."""

    recipe: Recipe
    source: str  # where the weights are: the recipe's model, or what it was converted to
    conversion: Conversion | None  # that `ready_weights` has to do, or has done
    raw: dict[str, Any]  # config.json of the recipe's model
    config: Any  # as it is
    scaled: Any  # as it will be
    facts: ModelFacts
    scaling: Scaling
    tokenizer: Any

    @property
    def load(self) -> ModelSettings:
        """How `source` is loaded."""
        settings = self.recipe.load
        return settings if self.source == self.recipe.model else settings.of_own_folder()


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    corpus: Corpus
    sampler: Sampler
    dataset: PositionDataset
    collator: PositionCollator
    num_bad_records: int
    bad_records: list[str]
    digest: str  # of the sources' tokens

    def items(self, size: int) -> list[dict[str, Any]]:
        """The first examples of the run."""
        return [self.dataset[k] for k in range(min(size, len(self.dataset)))]

    def telling_batch(self) -> dict[str, Any]:
        """One example of the run as a batch: of the first, the one cut nearest its middle."""

        def distance(item: dict[str, Any]) -> float:
            starts, lengths = item["example"].position_starts, item["example"].lengths
            cuts = np.cumsum(lengths)[:-1][np.diff(starts) != lengths[:-1]]
            return float(np.abs(cuts - len(item["labels"]) / 2).min()) if len(cuts) else np.inf

        return self.collator([min(self.items(16), key=distance)])


def plan_model(recipe: Recipe) -> ModelPlan:
    """Read the config, choose the scaling, and build the config to come.

    What can be wrong with the recipe itself is found here, before anything is written.

    Raises:
        SkipwiseError: the model cannot be extended as asked.
    """
    raw = read_config(recipe.model, recipe.load)
    conversion = conversion_for(raw, recipe.load.text_only)
    if is_local(recipe.model):
        check_weights(Path(recipe.model).expanduser(), recipe.load)
    config = config_of(recipe.model, raw, recipe.load, conversion and conversion.config(raw))
    facts = facts_of(config, recipe.original_length)
    recipe = settled(recipe)
    scaling = scaling_for(recipe, facts)
    first_part(recipe)
    finish_part(recipe, facts.original_length)
    if recipe.method != "none":
        make_sampler(recipe, facts.original_length)
        attention_for(recipe.load, recipe.positions.weights, facts.hybrid, config)
        if recipe.training.num_steps < 1:
            raise SkipwiseError(
                "training.num_steps is 0: type method=none to rescale without training"
            )
    scaled = scaled_config(config, facts, scaling, recipe.target_length)
    distillation_weight(recipe, router_loss=bool(getattr(config, "output_router_logits", False)))
    if recipe.temperature not in ("auto", 1.0):
        check_foldable(scaled)
    in_code = conversion is not None and conversion.sentencepiece
    return ModelPlan(
        recipe=recipe,
        source=recipe.model,
        conversion=conversion,
        raw=raw,
        config=config,
        scaled=scaled,
        facts=facts,
        scaling=scaling,
        tokenizer=(load_sentencepiece if in_code else load_tokenizer)(recipe.model, recipe.load),
    )


def ready_weights(plan: ModelPlan, folder: Path) -> ModelPlan:
    """The plan with weights that transformers loads: converted into the folder where they must be.

    Raises:
        SkipwiseError: the weights cannot be converted.
    """
    if plan.conversion is None:
        return plan
    if not folder.is_dir():
        convert_model(plan.recipe.model, plan.raw, plan.recipe.load, folder, plan.tokenizer)
    tied = read_config(str(folder), plan.recipe.load)["tie_word_embeddings"]
    for config in (plan.config, plan.scaled):
        config.tie_word_embeddings = tied
    facts = dataclasses.replace(plan.facts, tied_embeddings=tied)
    return dataclasses.replace(plan, source=str(folder), facts=facts)


def load_scaled(
    model: str, target_length: int, *, rope_type: str = "auto", dtype: Any = None
) -> tuple[Any, Any, ModelFacts]:
    """A model with its window rescaled to a target, for a training loop of one's own.

    Args:
        dtype: of the weights; None: float32.

    Returns:
        the model with its weights, its tokenizer, and its facts (`original_length` and others).

    Raises:
        SkipwiseError: the model cannot be extended so.
    """
    tree = {"model": model, "target_length": target_length, "rope": {"type": rope_type}}
    plan = plan_model(parse_recipe(tree))
    with tempfile.TemporaryDirectory() as folder:
        plan = ready_weights(plan, Path(folder) / "converted")
        settings = plan.load
        loaded = load_model(plan.source, plan.scaled, settings, dtype=dtype or torch.float32)
    return loaded, plan.tokenizer, plan.facts


def find_sources(recipe: Recipe) -> list[Source]:
    """The sources of the recipe's text.

    Raises:
        SkipwiseError: there are none, or one that does not exist.
    """
    settings = recipe.data
    if recipe.method != "none" and not settings.sources:
        raise SkipwiseError("no text to train on: type --data FILE, FOLDER or hub name")
    parse_sources(settings.eval_sources, settings.text_field)
    return parse_sources(settings.sources, settings.text_field)


def load_training_data(
    plan: ModelPlan, run: RunFolder | None, progress: bool = True
) -> TrainingData:
    """Tokenize the sources and make the data set; documents held out are written to the run folder.

    Raises:
        SkipwiseError: no sources, nothing readable, no document long enough.
    """
    recipe = plan.recipe
    settings = recipe.data
    sampler = make_sampler(recipe, plan.facts.original_length)
    sources = find_sources(recipe)
    stores = [
        tokenize_source(
            source,
            plan.tokenizer,
            on_bad_record=settings.on_bad_record,
            num_proc=settings.num_proc,
            progress=progress,
        )
        for source in sources
    ]
    digest = hashlib.sha256("".join(store.digest() for store in stores).encode()).hexdigest()[:16]
    changed = False if run is None else text_changed(run, digest)
    if run is not None and changed and not trained_checkpoint(run, recipe):
        raise SkipwiseError(
            f"the text has changed since {run.path} began to train on it\n"
            "put it back as it was, or type another --out to begin anew"
        )
    corpus = build_corpus(
        stores,
        [source.weight for source in sources],
        min_length=sampler.train_length,
        target_length=recipe.target_length,
        short_documents=settings.short_documents,
        separator=plan.tokenizer.eos_token_id,
        num_held_out=0 if settings.eval_sources else _NUM_HELD_OUT,
    )
    if run is not None and not settings.eval_sources and is_main_process() and not changed:
        _write_held_out(run, corpus, plan.tokenizer)
    training = first_part(recipe).training
    return TrainingData(
        corpus=corpus,
        sampler=sampler,
        dataset=PositionDataset(
            corpus,
            sampler,
            seed=recipe.seed,
            num_examples=training.num_steps * training.global_batch_size,
        ),
        collator=PositionCollator(recipe.positions.weights, later=True),
        num_bad_records=sum(store.num_bad_records for store in stores),
        bad_records=[line for store in stores for line in store.bad_records][:5],
        digest=digest,
    )


def stand_in_data(plan: ModelPlan) -> TrainingData:
    """Examples from random token ids, to check a model where no text is given."""
    recipe = plan.recipe
    sampler = make_sampler(recipe, plan.facts.original_length)
    rng = np.random.default_rng(recipe.seed)
    size = min(plan.facts.vocab_size, len(plan.tokenizer))
    tokens = rng.integers(0, size, recipe.target_length).astype(np.uint32)
    store = TokenStore(tokens=tokens, offsets=np.array([0, len(tokens)]))
    corpus = build_corpus([store], [None], min_length=1, target_length=recipe.target_length)
    return TrainingData(
        corpus=corpus,
        sampler=sampler,
        dataset=PositionDataset(corpus, sampler, seed=recipe.seed, num_examples=16),
        collator=PositionCollator(recipe.positions.weights, later=True),
        num_bad_records=0,
        bad_records=[],
        digest=store.digest(),
    )


def check_data(plan: ModelPlan, data: TrainingData, held_out: list[np.ndarray]) -> list[Check]:
    """The checks that need no model: lengths, documents, labels, evaluation kept apart."""
    items = data.items(16)
    corpus, T = data.corpus, plan.recipe.target_length
    left_out = []
    if corpus.num_short:
        done = "dropped" if corpus.short_documents == "drop" else "packed"
        left_out.append(f"{corpus.num_short:,} shorter ones {done}")
    if data.num_bad_records:
        left_out.append(f"{data.num_bad_records:,} records not readable ({data.bad_records[0]})")
    return [
        *check_config(plan.facts, plan.scaling, T),
        check_documents(
            corpus.longest,
            corpus.num_documents,
            data.sampler.train_length,
            T,
            ", ".join(left_out),
        ),
        _check_held_out(corpus, held_out, T),
        check_labels(items),
    ]


def data_facts(plan: ModelPlan, data: TrainingData, num_eval: int) -> dict[str, Any]:
    """What run.json says of the data."""
    sources = plan.recipe.data.sources
    return {
        "sources": [s["path"] if isinstance(s, dict) else str(s) for s in sources],
        "num_documents": data.corpus.num_documents,
        "num_tokens": data.corpus.num_tokens,
        "num_short": data.corpus.num_short,
        "short_documents": data.corpus.short_documents,
        "num_bad_records": data.num_bad_records,
        "bad_records": data.bad_records,
        "num_eval_documents": num_eval,
        "digest": data.digest,
    }


def text_changed(run: RunFolder, digest: str) -> bool:
    """Whether a run that has checkpoints was trained on other text so far."""
    begun = newest_checkpoint(run) or newest_checkpoint(run.finish)
    return begun is not None and run.facts().get("data", {}).get("digest", digest) != digest


def _check_held_out(corpus: Corpus, held_out: list[np.ndarray], target_length: int) -> Check:
    """No evaluation document is trained on, told by its first tokens."""
    name = "evaluation text"
    usable = sum(len(tokens) >= target_length for tokens in held_out)
    seen = corpus.count_copies(held_out)
    if seen:
        detail = f"{seen} of its documents are trained on as well: take them out of data.sources"
    elif not held_out:
        detail = "none long enough to hold out: perplexity is not measured (data.eval_sources=...)"
    else:
        detail = f"{len(held_out)} documents apart from training, {usable} of the full length"
    return Check(name=name, passed=not seen, detail=detail)


def _write_held_out(run: RunFolder, corpus: Corpus, tokenizer: Any) -> None:
    lines = [
        json.dumps(
            {"text": tokenizer.decode(tokens), "tokens": tokens.tolist()}, ensure_ascii=False
        )
        for tokens in corpus.held_out
    ]
    write_text(run.eval_documents, "".join(line + "\n" for line in lines))
