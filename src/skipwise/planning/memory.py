"""Predict the peak memory of a training run: the phase of the run that needs most.

A run loads the weights, checks one batch (the preflight), and then repeats forward, backward and
update; allocations.py lists the tensors of each phase. On a GPU the peak is the largest sum. On a
CPU, glibc takes blocks below 32 MiB from a heap that cannot shrink while later blocks use it: it
keeps the memory of earlier phases, and has holes where blocks come and go. Larger blocks are
returned at once.

Sources: glibc, malloc(3) and mallopt(3): M_MMAP_THRESHOLD grows to the largest freed block, at most
         32 MiB. Knuth, The Art of Computer Programming 1, section 2.5, fifty-percent rule: a heap
         in use has half as many holes as blocks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from skipwise.config.batch import micro_batches
from skipwise.config.recipe import Recipe
from skipwise.config.stages import first_stage
from skipwise.models.model_info import ModelInfo
from skipwise.planning import allocations
from skipwise.planning.allocations import Allocation
from skipwise.planning.architecture import Architecture
from skipwise.planning.gpus import Gpu
from skipwise.planning.job import Job, make_job

GIB = 2**30
# Resident memory of a process after a step of a tiny model: Python, torch 2.13 for CPU,
# transformers 5.23, peft and what they load (measured by benchmarks/plan_accuracy.py)
CPU_RUNTIME = 0.584 * GIB
LATE_IMPORTS = 0.058 * GIB  # the part of it that is loaded after the imports, by the first step
# CUDA context, cuBLAS workspaces and compiled kernels: 0.5 to 0.8 GiB on A100 and H100 (not
# measured here: no GPU)
GPU_RUNTIME = 0.8 * GIB
GPU_FRAGMENTATION = 0.03  # the caching allocator's loss to rounding
_LARGEST_HEAP_BLOCK = 32 << 20
_HOLES = 0.5  # holes per temporary block, each as large as a block
_LOADED = ("weights", "teacher")
MARGIN = 0.90  # fraction of the memory that `auto` fills: docs/scaling.md has the plan's accuracy
_ENOUGH = 32_768  # tokens in a pass that keep any device busy
_LASTING = (*_LOADED, "optimizer")
_LOGITS = "logits and loss"
_LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_live_parameters


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The predicted peak of a device, in bytes."""

    phase: str  # the phase with the peak
    parts: dict[str, float]  # bytes by kind in this phase; their sum is the total
    total: float
    phases: dict[str, float]  # bytes of every phase
    host: float  # CPU memory of a node that offloading uses, for all its GPUs

    @property
    def gib(self) -> float:
        return self.total / GIB


def predict_memory(job: Job, *, runtime: float | None = None) -> Memory:
    """The peak memory of one device: GPU memory, or the resident memory of a CPU process.

    Args:
        runtime: bytes of a CPU process before the model is loaded. Defaults to CPU_RUNTIME.
    """
    found = {name: _sharded(job, items) for name, items in _phases(job).items()}
    if job.on_cpu:
        return _on_cpu(job, found, CPU_RUNTIME if runtime is None else runtime)
    phases = {}
    for name, items in found.items():
        phases[name] = sum(item.total for item in items) * (1 + GPU_FRAGMENTATION) + GPU_RUNTIME
    phase, total = max(phases.items(), key=lambda item: item[1])
    parts = _by_kind(found[phase])
    parts["runtime"] = total - sum(parts.values())
    return Memory(phase=phase, parts=parts, total=total, phases=phases, host=host_bytes(job))


def update_bytes(job: Job) -> float:
    """What the first update adds to the memory of a pass: optimizer states, DDP's buckets."""
    found = [*allocations.optimizer_states(job), *_engine_buffers(job)]
    return sum(item.total for item in _sharded(job, found))


def fits(memory: Memory, gpu: Gpu) -> bool:
    return memory.gib <= gpu.memory_gib


