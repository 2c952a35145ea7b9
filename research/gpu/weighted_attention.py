"""Attention with a weight for each chunk's keys: which kernel costs least, in a layer and a step.

    python research/gpu/weighted_attention.py           # one H100 or H200, 150 seconds at most
    python research/gpu/weighted_attention.py --tiny    # CPU, seconds: every formula, no timing

A query adds w_c to its logits for the keys of an earlier chunk c and 0 inside its own chunk. As an
additive (B, 1, L, L) mask that leaves the flash kernels. The bar: a weighted training step costs at
most 3 % over the unweighted one. The candidates are in weighted_kernels.py and weighted_pieces.py,
their names in weighted_model.py, what --tiny checks in weighted_checks.py; here they are measured.
Two processes, each within its own time limit, so that a kernel that hangs or breaks the CUDA
context spoils only what comes after it there; what was measured until then is kept.

Shapes:  B = batch, L = tokens, N = chunks, H = heads (K of keys), D = their width, T = B x L
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from weighted_checks import check_all
from weighted_kernels import reference
from weighted_model import CANDIDATES, Step, errors, fresh, layout, run

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

GQA, MHA, SMALL = (32, 8, 128), (16, 16, 64), (32, 8, 64)  # heads, key heads, width
FIRST = [(GQA, 8192, 1, 2), (GQA, 2048, 2, 4), (GQA, 8192, 1, 4), (MHA, 4096, 1, 2)]
REST = [
    (heads, length, batch, chunks)
    for length in (2048, 4096, 8192)
    for heads in (GQA, MHA)
    for batch in (1, 2)
    for chunks in (2, 4)
    if (heads, length, batch, chunks) not in FIRST
]
STEPS = {  # config, tokens, batch
    "hidden 4096, L 8192, B 1": ((4096, 14336, GQA), 8192, 1),
    "hidden 2048, L 2048, B 4": ((2048, 8192, SMALL), 2048, 4),
}
GROUPS = {  # seconds, candidates: those that could break a context come second, the worst last
    "triton": (86, ["mask", "features", "pieces flash", "pieces flash host", "flex", "flex keys"]),
    "cudnn": (
        52,
        [
            "unweighted flash",
            "unweighted cudnn",
            "bias cudnn",
            "bias cudnn keys",
            "features cudnn",
        ],
    ),
}
TWO_CHUNKS = {"flex keys", "bias cudnn keys"}  # exact for N = 2 only
FOUR_CHUNKS = {"flex", "pieces flash", "bias cudnn"}  # steps of N = 4 as well


def milliseconds(once, repeats=8):
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        once()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in times)


def failure(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class Out:
    """What was measured so far, written after each figure."""

    def __init__(self, file, ends):
        self.file, self.ends = Path(file), ends
        self.figures = {"layers": [], "steps": [], "notes": []}

    def left(self):
        return self.ends - time.time()

    def add(self, key, row):
        self.figures[key].append(row)
        if "CUDA error" in row.get("error", ""):
            row["stopped"] = "the context is broken, nothing more can be measured in this process"
        self.file.write_text(json.dumps(self.figures), encoding="utf-8")
        print(f"[{self.left():.0f} s left]", json.dumps(row), flush=True)
        if "stopped" in row:
            raise SystemExit(3)


def layers(out, names, shape, rng, device="cuda"):
    """Time, memory and error of forward and backward of one attention layer."""
    if out.left() < 6:
        return
    (H, K, D), length, batch, num_chunks = shape
    chunks, _ = layout(length, batch, num_chunks, rng, device)
    qkv, grad = fresh((H, K, D), length, batch, device)
    key = {"heads": f"{H}/{K}x{D}", "length": length, "batch": batch, "chunks": num_chunks}
    expected = reference(*qkv, grad, chunks, D**-0.5)
    plain = reference(*qkv, grad, chunks.without_weights(), D**-0.5)
    base = None
    for name in ["unweighted", *names]:
        if name in TWO_CHUNKS and num_chunks != 2:
            continue
        if out.left() < 3:
            return
        row = {**key, "name": name}
        try:
            flex_attention_forward = CANDIDATES[name]
            torch.cuda.synchronize()
            before, began = torch.cuda.memory_allocated(), time.monotonic()
            found = run(flex_attention_forward, qkv, chunks, grad)
            torch.cuda.synchronize()
            row["first_seconds"] = round(time.monotonic() - began, 2)
            off = errors(found, plain if name.startswith("unweighted") else expected)
            row["errors"] = {k: float(f"{v:.2g}") for k, v in off.items()}
            del found
            run(flex_attention_forward, qkv, chunks, grad)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            took = milliseconds(lambda a=flex_attention_forward: run(a, qkv, chunks, grad))
            row["extra_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
            base = base or took
            row["milliseconds"], row["ratio"] = round(took, 3), round(took / base, 3)
        except Exception as error:
            row["error"] = failure(error)
        out.add("layers", row)


def backends(heads, length, device="cuda"):
    """What sdpa chooses by itself, unweighted, with the mask and with wider heads."""
    H, K, D = heads
    (q, k, v), _ = fresh(heads, length, 1, device)
    (wide_q, wide_k, wide_v), _ = fresh((H, K, D + 8), length, 1, device)
    mask = torch.zeros(1, 1, length, length, dtype=q.dtype, device=device)
    k_all, v_all = (t.repeat_interleave(H // K, 1) for t in (k, v))
    choice = torch._fused_sdp_choice
    names = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
    found = {
        "unweighted": choice(q, k, v, None, 0.0, True, enable_gqa=True),
        "mask": choice(q, k_all, v_all, mask, 0.0, False),
        "features": choice(wide_q, wide_k, wide_v, None, 0.0, True, enable_gqa=True),
    }
    return {"heads": f"{H}/{K}x{D}"} | {
        name: names.get(int(c), int(c)) for name, c in found.items()
    }


def timed(step, name, chunks, positions):
    torch.cuda.synchronize()
    began = time.perf_counter()
    step(name, chunks, positions)
    torch.cuda.synchronize()
    return time.perf_counter() - began


def step_rows(out, kind, step, name, num_chunks, rng, seconds=1.6, pairs=12):
    """Median of the ratios of pairs (unweighted, candidate), each on the same new chunks."""
    row = {"step": kind, "chunks": num_chunks, "name": name}
    try:
        checks = step.layouts(1, num_chunks, rng)[0]
        losses, grads = [], []
        for which in ("mask", name):
            losses.append(float(step(which, *checks)))
            layer = step.model.model.layers[0].self_attn
            grads.append(torch.cat([p.grad.flatten().float() for p in layer.parameters()]))
        row["loss_over_mask"] = round(losses[1] - losses[0], 5)
        row["grad_off_mask"] = float(f"{(grads[1] - grads[0]).norm() / grads[0].norm():.2g}")
        del grads
        torch.cuda.reset_peak_memory_stats()
        step(name, *checks)
        row["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
        step("unweighted", *checks)
        ratios, bases, ends = [], [], time.monotonic() + seconds
        while len(ratios) < pairs and (time.monotonic() < ends or len(ratios) < 4):
            chunks = step.layouts(1, num_chunks, rng)[0]
            order = ["unweighted", name] if len(ratios) % 2 else [name, "unweighted"]
            took = [timed(step, which, *chunks) for which in order]
            base, ours = took if order[0] == "unweighted" else took[::-1]
            bases.append(base)
            ratios.append(ours / base)
        row["unweighted_milliseconds"] = round(1000 * median(bases), 1)
        row["ratio"], row["pairs"] = round(median(ratios), 4), len(ratios)
        row["spread"] = [round(float(x), 4) for x in np.quantile(ratios, [0.25, 0.75])]
    except Exception as error:
        row["error"] = failure(error)
    out.add("steps", row)


def group(name, file, ends):
    """One process: the first shapes, the steps, then the other shapes as far as time goes."""
    names = GROUPS[name][1]
    out, rng = Out(file, ends), np.random.default_rng(0)
    torch._dynamo.config.recompile_limit = 64
    torch.manual_seed(0)
    try:
        found = [backends(heads, 2048) for heads in (GQA, MHA, SMALL)]
        row = {"gpu": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version()}
        out.add("notes", row | {"sdpa_chooses": found})
    except Exception as error:
        out.add("notes", {"backends": failure(error)})
    flex = {"flex", "flex keys"}
    others = [n for n in names if n not in flex]
    layers(out, names, FIRST[0], rng)
    layers(out, others, FIRST[1], rng)
    for kind, (widths, length, batch) in STEPS.items():
        gc.collect()
        torch.cuda.empty_cache()
        step = Step(widths, length, batch)
        weighted = [n for n in names if not n.startswith("unweighted")]
        plan = [("unweighted", 2)] if name == "triton" else []  # against itself: the noise
        plan += [(n, 2) for n in weighted]
        plan += [(n, 4) for n in weighted if n in FOUR_CHUNKS]
        for which, num_chunks in plan:
            if out.left() > 5:
                step_rows(out, kind, step, which, num_chunks, rng)
        del step
    gc.collect()
    torch.cuda.empty_cache()
    for shape in FIRST[2:] + REST:
        layers(out, others, shape, rng)
    for shape in FIRST[1:] + REST:  # a compilation each
        if flex & set(names) and out.left() > 15:
            layers(out, sorted(flex & set(names)), shape, rng)


def table(figures):
    """A line a shape, then a line a step; errors once each."""
    shapes, failures = {}, {}
    for row in figures["layers"] + figures["steps"]:
        if "error" in row:
            failures.setdefault((row["name"], row["error"][:150]), []).append(row.get("step", ""))
    for row in figures["layers"]:
        key = f"{row['heads']} L{row['length']} B{row['batch']} N{row['chunks']}"
        cell = "failed"
        if "ratio" in row:
            worst = max(row["errors"].values())
            flag = "" if worst < 1e-2 else f" WRONG {worst:.1e}"
            cell = f"{row['ratio']:.2f}{flag}"
            if row["name"] == "unweighted":
                cell = f"{row['milliseconds']:.2f} ms"
        shapes.setdefault(key, []).append(f"{row['name']} {cell}")
    print("\nFAILURES (how often)")
    for (name, error), where in failures.items():
        print(f"{name} ({len(where)}): {error}")
    print("\nLAYERS: forward and backward, ratio to unweighted sdpa; WRONG: error of 1e-2 or more")
    for key, cells in shapes.items():
        print(f"{key}: {', '.join(cells)}")
    print("\nNOTES")
    for row in figures["notes"]:
        print(json.dumps(row))
    print("\nSTEPS: ratio to the unweighted step, median of pairs [quartiles]; bar 1.03")
    for row in figures["steps"]:
        if "ratio" in row:
            print(
                f"{row['step']} N{row['chunks']} {row['name']:<18} {row['ratio']:.3f}"
                f" {row['spread']} of {row['unweighted_milliseconds']} ms, {row['pairs']} pairs,"
                f" grad off mask {row['grad_off_mask']}, {row['peak_mib']} MiB"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", choices=list(GROUPS))
    parser.add_argument("--group", choices=list(GROUPS), help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    parser.add_argument("--ends", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.tiny:
        return check_all()
    if given.group:
        return group(given.group, given.file, given.ends)
    figures = {"layers": [], "steps": [], "notes": []}
    with tempfile.TemporaryDirectory() as folder:
        for name in [given.only] if given.only else list(GROUPS):
            file, seconds = Path(folder, name), GROUPS[name][0]
            began = [sys.executable, __file__, "--group", name, "--file", str(file)]
            child = subprocess.Popen([*began, "--ends", str(time.time() + seconds - 4)])
            try:
                code = child.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                child.kill()
                code = "killed at its time limit"
            figures["notes"].append({"group": name, "exit": code})
            if file.exists():
                for key, rows in json.loads(file.read_text(encoding="utf-8")).items():
                    figures[key] += rows
    try:
        common.write_result("weighted_attention", figures, show=False)
    except Exception as error:  # keep what was measured
        print("write_result:", failure(error))
        Path(os.environ.get("OUT", "."), "weighted_attention.json").write_text(json.dumps(figures))
    table(figures)


if __name__ == "__main__":
    main()
