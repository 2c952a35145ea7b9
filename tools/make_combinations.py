"""Write docs/combinations.md: which settings work together, by asking the code.

python tools/make_combinations.py

Each cell is made by what `skipwise check` calls before it loads weights, or by what `skipwise
export --verify` says of the config: "yes", or "no" with the first line of the refusal as a note.
The models are folders with a config.json, the bundled tokenizer and no weights that are read.

Letters: L = original_length, T = target_length
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints
from unittest.mock import patch

import numpy as np
import torch
from make_reference import GENERATED, ROOT, key_choices, markdown_table

from skipwise.config.distillation import distillation_weight
from skipwise.config.parse import parse_recipe
from skipwise.config.recipe import ModelSettings, Recipe, RopeSettings, TrainingSettings
from skipwise.errors import SkipwiseError
from skipwise.export.gguf.requirements import read_requirements, refuse
from skipwise.export.runtimes import Reading, verify_folder
from skipwise.models.attention.masks import FLEX
from skipwise.models.compatibility import make_portable
from skipwise.models.load import attention_for
from skipwise.models.lora import quantization_for
from skipwise.models.prepared import PreparedModel, prepare_model
from skipwise.pipeline.quickstart import MODEL
from skipwise.pose.rope import SCALINGS, Unscaled
from skipwise.training.setup import cuts_loss

L, T = 8192, 32768
_HYBRID = {  # sliding layers beside full ones, each kind with a RoPE of its own
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "head_dim": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 1024,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
    },
}
_PAGE = """\
# Supported combinations

{generated}

Each cell below is the answer of the code itself, for a Llama of {L:,} tokens that is extended to
{T:,} tokens, or for a Gemma 3 where a column says hybrid. "yes" means that no check refuses the
combination before the weights are loaded. "no" has the first line of the error as a note. The
preflight then tests the loaded model.

