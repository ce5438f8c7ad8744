"""The step benchmark on a CPU: real steps, every variant, figures that belong together."""

import json

import benchmark
import pytest
from train_ast import run_cli

SMALL = ["--model", "test_resnet", "--classes", "10", "--image-size", "32", "--batch-size", "32"]
SMALL += ["--steps", "2", "--repeats", "2"]


def test_every_variant_is_measured(tmp_path, capsys):
    assert benchmark.main(["steps", *SMALL, "--no-compile", "--json", str(tmp_path / "out" / "steps.json")]) == 0
    saved = json.loads((tmp_path / "out" / "steps.json").read_text())
    assert list(saved["rows"]) == [
        "dense loop", "batch-scored loop, a=0.25", "  the same, not packed", "published pattern", "  in our settings",
    ]  # fmt: skip
    for row in saved["rows"].values():
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
    assert 0 <= saved["rows"]["batch-scored loop, a=0.25"]["activation"] <= 1
    shown = capsys.readouterr().out
    assert all(name in shown for name in saved["rows"])


@pytest.mark.parametrize("wrong", [["--steps", "0"], ["--activation", "0"], ["--model", "resnt50"]])
def test_wrong_sizes_are_refused(wrong, capsys):
    assert run_cli(lambda: benchmark.main(["steps", *SMALL, *wrong])) == 2
    assert capsys.readouterr().err.startswith("error: ")