def host_bytes(job: Job) -> float:
    """CPU memory of a node that offloading takes, for all its GPUs.

    With offloaded activations the inputs of all layers. Under zero3-offload all weights and a
    teacher's layers in bf16; and for trainable parameters the weights, gradients and two AdamW
    states in float32, because DeepSpeed's own CPU AdamW runs there.
    """
    saved = 0.0
    if job.offload and not job.on_cpu:
        kept = dataclasses.replace(job, offload=False)
        saved = job.num_gpus * sum(x.total for x in allocations.checkpoints(kept, job.tokens))
    if job.engine != "zero3-offload":
        return saved
    width = 2.0 if job.bf16 else 4.0
    a = job.architecture
    numbers = a.num_parameters
    if job.distilled_fraction:
        numbers += a.num_parameters - a.embedding - a.head - a.final
    return saved + numbers * width + job.trainable_parameters * (4.0 + 4.0 + 8.0)


def _phases(job: Job) -> dict[str, list[Allocation]]:
    """The allocations of each phase on one device, before sharding."""
    a = job.architecture
    tokens, rows = job.tokens, job.batch_size
    weights, gradients = allocations.weights(job), allocations.gradients(job)
    states = allocations.optimizer_states(job)
    teacher = allocations.teacher(job)
    layer = max(a.layers, key=lambda layer: layer.size)
    one = allocations.layer_activations(job, layer, tokens, rows)
    copies = allocations.layer_copies(job, layer)
    temporary = allocations.layer_gradients(job, layer, tokens)
    if job.on_cpu:
        temporary += allocations.lora_temporaries(job, layer, tokens)
    saved = _saved_activations(job)
    always = [
        *weights,
        *teacher,
        *states,
        *allocations.batch(job, job.on_cpu),
        *_engine_buffers(job),
    ]
    before = gradients if job.accumulation > 1 else []
    head = [*allocations.head_activations(job, tokens), *allocations.head_copy(job)]
    loss, back = allocations.logits(job, backward=False), allocations.logits(job, backward=True)
    head_gradient = [g for g in gradients if g.block >= 4 * a.vocab_size * a.hidden_size][:1]
    tied_gradient = head_gradient if a.tied and job.lora is None else []
    temporaries = allocations.optimizer_temporaries(job)
    inner = [*one, *copies] if job.checkpointing else []
    return {
        "load": [*_load(job, weights), *teacher],
        "preflight": [*_preflight(job, weights), *teacher],
        "forward": [*always, *before, *saved, *head, *loss],
        "loss": [*always, *before, *saved, *head, *back],
        "backward": [*always, *(before or head_gradient), *saved, *inner, *temporary],
        "end of backward": [*always, *gradients, *one, *copies, *temporary, *tied_gradient],
        "update": [*always, *gradients, Allocation("optimizer", temporaries, temporaries)],
    }


def _load(job: Job, weights: list[Allocation]) -> list[Allocation]:
    """The weights, and on a CPU the memory-mapped file that they are cast from.

    Weights that need no cast stay in the mapped file, so there is only one copy.
    """
    a = job.architecture
    if not job.on_cpu or allocations.base_bytes(job) == a.stored_bytes:
        return weights
    size = float(a.num_parameters * a.stored_bytes)
    return [*weights, Allocation("weights file", size, size)]


def _preflight(job: Job, weights: list[Allocation]) -> list[Allocation]:
    """preflight.batch.check_batch: the loss of one example and its gradient at the embeddings."""
    one = dataclasses.replace(job, batch_size=1)
    return [
        *weights,
        *_saved_activations(one),
        *allocations.batch(dataclasses.replace(one, accumulation=1), False),
        *allocations.head_activations(one, one.length),
        *allocations.head_copy(one),
        *allocations.logits(one, backward=True),
    ]


def _saved_activations(job: Job) -> list[Allocation]:
    """What all layers save between the forward and the backward pass."""
    if job.checkpointing:
        return allocations.checkpoints(job, job.tokens)
    return [
        Allocation(x.kind, x.total * layer.count, x.block)
        for layer in job.architecture.layers
        for x in [
            *allocations.layer_activations(job, layer, job.tokens, job.batch_size),
            *allocations.layer_copies(job, layer),
        ]
    ]


