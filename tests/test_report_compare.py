"""Several runs and evaluations side by side: whose column is whose, and one page of all."""

import re

import pytest
from test_report_evaluation import complete_rows, make_evaluation, make_run, ppl, titles

from skipwise.errors import SkipwiseError
from skipwise.report import compare_runs, format_table


def models(table):
    """The columns of the Markdown table that hold models."""
    return [cell.strip() for cell in table.splitlines()[0].split("|")][4:-1]


def test_a_comparison_names_runs_and_keeps_one_base(tmp_path):
    rows = complete_rows("before", "after")
    for name in ("fast", "slow"):
        make_run(tmp_path / name, name, rows)
    make_evaluation(tmp_path / "eval", [{**r, "model": "other"} for r in rows[:40]], "eval")
    out = tmp_path / "deep" / "all.html"
    table = compare_runs([tmp_path / name for name in ("fast", "slow", "eval")], out)
    assert models(table) == ["before", "fast", "slow", "other"]
    page = out.read_text()
    assert [path.name for path in out.parent.iterdir()] == ["all.html"]
    assert titles(page)[0] == "Side by side" and titles(page)[-1] == "What is compared"
    assert "fast against before" in page and "slow against before" in page


@pytest.mark.parametrize("base", ["tiny", "large"])
def test_bases_that_differ_are_told_apart(tmp_path, base):
    make_run(tmp_path / "a", "a", [ppl("before", 256, 8.0), ppl("after", 256, 7.0)])
    other = [ppl("before", 256, 8.1), ppl("after", 256, 7.5)]
    make_run(tmp_path / "b", "b", other, base=base)
    table = compare_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "all.html")
    assert models(table) == ["before (a)", "before (b)", "a", "b"]


def test_a_base_measured_further_in_one_run_is_put_together(tmp_path):
    first = [ppl("before", 256, 8.0), ppl("after", 256, 7.0)]
    make_run(tmp_path / "a", "a", first)
    make_run(tmp_path / "b", "b", [*first, ppl("before", 512, 9.0)])
    table = compare_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "all.html")
    assert "before (" not in table and "9.00 [8.10, 9.90]" in table


def test_folders_of_one_name_get_labels_that_differ(tmp_path):
    rows = [ppl("after", 256, 8.0)]
    for place in ("old", "new"):
        make_run(tmp_path / place / "demo", "demo", rows)
        make_evaluation(tmp_path / place / "eval", [ppl("m", 256, 8.0)], "eval")
    folders = [tmp_path / place / what for what in ("demo", "eval") for place in ("old", "new")]
    table = compare_runs(folders, tmp_path / "all.html")
    ms = ("m in eval (old/eval)", "m in eval (new/eval)")
    assert models(table) == ["demo (old/demo)", "demo (new/demo)", *ms]


def test_a_folder_that_cannot_be_compared_is_named(tmp_path):
    good = make_run(tmp_path / "good", rows=[ppl("after", 256, 8.0)])
    bad = make_run(tmp_path / "bad", rows=[ppl("after", 256, 8.0)])
    out = tmp_path / "all.html"
    with pytest.raises(SkipwiseError, match="given twice"):
        compare_runs([good, good], out)
    with pytest.raises(SkipwiseError, match="two or more folders"):
        compare_runs([good], out)
    for text, words in (
        ("[", "is not JSON"),
        ("{}", "not a list of rows"),
        ('[{"model": "after"}]', "a row without task, metric, value"),
        ("[]", "nothing in its results.json"),
        (None, "no results.json"),
    ):
        (bad / "results.json").unlink(missing_ok=True)
        if text is not None:
            (bad / "results.json").write_text(text)
        with pytest.raises(SkipwiseError, match=words) as error:
            compare_runs([good, bad], out)
        assert str(bad) in str(error.value)
    assert not out.exists()


def test_columns_of_different_texts_are_told_apart(tmp_path):
    rows = [{**ppl("before", 256, 8.0), "text": "a"}, {**ppl("after", 256, 7.0), "text": "b"}]
    rows += [{**ppl("after", 256, 7.0), "task": "needle", "text": "b"}]
    said = "Not on the same text everywhere: perplexity."
    assert said in format_table(rows)
    same = [{**row, "text": "a"} for row in rows]
    assert "same text" not in format_table(same)
    page = tmp_path / "all.html"
    folders = [
        make_run(tmp_path / name, name, [{**ppl("after", 256, 8.0), "text": name}])
        for name in ("one", "two")
    ]
    assert said in compare_runs(folders, page) and said in page.read_text()


def test_what_differs_is_named_with_the_difference_and_its_interval(tmp_path):
    folders = []
    for name, method, found in (("one", "pose", 45), ("two", "none", 20)):
        scores = [1] * found + [0] * (50 - found)
        row = {**ppl("after", 1024, found / 50), "task": "passkey", "metric": "exact_match"}
        folder = make_run(tmp_path / name, name, [{**row, "samples": scores, "num_samples": 50}])
        steps = "training:\n  num_steps: 100\n  learning_rate: 0.1\n"
        (folder / "recipe.yaml").write_text(f"name: {name}\nmethod: {method}\n{steps}")
        folders.append(folder)
    page = tmp_path / "all.html"
    compare_runs(folders, page)
    text = page.read_text()
    assert "<h2>Differences</h2>" in text and "passkey −50 points [−" in text
    differ = text[text.index("<h2>What differs") :].partition("</section>")[0]
    assert "method" in differ and "<td>pose</td><td>none</td>" in differ
    assert "num_steps" not in differ and "name" not in differ


