"""GPUs to plan for: found by loose names or by their memory; and this machine's CPU."""

import json
import re
from pathlib import Path

import pytest
import torch
from test_plan import MISTRAL, recipe_of

from skipwise import planning
from skipwise.cli import main
from skipwise.config import machine
from skipwise.config.recipe import ModelSettings
from skipwise.errors import SkipwiseError
from skipwise.models.load import compute_dtype
from skipwise.planning import find_gpu, make_plan, predict_memory
from skipwise.planning.gpus import GPUS, common_gpus
from skipwise.planning.job import make_job, read_model
from skipwise.planning.memory import GIB, largest_micro_batch, with_micro_batch


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    return tmp_path


def test_every_gpu_has_its_figures_and_where_they_are_from():
    rows = json.loads(Path(planning.__file__).with_name("gpus.json").read_text())["gpus"]
    assert len({row["name"] for row in rows}) == len(rows) == len(GPUS) > 70
    for row in rows:
        assert row["memory_gib"] > 0 and row["tflops"] > 0 and row["bandwidth"] > 0
        assert row["dtype"] in ("bf16", "float32") and len(row["source"]) > 20
        size = re.search(r"(\d+)GB$", row["name"])
        assert size is None or 0.7 * int(size[1]) < row["memory_gib"] <= int(size[1])


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("4060", "RTX4060"),
        ("rtx 4060 ti", "RTX4060Ti-16GB"),
        ("RTX-4060-Ti 8GB", "RTX4060Ti-8GB"),
        ("NVIDIA GeForce RTX 3060", "RTX3060-12GB"),
        ("a100", "A100-80GB"),
        ("A100 40", "A100-40GB"),
        ("Tesla T4", "T4"),
        ("v100", "V100-32GB"),
        ("gh200", "GH200-96GB"),
        ("amd mi300x", "MI300X"),
        ("Apple M2 Max 96GB", "M2-Max-96GB"),
        ("m4pro", "M4-Pro-24GB"),
    ],
)
def test_gpus_are_found_by_loose_names(given, name):
    assert find_gpu(given).name == name


@pytest.mark.parametrize(
    ("given", "gib"), [("24GiB", 24), ("24 gb", 24 * 0.985), ("10.5G", 10.5 * 0.985)]
)
def test_a_size_stands_for_a_gpu_of_which_only_the_memory_is_known(given, gib, folder, capsys):
    gpu = find_gpu(given)
    assert gpu.memory_gib == pytest.approx(gib) and gpu.tflops is None
    (row,) = make_plan(recipe_of(folder, "lora={}"), gpu=gpu).gpus
    assert row.hours is None and row.change
    assert main(["plan", str(folder), "--to", "32k", "--gpu", given]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith(given))
    assert line.split()[-1] != "yes" and "  -  " in line


@pytest.mark.parametrize(
    ("given", "meant"), [("RTX4O90", "RTX4090"), ("H9000", "H100"), ("m2 mox", "M2-Max-32GB")]
)
def test_a_wrong_name_is_answered_with_what_it_may_mean(given, meant):
    with pytest.raises(SkipwiseError, match=rf"did you mean .*{meant}.*\n.*24GB"):
        find_gpu(given)


@pytest.mark.parametrize("name", ["T4", "V100-16GB"])
def test_a_gpu_without_bf16_trains_in_float32_as_it_is_planned(name, folder, monkeypatch):
    job = make_job(recipe := recipe_of(folder), *read_model(recipe), gpu=find_gpu(name))
    assert not job.bf16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # torch says that such GPUs support bf16: it emulates it, slowly
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: bool(including_emulation)
    )
    assert compute_dtype(ModelSettings()) == torch.float32


def test_the_cpu_is_planned_with_its_memory_and_a_timed_rate(folder, monkeypatch, capsys):
    cpu = find_gpu("CPU")
    free = machine.available_memory() / GIB
    assert cpu.is_cpu and cpu.memory_gib == pytest.approx(free, rel=0.2)
    assert cpu.tflops is not None and 1e-3 < cpu.tflops < 100
    command = ["plan", str(folder), "--to", "32k", "--json"]
    monkeypatch.setattr("skipwise.commands.num_gpus", lambda: 0)
    assert main(command) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)["gpus"]]
    assert names == [*(gpu.name for gpu in common_gpus()), "this CPU"]
    monkeypatch.setattr("skipwise.commands.num_gpus", lambda: 1)
    assert main(command) == 0
    assert "this CPU" not in capsys.readouterr().out


def test_memory_of_a_container_is_its_limit_without_its_processes(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 8388608 kB\n",
        "/sys/fs/cgroup/memory.max": str(3 * GIB),
        "/sys/fs/cgroup/memory.stat": f"anon {GIB}\nfile 7\n",
    }
    monkeypatch.setattr(Path, "read_text", lambda self, encoding=None: files[str(self)])
    assert machine.available_memory() == 2 * GIB
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert machine.available_memory() == 8 * GIB


@pytest.mark.parametrize("name", ["A100-40GB", "A100-80GB", "H200", "RTX3060-12GB"])
def test_auto_is_the_largest_micro_batch_that_fits(name, folder):
    recipe = recipe_of(folder, "lora={}", "train_length=2k")
    shape, gpu = read_model(recipe), find_gpu(name)
    size = largest_micro_batch(recipe, *shape, gpu)

    def needs(size):
        return predict_memory(make_job(with_micro_batch(recipe, size), *shape, gpu=gpu)).gib

    assert size in (1, 2, 4, 8, 16)
    assert size == 1 or needs(size) <= 0.9 * gpu.memory_gib
    assert size * 2048 == 32768 or needs(2 * size) > 0.9 * gpu.memory_gib
    (row,) = make_plan(recipe, gpu=gpu).gpus
    assert row.micro_batch_size == size and row.memory.gib == pytest.approx(needs(size))
    assert largest_micro_batch(with_micro_batch(recipe, 1), *shape, gpu) == 1


def test_several_gpus_share_the_global_batch(folder):
    recipe = recipe_of(folder, "lora={}", "train_length=1k", "training.global_batch_size=24")
    shape, gpu = read_model(recipe), find_gpu("H200")
    assert [largest_micro_batch(recipe, *shape, gpu, n) for n in (1, 2, 4, 24)] == [24, 12, 6, 1]
