"""Pictures from a cache file are those from the device. A broken, unfinished or foreign file is
never read.
"""

import json
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import train_ast
from conftest import make_config
from helpers import folder_config
from lab.base.errors import RequestError
from lab.data import datasets
from lab.data.cache import disk as disk_cache
from lab.data.cache import loaders as cache
from lab.data.cache.disk import CacheFile, find_or_build_cache, place
from lab.data.loading import device_batches
from lab.study.cli import run_cli
from runs import StopAfter, exit_code, final_state, forked, ranks, same, untimed, wait_until
from train_ast import build_dataloaders, build_splits, train

CPU = torch.device("cpu")
CROPS = [
    "dataset.augment=random_resized_crop",
    "dataset.image_size=40",
    "dataset.cache_resolution=50",
]
SQUARES = ["dataset.augment=pad_crop", "dataset.image_size=16"]
DIGITS = ["dataset.augment=pad_crop", "dataset.max_train_samples=64", "dataset.max_val_samples=32"]


@pytest.fixture
def photos(tmp_path) -> Path:
    """An ImageFolder of real pictures, parts of two photographs in many shapes: train with 12 a
    class, val with 4.
    """
    folder = tmp_path / "photos"
    dice = random.Random(0)
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        for part, count in (("train", 12), ("val", 4)):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                height = dice.randrange(30, 120)
                width = dice.randrange(30, 160)
                top = dice.randrange(427 - height)
                left = dice.randrange(640 - width)
                picture = Image.fromarray(photo[top : top + height, left : left + width])
                picture.save(folder / part / name / f"{i}.jpg", quality=90)
    return folder


def disk_config(photos, *more, cache="disk"):
    where = [] if cache == "none" else [f"dataset.cache_folder={photos.parent}/cache"]
    return folder_config(photos, "training.num_workers=0", *where, f"dataset.cache={cache}", *more)


def batches_of(config, epoch=3):
    train_loader, val_loader, plan, _ = build_dataloaders(config, CPU)
    plan.start_epoch(epoch)
    return [*device_batches(train_loader, CPU), *device_batches(val_loader, CPU)]


@pytest.mark.parametrize(
    "augment", [CROPS, SQUARES, [*SQUARES, "dataset.augment=none", "dataset.repeat=2"]]
)
def test_batches_from_disk_and_device_are_equal_and_close_to_streamed_ones(augment, photos):
    disk = batches_of(disk_config(photos, *augment, "training.num_workers=2"))
    device = batches_of(
        disk_config(photos, *augment, f"dataset.cache_folder={photos}/none", cache="device")
    )
    filled = batches_of(disk_config(photos, *augment, cache="device"))  # from the file
    keys = [key for key in augment if "cache" not in key]
    streamed = batches_of(disk_config(photos, *keys, cache="none"))
    assert len(disk) == len(device) == len(filled) == len(streamed)
    for ours, *others, stream in zip(disk, device, filled, streamed, strict=True):
        for other in others:
            pairs = zip(ours.tensors(), other.tensors(), strict=True)
            assert all(torch.equal(*pair) for pair in pairs)
        assert torch.equal(ours.labels, stream.labels)
        apart = (ours.images.float() - stream.images.float()).abs().mean()
        assert apart < 5 if augment == CROPS else apart == 0  # cut from 50 px, at most


def test_what_is_kept_in_full_is_cut_as_when_streaming(photos):
    keys = [*CROPS, "dataset.cache_resolution=200"]  # larger than any: nothing is shrunk
    for ours, stream in zip(
        batches_of(disk_config(photos, *keys)),
        batches_of(disk_config(photos, *CROPS[:2], cache="none")),
        strict=True,
    ):
        apart = (ours.images.int() - stream.images.int()).abs()
        assert apart.max() <= 3  # torchvision's uint8 kernel rounds twice, ours once
        assert apart.float().mean() < 0.3


def test_jpeg_takes_less_disk_and_changes_little(photos):
    raw, small = (
        disk_config(photos, *CROPS, f"dataset.cache_format={kind}") for kind in ("raw", "jpeg")
    )
    for ours, other in zip(batches_of(raw), batches_of(small), strict=True):
        assert 0 < (ours.images.float() - other.images.float()).abs().mean() < 4
    sizes = {
        path.parent.name.split("-")[2]: path.stat().st_size
        for path in photos.parent.glob("cache/train*/pixels")
    }
    assert sizes["jpeg"] < sizes["raw"] / 3


