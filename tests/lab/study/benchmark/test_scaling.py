"""Steps on more GPUs, on paper: the formulas by hand, and files that are no measurement."""

import json
import math

import pytest

import benchmark
from lab.study.benchmark.scaling import break_even
from lab.study.cli import run_cli


def test_break_even_is_the_cost_models():
    """Dense takes 30; scoring takes 10 and a quarter of the samples 7.5: as fast as dense at two
    thirds active.
    """
    rows = {
        "dense loop": {"ms": 30.0},
        "batch-scored loop, a=0.25": {"ms": 17.5, "activation": 0.25},
    }
    rows |= {
        "dense loop, compiled": {"ms": 20.0},
        "batch-scored loop, a=0.25, compiled": {"ms": 30.0},
    }
    found = break_even(rows, 0.25)
    assert found == {
        "batch-scored loop, a=0.25": pytest.approx(2 / 3),
        "batch-scored loop, a=0.25, compiled": 0.0,  # never
    }


def collective(calls: float, size: float, transfer_ms: float) -> dict[str, float]:
    return {"calls": calls, "bytes": size, "ms": 9.0, "transfer_ms": transfer_ms}


GRADIENTS = {"gradients": collective(1, 8e6, 0.1)}
AGREEMENT = {"agreement": collective(1, 32, 0.05)}
SCORED = {"gradients": collective(0.25, 8e6, 0.1), "scores": collective(1, 256, 0.04)}
SCORED |= {"evening out": collective(0.5, 1e5, 0.06), **AGREEMENT}
PAPER = {
    "processes": 2,
    "batch_size": 64,
    "rows": {
        "hand-written dense loop": {"ms": 9.0, "images_per_second": 7111},
        "dense loop": {
            "ms": 10.0,
            "images_per_second": 6400,
            "collectives": {**GRADIENTS, **AGREEMENT},
        },
        "batch-scored loop, a=0.25": {
            "ms": 5.0,
            "images_per_second": 12800,
            "activation": 0.25,
            "collectives": SCORED,
        },
        "  not scored ahead": {
            "ms": 6.0,
            "images_per_second": 10667,
            "activation": 0.25,
            "collectives": SCORED,
        },
    },
}


def on_paper(tmp_path, steps: dict, *options: str) -> dict:
    source = tmp_path / "steps.json"
    target = tmp_path / "out" / "scaling.json"
    source.write_text(json.dumps(steps))
    assert benchmark.main(["scaling", "--steps", str(source), "--json", str(target), *options]) == 0
    return json.loads(target.read_text())


def test_scaling_on_paper_is_what_a_hand_calculates(tmp_path, capsys):
    """The measured pace: 8 MB in 0.1 ms, 80 GB/s; between machines 50 GB/s and 0.03 ms a hop."""
    saved = on_paper(tmp_path, PAPER)
    assert list(saved["rows"]) == list(PAPER["rows"])[1:]
    eight, many, most = saved["rows"]["dense loop"]
    assert [at["gpus"] for at in (eight, many, most)] == [8, 64, 512]
    assert [at["batch_size"] for at in (eight, many, most)] == [256, 2048, 16384]
    assert [at["ms"]["device"] for at in (eight, many, most)] == [pytest.approx(10 - 0.1)] * 3
    assert eight["ms"]["gradients"] == pytest.approx(14 / 8 * 8 / 80)  # MB over GB/s are ms
    assert many["ms"]["gradients"] == pytest.approx(
        126 / 64 * 8 / 50 + 2 * 3 * 0.03
    )  # 8 machines: 3 hops there and back
    assert most["ms"]["gradients"] == pytest.approx(1022 / 512 * 8 / 50 + 2 * 6 * 0.03)
    hops = [7, 63 / 8, 511 / 64]  # one agreement in world / 8 batches
    assert [at["ms"]["agreement"] for at in (eight, many, most)] == [
        pytest.approx(n * 0.05) for n in hops
    ]
    assert eight["gradient_bytes"] == pytest.approx(14e6)
    assert eight["step_ms"] == pytest.approx(9.9 + 0.175)  # agreement passes while all else goes on
    assert most["step_ms"] == pytest.approx(9.9 + 0.679375)
    assert most["efficiency"] == pytest.approx(9.9 / 10.579375)
    assert saved["breaks_first"]["dense loop"] is None  # 4096: 9.9 / (9.9 + 0.86)
    eight, many, _ = saved["rows"]["batch-scored loop, a=0.25"]
    assert eight["ms"]["device"] == pytest.approx(5 - 0.025 - 0.04 - 0.03)
    assert eight["ms"]["gradients"] == pytest.approx(0.175 / 4)
    assert eight["ms"]["scores"] == pytest.approx(0.04 + 7 * 256 / 80e6)
    assert many["ms"]["scores"] == pytest.approx(0.04 + 63 * 256 / 50e6 + 3 * 0.03)
    assert (eight["score_bytes"], many["score_bytes"]) == (8 * 256, 64 * 256)
    assert (eight["ms"]["evening out"], many["ms"]["evening out"]) == (
        pytest.approx(0.03),
        pytest.approx(0.03),
    )
    for at, waits in (
        (eight, max),
        (saved["rows"]["  not scored ahead"][0], lambda *sides: sum(sides)),
    ):
        parts = at["ms"]
        assert parts["choosing"] > 0
        sides = parts["device"] + parts["scores"] + parts["evening out"], parts["choosing"]
        assert at["step_ms"] == pytest.approx(waits(*sides) + parts["gradients"])
    shown = capsys.readouterr().out
    assert "2 x CPU, 32 samples each" in shown
    assert "assumed: 8 GPUs a machine, 50 GB/s a GPU and 30 us a hop between machines" in shown
    assert "dense loop: nothing brings the efficiency below 0.9 up to 4096 GPUs" in shown