Other pages: [model families](families.md), [what was measured](scaling.md),
[how each runtime reads a config](serving.md).
"""


@dataclass
class Table:
    """Rows of cells; a refusal becomes "no" with the number of a note below the table."""

    heads: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, *cells: tuple[str, str]) -> None:
        """A row; each cell is (its words, a note or "")."""
        self.rows.append((f"`{name}`", *(self._cell(name, *cell) for cell in cells)))

    def _cell(self, name: str, words: str, note: str) -> str:
        if not note:
            return words
        key = self.heads[0].strip("`")
        note = note.replace(f"{key}: {name}", f"this `{key}`")  # one note for several rows
        if note not in self.notes:
            self.notes.append(note)
        return f"{words} ({self.notes.index(note) + 1})"

    def __str__(self) -> str:
        notes = "".join(f"{i}. {note}\n" for i, note in enumerate(self.notes, 1))
        return markdown_table(self.heads, self.rows) + ("\n" + notes if notes else "")


def answer(call: Callable[[], Any]) -> tuple[str, str]:
    """(yes, ""), or (no, the first line of the refusal)."""
    try:
        call()
    except SkipwiseError as error:
        return "no", str(error).partition("\n")[0]
    return "yes", ""


def model_folder(folder: Path, **config: Any) -> Path:
    """A model of L tokens whose config has these keys."""
    shutil.copytree(MODEL, folder)
    file = folder / "config.json"
    plain = json.loads(file.read_text(encoding="utf-8")) | {"max_position_embeddings": L}
    file.write_text(json.dumps(plain | config), encoding="utf-8")
    return folder


@contextmanager
def machine(nvidia: bool) -> Iterator[None]:
    """As on a machine with an NVIDIA GPU, or without one, whatever this one is."""
    reason = "" if nvidia else "flex_attention trains on NVIDIA GPUs alone"
    with patch("skipwise.models.attention.flex.unsupported_by_machine", lambda: reason):
        yield


def prepare(model: Path, *overrides: str) -> PreparedModel:
    """The checks of a recipe before any weight is loaded.

    Raises:
        SkipwiseError: the settings do not go together.
    """
    tree = {"model": str(model), "target_length": T}
    prepared = prepare_model(parse_recipe(tree, list(overrides)))
    quantization_for(prepared.recipe.lora, torch.bfloat16, prepared.recipe.engine)
    cuts_loss(prepared.recipe, L, prepared.info.vocab_size)
    return prepared


def choices(cls: Any, key: str) -> tuple[str, ...]:
    """The values of a key, but auto."""
    hint = get_type_hints(cls)[key.rpartition(".")[2]]
    return tuple(choice for choice in key_choices(key, hint) if choice != "auto")


def scalings_table(model: Path, scratch: Path) -> Table:
    table = Table(
        ("`rope.type`", "`auto` measures it", "trains", "`method: none`", "extended again")
    )
    for name in choices(RopeSettings, "rope.type"):
        asked = f"rope.type={name}"
        table.add(
            name,
            ("yes" if name in SCALINGS and SCALINGS[name].auto_candidate else "no", ""),
            answer(partial(prepare, model, asked)),
            answer(partial(prepare, model, asked, "method=none")),
            _extended_again(exported(model, name, scratch / f"base-{name}")),
        )
    return table


def exported(model: Path, scaling: str, folder: Path) -> Path:
    """A folder with the config that an export writes, for a model with this scaling."""
    prepared = prepare(model, f"rope.type={scaling}", "method=none")
    shutil.copytree(model, folder)
    prepared.scaled.save_pretrained(folder)
    make_portable(folder, T)
    return folder


def _extended_again(folder: Path) -> tuple[str, str]:
    """Whether a model that has this scaling can be extended from T to 4 T."""
    more = (f"target_length={4 * T}", f"original_length={T}")
    try:
        prepared = prepare(folder, *more)
    except SkipwiseError as error:
        return "no", str(error).partition("\n")[0]
    if isinstance(prepared.info.scaling, Unscaled):
        return "yes", "It is treated like a model without scaling."
    return "yes", ""


def runtimes_table(model: Path, scratch: Path) -> Table:
    """What each runtime loads of the exported config, by `skipwise export --verify`."""
    table, readings = Table(("`rope.type`",)), ()
    for name in choices(RopeSettings, "rope.type"):
        folder = exported(model, name, scratch / name)
        readings = verify_folder(folder, L).readings
        cells = [_as_trained(reading, readings[0]) for reading in readings]
        table.add(name, *cells, answer(lambda folder=folder: refuse(read_requirements(folder))))
    names = [r.runtime for r in readings[:-1]] + [f"{r.runtime}'s converter" for r in readings[-1:]]
    table.heads += (*names, "`export --to gguf`")
    return table


def _as_trained(reading: Reading, reference: Reading) -> tuple[str, str]:
    have, want = reading.inv_freq, reference.inv_freq
    if reading.error or have is None or want is None:
        return "no", f"{reading.runtime}: {reading.error}"
    same = np.allclose(have, want, rtol=1e-5, atol=0)
    if not same or abs(reading.attention_factor - reference.attention_factor) > 1e-5:
        plain = reading.rope_type == "default"
        return "no", "It loads without scaling." if plain else "It loads other RoPE frequencies."
    if reading.max_length == L and "transformers" not in reading.runtime:  # which has no limit
        return "yes", f"It reads a length of {L:,} tokens, not {T:,}: see [serving.md](serving.md)."
    return "yes", ""


def engines_table(model: Path) -> Table:
    lora, qlora, taught = "lora={}", "lora={quantization: nf4}", "distillation.weight=3"
    modes = {
        "full fine-tuning": ("distillation.weight=0",),
        "LoRA": (lora, "distillation.weight=0"),
        "QLoRA": (qlora, "distillation.weight=0"),
        "distillation": (taught,),
        "LoRA, distillation": (lora, taught),
        "QLoRA, distillation": (qlora, taught),
        "full-length stage": ("full_length.fraction=0.1",),
    }
    table = Table(("`engine`", *modes))
    for engine in choices(Recipe, "engine"):
        asked = f"engine={engine}"
        table.add(engine, *(answer(partial(prepare, model, asked, *m)) for m in modes.values()))
    return table


def attention_table(model: Path, hybrid: Path) -> Table:
    table = Table(
        (
            *("`load.attn_implementation`", "no key weights", "key weights, NVIDIA GPU"),
            *("key weights, other machine", "hybrid, no key weights", "hybrid, key weights"),
        )
    )
    for name in ("auto", *choices(ModelSettings, "load.attn_implementation")):
        cells = []
        for folder, weights, nvidia in (
            *((model, "none", True), (model, "importance", True), (model, "importance", False)),
            *((hybrid, "none", True), (hybrid, "importance", True)),
        ):
            asked = (f"load.attn_implementation={name}", f"positions.key_weights={weights}")
            with machine(nvidia):
                cells.append(_kernel(folder, asked))
        table.add(name, *cells)
    return table


def _kernel(folder: Path, asked: tuple[str, ...]) -> tuple[str, str]:
    """The attention that trains, or the refusal."""
    try:
        prepared = prepare(folder, *asked)
    except SkipwiseError as error:
        return "no", str(error).partition("\n")[0]
    recipe, info = prepared.recipe, prepared.info
    weights = recipe.positions.key_weights
    used = attention_for(recipe.load, weights, info.hybrid, prepared.scaled) or "sdpa"
    masked = weights != "none" and used != FLEX
    kernel = "flex_attention" if used == FLEX else used
    return f"yes: {kernel}{', additive mask' if masked else ''}", ""


def methods_table(model: Path) -> Table:
    settings = {
        "`positions.num_chunks=3`": ("positions.num_chunks=3",),
        "`positions.content=aligned`": ("positions.content=aligned",),
        "`positions.key_weights=importance`": ("positions.key_weights=importance",),
        "`distillation.weight=3`": ("distillation.weight=3",),
        "`full_length.fraction=0.1`": ("full_length.fraction=0.1",),
    }
    table = Table(("`method`", *settings, "`distillation.weight=auto`"))
    for method in choices(Recipe, "method"):
        if method == "none":  # nothing trains, so none of these has an effect
            continue
        asked = f"method={method}"
        cells = [answer(partial(prepare, model, asked, *extra)) for extra in settings.values()]
        weight, reason = distillation_weight(prepare(model, asked).recipe)
        table.add(method, *cells, (f"w = {weight:g}", reason))
    return table


def losses_table(model: Path) -> Table:
    settings = {
        "alone": ("distillation.weight=0",),
        "`distillation.weight=3`": ("distillation.weight=3",),
        "`trainer.use_liger_kernel=true`": ("trainer.use_liger_kernel=true",),
    }
    table = Table(("`training.loss`", *settings))
    for loss in ("auto", *choices(TrainingSettings, "training.loss")):
        asked = f"training.loss={loss}"
        table.add(loss, *(answer(partial(prepare, model, asked, *s)) for s in settings.values()))
    return table


def page() -> str:
    with tempfile.TemporaryDirectory() as name, machine(nvidia=True):
        scratch = Path(name)
        model = model_folder(scratch / "llama")
        hybrid = model_folder(scratch / "hybrid", **_HYBRID)
        tables = {
            "Scalings": scalings_table(model, scratch),
            "Scalings and runtimes": runtimes_table(model, scratch),
            "Engines": engines_table(model),
            "Attention implementations": attention_table(model, hybrid),
            "Methods": methods_table(model),
            "Losses": losses_table(model),
        }
    text = _PAGE.format(generated=GENERATED.format("tools/make_combinations.py"), L=L, T=T)
    return text + "".join(f"\n## {title}\n\n{table}" for title, table in tables.items())


def main() -> None:
    (ROOT / "docs/combinations.md").write_text(page(), encoding="utf-8")
    print("docs/combinations.md")


if __name__ == "__main__":
    main()
