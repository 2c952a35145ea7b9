"""Memory and speed of common GPUs, from gpus.json, and of this machine's CPU."""

from __future__ import annotations

import difflib
import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from skipwise.config.machine import available_memory, cpu_has_bf16
from skipwise.errors import SkipwiseError

UTILISATION = 0.40  # assumed fraction of the peak: usual for dense decoders of 1 B and more
_REPORTED = 0.985  # of its nominal memory, what the driver of a GPU reports
_MATMUL = 1024  # rows and columns of the matrices that time a CPU
_MAKERS = re.compile(r"nvidia|geforce|tesla|amd|instinct|apple|rtx")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A device to train on: a GPU, or with `is_cpu` the CPU of this machine."""

    name: str
    memory_gib: float
    tflops: float | None  # dense matrix products a second, in the dtype that training computes in
    bf16: bool = True
    common: bool = False  # in the table of a plan for no GPU in particular
    is_cpu: bool = False


def _read_gpus() -> tuple[Gpu, ...]:
    file = Path(__file__).with_name("gpus.json")
    rows = json.loads(file.read_text(encoding="utf-8"))["gpus"]
    keys = ("name", "memory_gib", "tflops", "common")
    return tuple(Gpu(**{k: row[k] for k in keys}, bf16=row["dtype"] == "bf16") for row in rows)


GPUS = _read_gpus()


def common_gpus() -> list[Gpu]:
    return sorted((gpu for gpu in GPUS if gpu.common), key=lambda gpu: gpu.memory_gib)


def find_gpu(name: str) -> Gpu:
    """Find a GPU by name, ignoring case, spaces, dashes and the maker; or `24GB`, or `cpu`.

    A GPU of which only the memory is known has no rate, so no hours are planned for it.

    Raises:
        SkipwiseError: not in the table; names some that are like it.
    """

    def normalized(text: str) -> str:
        return _MAKERS.sub("", "".join(c for c in text.lower() if c.isalnum()))

    wanted = normalized(name)
    if wanted == "cpu":
        return this_cpu()
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gib|gb|g)", name.strip().lower())
    if size and float(size[1]):
        gib = float(size[1]) * (1.0 if size[2] == "gib" else _REPORTED)  # makers say GB for GiB
        return Gpu(name=name.strip(), memory_gib=gib, tflops=None)
    known: dict[str, Gpu] = {}
    for gpu in GPUS:  # with its memory, or without
        known.setdefault(normalized(re.sub(r"-\d+GB$", "", gpu.name)), gpu)
        known[normalized(gpu.name)] = known[normalized(gpu.name.removesuffix("GB"))] = gpu
    if wanted in known:
        return known[wanted]
    near = [known[key].name for key in difflib.get_close_matches(wanted, known, 4, 0.5)]
    near = list(dict.fromkeys(near or (gpu.name for gpu in common_gpus())))
    raise SkipwiseError(
        f"--gpu {name} is unknown: did you mean {', '.join(near)}?\n"
        "a size such as --gpu 24GB, and --gpu cpu, work too"
    )


def this_cpu() -> Gpu:
    """The CPU of this machine: free memory, and the rate of float32 matrix products, timed."""
    a = np.random.default_rng(0).random((_MATMUL, _MATMUL), np.float32)
    seconds = math.inf
    for _ in range(3):
        start = time.perf_counter()
        _ = a @ a
        seconds = min(seconds, time.perf_counter() - start)
    return Gpu(
        name="this CPU",
        memory_gib=available_memory() / 2**30,
        tflops=2 * _MATMUL**3 / seconds / 1e12,
        bf16=cpu_has_bf16(),
        is_cpu=True,
    )
