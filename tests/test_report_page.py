"""The parts of the page: contents, headline, tiles, choices, checks, lines to load the model."""

import ast
import html
import json
import re
import shlex

import pytest
from test_report_evaluation import bench, complete_rows, found, make_run, ppl, ruler, titles

from skipwise.report import write_report
from skipwise.report.figures import curves
from skipwise.report.page.html import Section, page, table, tile_list
from skipwise.report.page.usage import loading_code, serving_commands

CHOICES = {
    "scaling": "llama3",
    "rope_choice": {
        "type": "llama3",
        "detail": "llama3, perplexity 4.1",
        "context_lengths": [4096, 32768],
        "left_out": {"longrope": "too large"},
        "measured": [
            {"type": "yarn", "temperature": 1.4, "perplexity": [7.51, 8.12], "passkeys": 3},
            {"type": "llama3", "temperature": 1.2, "perplexity": [7.41, 7.72], "passkeys": 4},
            {"type": "linear", "temperature": 1.0, "perplexity": [17.4, None], "passkeys": 0},
        ],
    },
    "temperature": {
        "value": 1.05,
        "detail": "as searched",
        "context_lengths": [4096, 32768],
        "searched": [
            {"temperature": t, "perplexity": [7.4, far]}
            for t, far in ((1.0, 7.33), (1.05, 7.21), (1.1, 7.26))
        ],
    },
    "untrained": {"value": 1.0, "detail": "too little text to search on"},
    "separator": {
        "detail": "a blank line between documents, perplexity 9.2; EOS 9.9",
        "perplexity": {"EOS": 9.9, "a blank line": 9.2},
    },
}
CHECKS = [
    {"name": "rope", "passed": True, "detail": "scaled"},
    {"name": "text", "passed": True, "is_warning": True, "detail": "few documents"},
    {"name": "labels", "passed": True, "detail": "masked"},
    {"name": "window", "passed": False, "detail": "too short"},
]


def untrained(rows):
    return [{**row, "model": "untrained"} for row in rows if row["model"] == "after"]


def part(text, title):
    """The section of that title."""
    return text[text.index(f"<h2>{title}</h2>") :].partition("</section>")[0]


def plain(text):
    return html.unescape(re.sub("<.*?>", "", text)).replace("\xa0", " ")


def page_of(folder, rows=None, **more):
    return write_report(make_run(folder, rows=rows, **more)).read_text()


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """The page of a run with everything, exported."""
    folder = tmp_path_factory.mktemp("complete")
    (folder / "model").mkdir()
    rows = complete_rows("before", "after")
    return page_of(folder, rows + untrained(rows), exported=True, checks=CHECKS, **CHOICES)


@pytest.mark.extended
def test_the_contents_link_to_every_section_once_and_in_order(complete):
    nav = complete.partition("<nav")[2].partition("</nav>")[0]
    links = re.findall(r'<a href="#([^"]+)">(.*?)</a>', nav)
    sections = re.findall(r'<section id="([^"]+)">\n<h2>(.*?)</h2>', complete)
    assert links == sections and len(links) >= 14
    assert len(titles(complete)) == len(set(titles(complete))) == len(sections)
    ids = re.findall(r' id="([^"]+)"', complete)
    assert len(ids) == len(set(ids))


def test_sections_of_one_title_have_anchors_of_their_own():
    sections = [Section(title, "") for title in ("Checks", "checks!", "Checks 2", "<i>", "", "Ω")]
    text = page(title="", eyebrow="", headline="", tiles="", sections=[None, *sections])
    ids = re.findall(r'<section id="([^"]+)"', text)
    assert ids[:2] == ["section-checks", "section-checks-2"] and len(set(ids)) == len(ids) == 6
    assert re.findall(r'href="#([^"]+)"', text) == ids
    empty = page(title="", eyebrow="", headline="", tiles="", sections=[])
    assert "<nav" not in empty and "<section" not in empty


