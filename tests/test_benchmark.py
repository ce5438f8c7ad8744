"""The benchmark command on a CPU: real steps, every row, figures that belong together."""

import json
from pathlib import Path

import pytest
import torch

import benchmark
from lab.config.loading import Config
from lab.config.sections import ModelConfig
from lab.models.building import count_flops, get_model
from lab.study.benchmark.timing import Loop, StepRow, show_steps
from lab.study.cli import run_cli
from runs import command

SMALL = ["--model", "test_resnet", "--classes", "10", "--image-size", "16", "--batch-size", "16"]
SMALL += ["--steps", "2", "--repeats", "2"]
LOOPS = [
    "hand-written dense loop",
    "dense loop",
    "batch-scored loop, a=0.25",
    "  scored at 8 px",
    "forward once, a=0.25",
    "proxy-scored loop, a=0.25",
]
LOOPS += ["random loop, a=0.25", "stored scores, a=0.25"]
LOOPS += ["batch-scored loop, not packed"]
PEERS = [
    "published pattern",
    "  in our settings",
    "two full forwards, masked",
    "two-pass top-k, a=0.25",
]


def test_every_step_is_measured(tmp_path, capsys):
    files = [
        "--json",
        str(tmp_path / "out" / "steps.json"),
        "--plot",
        str(tmp_path / "out" / "steps.png"),
    ]
    assert benchmark.main(["steps", *SMALL, "--no-compile", "--score-resolution", "8", *files]) == 0
    saved = json.loads((tmp_path / "out" / "steps.json").read_text())
    assert list(saved["rows"]) == [*LOOPS, *PEERS]
    best = min(saved["rows"][name]["ms"] for name in LOOPS[:2])
    for row in saved["rows"].values():
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert row["ratio"] == pytest.approx(row["ms"] / best)
        assert row["images_per_second"] == pytest.approx(16_000 / row["ms"])
    batch_scored, forward_once, by_proxy = (saved["rows"][LOOPS[i]] for i in (2, 4, 5))
    assert 0 <= batch_scored["activation"] <= 1
    assert batch_scored["limit"] == pytest.approx(1 / 3 + batch_scored["activation"])
    assert forward_once["limit"] == pytest.approx(1 / 3 + 0.25 * 2 / 3)
    proxy, network = (
        count_flops(get_model(ModelConfig(name=name), 10, 16), 16)
        for name in ("small_conv", "test_resnet")
    )
    # a forward of each, a backward of every fourth, and the network's training on a quarter
    assert by_proxy["limit"] == pytest.approx(proxy / network * (1 + 2 / 4) / 3 + 0.25)
    assert [saved["rows"][name]["limit"] for name in LOOPS[:2]] == [None, 1]
    assert set(saved["break_even"]) == {"batch-scored loop, a=0.25", "scored at 8 px"}
    shown = capsys.readouterr().out
    assert all(
        name in shown for name in [*saved["rows"], "faster than dense below an activation of"]
    )
    assert (tmp_path / "out" / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_a_new_row_is_one_entry(tmp_path, monkeypatch, capsys):
    def idle(workload, compiled):
        built.append(compiled)
        return Loop(lambda n: considered.append(n), lambda: 0.5)

    built = []
    considered = []
    row = StepRow(
        "idle at {score_resolution} px, a={activation:g}",
        idle,
        compiles=False,
        needs_score_resolution=True,
    )
    monkeypatch.setattr(benchmark, "STEP_ROWS", [*benchmark.STEP_ROWS, row])
    only = ["--only", "^hand-written dense loop$", "idle", "--json", str(tmp_path / "steps.json")]
    assert benchmark.main(["steps", *SMALL, "--no-compile", "--score-resolution", "8", *only]) == 0
    assert (built, considered) == (["off"], [4, 2, 2])  # once to warm up, and both repeats
    assert (
        json.loads((tmp_path / "steps.json").read_text())["rows"]["idle at 8 px, a=0.25"][
            "activation"
        ]
        == 0.5
    )
    _, dense, line = capsys.readouterr().out.splitlines()
    assert dense.startswith("hand-written dense loop ")
    assert line.startswith("idle at 8 px, a=0.25 ")
    assert line.split()[-3] == "0.500"


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    """The JSON of two rows, measured by one process."""
    path = tmp_path_factory.mktemp("one") / "steps.json"
    options = ["--no-compile", "--only", "dense loop$", "--json", str(path)]
    assert benchmark.main(["steps", *SMALL, "--device", "cpu", *options]) == 0
    return path


@pytest.mark.long
def test_two_processes_share_the_batch_and_time_their_collectives(tmp_path, one_process):
    path = tmp_path / "steps.json"
    options = ["--no-compile", "--device", "cpu", "--score-resolution", "8"]
    files = ["--json", path, "--plot", tmp_path / "steps.png", "--single", one_process]
    done = command(
        ["scripts/benchmark.py", "steps", *SMALL, *options, "--steps", "4", "--nproc", "2", *files]
    )
    assert done.returncode == 0, done.stderr
    saved, single = (json.loads(each.read_text()) for each in (path, one_process))
    assert (saved["processes"], saved["batch_size"], single["processes"]) == (2, 16, 1)
    assert list(saved["rows"]) == LOOPS[:6]  # the peers of one process are left out
    assert set(single["rows"]) == set(LOOPS[:2])
    for name, row in saved["rows"].items():
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert row["images_per_second"] == pytest.approx(16_000 / row["ms"])  # of the whole batch
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
    weights = sum(p.numel() for p in get_model(config.model, 10, 16).parameters())
    dense, scored, smaller, _, drawn = [saved["rows"][name]["collectives"] for name in LOOPS[1:6]]
    assert set(dense) == {"gradients", "agreement"}
    assert dense["gradients"]["calls"] == 1
    assert dense["gradients"]["bytes"] == 4 * weights + 4  # float32, and how many samples
    assert dense["agreement"]["calls"] == 5 / 4  # one a step, and one as the epoch begins
    assert drawn["gradients"]["calls"] == 1 / 4  # a quarter of the steps
    assert {"scores", "agreement"} <= set(scored)
    for each in (scored, smaller):
        assert each["scores"]["calls"] == 1
        assert each["scores"]["bytes"] == 2 * 4 * 8  # significance and hit of a process's 8 samples
    header, *lines = done.stdout.splitlines()
    assert header.split()[-2:] == ["collectives", "speed-up"]
    assert [line[:44].rstrip() for line in lines[:6]] == LOOPS[:6]
    assert lines[2].split()[-1] == "-"
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_one_process_shows_neither_collectives_nor_speed_up(one_process):
    result = json.loads(one_process.read_text())
    assert show_steps(result).splitlines()[0].split()[-1] == "J/image"
    assert not any("collectives" in row or "speed_up" in row for row in result["rows"].values())


@pytest.mark.long
def test_what_goes_wrong_in_the_processes_is_said_once():
    done = command(
        [
            "scripts/benchmark.py",
            "steps",
            *SMALL,
            "--device",
            "cpu",
            "--nproc",
            "2",
            "--model",
            "resnt50",
        ]
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: model.name: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"processes": 2}, "of 2 processes"),
        ({"model": "vit"}, "of model vit"),
        ({"image_size": 64}, "image_size 64"),
        ({"rows": 1}, "no JSON of benchmark.py steps"),
    ],
)
def test_a_file_to_compare_with_is_of_one_process_and_the_same_model(
    tmp_path, one_process, changed, named, capsys
):
    path = tmp_path / "single.json"
    path.write_text(json.dumps({**json.loads(one_process.read_text()), **changed}))
    options = ["--nproc", "2", "--device", "cpu", "--single", str(path)]
    assert run_cli(lambda: benchmark.main(["steps", *SMALL, *options])) == 2
    found = capsys.readouterr().err
    assert found.startswith(f"error: --single: {path} is ")
    assert named in found