def _engine_buffers(job: Job) -> list[Allocation]:
    """The engine's own memory: DDP's buckets, or the weights gathered for a layer."""
    a = job.architecture
    largest, outer = max(layer.size for layer in a.layers), a.embedding + a.head
    if job.engine == "ddp":  # a copy of the gradients, in buckets
        size = 4.0 * job.trainable_parameters if job.num_gpus > 1 else 0.0
    elif job.engine == "fsdp2":  # this layer, the next, a gradient
        size = (2 if job.bf16 else 4) * (2.0 * largest + outer) + 4.0 * largest
    else:
        size = 2.0 * min(a.num_parameters, max(_LIVE_PARAMETERS, largest + outer))
    return [Allocation("engine", size, size)]


def _sharded(job: Job, items: list[Allocation]) -> list[Allocation]:
    """The items after sharding and offloading."""
    if job.engine == "ddp":
        return items
    sharded = {"weights", "gradients", "optimizer"}
    if job.engine == "zero3-offload":  # _engine_buffers has the layers that are on the GPU
        return [item for item in items if item.kind not in sharded]
    return [
        dataclasses.replace(item, total=item.total / (job.num_gpus if item.kind in sharded else 1))
        for item in items
    ]


def _by_kind(items: list[Allocation]) -> dict[str, float]:
    found: dict[str, float] = {}
    for item in items:
        if item.total:
            found[item.kind] = found.get(item.kind, 0.0) + item.total
    return found


def _on_cpu(job: Job, found: dict[str, list[Allocation]], runtime: float) -> Memory:
    """The largest resident memory, with a heap that never shrinks."""
    blocks = [
        i.block for items in found.values() for i in items if i.total and i.kind not in _LOADED
    ]
    threshold = max([b for b in blocks if b < _LARGEST_HEAP_BLOCK], default=0.0)
    layers = logits = 0.0
    peak, phase, phases = 0.0, "", {}
    for name, items in [*found.items(), *list(found.items())[2:]]:  # two steps
        small = [i for i in items if i.block <= threshold]
        # logits are the largest blocks and do not fit into holes that layers leave
        layers = max(layers, _with_holes([i for i in small if i.kind != _LOGITS]))
        logits = max(logits, _with_holes([i for i in small if i.kind == _LOGITS]))
        heap, mapped = layers + logits, sum(i.total for i in items if i.block > threshold)
        phases[name] = heap + mapped + runtime
        if phases[name] > peak:
            peak, phase = phases[name], name
    parts = _by_kind(found[phase])
    parts["runtime"] = runtime
    rest = peak - sum(parts.values())
    if rest > 0:
        parts["kept by malloc"] = rest
    return Memory(phase=phase, parts=parts, total=peak, phases=phases, host=0.0)


def _with_holes(items: list[Allocation]) -> float:
    return sum(i.total * (1 if i.kind in _LASTING else 1 + _HOLES) for i in items)


def with_micro_batch(recipe: Recipe, size: int) -> Recipe:
    training = dataclasses.replace(recipe.training, micro_batch_size=size)
    return dataclasses.replace(recipe, training=training)


def largest_micro_batch(
    recipe: Recipe,
    info: ModelInfo,
    architecture: Architecture,
    gpu: Gpu,
    num_gpus: int = 1,
    runtime: float | None = None,
) -> int:
    """The largest size for `auto` that fits with a margin, at least 1; else the recipe's size.

    Training tries real passes of the sizes up to it and takes the fastest (training/setup.py).

    Args:
        runtime: see `predict_memory`.
    """
    recipe, (best, *more) = first_stage(recipe), micro_batches(recipe.training, num_gpus)
    for size in more:
        sized = with_micro_batch(recipe, size)
        job = make_job(sized, info, architecture, num_gpus=num_gpus, gpu=gpu)
        needed = predict_memory(job, runtime=runtime).total
        if needed > MARGIN * gpu.memory_gib * GIB or job.tokens > _ENOUGH:
            break
        best = size
    return best
