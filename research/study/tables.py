"""The study's tables, each as Markdown; a function's name is that of its block in the page."""

from __future__ import annotations

from typing import Any

from rows import NOT_MEASURED, Rows, lengths_of, newest, table, taken
from settings import (
    ALIGNED,
    DISTILLED,
    FINISHED,
    FULL,
    HALVED,
    LINEAR,
    NONE,
    OURS,
    PAPER,
    RULER,
    TARGETS,
    WEIGHTED,
    L,
    Setting,
    at,
    made,
)

OFF = made(NONE, rope_off=True)


def methods(rows: Rows) -> str:
    T = 2048
    steps = [
        ("base model", at(OFF, T), False),
        ("YaRN, untrained", _untrained(rows, "yarn"), False),
        ("RandPos", at(made(method="randpos"), T), False),
        ("PoSE as published, linear", at(LINEAR, T), False),
        ("PoSE as published, YaRN", at(PAPER, T), False),
        ("+ aligned text", at(ALIGNED, T), False),
        ("+ importance weights", at(WEIGHTED, T), False),
        ("+ llama3 instead of YaRN", at(OURS, T), False),
        ("+ temperature", at(OURS, T), True),
        ("+ self-distillation", at(DISTILLED, T), True),
        ("+ 10 % of the tokens at full length", at(_finish(3e-4), T), True),
        ("... at a third of the rate", at(_finish(1e-4), T), True),
        ("without distillation, 10 % at full length", at(FINISHED, T), True),
        ("full length, equal tokens", at(FULL, T), False),
    ]
    return table(rows, "f = 8", T, steps)


def _untrained(rows: Rows, rope: str) -> Setting:
    """A scaling alone, as it was measured: what is said of the training that there is none of."""
    one = at(made(NONE, rope=rope), 2048)
    return one if rows.of(one) else made(one, content="aligned")


def _finish(learning_rate: float) -> Setting:
    return made(DISTILLED, finish=0.1, finish_learning_rate=learning_rate)


def factors(rows: Rows) -> str:
    parts = []
    for T in TARGETS:
        lines = [
            ("base model", at(OFF, T), False),
            ("PoSE as published, linear", at(LINEAR, T), False),
            ("PoSE as published, YaRN", at(PAPER, T), False),
            ("defaults without distillation", at(OURS, T), True),
            ("defaults", at(DISTILLED, T), True),
            ("full length, equal tokens", at(FULL, T), False),
        ]
        parts.append(table(rows, f"f = {T // L}", T, lines))
    return "\n\n".join(parts)


def texts(rows: Rows) -> str:
    lines = [
        (
            f"{text}{', weights' if strength else ''}",
            at(made(content=text, strength=strength), 2048),
        )
        for strength in (0.0, 1.0)
        for text in ("uniform", "contiguous", "aligned")
    ]
    return table(rows, "text", 2048, [(name, s, False) for name, s in lines])


def chunks(rows: Rows) -> str:
    lines = [(f"N = {n}, as published", at(made(num_chunks=n), 2048)) for n in (1, 2, 3, 4, 8, 256)]
    more = made(WEIGHTED, gaps="sorted")
    lines += [("N = 2, aligned, weights", at(WEIGHTED, 2048))]
    lines += [
        (f"N = {n}, the same, sorted gaps", at(made(more, num_chunks=n), 2048)) for n in (3, 4)
    ]
    return table(rows, "chunks", 2048, [(name, s, False) for name, s in lines])


def scalings(rows: Rows) -> str:
    lines: list[tuple[str, Setting, bool]] = []
    for rope in ("linear", "ntk", "yarn", "llama3"):
        none, trained = _untrained(rows, rope), at(made(WEIGHTED, rope=rope), 2048)
        lines += [
            (f"{rope}, untrained", none, False),
            ("... with temperature", none, True),
            (f"{rope}, aligned text and weights", trained, False),
            ("... with temperature", trained, True),
        ]
    return table(rows, "scaling", 2048, lines)


