"""Folders of pictures on a real disk: what is a class and a picture, and what is skipped and said
to be.
"""

import os
import shutil
import signal
import socket

import numpy as np
import pytest
import torch
from torchvision.datasets import ImageFolder

from conftest import save_picture
from helpers import folder_config
from lab.base.errors import RequestError
from lab.data.datasets import folder_dataset
from lab.data.folders import MAX_FILE_BYTES, scan_folder
from lab.data.loading import EpochPlan, device_batches
from lab.study.benchmark.inputs import pil_float_loader
from runs import command
from train_ast import build_dataloaders, build_datasets

CPU = torch.device("cpu")


def names(dataset, folder):
    """What a data set holds, as (path below `folder`, class)."""
    return [
        (str(path.relative_to(folder)), dataset.classes[label]) for path, label in dataset.samples
    ]


def test_the_pictures_are_those_of_imagefolder_in_its_order(image_folder):
    train = image_folder / "train"
    for path in ("red/z/1.png", "red/a/b/2.JPG", "red/a-b/3.jpeg", "blue/A.webp", "green/10.tif"):
        (train / path).parent.mkdir(parents=True, exist_ok=True)
        (train / path).write_bytes(b"")
    (train / "green" / "linked.jpg").symlink_to(train / "green" / "0.jpg")
    (train / "green" / "once more.jpg").hardlink_to(train / "green" / "0.jpg")
    theirs = ImageFolder(str(train))
    ours = folder_dataset("dataset.train_dir", str(train))
    assert ours.classes == theirs.classes
    assert [(str(path), label) for path, label in ours.samples] == theirs.samples
    assert ours.skipped == {}