@pytest.mark.parametrize("kind", ["photos", "digits"])
def test_histories_are_those_of_the_device(kind, photos, tmp_path):
    """Whole, interrupted within an epoch and resumed, and by two processes."""
    ast = [
        "model.name=test_resnet",
        "training.epochs=2",
        "ast.scoring=history",
        "ast.target_activation=0.5",
    ]
    ast += ["ast.warmup_epochs=1", "training.num_workers=2"]

    def config(cache, number):
        keys = [*ast, f"logging.output_dir={tmp_path}/{number}", "dataset.label_noise=0.1"]
        if kind == "photos":
            return disk_config(photos, *CROPS, *keys, cache=cache)
        where = [f"dataset.cache={cache}", f"dataset.cache_folder={tmp_path}/digits"]
        return make_config(*where, *DIGITS, *keys)

    resident, _ = train(config("device", 0))
    state = final_state(config("device", 0))
    assert train(config("disk", 1), StopAfter(4))[0]["status"] == "interrupted"
    result, _ = train(config("disk", 1), resume="auto")
    where = {"weights": None}  # its folder is named after the run
    assert untimed(result) | where == untimed(resident) | where
    assert same(final_state(config("disk", 1)), state)
    pairs = [
        ranks(2, lambda _, at=at: untimed(train(config(*at))[0]), tmp_path / at[0])
        for at in (("device", 2), ("disk", 3))
    ]
    (device, _), (disk, _) = (pair.results() for pair in pairs)
    assert disk | where == device | where


def test_an_epoch_of_a_choice_reads_that_choice_alone(photos, monkeypatch):
    asked = []
    read = CacheFile.read
    monkeypatch.setattr(
        CacheFile, "read", lambda *args: asked.extend(args[1].tolist()) or read(*args)
    )
    loader, _, plan, _ = build_dataloaders(disk_config(photos, *CROPS), CPU)
    mask = np.zeros(24, dtype=np.uint8)
    mask[[3, 7, 9, 11, 13, 17, 19, 23]] = 1
    plan.start_epoch(1, 0, mask)
    (batch,) = device_batches(loader, CPU)
    assert sorted(asked) == sorted(batch.indices.tolist()) == [3, 7, 9, 11, 13, 17, 19, 23]


def slots_of(loader):
    return [slot.host.data_ptr() for slots in loader.idle for slot in slots]


@pytest.mark.parametrize("augment", [CROPS, SQUARES, [*SQUARES, "dataset.augment=none"]])
def test_epochs_use_the_same_few_pieces_of_memory_and_batches_have_their_own(augment, photos):
    loader, _, plan, _ = build_dataloaders(
        disk_config(photos, *augment, "training.batch_size=2"), CPU
    )
    held = []
    copies = []
    pieces = []
    for epoch in range(
        5
    ):  # a crop that is larger than all before may ask for a larger piece, at most twice the size
        plan.start_epoch(epoch)
        for batch in loader:
            held.append(batch)
            copies.append([tensor.clone() for tensor in batch[:3]])
        pieces.append(slots_of(loader))
    assert len(held) == 60
    assert len(pieces[0]) == len(set(pieces[0])) == loader.SLOTS
    assert pieces[2] == pieces[3] == pieces[4]
    for batch, copy in zip(held, copies, strict=True):
        assert all(torch.equal(*pair) for pair in zip(batch[:3], copy, strict=True))


def test_a_larger_batch_gets_larger_pieces(photos):
    loader, *_ = build_dataloaders(disk_config(photos, *CROPS, "training.batch_size=2"), CPU)
    expected = [batch.images for batch in loader]
    for slot in loader.idle[0]:
        slot.host = slot.host[:200].clone()
    for ours, images in zip(loader, expected, strict=True):
        assert torch.equal(ours.images, images)
    assert all(200 < len(slot.host) < 2**18 for slot in loader.idle[0])


