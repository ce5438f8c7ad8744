"""The benchmarks on a CPU: real steps and real pictures, every variant, figures that belong together."""

import json
import math
from pathlib import Path

import pytest

import benchmark
from lab.cli import run_cli
from lab.config import Config
from train_ast import get_model

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


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    """The JSON of two rows, measured by one process."""
    path = tmp_path_factory.mktemp("one") / "steps.json"
    options = ["--no-compile", "--only", "dense loop$", "--json", str(path)]
    assert benchmark.main(["steps", *SMALL, "--device", "cpu", *options]) == 0
    return path


def test_two_processes_share_the_batch_and_time_their_collectives(tmp_path, script, one_process):
    path, options = tmp_path / "steps.json", ["--no-compile", "--device", "cpu", "--score-resolution", "16"]
    files = ["--json", path, "--plot", tmp_path / "steps.png", "--single", one_process]
    done = script("benchmark", "steps", *SMALL, *options, "--steps", "4", "--nproc", "2", *files)
    assert done.returncode == 0, done.stderr
    saved, single = (json.loads(each.read_text()) for each in (path, one_process))
    assert (saved["processes"], saved["batch_size"], single["processes"]) == (2, 32, 1)
    assert list(saved["rows"]) == LOOPS[:6]  # the peers of one process are left out
    assert set(single["rows"]) == set(LOOPS[:2])
    for name, row in saved["rows"].items():
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert row["images_per_second"] == pytest.approx(32_000 / row["ms"])  # of the whole batch
        assert ("speed_up" in row) == (name in single["rows"])
        assert ("collectives" in row) == (name != "hand-written dense loop")
        kinds = row.get("collectives", {})
        for each in kinds.values():
            assert min(each["ms"], each["transfer_ms"]) > 0
        if kinds:
            spent = sum(each["calls"] * each["ms"] for each in kinds.values())
            assert row["collective_share"] == pytest.approx(spent / row["ms"])
    for name, row in single["rows"].items():
        speed_up = saved["rows"][name]["images_per_second"] / row["images_per_second"]
        assert saved["rows"][name]["speed_up"] == pytest.approx(speed_up)
    config = Config(model={"name": "test_resnet"})
    weights = sum(p.numel() for p in get_model(config.model, 10, 32).parameters())
    dense, scored, ahead, _, drawn = [saved["rows"][name]["collectives"] for name in LOOPS[1:6]]
    assert set(dense) == {"gradients", "agreement"}
    assert dense["gradients"]["calls"] == 1
    assert dense["gradients"]["bytes"] == 4 * weights + 8  # float32, and how many samples, and whether one was bad
    assert dense["agreement"]["calls"] == 5 / 4  # one a step, and one as the epoch begins
    assert drawn["gradients"]["calls"] == 1 / 4  # a quarter of the steps
    assert {"scores", "agreement"} <= set(scored)
    for each in (scored, ahead):
        assert each["scores"]["calls"] == 1
        assert each["scores"]["bytes"] == 2 * 4 * 16  # significance and hit of a process's 16 samples
    header, *lines = done.stdout.splitlines()
    assert header.split()[-2:] == ["collectives", "speed-up"]
    assert [line[:44].rstrip() for line in lines[:6]] == LOOPS[:6]
    assert lines[2].split()[-1] == "-"
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_one_process_shows_neither_collectives_nor_speed_up(one_process):
    result = json.loads(one_process.read_text())
    assert benchmark.show_steps(result).splitlines()[0].split()[-1] == "J/image"
    assert not any("collectives" in row or "speed_up" in row for row in result["rows"].values())


def test_what_goes_wrong_in_the_processes_is_said_once(script):
    done = script("benchmark", "steps", *SMALL, "--device", "cpu", "--nproc", "2", "--model", "resnt50")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: model.name: ")
    assert done.stderr.count("\n") == 1


def collective(calls: float, size: float, transfer_ms: float) -> dict[str, float]:
    return {"calls": calls, "bytes": size, "ms": 9.0, "transfer_ms": transfer_ms}