def test_checks_that_passed_are_folded_and_the_others_are_not(complete):
    checks = part(complete, "Checks")
    shown, _, folded = checks.partition("<details>")
    assert "<details open" not in checks and "<summary>2 checks passed</summary>" in folded
    assert "rope: scaled" in folded and "labels: masked" in folded
    assert "rope: scaled" not in shown and "labels: masked" not in shown
    assert '<li class="failed"><b>failed</b><span>window: too short' in shown
    assert '<li class="warn"><b>warn</b><span>text: few documents' in shown
    assert shown.index("window") < shown.index("few documents"), "failures come first"


@pytest.mark.parametrize(("kept", "folds"), [(CHECKS[:1], True), (CHECKS[1:2], False)])
def test_nothing_is_folded_where_nothing_passed_without_a_warning(tmp_path, kept, folds):
    rows = [ppl("after", 4096, 8.0)]
    text = page_of(tmp_path, rows, checks=kept, positions=None, selection=None)
    assert ("<summary>1 check passed</summary>" in part(text, "Checks")) == folds


def test_each_choice_is_shown_with_what_it_was_chosen_from(complete):
    choices = part(complete, "Scaling, temperature and separator")
    lines = re.findall(r"<tr( class=\"chosen\")?><th scope=\"row\">(.*?)</tr>", choices)
    assert [plain(text) for chosen, text in lines if chosen] == [
        "llama3 chosen1.27.417.724 of –",
        "1.05 chosen7.407.21",
        "a blank line chosen9.20",
    ]
    assert len(lines) == 3 + 3 + 2
    for value in ("8.12", "17.40", "∞", "7.33", "7.26", "9.90"):
        assert f'<td class="n">{value}</td>' in choices
    assert "longrope was left out: too large." in choices
    assert "Attention temperature, without training: 1, too little text" in choices


def test_a_choice_that_was_not_measured_is_one_sentence(tmp_path):
    more = {"positions": None, "selection": None}
    rows = [ppl("after", 4096, 8.0)]
    text = page_of(tmp_path / "a", rows, scaling="yarn", **more)
    said = plain(part(text, "Scaling, temperature and separator"))
    assert "RoPE scaling: yarn, as the recipe or the base model says." in said
    detail = "yarn, not measured: no text to spare"
    choice = {"rope_choice": {"type": "yarn", "detail": detail}, "separator": {"detail": "EOS"}}
    text = page_of(tmp_path / "b", rows, **choice, **more)
    said = plain(part(text, "Scaling, temperature and separator"))
    assert f"RoPE scaling: {detail}." in said and "Separator: EOS." in said
    assert "Scaling, temp" not in page_of(tmp_path / "c", rows, **more)


def test_the_lines_to_load_and_serve_name_the_model_of_the_run(complete, tmp_path):
    shown = plain(part(complete, "Load and serve the model"))
    model = re.search(r"vllm serve (\S+) --max-model-len 32768", shown)[1]
    assert model.endswith("/model") and loading_code(model) in shown
    assert f"sglang.launch_server --model-path {model} --context-length 32768" in shown
    assert f"llama-server -m {model[:-6]}/gguf/MODEL.gguf -c 32768" in shown
    assert f"skipwise export {model[:-6]} --to gguf" in shown
    for folder in ("model", "gguf", "adapter"):
        (tmp_path / folder).mkdir()
    (tmp_path / "gguf" / "demo-f16.gguf").touch()
    rows = [ppl("after", 4096, 8.0)]
    shown = plain(part(page_of(tmp_path, rows, exported=True), "Load and serve the model"))
    assert "gguf/demo-f16.gguf -c 32768" in shown and "--to gguf" not in shown
    assert f"The LoRA adapter alone is in {tmp_path / 'adapter'}." in shown


def test_a_name_with_quotes_stays_one_argument_and_one_string():
    name = 'runs/my "old" $(model) it\'s'
    tree = ast.parse(loading_code(name))
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert strings.count(name) == 2
    vllm, sglang, llama = map(shlex.split, serving_commands(name, 64, name).splitlines())
    assert vllm[2] == sglang[4] == llama[2] == name


