"""Peak memory of a training run: the phases it goes through, and the one that holds most.

A run loads the weights, checks one batch (the preflight), and then repeats forward, backward and
update; each phase is a list of what is held (held.py). On a GPU the peak is the largest sum. On a
CPU glibc takes blocks under 32 MiB from a heap that does not shrink while later blocks live in it,
so memory of one phase stays while another has its peak, and that has holes where blocks come and
go; larger blocks go back at once.

Sources: glibc, malloc(3) and mallopt(3): M_MMAP_THRESHOLD grows to the largest block that was
         freed, at most 32 MiB. Knuth, The Art of Computer Programming 1, section 2.5, fifty-percent
         rule: a heap in use has half as many holes as blocks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from skipwise.planning import allocations
from skipwise.planning.allocations import Allocation
from skipwise.planning.gpus import Gpu
from skipwise.planning.job import Job

GIB = 2**30
# Resident memory of a process that has done a step of a model of next to no size: Python, torch
# 2.13 for CPU, transformers 5.23, peft and what they load (benchmarks/plan_accuracy.py measures it)
CPU_RUNTIME = 0.584 * GIB
LATE_IMPORTS = 0.058 * GIB  # of it: loaded between the imports and the first step
# CUDA context, cuBLAS workspaces and compiled kernels: 0.5 to 0.8 GiB on A100 and H100 (not
# measured here: no GPU), and what the caching allocator loses to rounding
GPU_RUNTIME = 0.8 * GIB
GPU_FRAGMENTATION = 0.03
_LARGEST_HEAP_BLOCK = 32 << 20
_HOLES = 0.5  # of what comes and goes in a heap; each as large as a block
_LOADED = ("weights", "teacher")
_LASTING = (*_LOADED, "optimizer")
_LOGITS = "logits and loss"
_LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_live_parameters


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The predicted peak of a device, in bytes."""

    phase: str  # where the peak is
    parts: dict[str, float]  # kind: bytes, in the peak phase; they sum to total
    total: float
    phases: dict[str, float]  # of every phase
    host: float  # CPU memory a node needs for what the engine moves there, all its GPUs together

    @property
    def gib(self) -> float:
        return self.total / GIB


def predict_memory(job: Job, *, on_cpu: bool = False, runtime: float | None = None) -> Memory:
    """The peak memory of a device that runs the job.

    Args:
        on_cpu: resident memory of the process, instead of a GPU's.
        runtime: bytes before the model is there; None: as measured for the pinned versions.
    """
    found = {name: _placed(job, items) for name, items in _phases(job, on_cpu).items()}
    if on_cpu:
        return _on_cpu(job, found, CPU_RUNTIME if runtime is None else runtime)
    phases = {}
    for name, items in found.items():
        phases[name] = sum(item.total for item in items) * (1 + GPU_FRAGMENTATION) + GPU_RUNTIME
    phase = max(phases, key=lambda name: phases[name])
    parts = _by_kind(found[phase])
    parts["runtime"] = phases[phase] - sum(parts.values())
    total = phases[phase]
    return Memory(phase=phase, parts=parts, total=total, phases=phases, host=host_bytes(job))


def fits(memory: Memory, gpu: Gpu) -> bool:
    return memory.gib <= gpu.memory_gib


def host_bytes(job: Job) -> float:
    """CPU memory of a node under zero3-offload, its GPUs together.

    All weights in bf16, and of what trains float32 weights, gradients and two AdamW states:
    DeepSpeed's own AdamW runs there, whatever trainer.optim says. And the layers of a teacher.
    """
    if job.engine != "zero3-offload":
        return 0.0
    width = 2.0 if job.bf16 else 4.0
    a = job.architecture
    numbers = a.num_parameters
    if job.taught_share:
        numbers += a.num_parameters - a.embedding - a.head - a.final
    return numbers * width + job.trainable_parameters * (4.0 + 4.0 + 8.0)


