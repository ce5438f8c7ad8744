"""The page: the same numbers as the table, nothing unescaped, readable on a phone."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from helpers import analyze, study_of, write_run, write_sweep
from lab.study.analysis.report import render
from lab.study.analysis.tables import text_table, verdict, verdict_sentences

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
PROBE = """<script>
addEventListener("load", () => {
  const page = document.documentElement, outside = [];
  for (const each of document.querySelectorAll("main *:not(.wide *):not(svg *)"))
    if (each.getBoundingClientRect().right > page.clientWidth + 1)
      outside.push(each.tagName + "." + each.className);
  const rows = () => [...document.querySelectorAll("#settings tbody tr")];
  const column = () => rows().map(row => row.cells[2].textContent);
  const before = column();
  const button = document.querySelector("#settings thead").rows[0].cells[2].querySelector("button");
  button.click(); button.click();
  const seen = [page.clientWidth, page.scrollWidth, outside.join() || "none", before, column()];
  parent.postMessage(seen.join(" | "), "*");
});
</script>"""
FRAME = """<body style="margin: 0"><p id="found" hidden></p>
<script>
  const found = text => { document.getElementById("found").textContent = text };
  addEventListener("message", event => found(event.data));
</script>
<iframe src="page.html" style="border: 0; width: WIDTHpx; height: 3000px"></iframe>"""


class Page(HTMLParser):
    """The text of every table as rows of cells, by id; how often each tag occurs; every
    attribute.
    """

    def __init__(self, text):
        super().__init__()
        self.text = text
        self.tables = {}
        self.tags = []
        self.attributes = []
        self.cell = None
        self.paragraphs = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "table":
            self.rows = self.tables[dict(attrs)["id"]] = []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.cell = ""
        if tag == "text":
            self.cell = (
                None if self.cell is None else self.cell + "\0"
            )  # the legend's marker, no text of the cell
        if tag == "p":
            self.paragraphs.append("")

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[-1].append(re.sub("\0.", "", self.cell).strip())
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data
        elif self.paragraphs:
            self.paragraphs[-1] += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("sweep"))


def is_float(value):
    return isinstance(value, float)


def test_every_number_is_the_tables(folder):
    study = study_of(folder)
    table = text_table(study)
    page = Page(render([study]))
    first, more = (
        pd.DataFrame(page.tables[name][1:], columns=page.tables[name][0])
        for name in ("settings", "details")
    )
    assert len(first.columns) <= 9  # they fit 1280 px
    pd.testing.assert_frame_equal(
        first.merge(more, on="setting")[list(table.columns)], table.reset_index(drop=True)
    )
    assert any(" ".join(text.split()).startswith(verdict(study)) for text in page.paragraphs)
    assert page.text.index("Final accuracy against training time") < page.text.index(
        verdict_sentences(study)[0]
    )
    allowed = [column for column in study.table if column.startswith("best_of_")]
    wider = [f"{value:.2f}" for value in study.table[allowed].to_numpy().ravel() if is_float(value)]
    assert set(re.findall(r"\d+\.\d\d", verdict(study))) <= {
        *re.findall(r"\d+\.\d\d", " ".join(table.to_numpy().ravel())),
        *wider,
    }
    runs = {row[-1]: row for row in page.tables["runs"][1:]}
    for row in study.runs.itertuples():
        assert runs[row.file][:2] == [row.setting, str(row.seed)]
        assert runs[row.file][3:5] == [f"{row.final_accuracy:.2f}", f"{row.best_accuracy:.2f}"]
    changes = dict(page.tables["differences"][1:])
    assert changes["dense"] == "the baseline"
    assert (
        changes["ast target_activation=0.5 threshold_unit=iqr"]
        == "ast.mode: dense → astast.target_activation: 0.25 → 0.5"
    )


def test_the_base_the_commands_and_the_dates_are_there(tmp_path):
    environment = {"git_commit": "abc-dirty", "host": "box", "command": "train_ast.py --x '<y>'"}
    environment["finished_utc"] = "2026-11-29T23:42:45.000001+00:00"
    write_run(tmp_path, "1", ast__mode="dense", extra={"environment": environment})
    page = Page(render([study_of(tmp_path)]))
    text = re.sub(r"<[^>]*>", " ", page.text)
    assert "1 setting, 1 run" in text
    assert re.search(r"training\.lr_schedule\s+cosine", text)
    assert "train_ast.py --x &#39;&lt;y&gt;&#39;" in text
    assert re.search(r"git_commit\s+abc, with changes that were not committed", text)
    assert re.search(r"host\s+box", text)
    (row,) = page.tables["runs"][1:]
    assert row[page.tables["runs"][0].index("finished, UTC")] == "2026-11-29 23:42"


def test_nothing_is_loaded_and_nothing_gets_out_of_its_place(folder):
    page = Page(render([study_of(folder)]))
    assert page.tags.count("script") == 1
    assert not {"img", "link", "iframe", "object", "image"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not any(name.startswith("on") for name in names)
    assert all(
        value.startswith("#") for name, value in page.attributes if name.endswith(("href", "src"))
    )
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize("width", [390, 1440])
def test_in_a_browser_it_is_not_blank_and_nothing_overflows(width, folder, tmp_path):
    """In a frame of the given width, for a headless window is never narrower than 500 px."""
    assert analyze(["--results-dir", str(folder), "--report", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(width)))
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path}/profile",
    ]
    command += [f"--window-size={max(width, 500)},3000"]

    def browse(*flags):
        return subprocess.run(
            [*command, *flags, frame.as_uri()],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )

    browse(f"--screenshot={tmp_path}/shot.png")
    with Image.open(tmp_path / "shot.png") as image:
        pixels = np.asarray(image.convert("RGB").crop((0, 0, width, 3000)))
    inked = (pixels.min(axis=2) < 200).reshape(30, 100, width).sum(axis=(1, 2))
    assert (inked > 50).sum() >= 25  # a text, a table or a figure in nearly every strip of 100 px
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{PROBE}</body>"))
    found = re.search(
        r'id="found"[^>]*>([^<]*)<', browse("--virtual-time-budget=3000", "--dump-dom").stdout
    )[1]
    client, scroll, outside, before, after = found.split(" | ")
    assert int(client) == int(scroll) == width
    assert outside == "none"
    assert before.split(",") == sorted(after.split(","), reverse=True)
    assert after.split(",") == sorted(
        after.split(",")
    )  # two clicks on the head of a column: ascending
