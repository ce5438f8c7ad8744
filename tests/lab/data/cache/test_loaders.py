"""Cached pictures are the streamed ones."""

import pytest
import torch

from helpers import folder_config, hf_config, smooth_pictures
from lab.base.errors import RequestError
from lab.data.cache import loaders as cache_module
from lab.data.datasets import ReadErrors
from lab.data.images import Augmentation
from lab.data.loading import device_batches
from train_ast import build_dataloaders

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["folder", "hf"])
def test_resident_validation_is_the_streamed_one(kind, image_folder, parquet_folder):
    make = folder_config if kind == "folder" else hf_config
    source = image_folder if kind == "folder" else parquet_folder
    size = ["dataset.image_size=72"] if kind == "folder" else ["dataset.image_size=32"]
    smooth_pictures(image_folder)
    batches = {}
    for cache in ("none", "device"):
        config = make(
            source,
            *size,
            f"dataset.cache={cache}",
            "training.num_workers=0",
            "training.batch_size=4",
        )
        _, val, _, _ = build_dataloaders(config, CPU)
        batches[cache] = [batch.tensors() for batch in device_batches(val, CPU)]
    streamed, kept = (
        [torch.cat(part) for part in zip(*batches[cache], strict=True)]
        for cache in ("none", "device")
    )
    assert torch.equal(streamed[1], kept[1])
    assert len(kept[1]) == 9
    difference = (streamed[0].float() - kept[0].float()).abs().mean()
    assert difference == 0 if kind == "hf" else difference < 1.5  # centre crops: resized twice


@pytest.mark.parametrize(("size", "apart"), [(32, 0), (72, 4)])
def test_a_sample_looks_the_same_streamed_and_resident(size, apart, image_folder):
    smooth_pictures(image_folder)
    batches = {}
    for cache in ("none", "device"):
        keys = [
            f"dataset.image_size={size}",
            f"dataset.cache={cache}",
            "dataset.random_erasing=0.5",
        ]
        train, _, plan, _ = build_dataloaders(folder_config(image_folder, *keys), CPU)
        plan.epoch = 3
        batches[cache] = list(device_batches(train, CPU))
    for fresh, cached in zip(batches["none"], batches["device"], strict=True):
        assert torch.equal(fresh.labels, cached.labels)
        streamed = fresh.images
        kept = cached.images
        difference = (streamed.float() - kept.float()).abs().mean()
        assert difference <= apart  # crops of down to a few pixels, their edges rounded twice
        assert (streamed.float() - kept.float().flip(-1)).abs().mean() > 20


def test_what_is_erased_is_drawn_once_an_epoch(image_folder, monkeypatch):
    drawn = []
    draw = Augmentation.erasures
    monkeypatch.setattr(
        Augmentation,
        "erasures",
        lambda self, numbers: drawn.append(len(numbers)) or draw(self, numbers),
    )
    keys = ["dataset.cache=device", "dataset.random_erasing=0.5", "training.batch_size=4"]
    train, _, plan, _ = build_dataloaders(folder_config(image_folder, *keys), CPU)
    for epoch in (1, 2):
        drawn.clear()
        plan.start_epoch(epoch)
        assert len(list(device_batches(train, CPU))) == 6
        assert drawn == [24]


def test_resident_batches_follow_the_plan_and_depend_on_the_seed_and_epoch_alone(image_folder):
    def epoch(number, seed=0, *overrides):
        config = folder_config(
            image_folder, "dataset.cache=device", f"training.seed={seed}", *overrides
        )
        train, _, plan, _ = build_dataloaders(config, CPU)
        plan.epoch = number
        batches = [batch.tensors() for batch in device_batches(train, CPU)]
        images, labels, _ = (torch.cat(part) for part in zip(*batches, strict=True))
        return plan.indices_to_load().tolist(), images, labels

    order, images, labels = epoch(1)
    assert labels.tolist() == [index // 8 for index in order]  # eight pictures a class
    means = images.float().mean((2, 3))
    assert torch.equal(means.argmax(1), 2 - labels)  # blue, green, red
    again = epoch(1)
    assert torch.equal(again[1], images)
    for other in (epoch(2), epoch(1, seed=1)):
        positions = [other[0].index(index) for index in order]
        assert positions != list(range(len(order)))
        assert not torch.equal(other[1][positions], images)  # augmented anew, not only reordered
    by_index = dict(zip(order, images, strict=True))
    small = epoch(1, 0, "training.batch_size=4")
    assert all(
        torch.equal(by_index[index], image) for index, image in zip(small[0], small[1], strict=True)
    )
    limited = epoch(1, 0, "dataset.max_train_samples=8", "dataset.augment=none")
    kept = epoch(3, 5, "dataset.augment=none")
    for index, image, label in zip(*limited, strict=True):
        assert label == index // 8
        assert torch.equal(image, kept[1][kept[0].index(index)])


def test_a_cache_larger_than_memory_is_refused_before_anything_is_decoded(image_folder):
    size = ["dataset.augment=pad_crop", "dataset.image_size=300000"]
    config = folder_config(image_folder, "dataset.cache=device", *size)
    (image_folder / "train" / "red" / "0.jpg").write_bytes(
        b""
    )  # would be the error, if it came to that
    with pytest.raises(
        RequestError, match=r"dataset.cache: 33 squares of 300000 px need .* GiB free; set "
    ):
        build_dataloaders(config, CPU)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_of_a_cache_is_named(image_folder, workers):
    (image_folder / "train" / "red" / "3.jpg").write_bytes(b"no image")
    config = folder_config(image_folder, "dataset.cache=device", f"training.num_workers={workers}")
    with pytest.raises(RequestError, match=r"red/3.jpg: not a readable image"):
        build_dataloaders(config, CPU)


def test_shared_pictures_need_no_more_memory_and_keep_their_read_errors(image_folder, monkeypatch):
    """The second of two runs in one process, on a device that the first one's pictures have
    filled.
    """
    (image_folder / "train" / "red" / "3.jpg").write_bytes(b"no image")
    config = folder_config(
        image_folder, "dataset.cache=device", "dataset.max_bad_images=1", "training.num_workers=0"
    )
    monkeypatch.setattr(cache_module, "SHARED_PICTURES", {})
    first, *_ = build_dataloaders(config, CPU)
    monkeypatch.setattr(cache_module, "free_memory", lambda device: 0)
    second, *_ = build_dataloaders(config, CPU)
    assert second.flat is first.flat
    for loader in (first, second):
        errors = ReadErrors(1)
        list(device_batches(loader, CPU, errors))
        assert [text.partition(": ")[0] for text in errors.found] == [
            f"{image_folder}/train/red/3.jpg"
        ]
