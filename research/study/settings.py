"""What the study trains: settings in groups, and wider sweeps.

Letters: L = 256, the base's context; T = target; f = T / L; N = num_chunks
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

L = 256
BATCH = 16  # examples of L tokens a step


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One training and its measurement; equal settings are measured once."""

    target: int = 2048
    seed: int = 0
    method: str = "pose"  # none, full, pose, randpos, cream
    rope: str = "yarn"
    rope_stretch: float = 1.0  # the scaling's factor over f
    beta_fast: float = 0.0  # of yarn; 0: 32
    rope_off: bool = False  # the base as it is
    num_chunks: int = 2
    cut: str = "random"
    gaps: str = "sequential"
    content: str = "uniform"
    variant: str = ""  # of the examples; see samplers.py
    strength: float = 0.0  # times the log importance weights; 1: as derived
    plain_fraction: float = 0.0
    distil: float = 0.0  # weight of self-distillation
    distil_on: str = "plain"  # examples, or "first": every first chunk
    steps: int = 300  # of BATCH x L tokens, the finish among them
    learning_rate: float = 1e-3
    warmup: int = 10
    end: float = 0.0  # share of the learning rate that is left at the end of the skips
    beta2: float = 0.95
    lora_rank: int = 0
    finish: float = 0.0  # share of the tokens at full length
    finish_at: str = "end"  # a phase of its own; or one schedule: "last", "first", "spread" steps
    finish_distil: bool = True  # self-distillation goes on in it
    finish_learning_rate: float = 5e-4  # of a phase of its own
    full_batch: int = 0  # examples a step at full length; 0: as many as make BATCH x L tokens
    train_length: int = 0  # M, tokens of an example; 0: L, and T at full length
    tasks: tuple[str, ...] = ("passkey", "needle")
    curve: bool = False  # perplexity at every tenth of training

    @property
    def key(self) -> str:
        values = dataclasses.asdict(self)
        for name, default in _LATER.items():  # rows from before there was such a setting stay
            if values[name] == default:
                del values[name]
        text = json.dumps(values, sort_keys=True)
        return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:12]


_LATER = {"finish_at": "end", "finish_distil": True, "train_length": 0}


def made(base: Setting | None = None, **changes: Any) -> Setting:
    return dataclasses.replace(base or Setting(), **changes)


PAPER = Setting()  # N = 2, uniform text; the learning rate is this model's
ALIGNED = made(content="aligned")
WEIGHTED = made(content="aligned", strength=1.0)
FULL = made(method="full")
TARGETS = (1024, 2048, 4096, 8192, 16384)
RULER = ("passkey", "needle", "niah_single_numbers", "niah_multikey", "vt", "cwe")


def single_changes() -> list[Setting]:
    """One change at a time from aligned text with weights at rate 1e-3; f = 8 and 32, one seed."""
    found = []
    for T in (2048, 8192):
        w = made(WEIGHTED, target=T)
        found += [made(PAPER, target=T), made(ALIGNED, target=T), w, made(FULL, target=T)]
        found += [made(w, learning_rate=lr) for lr in (3e-4, 5e-4, 2e-3)]
        found += [made(PAPER, target=T, learning_rate=lr) for lr in (3e-4, 5e-4, 2e-3)]
        found += [made(FULL, target=T, learning_rate=lr) for lr in (3e-4, 5e-4, 2e-3)]
        found += [made(w, warmup=60), made(w, beta2=0.999), made(w, steps=1000), made(w, steps=100)]
        found += [made(FULL, target=T, steps=1000)]
        found += [made(w, strength=s) for s in (0.25, 0.5, 0.75, 1.25)]
        found += [made(w, plain_fraction=p) for p in (0.1, 0.2, 0.4)]
        found += [made(w, plain_fraction=0.2, distil=d) for d in (0.5, 2.0)]
        for n in (3, 4, 8, 16, 32):
            found += [made(w, num_chunks=n, gaps="sorted")]
            found += [made(w, num_chunks=n, gaps="sorted", content="contiguous")]
        for variant in ("sections:4", "sections:8", "sections:16", "sections:32"):
            found += [made(w, variant=variant)]
        for variant in ("related:4", "related:16", "related:64", "topup:0.1"):
            found += [made(w, variant=variant)]
        found += [made(w, content=c) for c in ("uniform", "contiguous")]
        found += [made(PAPER, target=T, strength=1.0, rope=r) for r in ("linear", "ntk", "llama3")]
        found += [made(w, rope=r) for r in ("linear", "ntk", "llama3")]
        found += [made(w, method="cream", content="aligned"), made(w, lora_rank=16)]
        for lr in (3e-4, 1e-3):
            for end in (0.0, 0.3):
                found += [made(w, finish=0.1, finish_learning_rate=lr, end=end)]
    return found