def test_scaling_follows_what_is_assumed(tmp_path, capsys):
    slow = ["--gpus", "1", "4", "--gpus-per-node", "2", "--network-gb", "1", "--latency-us", "1000"]
    one, four = on_paper(tmp_path, PAPER, *slow)["rows"]["dense loop"]
    assert (one["ms"]["gradients"], one["ms"]["agreement"], one["efficiency"]) == (0, 0, 1)
    assert four["ms"]["gradients"] == pytest.approx(6 / 4 * 8 / 1 + 2)
    assert (
        four["ms"]["agreement"] == 3
    )  # the network's latency, not what was measured inside a machine
    evening = on_paper(tmp_path, PAPER, *slow)["rows"]["batch-scored loop, a=0.25"][1]["ms"][
        "evening out"
    ]
    assert evening == pytest.approx(0.5 * (0.1 + 1))
    late = {
        **PAPER["rows"]["dense loop"],
        "collectives": {**GRADIENTS, "agreement": collective(1, 32, 2)},
    }
    saved = on_paper(tmp_path, {**PAPER, "rows": {"dense loop": late}})
    assert (
        saved["rows"]["dense loop"][0]["step_ms"] == 14
    )  # 7 hops of 2 ms: longer than 9.9 + 0.175
    assert saved["breaks_first"]["dense loop"] == {"part": "agreement", "gpus": 8}
    assert (
        "dense loop: first to break: agreement, efficiency below 0.9 at 8 GPUs"
        in capsys.readouterr().out
    )
    row = {
        **PAPER["rows"]["dense loop"],
        "collectives": {**GRADIENTS, "agreement": collective(1, 32, 1e-4)},
    }
    saved = on_paper(
        tmp_path,
        {**PAPER, "rows": {"dense loop": row, "dense loop, compiled": row}},
        "--latency-us",
        "0",
    )
    assert saved["breaks_first"] == {
        "dense loop, compiled": None
    }  # and the uncompiled one is left out
    assert "nothing brings the efficiency below 0.9 up to 4096 GPUs" in capsys.readouterr().out


def test_the_number_of_gpus_measured_gives_back_the_measurement(tmp_path):
    (at,) = on_paper(tmp_path, PAPER, "--gpus", "2")["rows"]["dense loop"]
    assert at["ms"]["gradients"] == pytest.approx(0.1)
    assert at["ms"]["agreement"] == pytest.approx(0.05)


DENSE = PAPER["rows"]["dense loop"]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "cannot read"),
        ("{", "Invalid JSON"),
        ("[1]", "is no JSON of benchmark.py steps"),
        ({"rows": {"Pillow, float32": {"images_per_second": 1.0}}}, "rows.Pillow, float32.ms"),
        ({**PAPER, "processes": 1}, "no rows with collectives"),
        (
            {**PAPER, "rows": {"dense loop": {"ms": 1.0, "images_per_second": 1.0}}},
            "no rows with collectives",
        ),
        (
            {**PAPER, "rows": {"dense loop": {**DENSE, "collectives": AGREEMENT}}},
            "no optimizer step was timed",
        ),
        ({**PAPER, "rows": {"dense loop": {**DENSE, "ms": 0.1}}}, "longer than its step"),
        ({**PAPER, "rows": {"dense loop": {**DENSE, "ms": math.nan}}}, "rows.dense loop.ms"),
        ({**PAPER, "gpu": "\x1b[2J"}, "gpu"),
        ({**PAPER, "rows": {"\x1b[2J": DENSE}}, "rows"),
    ],
)
def test_a_file_that_is_no_measurement_is_refused(tmp_path, content, named, capsys):
    path = tmp_path / "steps.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert run_cli(lambda: benchmark.main(["scaling", "--steps", str(path)])) == 2
    found = capsys.readouterr().err
    assert found.startswith("error: --steps: ")
    assert str(path) in found
    assert named in found
    assert found.count("\n") == 1
    assert "\x1b" not in found


@pytest.mark.parametrize(
    "wrong",
    [["--gpus", "0"], ["--gpus-per-node", "0"], ["--network-gb", "nan"], ["--latency-us", "-1"]],
)
def test_wrong_assumptions_are_refused(tmp_path, wrong, capsys):
    path = tmp_path / "steps.json"
    path.write_text(json.dumps(PAPER))
    assert run_cli(lambda: benchmark.main(["scaling", "--steps", str(path), *wrong])) == 2
    assert capsys.readouterr().err.startswith("error: ")