@pytest.mark.parametrize(
    "wrong",
    [
        ["--steps", "0"],
        ["--activation", "0"],
        ["--model", "resnt50"],
        ["--score-resolution", "64"],
        ["--json", "/proc/no/x.json"],
        ["--nproc", "0"],
        ["--nproc", "3"],
        ["--single", "/proc/no/x.json"],
        ["--only", "(dense"],
    ],
)
def test_wrong_sizes_are_refused(wrong, capsys):
    assert run_cli(lambda: benchmark.main(["steps", *SMALL, "--no-compile", *wrong])) == 2
    assert capsys.readouterr().err.startswith("error: ")


INFERENCE = ["inference", "--model", "test_resnet", "--classes", "10", "--image-size", "32"]
INFERENCE += ["--device", "cpu", "--steps", "4", "--repeats", "2"]


def test_predictions_are_timed_one_by_one_and_in_batches(tmp_path, capsys):
    file = tmp_path / "inference.json"
    assert benchmark.main([*INFERENCE, "--largest", "12", "--json", str(file)]) == 0
    saved = json.loads(file.read_text())
    assert list(saved["rows"]) == ["1", "2", "4", "8"]
    assert (saved["ended"], saved["dtype"]) == (None, "torch.float32")
    for batch, row in saved["rows"].items():
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert row["images_per_second"] == pytest.approx(1000 * int(batch) / row["ms"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"one picture takes {saved['rows']['1']['ms']:.2f} ms; at most ")


class SmallMemory(torch.nn.Module):
    """A network for which five pictures are too many."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        if len(images) > 4 and not images.is_meta:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 2 GiB")
        return self.model(images)


def test_the_largest_batch_that_fits_is_the_last_row(monkeypatch, capsys):
    monkeypatch.setattr(
        "lab.study.benchmark.inference.get_model", lambda *a: SmallMemory(get_model(*a))
    )
    assert benchmark.main(INFERENCE) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["1", "2", "4"]
    assert lines[4] == "does not fit: a batch of 8: out of memory. Tried to allocate 2 GiB"


def test_wrong_options_of_inference_are_one_line(capsys):
    for options in (["--largest", "0"], ["--steps", "0"], ["--classes", "1"]):
        assert run_cli(lambda options=options: benchmark.main([*INFERENCE, *options])) == 2
        assert capsys.readouterr().err.count("\n") == 1
