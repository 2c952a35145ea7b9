"""Sections that show how a run was made: checkpoint choice, training, positions, cost, checks."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from skipwise.report.figures import alt_text, curves
from skipwise.report.figures.positions import plot_positions
from skipwise.report.format import duration, number, percent, short_count
from skipwise.report.load import all_training, count, nested
from skipwise.report.page.html import MISSING, Section, definitions, figure, note, table


def selection_section(run: dict[str, Any], png_folder: Path | None) -> Section | None:
    """How the checkpoint was chosen; None if none was."""
    selection = nested(run, "selection")
    points, chosen = curves.scored_checkpoints(selection), selection.get("chosen")
    share = curves.is_share_of(selection)
    measure = str(selection.get("metric") or "score")
    if selection.get("by"):
        measure += f" on {selection['by']}"
    better = "higher" if selection.get("higher_is_better", True) else "lower"
    said = f"By {measure}, {better} is better, of {len(points):,} checkpoints with a score. "
    if chosen is not None:
        score = dict(points).get(chosen)
        shown = "" if score is None else f", {f'{percent(score)} %' if share else number(score)}"
        said += f"Chosen: step {chosen:,}{shown}. "
    said += "The best of several scores is biased upwards by the choice itself."
    drawn = figure(
        png_folder,
        "selection",
        lambda width: curves.plot_selection(selection, width),
        lambda: alt_text.describe_selection(points, chosen, share),
        said,
    )
    if not points and chosen is None:
        return None
    return Section("Choice of the checkpoint", drawn or note(said))


def loss_section(
    run: dict[str, Any], metrics: list[dict[str, Any]], png_folder: Path | None
) -> Section:
    first = curves.finish_step(metrics)
    finish = "" if first is None else f" From step {first:,} on examples have full length."
    drawn = figure(
        png_folder,
        "loss",
        lambda width: curves.plot_loss(metrics, width),
        lambda: alt_text.describe_loss(metrics),
        "Pale: every logged step, or the range in bins if there are over 400. Strong: the running "
        f"mean over a twentieth of the steps.{finish}{_not_comparable(run, metrics)}",
    )
    return Section("Training loss", drawn or MISSING)


def _not_comparable(run: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    """Why the training loss says nothing beside the base's loss or perplexity."""
    L, T = run.get("train_length"), run.get("target_length")
    parts = ["is of examples with skipped positions"] if L and T and L < T else []
    if any("distillation" in line for line in metrics):
        parts.append("includes the distance to the base's predictions (distillation)")
    why = f"It {' and '.join(parts)}: do" if parts else "Do"
    return f" {why} not compare it with the base's loss or with the perplexities above."


def positions_section(run: dict[str, Any], png_folder: Path | None) -> Section:
    """The positions of training examples, and which relative distances they show."""
    title, positions = "Positions seen in training", nested(run, "positions")
    L, T = run.get("train_length"), run.get("target_length")
    examples = positions.get("examples") or []
    pairs = zip(positions.get("distances") or [], positions.get("coverage") or [], strict=False)
    coverage = [(d, share) for d, share in pairs if share is not None]
    if not (examples and coverage and L and T):
        if png_folder is not None:
            (png_folder / "positions.png").unlink(missing_ok=True)
        return Section(title, _untrained(run))
    drawn = figure(
        png_folder,
        "positions",
        lambda width: plot_positions(examples, coverage, L, T, width),
        lambda: alt_text.describe_positions(examples, coverage, L, T),
        f"Each row is an example of {L:,} tokens, cut into chunks (colours) whose positions skip "
        "ahead. Below: how many of the examples show two tokens at each relative distance. "
        + str(positions.get("sampler") or ""),
    )
    return Section(title, drawn)


def cost_section(run: dict[str, Any]) -> Section:
    """Tokens and attention pairs of the run, and of full-length training."""
    return Section("Cost compared with full-length training", _cost(run))


