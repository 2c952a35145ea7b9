"""The parts of a recipe that decide memory and time: lengths, dtypes, engine, trainable weights."""

from __future__ import annotations

import dataclasses
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from skipwise.config.batch import SLICE, accumulation, is_chunked, micro_batch
from skipwise.config.distillation import distillation_weight
from skipwise.config.recipe import LoRASettings, Recipe
from skipwise.config.samplers import make_sampler, resolve_auto
from skipwise.config.stages import first_stage, full_length_stage
from skipwise.models.convert import conversion_for
from skipwise.models.convert.gguf import local_source
from skipwise.models.hf_config import complete, is_local, read_config
from skipwise.models.model_info import ModelInfo, read_model_info
from skipwise.models.scaled_config import scaling_for
from skipwise.planning.architecture import Architecture, Matrix, read_architecture
from skipwise.planning.gpus import Gpu
from skipwise.pose.samplers import Sampler

# Bytes of optimizer state per trainable parameter. Source: torch.optim, bitsandbytes; 8-bit
# optimizers keep a float32 scale per 256 numbers of each state.
_STATE_BYTES = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_apex_fused"), 8.0),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), 2 + 2 * 4 / 256),
    "paged_adamw_32bit": 8.0,
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "adagrad", "rmsprop"), 4.0),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit"), 1 + 4 / 256),
    "sgd": 0.0,
    "adafactor": 0.0,  # rows and columns, counted separately
}
KNOWN_OPTIMIZERS = tuple(_STATE_BYTES)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What decides the memory and time of one training stage."""

    architecture: Architecture
    batch_size: int  # B, examples per device and pass
    length: int  # L, tokens per example
    accumulation: int  # forward and backward passes per step
    num_steps: int
    global_batch_size: int
    bf16: bool  # computes in bf16 by autocast, otherwise in float32
    lora: LoRASettings | None
    checkpointing: bool
    chunked: bool  # the loss is computed in slices
    attention: Literal["eager", "sdpa", "flash"]
    importance: bool  # importance weights, which cost the time of keys that are masked as well
    optimizer: str
    engine: Literal["ddp", "fsdp2", "zero3", "zero3-offload"]
    num_gpus: int
    on_cpu: bool = False
    distilled_fraction: float = 0.0  # of the tokens of an example that the teacher reads
    taught_share: float = 1.0  # of the examples that it reads
    offload: bool = False  # what checkpointing saves is in the memory of the CPU
    flex: bool = False  # importance weights by flex_attention, where it can train

    @property
    def tokens(self) -> int:
        """B x L"""
        return self.batch_size * self.length

    @property
    def has_mask(self) -> bool:
        """Whether importance weights are an additive (B, 1, L, L) mask."""
        return self.importance and not (self.flex and not self.on_cpu)

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.length

    @property
    def state_bytes(self) -> float:
        return _STATE_BYTES.get(self.optimizer, 8.0)

    @property
    def loss_tokens(self) -> int:
        """Tokens whose logits exist at the same time."""
        return min(self.tokens, max(self.batch_size, SLICE)) if self.chunked else self.tokens

    def has_lora(self, matrix: Matrix) -> bool:
        """Whether this matrix has a LoRA adapter."""
        if self.lora is None or not matrix.linear:
            return False
        wanted = [name.rsplit(".", 1)[-1] for name in self.lora.target_modules]
        return not wanted or any(_matches(matrix.name, name) for name in wanted)

    @property
    def lora_parameters(self) -> int:
        """The sum of rank x (rows_in + rows_out) over matrices with an adapter."""
        if self.lora is None:
            return 0
        adapted = [(n, m) for n, m in self.architecture.matrices() if self.has_lora(m)]
        return sum(n * self.lora.rank * (m.rows_in + m.rows_out) for n, m in adapted)

    @property
    def trains_embeddings(self) -> bool:
        return self.lora is None or self.lora.train_embeddings

    @property
    def trainable_parameters(self) -> int:
        a = self.architecture
        if self.lora is None:
            return a.num_parameters
        norms = a.final + sum(layer.count * layer.vectors for layer in a.layers)
        copies = norms * self.lora.train_norms + a.embedding * self.lora.train_embeddings
        return self.lora_parameters + copies


def read_model(recipe: Recipe) -> tuple[ModelInfo, Architecture]:
    """Read the recipe's model from its config alone.

    Raises:
        SkipwiseError: no config, an incomplete one, a model that the recipe cannot extend.
    """
    source = local_source(recipe.model)
    raw = read_config(source, recipe.load)
    conversion = conversion_for(raw, recipe.load.text_only)
    config = complete(conversion.config(raw) if conversion else raw)
    info = read_model_info(config, recipe.original_length)
    scaling_for(recipe, info)
    architecture = read_architecture(config)
    if is_local(source):
        stored = _stored_bytes(Path(source).expanduser()) or architecture.stored_bytes
        architecture = dataclasses.replace(architecture, stored_bytes=stored)
    return info, architecture


def make_jobs(
    recipe: Recipe,
    info: ModelInfo,
    architecture: Architecture,
    *,
    num_gpus: int = 1,
    gpu: Gpu | None = None,
) -> tuple[Job, Job | None]:
    """The jobs of a recipe's first stage and of its full-length stage, if it has one.

    Raises:
        SkipwiseError: as `make_job`; a full-length stage of less than one step.
    """
    last = full_length_stage(recipe, info.original_length, num_gpus)
    first = make_job(first_stage(recipe), info, architecture, num_gpus=num_gpus, gpu=gpu)
    return first, last and make_job(last, info, architecture, num_gpus=num_gpus, gpu=gpu)


def make_job(
    recipe: Recipe,
    info: ModelInfo,
    architecture: Architecture,
    *,
    num_gpus: int = 1,
    gpu: Gpu | None = None,
) -> Job:
    """The job of one training stage; a micro batch that is `auto` counts as 1.

    Args:
        gpu: the GPU, or the CPU, to run on. Defaults to any GPU with bf16.

    Raises:
        SkipwiseError: `method: none`, which trains nothing; a batch that does not divide evenly.
    """
    recipe = resolve_auto(recipe)
    settings = recipe.training
    sampler = make_sampler(recipe, info.original_length)
    length = sampler.train_length
    asked = recipe.load.attn_implementation
    engine: Any = "ddp" if recipe.engine == "auto" else recipe.engine
    batch_size = micro_batch(settings)
    distilled = 0.0
    if distillation_weight(recipe, original_length=info.original_length)[0]:
        distilled = _first_chunk_fraction(sampler, batch_size, info.original_length)
    return Job(
        architecture=architecture,
        batch_size=batch_size,
        length=length,
        accumulation=accumulation(settings, num_gpus),
        num_steps=settings.num_steps,
        global_batch_size=settings.global_batch_size,
        bf16=_uses_bf16(recipe, gpu),
        lora=recipe.lora,
        checkpointing=bool(settings.gradient_checkpointing),
        offload=settings.gradient_checkpointing == "offload",
        chunked=is_chunked(settings.loss, batch_size, length, info.vocab_size)
        or (settings.loss == "auto" and distilled > 0),
        attention="eager" if asked == "eager" else "sdpa" if recipe.load.takes_mask else "flash",
        importance=recipe.positions.key_weights != "none",
        optimizer=str(recipe.trainer.get("optim", "adamw_torch_fused")),
        engine=engine,
        num_gpus=num_gpus,
        on_cpu=gpu is not None and gpu.is_cpu,
        distilled_fraction=distilled,
        taught_share=1 / recipe.distillation.every,
        flex=asked == "flex_attention"
        or (asked == "auto" and _takes_flex(info, architecture, gpu)),
    )


def _takes_flex(info: ModelInfo, a: Architecture, gpu: Gpu | None) -> bool:
    """Whether `auto` computes importance weights with flex_attention (models/attention/flex.py).

    NVIDIA's GPUs from Ampere on, and attention that is the usual one. AMD's and Apple's are MI, M.
    """
    able = gpu is None or (gpu.bf16 and not gpu.is_cpu and not gpu.name.startswith("M"))
    plain = a.head_dim == a.value_dim and a.head_dim in (16, 32, 64, 128, 256) and not a.softcap
    return able and plain and not info.recurrent and a.family != "gpt_oss"


@functools.lru_cache(maxsize=64)
def _first_chunk_fraction(sampler: Sampler, batch_size: int, base_length: int) -> float:
    """The mean length of the longest first chunk in a pass, as a fraction of L."""
    rng, T = np.random.default_rng(0), sampler.target_length
    size = (max(16, 256 // batch_size), batch_size)
    first = [int(sampler.sample(rng, T).lengths[0]) for _ in range(size[0] * size[1])]
    longest = np.minimum(first, base_length).reshape(size).max(1)
    return float(longest.mean()) / sampler.train_length


def _uses_bf16(recipe: Recipe, gpu: Gpu | None) -> bool:
    if recipe.load.dtype != "auto":
        return recipe.load.dtype == "bfloat16"
    return gpu is None or gpu.bf16


def _matches(name: str, wanted: str) -> bool:
    """Whether a module named `wanted` (q_proj, query_key_value, ...) is this matrix."""
    stem = wanted.lower().removesuffix("_proj")
    others = {
        "qkv": ("query_key_value", "qkv"),
        "o": ("dense", "out", "wo"),
        "up": ("fc1", "c_fc", "dense_h_to_4h"),
        "down": ("fc2", "c_proj", "dense_4h_to_h"),
    }
    return stem == name or wanted in others.get(name, ()) or stem in others.get(name, ())


def _stored_bytes(folder: Path) -> int:
    """Bytes per number in a folder's safetensors, from the first header; 0 if unknown."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with file.open("rb") as stream:
                head = stream.read(min(os.path.getsize(file), 4096))
        except OSError:
            return 0
        return 4 if b'"F32"' in head else 2
    return 0
