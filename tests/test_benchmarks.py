"""Benchmarks run through lm-eval itself, offline: made-up rows in the six tasks' own formats."""

from __future__ import annotations

import copy
import json
import math
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from questions import TASKS, arc_challenge, boolq, hellaswag, write_task

from skipwise.config.recipe import EvalSettings
from skipwise.errors import SkipwiseError
from skipwise.evaluation.harness.benchmarks import (
    SHORT_BENCHMARKS,
    check_benchmarks,
    expand,
    make_task,
    run_benchmark,
)
from skipwise.evaluation.tasks.prompts import ChatPrompts
from skipwise.evaluation.tasks.task import TaskInputs

pytest.importorskip("lm_eval", reason="pip install '.[bench]'")
pytestmark = pytest.mark.extended

NUM_QUESTIONS = 6


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The passes are so small that threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The six tasks' prompts, targets and metrics on rows of ours; examples are from 30 rows."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, make in TASKS.items():
        questions = [make(i)[0] for i in range(NUM_QUESTIONS)]
        examples = [make(100 + i)[0] for i in range(30)]
        write_task(folder, name, {"train": examples, "validation": questions, "test": questions})
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    from skipwise.pipeline.quickstart import MODEL

    return AutoTokenizer.from_pretrained(MODEL)