def lower_rates() -> list[Setting]:
    """Changes at learning rates from 1e-4 to 5e-4, and f = 4 .. 64; one seed."""
    one = {"tasks": ("passkey",)}
    w = made(WEIGHTED, learning_rate=3e-4, **one)
    paper, full = made(PAPER, learning_rate=3e-4, **one), made(FULL, learning_rate=5e-4, **one)
    found = [made(w, method="none", rope_off=True, strength=0.0)]
    kd = {"plain_fraction": 0.2, "distil": 0.5}
    first = {"distil": 0.5, "distil_on": "first"}
    for T in (2048, 8192, 16384):
        w, paper, full = (made(s, target=T) for s in (w, paper, full))
        found += [
            made(w, method="none", rope=r, strength=0.0)
            for r in ("yarn", "linear", "ntk", "llama3")
        ]
        found += [paper, w, made(w, **kd), made(w, **first), made(w, content="uniform")]
        found += [made(w, finish=0.1, finish_learning_rate=3e-4), full, made(w, rope="llama3")]
        found += [made(w, rope="ntk"), made(w, strength=0.5), made(w, num_chunks=4, gaps="sorted")]
        found += [made(w, cut="first-half")]
        if T == 16384:
            continue
        found += [made(full, learning_rate=3e-4), made(w, learning_rate=1e-4)]
        found += [
            made(w, plain_fraction=0.2),
            made(w, strength=1.25),
            made(w, learning_rate=2e-4),
        ]
        found += [made(w, cut="first-half", **kd), made(w, distil=0.2, distil_on="first")]
        found += [made(w, distil=1.5, distil_on="first"), made(w, learning_rate=5e-4, **first)]
        found += [
            made(w, finish=0.1, finish_learning_rate=lr, end=e)
            for lr in (3e-4, 6e-4)
            for e in (0.3, 1.0)
        ]
        found += [made(w, finish=0.1, finish_learning_rate=3e-4, full_batch=1, end=0.3)]
        found += [
            made(full, steps=30),
            made(full, steps=100),
            made(w, finish=0.3, finish_learning_rate=3e-4),
        ]
        if T == 8192:
            found += [made(w, learning_rate=1e-3), made(w, num_chunks=3, gaps="sorted")]
            found += [made(w, variant="topup:0.1"), made(w, strength=0.75), made(w, steps=1000)]
            found += [made(w, method="cream"), made(w, content="contiguous")]
    for T in (1024, 4096):
        w, paper, full = (made(s, target=T) for s in (w, paper, full))
        found += [paper, w, made(w, **kd), full]
    return found