def test_hidden_folders_are_no_classes_and_hold_no_pictures(image_folder, capsys):
    """Not in training, nor in validation, nor in the benchmark of the usual pipeline."""
    whole = names(folder_dataset("dataset.train_dir", str(image_folder / "train")), image_folder)
    for part in ("train", "val"):
        (image_folder / part / ".ipynb_checkpoints").mkdir()
        save_picture(image_folder / part / ".ipynb_checkpoints" / "1.jpg", (9, 9, 9), 0)
        (image_folder / part / "red" / ".thumbnails").mkdir()
        save_picture(image_folder / part / "red" / ".thumbnails" / "1.jpg", (9, 9, 9), 0)
        (image_folder / part / ".DS_Store").write_bytes(b"")
    train, val = build_datasets(folder_config(image_folder).dataset)
    assert train.classes == val.classes == ["blue", "green", "red"]
    assert names(train, image_folder) == whole
    assert len(val) == 9
    assert train.skipped == val.skipped == {"hidden folders": 2, "files of other types": 1}
    assert (
        "dataset.train_dir: skipped: files of other types 1 (no ending 1), hidden folders 2\n"
        in capsys.readouterr().out
    )
    plan = EpochPlan(np.arange(24), 24, 0, lambda epoch: 1.0)
    ((_, labels),) = pil_float_loader(train, 32, plan, {})
    assert labels.tolist() == [index // 8 for index in plan.indices_to_load()]


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_class_folder_without_a_picture_is_refused(part, image_folder):
    for name in ("yellow", "zinc"):
        for each in {"train", part}:
            (image_folder / each / name).mkdir()
    if part == "val":
        for name in ("yellow", "zinc"):
            save_picture(image_folder / "train" / name / "1.jpg", (9, 9, 9), 0)
    (image_folder / part / "yellow" / "notes.txt").write_text("no picture")
    with pytest.raises(FileNotFoundError, match="Found no valid file for the classes"):
        ImageFolder(str(image_folder / part))
    complaint = (
        rf"dataset.{part}_dir: .*/{part}: no images in class folder 'yellow' and in 1 more; "
        rf"their names end in"
    )
    with pytest.raises(RequestError, match=complaint):
        build_datasets(folder_config(image_folder).dataset)


def test_a_class_that_validation_lacks_is_named(image_folder, capsys):
    shutil.rmtree(image_folder / "val" / "green")
    shutil.rmtree(image_folder / "val" / "red")
    _, val = build_datasets(folder_config(image_folder).dataset)
    assert len(val) == 3
    assert val.classes == ["blue", "green", "red"]
    said = f"note: dataset.val_dir: {image_folder}/val: no folder for 2 of 3 classes, as 'green'\n"
    assert said in capsys.readouterr().out


def test_a_folder_is_read_once_however_many_links_lead_to_it(image_folder, tmp_path):
    train = image_folder / "train"
    whole = names(folder_dataset("dataset.train_dir", str(train)), image_folder)
    (train / "blue" / "loop").symlink_to("../blue")
    (train / "blue" / "another").symlink_to("../red")  # which has a place of its own
    (train / "green" / "up").symlink_to("../..")
    (train / "self").symlink_to(".")
    (train / "azure").symlink_to("blue")
    ours = folder_dataset("dataset.train_dir", str(train))
    assert names(ours, image_folder) == whole
    assert ours.classes == ["blue", "green", "red"]
    assert ours.skipped == {"folders reached twice": 5}
    (tmp_path / "elsewhere" / "more").mkdir(parents=True)
    save_picture(tmp_path / "elsewhere" / "1.jpg", (9, 9, 9), 0)
    save_picture(tmp_path / "elsewhere" / "more" / "2.jpg", (9, 9, 9), 0)
    (train / "violet").symlink_to(tmp_path / "elsewhere")  # a class may lie elsewhere
    (train / "yellow").symlink_to(tmp_path / "elsewhere" / "more")
    ours = folder_dataset("dataset.train_dir", str(train))
    added = [("train/violet/1.jpg", "violet"), ("train/violet/more/2.jpg", "violet")]
    assert names(ours, image_folder) == [*whole, *added]
    assert ours.skipped == {"folders reached twice": 6}


def test_only_regular_files_are_pictures(image_folder, monkeypatch):
    red = image_folder / "train" / "red"
    os.mkfifo(red / "fifo.jpg")
    (red / "zero.png").symlink_to("/dev/zero")
    (red / "round.jpg").symlink_to("round.jpg")
    (red / "broken.jpg").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(red)  # the kernel takes short names alone
        listener.bind("socket.jpg")
    save_picture(image_folder / "train" / "loose.jpg", (9, 9, 9), 0)
    pictures, skipped, _ = scan_folder(str(image_folder / "train"))
    assert skipped == {"FIFOs, sockets and devices": 3, "pictures outside class folders": 1}
    assert [path.name for path in pictures["red"]] == [
        *(f"{i}.jpg" for i in range(8)),
        "broken.jpg",
        "round.jpg",
    ]


def test_a_run_on_a_folder_with_a_fifo_goes_through_and_says_so(image_folder, tmp_path):
    os.mkfifo(image_folder / "train" / "red" / "fifo.jpg")
    keys = [
        "dataset.type=folder",
        f"dataset.train_dir={image_folder}/train",
        f"dataset.val_dir={image_folder}/val",
    ]
    keys += [
        "model.name=test_resnet",
        "training.batch_size=8",
        "ast.mode=dense",
        "dataset.image_size=16",
    ]
    keys += ["training.device=cpu", "training.epochs=1", f"logging.output_dir={tmp_path}/out"]
    done = command(["scripts/run_experiment.py", "--config", "configs/digits_smoke.yaml", *keys])
    assert done.returncode == 0, done.stderr
    assert "dataset.train_dir: skipped: FIFOs, sockets and devices 1\n" in done.stdout


def test_what_becomes_a_fifo_later_is_named(image_folder):
    loader, _, _, _ = build_dataloaders(folder_config(image_folder, "training.num_workers=0"), CPU)
    (image_folder / "train" / "red" / "1.jpg").unlink()
    os.mkfifo(image_folder / "train" / "red" / "1.jpg")

    def give_up(*_):
        raise TimeoutError("it waits for somebody to write to the FIFO")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(20)
    try:
        with pytest.raises(RequestError, match=r"red/1\.jpg: not a regular file"):
            list(device_batches(loader, CPU))
    finally:
        signal.alarm(0)


def test_a_file_too_large_for_a_picture_is_named(image_folder):
    os.truncate(image_folder / "train" / "red" / "1.jpg", 50 * 2**30)  # sparse: it takes no room
    loader, _, _, _ = build_dataloaders(folder_config(image_folder, "training.num_workers=0"), CPU)
    complaint = (
        rf"red/1\.jpg: not a readable image \(53,687,091,200 bytes; a picture may have "
        rf"{MAX_FILE_BYTES:,}\)"
    )
    with pytest.raises(RequestError, match=complaint):
        list(device_batches(loader, CPU))


def test_names_that_are_no_text_do_not_stop_the_comparison_of_data(image_folder):
    red = image_folder / "train" / "red"
    (red / "0.jpg").rename(os.fsdecode(os.fsencode(red) + b"/\xff.jpg"))
    train = folder_dataset("dataset.train_dir", str(image_folder / "train"))
    assert len(train.fingerprint()) == 64


def test_folders_that_look_alike_are_one_class(image_folder, capsys):
    """A Mac and a Linux have written the same name in two forms of Unicode, into one folder."""
    composed = "caf\u00e9"
    apart = "cafe\u0301"
    (image_folder / "train" / "green").rename(image_folder / "train" / composed)
    (image_folder / "train" / "red").rename(image_folder / "train" / apart)
    (image_folder / "val" / "green").rename(image_folder / "val" / apart)
    shutil.rmtree(image_folder / "val" / "red")
    train, val = build_datasets(folder_config(image_folder).dataset)
    assert train.classes == val.classes == ["blue", composed]
    assert [label for _, label in train.samples] == [0] * 8 + [1] * 16
    assert [label for _, label in val.samples] == [0] * 3 + [1] * 3
    assert f"folders whose names look alike are one class: {composed}\n" in capsys.readouterr().out


def test_what_other_systems_leave_is_no_class_and_no_picture(image_folder, capsys):
    train = image_folder / "train"
    whole = names(folder_dataset("dataset.train_dir", str(train)), image_folder)
    for name in ("__MACOSX", "lost+found", "$RECYCLE.BIN", "red/@eaDir"):
        (train / name).mkdir()
        save_picture(train / name / "1.jpg", (9, 9, 9), 0)
    for name in ("._0.jpg", "1.HEIC", "2.heic", "3.mov"):
        (train / "red" / name).write_bytes(b"none")
    capsys.readouterr()
    ours = folder_dataset("dataset.train_dir", str(train))
    assert names(ours, image_folder) == whole
    assert capsys.readouterr().out == (
        "dataset.train_dir: skipped: files of other types 3 (.heic 2, .mov 1), "
        "folders of an operating system 4, resource forks of a Mac (._*) 1; "
        ".heic: pictures that are not read; convert them to JPEG\n"
    )


def test_a_folder_has_one_place_however_it_is_spelt(image_folder, monkeypatch):
    """Two spellings once built two caches of the same pictures."""
    monkeypatch.chdir(image_folder)
    (image_folder / "link").symlink_to("train")
    spellings = ["train", "./train/", str(image_folder / "train"), "val/../train", "link"]
    contents = {folder_dataset("dataset.train_dir", each).content() for each in spellings}
    assert len(contents) == 1
    (image_folder / "train" / "red" / "0.jpg").write_bytes(b"another")
    assert folder_dataset("dataset.train_dir", "train").content() not in contents
