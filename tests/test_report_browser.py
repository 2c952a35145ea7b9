"""The pages in a real browser: at a laptop's and a phone's width, light and dark."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from test_report_evaluation import DEPTHS, LENGTHS, complete_rows, make_evaluation, make_run
from test_report_page import CHECKS, CHOICES, untrained

from skipwise.report import compare_runs, write_report

pytestmark = pytest.mark.extended
LAPTOP, PHONE, HEIGHT = 1100, 390, 2400  # pixels
NUM_MODELS = {"run": 3, "evaluation": 2, "comparison": 4}
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--hide-scrollbars",
)
# a browser's window is never narrower than 500 pixels, a frame is
FRAME = """<body style="margin:0"><iframe srcdoc="{page}" style="width:{width}px;height:{height}px;
border:0"></iframe><script>onload = () => {{
  const page = document.querySelector("iframe").contentDocument, width = {width};
  const box = (element) => element.getBoundingClientRect();
  const seen = (selector) => [...page.querySelectorAll(selector)].filter((e) => box(e).width > 0);
  const clipped = [], overlapping = [];
  for (const figure of seen("figure svg")) {{
    const texts = [...figure.querySelectorAll("text")], all = box(figure);
    for (const text of texts) {{
      const a = box(text);
      if (a.left < all.left - 1 || a.right > all.right + 1 || a.top < all.top - 1 ||
          a.bottom > all.bottom + 1) clipped.push(text.textContent);
      for (const other of texts.slice(texts.indexOf(text) + 1)) {{
        const b = box(other);
        if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1.5 &&
            Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4)
          overlapping.push(text.textContent + " / " + other.textContent);
      }}
    }}
  }}
  const outside = seen("body *").filter((e) => box(e).right > width + 1 &&
    !e.closest(".scroll, pre, svg")).map((e) => e.outerHTML.slice(0, 80));
  document.body.dataset.measured = JSON.stringify({{
    width: page.documentElement.clientWidth,
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    outside, clipped, overlapping,
    cells: Object.fromEntries(["passkey", "needle"].map((task) =>
      [task, seen(`[id^="${{task}}-"][id*="-cell-"]`).length])),
    figures: seen("figure svg").length,
    tiles: seen(".tiles li").map((e) => box(e).top),
    links: seen("nav a").map((e) => page.querySelector(e.getAttribute("href")).firstElementChild)
      .map((e) => e.textContent),
    folded: [...page.querySelectorAll(".checks .passed")].filter((e) => e.checkVisibility()).length,
    shown: seen(".checks .failed, .checks .warn").length,
    headings: seen("h2").map((e) => e.textContent),
    fetched: page.defaultView.performance.getEntriesByType("resource").map((e) => e.name),
  }});
}};</script>"""


def find_browser():
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium is installed to look at the page")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of a complete run, of an evaluation folder, and of both side by side."""
    find_browser()
    top = tmp_path_factory.mktemp("pages")
    rows, name = complete_rows("before", "after"), "tiny-pose-32k"
    (top / name / "model").mkdir(parents=True)
    given = {"exported": True, "checks": CHECKS, **CHOICES}
    run = make_run(top / name, name, rows + untrained(rows), **given)
    rows = complete_rows("base", "my-model-32k", window=8192)
    evaluation = make_evaluation(top / "evaluation", rows, baseline="base")
    alone = [row for row in rows if row["model"] == "base"]
    other = make_evaluation(top / "other", [{**row, "model": "other/Base-7B"} for row in alone])
    compare_runs([run, other], top / "comparison.html")
    found = {
        "run": write_report(run),
        "evaluation": write_report(evaluation),
        "comparison": top / "comparison.html",
    }
    return {name: path.read_text() for name, path in found.items()}


def browse(folder, page, width, *flags):
    """What the browser prints of a page in a frame of that width."""
    wrapper = folder / "frame.html"
    wrapper.write_text(FRAME.format(page=html.escape(page), width=width, height=HEIGHT))
    profile = f"--user-data-dir={folder / 'profile'}"
    window = f"--window-size={max(width, 500)},{HEIGHT}"
    done = subprocess.run(
        [find_browser(), *FLAGS, profile, window, *flags, wrapper.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("width", [LAPTOP, PHONE])
@pytest.mark.parametrize("name", list(NUM_MODELS))
def test_the_page_fits_its_width_and_draws_every_cell(pages, tmp_path, name, width):
    dom = browse(tmp_path, pages[name], width, "--dump-dom")
    found = re.search(r'data-measured="([^"]*)"', dom)
    assert found, "the script in the frame has run"
    seen = json.loads(html.unescape(found[1]))
    assert seen["width"] == width and seen["overflow"] == 0 and seen["outside"] == []
    cells = len(DEPTHS) * len(LENGTHS) * NUM_MODELS[name]
    assert seen["cells"] == {"passkey": cells, "needle": cells}, "of one variant, not of both"
    assert seen["figures"] == (7 if name == "run" else 4)
    assert {"RULER tasks", "Needle in real text"} <= set(seen["headings"])
    assert seen["clipped"] == [] and seen["overlapping"] == []
    assert seen["fetched"] == []
    assert seen["links"] == seen["headings"], "the contents lead to every section"
    if name == "run":
        assert seen["folded"] == 0 and seen["shown"] == 2
        assert width == PHONE or min(map(seen["tiles"].count, seen["tiles"])) > 1


@pytest.mark.parametrize(("width", "dark"), [(LAPTOP, False), (PHONE, True)])
@pytest.mark.parametrize("name", list(NUM_MODELS))
def test_the_page_is_not_blank_in_light_and_in_dark(pages, tmp_path, name, width, dark):
    from matplotlib.image import imread

    shot = tmp_path / "shot.png"
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    browse(tmp_path, pages[name], width, f"--screenshot={shot}", scheme)
    image = imread(shot)[:, :width, :3]
    corner = image[2, 2].mean()
    assert corner < 0.2 if dark else corner > 0.9
    # something is drawn down the page: text, lines, cells
    assert all(np.ptp(image[i : i + 300].mean(-1)) > 0.4 for i in range(0, HEIGHT - 300, 300))
    assert image.std() > 0.05


@pytest.mark.parametrize("name", list(NUM_MODELS))
def test_the_page_names_no_address_to_fetch_from(pages, name):
    addresses = re.findall(r'([\w:]+)="https?://[^"]*"', pages[name])
    assert set(addresses) <= {"xmlns", "xmlns:xlink"}, "names of formats, never fetched"
    rest = re.sub(r'xmlns(:xlink)?="[^"]*"', "", pages[name])
    assert not re.search(r"https?://|<script|<link|@import|url\((?!#)", rest)
