"""A RoPE scaling is added in one place: a class outside the package, listed in `SCALINGS`."""

import json
import shutil
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from test_train import make_recipe, run_training
from transformers import AutoModelForCausalLM

from skipwise.cli import main
from skipwise.config.parse import parse_recipe
from skipwise.errors import SkipwiseError
from skipwise.export import hf
from skipwise.export.runtimes import verify_folder
from skipwise.models.compatibility import make_portable
from skipwise.models.hf_config import complete
from skipwise.models.model_info import read_model_info
from skipwise.models.prepared import prepare_model
from skipwise.models.scaled_config import scaling_for
from skipwise.pose.rope import SCALINGS, Scaling, Unscaled, make_scaling, scalings_for
from skipwise.pose.rope_config import from_rope_parameters
from skipwise.preflight.model import rotary_modules
from skipwise.training.checkpoints import finished_checkpoint

THETA, DIM, L, T = 10000.0, 16, 64, 256


@dataclass(frozen=True, kw_only=True)
class Squared(Scaling):
    """theta' = theta f^2, written as transformers' default type."""

    name: ClassVar[str] = "squared"
    is_rope_type: ClassVar[bool] = False
    auto_candidate: ClassVar[bool] = True

    def theta(self, theta: float, dim: int) -> float:
        return theta * self.factor**2


@dataclass(frozen=True, kw_only=True)
class Stepped(Scaling):
    """The slower half of the pairs is interpolated: a `rope_type` that no runtime knows."""

    name: ClassVar[str] = "stepped"
    extendable: ClassVar[bool] = True
    original_length: int

    def inv_freq(self, theta: float, dim: int) -> np.ndarray:
        slow = np.arange(dim // 2) >= dim // 4
        return Unscaled().inv_freq(theta, dim) / np.where(slow, self.factor, 1.0)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(SCALINGS, "squared", Squared)
    monkeypatch.setitem(SCALINGS, "stepped", Stepped)


def test_a_recipe_names_it_and_auto_measures_it_after_the_others():
    base = {"model": "m", "target_length": T}
    assert parse_recipe(base, ["rope.type=squared"]).rope.type == "squared"
    with pytest.raises(SkipwiseError, match=r"choose one of auto, yarn, .*, squared, stepped"):
        parse_recipe(base, ["rope.type=square"])
    assert scalings_for()[-2:] == ["squared", "stepped"] and scalings_for()[0] == "yarn"
    measured = [name for name in scalings_for() if SCALINGS[name].auto_candidate]
    assert measured == ["yarn", "llama3", "ntk", "linear", "squared"]


def test_a_model_trains_with_it_and_its_export_is_read_by_every_runtime(
    tiny, text_folder, tmp_path, capsys
):
    recipe = make_recipe(tiny, text_folder, "rope.type=squared", "training.num_steps=2")
    prepared = prepare_model(recipe)
    want = (THETA * (T / L) ** 2) ** (-2 * np.arange(DIM // 2) / DIM)
    assert prepared.scaled.rope_parameters["rope_type"] == "default"
    ((module, prefix),) = rotary_modules(AutoModelForCausalLM.from_config(prepared.scaled))
    inv_freq = getattr(module, f"{prefix}inv_freq").double().numpy()
    np.testing.assert_allclose(inv_freq, want, rtol=1e-6)
    run = run_training(recipe, tmp_path / "run")
    (reload,) = hf.export_model(prepared, run, finished_checkpoint(run, 2))
    assert reload.passed, str(reload)
    config = json.loads((run.model / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 16 * THETA
    assert config["max_position_embeddings"] == T
    assert main(["export", "--verify", str(run.path)]) == 0
    assert "every runtime that loads it computes the same" in capsys.readouterr().out


def write_stepped(tiny, folder):
    """The tiny model with `Stepped` in its config."""
    shutil.copytree(tiny, folder)
    scaling = make_scaling("stepped", factor=T / L, original_length=L)
    changes = scaling.to_config(theta=THETA, dim=DIM, original_length=L, target_length=T)
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps(config))
    make_portable(folder)
    return scaling, config


def test_its_own_rope_type_is_read_back_and_extended(tiny, tmp_path):
    scaling, config = write_stepped(tiny, tmp_path / "model")
    parameters = config["rope_parameters"]
    assert parameters["rope_type"] == "stepped" and config["max_position_embeddings"] == T
    assert from_rope_parameters(parameters, max_position_embeddings=T) == scaling
    info = read_model_info(complete(config))
    assert (info.scaling, info.original_length) == (scaling, T)
    recipe = parse_recipe({"model": "m", "target_length": 4 * T})
    assert scaling_for(recipe, info) == Stepped(factor=16.0, original_length=L)


def test_a_rope_type_that_runtimes_do_not_know_is_said_so(tiny, tmp_path):
    write_stepped(tiny, tmp_path / "model")
    verdict = verify_folder(tmp_path / "model")
    failing = [reading.runtime for reading in verdict.readings if reading.error]
    assert failing == ["transformers 5", "transformers 4", "vLLM", "SGLang"]
    (unknown,) = (issue for issue in verdict.issues if issue.name == "does not load")
    assert list(unknown.runtimes) == failing
    assert "cannot load it: rope_type 'stepped' is unknown" in unknown.what
    assert "write a known type: default, linear" in unknown.fix
    (dropped,) = (issue for issue in verdict.issues if issue.runtimes == ("llama.cpp",))
    assert "drops stepped for llama without a warning" in dropped.what


@pytest.mark.extended
def test_a_gguf_file_has_it_as_a_table_of_frequencies(tiny, tmp_path):
    gguf = pytest.importorskip("gguf")
    from test_gguf import fake

    from skipwise.export.gguf import check_gguf, to_gguf

    scaling, _ = write_stepped(tiny, tmp_path / "model")
    file = to_gguf(tmp_path / "model", tmp_path / "m.gguf", converter=fake(tmp_path))
    (table,) = (t.data for t in gguf.GGUFReader(file).tensors if t.name == "rope_freqs.weight")
    assert table.tolist() == [1.0] * 4 + [4.0] * 4
    assert scaling.gguf_keys() is None
    assert all(check.passed for check in check_gguf(file, tmp_path / "model"))