def _phases(job: Job, on_cpu: bool) -> dict[str, list[Allocation]]:
    """What each phase holds on one device, before sharding."""
    a = job.architecture
    tokens, rows = job.tokens, job.batch_size
    weights, gradients = allocations.weights(job), allocations.gradients(job)
    states = allocations.states(job)
    teacher = allocations.teacher(job)
    layer = max(a.layers, key=lambda layer: layer.size)
    one = allocations.layer_activations(job, layer, tokens, rows)
    copies = allocations.layer_copies(job, layer)
    moment = allocations.layer_gradients(job, layer, tokens)
    if on_cpu:
        moment += allocations.lora_temporaries(job, layer, tokens)
    kept = _kept(job)
    always = [*weights, *teacher, *states, *allocations.batch(job, on_cpu), *_engine_buffers(job)]
    before = gradients if job.accumulation > 1 else []
    head = [*allocations.head_activations(job, tokens), *allocations.head_copy(job)]
    loss, back = allocations.logits(job, backward=False), allocations.logits(job, backward=True)
    head_gradient = [g for g in gradients if g.block >= 4 * a.vocab_size * a.hidden_size][:1]
    tied_gradient = head_gradient if a.tied and job.lora is None else []
    temporaries = allocations.optimizer_temporaries(job)
    inner = [*one, *copies] if job.checkpointing else []
    return {
        "load": [*_load(job, weights, on_cpu), *teacher],
        "preflight": [*_preflight(job, weights), *teacher],
        "forward": [*always, *before, *kept, *head, *loss],
        "loss": [*always, *before, *kept, *head, *back],
        "backward": [
            *always, *(before or head_gradient), *kept, *inner, *moment
        ],
        "end of backward": [*always, *gradients, *one, *copies, *moment, *tied_gradient],
        "update": [*always, *gradients, Allocation("optimizer", temporaries, temporaries)],
    }  # fmt: skip


def _load(job: Job, weights: list[Allocation], on_cpu: bool) -> list[Allocation]:
    """Weights and, on a CPU, the file they are cast from, which is mapped into memory.

    Weights that are not cast stay in the mapped file: there is one copy of them.
    """
    a = job.architecture
    if not on_cpu or allocations.base_bytes(job) == a.stored_bytes:
        return weights
    size = float(a.num_parameters * a.stored_bytes)
    return [*weights, Allocation("weights file", size, size)]


def _preflight(job: Job, weights: list[Allocation]) -> list[Allocation]:
    """models.checks.check_batch: the loss of one example, its gradient to the embeddings."""
    one = dataclasses.replace(job, batch_size=1)
    return [
        *weights,
        *_kept(one),
        *allocations.batch(dataclasses.replace(one, accumulation=1), False),
        *allocations.head_activations(one, one.length),
        *allocations.head_copy(one),
        *allocations.logits(one, backward=True),
    ]


def _kept(job: Job) -> list[Allocation]:
    """What all layers keep between the passes."""
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
    """What the engine holds beside its share: buckets of DDP, weights gathered for a layer."""
    a = job.architecture
    if job.engine == "ddp":
        size = 4.0 * job.trainable_parameters if job.num_gpus > 1 else 0.0
        return [Allocation("engine", size, size)]  # gradients once more, in buckets to be reduced
    if job.engine == "fsdp2":
        largest = max(layer.size for layer in a.layers)
        outer = a.embedding + a.head
        width = 2 if job.bf16 else 4
        size = width * (2.0 * largest + outer) + 4.0 * largest  # this layer, the next, a gradient
        return [Allocation("engine", size, size)]
    largest = max(layer.size for layer in a.layers) + a.embedding + a.head
    size = 2.0 * min(a.num_parameters, max(_LIVE_PARAMETERS, largest))
    return [Allocation("engine", size, size)]


def _placed(job: Job, items: list[Allocation]) -> list[Allocation]:
    """The items with what is sharded divided, and what is moved to the CPU taken out."""
    if job.engine == "ddp":
        return items
    moved = {"weights", "gradients", "optimizer"}
    if (
        job.engine == "zero3-offload"
    ):  # weights and states come back layer by layer: _engine_buffers
        return [item for item in items if item.kind not in moved]
    return [
        dataclasses.replace(item, total=item.total / (job.num_gpus if item.kind in moved else 1))
        for item in items
    ]


def _by_kind(items: list[Allocation]) -> dict[str, float]:
    found: dict[str, float] = {}
    for item in items:
        if item.total:
            found[item.kind] = found.get(item.kind, 0.0) + item.total
    return found


def _on_cpu(job: Job, found: dict[str, list[Allocation]], runtime: float) -> Memory:
    """The largest resident memory, with a heap that keeps what it once had."""
    blocks = [
        i.block for items in found.values() for i in items if i.total and i.kind not in _LOADED
    ]
    threshold = max([b for b in blocks if b < _LARGEST_HEAP_BLOCK], default=0.0)
    layers = logits = 0.0
    peak, phase, phases = 0.0, "", {}
    for name, items in [*found.items(), *list(found.items())[2:]]:  # a second step meets the heap
        small = [i for i in items if i.block <= threshold]
        # logits are the largest blocks, and fit into no hole that a layer's leave
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