class Knowing(torch.nn.Module):
    """A model that continues the sequences it was taught, and is indifferent elsewhere."""

    def __init__(self) -> None:
        from transformers import LlamaConfig

        super().__init__()
        self.config = LlamaConfig(vocab_size=1024, max_position_embeddings=4096)
        self.device = torch.device("cpu")
        self.taught: list[list[int]] = []
        self.widths: set[int] = set()

    def tie_weights(self) -> None: ...

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        from types import SimpleNamespace

        self.widths.add(input_ids.shape[1])
        logits = torch.zeros(*input_ids.shape, 1024)
        for row, ids in enumerate(input_ids):
            for sequence in map(torch.tensor, self.taught):
                width = min(len(ids), len(sequence) - 1)
                same = int((ids[:width] == sequence[:width]).cumprod(0).sum())
                logits[row, torch.arange(same), sequence[1 : same + 1]] = 20.0
        return SimpleNamespace(logits=logits)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(context, continuation) of all requests that reach the model, as text."""
    return spy(monkeypatch, Knowing(), [])


def spy(
    monkeypatch: pytest.MonkeyPatch, model: Knowing, statements: list[str]
) -> list[tuple[str, str]]:
    """Teach the model the prompts that end in a statement; list the requests."""
    from lm_eval.models.huggingface import HFLM

    seen: list[tuple[str, str]] = []
    original = HFLM._loglikelihood_tokens

    def listen(self: Any, requests: Any, *args: Any, **kwargs: Any) -> Any:
        for text, context, continuation in requests:
            seen.append(text)
            if "".join(text).endswith(tuple(statements)) and statements:
                model.taught.append(context + continuation)
        return original(self, requests, *args, **kwargs)

    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", listen)
    return seen


def taught(name: str, num_right: int) -> list[str]:
    """What a model says that answers the first questions right and all others wrong."""
    rows = [TASKS[name](i) for i in range(NUM_QUESTIONS)]
    return [s for i, row in enumerate(rows) for s in row[1 if i < num_right else 2]]


@pytest.mark.parametrize("name", SHORT_BENCHMARKS)
@pytest.mark.parametrize("num_right", [NUM_QUESTIONS, 0, 4])
def test_the_share_of_right_answers_and_its_error_are_those_of_a_model_we_know(
    name: str,
    num_right: int,
    folder: str,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Knowing()
    spy(monkeypatch, model, taught(name, num_right))
    [row] = run_benchmark(model, tokenizer, name, task_folder=folder)
    share, n = num_right / NUM_QUESTIONS, NUM_QUESTIONS
    error = math.sqrt(share * (1 - share) / (n - 1))
    assert row == {
        "task": name,
        "metric": SHORT_BENCHMARKS[name][1],
        "context_length": None,
        "num_fewshot": SHORT_BENCHMARKS[name][0],
        "value": pytest.approx(share, abs=1e-4),
        "low": pytest.approx(max(0, share - 1.96 * error), abs=1e-3),
        "high": pytest.approx(min(1, share + 1.96 * error), abs=1e-3),
        "stderr": pytest.approx(error, abs=1e-4),
        "num_samples": n,
        "kind": "benchmark",
        "higher_is_better": True,
        "num_truncated": 0,
    }


@pytest.mark.parametrize("name", SHORT_BENCHMARKS)
def test_as_many_solved_examples_as_the_suite_says_stand_before_the_question(
    name: str, folder: str, tokenizer: Any, asked: list[tuple[str, str]]
) -> None:
    run_benchmark(Knowing(), tokenizer, name, task_folder=folder)
    solved = {s for i in range(100, 130) for s in TASKS[name](i)[1]}
    for context, _ in asked:
        assert sum(statement in context for statement in solved) == SHORT_BENCHMARKS[name][0]


def test_the_chat_template_writes_the_question_and_its_examples_as_turns(
    folder: str, tokenizer: Any, asked: list[tuple[str, str]]
) -> None:
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = """{% for m in messages %}{{ '[' + m.role + ']' + m.content + '[end]' }}
    {%- endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"""
    inputs = TaskInputs(
        load_model=Knowing,
        tokenizer=ChatPrompts(chat),
        documents=[],
        haystack=lambda n: [],
        lengths=(),
        settings=EvalSettings(task_folder=folder, limit=1),
        tick=lambda n: None,
    )
    make_task("arc_challenge").measure(inputs)
    assert len(asked) >= 3
    for context, _ in asked:
        assert context.startswith("[user]") and context.endswith("[end][assistant]")
        assert context.count("[user]") == context.count("[assistant]") == 25 + 1


def test_the_seed_draws_the_examples(
    folder: str, tokenizer: Any, asked: list[tuple[str, str]]
) -> None:
    drawn = []
    for seed in (0, 0, 1):
        asked.clear()
        run_benchmark(Knowing(), tokenizer, "hellaswag", task_folder=folder, limit=2, seed=seed)
        drawn.append(list(asked))
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_limit_asks_the_first_questions_only(
    folder: str, tokenizer: Any, asked: list[tuple[str, str]]
) -> None:
    [row] = run_benchmark(Knowing(), tokenizer, "boolq", task_folder=folder, limit=2)
    assert row["num_samples"] == 2
    assert {context for context, _ in asked} == {
        "The cup number 0 holds 10 beans.\nQuestion: does number 0 hold 10 beans?\nAnswer:",
        "The jar number 1 holds 11 beans.\nQuestion: does number 1 hold 12 beans?\nAnswer:",
    }


def bundled() -> Any:
    from transformers import AutoModelForCausalLM

    from skipwise.pipeline.quickstart import MODEL

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", SHORT_BENCHMARKS)
@pytest.mark.parametrize("max_length", [256, 40])
def test_the_bundled_model_scores_as_a_few_lines_without_the_harness_say(
    name: str, max_length: int, folder: str, tokenizer: Any, asked: list[tuple[str, str]]
) -> None:
    model = bundled()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        [row] = run_benchmark(model, tokenizer, name, task_folder=folder, max_length=max_length)
    scores, num_truncated = {}, 0
    for context, continuation in asked:
        ids = tokenizer(context + continuation)["input_ids"]
        num_scored = len(ids) - len(tokenizer(context)["input_ids"])
        num_truncated += len(ids) > max_length + 1
        seen = torch.tensor([ids[-max_length - 1 :]])
        with torch.no_grad():
            log_p = model(seen[:, :-1]).logits.log_softmax(-1)
        score = float(log_p.gather(2, seen[:, 1:, None])[0, -num_scored:].sum())
        length = len(continuation) - 1 if SHORT_BENCHMARKS[name][1] == "acc_norm" else 1
        scores[context + continuation] = score / length
    values = []
    for i in range(NUM_QUESTIONS):
        right, wrong = (
            [score for text, score in scores.items() if text.endswith(tuple(statements))]
            for statements in TASKS[name](i)[1:]
        )
        if name == "truthfulqa_mc2":  # the share of the right answers' probability
            values.append(np.exp(right).sum() / np.exp(right + wrong).sum())
        else:
            values.append(max(right) > max(wrong))
    assert row["value"] == pytest.approx(np.mean(values), abs=1e-4)
    assert row["stderr"] == pytest.approx(np.std(values, ddof=1) / len(values) ** 0.5, abs=1e-4)
    assert row["num_truncated"] == num_truncated
    assert any("lost their start" in str(w.message) for w in said) == (num_truncated > 0)


def test_a_short_window_cuts_the_start_and_says_so_and_a_long_one_sees_everything(
    folder: str, tokenizer: Any
) -> None:
    model = Knowing()
    with pytest.warns(UserWarning, match="arc_challenge: 8 prompts lost their start.* 100 tokens"):
        [row] = run_benchmark(
            model, tokenizer, "arc_challenge", task_folder=folder, limit=2, max_length=100
        )
    assert model.widths == {100}
    assert row["num_truncated"] == 8  # 2 questions of 4 choices
    model.widths.clear()
    [row] = run_benchmark(model, tokenizer, "arc_challenge", task_folder=folder, limit=2)
    assert min(model.widths) > 400
    assert row["num_truncated"] == 0
    longest = max(model.widths)  # and the token that is only predicted
    run = {"task_folder": folder, "limit": 2}
    [row] = run_benchmark(model, tokenizer, "arc_challenge", max_length=longest, **run)
    assert row["num_truncated"] == 0
    with pytest.warns(UserWarning):
        [row] = run_benchmark(model, tokenizer, "arc_challenge", max_length=longest - 1, **run)
    assert row["num_truncated"] > 0
    with pytest.raises(SkipwiseError, match=r"an answer of [0-9]+ tokens does not fit into 2\n"):
        run_benchmark(model, tokenizer, "arc_challenge", max_length=2, **run)
    model.config.max_position_embeddings = 120  # the config's window where none is given
    model.widths.clear()
    with pytest.warns(UserWarning):
        run_benchmark(model, tokenizer, "arc_challenge", task_folder=folder, limit=2)
    assert model.widths == {120}


def test_model_tokenizer_random_state_and_stdout_are_left_as_they_were(
    folder: str, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from lm_eval import utils

    model = bundled()
    model.train()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    pad, template = tokenizer.pad_token, utils.env
    tokenizer.pad_token = None
    try:
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        run_benchmark(model, tokenizer, "hellaswag", task_folder=folder, limit=1, max_length=2048)
        assert tokenizer.pad_token is None
    finally:
        tokenizer.pad_token = pad
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert utils.env is template
    assert capsys.readouterr().out == ""


def test_a_bfloat16_model_is_scored_in_float32(
    folder: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    sums: list[float] = []
    original = HFLM._loglikelihood_tokens

    def listen(self: Any, *args: Any, **kwargs: Any) -> Any:
        answers = original(self, *args, **kwargs)
        sums.extend(score for score, _ in answers)
        return answers

    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", listen)
    run_benchmark(bundled().to(torch.bfloat16), tokenizer, "piqa", task_folder=folder)
    rounded = torch.tensor(sums).to(torch.bfloat16).float()
    assert not torch.equal(rounded, torch.tensor(sums))


def test_a_group_is_one_row_and_a_tag_or_a_group_without_average_is_its_members(
    folder: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("boolq", "piqa"):
        rows = [TASKS[name](i)[0] for i in range(NUM_QUESTIONS if name == "boolq" else 2)]
        write_task(tmp_path, name, {"validation": rows, "train": rows}, tag="mine")
    group = {"group": "both", "task": ["boolq", "piqa"]}
    (tmp_path / "plain.yaml").write_text(json.dumps(group))
    average = {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (tmp_path / "mean.yaml").write_text(json.dumps({**group, "group": "mean", **average}))
    model = Knowing()
    spy(monkeypatch, model, taught("boolq", 3) + taught("piqa", NUM_QUESTIONS))
    run = {"model": model, "tokenizer": tokenizer, "task_folder": str(tmp_path)}
    [mean] = run_benchmark(name="mean", **run)
    assert (mean["task"], mean["num_samples"], mean["value"]) == ("mean", 8, (3 + 2) / 8)
    for name in ("both", "mine"):
        rows = run_benchmark(name=name, **run)
        values = {(row["task"], row["metric"]): row["value"] for row in rows}
        # piqa's own metrics are both kept, outside of the suite
        assert values == {("boolq", "acc"): 0.5, ("piqa", "acc"): 1.0, ("piqa", "acc_norm"): 1.0}


def test_a_tag_keeps_the_members_that_are_not_in_the_folder(tmp_path: Path) -> None:
    rows = [arc_challenge(i)[0] for i in range(2)]
    write_task(tmp_path, "arc_challenge", {"train": rows, "validation": rows, "test": rows})
    with pytest.raises(SkipwiseError, match=r"data set of ai2_arc cannot be read: .*allenai"):
        check_benchmarks(["ai2_arc"], task_folder=str(tmp_path))  # arc_easy is on the hub


@pytest.mark.filterwarnings("ignore:A single label")
def test_a_metric_that_is_no_mean_has_a_bootstrapped_error_and_prints_nothing(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [boolq(i)[0] for i in range(NUM_QUESTIONS)]
    metrics = [{"metric": name} for name in ("acc", "mcc")]
    mine = {"include": "boolq", "task": "mine", "metric_list": metrics}
    write_task(tmp_path, "mine", {"train": rows, "validation": rows}, **mine)
    accuracy, mcc = run_benchmark(bundled(), tokenizer, "mine", task_folder=str(tmp_path))
    assert (accuracy["metric"], mcc["metric"]) == ("acc", "mcc")
    assert (mcc["high"] - mcc["low"]) / 2 == pytest.approx(1.96 * mcc["stderr"])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "bootstrapping" in captured.err


def test_generated_answers_give_a_row_for_each_filter(tmp_path: Path, tokenizer: Any) -> None:
    filters = [
        {"name": "all", "filter": [{"function": "take_first"}]},
        {"name": "lower", "filter": [{"function": "lowercase"}, {"function": "take_first"}]},
    ]
    rows = [{"q": "The sky is blue. " * (1 + 60 * i), "a": "xyzzy"} for i in range(2)]
    write_task(tmp_path, "says", {"test": rows})
    config = json.loads((tmp_path / "says.yaml").read_text())
    del config["include"]
    config |= {"output_type": "generate_until", "test_split": "test", "doc_to_text": "{{q}}"}
    config |= {"doc_to_target": "{{a}}", "filter_list": filters, "num_fewshot": 0}
    config |= {"generation_kwargs": {"max_gen_toks": 4, "until": ["\n"]}}
    config |= {"metric_list": [{"metric": "exact_match"}]}
    (tmp_path / "says.yaml").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="says: 1 prompts lost their start"):
        rows = run_benchmark(bundled(), tokenizer, "says", task_folder=str(tmp_path))
    assert [(row["metric"], row["value"]) for row in rows] == [
        ("exact_match,all", 0.0),
        ("exact_match,lower", 0.0),
    ]


def test_the_suite_is_its_six_tasks_in_the_order_of_the_table() -> None:
    assert expand(["mmlu", "short-benchmarks", "boolq"]) == ["mmlu", *SHORT_BENCHMARKS]
    assert SHORT_BENCHMARKS == {
        "boolq": (0, "acc"),
        "piqa": (0, "acc"),
        "winogrande": (0, "acc"),
        "truthfulqa_mc2": (0, "acc"),
        "arc_challenge": (25, "acc_norm"),
        "hellaswag": (10, "acc_norm"),
    }


def test_all_is_checked_before_anything_is_run(folder: str, tmp_path: Path) -> None:
    check_benchmarks(["short-benchmarks"], task_folder=folder)
    with pytest.raises(SkipwiseError, match=r"no task 'boolqq': did you mean .*boolq"):
        check_benchmarks(["piqa", "boolqq"], task_folder=folder)
    write_task(tmp_path, "piqa", {}, dataset_path="skipwise/none", dataset_kwargs={})
    with pytest.raises(SkipwiseError, match=r"(?s)data set of piqa cannot be read: .*none.*DIR"):
        check_benchmarks(["piqa"], task_folder=str(tmp_path))  # the hub is off in tests


def test_a_missing_harness_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SkipwiseError, match=r"pip install '\.\[bench\]'"):
        check_benchmarks(["boolq"])


def test_limits_and_examples_that_cannot_be_met_are_refused(
    folder: str, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(SkipwiseError, match="limit=0: at least one question"):
        run_benchmark(Knowing(), tokenizer, "boolq", task_folder=folder, limit=0)
    rows = [arc_challenge(i)[0] for i in range(24)]
    write_task(tmp_path, "arc_challenge", {"train": rows, "test": rows})
    with pytest.raises(SkipwiseError, match="arc_challenge has 24 rows to draw 25 examples"):
        run_benchmark(Knowing(), tokenizer, "arc_challenge", task_folder=str(tmp_path))


def test_a_task_that_says_zero_examples_itself_still_gets_the_suites(
    tokenizer: Any, tmp_path: Path, asked: list[tuple[str, str]]
) -> None:
    rows = [hellaswag(i)[0] for i in range(12)]
    write_task(tmp_path, "hellaswag", {"train": rows, "validation": rows[:2]}, num_fewshot=0)
    [row] = run_benchmark(Knowing(), tokenizer, "hellaswag", task_folder=str(tmp_path))
    assert row["num_fewshot"] == 10
    assert all(context.count("Paying: ") == 11 for context, _ in asked)


def test_importing_does_not_import_the_harness() -> None:
    code = "import sys, skipwise.evaluation.harness.benchmarks; sys.exit('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
