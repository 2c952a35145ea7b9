"""The report: says what the numbers say, in one page that needs nothing else."""

import html
import json
import re
import shutil
import subprocess
import sys

import pytest

from skipwise.errors import SkipwiseError
from skipwise.report import format_table, plot_positions, write_report
from skipwise.report.headline import headline
from skipwise.report.rows import find, pooled

RUN = {
    "name": "demo",
    "model": {"name": "tiny", "family": "llama", "num_parameters": 1234},
    "original_length": 256,
    "train_length": 256,
    "target_length": 1024,
    "rope": {"rope_type": "yarn", "factor": 4.0},
    "data": {
        "sources": ["books"],
        "num_documents": 10,
        "num_tokens": 9999,
        "num_short": 3,
        "short_documents": "drop",
        "num_bad_records": 2,
        "num_eval_documents": 4,
    },
    "checks": [{"name": "rope", "passed": True, "detail": "fine"}],
    "training": {
        "method": "pose",
        "mode": "full",
        "num_steps": 10,
        "batch_size": 2,
        "tokens_per_step": 512,
        "num_tokens": 5120,
        "seconds": 65.0,
        "trainable_parameters": 1234,
        "peak_memory_gib": 1.5,
    },
    "positions": {
        "sampler": "PoSE()",
        "examples": [{"lengths": [100, 156], "position_starts": [0, 700]}],
        "distances": [1, 500, 1000],
        "coverage": [1.0, 0.2, 0.1],
    },
    "stages": {"train": 65.0},
    "versions": {"skipwise": "0.1.0"},
    "machine": {"cpu": "x"},
    "reproduce": ["skipwise extend tiny --to 1k"],
}


def ppl(model, length, value):
    return {
        "model": model,
        "task": "perplexity",
        "metric": "perplexity",
        "context_length": length,
        "value": value,
        "low": value and value * 0.9,
        "high": value and value * 1.1,
        "num_samples": 64,
    }


def key(model, length, depth, value, num=10):
    return {
        "model": model,
        "task": "passkey",
        "metric": "exact_match",
        "context_length": length,
        "depth": depth,
        "value": value,
        "low": 0.0,
        "high": 1.0,
        "num_samples": num,
    }