def leads(rows: Rows) -> str:
    """What was tried one at a time, f = 8 and 32, by the perplexity at L and T with temperature."""
    lines = list(_SHORT)
    for T, lr in ((2048, 3e-4), (2048, 1e-3), (8192, 3e-4)):
        base = made(WEIGHTED, target=T, learning_rate=lr)
        lines += [
            _short(rows, f"{name}, rate {lr:g}", made(base, **changes))
            for name, changes in _LEADS
            if rows.of(made(base, **changes))
        ]
    return "\n".join(lines)


_SHORT = ("| | seeds | at 256 | at T | passkeys at T | f |", "|---|---:|---:|---:|---:|---:|")


def _short(rows: Rows, name: str, setting: Setting, *, tempered: bool = True) -> str:
    near, far, key = rows.both(setting, tempered=tempered)
    count, f = len(rows.of(setting)) or NOT_MEASURED, setting.target // L
    return f"| {name} | {count} | {near} | {far} | {key} | {f} |"


def finishes(rows: Rows) -> str:
    """A tenth of the tokens at full length, f = 8, by where they stand; with temperature."""
    silent = made(DISTILLED, finish=0.1, finish_distil=False)
    lines = [
        ("none", DISTILLED),
        *((f"last, taught, from {lr:g}", _finish(lr)) for lr in (1e-4, 3e-4)),
        *(
            (f"last, not taught, from {lr:g}", made(silent, finish_learning_rate=lr))
            for lr in (1e-4, 3e-4, 6e-4)
        ),
        ("last, one schedule", made(silent, finish_at="last", finish_learning_rate=1e-4)),
        ("first, one schedule", made(silent, finish_at="first", finish_learning_rate=1e-4)),
    ]
    found = [_short(rows, name, at(setting, 2048)) for name, setting in lines]
    for rate in (3e-4, 5e-4):
        spread = at(made(silent, finish_at="spread"), 2048, learning_rate=rate)
        found.append(_short(rows, f"every tenth step, all from {rate:g}", spread))
    full = _short(rows, "full length, equal tokens", at(FULL, 2048), tempered=False)
    return "\n".join([*_SHORT, *found, full])


def steps(rows: Rows) -> str:
    """More steps, LoRA, and a stronger hold on short length, f = 4 to 32."""
    lines = list(_SHORT)
    kinds = (("PoSE as published, YaRN", PAPER, False), ("distilled", DISTILLED, True))
    for T in TARGETS[:4]:
        for n in (300, 1000):
            lines += [
                _short(rows, f"{name}, {n:,} steps", at(s, T, steps=n), tempered=t)
                for name, s, t in kinds
                if rows.of(at(s, T, steps=n))
            ]
        halved = at(HALVED, T, steps=1000)
        if rows.of(halved):
            lines.append(_short(rows, "distilled, cut in the first half, 1,000 steps", halved))
    for n in (100, 300, 1000):
        for name, s, t in (
            ("without distillation", OURS, True),
            ("full length", FULL, False),
        ):
            lines.append(_short(rows, f"{name}, {n:,} steps", at(s, 2048, steps=n), tempered=t))
    for rank in (4, 16, 64):
        lora = at(made(OURS, lora_rank=rank), 2048, learning_rate=1e-3)
        lines.append(_short(rows, f"without distillation, LoRA rank {rank}, rate 0.001", lora))
    return "\n".join(lines)


def short(rows: Rows) -> str:
    """What holds short length, by f."""
    lines = list(_SHORT)
    for T in TARGETS:
        base = at(made(NONE, rope_off=True), T)
        lines.append(_short(rows, "base model", base, tempered=False))
        lines.append(_short(rows, "without distillation", at(OURS, T)))
        for start, cut in ((DISTILLED, ""), (HALVED, ", cut in the first half")):
            for name, setting in (
                ("distilled", at(start, T)),
                ("20 % plain, distilled", at(made(start, plain_fraction=0.2), T)),
                ("distilled, 4 for 1.5", at(made(start, distil=4.0), T)),
                (
                    "distilled, 4 for 1.5, rate 0.001",
                    at(made(start, distil=4.0), T, learning_rate=1e-3),
                ),
                ("distilled, 12 for 1.5", at(made(start, distil=12.0), T)),
            ):
                if rows.of(setting):
                    lines.append(_short(rows, name + cut, setting))
    return "\n".join(lines)


