"""Evaluation by several processes: the same rows as by one, whatever the tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from questions import TASKS, write_task

from skipwise.cli import main
from skipwise.errors import SkipwiseError
from skipwise.evaluation import processes
from skipwise.evaluation.run import evaluate


class _Stopped(Exception):
    """A process has given what it measured."""


def of_all(
    monkeypatch: pytest.MonkeyPatch, items: Sequence[int], groups: Sequence[int], world: int
) -> tuple[list[list[int]], list[list[int]]]:
    """What each process measures of the items, and what each has in the end: ten times an item."""
    measured: list[list[int]] = [[] for _ in range(world)]
    given: list[dict[int, int]] = []

    def run(rank: int, gather: Any) -> list[int]:
        def measure(own: Sequence[int]) -> list[int]:
            measured[rank] = list(own)
            return [10 * item for item in own]

        fake = SimpleNamespace(get_rank=lambda: rank, all_gather_object=gather)
        monkeypatch.setattr(processes, "dist", fake)
        return processes.shared(items, measure, groups)

    def give(parts: list[Any], own: dict[int, int]) -> None:
        given.append(own)
        raise _Stopped

    def take(parts: list[Any], own: dict[int, int]) -> None:
        parts[:] = given

    monkeypatch.setattr(processes, "_joined", True)
    monkeypatch.setattr(processes, "world_size", lambda: world)
    for rank in range(world):
        with pytest.raises(_Stopped):
            run(rank, give)
    return measured, [run(rank, take) for rank in range(world)]


@pytest.mark.parametrize("world", [2, 3, 8])
def test_every_item_is_measured_once_and_all_have_the_results_in_order(monkeypatch, world):
    items = list(range(5, 12))
    measured, results = of_all(monkeypatch, items, [0] * 7, world)
    assert sorted(item for own in measured for item in own) == items
    assert max(map(len, measured)) - min(map(len, measured)) <= 1
    assert results == [[10 * item for item in items]] * world


def test_items_that_share_work_stay_together_where_there_are_enough_groups(monkeypatch):
    groups = [7, 7, 7, 3, 3, 3, 9, 9, 9, 1, 1, 1]
    measured, results = of_all(monkeypatch, range(12), groups, 2)
    assert measured == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
    assert results[1] == [10 * item for item in range(12)]
    measured, _ = of_all(monkeypatch, range(12), groups, 6)  # more processes than groups
    assert {len(own) for own in measured} == {2}


def test_processes_that_measure_different_things_say_so(monkeypatch):
    fake = SimpleNamespace(get_rank=lambda: 0, all_gather_object=lambda parts, own: None)

    def other_has_more(parts: list[Any], own: dict[int, int]) -> None:
        parts[:] = [own, {1: 0, 3: 0}]

    fake.all_gather_object = other_has_more
    monkeypatch.setattr(processes, "dist", fake)
    monkeypatch.setattr(processes, "_joined", True)
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    with pytest.raises(SkipwiseError, match="different things"):
        processes.shared([4, 5], lambda own: own, [0, 0])


def test_a_process_that_has_ended_is_told_in_a_line(monkeypatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("Connection closed by peer\nat a place in gloo")

    monkeypatch.setattr(processes, "dist", SimpleNamespace(broadcast_object_list=fail))
    monkeypatch.setattr(processes, "_joined", True)
    with pytest.raises(SkipwiseError, match=r"cannot meet: Connection closed by peer\nstart"):
        processes.of_main_process(1)


def test_training_processes_do_not_share_out_what_the_first_one_measures(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes.shared([1, 2, 3], lambda own: [-item for item in own], [0] * 3) == [-1, -2, -3]


def test_gpus_of_an_evaluation_are_checked_before_anything_starts(tiny, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr("skipwise.commands.launch", lambda *_: pytest.fail("started"))
    for asked, said in (("0", "1 or more"), ("3", "this machine has 2 GPUs")):
        assert main(["eval", str(tiny), "--lengths", "64", "--gpus", asked]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert main(["eval", str(tiny), "--lengths", "64"]) == 2
    assert "cannot meet: Error initializing torch.distributed" in capsys.readouterr().err
    with pytest.raises(SkipwiseError, match=r"leave load\.device_map out"):
        evaluate(str(tiny), lengths=[64], tasks=[], data=[], overrides=["load.device_map=auto"])


@pytest.mark.extended
def test_two_processes_write_the_rows_of_one(tmp_path, text_folder, capfd):
    pytest.importorskip("lm_eval", reason="pip install '.[bench]'")
    from skipwise.pipeline.quickstart import MODEL

    questions = [TASKS["boolq"](i)[0] for i in range(6)]
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_task(folder, "boolq", {"train": questions, "validation": questions, "test": questions})
    tasks = "perplexity,passkey,niah_single_numbers,boolq"
    arguments = ["eval", str(MODEL), "--lengths", "128,256", "--tasks", tasks]
    arguments += ["--data", str(text_folder), "--limit", "5", f"eval.task_folder={folder}"]
    arguments += ["eval.passkey_samples=6", "eval.samples=3"]
    arguments += [f"eval.evaluator={MODEL}"]
    found = []
    for name, more in (("one", []), ("two", ["--gpus", "2"])):
        assert main([*arguments, "--out", str(tmp_path / name), *more]) == 0, capfd.readouterr().err
        found.append(json.loads((tmp_path / name / "results.json").read_text()))
    one, two = found
    assert {row["task"] for row in one} >= set(tasks.split(","))
    assert any(row["metric"] == "long_ppl" for row in one)
    assert any(row["task"] == "passkey" and row["value"] for row in one)
    facts = ("task", "metric", "context_length", "depth", "num_samples", "key", "asked", "targets")
    for mine, other in zip(one, two, strict=True):
        assert [mine.get(fact) for fact in facts] == [other.get(fact) for fact in facts]
        numbers = [[row["value"] or 0.0, *row.get("samples", [])] for row in (mine, other)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)