def run_of(folder, name, recipe, rows, **more):
    made = make_run(folder, name, rows, positions=None, selection=None, **more)
    (made / "recipe.yaml").write_text(recipe)
    return made


@pytest.mark.parametrize(
    ("recipes", "labels"),
    [
        (("method: pose", "method: none"), ("r (method=pose)", "r (method=none)")),
        (
            ("rope: {type: yarn}\nseed: 1", "rope: {type: llama3}\nseed: 1"),
            ("r (rope.type=yarn)", "r (rope.type=llama3)"),
        ),
        (
            ("a: 1\nb: 1", "a: 1\nb: 2", "a: 2\nb: 1"),
            ("r (a=1, b=1)", "r (a=1, b=2)", "r (a=2, b=1)"),
        ),
        (("name: x", "name: y"), ("r (0)", "r (1)")),
    ],
)
def test_runs_of_one_name_are_told_apart_by_the_settings_that_differ(tmp_path, recipes, labels):
    rows = [ppl("before", 256, 9.0), ppl("after", 256, 8.0)]
    folders = [run_of(tmp_path / str(i), "r", text, rows) for i, text in enumerate(recipes)]
    assert models(compare_runs(folders, tmp_path / "all.html")) == ["before", *labels]


def test_runs_with_the_same_untrained_model_share_its_column_and_its_curve(tmp_path):
    rows = [ppl("before", n, 5.0 + n / 64) for n in (256, 1024)]
    rows += [ppl("untrained", n, 5.8) for n in (256, 1024)]
    folders = [
        run_of(tmp_path / name, name, "", [*rows, *[ppl("after", n, value) for n in (256, 1024)]])
        for name, value in (("a", 5.0), ("b", 5.2), ("c", 5.3))
    ]
    page = tmp_path / "all.html"
    table = compare_runs(folders[:2], page)
    assert models(table) == ["before", "untrained", "a", "b"]
    assert "Only in the table" not in page.read_text() and "perplexity-wide" in page.read_text()
    compare_runs(folders, page)
    assert "Only in the table: untrained." in page.read_text()
    assert "perplexity-wide" in page.read_text() and "too many" not in page.read_text()
    changed = [{**row, "value": 6.1} if row["model"] == "untrained" else row for row in rows]
    other = run_of(tmp_path / "d", "d", "", [*changed, ppl("after", 256, 5.0)])
    table = compare_runs([folders[0], other], page)
    assert models(table)[:3] == ["before", "untrained (a)", "untrained (d)"]
    assert all(
        f'"n" scope="col">{name}</th>' in page.read_text()
        for name in ("Before", "Untrained (a)", "a")
    )


def test_the_cost_of_each_run_is_shown_beside_the_others(tmp_path):
    rows, text = [ppl("after", 256, 8.0)], "seed: 1\n"
    training = {"num_steps": 10, "num_tokens": 5_120, "seconds": 64.0, "peak_memory_gib": 1.25}
    finish = {"num_steps": 2, "num_tokens": 1_280, "seconds": 16.0, "peak_memory_gib": 2.5}
    stages = {"check": 5.0, "train": 80.0, "export": None}
    one = {"training": training, "finish": finish, "stages": stages}
    folders = [
        run_of(tmp_path / "a", "a", text, rows, **one),
        run_of(tmp_path / "b", "b", text, rows, training=None),
        make_evaluation(tmp_path / "eval", [ppl("m", 256, 8.0)], "eval"),
    ]
    page = tmp_path / "all.html"
    compare_runs(folders, page)
    cost = page.read_text().partition("<h2>What each run cost</h2>")[2].partition("</section>")[0]
    lines = [
        re.sub("<.*?>", "|", line).strip("|").split("|")
        for line in re.findall(r'<tr><th scope="row">(.*)</tr>', cost)
    ]
    cells = [[cell for cell in line if cell] for line in lines]
    # 6,400 tokens in 80 s
    assert cells == [
        ["a", "12", "6,400", "1 min 20 s", "80", "2.50 GiB", "1 min 25 s"],
        ["b", "–", "–", "–", "–", "–", "–"],
    ]


def test_the_headline_of_a_comparison_is_the_difference_with_its_interval(tmp_path):
    folders = []
    for name, hits in (("one", 45), ("two", 20)):
        row = {**ppl("after", 1024, hits / 50), "task": "passkey", "metric": "exact_match"}
        scores = [1] * hits + [0] * (50 - hits)
        rows = [{**row, "samples": scores, "num_samples": 50}]
        folders.append(run_of(tmp_path / name, name, "", rows))
    page = tmp_path / "all.html"
    compare_runs(folders, page)
    head = page.read_text().partition("<h1>")[2].partition("</h1>")[0]
    lead, _, rest = head.partition("<span>")
    assert lead.strip() == "one and two, measured at 1,024 tokens."
    assert rest.startswith("two against one at 1,024 tokens: passkey −50 points [−")
