"""The report: says what the numbers say, in one page that needs nothing else."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from skipwise.errors import SkipwiseError
from skipwise.report import format_table, headline, plot_positions, write_report
from skipwise.report.tables import find, pooled

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
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    (tmp_path / "recipe.yaml").write_text("model: tiny\n")
    lines = [json.dumps({"step": i, "loss": 2 - i / 10}) for i in range(1, 11)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 11, "lo')
    (tmp_path / "results.json").write_text(json.dumps(ROWS))
    return tmp_path


def test_depths_are_pooled_by_samples_with_wilsons_interval():
    row = find(ROWS, "after", "passkey", 1024)
    assert (row["value"], row["num_samples"]) == (0.95, 20)
    assert (row["low"], row["high"]) == pytest.approx((0.7639, 0.9911), abs=1e-4)
    uneven = pooled([key("after", 64, 0.0, 1.0, 30), key("after", 64, 1.0, 0.0, 10)])
    assert uneven[0]["value"] == 0.75


def test_the_table_has_a_line_a_length_and_a_column_a_model():
    lines = format_table(ROWS).splitlines()
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


def test_the_headline_says_what_was_reached():
    said = headline(RUN, ROWS)
    assert said.startswith("tiny reads 1,024 tokens instead of 256")
    assert "95 % of trials" in said and "7.75" in said and "falls short" not in said


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        ([key("after", 1024, 0.0, 0.5)], "found in 50 % of trials"),
        ([ppl("after", 256, 8.0), ppl("after", 1024, 9.0)], "perplexity is higher with 1,024"),
        ([ppl("before", 256, 8.0), ppl("after", 256, 9.0), ppl("after", 1024, 8.5)], "risen by 12"),
    ],
)
def test_the_headline_says_what_fell_short(rows, word):
    said = headline(RUN, rows)
    assert "falls short" in said and word in said and "reads 1,024 tokens instead" not in said


def test_the_headline_of_an_unmeasured_run_claims_nothing():
    assert "not measured" in headline(RUN, [])
    assert "not measured at 1,024" in headline(RUN, [ppl("after", 256, 8.0)])


def test_the_page_holds_every_section_and_the_numbers(folder):
    page = write_report(folder).read_text()
    for word in (
        "Before and after",
        "Perplexity against",
        "Passkey",
        "Training loss",
        "Positions",
        "What it cost",
        "Checks",
        "Reproduce",
        "92.50",
        "7.75",
        "95 %",
        "skipwise extend tiny --to 1k",
        "model: tiny",
    ):
        assert word in page, word
    assert page.count('role="img"') == 4
    labels = re.findall(r'aria-label="([^"]+)"', page)
    assert len(labels) == 4 and any("after: 8.2 at 256" in label for label in labels)
    for name in ("perplexity", "passkey", "loss", "positions"):
        assert (folder / "report" / f"{name}.png").stat().st_size > 5000
    assert (folder / "report" / "table.md").read_text().strip() == format_table(ROWS)
    assert len(page) < 600_000


def test_attention_work_is_counted_by_pairs(folder):
    page = write_report(folder).read_text()
    # 20 examples: 256 * 257 / 2 against 1024 * 1025 / 2 pairs each
    ratio = (1024 * 1025) / (256 * 257)
    assert f"{ratio:.3g}×" in page and "20,480" in page


def test_the_page_needs_no_network_and_escapes_what_it_is_told(folder):
    run = {**RUN, "name": "<script>alert(1)</script>", "model": {"name": '"><img src=x>'}}
    (folder / "run.json").write_text(json.dumps(run))
    page = write_report(folder).read_text()
    assert "<script" not in page and "<img" not in page
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "@import" not in page and "url(http" not in page


def test_what_was_not_measured_is_said(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"name": "young"}))
    page = write_report(tmp_path).read_text()
    assert page.count("Not measured.") >= 3 and "not measured yet" in page
    with pytest.raises(SkipwiseError, match=r"no run\.json"):
        write_report(tmp_path / "nowhere")


def test_a_failed_check_is_shown_as_failed(folder):
    bad = {"name": "rope", "passed": False, "detail": "unscaled"}
    (folder / "run.json").write_text(json.dumps({**RUN, "checks": [bad]}))
    assert '<li class="failed"><b>failed</b>rope: unscaled' in write_report(folder).read_text()


def test_chunks_are_drawn_where_they_stand():
    figure = plot_positions([{"lengths": [10, 6], "position_starts": [0, 40]}], [(1, 1.0)], 16, 64)
    bars = [(p.get_x(), p.get_width()) for p in figure.axes[0].patches]
    assert bars == [(0, 10), (40, 6)]


def test_the_report_loads_no_torch():
    code = "import sys, skipwise.report; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_browser_shows_the_page(folder, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed to look at the page")
    from matplotlib.image import imread

    page = write_report(folder)
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
