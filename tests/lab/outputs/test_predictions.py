"""Files of predictions: a row a picture, readable back whatever the names."""

import csv
import io
import json
import os

import numpy as np
import pandas as pd
import pytest

from lab.outputs.predictions import Row, as_table, encoded, likeliest

CLASSES = ["cat", "=dog", 'eel, "big"', "\u00e9mu"]
NAMES = [
    "plain.png",
    'a, "b".png',
    "a\nb\r.png",
    "=1+1.png",
    "-x.png",
    "@.png",
    " caf\u00e9\t.png",
    "NA",
    "\u2028.png",
    os.fsdecode(b"byte\xff.png"),
    "a/=b.png",
]


def rows():
    logits = np.random.default_rng(0).normal(size=(len(NAMES), 4)).astype(np.float32)
    return [Row(name, CLASSES[i % 4], logits[i], None) for i, name in enumerate(NAMES)]


def read(data, form):
    """The rows of a file, as another program reads them; "" for what is not known."""
    if form == ".csv":
        return list(csv.DictReader(io.StringIO(data.decode(), newline="")))
    if form == ".jsonl":
        found = [json.loads(line) for line in data.decode().split("\n")[:-1]]
    else:
        found = pd.read_parquet(io.BytesIO(data)).to_dict("records")
    return [{k: "" if v is None or v != v else v for k, v in row.items()} for row in found]


@pytest.mark.parametrize("form", [".csv", ".jsonl", ".parquet"])
def test_every_name_label_and_figure_comes_back(form):
    whole = [*rows(), Row("bad\n.png", None, None, "not a readable image")]
    found = read(encoded(as_table(whole, CLASSES, 2, True), form), form)
    assert len(found) == len(whole)
    for row, back in zip(whole, found, strict=True):
        path = back["path"].replace("\\xff", "\udcff")
        assert os.path.normpath(path) == row.name
        if row.logits is None:
            assert back["problem"] == "not a readable image"
            assert {back[key] for key in back if key not in ("path", "problem")} == {""}
            continue
        assert back["problem"] == ""
        label = back["label"].removeprefix("'") if form == ".csv" else back["label"]
        assert label == row.label
        numbers, shares = likeliest(row.logits[None], 2)
        for place in range(2):
            name = back[f"class_{place + 1}"]
            name = name.removeprefix("'") if form == ".csv" else name
            assert name == CLASSES[numbers[0, place]]
            share = np.float32(back[f"probability_{place + 1}"])
            assert share == pytest.approx(shares[0, place], rel=1e-6)
        logits = [np.float32(back[f"logit {name}"]) for name in CLASSES]
        np.testing.assert_allclose(logits, row.logits, rtol=1e-6)


def test_a_spreadsheet_finds_no_formula_in_a_csv():
    lines = read(encoded(as_table(rows(), CLASSES, 4, False), ".csv"), ".csv")
    cells = [cell for line in lines for cell in line.values()]
    assert any(cell.startswith("./=1") for cell in cells)
    assert not [cell for cell in cells if cell[:1] in "=+@\t\r\n" and cell]


def test_no_more_classes_than_there_are_and_equal_logits_in_their_order():
    table = as_table([Row("a", None, np.zeros(4, np.float32), None)], CLASSES, 9, False)
    assert [table[f"class_{i + 1}"][0] for i in range(4)] == CLASSES
    assert table["probability_1"][0] == 0.25
    assert "class_5" not in table
    assert table["label"][0] is None