def test_ruler_is_one_table_with_the_models_of_a_task_below_each_other(complete):
    shown = part(complete, "RULER tasks")
    assert shown.count('<table class="shares">') == 1
    body = shown[shown.index('<table class="shares">') :]
    groups = re.findall(r"<tbody>(.*?)</tbody>", body, flags=re.DOTALL)
    assert len(groups) == 9
    for group in groups:
        assert re.findall(r'scope="row">(\w+)</th>', group) == ["Before", "Untrained", "After"]
        assert group.count("<td") == 3 * 6 and group.count("<tr>") == group.count("</tr>") == 3
    first = plain(groups[0].partition("Before")[2].partition("Untrained")[0])
    assert first.startswith("999897") and first.endswith("101010")


def test_the_headline_is_followed_by_a_sentence_of_its_own(complete):
    lead, rest = re.search(r"<h1>(.*?)<span>(.*?)</span></h1>", complete).groups()
    assert plain(lead) == "tiny was extended from 4,096 to 32,768 tokens but falls short. "
    assert rest.startswith("Worse beyond error on short contexts: ")
    for name, kept in (("before", "before: 7."), ("be", "Before: 7.")):
        text = page(
            title="", eyebrow="", headline="b: before: 7.", tiles="", sections=[], names=[name]
        )
        assert f"<span>{kept}</span>" in text


@pytest.mark.parametrize("num", range(1, 16))
def test_no_tile_is_alone_in_its_row(num):
    text = tile_list([(str(i), "x") for i in range(num)])
    columns = int(re.search(r"repeat\((\d),1fr\)", text)[1])
    assert text.count("<li>") == num and columns <= 5
    assert num == 1 or num % columns != 1
    assert columns == {1: 1, 2: 2, 3: 3, 4: 4, 5: 3, 6: 3, 7: 4, 8: 4, 9: 3}.get(num, columns)


