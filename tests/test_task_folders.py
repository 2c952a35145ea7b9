"""Task folders of lm-eval: what would run code is refused and does not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from questions import boolq, write_task

from skipwise.errors import SkipwiseError
from skipwise.evaluation.harness.benchmarks import (
    check_benchmarks,
)

pytest.importorskip("lm_eval", reason="pip install '.[bench]'")
pytestmark = pytest.mark.extended


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("task: x\ndoc_to_text: !function evil.run\n", "Python from a task folder is not run"),
        ("task: x\ninclude: part_yaml\n", "part_yaml has !function"),
        ("task: x\ndoc_to_text: !!python/name:os.system\n", "is not plain YAML"),
        (
            "task: x\nclass: evil.run\n",
            "has class, which decides whether code is run: leave it out",
        ),
        ("task: x\nuse_prompt: 'evil.yaml:p'\n", "has use_prompt"),
        ("group: x\ntask: [{task: y, unsafe_code: true}]\n", "has unsafe_code"),
        ("include: cruxeval_output\ntask: x\nunsafe_code: false\n", "has unsafe_code"),
        ("include: boolq\ndataset_kwargs: {trust_remote_code: true}\n", "has trust_remote_code"),
        ("include: boolq\ntask: x\ndataset_path: evil.py\n", "scripts are not run"),
        ("include: boolq\ntask: x\ndataset_path: owner/evil.py\n", "scripts are not run"),
        ("include: boolq\ntask: x\ndataset_path: /tmp\n", "scripts are not run"),
        ("include: boolq\ntask: x\ndataset_path: tasks/scripts\n", "scripts are not run"),
        ("include: boolq\ntask: x\ndataset_path: pandas\n", "neither json, csv"),
        ("include: ../outside.yaml\ntask: x\n", "is outside the task folder"),
        ("include: [boolq]\ntask: x\n", "is not a single name"),
        ("include: bolq\ntask: x\n", "is neither a built-in task nor a file"),
        ("include: x.yaml\ntask: x\n", "is neither a built-in task nor a file"),
        ("include: boolq\n", "names no task"),
        ("- boolq\n", "is not a task"),
        ("", "is not a task"),
    ],
)
def test_a_folder_that_would_run_code_is_refused_and_runs_nothing(
    text: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tasks"
    (folder / "scripts").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    mark = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\ndef run(doc): return 'x'\n")
    (folder / "part_yaml").write_text("doc_to_text: !function evil.run\n")
    (tmp_path / "outside.yaml").write_text("doc_to_text: x\n")
    (folder / "x.yaml").write_text(text)
    with pytest.raises(SkipwiseError) as error:
        check_benchmarks(["x"], task_folder=str(folder))
    assert sentence in str(error.value)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"doc_to_text": "{{ ''.__class__.__mro__[1].__subclasses__() }}"}, "unsafe"),
        ({"doc_to_text": "{{ lipsum.__globals__['os'].getcwd() }}"}, "unsafe"),
        ({"metric_list": [{"metric": "SCRIPT", "aggregation": "mean"}]}, "scripts are not run"),
        ({"metric_list": [{"metric": "f1", "hf_evaluate": True}]}, "scripts are not run"),
    ],
)
def test_templates_and_metrics_of_a_folder_run_no_python(
    more: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    mark = tmp_path / "ran"
    script = tmp_path / "score.py"
    script.write_text(f"open({str(mark)!r}, 'w')\n")
    more = json.loads(json.dumps(more).replace("SCRIPT", str(script)))
    rows = [boolq(i)[0] for i in range(2)]
    write_task(tmp_path, "boolq", {"train": rows, "validation": rows}, **more)
    with pytest.raises(SkipwiseError, match=sentence):
        check_benchmarks(["boolq"], task_folder=str(tmp_path))
    assert not mark.exists()


def test_a_folder_needs_tasks_of_different_names(tmp_path: Path) -> None:
    with pytest.raises(SkipwiseError, match="is not a folder"):
        check_benchmarks(["x"], task_folder=str(tmp_path / "none"))
    with pytest.raises(SkipwiseError, match="has no task"):
        check_benchmarks(["x"], task_folder=str(tmp_path))
    for file in "ab":
        (tmp_path / f"{file}.yaml").write_text("task: x\n")
    with pytest.raises(SkipwiseError, match=r"b\.yaml defines x, as another file"):
        check_benchmarks(["x"], task_folder=str(tmp_path))