def distilled_scalings() -> list[Setting]:
    """Self-distillation of weight 1.5 and 4, by scaling, then with a finish; f = 8 and 32."""
    w = made(WEIGHTED, learning_rate=5e-4, distil=1.5, distil_on="first", tasks=("passkey",))
    full = made(FULL, learning_rate=5e-4, tasks=("passkey",))
    ropes = [{"rope": "llama3"}, {"rope": "ntk", "rope_stretch": 2.0}, {"beta_fast": 4.0}]
    found = []
    for T in (2048, 8192):
        w, full = made(w, target=T), made(full, target=T)
        found += [
            w,
            made(w, distil=4.0),
            made(w, learning_rate=1e-3),
            made(w, cut="first-half"),
        ]
        found += [made(w, learning_rate=1e-3, distil=4.0)]
        for rope in ropes:
            found += [
                made(w, **rope),
                made(full, **rope),
                made(w, cut="first-half", **rope),
            ]
        found += [
            made(w, rope="ntk", rope_stretch=4.0),
            made(w, beta_fast=2.0),
            made(w, beta_fast=8.0),
        ]
        found += [made(full, distil=1.5)]
        found += [made(w, finish=0.1, finish_learning_rate=lr) for lr in (1e-4, 3e-4)]
        found += [made(w, finish=0.1, finish_learning_rate=3e-4, distil=4.0, rope="llama3")]
    return found


OURS = made(WEIGHTED, rope="llama3")
SEEDS = (0, 1, 2)


def rate(target: int) -> float:
    """The learning rate at which ours does best of a few, for all alike.

    The paper's settings do better at T at less (`methods`, `factors` have them at other rates too).
    """
    return 3e-4 if target <= 2048 else 5e-4


def at(setting: Setting, target: int, **changes: Any) -> Setting:
    lr = 5e-4 if setting.method == "full" else rate(target)
    return made(setting, target=target, **{"learning_rate": lr, **changes})


FINISHED = made(OURS, finish=0.1, finish_learning_rate=3e-4)
LINEAR = made(PAPER, rope="linear")
NONE = made(method="none")


def methods() -> list[Setting]:
    """None, full, randpos, PoSE as published, and what is added to it one by one; f = 8."""
    off = made(NONE, rope_off=True)
    steps = [PAPER, ALIGNED, WEIGHTED, OURS, FINISHED, made(OURS, distil=1.5, distil_on="first")]
    found = [at(s, 2048, seed=seed) for seed in SEEDS for s in [*steps, FULL, LINEAR]]
    found += [at(made(method="randpos"), 2048, seed=seed) for seed in SEEDS[:2]]
    found += [at(s, 2048, tasks=RULER) for s in (off, NONE, PAPER, OURS, FULL)]
    found += [at(PAPER, 2048, learning_rate=lr) for lr in (1e-4, 2e-4)]
    return [*found, *(at(off, T) for T in TARGETS)]


def factors() -> list[Setting]:
    """f = 4 .. 64: the paper's settings, ours, full length."""
    found = []
    for T in (4096, 1024, 8192, 16384):
        seeds = SEEDS if T <= 4096 else SEEDS[:2]
        found += [at(s, T, seed=seed) for s in (PAPER, OURS) for seed in seeds]
        found += [at(s, T) for s in (LINEAR, FULL, FINISHED, WEIGHTED)]
        found += [at(PAPER, T, learning_rate=8e-4 - rate(T))]
    return found


def texts() -> list[Setting]:
    """Uniform, contiguous, aligned text, without and with weights; f = 8."""
    return [
        at(made(content=text, strength=strength), 2048, seed=seed)
        for seed in SEEDS
        for text in ("uniform", "contiguous", "aligned")
        for strength in (0.0, 1.0)
    ]


def chunks() -> list[Setting]:
    """N = 1, 2, 3, 4, 8, L with the paper's settings, and sorted gaps with weights; f = 8."""
    found = []
    for seed in SEEDS[:2]:
        found += [at(made(num_chunks=n), 2048, seed=seed) for n in (1, 2, 3, 4, 8, 256)]
        more = made(WEIGHTED, gaps="sorted")
        found += [at(made(more, num_chunks=n), 2048, seed=seed) for n in (3, 4)]
    return found


def scalings() -> list[Setting]:
    """Linear, NTK, YaRN, Llama 3, untrained and trained with the paper's settings and ours."""
    ropes = ("linear", "ntk", "yarn", "llama3")
    found = [at(made(s, rope=r), 2048) for r in ropes for s in (NONE, PAPER, WEIGHTED)]
    found += [at(made(WEIGHTED, rope=r), 2048, seed=1) for r in ropes]
    found += [at(made(WEIGHTED, beta_fast=8.0), 2048, seed=seed) for seed in SEEDS[:2]]
    return found


