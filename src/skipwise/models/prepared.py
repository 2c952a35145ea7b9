"""A recipe to a model that can be loaded: config, scaling, scaled config, tokenizer.

No weights are read before `convert_weights` or `load_scaled`.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from skipwise.config.distillation import distillation_weight
from skipwise.config.parse import parse_recipe
from skipwise.config.progress import Progress
from skipwise.config.recipe import ModelSettings, Recipe
from skipwise.config.samplers import make_sampler, resolve_auto
from skipwise.config.stages import first_stage, full_length_stage
from skipwise.models.attention.temperature import check_foldable
from skipwise.models.convert import conversion_for, convert_model, load_sentencepiece
from skipwise.models.convert.families import Conversion
from skipwise.models.convert.gguf import local_source
from skipwise.models.hf_config import config_of, is_local, model_info_of, read_config
from skipwise.models.load import attention_for, check_weights, load_model, load_tokenizer
from skipwise.models.model_info import ModelInfo
from skipwise.models.scaled_config import scaled_config, scaling_for
from skipwise.models.separator import Separator, find_separator, with_begin
from skipwise.pose.rope import Scaling
from skipwise.pose.samplers import EndPrompt, Sampler

END_PROMPT = "The text ends here. Keep all of it in mind, from its first line to its last."


@dataclass(frozen=True, kw_only=True)
class PreparedModel:
    """A model as a recipe will extend it, before any weights are loaded."""

    recipe: Recipe
    source: str  # folder or hub name of the weights: the recipe's model, or what it became
    conversion: Conversion | None  # see `convert_weights`
    raw: dict[str, Any]  # config.json of the recipe's model
    config: Any  # transformers config before rescaling
    scaled: Any  # transformers config after rescaling
    info: ModelInfo
    scaling: Scaling
    tokenizer: Any
    separator: Separator  # the recipe's; for `auto` the tokenizer's own, until one is measured

    @property
    def prompt_tokenizer(self) -> Any:
        """The tokenizer with which prompts begin as documents do."""
        return with_begin(self.tokenizer, self.separator.begin)

    def sampler(self) -> Sampler:
        """The recipe's sampler, with the tokens that it writes itself.

        Raises:
            SkipwiseError: see `make_sampler`.
        """
        found = make_sampler(self.recipe, self.info.original_length)
        if isinstance(found, EndPrompt):
            ids = self.tokenizer(END_PROMPT, add_special_tokens=False)["input_ids"]
            found = dataclasses.replace(found, prompt=tuple(ids))
        return found

    @property
    def load(self) -> ModelSettings:
        """How `source` is loaded."""
        settings = self.recipe.load
        return settings if self.source == self.recipe.model else settings.of_own_folder()


def prepare_model(recipe: Recipe) -> PreparedModel:
    """Read the config, choose the scaling, and build the scaled config.

    Mistakes in the recipe itself are found here, before anything is written.

    Raises:
        SkipwiseError: the model cannot be extended as asked.
    """
    source = local_source(recipe.model)
    raw = read_config(source, recipe.load)
    conversion = conversion_for(raw, recipe.load.text_only)
    if is_local(source):
        check_weights(Path(source).expanduser(), recipe.load)
    config = config_of(source, raw, recipe.load, conversion and conversion.config(raw))
    info = model_info_of(config, recipe.original_length, None if conversion else raw)
    recipe = _with_commit(resolve_auto(recipe), source, raw)
    scaling = scaling_for(recipe, info)
    first_stage(recipe)
    full_length_stage(recipe, info.original_length)
    if recipe.method != "none":
        make_sampler(recipe, info.original_length)
        attention_for(recipe.load, recipe.positions.key_weights, info.hybrid, config)
    scaled = scaled_config(config, info, scaling, recipe.target_length)
    router_loss = bool(getattr(config, "output_router_logits", False))
    distillation_weight(recipe, original_length=info.original_length, router_loss=router_loss)
    if recipe.attention_temperature not in ("auto", 1.0):
        check_foldable(scaled)
    in_code = conversion is not None and conversion.sentencepiece
    tokenizer = (load_sentencepiece if in_code else load_tokenizer)(source, recipe.load)
    return PreparedModel(
        recipe=recipe,
        source=source,
        conversion=conversion,
        raw=raw,
        config=config,
        scaled=scaled,
        info=info,
        scaling=scaling,
        tokenizer=tokenizer,
        separator=find_separator(recipe.data.separator, tokenizer, config),
    )


def _with_commit(recipe: Recipe, source: str, raw: dict[str, Any]) -> Recipe:
    """The recipe with the commit that a name of the Hub leads to now: all of it is from there."""
    commit = None if is_local(source) else raw.get("_commit_hash")
    load = dataclasses.replace(recipe.load, revision=commit or recipe.load.revision)
    return dataclasses.replace(recipe, load=load)


def rescale(prepared: PreparedModel, rope_type: str) -> PreparedModel:
    """The same model with another scaling; nothing is read again.

    Raises:
        SkipwiseError: the model does not take this scaling.
    """
    recipe = prepared.recipe
    recipe = dataclasses.replace(recipe, rope=dataclasses.replace(recipe.rope, type=rope_type))
    scaling = scaling_for(recipe, prepared.info)
    scaled = scaled_config(prepared.config, prepared.info, scaling, recipe.target_length)
    return dataclasses.replace(prepared, recipe=recipe, scaling=scaling, scaled=scaled)


def convert_weights(prepared: PreparedModel, folder: Path) -> PreparedModel:
    """The model with weights that transformers loads, converted into the folder where necessary.

    Raises:
        SkipwiseError: the weights cannot be converted.
    """
    recipe = prepared.recipe
    if prepared.conversion is None:
        return prepared
    if not folder.is_dir():
        with Progress("convert the weights", None):
            convert_model(recipe.model, prepared.raw, recipe.load, folder, prepared.tokenizer)
    tied = read_config(str(folder), recipe.load)["tie_word_embeddings"]
    for config in (prepared.config, prepared.scaled):
        config.tie_word_embeddings = tied
    info = dataclasses.replace(prepared.info, tied_embeddings=tied)
    return dataclasses.replace(prepared, source=str(folder), info=info)


def load_scaled(
    model: str, target_length: int, *, rope_type: str = "auto", dtype: Any = None
) -> tuple[Any, Any, ModelInfo]:
    """Load a model with its window rescaled to a target length, for your own training loop.

    Args:
        dtype: dtype of the weights. Defaults to float32.

    Returns:
        the model with its weights, its tokenizer, and its `ModelInfo` (`original_length` etc.).

    Raises:
        SkipwiseError: the model cannot be extended to this length or with this scaling.
    """
    tree = {"model": model, "target_length": target_length, "rope": {"type": rope_type}}
    prepared = prepare_model(parse_recipe(tree))
    with tempfile.TemporaryDirectory() as folder:
        prepared = convert_weights(prepared, Path(folder) / "converted")
        source, config, dtype = prepared.source, prepared.scaled, dtype or torch.float32
        loaded = load_model(source, config, prepared.load, dtype=dtype)
    return loaded, prepared.tokenizer, prepared.info