def ruler(rows: Rows) -> str:
    """RULER-like tasks and needles at f = 8, by context length."""
    T, tasks = 2048, RULER[1:]
    lengths = [str(n) for n in lengths_of(T)]
    lines = ["| f = 8 | " + " | ".join(tasks) + " |", "|---|" + "---:|" * len(tasks)]
    for name, setting, tempered in (
        ("base model", at(OFF, T), False),
        ("YaRN, untrained", at(NONE, T), False),
        ("PoSE as published, YaRN", at(PAPER, T), False),
        ("defaults without distillation", at(OURS, T), True),
        ("full length, equal tokens", at(FULL, T), False),
    ):
        found = [r for r in rows.all_of(setting) if tasks[-1] in r]
        if not found:
            lines.append(f"| {name} | {NOT_MEASURED} |" + " |" * (len(tasks) - 1))
            continue
        row = taken(found[0], tempered)
        cells = [
            " / ".join(f"{100 * row[t][n]:.0f}" for n in lengths if n in row[t]) for t in tasks
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def real_size() -> str:
    """A model of 126 M parameters, 512 to 32,768 tokens."""
    found = newest("real_size")
    if found is None:
        return NOT_MEASURED
    arms = found["arms"]
    lengths = list(next(iter(arms.values()))["perplexity"])
    lines = [
        "| f = 64 | seconds | " + " | ".join(f"{int(n):,}" for n in lengths) + " | key 32,768 |",
        "|---|---:|" + "---:|" * (len(lengths) + 1),
    ]
    for name in [*(name for name in _ARMS if name in arms), *(n for n in arms if n not in _ARMS)]:
        arm, shown = arms[name], _ARMS.get(name, name)
        if arm["settings"].get("positions", {}).get("cut") == "first-half":
            shown += ", cut in the first half"
        values = [f"{arm['perplexity'][n][0]:.2f}" for n in lengths]
        seconds = f"{arm['seconds']:.0f}" if "seconds" in arm else ""
        key = f"{100 * arm['passkey'][lengths[-1]]:.0f}"
        lines.append(f"| {shown} | {seconds} | {' | '.join(values)} | {key} |")
    return "\n".join(lines)


_ARMS = {
    "base": "base model",
    "none": "YaRN, untrained",
    "paper": "PoSE as published, YaRN",
    "defaults": "defaults",
    "defaults, 1400 steps": "defaults, 1,400 steps",
    "full-length 32768": "full length, equal tokens",
}


_DISTIL = {"distil": 0.5, "plain_fraction": 0.2}
_LEADS: list[tuple[str, dict[str, Any]]] = [
    ("aligned text, weights, YaRN", {}),
    ("no weights", {"strength": 0.0}),
    *((f"weights' logarithm times {s:g}", {"strength": s}) for s in (0.25, 0.5, 0.75, 1.25)),
    *((f"{p:.0%} plain examples", {"plain_fraction": p}) for p in (0.1, 0.2, 0.4)),
    ("20 % plain, distilled on them (0.5)", _DISTIL),
    *(
        (f"distilled on first chunks ({d:g})", {"distil": d, "distil_on": "first"})
        for d in (0.2, 0.5, 1.5)
    ),
    ("cut in the first half", {"cut": "first-half"}),
    *((f"N = {n}, sorted gaps", {"num_chunks": n, "gaps": "sorted"}) for n in (3, 4, 8, 16, 32)),
    *((f"{n} sections before near text", {"variant": f"sections:{n}"}) for n in (4, 8, 16, 32)),
    *((f"most related of {n} draws", {"variant": f"related:{n}"}) for n in (4, 16, 64)),
    ("10 % end at the last position", {"variant": "topup:0.1"}),
    ("CREAM with weights", {"method": "cream"}),
    ("60 warm-up steps", {"warmup": 60}),
    ("AdamW beta2 = 0.999", {"beta2": 0.999}),
    ("LoRA rank 16", {"lora_rank": 16}),
    ("100 steps", {"steps": 100}),
    ("1,000 steps", {"steps": 1000}),
    *(
        (f"10 % at full length, at {lr:g}", {"finish": 0.1, "finish_learning_rate": lr})
        for lr in (3e-4, 1e-3)
    ),
    ("30 % at full length", {"finish": 0.3, "finish_learning_rate": 3e-4}),
]


def bars(rows: Rows) -> str:
    """Perplexity at T, with seeds, against the paper's settings and against full length."""
    lines = [
        "| f | paper, YaRN | at its best rate | without distillation | defaults | full length | "
        "defaults over paper at its best | behind full length |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for T in TARGETS:
        tried = [at(PAPER, T, learning_rate=rate) for rate in _rates(rows, T)]
        means = {s: mean for s in tried if (mean := rows.mean(s, T)) is not None}
        best = min(means, key=means.__getitem__, default=at(PAPER, T))
        chosen = (
            (at(PAPER, T), False),
            (best, False),
            (at(OURS, T), True),
            (at(DISTILLED, T), True),
            (at(FULL, T), False),
        )
        cells, values = [], []
        for setting, tempered in chosen:
            value = rows.mean(setting, T, tempered=tempered)
            values.append(value)
            cells.append(f"{value:.2f} ({len(rows.of(setting))})" if value else NOT_MEASURED)
        _, lowest, _, ours, full = values
        over = f"{100 * (ours / lowest - 1):+.1f} %" if ours and lowest else NOT_MEASURED
        behind = f"{100 * (ours / full - 1):+.1f} %" if ours and full else NOT_MEASURED
        lines.append(f"| {T // L} | {' | '.join(cells)} | {over} | {behind} |")
    return "\n".join(lines)


def _rates(rows: Rows, target: int) -> list[float]:
    """Learning rates that the paper's settings were trained at, for a target."""
    settings = [row["setting"] for row in rows.rows if row["setting"]["target"] == target]
    return sorted({s["learning_rate"] for s in settings})


def cost() -> str:
    """Mistral 7B's shape on a GPU."""
    found = newest("method_cost")
    lines = [
        "| | example | peak GiB | seconds an example | hours for 1,000 x 64 examples' tokens |",
        "|---|---|---:|---:|---:|",
    ]
    for row in found["rows"] if found else []:
        kind = "PoSE" if row["method"] == "pose" else "full length"
        memory = row["memory"][-1]["peak_gib"]
        lines.append(
            f"| {row['mode']}, {kind} to {row['target_length']:,} | {row['train_length']:,} tokens "
            f"| {memory:.1f} | {row['seconds_per_example']:.2f} | {row['hours_same_tokens']:.1f} |"
        )
    return "\n".join(lines) if found else NOT_MEASURED


def efficiency() -> str:
    """The tiny model's step by target: MiB that it adds, seconds for 100 of them."""
    found = newest("study_efficiency")
    if found is None:
        return NOT_MEASURED
    rows = {(row["method"], row["target"]): row for row in found["rows"]}
    targets = sorted({target for _, target in rows})
    titles = [f"{T:,}: MiB, s" for T in targets]
    lines = ["| target | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(targets)]
    for method in ("pose", "pose, weighted", "full"):
        cells = [
            f"{row['peak_mib']:,.0f}, {row['seconds_per_100_steps']:,.0f}"
            if (row := rows.get((method, T)))
            else NOT_MEASURED
            for T in targets
        ]
        lines.append(f"| {_METHODS[method]} | {' | '.join(cells)} |")
    return "\n".join(lines)


_METHODS = {"pose": "PoSE", "pose, weighted": "PoSE, importance weights", "full": "full length"}


def tables() -> dict[str, str]:
    rows = Rows()
    of_rows = (bars, methods, factors, texts, chunks, scalings, leads)
    of_rows += (finishes, steps, short, ruler)
    others = (cost, efficiency, real_size)
    return {one.__name__: one(rows) for one in of_rows} | {one.__name__: one() for one in others}
