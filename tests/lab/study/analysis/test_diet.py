"""What a run was trained on, on the page: the figures of its results file, and the pictures beside
it.
"""

import base64
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from conftest import MINIMAL
from helpers import analyze, study_of, write_run
from lab.study.analysis.diet import class_table, diets, summary
from lab.study.analysis.sheets import MOST_BYTES
from lab.study.results import read_run

TIMES = {"histogram": [10, 30, 60], "most_trained": [], "least_trained": []}
CLASSES = {
    "name": ["a", "<b>x"],
    "val_acc": [50.0, None],
    "val_samples": [4, 0],
    "times_trained": [100, 50],
}


def page_of(folder):
    assert analyze(["--results-dir", str(folder), "--report", str(folder / "page.html")]) == 0
    return (folder / "page.html").read_text()


def test_the_page_shows_what_sparse_runs_have_left(results, tmp_path):
    """Of the newest run of the sparse setting; the dense one shows nothing."""
    for path in results.iterdir():
        if path.suffix in (".json", ".png") and "_20200101_" not in path.name:
            shutil.copy(path, tmp_path)
    study = study_of(tmp_path)
    ((setting, shown),) = diets(study)
    run = study.newest[setting]
    told = json.loads(run.path.read_text())
    assert told["config"]["training"]["seed"] == 1
    page = page_of(tmp_path)
    images = [
        base64.b64decode(data)
        for data in re.findall(r'<img src="data:image/png;base64,([^"]+)"', page)
    ]
    assert images == [
        run.path.with_suffix(f".{name}_trained.png").read_bytes() for name in ("most", "least")
    ]
    assert shown["summary"] in page
    assert f"{sum(told['times_trained']['histogram'])} pictures, trained on " in shown["summary"]
    assert set(class_table(run)["class"]) == set(told["classes"]["name"])
    assert page.count("<table id=") == 4 + 1
    for path in tmp_path.glob("*.png"):
        path.unlink()
    page = page_of(tmp_path)
    assert "<img" not in page
    assert page.count("The pictures are no longer beside the results file.") == 2


def test_the_line_and_the_table_are_exact():
    assert summary(np.array([10.0, 30.0, 60.0])) == (
        "100 pictures, trained on 1.5 times on average; 10.0 % never; at most 2"
    )


def test_hostile_files_stay_text(tmp_path):
    """A name with markup, a sheet that is no picture, one that is too large, and figures that are
    none.
    """
    path = write_run(tmp_path, "1", extra={"times_trained": TIMES, "classes": CLASSES})
    path.with_suffix(".most_trained.png").write_text("<script>")
    Image.new("RGB", (8, 8)).save(path.with_suffix(".least_trained.png"))
    with path.with_suffix(".least_trained.png").open("ab") as file:
        file.truncate(MOST_BYTES + 1)
    page = page_of(tmp_path)
    assert "<img" not in page
    assert "<b>x" not in page
    assert "&lt;b&gt;x" in page
    result = json.loads(path.read_text())
    for wrong in ({"histogram": []}, {"histogram": ["x"]}, {"histogram": [-1]}, {}, 3):
        path.write_text(json.dumps(result | {"times_trained": wrong}))
        with pytest.raises(ValueError, match="not a results file of the lab"):
            read_run(path)
    path.write_text(json.dumps(result | {"classes": {**CLASSES, "val_acc": [1]}}))
    with pytest.raises(ValueError, match="not a results file of the lab"):
        read_run(path)


def test_older_files_show_nothing(tmp_path):
    (tmp_path / "final_results_1.json").write_text(json.dumps(MINIMAL))
    assert "What was trained on" not in page_of(tmp_path)