GRADIENTS, AGREEMENT = {"gradients": collective(1, 8e6, 0.1)}, {"agreement": collective(1, 32, 0.05)}
SCORED = {"gradients": collective(0.25, 8e6, 0.1), "scores": collective(1, 256, 0.04)}
SCORED |= {"evening out": collective(0.5, 1e5, 0.06), **AGREEMENT}
PAPER = {
    "processes": 2,
    "batch_size": 64,
    "rows": {
        "hand-written dense loop": {"ms": 9.0, "images_per_second": 7111},
        "dense loop": {"ms": 10.0, "images_per_second": 6400, "collectives": {**GRADIENTS, **AGREEMENT}},
        "batch-scored loop, a=0.25": {"ms": 5.0, "images_per_second": 12800, "activation": 0.25, "collectives": SCORED},
        "  not scored ahead": {"ms": 6.0, "images_per_second": 10667, "activation": 0.25, "collectives": SCORED},
    },
}


def on_paper(tmp_path, steps: dict, *options: str) -> dict:
    source, target = tmp_path / "steps.json", tmp_path / "out" / "scaling.json"
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
    assert [at["ms"]["agreement"] for at in (eight, many, most)] == [pytest.approx(n * 0.05) for n in hops]
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
    assert (eight["ms"]["evening out"], many["ms"]["evening out"]) == (pytest.approx(0.03), pytest.approx(0.03))
    for at, waits in ((eight, max), (saved["rows"]["  not scored ahead"][0], lambda *sides: sum(sides))):
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
    assert four["ms"]["agreement"] == 3  # the network's latency, not what was measured inside a machine
    evening = on_paper(tmp_path, PAPER, *slow)["rows"]["batch-scored loop, a=0.25"][1]["ms"]["evening out"]
    assert evening == pytest.approx(0.5 * (0.1 + 1))
    late = {**PAPER["rows"]["dense loop"], "collectives": {**GRADIENTS, "agreement": collective(1, 32, 2)}}
    saved = on_paper(tmp_path, {**PAPER, "rows": {"dense loop": late}})
    assert saved["rows"]["dense loop"][0]["step_ms"] == 14  # 7 hops of 2 ms: longer than 9.9 + 0.175
    assert saved["breaks_first"]["dense loop"] == {"part": "agreement", "gpus": 8}
    assert "dense loop: first to break: agreement, efficiency below 0.9 at 8 GPUs" in capsys.readouterr().out
    row = {**PAPER["rows"]["dense loop"], "collectives": {**GRADIENTS, "agreement": collective(1, 32, 1e-4)}}
    saved = on_paper(tmp_path, {**PAPER, "rows": {"dense loop": row, "dense loop, compiled": row}}, "--latency-us", "0")
    assert saved["breaks_first"] == {"dense loop, compiled": None}  # and the uncompiled one is left out
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
        ({**PAPER, "rows": {"dense loop": {"ms": 1.0, "images_per_second": 1.0}}}, "no rows with collectives"),
        ({**PAPER, "rows": {"dense loop": {**DENSE, "collectives": AGREEMENT}}}, "no optimizer step was timed"),
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


@pytest.mark.parametrize("wrong", [["--gpus", "0"], ["--gpus-per-node", "0"], ["--network-gb", "nan"],
                                   ["--latency-us", "-1"]])  # fmt: skip
def test_wrong_assumptions_are_refused(tmp_path, wrong, capsys):
    path = tmp_path / "steps.json"
    path.write_text(json.dumps(PAPER))
    assert run_cli(lambda: benchmark.main(["scaling", "--steps", str(path), *wrong])) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"processes": 2}, "of 2 processes"), ({"model": "vit"}, "of model vit"), ({"image_size": 64}, "image_size 64"),
     ({"rows": 1}, "no JSON of benchmark.py steps")],
)  # fmt: skip
def test_a_file_to_compare_with_is_of_one_process_and_the_same_model(tmp_path, one_process, changed, named, capsys):
    path = tmp_path / "single.json"
    path.write_text(json.dumps({**json.loads(one_process.read_text()), **changed}))
    options = ["--nproc", "2", "--device", "cpu", "--single", str(path)]
    assert run_cli(lambda: benchmark.main(["steps", *SMALL, *options])) == 2
    found = capsys.readouterr().err
    assert found.startswith(f"error: --single: {path} is ")
    assert named in found


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
                                   ["--score-resolution", "64"], ["--json", "/proc/no/x.json"], ["--nproc", "0"],
                                   ["--nproc", "3"], ["--single", "/proc/no/x.json"],
                                   ["--only", "(dense"]])  # fmt: skip
def test_wrong_sizes_are_refused(wrong, capsys):
    assert run_cli(lambda: benchmark.main(["steps", *SMALL, "--no-compile", *wrong])) == 2
    assert capsys.readouterr().err.startswith("error: ")