def training() -> list[Setting]:
    """Perplexity along training; LoRA ranks; what a longer training gives."""
    found = [at(s, 2048, curve=True) for s in (PAPER, OURS, FULL)]
    found += [at(made(OURS, lora_rank=r), 2048, learning_rate=1e-3) for r in (4, 16, 64)]
    found += [at(s, 2048, steps=n) for s in (PAPER, OURS, FULL) for n in (100, 1000)]
    return found


DISTILLED = made(OURS, distil=1.5, distil_on="first")
HALVED = made(DISTILLED, cut="first-half")  # tried for far targets


def distilled() -> list[Setting]:
    """Self-distillation at other factors, and with a finish."""
    finishes = [made(DISTILLED, finish=0.1, finish_learning_rate=lr) for lr in (1e-4, 3e-4)]
    found = [at(finish, 2048, seed=seed) for finish in finishes for seed in SEEDS]
    found += [at(DISTILLED, T, seed=seed) for seed in SEEDS for T in (1024, 4096)]
    return [*found, *(at(s, T) for T in (8192, 16384) for s in (DISTILLED, HALVED, PAPER))]


def finishes() -> list[Setting]:
    """Full-length tokens without self-distillation, in a phase of their own or among the skips."""
    found = []
    for seed in SEEDS:
        base = at(made(DISTILLED, finish=0.1, finish_distil=False), 2048, seed=seed)
        found += [made(base, finish_learning_rate=lr) for lr in (1e-4, 3e-4, 6e-4)]
        for lr in (3e-4, 5e-4):
            found += [made(base, finish_at="spread", learning_rate=lr)]
    found += [at(made(found[0], finish_at=way), 2048) for way in ("first", "last")]
    return [made(s, tasks=("passkey",)) for s in found]


def longer() -> list[Setting]:
    """1,000 steps, as `skipwise extend` takes; a stronger hold on short length where T is far."""
    found = []
    for T in TARGETS[:4]:
        ours = DISTILLED if T < 8192 else HALVED
        found += [at(s, T, steps=1000) for s in (ours, PAPER)]
        if T >= 4096:
            found += [at(made(ours, distil=d), T) for d in (4.0, 12.0)]
            found += [at(made(ours, distil=4.0), T, learning_rate=1e-3)]
            found += [at(made(ours, plain_fraction=0.2), T)]
    return [made(s, tasks=("passkey",)) for s in found]


MIXED = made(DISTILLED, plain_fraction=0.2)


def mixed() -> list[Setting]:
    """Plain examples beside self-distillation, which covers all their tokens."""
    found = [at(MIXED, T, seed=seed) for T in (2048, 1024) for seed in SEEDS]
    return [made(s, tasks=("passkey",)) for s in found]


def dial() -> list[Setting]:
    """Training lengths M from L/2 to T at equal tokens, distilled up to 2L; dial.py runs them."""
    found = []
    for seed in SEEDS:
        for T in (2048, 8192):
            lengths = (L, 2 * L, 4 * L, 8 * L, L // 2)
            plain = [at(OURS, T, train_length=M) for M in lengths if T > M]
            taught = [at(DISTILLED, T, train_length=M) for M in (L, 2 * L, L // 2)]
            both = [taught[0], *plain[1:3], at(FULL, T, rope="llama3"), *plain, *taught]
            found += [made(s, seed=seed, tasks=("passkey",)) for s in both]
    return list(dict.fromkeys(found))


SWEEPS = {  # wide searches of one seed, which --smoke leaves out
    "single_changes": single_changes,
    "lower_rates": lower_rates,
    "distilled_scalings": distilled_scalings,
}
TABLES = {
    "distilled": distilled,
    "finishes": finishes,
    "longer": longer,
    "mixed": mixed,
    "methods": methods,
    "factors": factors,
    "texts": texts,
    "chunks": chunks,
    "scalings": scalings,
    "training": training,
    **SWEEPS,
}
