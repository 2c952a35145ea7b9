"""Format the plan for a terminal: aligned figures with their units."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from skipwise.config.machine import cpu_has_bf16
from skipwise.planning import flops
from skipwise.planning.architecture import Architecture
from skipwise.planning.gpus import UTILISATION
from skipwise.planning.job import Job
from skipwise.planning.memory import GIB, LATE_IMPORTS, Memory, predict_memory
from skipwise.planning.plan import Measured, Plan, TrainingCost
from skipwise.planning.train_lengths import describe_distance, describe_length

_NAME, _FIGURE = 22, 18


def format_plan(plan: Plan) -> str:
    """The blocks of the plan, with an empty line between them."""
    blocks = [
        _headline(plan),
        _parameters(plan.architecture, plan.job),
        _memory(plan),
        _evaluation(plan),
        _training(plan),
        _options(plan),
        _gpus(plan),
        "\n".join(f"note: {note}" for note in plan.notes),
    ]
    return "\n\n".join(block for block in blocks if block)


def _headline(plan: Plan) -> str:
    job, recipe = plan.job, plan.recipe
    mode = "full fine-tuning"
    if job.lora is not None:
        mode = "LoRA" if job.lora.quantization == "none" else "QLoRA"
    return (
        f"{plan.info.family}: {plan.info.original_length:,} to {recipe.target_length:,} tokens, "
        f"{recipe.method}, {mode}, "
        + ("on this CPU" if job.on_cpu else f"{job.engine} on {_devices(job)}")
    )


def _devices(job: Job) -> str:
    return f"{job.num_gpus} GPU{'s' * (job.num_gpus != 1)}"


def _parameters(a: Architecture, job: Job) -> str:
    layer = a.layers[-1]
    heads = f"{a.num_heads} heads"
    if a.num_kv_heads != a.num_heads:
        heads += f", {a.num_kv_heads} for keys and values"
    mlp = f"{'gated MLP' if a.gated else 'MLP'} of {layer.mlp_width:,}"
    if a.num_experts:
        mlp = f"{a.num_experts} experts, {a.experts_per_token} per token"
    each, trainable = f"{layer.size:,} each: {heads}, {mlp}", job.trainable_parameters
    note = f"{100 * trainable / a.num_parameters:.3g} %"
    if job.lora is not None:
        note += f"; LoRA of rank {job.lora.rank} has {job.lora_parameters:,}"
    rows = [
        ("parameters", f"{a.num_parameters:,}", "" if a.exact else "an estimate"),
        ("  embedding", f"{a.embedding:,}", "tied to the head" if a.tied else ""),
        (f"  {a.num_layers} layers", f"{a.layer_parameters:,}", each),
        ("  head", f"{a.head:,}", "") if a.head else None,
        ("  active", f"{a.active_parameters:,}", "per token") if a.num_experts else None,
        ("  trained", f"{trainable:,}", note),
    ]
    return _table(row for row in rows if row)


def _memory(plan: Plan) -> str:
    job, memory = plan.job, plan.memory
    notes = {
        "weights": _precision(job),
        "teacher": f"the base model in {'bf16' if job.bf16 else 'float32'}, for distillation",
        "gradients": "accumulated over a step" if job.accumulation > 1 else "",
        "optimizer": job.optimizer
        + (" and float32 weights" if job.engine == "zero3" and job.bf16 else ""),
        "engine": {"ddp": "gradient buckets"}.get(job.engine, "gathered weights of a few layers"),
        "activations": f"{job.batch_size} x {job.length:,} tokens, "
        + ("checkpointed" if job.checkpointing else "without checkpointing")
        + (", offloaded" if job.offload else ""),
        "logits and loss": "in slices" if job.chunked else "of all tokens",
        "mask": "of importance weights" if job.has_mask else "",
        "bf16 copies": "of weights, made by autocast",
        "runtime": "Python and libraries"
        if job.on_cpu
        else "CUDA, libraries, 3 % lost to rounding",
    }
    rows = [
        (f"  {kind}", f"{memory.parts[kind] / GIB:,.2f}", notes.get(kind, ""))
        for kind in [*notes, *(kind for kind in memory.parts if kind not in notes)]
        if memory.parts.get(kind, 0.0) >= 0.005 * GIB
    ]
    rows.append(("  peak", f"{memory.total / GIB:,.2f}", _phase(memory)))
    if plan.full_length is not None:
        last, stage = plan.full_length.memory, plan.full_length.job
        note = f"{_phase(last)}, {stage.batch_size} x {stage.length:,} tokens"
        rows.append(("  full-length peak", f"{last.total / GIB:,.2f}", note))
    if memory.host:
        zero, held = job.engine == "zero3-offload", "saved activations" if job.offload else ""
        held = "weights and optimizer" + (f", {held}" if held else "") if zero else held
        rows.append(("CPU memory of a node", f"{memory.host / GIB:,.2f}", held))
    return _table([(f"memory of a {'process' if job.on_cpu else 'GPU'}", "GiB", ""), *rows])


def _phase(memory: Memory) -> str:
    phases = {
        "forward": "in the forward pass",
        "loss": "at the loss",
        "update": "at the update",
        "backward": "in the backward pass",
        "end of backward": "at the end of the backward pass",
    }
    return phases.get(memory.phase, f"in the {memory.phase}")


def _precision(job: Job) -> str:
    sharded = f", over {job.num_gpus} GPUs" if job.engine != "ddp" and job.num_gpus > 1 else ""
    if job.engine.startswith("zero3"):
        return ("bf16" if job.bf16 else "float32") + sharded
    if job.lora is None or not job.bf16:
        return "float32" + sharded
    frozen = "nf4" if job.lora.quantization == "nf4" else "bf16"
    return f"{frozen}, trainable ones in float32{sharded}"


def _evaluation(plan: Plan) -> str:
    a = plan.architecture
    head = ("evaluation", "cache, GiB", "peak, GiB (bf16, one context at a time)")
    rows = []
    for n in plan.lengths:
        cache, peak = flops.cache_bytes(a, n) / GIB, flops.evaluation_bytes(a, n) / GIB
        rows.append((f"  {n:,} tokens", f"{cache:,.2f}", f"{peak:,.2f}"))
    return _table([head, *rows])


def _training(plan: Plan) -> str:
    own, *others = plan.costs
    costs = [own, *([plan.full_length] if plan.full_length else []), *others]
    job = plan.job

    def row(name: str, values: Iterable[str]) -> str:
        figures = "".join(f"{value:>{_FIGURE + 2}}" for value in values)
        return f"{name:<{_NAME}}{figures}".rstrip()

    def each(text: str, figure: Callable[[TrainingCost], str]) -> str:
        return row(text, [figure(cost) for cost in costs])

    lines = [
        row(f"{plan.recipe.training.num_steps:,} steps", [cost.name for cost in costs]),
        *([each("  steps", lambda c: f"{c.job.num_steps:,}")] if plan.full_length else []),
        each("  tokens per example", lambda c: f"{c.job.length:,}"),
        each("  examples per step", lambda c: f"{c.examples_per_step:,.4g}"),
        each("  tokens in total", lambda c: f"{c.tokens_per_step * c.job.num_steps:,.0f}"),
        each("  PFLOP per step", lambda c: _round(c.flops_per_step / 1e15)),
        each("  GPU memory, GiB", lambda c: f"{c.memory.total / GIB:,.1f}"),
    ]
    common = next((fit for fit in plan.gpus if fit.gpu.name == "A100-80GB"), None)
    shown = plan.gpus[0] if len(plan.gpus) == 1 else common
    if shown is not None and shown.gpu.tflops is not None:
        rate = job.num_gpus * shown.gpu.tflops * 1e12 * UTILISATION

        def time(cost: TrainingCost) -> str:
            return _hours(cost.job.num_steps * cost.flops_per_step / rate / 3600)

        lines.append(each(f"  hours, {shown.gpu.name}", time))
    return "\n".join(lines)


def _options(plan: Plan) -> str:
    """Training lengths at equal tokens; the one that `train_length: auto` takes has a star."""
    if plan.choice is None or plan.options_gpu is None:
        return ""
    chosen, why = plan.choice
    head = f"{'GiB':>9}{'hours':>9}{'time':>7}   expected perplexity at the target"
    lines = [f"{f'train_length, {plan.options_gpu.name}':<{_NAME + 6}}{head}"]
    for one in plan.options:
        expected = "not measured" if one.behind is None else describe_distance(one.behind)
        expected += f" ({one.evidence})" if one.evidence else ""
        name = describe_length(one.length, plan.recipe.target_length)
        mark = "*" if one.length == chosen else " "
        gib, hours = f"{one.memory.gib:>9.1f}", f"{_hours(one.hours):>9}"
        lines.append(f"{f'{mark} {name}':<{_NAME + 6}}{gib}{hours}{one.cost:>7.2f}   {expected}")
    taken, *others = why.split("; ")
    return "\n".join([*lines, f"at equal tokens; train_length=auto takes {taken}", *others])


def _gpus(plan: Plan) -> str:
    lines = [f"{'GPU':<15}{'GiB':>7}{'micro batch':>13}{'needs':>9}{'hours':>10}   fits"]
    for row in plan.gpus:
        verdict = "no, with no known change" if row.change is None else f"no: {row.change}"
        verdict = "yes" if row.fits else verdict
        lines.append(
            f"{row.gpu.name:<15}{row.gpu.memory_gib:>7.1f}{row.micro_batch_size:>13}"
            f"{row.memory.total / GIB:>9.1f}{_hours(row.hours):>10}   {verdict}"
        )
    peak = "matrix products that were timed" if plan.job.on_cpu else f"peak of {_devices(plan.job)}"
    lines.append(
        f"hours are an estimate, at {UTILISATION:.0%} of the {peak}; "
        "after no comes the first change that makes it fit"
    )
    return "\n".join(lines)


def format_measured(plan: Plan, measured: Measured) -> str:
    """The measurements of a few steps, with the predictions for this machine."""
    gpu = next((row.gpu for row in plan.gpus if len(plan.gpus) == 1), None)
    job = dataclasses.replace(plan.job, num_gpus=1, engine="ddp")
    if measured.on_cpu:
        runtime = measured.runtime_bytes + LATE_IMPORTS
        bf16 = cpu_has_bf16() if plan.recipe.load.dtype == "auto" else job.bf16
        passes = min(2, job.accumulation)
        job = dataclasses.replace(job, bf16=bf16, on_cpu=True, accumulation=passes)
        memory = predict_memory(job, runtime=runtime)
        predicted = memory.total
    else:
        memory = predict_memory(job)
        predicted = memory.total - memory.parts["runtime"]  # the allocator does not count it
    expected = gpu and gpu.is_cpu == measured.on_cpu and flops.seconds_per_step(job, gpu)
    seconds = f"{expected:,.2f}" if expected else ""
    rate = f"{flops.step_flops(job) / measured.seconds_per_step / 1e12:,.3g} TFLOP/s"
    peak = f"{predicted / GIB:,.2f}   {memory.phase}"
    run = "  hours, first stage" if plan.full_length else "  hours in total"
    rows = [
        (f"measured, {measured.device}", "measured", "predicted"),
        ("  peak memory, GiB", f"{measured.peak_bytes / GIB:,.2f}", peak),
        ("  seconds per step", f"{measured.seconds_per_step:,.2f}", f"{seconds or '-'}   {rate}"),
        (run, _hours(job.num_steps * measured.seconds_per_step / 3600), ""),
    ]
    return _table(rows)


def _table(rows: Iterable[tuple[str, str, str]]) -> str:
    lines = [f"{name:<{_NAME}}{figure:>{_FIGURE}}   {note}" for name, figure, note in rows]
    return "\n".join(line.rstrip() for line in lines)


def _round(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _hours(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 0.1 else "< 0.1"
