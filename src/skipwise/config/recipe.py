"""The recipe: everything that decides a run, typed, with the paper's defaults.

A recipe is YAML in and out, every key has a default but `model`, `target_length` and
`data.sources`, and `key=value` overrides reach any of them: `training.num_steps=200`.

Source of the defaults: PoSE, Zhu et al. 2024, arXiv 2309.10400, section 4.1 (1,000 steps of 64
examples, lr 2e-5 after 10 warm-up steps, N = 2); YaRN is the scaling it takes to 128k.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from skipwise.config.lengths import format_length

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
    """The sampler of `method: pose`, and `key_weights`, which holds for cream as well.

    What auto becomes, and why, stands at `resolve_auto`.
    """

    num_chunks: int = 2
    chunk_lengths: Literal["random", "first-half"] = "random"
    skips: Literal["sequential", "sorted"] = "sequential"
    content: Literal["auto", "uniform", "contiguous", "aligned"] = "auto"
    unskipped_fraction: float = 0.0
    key_weights: Literal["auto", "none", "importance"] = "auto"


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
    micro_batch_size: int = 1  # examples a device holds at once
    learning_rate: float = 2e-5
    warmup_steps: int = 10
    lr_scheduler: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = True
    loss: Literal["auto", "full", "chunked"] = "auto"  # auto: chunked where logits are large
    save_steps: int = 100
    save_total_limit: int = 2


@dataclass(frozen=True, kw_only=True)
class DistillationSettings:
    """Learning from the base model on the first chunk of each example (distillation.py)."""

    weight: Literal["auto"] | float = "auto"  # w of KL(base || model) at each token; 0: none


@dataclass(frozen=True, kw_only=True)
class FullLengthSettings:
    """The last stage of training, at the target length and plain positions (stages.py)."""

    fraction: float = 0.0  # of training.num_steps x global_batch_size x L tokens; 0: none
    learning_rate: float | None = None  # default: training's / 3 (research/study); falls to 0


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    # perplexity, passkey, needle, ruler or one of its tasks, short-benchmarks, a task of lm-eval
    tasks: tuple[str, ...] = ("perplexity", "passkey", "needle", "ruler")
    context_lengths: tuple[int, ...] = ()  # none given: original length and its doublings to T
    perplexity_windows: int = 32  # of T tokens
    perplexity_stride: int | None = None  # none given: half the shortest length, at most 512
    passkey_samples: int = 50  # a length, spread over the depths
    needle_samples: int = 100  # a length, spread over the depths
    needles_per_haystack: int = 10  # asked one after the other; 1: the passkey's, in real text
    num_depths: int = 10
    ruler_samples: int = 20  # a task and length
    limit: int | None = None  # documents of a task of lm-eval; none given: all
    task_folder: str | None = None  # of tasks for lm-eval beside its own
    batch_tokens: int = 16384  # tokens a forward pass of the evaluation holds at once
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Which saved checkpoint becomes the model: the last one, or the best at a task."""

    checkpoint: Literal["last", "needle", "passkey", "perplexity"] = "last"


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
    attention_temperature: Literal["auto"] | float = "auto"
    load: ModelSettings = ModelSettings()
    lora: LoRASettings | None = None
    rope: RopeSettings = RopeSettings()
    positions: PositionSettings = PositionSettings()
    data: DataSettings = DataSettings()
    training: TrainingSettings = TrainingSettings()
    distillation: DistillationSettings = DistillationSettings()
    full_length: FullLengthSettings = FullLengthSettings()
    eval: EvalSettings = EvalSettings()
    export: ExportSettings = ExportSettings()
    trainer: dict[str, Any] = field(default_factory=dict)  # further TrainingArguments

    @property
    def run_name(self) -> str:
        return self.name or f"{Path(self.model).name}-{format_length(self.target_length)}"


def context_lengths(recipe: Recipe, original_length: int) -> tuple[int, ...]:
    """Where the evaluation looks: the original length and its doublings, up to the target."""
    if recipe.eval.context_lengths:
        return tuple(sorted(set(recipe.eval.context_lengths)))
    lengths = [original_length]
    while lengths[-1] * 2 < recipe.target_length:
        lengths.append(lengths[-1] * 2)
    return (*lengths, recipe.target_length)
