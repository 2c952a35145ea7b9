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
from typing import Annotated, Any, Literal

from skipwise.config.lengths import MAX_LENGTH, format_length
from skipwise.errors import SkipwiseError

SHARDED_ENGINES = ("fsdp2", "zero3", "zero3-offload")  # of `engine`: they split the model
MAX_SEED = 2**32 - 1  # numpy's limit


@dataclass(frozen=True)
class Range:
    """The numbers that a key accepts, as `Annotated` metadata; parse.py checks it at load."""

    low: float
    high: float
    excluded: tuple[float, ...] = ()  # an end that is not accepted itself
    hint: str = ""  # what to type instead

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and value not in self.excluded  # False for NaN

    def __str__(self) -> str:
        low, high = _number(self.low), _number(self.high)
        if not self.excluded:
            return f"{low} to {high}"
        low = f"above {low}" if self.low in self.excluded else f"at least {low}"
        return f"{low} and {'below' if self.high in self.excluded else 'at most'} {high}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,g}"


LENGTH = Range(1, MAX_LENGTH)
COUNT = Range(1, 100_000_000)
SEED = Range(0, MAX_SEED)
FRACTION = Range(0, 1)
RATE = Range(0, 1, excluded=(0,))
NOT_EMPTY = "not empty"  # a list has at least one entry
FILE_NAME = "one plain file name"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How the model is loaded. `model`, a folder, GGUF file or hub name, is a top-level key."""

    revision: str | None = None
    """Branch, tag or commit on the Hugging Face Hub. The default is its main branch."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the arithmetic. `auto` is bfloat16 where the hardware has it, else float32."""
    attn_implementation: (
        Literal["auto", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"]
        | str
    ) = "auto"
    """Attention kernel. `auto` trains importance weights with flex_attention on an NVIDIA GPU, and
    everything else with transformers' default, usually sdpa. A name with a slash is a kernel of the
    Hub, such as kernels-community/flash-attn2: code that runs only if the command line names it.
    Measured: docs/method.md."""
    use_safetensors: bool = True
    """`false` reads `.bin` weights instead of safetensors, with torch's `weights_only`."""
    text_only: bool = False
    """Extend only the text model of a multimodal model and drop its other components."""
    trust_remote_code: bool = False
    """Run Python code that the model brings with it. Read that code first."""
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential", "cpu"] | None = None
    """Passed to transformers in an evaluation; `auto` spreads the layers over all GPUs."""

    @property
    def is_hub_kernel(self) -> bool:
        """Whether the attention is a kernel of the Hub: code that is downloaded and run."""
        return "/" in self.attn_implementation

    @property
    def takes_mask(self) -> bool:
        """Whether the attention takes an additive mask; transformers gives kernels none."""
        return not (self.is_hub_kernel or self.attn_implementation.startswith("flash"))

    def of_own_folder(self) -> ModelSettings:
        """The same for a folder that Skipwise wrote: safetensors, no revision, one model."""
        return dataclasses.replace(self, use_safetensors=True, revision=None, text_only=False)


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """LoRA through peft; `lora: {}` turns it on. Norms and embeddings train as well."""

    rank: Annotated[int, Range(1, 65_536)] = 16
    """Rank of the adapter matrices. Measured: research/study."""
    alpha: Annotated[int, Range(1, 65_536)] = 32
    """LoRA's scaling numerator: the adapter's output is multiplied by alpha / rank."""
    dropout: Annotated[float, Range(0, 1, excluded=(1,))] = 0.0
    """Dropout probability on the adapter's input."""
    target_modules: tuple[str, ...] = ()
    """Names of the modules that get an adapter. The default is every linear layer but the head."""
    train_norms: bool = True
    """Also train the norm layers in full. LongLoRA (arXiv 2309.12307), section 3.3."""
    train_embeddings: bool = True
    """Also train the input embeddings in full. LongLoRA (arXiv 2309.12307), section 3.3."""
    quantization: Literal["none", "nf4"] = "none"
    """Precision of the frozen weights: `nf4` is QLoRA and needs the extra `qlora`."""


@dataclass(frozen=True, kw_only=True)
class PositionSettings:
    """The sampler of `method: pose`. `content` and `key_weights` apply to `cream` as well."""

    num_chunks: Annotated[int, Range(1, 65_536)] = 2
    """Number of chunks N that a training example is cut into. PoSE, section 4.1."""
    chunk_lengths: Literal["random", "first-half"] = "random"
    """`random` cuts anywhere; `first-half` cuts in the first half, as the authors' code does.
    Measured: research/study."""
    skips: Literal["sequential", "sorted"] = "sequential"
    """How skips are drawn: `sequential` is the paper's rule, `sorted` sorts uniform draws."""
    content: Literal["auto", "uniform", "contiguous", "aligned"] = "auto"
    """Which text a chunk shows; `aligned` is the text at its positions. `auto` is `aligned` for
    pose, `contiguous` for cream, `uniform` for other methods. Measured: research/study."""
    unskipped_fraction: Annotated[float, FRACTION] = 0.0
    """Fraction of the examples that keep positions 0 .. L-1. Measured: research/study."""
    key_weights: Literal["auto", "none", "importance"] = "auto"
    """`importance` weights each key by the positions that its chunk represents. `auto` is
    `importance` for pose with two or more chunks, unless FlashAttention is set; otherwise `none`.
    Measured: research/study."""


@dataclass(frozen=True, kw_only=True)
class RopeSettings:
    """The RoPE scaling, which is the same in training and in the exported model."""

    type: str = "auto"
    """RoPE scaling. For `auto`, `skipwise extend` measures yarn, llama3, ntk and linear on training
    documents before training and takes the best. Without long documents, and in `skipwise train`,
    `auto` is the first of yarn, longrope and ntk that the family supports. A model that is already
    scaled keeps its own type. Measured: research/study."""
    factor: Annotated[float | None, Range(1, 1_000_000)] = None
    """Scaling factor. The default is target_length / original_length."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the scaling as in a transformers config: beta_fast, low_freq_factor, ..."""


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """The keys of a source that is a mapping; `Source` in data/readers.py holds the values."""

    path: str
    text_field: str | None = None
    weight: Annotated[float | None, Range(0, 1_000_000_000)] = None
    max_tokens: Annotated[float | None, Range(1, 2**53)] = None
    split: str | None = None
    config: str | None = None
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The text to train on and to evaluate on."""

    sources: Annotated[tuple[Any, ...], SourceSettings] = ()
    """Files, folders, hub data sets, or mappings {path, weight, text_field, max_tokens, split}."""
    text_field: str = "text"
    """Column or JSON key that holds the text."""
    short_documents: Literal["auto", "drop", "pack"] = "auto"
    """Documents shorter than train_length are dropped, or packed into longer ones. `auto` packs
    conversations and drops others."""
    separator: Literal["auto", "bos", "eos", "eos-bos", "blank-line", "none"] = "auto"
    """What stands between documents: BOS before each, EOS after each, both, or a blank line between
    packed ones. `auto` measures on the base model which one it was trained with; `skipwise train`
    alone takes what the tokenizer adds and EOS. Details: docs/data.md."""
    special_tokens: Literal["control", "text"] = "control"
    """How text that spells a special token, such as `</s>`, is read: as that token, or as text."""
    on_bad_record: Literal["skip", "stop"] = "skip"
    """Skip records that cannot be read and report them, or stop at the first one."""
    num_proc: Annotated[int | None, Range(1, 1024)] = None
    """Tokenizer processes. The default is one per core for 256 MiB of text or more, else one."""
    eval_sources: Annotated[tuple[Any, ...], SourceSettings] = ()
    """Text for the evaluation. By default documents are held out of `sources`."""
    held_out: Annotated[Literal["auto"] | float, Range(0, 1_000_000, excluded=(0,))] = "auto"
    """Documents of target_length or more to hold out of `sources`: their number, or below 1 their
    share of all documents (of a single document, of its tokens). `auto` is 16, and at most a fifth
    of the documents."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Steps, batch and optimizer. Further arguments of transformers go into `trainer`."""

    num_steps: Annotated[int, Range(1, 100_000_000, hint="method=none trains nothing")] = 1000
    """Optimizer steps. PoSE, section 4.1."""
    global_batch_size: Annotated[int, Range(1, 1_000_000)] = 64
    """Examples per step, over all devices and accumulation steps. PoSE, section 4.1."""
    micro_batch_size: Annotated[Literal["auto"] | int, Range(1, 1_000_000)] = "auto"
    """Examples per device and forward pass; the rest of the batch is accumulated. `auto` is the
    fastest up to the largest that fits: timed before training, and kept by the run."""
    learning_rate: Annotated[float, RATE] = 2e-5
    """Peak learning rate. PoSE, section 4.1. LoRA takes a higher one: 1e-4 in the recipes."""
    warmup_steps: Annotated[int, Range(0, 100_000_000)] = 10
    """Steps of linear warm-up. PoSE, section 4.1."""
    lr_scheduler: str = "linear"
    """Name of a transformers learning rate schedule: linear, cosine, constant_with_warmup, ..."""
    weight_decay: Annotated[float, FRACTION] = 0.0
    """AdamW weight decay."""
    max_grad_norm: Annotated[float, Range(0, 1_000_000)] = 1.0
    """Gradients are clipped to this norm; 0 does not clip."""
    gradient_checkpointing: Literal["offload"] | bool = True
    """Recompute activations in the backward pass: less memory, about a third more arithmetic.
    `offload` also holds what is saved for it in the memory of the CPU: transformers 5.16."""
    loss: Literal["auto", "full", "chunked"] = "auto"
    """`chunked` never materializes the full logits tensor. `auto` is `chunked` where float32
    logits exceed 64 MiB, else `full`. Measured: docs/scaling.md."""
    max_cost: Annotated[float, Range(1, 1000)] = 1.25
    """Time that `train_length: auto` may take, as a multiple of the time at original_length."""
    save_steps: Annotated[int, COUNT] = 100
    """Steps between checkpoints."""
    save_total_limit: Annotated[int, Range(2, 1_000_000)] = 2
    """Newest checkpoints to keep."""


@dataclass(frozen=True, kw_only=True)
class DistillationSettings:
    """Self-distillation: the model learns from its base on the first chunk of each example."""

    weight: Annotated[Literal["auto"] | float, Range(0, 1000)] = "auto"
    """Weight w of KL(base || model) per token; 0 is off. `auto` is 3 for pose, and 0 for other
    methods, for examples of 2 L tokens or more, or where it is not possible, with the reason.
    Measured: research/study."""
    every: Annotated[int, Range(1, 1000)] = 1
    """One in this many examples learns from the base, with as many times the weight. 4 takes a
    sixth of the step's time off and costs 1 % of perplexity. Measured: docs/method.md."""


@dataclass(frozen=True, kw_only=True)
class FullLengthSettings:
    """An optional last stage of training at the target length, with positions that do not skip."""

    fraction: Annotated[float, Range(0, 1, excluded=(1,))] = 0.0
    """Fraction of the training tokens spent in this stage; 0 is off. Measured: research/study."""
    learning_rate: Annotated[float | None, RATE] = None
    """Peak learning rate of this stage. The default is a third of `training.learning_rate`."""


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """What is measured before and after training, and on how many samples."""

    tasks: Annotated[tuple[str, ...], NOT_EMPTY] = ("perplexity", "passkey", "needle", "ruler")
    """Tasks: these four, babilong, needle_nonliteral, copy_far, mrcr, graphwalks, icl, one task of
    a group, short-benchmarks, or any lm-eval task."""
    context_lengths: Annotated[tuple[int, ...], Range(16, MAX_LENGTH)] = ()
    """Lengths in tokens. The default is original_length, its doublings, and target_length."""
    untrained: bool = True
    """Measure the rescaled model before training too, to show what training added."""
    perplexity_windows: Annotated[int, Range(0, 1_000_000)] = 32
    """Windows of target_length tokens that perplexity is averaged over."""
    perplexity_stride: Annotated[int | None, LENGTH] = None
    """Target tokens per window. The default is half the shortest length, at most 512."""
    evaluator: str | None = None
    """Folder or hub name of the model that chooses LongPPL's key tokens, with the same tokenizer
    and a window of target_length. The default is the base in its own window: docs/evaluation.md."""
    passkey_samples: Annotated[int, Range(0, 100_000)] = 50
    """Passkey prompts per length, spread over the depths."""
    needle_samples: Annotated[int, Range(0, 100_000)] = 100
    """Needle questions per length, spread over the depths."""
    needles_per_haystack: Annotated[int, Range(1, 1000)] = 10
    """Needles in one haystack, asked one after the other; 1 hides a passkey in real text."""
    num_depths: Annotated[int, Range(1, 1000)] = 10
    """Depths at which passkeys and needles are placed."""
    ruler_samples: Annotated[int, Range(0, 100_000)] = 20
    """Prompts per RULER task and length."""
    samples: Annotated[int, Range(0, 100_000)] = 50
    """Prompts per length of every other task that Skipwise generates."""
    limit: Annotated[int | None, COUNT] = None
    """Documents per lm-eval task. The default is all of them."""
    task_folder: str | None = None
    """Folder with lm-eval tasks of your own, in YAML. By default there is none."""
    chat_template: Literal["auto"] | bool = "auto"
    """Ask passkey, needle, RULER and lm-eval questions through the model's chat template. `auto`
    does so in a run that trains on conversations."""
    batch_tokens: Annotated[int, LENGTH] = 16384
    """Tokens per forward pass of the evaluation."""
    seed: Annotated[int, SEED] = 0
    """Random seed of the evaluation's prompts."""


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What is exported after training."""

    checkpoint: Literal["last", "needle", "passkey", "perplexity", "area"] = "last"
    """The checkpoint to export: the last one, or the best at this task. `area` is the mean over the
    generated tasks of `eval.tasks` and the context lengths: docs/evaluation.md."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a run."""

    model: str
    """Folder, GGUF file or hub name of the model to extend."""
    target_length: Annotated[int, LENGTH]
    """Context length T to reach, in tokens: 32768 or 32k."""
    name: Annotated[str | None, FILE_NAME] = None
    """Name of the run and of its folder. The default is MODEL-TARGET, as in `my-model-32k`."""
    original_length: Annotated[int | None, LENGTH] = None
    """Length L that the model was trained for. The default is what its config says."""
    train_length: Annotated[Literal["auto"] | int | None, LENGTH] = None
    """Tokens M per training example, up to target_length. The default is original_length. `auto`
    takes, of the lengths in the table of `skipwise plan`, the one closest to full length that fits
    this machine, the documents and `training.max_cost`. Details: docs/method.md."""
    method: str = "pose"
    """How positions are chosen: PoSE, or a baseline. `none` rescales RoPE without training."""
    seed: Annotated[int, SEED] = 0
    """Random seed of training. Example k depends on the seed and on k alone."""
    engine: Literal["auto", "ddp", "fsdp2", "zero3", "zero3-offload"] = "auto"
    """How training is distributed. `auto` is what the launcher set up, else ddp on several GPUs."""
    attention_temperature: Annotated[Literal["auto"] | float, Range(0.1, 10)] = "auto"
    """Factor on every attention logit, folded into the exported weights; 1.0 is off. `auto`
    searches it after training for the lowest perplexity at target_length. Measured: research/study.
    """
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
    trainer: dict[str, Any] = field(default_factory=dict)
    """Further arguments of transformers' TrainingArguments, such as report_to."""

    @property
    def run_name(self) -> str:
        name = model_name(self.model).removesuffix(".gguf")
        return self.name or f"{name}-{format_length(self.target_length)}"


def model_name(model: str) -> str:
    """The last part of a path or hub name; of `.` and `..` the folder's own name."""
    path = Path(model).expanduser()
    return (path.resolve() if path.name in ("", "..") else path).name


def with_known_revision(recipe: Recipe, identity: dict[str, Any]) -> Recipe:
    """The recipe with the commit that its model's name led to when the run began."""
    revision = (identity.get("base") or {}).get("revision")
    load = dataclasses.replace(recipe.load, revision=revision or recipe.load.revision)
    return dataclasses.replace(recipe, load=load)


def context_lengths(recipe: Recipe, original_length: int) -> tuple[int, ...]:
    """Where the evaluation looks: the original length and its doublings, up to the target."""
    if recipe.eval.context_lengths:
        if (longest := max(recipe.eval.context_lengths)) > recipe.target_length:
            raise SkipwiseError(
                f"eval.context_lengths: {longest} is beyond target_length {recipe.target_length}\n"
                "leave it out; afterwards, skipwise eval RUN --lengths measures at any length"
            )
        return tuple(sorted(set(recipe.eval.context_lengths)))
    lengths = [original_length]
    while lengths[-1] * 2 < recipe.target_length:
        lengths.append(lengths[-1] * 2)
    return (*lengths, recipe.target_length)
