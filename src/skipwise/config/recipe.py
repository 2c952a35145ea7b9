"""The recipe: everything that decides a run, typed, with the paper's defaults.

A recipe is YAML in and out, every key has a default but `model`, `target_length` and
`data.sources`, and `key=value` overrides reach any of them: `training.num_steps=200`.

Source of the defaults: PoSE, Zhu et al. 2024, arXiv 2309.10400, section 4.1 (1,000 steps of 64
examples, lr 2e-5 after 10 warm-up steps, N = 2); YaRN is the scaling it takes to 128k.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from skipwise.errors import SkipwiseError
from skipwise.pose.samplers import CREAM, FullLength, PoSE, RandPos, Sampler

SHARDED_ENGINES = ("fsdp2", "zero3", "zero3-offload")  # of `engine`: they split the model


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How the model is loaded; `model` itself, a folder or a hub name, stands at the top."""

    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the arithmetic; auto: hardware
    attn_implementation: Literal[
        "auto", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"
    ] = "auto"
    use_safetensors: bool = True  # false: .bin, read with weights_only
    text_only: bool = False  # of a multimodal wrapper: extend its text model, leave the rest
    trust_remote_code: bool = False
    device_map: str | None = None  # of an evaluation: auto spreads the layers over the GPUs

    def of_own_folder(self) -> ModelSettings:
        """The same for a folder that Skipwise wrote: safetensors, no revision, one model."""
        return dataclasses.replace(self, use_safetensors=True, revision=None, text_only=False)


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """LoRA; norms and embeddings train as well, which LongLoRA (2309.12307) found necessary."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()  # none given: every linear layer but the head
    train_norms: bool = True
    train_embeddings: bool = True
    quantization: Literal["none", "nf4"] = "none"  # of the frozen weights: nf4 is QLoRA


@dataclass(frozen=True, kw_only=True)
class PositionSettings:
    """The sampler of `method: pose`, and `weights`, which holds for cream as well.

    What auto becomes, and why, stands at `settled`.
    """

    num_chunks: int = 2
    cut: Literal["random", "first-half"] = "random"
    gaps: Literal["sequential", "sorted"] = "sequential"
    content: Literal["auto", "uniform", "contiguous", "aligned"] = "auto"
    plain_fraction: float = 0.0
    weights: Literal["auto", "none", "importance"] = "auto"


@dataclass(frozen=True, kw_only=True)
class RopeSettings:
    """The scaling; `factor` follows from the lengths unless it is given.

    auto: yarn, longrope where the family takes nothing else, and the model's own scaling, carried
    on, where it has one.
    """

    type: Literal["auto", "linear", "ntk", "yarn", "llama3", "longrope", "dynamic"] = "auto"
    factor: float | None = None
    options: dict[str, Any] = field(default_factory=dict)  # beta_fast, low_freq_factor, ...


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    sources: tuple[Any, ...] = ()  # paths, hub names, or {path, weight, split, text_field, ...}
    text_field: str = "text"
    short_documents: Literal["drop", "pack"] = "drop"  # those under train_length
    on_bad_record: Literal["skip", "stop"] = "skip"
    num_proc: int | None = None  # tokenizer processes; none given: one a core for large texts
    eval_sources: tuple[Any, ...] = ()  # none given: a few documents are held out of `sources`


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    num_steps: int = 1000
    global_batch_size: int = 64  # examples a step, over all devices and accumulation
    batch_size: int = 1  # examples a device holds at once
    learning_rate: float = 2e-5
    warmup_steps: int = 10
    lr_scheduler: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = True
    loss: Literal["auto", "whole", "chunked"] = "auto"  # auto: chunked where logits are large
    # w of KL(base || model) at each token of a first chunk; auto: distillation.py; 0: none
    distillation: Literal["auto"] | float = "auto"
    save_steps: int = 100
    save_total_limit: int = 2


@dataclass(frozen=True, kw_only=True)
class FinishSettings:
    """The last share of the training tokens at full length, plain positions (phases.py)."""

    share: float = 0.0  # of training.num_steps x global_batch_size x L tokens; 0: none
    learning_rate: float | None = None  # none given: a third of training's (study.md); falls to 0


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    # perplexity, passkey, needle, ruler or one of its tasks, pose-table, a task of lm-eval
    tasks: tuple[str, ...] = ("perplexity", "passkey", "needle", "ruler")
    context_lengths: tuple[int, ...] = ()  # none given: original length and its doublings to T
    perplexity_windows: int = 32  # of T tokens
    perplexity_stride: int | None = None  # none given: half the shortest length, at most 512
    passkey_trials: int = 50  # a length, spread over the depths
    needle_trials: int = 100  # a length, spread over the depths
    needles_per_haystack: int = 10  # asked one after the other; 1: the passkey's, in real text
    num_depths: int = 10
    ruler_samples: int = 20  # a task and length
    limit: int | None = None  # documents of a task of lm-eval; none given: all
    task_folder: str | None = None  # of tasks for lm-eval beside its own
    batch_tokens: int = 16384  # tokens a forward pass of the evaluation holds at once
    seed: int = 0
    select: Literal["last", "needles", "passkey", "perplexity"] = "last"  # checkpoint to export


@dataclass(frozen=True, kw_only=True)
class Recipe:
    model: str
    target_length: int
    name: str | None = None  # of the run; none given: MODEL-TARGET
    original_length: int | None = None  # none given: what the model's config says
    train_length: int | None = None  # none given: original_length
    method: Literal["pose", "full", "randpos", "cream", "none"] = "pose"
    seed: int = 0
    # what spreads training over processes; auto: what the launcher set up, else ddp
    engine: Literal["auto", "ddp", "fsdp2", "zero3", "zero3-offload"] = "auto"
    # multiplies every attention logit, in the weights, after training; auto: searched at T
    temperature: Literal["auto"] | float = "auto"
    load: ModelSettings = ModelSettings()
    lora: LoRASettings | None = None
    rope: RopeSettings = RopeSettings()
    positions: PositionSettings = PositionSettings()
    data: DataSettings = DataSettings()
    training: TrainingSettings = TrainingSettings()
    finish: FinishSettings = FinishSettings()
    eval: EvalSettings = EvalSettings()
    trainer: dict[str, Any] = field(default_factory=dict)  # further TrainingArguments

    @property
    def run_name(self) -> str:
        return self.name or f"{Path(self.model).name}-{format_length(self.target_length)}"


def settled(recipe: Recipe) -> Recipe:
    """The recipe with the auto of `positions` decided, by its method.

    PoSE: text that stands where its positions say, and importance weights. docs/study.md has the
    measurements. The baselines are as published.
    """
    positions, pose = recipe.positions, recipe.method == "pose"
    if positions.content == "auto":
        content = {"pose": "aligned", "cream": "contiguous"}.get(recipe.method, "uniform")
        positions = dataclasses.replace(positions, content=content)
    if positions.weights == "auto":
        masked = recipe.load.attn_implementation not in ("flash_attention_2", "flash_attention_3")
        weighted = pose and masked and positions.num_chunks > 1
        weights = "importance" if weighted else "none"
        positions = dataclasses.replace(positions, weights=weights)
    return dataclasses.replace(recipe, positions=positions)


def make_sampler(recipe: Recipe, original_length: int) -> Sampler:
    """The position sampler that `method` names; `none` trains nothing and has none."""
    recipe = settled(recipe)
    L, T = recipe.train_length or original_length, recipe.target_length
    settings = recipe.positions
    if recipe.method != "pose":
        plain = settled(dataclasses.replace(recipe, positions=PositionSettings())).positions
        kept = {"weights": settings.weights}
        if recipe.method == "cream":
            kept["content"] = settings.content
        if settings != dataclasses.replace(plain, **kept):
            raise SkipwiseError(
                "positions: settings of the PoSE sampler do not take effect with method: "
                f"{recipe.method}\nremove them, or type method=pose"
            )
        if settings.weights != "none" and recipe.method != "cream":
            raise SkipwiseError(
                f"positions.weights: {settings.weights} needs chunks, and method: {recipe.method} "
                "has none"
            )
    match recipe.method:
        case "pose":
            values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(PoSE)[2:]}
            return PoSE(train_length=L, target_length=T, **values)
        case "full":
            return FullLength(target_length=T)
        case "randpos":
            return RandPos(train_length=L, target_length=T)
        case "cream":
            content = "aligned" if settings.content == "aligned" else "contiguous"
            return CREAM(train_length=L, target_length=T, content=content)
    raise SkipwiseError("method: none rescales RoPE and trains nothing: there are no positions")


def context_lengths(recipe: Recipe, original_length: int) -> tuple[int, ...]:
    """Where the evaluation looks: the original length and its doublings, up to the target."""
    if recipe.eval.context_lengths:
        return tuple(sorted(set(recipe.eval.context_lengths)))
    lengths = [original_length]
    while lengths[-1] * 2 < recipe.target_length:
        lengths.append(lengths[-1] * 2)
    return (*lengths, recipe.target_length)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """A recipe from YAML, with `key=value` overrides on top.

    Raises:
        SkipwiseError: unreadable YAML, an unknown key, a value of the wrong type.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        tree = yaml.safe_load(text)
    except OSError as error:
        raise SkipwiseError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise SkipwiseError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise SkipwiseError(f"{path} is not a recipe: it should map keys to values")
    return parse_recipe(tree, overrides)