def test_who_stops_early_leaves_no_thread_and_no_piece_behind(photos, monkeypatch):
    loader, *_ = build_dataloaders(disk_config(photos, *CROPS, "training.batch_size=2"), CPU)
    expected = [batch.images for batch in loader]
    threads = threading.active_count()
    pieces = slots_of(loader)
    asked = []
    read = CacheFile.read
    monkeypatch.setattr(
        CacheFile, "read", lambda *args: asked.extend(args[1].tolist()) or read(*args)
    )
    for count in range(1, 8):
        asked.clear()
        batches = iter(loader)
        for _ in range(count):
            next(batches)
        time.sleep(0.01)
        assert len(asked) <= 2 * (
            count - 1 + loader.SLOTS
        )  # nobody reads further ahead than there are slots
        batches.close()
        assert threading.active_count() == threads
    # each has slots of its own
    first = iter(loader)
    second = iter(loader)
    for one, other, images in zip(first, second, expected, strict=True):
        assert torch.equal(one.images, images)
        assert torch.equal(other.images, images)
    size = loader.file.path.stat().st_size
    os.truncate(loader.file.path, size // 2)
    with pytest.raises(RequestError, match="it has become shorter"):
        list(loader)
    assert threading.active_count() == threads
    assert set(pieces) <= set(slots_of(loader))


def test_raw_pixels_have_few_readers_and_jpegs_as_many_as_are_asked_for(photos):
    for kind, threads in (("raw", cache.MOST_READERS), ("jpeg", 12)):
        file = build_dataloaders(disk_config(photos, *CROPS, f"dataset.cache_format={kind}"), CPU)[
            0
        ].file
        config = disk_config(
            photos, *CROPS, f"dataset.cache_format={kind}", "training.num_workers=12"
        )
        loader = build_dataloaders(config, CPU)[0]
        assert (loader.threads, loader.file.folder) == (threads, file.folder)


def test_a_changed_picture_makes_a_new_cache_and_the_old_one_stays(photos):
    before = batches_of(disk_config(photos, *CROPS))
    path = photos / "train" / "china" / "3.jpg"
    shutil.copy(photos / "train" / "flower" / "3.jpg", path)
    os.utime(path, (1, 1))
    after = batches_of(disk_config(photos, *CROPS))
    assert not all(
        torch.equal(ours.images, others.images) for ours, others in zip(before, after, strict=True)
    )
    assert len([*(photos.parent / "cache").glob("train-50px-raw-*")]) == 2
    assert len([*(photos.parent / "cache").glob("val-50px-raw-*")]) == 1


def cut_short(folder):
    os.truncate(folder / "pixels", (folder / "pixels").stat().st_size - 1)


def flip(folder, name="pixels"):
    with (folder / name).open("r+b") as file:
        file.seek(100)
        byte = file.read(1)[0]
        file.seek(100)
        file.write(bytes([byte ^ 1]))


def of_other_data(folder):
    path = folder / "header.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "x"}))


DAMAGES = {
    "pixels is damaged (it should have": cut_short,
    "pixels is damaged (the checksum of picture 0": flip,
    "index.npz is damaged (its checksum": lambda folder: flip(folder, "index.npz"),
    "index.npz is damaged (No such file": lambda folder: (folder / "index.npz").unlink(),
    "header.json is damaged (it is of other data": of_other_data,
    "header.json is damaged (": lambda folder: (folder / "header.json").write_text("[1]"),
}


@pytest.mark.parametrize("says", DAMAGES)
@pytest.mark.parametrize("cache", ["disk", "device"])
def test_a_damaged_cache_is_named_and_not_read(says, cache, photos):
    batches_of(disk_config(photos, *CROPS))
    (folder,) = (photos.parent / "cache").glob("train-*")
    DAMAGES[says](folder)
    with pytest.raises(RequestError) as failed:
        batches_of(disk_config(photos, *CROPS, cache=cache))
    assert str(failed.value).startswith(f"dataset.cache: {folder}/{says}")
    assert str(failed.value).endswith(f"delete {folder} to have it built again")


def test_prepare_only_builds_both_and_then_checks_every_picture(
    photos, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "config.yaml"
    path.write_text(
        f"dataset: {{type: folder, train_dir: {photos}/train, val_dir: {photos}/val}}\n"
    )
    where = f"dataset.cache_folder={tmp_path}/cache"
    command = [
        "--config",
        str(path),
        "--prepare-only",
        "dataset.image_size=72",
        "training.num_workers=2",
    ]
    assert run_cli(lambda: train_ast.main(command)) == 2
    assert capsys.readouterr().err == "error: --prepare-only: needs dataset.cache=disk\n"
    command += ["dataset.cache=disk", where]
    assert run_cli(lambda: train_ast.main(command)) == 0
    shown = capsys.readouterr().out
    assert "dataset.cache: 24 pictures of 129 px need about 0.00 GiB; " in shown
    assert "dataset.cache: 8 pictures of 129 px, 0.00 GiB, in " in shown
    monkeypatch.setattr(disk_cache, "CHECKED", 1)  # of 24: what a run would not notice
    (folder,) = (tmp_path / "cache").glob("train-*")
    with (folder / "pixels").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"12345")
    assert run_cli(lambda: train_ast.main(command)) == 2
    assert (
        f"{folder}/pixels is damaged (the checksum of picture 23 differs)"
        in capsys.readouterr().err
    )


def test_a_disk_that_is_too_small_is_named_with_the_figure(photos, monkeypatch):
    usage = shutil.disk_usage(photos)
    monkeypatch.setattr(disk_cache.shutil, "disk_usage", lambda folder: usage._replace(free=2**10))
    with pytest.raises(
        RequestError,
        match=r"24 pictures of 50 px need about 0.00 GiB, and .* has 0.00 GiB free; set",
    ):
        batches_of(disk_config(photos, *CROPS))


@pytest.mark.parametrize("allowed", [0, 1])
def test_unreadable_pictures_are_counted_as_when_streaming(allowed, photos):
    path = photos / "train" / "china" / "3.jpg"
    path.write_bytes(b"no image")
    config = disk_config(photos, *CROPS, f"dataset.max_bad_images={allowed}")
    if not allowed:
        with pytest.raises(RequestError, match=f"{path}: not a readable image"):
            batches_of(config)
        return
    for _ in range(2):  # built, and found again
        loader, *_ = build_dataloaders(config, CPU)
        assert [text.partition(": ")[0] for text in loader.read_errors.found] == [str(path)]


def build_and_kill(config, trace, seconds) -> None:
    """Start to build a cache in a process of its own, and kill it so many seconds after `trace` is
    there.
    """

    def work() -> int:
        disk_cache.SAVED_SECONDS = 0.0
        datasets.decode_image = slow(datasets.decode_image)
        build_dataloaders(config, CPU)
        return 0

    child = forked(work, Path(f"{config.dataset.cache_folder}.out"))
    wait_until(trace.exists)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    exit_code(child)


def slow(decode):
    def decoded(data):
        time.sleep(0.003)
        return decode(data)

    return decoded


def kill_builds(photos, tmp_path, kills, monkeypatch):
    monkeypatch.setattr(disk_cache, "chunks", small_chunks(disk_cache.chunks))
    clean = disk_config(photos, *CROPS)
    expected = batches_of(clean)
    dice = random.Random(0)
    gone_on = 0
    for number in range(kills):
        config = disk_config(photos, *CROPS, f"dataset.cache_folder={tmp_path}/killed{number % 7}")
        if number % 7 == 0:
            for old in range(7):
                shutil.rmtree(tmp_path / f"killed{old}", ignore_errors=True)
        split = build_splits(config.dataset)["train"]
        folder, fingerprint = place(split.dataset, split.kept, config.dataset, "train")
        traces = [folder, folder / "index.npz"]  # the second: there is something to go on from
        for _ in range(dice.randrange(1, 3)):
            build_and_kill(config, traces[number % 2], dice.uniform(0.0, 0.25))
        gone_on += (folder / "index.npz").exists() and not (folder / "header.json").exists()
        if (folder / "header.json").exists():
            file = CacheFile(folder, fingerprint)
            file.verify(np.arange(len(file)))
        for ours, others in zip(batches_of(config), expected, strict=True):
            assert torch.equal(ours.images, others.images)
            assert torch.equal(ours.labels, others.labels)
    return gone_on


def small_chunks(chunks):
    return lambda dataset, indices, recipe, mean, options: chunks(
        dataset, indices, recipe, 2**22, options
    )  # 8 each


def test_a_build_that_is_killed_leaves_nothing_broken_and_goes_on(photos, tmp_path, monkeypatch):
    assert kill_builds(photos, tmp_path, 6, monkeypatch) > 0


@pytest.mark.long
def test_two_hundred_builds_that_are_killed(photos, tmp_path, monkeypatch):
    gone_on = kill_builds(photos, tmp_path, 200, monkeypatch)
    print(f"{gone_on} of 200 builds went on from what was there")
    assert gone_on > 20


def test_two_runs_on_a_cold_cache_share_one_build(photos, tmp_path):
    config = disk_config(photos, *CROPS)

    def work() -> int:
        datasets.decode_image = slow(datasets.decode_image)
        build_dataloaders(config, CPU)
        return 0

    outputs = [tmp_path / "first", tmp_path / "second"]
    first = forked(work, outputs[0])
    wait_until(lambda: [*tmp_path.glob("cache/train-*/pixels")])
    second = forked(work, outputs[1])
    assert [exit_code(first), exit_code(second)] == [0, 0]
    texts = [path.read_text() for path in outputs]
    assert "".join(texts).count(" need about ") == 2  # train and val, each built once
    assert "dataset.cache: waiting for another process to build " in texts[1]


def test_the_cache_of_a_data_set_of_the_hub_is_found_again(parquet_folder, tmp_path):
    keys = [
        "dataset.type=hf",
        f"dataset.name={parquet_folder}",
        "dataset.split_val=test",
        "dataset.image_size=16",
    ]
    config = make_config(
        *keys,
        "dataset.cache=disk",
        f"dataset.cache_folder={tmp_path}/cache",
        "training.num_workers=0",
    )
    first = batches_of(config)
    times = [path.stat().st_mtime_ns for path in sorted((tmp_path / "cache").rglob("*"))]
    for ours, others in zip(first, batches_of(config), strict=True):
        assert torch.equal(ours.images, others.images)
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "cache").rglob("*"))] == times
    split = build_splits(config.dataset)["train"]
    assert len(find_or_build_cache(split.dataset, split.kept, config.dataset, "train", {})) == 24
