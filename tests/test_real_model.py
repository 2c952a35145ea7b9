"""The released model's study: documents from packages, arms that are keyed, jobs that go on."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from skipwise.config.parse import parse_recipe

FOLDER = Path(__file__).parents[1] / "research" / "real_model"


def load(name: str) -> Any:
    """A script as a module of another name: several are called run.py."""
    spec: Any = importlib.util.spec_from_file_location(f"real_model_{name}", FOLDER / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run, texts = load("run"), load("texts")

PAGE = """<html><head><title>no</title><script>var no;</script></head><body>
<div class="navheader"><a href="no.html">no</a></div><h1>{title}</h1><p>one &amp; two<ul><li>three
<pre>  x = 1
  y</pre></ul><nav>no</nav>{links}<div class="footer">no<br>no</div></body></html>"""


def package(cache: Path, name: str, pages: dict[str, str], licence: str) -> None:
    folder = cache / "packages" / name / "usr/share/doc" / name
    (folder / "html").mkdir(parents=True)
    (folder / "copyright").write_text(f"Files: *\nLicense: {licence}\n full text\n")
    for file, text in pages.items():
        (folder / "html" / file).write_text(text)


def test_documents_are_pages_in_the_order_of_the_index_without_navigation(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "SHORTEST", 10)
    links = '<a href="b.html#x">b</a> <a href="a.html">a</a>'
    pages = {name: PAGE.format(title=name, links="") for name in ("a.html", "b.html")}
    pages["index.html"] = PAGE.format(title="index", links=links)
    package(tmp_path, "train-doc", pages, "GFDL-1.2+")
    package(tmp_path, "other-doc", {"c.html": PAGE.format(title="c", links="")}, "MIT")
    made = texts.make_texts(tmp_path, {"train": ("train-doc",), "held_out": ("other-doc",)})
    [one] = made["train"]
    assert (one["package"], one["licence"]) == ("train-doc", "GFDL-1.2+")
    titles = [line for line in one["text"].splitlines() if line.endswith((".html", "index"))]
    assert titles == ["b.html", "a.html", "index"]
    assert "one & two" in one["text"] and "  x = 1\n  y" in one["text"]
    assert "no" not in one["text"].split()
    lines = (tmp_path / "held_out.jsonl").read_text().splitlines()
    assert [json.loads(line)["package"] for line in lines] == ["other-doc"]
    with pytest.raises(AssertionError, match="held out and trained on"):
        texts.make_texts(tmp_path, {"train": ("other-doc",), "held_out": ("other-doc",)})


def test_a_text_of_both_parts_stays_held_out_and_a_long_page_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "SHORTEST", 10)
    monkeypatch.setattr(texts, "LONGEST", 300)
    same = PAGE.format(title="same", links="")
    package(tmp_path, "a", {"s.html": same}, "MIT")
    package(tmp_path, "b", {"s.html": same}, "MIT")
    package(tmp_path, "c", {"long.html": " ".join(f"w{i:03}" for i in range(200))}, "MIT")
    made = texts.make_texts(tmp_path, {"train": ("b", "c"), "held_out": ("a",)})
    assert {one["package"] for one in made["train"]} == {"c"} and len(made["held_out"]) == 1
    assert [len(one["text"]) for one in made["train"]] == [300, 300, 300, 99]


@pytest.fixture
def driver(tiny, tmp_path):
    for part in ("train", "held_out"):
        (tmp_path / f"{part}.jsonl").write_text('{"text": "a"}\n')
    made = run.Driver(tmp_path, str(tiny), tmp_path, run.SCALES["smoke"], time.monotonic() + 900)
    return made


def test_an_arm_is_keyed_by_its_recipe_the_text_and_the_model(driver, monkeypatch):
    arms = {arm.name: arm for arm in run.arms_of(run.SCALES["smoke"])}
    keys = {name: driver.key(arm) for name, arm in arms.items()}
    assert len(set(keys.values())) == len(keys)
    assert {arm.tokens for arm in arms.values()} == {0, 2 * 4 * 32}
    driver.digest[1] = "other text to measure on"
    assert driver.key(arms["defaults"]) == keys["defaults"]
    driver.digest[0] = "other text to train on"
    assert driver.key(arms["defaults"]) != keys["defaults"]
    monkeypatch.setattr(run, "TRAINING", 2)
    assert driver.key(arms["pose-published"]) != keys["pose-published"]


@pytest.mark.parametrize("name", run.SCALES)
def test_every_trained_arm_sees_the_same_tokens_and_its_recipe_is_one(name):
    scale = run.SCALES[name]
    for arm in run.arms_of(scale):
        recipe = parse_recipe({"model": "-", "target_length": arm.target}, list(arm.keys))
        training, tokens = recipe.training, scale.steps * scale.batch * scale.train_length
        if arm.keys and recipe.method != "none":
            steps = training.num_steps * training.global_batch_size
            assert steps * (recipe.train_length or 0) == tokens, arm.name


def test_a_measurement_is_done_again_when_its_own_settings_change(driver, monkeypatch):
    [base] = [arm for arm in run.arms_of(driver.scale) if arm.name == "base"]
    asked = []
    monkeypatch.setattr(run, "run_skipwise", lambda c, *_: (asked.append(c), (0, 1.0, 1.0, 1.0))[1])
    for _ in range(2):
        driver.run_all([base], ("perplexity", "passkey"))
    assert [c[3] for c in asked] == ["perplexity", "passkey"]
    driver.digest[1] = "other text"
    driver.run_all([base], ("perplexity",))
    assert len(asked) == 3


def test_what_does_not_fit_into_the_time_is_left_out_with_its_estimate(driver, monkeypatch, capsys):
    monkeypatch.setattr(run, "run_skipwise", lambda *_: pytest.fail("it was run"))
    driver.end = time.monotonic() + 10
    [base] = [arm for arm in run.arms_of(driver.scale) if arm.name == "base"]
    driver.run_all([base], ("perplexity",))
    assert driver.left_out == {"base: perplexity": "about 0 minutes"}
    assert "base: perplexity: about 0.3 minutes, 0.2 left" in capsys.readouterr().out


def test_a_job_at_its_limit_is_asked_to_stop_and_reported_as_stopped(tmp_path, monkeypatch):
    def slow(command):
        time.sleep(60)
        return 0

    monkeypatch.setattr("skipwise.cli.main", slow)
    started = time.monotonic()
    code, *_ = run.run_skipwise(["extend"], tmp_path / "log", 0.5)
    assert code == 75 and time.monotonic() - started < 10
    monkeypatch.setattr("skipwise.cli.main", lambda c: os.write(1, sys.argv[1].encode()) and 2)
    code, _, busy, gib = run.run_skipwise(["eval"], tmp_path / "log", 60)
    assert code == 2 and gib > 0.01 and 0 <= busy < 60 and (tmp_path / "log").read_text() == "eval"


def test_the_table_has_a_column_for_each_task_and_length_and_says_what_was_not_run():
    def row(task, length, value, metric="accuracy", **more):
        common = {"model": "base", "task": task, "metric": metric, "context_length": length}
        return {**common, "value": value, "low": 0.5, "high": 1.0, "num_samples": 4, **more}

    rows = [row("perplexity", 64, 1186.64, "perplexity")]
    rows += [row("perplexity", 128, 7.25, "perplexity", **{"over base": [-2.91, -5.3, -0.5]})]
    rows += [row("perplexity", 256, 7.5, "perplexity", **{"over base": [3.0, None, None]})]
    rows += [row("next-passage", None, 0.75, "acc")]
    rows += [row("passkey", 128, v, depth=d) for v, d in ((1.0, 0.1), (0.5, 0.9))]
    rows = [{**one, "chat": False} for one in rows] + [{**row("passkey", 128, 0.25), "chat": True}]
    arm = {"arm": "base", "rows": rows, "costs": {"train": [90.4, 1.25, 170.2]}}
    left = {"defaults: train": "about 60 minutes"}
    figures = {"model": "m", "arms": [arm], "scale": {"name": "gpu"}, "not run": left}
    assert "| training s |" in run.table(figures) and "| 90 |" in run.table(figures)
    text = run.table({**figures, "scale": {"name": "cpu"}})
    head, _, base, chat, *_, last = text.splitlines()
    names = [f"perplexity {n}" for n in (64, 128, 256)]
    names += ["passkey 128", "next-passage", "processor s", "GiB"]
    assert head == f"| m | {' | '.join(names)} |"
    cells = ["base", "1,186.64", "7.25 (-2.9 % [-5.3, -0.5])", "7.50 (+3.0 %)"]
    cells += ["75 % [41, 93]", "75 % [50, 100]", "170", "1.2"]
    assert base == f"| {' | '.join(cells)} |"
    assert chat == "| base, chat template | - | - | - | 25 % [50, 100] | - | - | - |"
    assert last == "not run: defaults: train (about 60 minutes)"


def test_ctrl_c_on_the_driver_waits_for_the_job_to_save(tmp_path, monkeypatch):
    def saves(command):
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            (tmp_path / "saved").touch()
        return 75

    monkeypatch.setattr("skipwise.cli.main", saves)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        code, *_ = run.run_skipwise(["extend"], tmp_path / "log", 30)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert code == 75 and (tmp_path / "saved").exists()


def is_of_a_cpu(figures: dict[str, Any]) -> bool:
    return figures["scale"]["name"] == "cpu"


def test_the_page_and_the_readme_show_the_newest_results():
    files = sorted((FOLDER / "results").glob("real_model_*.json"))
    *_, figures = [x for x in map(json.loads, map(Path.read_text, files)) if is_of_a_cpu(x)]
    table = run.table({**figures, "not run": {}})
    root = FOLDER.parents[1]
    assert table in (root / "docs" / "real-model.md").read_text(encoding="utf-8")
    readme = (root / "README.md").read_text(encoding="utf-8")
    for line in table.splitlines()[2:]:
        assert " | ".join(line.split(" | ")[1:4]) in readme, line