def parse_recipe(tree: dict[str, Any], overrides: list[str] | None = None) -> Recipe:
    """A recipe from nested mappings, with `key=value` overrides on top."""
    tree = _copied(tree)
    for override in overrides or []:
        _override(tree, override)
    for key in ("model", "target_length"):
        if tree.get(key) is None:
            raise SkipwiseError(f"the recipe lacks {key}: type {key}=...")
    return _build(Recipe, tree, "")


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults written out, in the order of the fields."""
    return yaml.safe_dump(_plain(dataclasses.asdict(recipe)), sort_keys=False, width=100)


def parse_length(value: str | int) -> int:
    """Tokens from `32768`, `32_768`, `32k` or `1m`; k = 1,024, m = 1,024 x 1,024."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = str(value).strip().lower().replace(",", "").replace("_", "")
    scale = {"k": 1024, "m": 1024 * 1024}.get(text[-1:], 1)
    try:
        tokens = float(text[:-1] if scale > 1 else text) * scale
        if tokens == int(tokens) and tokens > 0:
            return int(tokens)
    except (ValueError, OverflowError):
        pass
    raise SkipwiseError(f"{value!r} is not a length in tokens: type 32768 or 32k")


def parse_lengths(text: str) -> list[int]:
    """`4k,8k,20k` as it says; `4k..32k` with every doubling between, and the end."""
    lengths: list[int] = []
    for part in text.split(","):
        first, dots, last = part.partition("..")
        length, end = parse_length(first), parse_length(last if dots else first)
        if end < length:
            raise SkipwiseError(f"{part!r}: the second length is below the first")
        while length < end:
            lengths.append(length)
            length *= 2
        lengths.append(end)
    return sorted(set(lengths))