def test_the_caption_of_the_loss_says_what_it_holds(tmp_path, complete):
    text = plain(part(complete, "Training loss"))
    assert "It is of examples with skipped positions: do not compare it with the base's" in text
    more = {"positions": None, "selection": None, "rows": [ppl("after", 4096, 8.0)]}
    folder = make_run(tmp_path, **more, train_length=32768)
    text = plain(part(write_report(folder).read_text(), "Training loss"))
    assert "skipped positions" not in text and "Do not compare it" in text
    lines = [json.dumps({"step": i, "loss": 2.0, "distillation": 0.1}) for i in range(1, 5)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    text = plain(part(write_report(folder).read_text(), "Training loss"))
    assert "It includes the distance to the base's predictions (distillation): do not" in text


EXPLODES = [
    *[ppl("before", n, v) for n, v in ((256, 5.06), (512, 6.9), (1024, 28.0), (2048, 60.81))],
    *[ppl("untrained", n, v) for n, v in ((256, 5.74), (512, 5.6), (1024, 5.7), (2048, 5.83))],
    *[ppl("after", n, v) for n, v in ((256, 5.06), (512, 4.9), (1024, 4.8), (2048, 4.71))],
]


def test_a_base_that_explodes_does_not_squeeze_the_axis():
    off = curves.off_scale(EXPLODES)
    assert [(row["model"], row["context_length"]) for row in off] == [
        ("before", 1024),
        ("before", 2048),
    ]
    axes = curves.plot_perplexity(EXPLODES, 256).axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert {"↑ 28.00", "↑ 60.81"} <= set(texts)
    low, high = axes.get_ylim()
    assert (5.83 - 4.71) / (high - low) > 0.15 and high < 12
    marks = [line for line in axes.lines if len(line.get_xdata()) == 1]
    assert sorted(float(line.get_xdata()[0]) for line in marks) == [1024, 2048]
    assert all(6.9 < float(line.get_ydata()[0]) < high for line in marks)


def test_nothing_is_off_the_scale_where_all_explode_or_none_does():
    alone = [row for row in EXPLODES if row["model"] == "before"]
    assert curves.off_scale(alone) == [], "its rise is what the figure shows"
    both = [*alone, *[{**row, "model": "other"} for row in alone]]
    assert curves.off_scale(both) == []
    trained = [row for row in EXPLODES if row["model"] != "before"]
    assert curves.off_scale(trained) == []
    large = [ppl("large", n, v) for n, v in ((256, 90.0), (2048, 80.0))]
    assert curves.off_scale(trained + large) == [], "another model, not a rise"
    shares = [found("a", "passkey", n, v) for n, v in ((256, 0.1), (512, 1.0))]
    assert curves.off_scale(shares) == []


def test_a_wide_band_does_not_squeeze_the_axis_either():
    rows = [{**ppl("after", n, 8.0 - n / 1024), "low": 0.1, "high": 8000.0} for n in (256, 512)]
    low, high = curves.plot_perplexity(rows).axes[0].get_ylim()
    assert 4 < low < 7.5 and 7.75 < high < 16


def test_columns_and_legends_are_capitalised_and_other_names_are_not(complete):
    shown = part(complete, "Before, rescaled and trained")
    assert all(f'scope="col">{name}</th>' in shown for name in ("Before", "Untrained", "After"))
    assert "lower is better" in shown and shown.count("lower is better") == 1
    labels = re.findall(r"<text[^>]*>(?:<tspan[^>]*>)?(before|Before|untrained|after)<", complete)
    assert set(labels) == {"Before"}
    assert '<th class="n" scope="col">b&lt;</th>' in table(["", "b<"], [["x", "1"]])


HALF = {
    "trained, not evaluated": {"rows": [], "status": "started", "checks": CHECKS},
    "evaluated before, not trained": {
        "rows": [r for r in complete_rows("before", "after") if r["model"] == "before"],
        "status": "started",
        "training": None,
        "selection": None,
    },
    "evaluated, not exported": {"rows": complete_rows("before", "after"), "exported": False},
    "one length": {"rows": [ppl(m, 4096, 8.0) for m in ("before", "after")]},
    "benchmarks alone": {"rows": [bench(m, "boolq", 0.7) for m in ("before", "after")]},
    "one ruler task": {"rows": [ruler("after", "vt", n, 0.9) for n in (4096, 8192)]},
    "nothing trained": {"rows": [ppl("after", 4096, 8.0)], "training": None, "exported": False},
    "lora": {"rows": [ppl("after", 4096, 8.0)], "training": {"mode": "lora", "num_steps": 3}},
}


@pytest.mark.extended
@pytest.mark.parametrize("name", list(HALF))
def test_a_run_of_which_only_a_part_is_there_has_a_page_of_it(tmp_path, name):
    given = {"positions": None, **HALF[name]}
    rows = given.pop("rows")
    text = page_of(tmp_path, rows, **given)
    assert "None" not in plain(text) and not re.search(r"\bnan\b", plain(text))
    links = re.findall(r'<li><a href="#([^"]+)">', text)
    assert links == re.findall(r'<section id="([^"]+)"', text)
    waits = name != "evaluated before, not trained"
    assert ("Not exported yet" in text) == waits
    assert ("has not finished" in text) == (given.get("status") == "started")
    if name == "trained, not evaluated":
        assert "tiny is not measured yet" in text and "window: too short" in text
    if name == "lora":
        assert "lora" in part(text, "Data, model and machine")
    if name == "evaluated before, not trained":
        assert "it was not measured at 32,768" in plain(text)
        assert "No finished training is recorded." in text


def test_the_new_parts_escape_what_they_are_told(tmp_path):
    evil = '"><img src=http://x.example/>'
    choice = {
        "type": evil,
        "measured": [{"type": evil, "perplexity": [1.0]}],
        "left_out": {evil: evil},
    }
    more = {
        "exported": True,
        "scaling": evil,
        "rope_choice": choice,
        "temperature": {"value": 1.0, "detail": evil},
        "separator": {"detail": evil, "perplexity": {evil: 1.0, "EOS": 2.0}},
    }
    rows = [{**ppl(evil, n, 1.0), "task": evil, "title": evil} for n in (64, 128)]
    folder = tmp_path / "<img src=x>"
    folder.mkdir()
    (folder / "model").mkdir()
    text = page_of(folder, [*rows, ruler(evil, "vt", 64, 0.5)], positions=None, **more)
    assert "<img" not in text and text.count(html.escape(evil)) > 8
    links = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert all(re.fullmatch(r"#[\w.-]+", link) for link in links)
