"""The benchmarks on a CPU: real steps and real pictures, every variant, figures that belong together."""

import json

import benchmark
import pytest
from train_ast import run_cli

SMALL = ["--model", "test_resnet", "--classes", "10", "--image-size", "32", "--batch-size", "32"]
SMALL += ["--steps", "2", "--repeats", "2"]
LOOPS = [
    "hand-written dense loop",
    "dense loop",
    "batch-scored loop, a=0.25",
    "  scored at 16 px",
    "  not scored ahead",
]
LOOPS += ["random loop, a=0.25", "stored scores, a=0.25", "batch-scored loop, not packed"]
PEERS = ["published pattern", "  in our settings", "two full forwards, masked", "two-pass top-k, a=0.25"]


def test_every_step_is_measured(tmp_path, capsys):
    files = ["--json", str(tmp_path / "out" / "steps.json"), "--plot", str(tmp_path / "out" / "steps.png")]
    assert benchmark.main(["steps", *SMALL, "--no-compile", "--score-resolution", "16", *files]) == 0
    saved = json.loads((tmp_path / "out" / "steps.json").read_text())
    assert list(saved["rows"]) == [*LOOPS, *PEERS]
    best = min(saved["rows"][name]["ms"] for name in LOOPS[:2])
    for row in saved["rows"].values():
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert row["ratio"] == pytest.approx(row["ms"] / best)
        assert row["images_per_second"] == pytest.approx(32_000 / row["ms"])
    assert 0 <= saved["rows"][LOOPS[2]]["activation"] <= 1
    assert set(saved["break_even"]) == {"batch-scored loop, a=0.25", "scored at 16 px"}
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*saved["rows"], "faster than dense below an activation of"])
    assert (tmp_path / "out" / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_break_even_is_the_cost_models():
    """Dense takes 30; scoring takes 10 and a quarter of the samples 7.5: as fast as dense at two thirds active."""
    rows = {"dense loop": {"ms": 30.0}, "batch-scored loop, a=0.25": {"ms": 17.5, "activation": 0.25}}
    rows |= {"dense loop, compiled": {"ms": 20.0}, "batch-scored loop, a=0.25, compiled": {"ms": 30.0}}
    found = benchmark.break_even(rows, 0.25)
    assert found == {
        "batch-scored loop, a=0.25": pytest.approx(2 / 3),
        "batch-scored loop, a=0.25, compiled": 0.0,  # never
    }


def test_every_input_pipeline_is_measured(tmp_path, capsys, image_folder):
    sizes = ["--image-size", "32", "--batch-size", "12", "--steps", "4", "--repeats", "2", "--workers", "1"]
    files = ["--json", str(tmp_path / "input.json"), "--plot", str(tmp_path / "input.svg")]
    assert benchmark.main(["input", "--folder", str(image_folder / "train"), *sizes, *files]) == 0
    saved = json.loads((tmp_path / "input.json").read_text())
    assert len(saved["rows"]) == 3
    for row in saved["rows"].values():
        assert 0 < row["lowest"] <= row["images_per_second"] <= row["highest"]
    assert saved["pictures"] == 24
    assert "<svg" in (tmp_path / "input.svg").read_text()
    assert "images/s" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--steps", "0"], ["--activation", "0"], ["--model", "resnt50"],
                                   ["--score-resolution", "64"], ["--json", "/proc/no/x.json"]])  # fmt: skip
def test_wrong_sizes_are_refused(wrong, capsys):
    assert run_cli(lambda: benchmark.main(["steps", *SMALL, "--no-compile", *wrong])) == 2
    assert capsys.readouterr().err.startswith("error: ")
