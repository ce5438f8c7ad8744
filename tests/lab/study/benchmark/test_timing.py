"""Which rows are timed, and every input pipeline over real pictures."""

import json
import os

import pytest
import torch

import benchmark
from lab.config.loading import Config
from lab.data import images
from lab.data.images import decode_image
from lab.machine.distributed import Dist
from lab.study.benchmark.timing import StepRow, choose_loops, random_workload, write_json
from lab.study.cli import run_cli

INPUT = [
    "--image-size",
    "32",
    "--batch-size",
    "12",
    "--steps",
    "2",
    "--repeats",
    "1",
    "--workers",
    "1",
]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # data/cache goes there


def test_every_input_pipeline_is_measured(tmp_path, capsys, image_folder):
    sizes = [
        "--image-size",
        "32",
        "--batch-size",
        "12",
        "--steps",
        "4",
        "--repeats",
        "2",
        "--workers",
        "1",
    ]
    sizes += ["--threads", "1", "3"]
    files = ["--json", str(tmp_path / "input.json"), "--plot", str(tmp_path / "input.svg")]
    assert benchmark.main(["input", "--folder", str(image_folder / "train"), *sizes, *files]) == 0
    saved = json.loads((tmp_path / "input.json").read_text())
    cached = [
        f"{title}, {threads} threads"
        for title in ("dataset.cache=disk", "  cold")
        for threads in (1, 3)
    ]
    assert list(saved["rows"]) == [
        "Pillow, float32",
        "streaming, uint8",
        *cached,
        "dataset.cache=device",
    ]
    assert saved["bytes_per_picture"] == 3 * 40 * 48  # smaller than 57 px: kept as they are
    assert saved["disk_bytes_per_second"] > 0
    for row in saved["rows"].values():
        assert 0 < row["lowest"] <= row["images_per_second"] <= row["highest"]
    assert saved["pictures"] == 24
    assert "<svg" in (tmp_path / "input.svg").read_text()
    assert "images/s" in capsys.readouterr().out


def test_a_class_without_pictures_is_refused_as_in_training(image_folder, capsys):
    (image_folder / "train" / "yellow").mkdir()
    assert (
        run_cli(lambda: benchmark.main(["input", "--folder", str(image_folder / "train"), *INPUT]))
        == 2
    )
    expected = f"error: --folder: {image_folder / 'train'}: no images in class folder 'yellow'"
    assert capsys.readouterr().err.startswith(expected)


@pytest.mark.skipif(images.simplejpeg is None, reason="Pillow is the only decoder here")
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_picture_that_pillow_alone_cannot_read_is_named(image_folder, workers, capfd):
    path = image_folder / "train" / "red" / "0.jpg"
    data = path.read_bytes()
    rest = data[
        4 + int.from_bytes(data[4:6], "big") :
    ]  # behind the JFIF header, which is cut short
    path.write_bytes(data[:2] + b"\xff\xe0\x00\x06JFIF" + rest)
    assert decode_image(path.read_bytes()).shape == (3, 40, 48)
    options = ["input", "--folder", str(image_folder / "train"), *INPUT, "--workers", workers]
    assert run_cli(lambda: benchmark.main(options)) == 2
    assert (
        capfd.readouterr().err
        == f"error: --folder: Pillow cannot read {path}: cannot identify image file\n"
    )


@pytest.mark.parametrize(
    ("world", "resolution", "modes", "expected"),
    [
        (1, None, ["off"], ["dense", "own"]),
        (2, None, ["off"], ["dense"]),
        (2, 16, ["default", "off"], ["dense, compiled", "at 16 px, compiled", "dense", "at 16 px"]),
        (1, 0, ["reduce-overhead"], ["dense, reduce-overhead"]),
    ],
)
def test_rows_are_timed_where_they_apply(world, resolution, modes, expected):
    def build(workload, mode):
        return mode

    table = [
        StepRow("dense", build),
        StepRow("at {score_resolution} px", build, needs_score_resolution=True),
        StepRow("own", build, compiles=False, one_process=True),
    ]
    config = Config(dataset={"num_classes": 10}, training={"batch_size": 4})
    workload = random_workload(
        config,
        torch.device("cpu"),
        Dist(0, world),
        score_resolution=resolution,
        get_model=None,
        significance=None,
    )
    loops = choose_loops(table, workload, modes, None)
    assert list(loops) == expected
    assert len(workload.images) == 4 // world
    assert loops[expected[0]]() == modes[0]
    assert list(choose_loops(table, workload, modes, ["^dense", "nothing"])) == [
        n for n in expected if "dense" in n
    ]


def test_the_json_replaces_files_and_no_devices(tmp_path):
    write_json(tmp_path / "x.json", {"rows": 1})
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == 1
    assert [each.name for each in tmp_path.iterdir()] == ["x.json"]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_json(pipe, {"rows": 2})
    assert json.loads(os.read(reader, 10_000))["rows"] == 2
    assert pipe.is_fifo()
    os.close(reader)


def test_epochs_that_are_cut_short_keep_what_was_measured(tmp_path, image_folder):
    """The second kind of cache fails: its folder is a file."""
    options = [
        "--model",
        "test_resnet",
        "--image-size",
        "32",
        "--batch-size",
        "8",
        "--steps",
        "1",
        "--compile",
        "off",
    ]
    options += [
        "--only",
        "dense",
        "--kinds",
        "none",
        "disk",
        "--workers",
        "0",
        "--stream-steps",
        "1",
    ]
    (tmp_path / "file").touch()
    options += [
        "--device",
        "cpu",
        "--json",
        str(tmp_path / "epoch.json"),
        "--cache-folder",
        str(tmp_path / "file"),
    ]
    assert run_cli(
        lambda: benchmark.main(["epoch", "--folder", str(image_folder / "train"), *options])
    ) in (1, 2)
    assert list(json.loads((tmp_path / "epoch.json").read_text())["rows"]) == ["dense, none"]


@pytest.mark.long
def test_whole_epochs_are_timed_by_kind_of_cache(tmp_path, capsys, image_folder):
    options = [
        "--model",
        "test_resnet",
        "--image-size",
        "32",
        "--batch-size",
        "8",
        "--steps",
        "2",
        "--compile",
        "off",
    ]
    options += [
        "--activations",
        "0.5",
        "--kinds",
        "disk",
        "none",
        "--workers",
        "1",
        "--stream-steps",
        "1",
    ]
    files = [
        "--json",
        str(tmp_path / "epoch.json"),
        "--plot",
        str(tmp_path / "epoch.svg"),
        "--device",
        "cpu",
    ]
    assert benchmark.main(["epoch", "--folder", str(image_folder / "train"), *options, *files]) == 0
    rows = json.loads((tmp_path / "epoch.json").read_text())["rows"]
    ways = ["dense", "batch-scored, a=0.5", "history, a=0.5"]
    assert list(rows) == [f"{way}, {kind}" for way in ways for kind in ("disk", "none")]
    for name, row in rows.items():
        way, _, kind = name.rpartition(", ")
        assert row["steps"] == (1 if kind == "none" else row["epoch_steps"])
        assert row["epoch_steps"] == 3 or way.startswith("history")
        assert row["over_steps"] == pytest.approx(
            row["seconds"] / (row["epoch_steps"] * row["step_ms"] / 1000)
        )
        assert 0 < row["waited"] < 1
        assert row["over_dense"] == pytest.approx(
            row["seconds"] / rows[f"dense, {kind}"]["seconds"]
        )
    assert rows["history, a=0.5, disk"]["epoch_steps"] < 3
    assert "/dense" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "epoch.svg").read_text()