ROWS = [
    ppl("before", 256, 8.0),
    ppl("before", 1024, 92.5),
    ppl("after", 256, 8.2),
    ppl("after", 1024, 7.75),
    *[key("before", n, d, 1.0 if n == 256 else 0.0) for n in (256, 1024) for d in (0.0, 1.0)],
    *[key("after", 256, d, 1.0) for d in (0.0, 1.0)],
    key("after", 1024, 0.0, 1.0),
    key("after", 1024, 1.0, 0.9),
]


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with its report, for tests that only read."""
    folder = make_folder(tmp_path_factory.mktemp("finished"))
    assert write_report(folder) == folder / "report" / "index.html"
    return folder


def make_folder(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    (tmp_path / "recipe.yaml").write_text("model: tiny\n")
    lines = [json.dumps({"step": i, "loss": 2 - i / 10}) for i in range(1, 11)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 11, "lo')
    (tmp_path / "results.json").write_text(json.dumps(ROWS))
    return tmp_path


def test_depths_are_pooled_by_samples_with_wilsons_interval():
    row = find(ROWS, "after", "passkey", 1024)
    assert (row["value"], row["num_samples"]) == (0.95, 20)
    # 19 of 20 by hand: z² = 3.8415, centre (0.95 + 0.09604) / 1.19207 = 0.87750,
    # half width 1.95996 / 1.19207 * sqrt(0.0475 / 20 + 3.8415 / 1600) = 0.11362
    assert (row["low"], row["high"]) == pytest.approx(
        (0.87750 - 0.11362, 0.87750 + 0.11362), abs=2e-5
    )
    uneven = pooled([key("after", 64, 0.0, 1.0, 30), key("after", 64, 1.0, 0.0, 10)])
    assert uneven[0]["value"] == 0.75


def test_the_table_has_a_line_a_length_and_a_column_a_model():
    lines = [line for line in format_table(ROWS).splitlines() if line.startswith("|")]
    assert lines[0].split("|")[4].strip() == "before" and "after" in lines[0]
    assert any("1,024" in x and "92.50" in x and "7.75 [6.98, 8.53]" in x for x in lines)
    assert any("95 % [76, 99]" in x for x in lines)
    assert len({len(x) for x in lines}) == 1
    assert "not measured" in format_table([*ROWS, ppl("after", 512, 7.9)])
    assert "beyond measure" in format_table([ppl("before", 512, None)])
    assert format_table([]) == "nothing was measured"


def test_shares_are_never_rounded_up_to_all_or_down_to_nothing():
    rows = [key("after", 64, 0.0, 0.999, 1000)]
    assert "99.9 %" in format_table(rows)
    assert "99.9 % [99.9, 100.0]" in format_table([key("after", 64, 0.0, 0.9997, 10_000)])
    assert " 0.1 %" in format_table([key("after", 64, 0.0, 0.0003, 10_000)])


def test_huge_values_are_written_out_and_nan_and_null_are_beyond_measure():
    assert "| 100,000 [90,000, 110,000] |" in format_table([ppl("after", 64, 1e5)])
    for value in (None, float("nan"), float("inf")):
        assert "| beyond measure |" in format_table([ppl("after", 64, value)])
    mixed = pooled([key("after", 64, 0.0, None), key("after", 64, 1.0, 0.5)])
    assert (mixed[0]["value"], mixed[0]["num_samples"]) == (0.5, 10)


def test_the_headline_says_what_was_reached():
    said = headline(RUN, ROWS)
    assert said == (
        "tiny now reads 1,024 tokens instead of 256: passkey found in 95 % of 20 trials at 1,024 "
        "(0 % before); perplexity on the same target tokens 7.75 with 1,024 tokens of context, "
        "8.20 with 256, 8.00 before extension with 256; area of passkey 97.5 % over 256–1,024 "
        "tokens (50 % before)."
    )


GOOD = [key("after", 1024, 0.0, 1.0), ppl("after", 256, 8.0), ppl("after", 1024, 7.0)]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([key("after", 1024, 0.0, 0.8)], "falls short: passkey below 90 % at 1,024 (lowest 80 %)"),
        ([key("after", 1024, 0.0, 0.4)], "did not work: passkey below 90 % at 1,024 (lowest 40 %)"),
        ([*GOOD, key("after", 512, 0.0, 0.1)], "falls short: passkey below 90 % at 512"),
        (
            [key("after", 1024, d / 10, float(d != 5)) for d in range(11)],
            "falls short: at 50 % of the depth of 1,024 tokens the passkey is found in 0 %",
        ),
        (
            [*GOOD, key("before", 256, 0.0, 1.0), key("after", 256, 0.0, 0.5)],
            "at the original 256 tokens the passkey is found in 50 % of trials (100 % before)",
        ),
        ([ppl("after", 256, 8.0), ppl("after", 1024, 9.0)], "falls short: perplexity is higher"),
        ([ppl("after", 256, 8.0), ppl("after", 1024, 13.0)], "did not work: perplexity is higher"),
        ([*GOOD[:2], ppl("after", 1024, None)], "did not work: perplexity is beyond measure"),
        ([*GOOD[:2], ppl("after", 1024, float("nan"))], "did not work: perplexity is beyond"),
        ([*GOOD, ppl("before", 256, 6.9)], "higher than the base model's with 256"),
        ([*GOOD, ppl("before", 256, 7.1)], "the original 256 tokens has risen by 13%"),
    ],
)
def test_the_headline_says_what_fell_short(rows, words):
    said = headline(RUN, rows)
    assert words in said and "now reads" not in said


def test_the_headline_names_a_failed_check():
    checks = [{"name": "rope", "passed": False, "detail": ""}]
    said = headline({**RUN, "checks": checks}, ROWS)
    assert "falls short: the check “rope” failed" in said and "now reads" not in said


def test_the_headline_claims_nothing_that_was_not_measured():
    assert headline(RUN, []) == "tiny is not measured yet."
    assert headline(RUN, [ppl("after", 256, 8.0)]).endswith(
        "the trained model was not measured at 1,024."
    )
    assert "perplexity not measured at 1,024" in headline(RUN, GOOD[:1])
    said = headline(RUN, GOOD[1:])
    assert "passkey not measured at 1,024" in said and "now reads" not in said


def test_the_page_holds_every_section_and_the_numbers(finished):
    page = (finished / "report" / "index.html").read_text()
    for word in (
        "Before, rescaled and trained",
        "Perplexity against",
        "Passkey",
        "Training loss",
        "Positions",
        "Cost compared",
        "Checks",
        "Reproduce",
        "92.50",
        "7.75",
        "95 %",
        "skipwise extend tiny --to 1k",
        "model: tiny",
    ):
        assert word in page, word
    for name in ("perplexity", "passkey", "loss", "positions"):
        assert (finished / "report" / f"{name}.png").stat().st_size > 5000
    assert (finished / "report" / "table.md").read_text().strip() == format_table(ROWS)
    assert len(page) < 600_000


def test_every_figure_says_its_values_to_those_who_do_not_see_it(finished):
    page = (finished / "report" / "index.html").read_text()
    labels = [html.unescape(x) for x in re.findall(r'role="img" aria-label="([^"]+)"', page)]
    assert labels == [
        "Perplexity by tokens of context. before: 8.00 at 256, 92.50 at 1,024; "
        "after: 8.20 at 256, 7.75 at 1,024.",
        "Passkey retrieval over all depths. before at 256: 100 %; before at 1,024: 0 %; "
        "after at 256: 100 %; after at 1,024: 95 % (90 % at 100 % depth).",
        "Training loss over 10 logged steps: 1.900 on average over the first tenth, "
        "1.000 over the last.",
        "1 training examples of 256 tokens as chunks on positions 0 to 1,024, the furthest "
        "reaching position 856. Share of examples that show a relative distance: 1 by 100.0%, "
        "500 by 20.0%, 1,000 by 10.0%.",
    ]
    figures = re.findall(r"<svg [^>]*>", page)
    assert len(figures) == 8 and all('aria-hidden="true"' in figure for figure in figures)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids), "clips point into their figure"


def test_the_figures_take_the_colours_and_the_font_of_the_page(finished):
    page = (finished / "report" / "index.html").read_text()
    figures = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert "DejaVu" not in figures and "#3a3f47" not in figures and "#2f6fde" not in figures
    named = re.findall(r"(--\w+):", page)
    assert {named.count(name) for name in named} == {2}, "once light, once dark"
    assert {"--before", "--after"} <= set(re.findall(r"var\((--\w+)\)", page)) <= set(named)


def test_the_recipe_is_shown_as_it_is_written(folder):
    recipe = "model: tiny  # <b> & $name 95 %\nlora: null\n"
    (folder / "recipe.yaml").write_text(recipe)
    page = write_report(folder).read_text()
    assert html.unescape(page.split("recipe.yaml</summary><pre>")[1].split("</pre>")[0]) == recipe


def test_a_long_run_of_many_chunks_still_makes_a_small_page(folder):
    run = json.loads((folder / "run.json").read_text())
    starts = list(range(0, 1024, 16))
    run["positions"]["examples"] = [{"lengths": [1] * 64, "position_starts": starts}] * 24
    (folder / "run.json").write_text(json.dumps(run))
    lines = [json.dumps({"step": i, "loss": 2 + (i * 37 % 100) / 50}) for i in range(20_000)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    page = write_report(folder).read_text()
    sizes = [len(figure) for figure in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)]
    assert max(sizes) < 80_000 and len(page) < 600_000
    assert "64 chunks of each example, spread evenly" in page


def test_attention_work_is_counted_by_pairs(finished):
    page = (finished / "report" / "index.html").read_text()
    # 20 examples: 256 * 257 / 2 against 1024 * 1025 / 2 pairs each
    ratio = (1024 * 1025) / (256 * 257)
    assert f"{ratio:.3g}×" in page and "20,480" in page
    assert f"{ratio / 4:.3g}×" in page and "T / L = 4," in page  # at the same number of tokens


def test_the_page_needs_no_network_and_escapes_what_it_is_told(folder):
    evil = '"><img src=http://x.example/>'
    run = {
        **RUN,
        "name": "<script>alert(1)</script>",
        "status": evil,
        "model": {"name": evil, "family": evil},
        "rope": {evil: evil},
        "checks": [{"name": evil, "passed": True, "detail": evil}],
        "positions": {**RUN["positions"], "sampler": evil},
        "reproduce": [evil],
    }
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "results.json").write_text(json.dumps([*ROWS, {**ppl(evil, 64, 1.0), "task": evil}]))
    (folder / "recipe.yaml").write_text(evil)
    page = write_report(folder).read_text()
    assert "<script" not in page and "<img" not in page and html.escape(evil) in page
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "@import" not in page and "url(http" not in page


def test_what_was_not_measured_is_said(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"name": "young", "status": "started"}))
    page = write_report(tmp_path).read_text()
    assert page.count("Not measured.") == 4 and "is not measured yet" in page
    assert "has not finished" in page and page.count("No finished training is recorded.") == 2
    assert "has not finished" not in _page(tmp_path, {"name": "old", "status": "finished"})
    assert not list((tmp_path / "report").glob("*.png"))


def test_a_folder_that_is_no_run_is_refused_with_what_to_type(tmp_path):
    with pytest.raises(SkipwiseError, match=r"no run\.json: give .* as runs/quickstart"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(SkipwiseError, match=r"run\.json is not JSON"):
        write_report(tmp_path)


def test_a_figure_whose_numbers_are_gone_leaves_no_old_png(folder):
    write_report(folder)
    (folder / "results.json").unlink()
    write_report(folder)
    names = {path.name for path in (folder / "report").glob("*.png")}
    assert names == {"loss.png", "positions.png"}


def _page(folder, run):
    (folder / "run.json").write_text(json.dumps(run))
    return write_report(folder).read_text()


def test_any_key_of_run_json_may_be_missing(tmp_path):
    small = {**RUN, "positions": None}  # the picture of positions is slow to draw
    for key_ in RUN:
        rest = {k: v for k, v in small.items() if k != key_}
        assert "<h1>" in _page(tmp_path, rest) and "<h1>" in _page(tmp_path, {**rest, key_: None})
    for part in ("training", "data", "model", "machine"):
        for key_ in RUN[part]:
            less = {k: v for k, v in RUN[part].items() if k != key_}
            assert "<h1>" in _page(tmp_path, {**small, part: less})
    for key_ in RUN["positions"]:
        less = {k: v for k, v in RUN["positions"].items() if k != key_}
        assert "<h1>" in _page(tmp_path, {**RUN, "positions": less})


def test_training_by_several_processes_says_so(folder):
    training = {"num_steps": 10, "batch_size": 4, "peak_memory_gib": 1.5, "mode": "full"}
    many = {**training, "engine": "fsdp2", "num_processes": 8}
    lengths = {"train_length": 64, "target_length": 256}
    page = _page(folder, {"training": many, **lengths})
    assert "fsdp2 over 8 processes" in page and "peak memory per process" in page
    page = _page(folder, {"training": training, **lengths})
    assert "processes" not in page and "1.50 GiB peak memory." in page


def test_a_failed_check_is_shown_as_failed(tmp_path):
    bad = {"name": "rope", "passed": False, "detail": "unscaled"}
    page = _page(tmp_path, {**RUN, "checks": [bad], "positions": None})
    assert '<li class="failed"><b>failed</b><span>rope: unscaled' in page


def test_chunks_are_drawn_where_they_stand():
    figure = plot_positions([{"lengths": [10, 6], "position_starts": [0, 40]}], [(1, 1.0)], 16, 64)
    extents = [patch.get_path().get_extents() for patch in figure.axes[0].patches]
    assert [(box.x0, box.width) for box in extents] == [(0, 10), (40, 6)]
    assert figure.axes[0].get_xlim() == (0, 64)


def test_the_report_loads_no_torch():
    code = "import sys, skipwise.report; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_browser_shows_the_page(finished, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed to look at the page")
    from matplotlib.image import imread

    page = finished / "report" / "index.html"
    shot = tmp_path / "shot.png"
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--disable-background-networking",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    subprocess.run(
        [browser, *flags, "--window-size=1000,2400", f"--screenshot={shot}", page.as_uri()],
        capture_output=True,
        timeout=120,
        check=True,
    )
    image = imread(shot)[..., :3]
    # text, lines and coloured figures down the page
    bands = [image[i : i + 300].std() for i in range(0, 2100, 300)]
    assert min(bands) > 0.01