def format_length(tokens: int) -> str:
    """`32k` for whole multiples of 1,024, else the number."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 and tokens >= 1024 else str(tokens)


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise SkipwiseError(
            f"{override!r} is not an override: type key=value, as training.num_steps=200"
        )
    *parents, last = key.split(".")
    at = tree
    for parent in parents:
        if at.get(parent) is None:
            at[parent] = {}
        at = at[parent]
        if not isinstance(at, dict):
            raise SkipwiseError(f"{key}: {parent} has no keys below it")
    try:
        at[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SkipwiseError(f"{override!r}: the value is not YAML") from error


def _build(cls: type, tree: Any, where: str) -> Any:
    """A dataclass from a mapping; unknown keys and wrong types are errors that name the key."""
    if not isinstance(tree, dict):
        raise SkipwiseError(f"{where or 'the recipe'} should map keys to values, not be {tree!r}")
    hints = typing.get_type_hints(cls)
    unknown = [key for key in tree if key not in hints]
    if unknown:
        keys = ", ".join(hints)
        inner = _places(Recipe, unknown[0])
        meant = f"\ndid you mean {' or '.join(inner)}?" if inner else ""
        name = _join(where, unknown[0])
        raise SkipwiseError(f"{name} is not a recipe key: choose from {keys}{meant}")
    values = {key: _value(hints[key], value, _join(where, key)) for key, value in tree.items()}
    return cls(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        if typing.get_origin(args[0]) is Literal:
            return _word_or_factor(args[0], value, where)
        return _value(next(a for a in args if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if hint is Any:
        return value
    if origin is Literal:
        value = "none" if value is None and "none" in args else value
        if value not in args:
            raise SkipwiseError(f"{where} is {value!r}: choose one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        items = list(value) if isinstance(value, list | tuple) else [value]
        name = where.removesuffix("s")
        return tuple(_value(args[0], item, name) for item in items)
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise SkipwiseError(f"{where} should map keys to values, not be {value!r}")
        return value
    return _scalar(hint, value, where)


def _word_or_factor(words: Any, value: Any, where: str) -> Any:
    """One of the words, or a number above 0."""
    choices = typing.get_args(words)
    if value in choices:
        return value
    try:
        number = _scalar(float, value, where)
    except SkipwiseError:
        number = math.nan
    off = number == 0 and where == "training.distillation"
    if not 0 < number < math.inf and not off:
        raise SkipwiseError(f"{where} is {value!r}: give {', '.join(choices)} or a number above 0")
    return number


def _scalar(hint: type, value: Any, where: str) -> Any:
    if hint is int and where.endswith("_length"):
        return parse_length(value)
    if hint is float and isinstance(value, str):  # YAML reads 2e-5 as a string
        try:
            value = float(value)
        except ValueError:
            value = str(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        raise SkipwiseError(f"{where} is {value!r}: give {names.get(hint, hint.__name__)}")
    if hint in (int, float) and value < 0:
        raise SkipwiseError(f"{where} is {value}: give 0 or more")
    return value


def _places(cls: Any, key: str, where: str = "") -> list[str]:
    """Where in the recipe a key of this name stands."""
    found = []
    for name, hint in typing.get_type_hints(cls).items():
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):
                found += _places(inner, key, _join(where, name))
        if name == key:
            found.append(_join(where, name))
    return found


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else str(key)


def _copied(tree: Any) -> Any:
    return {k: _copied(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