def _cost(run: dict[str, Any]) -> str:
    training, L, T = nested(run, "training"), run.get("train_length"), run.get("target_length")
    if not training or not L or not T:
        return _untrained(run)
    if not training.get("num_steps") or not training.get("batch_size"):
        return '<p class="note">The number of examples was not recorded.</p>'
    num = training["num_steps"] * training["batch_size"]
    finish = nested(run, "finish")
    long = finish.get("num_tokens", 0) // T if finish.get("seconds") is not None else 0
    tokens = num * L + long * T
    lines = (
        ("This run", tokens, num * L * (L + 1) // 2 + long * T * (T + 1) // 2),
        ("Full length, as many examples", (num + long) * T, (num + long) * T * (T + 1) // 2),
        ("Full length, as many tokens", tokens, tokens * (T + 1) // 2),
    )
    counts = [(n, short_count(t) if t >= 1e8 else f"{t:,}", pairs) for n, t, pairs in lines]
    ratios = [p / lines[0][2] for *_, p in counts]
    shown = [f"{ratio:,.0f}×" if ratio >= 100 else f"{ratio:.3g}×" for ratio in ratios]
    cells = [[n, t, short_count(p), one] for (n, t, p), one in zip(counts, shown, strict=True)]
    said = [f"{_spent(training, num * L)}."]
    if long:
        share = percent(finish["share"])
        said += [f"Then {share} % of all tokens at full length: {_spent(finish, long * T)}."]
    return (
        "".join(f"<p>{escape(text)}</p>\n" for text in said)
        + table(["", "Tokens", "Attention pairs", "Ratio to this run"], cells)
        + f'<p class="note">{num:,} examples of {L:,} tokens'
        f"{f' and {long:,} of {T:,}' if long else ''}; full length is {T:,}. "
        "Attention pairs are the query-key pairs of one causal layer and head, n (n + 1) / 2 ≈ "
        f"n² / 2 for an example of n tokens: at equal tokens the ratio is about T / L = {T / L:.3g}"
        f", at equal examples its square. These pairs are counted, not timed; only the attention "
        "share of a step grows this way.</p>"
    )


def _spent(taken: dict[str, Any], num_tokens: int) -> str:
    """Steps, time and memory of one training stage."""
    spent = [f"{taken['num_steps']:,} steps of {taken['batch_size']:,} examples"]
    if taken.get("seconds"):
        speed = num_tokens / taken["seconds"]
        spent.append(f"{duration(taken['seconds'])}, {speed:,.0f} tokens a second")
    if taken.get("peak_memory_gib"):
        each = " per process" if taken.get("num_processes", 1) > 1 else ""
        spent.append(f"{taken['peak_memory_gib']:.2f} GiB peak memory{each}")
    return "; ".join(spent)


def checks_section(run: dict[str, Any]) -> Section:
    """The checks that failed or warn; those that passed are folded."""
    items: dict[str, list[str]] = {"failed": [], "warn": [], "passed": []}
    for check in run.get("checks") or []:
        kind = "warn" if check.get("is_warning") else "passed"
        kind = kind if check.get("passed") else "failed"
        word = "ok" if kind == "passed" else kind
        text = escape(f"{check.get('name', '?')}: {check.get('detail', '')}")
        numbers = check.get("numbers")
        if isinstance(numbers, dict) and numbers:
            named = (f"{key.replace('_', ' ')} {_short_number(n)}" for key, n in numbers.items())
            text += f" <small>({escape(', '.join(named))})</small>"
        items[kind].append(f'<li class="{kind}"><b>{word}</b><span>{text}</span></li>')
    shown, passed = "".join(items["failed"] + items["warn"]), items["passed"]
    body = f'<ul class="checks">{shown}</ul>' if shown else ""
    if passed:
        summary = f"{len(passed)} {'check' if len(passed) == 1 else 'checks'} passed"
        folded = f'<ul class="checks">{"".join(passed)}</ul>'
        body += f"<details><summary>{summary}</summary>{folded}</details>"
    return Section("Checks", body or note("No check was run."))


def _short_number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def details_section(run: dict[str, Any]) -> Section:
    """Model, lengths, data, machine, times and versions."""
    keys = ("model", "data", "machine", "training")
    model, data, machine, training = (nested(run, key) for key in keys)
    parameters = count(model, "num_parameters", "parameters")
    lengths = [
        f"{run[key]:,} {key.removesuffix('_length')}"
        for key in ("original_length", "train_length", "target_length")
        if run.get(key)
    ]
    trained = [count(training, "trainable_parameters", "parameters"), training.get("mode")]
    if training.get("num_processes", 1) > 1:
        trained.append(f"{training.get('engine', '?')} over {training['num_processes']} processes")
    shorts = count(data, "num_short", "short ones")
    documents = [
        count(data, "num_documents", "documents"),
        count(data, "num_tokens", "tokens"),
        f"{shorts} ({data.get('short_documents', '?')})" if shorts else None,
        count(data, "num_bad_records", "unreadable records"),
    ]
    memory = f"{machine['memory_gib']} GiB" if machine.get("memory_gib") else None
    hardware = [machine.get("cpu"), count(machine, "num_cpus", "CPUs"), memory]
    gpu = machine.get("gpu") or "no GPU"
    if machine.get("num_gpus", 1) > 1:
        gpu = f"{machine['num_gpus']} × {gpu}"
    stages = nested(run, "stages").items()
    entries = {
        "Model": [model.get("name"), model.get("family"), parameters],
        "Lengths": lengths,
        "Trained": trained if training else [],
        "RoPE": [f"{k} {v}" for k, v in nested(run, "rope").items()],
        "Text": data.get("sources") or [],
        "Documents": documents,
        "Evaluation": [count(data, "num_eval_documents", "documents held out")],
        "Machine": [*hardware, gpu] if machine else ["not recorded"],
        "Time": [f"{k} {duration(v)}".replace(" ", "\u00a0") for k, v in stages if v is not None],
        "Versions": [f"{k} {v}" for k, v in nested(run, "versions").items()],
    }
    return Section("Data, model and machine", definitions(entries))


def training_tiles(run: dict[str, Any]) -> list[tuple[str, str]]:
    """Tokens, time and memory of the training, for the tiles at the top."""
    training = all_training(run)
    tiles = []
    if training.get("num_tokens"):
        tiles.append((short_count(training["num_tokens"]), "tokens of training"))
    if training.get("seconds"):
        tiles.append((duration(training["seconds"]), "of training"))
    if training.get("peak_memory_gib"):
        tiles.append((f"{training['peak_memory_gib']:.2f} GiB", "peak memory of training"))
    return tiles


def _untrained(run: dict[str, Any]) -> str:
    if run.get("training"):
        return '<p class="note">Not recorded.</p>'
    done = run.get("status") in (None, "finished")
    text = "Nothing was trained." if done else "No finished training is recorded."
    return f'<p class="note">{text}</p>'
