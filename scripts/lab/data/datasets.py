"""Data sets: a picture and a label by index, and what could not be read.

A loader asks a data set for samples and collates them to batches. Pictures come from a folder, from
scikit-learn's digits or from the `datasets` library (`lab.data.hf`).
"""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS

from lab.base.console import print_rank0
from lab.base.errors import RequestError, one_line
from lab.config.sections import DatasetConfig
from lab.config.together import complain, of_dataset
from lab.data.folders import composed, read_picture, scan_folder
from lab.data.images import Augmentation, decode_image
from lab.data.randomness import label_shifts
from lab.machine.workers import note_place

EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # what says nothing about a picture


class Sample(NamedTuple):
    """One item of an ImageDataset.

    An unreadable picture is replaced by the next readable one, with the label and the index of that
    one: what is learned of it says nothing of the unreadable one.
    """

    image: Tensor | None  # uint8 [3, H, W]; None where no replacement could be read either
    label: int
    index: int  # beyond the last sample for a copy, see `ImageDataset`
    unreadable: list[str]  # the pictures that it replaces: "<name>: <reason>"


class LoaderBatch(NamedTuple):
    """What a loader yields: a batch of samples, and what could not be read on the way to it."""

    images: Tensor  # uint8 [batch, 3, H, W]
    labels: Tensor  # int64 [batch]
    indices: Tensor  # int64 [batch]
    unreadable: list[str]  # of all its samples


def collate(samples: list[Sample]) -> LoaderBatch:
    """Samples as one batch, without those that have no image."""
    good = [sample for sample in samples if sample.image is not None]
    images = (
        default_collate([sample.image for sample in good])
        if good
        else torch.empty(0, dtype=torch.uint8)
    )
    labels = torch.tensor([sample.label for sample in good], dtype=torch.int64)
    indices = torch.tensor([sample.index for sample in good], dtype=torch.int64)
    return LoaderBatch(
        images, labels, indices, [text for sample in samples for text in sample.unreadable]
    )


class ReadErrors:
    """The pictures that could not be read, "<name>: <reason>", each once, in the order they were
    met.
    """

    def __init__(self, limit: int):
        """limit: how many are allowed, `dataset.max_bad_images`."""
        self.limit = limit
        self.found = []

    def add(self, unreadable: Iterable[str]) -> None:
        """Take in what is new. Raises RequestError naming the first picture beyond `limit`."""
        reasons = {
            text.partition(": ")[0]: text for text in [*unreadable, *self.found]
        }  # those found keep theirs
        known = {text.partition(": ")[0] for text in self.found}
        self.found += [text for name, text in reasons.items() if name not in known]
        if len(self.found) > self.limit:
            allowed = f"; dataset.max_bad_images={self.limit} allows no more" if self.limit else ""
            raise RequestError(f"dataset: {self.found[self.limit]}{allowed}")


class ImageDataset(Dataset):
    """Pictures with labels. The item at (index, uniforms) is a Sample whose image is augmented.

    An item's index may lie beyond the last sample: with `dataset.repeat` the samples come several
    times, and copy c of sample i has the index i + c * len(self). The uniforms, float64
    [UNIFORMS_PER_SAMPLE], decide the augmentation; a training epoch takes them from
    `loading.EpochPlan`.

    `build_datasets` sets the attributes that depend on the config.
    """

    IN_MEMORY: ClassVar[bool] = False  # whether loading takes so little that no worker is worth it

    @classmethod
    def check(cls, config: DatasetConfig) -> None:
        """Raises ValueError naming the key where the config lacks what this data set needs."""

    @classmethod
    def splits(cls, config: DatasetConfig) -> tuple[ImageDataset, ImageDataset]:
        """(training, validation). Raises RequestError naming the key where data is missing."""
        raise NotImplementedError

    @classmethod
    def whole(cls, config: DatasetConfig) -> ImageDataset | None:
        """All pictures, where `dataset.val_fraction` is to split them; None for a kind that has two
        parts of its own. Raises RequestError likewise.
        """

    @classmethod
    def validation(cls, config: DatasetConfig) -> ImageDataset:
        """The validation set with the classes that it has itself; the training set need not be
        there.
        """
        return cls.splits(config)[1]

    def __init__(self, samples: Sequence[tuple[Path | bytes | Tensor, int]], classes: list[str]):
        """samples: (a file's path, its bytes or a uint8 tensor [3, H, W]; label). classes: the name
        of each label.
        """
        self.samples = samples
        self.classes = classes
        self.augmentation: Augmentation | None = None
        # how many samples after an unreadable one are tried in its place; 0: none stands in for it
        self.max_bad_images = 0
        self.label_shifts: np.ndarray | None = (
            None  # int64 [samples], see `randomness.label_shifts`
        )
        self.name_prefix = ""  # before "sample <index>", the name of a sample that is no file
        self.skipped: dict[
            str, int
        ] = {}  # how many files and folders are no part of it, by the reason why
        # of a part of another set: int64 [samples], their numbers there
        self.numbers: np.ndarray | None = None
        self.split: dict[str, Any] | None = None  # what `dataset.val_fraction` made, for results

    def __len__(self) -> int:
        return len(self.samples)

    def part(self, indices: np.ndarray) -> ImageDataset:
        """The samples at `indices`, int64, as a set of their own with the same classes."""
        part = copy.copy(self)
        part.samples = self._samples_at(indices.tolist())
        part.numbers = indices
        return part

    def _samples_at(self, indices: list[int]) -> Any:
        return [self.samples[index] for index in indices]

    def read(self, index: int) -> tuple[Path | bytes | Tensor, int]:
        """The picture of a sample, not yet decoded, and its label. Raises ValueError where the
        sample has none.
        """
        return self.samples[index]

    def load(self, index: int) -> Sample:
        """The sample at `index` decoded, not augmented, or the first readable one after it.

        `max_bad_images` of them are tried. The first sample follows the last one.
        """
        unreadable = []
        for own in self._tried(index):
            at = own % len(self)
            source = None
            note_place(self.name_of, at)
            try:
                source, label = self.read(at)
                data = read_picture(source) if isinstance(source, Path) else source
                image = data if isinstance(data, Tensor) else decode_image(data)
                return Sample(image, label, own, unreadable)
            except (OSError, ValueError) as error:
                if getattr(error, "errno", None) in EXHAUSTED:
                    raise
                name = self._named(source, at)
                name = name if name.isprintable() else one_line(name)
                unreadable.append(f"{name}: {one_line(error)}")
        return Sample(None, -1, index, unreadable)

    def _tried(self, index: int) -> Iterator[int]:
        """A sample and those that may stand in for it, in that order; of a copy, the copies."""
        first = index - index % len(self)
        for at in range(index, index + self.max_bad_images + 1):
            yield first + at % len(self)

    def name_of(self, index: int) -> str:
        """The path of a sample's file, or its number in the data set where it is no file."""
        at = index % len(self)
        return self._named(self.samples[at][0] if isinstance(self.samples, list) else None, at)

    def _named(self, source: Any, at: int) -> str:
        if isinstance(source, Path):
            return str(source)
        number = at if self.numbers is None else self.numbers[at]
        return f"{self.name_prefix}sample {number}"

    def noisy_labels(self, labels: Sequence[int], indices: Sequence[int]) -> np.ndarray:
        """The labels of the samples at `indices` after `dataset.label_noise`, int64 [n]."""
        labels = np.asarray(labels, dtype=np.int64)
        if self.label_shifts is None:
            return labels
        return (labels + self.label_shifts[np.asarray(indices) % len(self)]) % len(self.classes)

    def mislabel(self, share: float, seed: int) -> None:
        """Give a `share` of the samples another class from now on, as `dataset.label_noise` does
        with `training.seed`.
        """
        self.label_shifts = label_shifts(len(self), len(self.classes), share, seed)

    def labels(self) -> np.ndarray:
        """The label of every sample, int64 [n], without noise; -1 for one that is no class."""
        return np.fromiter((label for _, label in self.samples), np.int64, len(self))

    def fingerprint(self) -> str:
        """SHA-256 over the class names, the labels and the names of the files: processes compare
        their data by it.
        """
        digest = hashlib.sha256(json.dumps([len(self), self.classes]).encode())
        digest.update(self.labels().tobytes())
        for source, _ in self.samples if isinstance(self.samples, list) else ():
            digest.update(os.fsencode(source.name) if isinstance(source, Path) else b"")
        return digest.hexdigest()

    def content(self) -> str:
        """A hash that tells by cheap signs whether pictures and labels are the same: place, size
        and time of each file, or the fingerprint that the `datasets` library gives. However the
        folder is spelt, its files have one place.
        """
        if not isinstance(self.samples, list):
            return self.samples._fingerprint
        digest = hashlib.sha256()
        real = functools.cache(os.path.realpath)
        for source, label in self.samples:
            if isinstance(source, Path):
                with contextlib.suppress(OSError):  # a broken link, say: reading it will tell
                    facts = source.stat()
                    digest.update(f"{facts.st_size} {facts.st_mtime_ns} ".encode())
                digest.update(os.fsencode(os.path.join(real(source.parent), source.name)))
            else:
                digest.update(source.numpy().tobytes() if isinstance(source, Tensor) else source)
            digest.update(f"\0{label}\0".encode())
        return digest.hexdigest()

    def __getitem__(self, key: tuple[int, np.ndarray]) -> Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, np.ndarray]]) -> list[Sample]:
        """The samples of several keys; a DataLoader asks for a batch at a time.

        Four are worked on together. Their boxes cost less than one by one, and four pictures still
        fit into the processor's cache.
        """
        return [
            sample
            for start in range(0, len(keys), 4)
            for sample in self._augmented(keys[start : start + 4])
        ]

    def _augmented(self, keys: Sequence[tuple[int, np.ndarray]]) -> list[Sample]:
        samples = [self.load(index) for index, _ in keys]
        if self.label_shifts is not None:
            labels = self.noisy_labels(
                [sample.label for sample in samples], [sample.index for sample in samples]
            )
            samples = [
                sample._replace(label=int(label))
                for sample, label in zip(samples, labels, strict=True)
            ]
        good = [i for i, sample in enumerate(samples) if sample.image is not None]
        if good:
            uniforms = torch.from_numpy(np.stack([keys[i][1] for i in good]))
            images = self.augmentation([samples[i].image for i in good], uniforms)
            for i, image in zip(good, images, strict=True):
                samples[i] = samples[i]._replace(image=image)
        return samples


MEASURED = 2000  # pictures that `measure_moments` looks at: enough for means to some 0.005


def measure_moments(dataset: ImageDataset, indices: np.ndarray) -> dict[str, tuple[float, ...]]:
    """By `mean` and `std`, those of the red, green and blue pixels, 0 to 1, of the pictures at
    `indices`, int64 [n].

    Of more than MEASURED pictures a random part is measured, the same in every run. Each picture
    counts alike, whatever its size. Rounded, so that every machine gets the same. Raises
    RequestError where none can be read, or where all pixels are alike.
    """
    sums = []
    for index in np.random.default_rng(0).permutation(np.unique(indices % len(dataset)))[:MEASURED]:
        sample = dataset.load(int(index))
        if sample.image is not None:
            pixels = sample.image.double() / 255
            sums.append(torch.stack([pixels.mean((1, 2)), pixels.square().mean((1, 2))]))
    mean, square = torch.stack(sums).mean(0) if sums else torch.zeros(2, 3)
    std = (square - mean**2).clamp(min=0).sqrt()
    if not (std > 0.001).all():
        raise RequestError(
            "dataset.normalise: measured: no picture can be read, or all of its pixels are alike"
        )
    return {
        name: tuple(round(value, 4) for value in each.tolist())
        for name, each in (("mean", mean), ("std", std))
    }


def folder_dataset(key: str, folder: str, classes: list[str] | None = None) -> ImageDataset:
    """The pictures of a folder, <folder>/<class>/<image>; `folders.scan_folder` has the rules.

    classes: the class names in the order of their labels; None takes those of the folder, sorted.
    With them, a class may lack its folder, and a line says so. Another says what was skipped, and
    the data set's `skipped` counts it.

    Raises RequestError naming the config `key` where a folder cannot be read, is none of `classes`
    or holds no picture.
    """
    try:
        pictures, skipped, joined = scan_folder(folder)
    except OSError as error:
        raise RequestError(
            f"{key}: {one_line(error.filename or folder)}: {error.strerror}"
        ) from None
    if not pictures:
        raise RequestError(
            f"{key}: {folder}: no class folders in it; expected <folder>/<class>/<image>"
        )
    classes = list(pictures) if classes is None else [composed(name) for name in classes]
    if unknown := sorted(set(pictures) - set(classes)):
        raise RequestError(
            f"{key}: {folder}: class {unknown[0]!r} is not among the training classes"
        )
    if empty := [name for name, paths in pictures.items() if not paths]:
        more = f" and in {len(empty) - 1} more" if len(empty) > 1 else ""
        endings = f"their names end in {', '.join(IMG_EXTENSIONS)}"
        raise RequestError(
            f"{key}: {folder}: no images in class folder {empty[0]!r}{more}; {endings}"
        )
    if absent := [name for name in classes if name not in pictures]:
        print_rank0(
            f"note: {key}: {folder}: no folder for {len(absent)} of {len(classes)} "
            f"classes, as {absent[0]!r}"
        )
    if joined:
        names = one_line(", ".join(joined), 100)
        print_rank0(f"note: {key}: {folder}: folders whose names look alike are one class: {names}")
    if skipped:
        print_rank0(f"{key}: skipped: {skipped}")
    labels = {name: label for label, name in enumerate(classes)}
    dataset = ImageDataset(
        [(path, labels[name]) for name, paths in pictures.items() for path in paths], classes
    )
    dataset.skipped = dict(skipped)
    return dataset


def digits_dataset(part: Literal["train", "val"]) -> ImageDataset:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels (Alpaydin & Kaynak, UCI 1998), which
    need no download.

    A fifth of them, the same in every run and stratified by class, is for validation.
    """
    return DigitsDataset(list(_digits()[part]), [str(digit) for digit in range(10)])


@functools.cache
def _digits() -> dict[str, list[tuple[Tensor, int]]]:
    """The samples of both parts, read once."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    grey = (
        torch.from_numpy(np.round(pixels * (255 / 16)).astype(np.uint8))
        .view(-1, 1, 8, 8)
        .expand(-1, 3, -1, -1)
    )
    return {
        name: [(grey[i], int(labels[i])) for i in chosen]
        for name, chosen in zip(("train", "val"), parts, strict=True)
    }


class DigitsDataset(ImageDataset):
    """`digits_dataset`, both parts."""

    IN_MEMORY = True

    @classmethod
    def splits(cls, config: DatasetConfig) -> tuple[ImageDataset, ImageDataset]:
        return digits_dataset("train"), digits_dataset("val")

    @classmethod
    def validation(cls, config: DatasetConfig) -> ImageDataset:
        return digits_dataset("val")


# folders whose names say that they are parts of a data set, and no classes
PARTS = {"train", "training", "val", "valid", "validation", "test"}


class FolderDataset(ImageDataset):
    """`folder_dataset`, both parts, or one folder that is to be split."""

    @classmethod
    def check(cls, config: DatasetConfig) -> None:
        complain(of_dataset(config))

    @classmethod
    def splits(cls, config: DatasetConfig) -> tuple[ImageDataset, ImageDataset]:
        train = folder_dataset("dataset.train_dir", config.train_dir)
        return train, folder_dataset("dataset.val_dir", config.val_dir, train.classes)

    @classmethod
    def whole(cls, config: DatasetConfig) -> ImageDataset:
        folder = config.train_dir
        whole = folder_dataset("dataset.train_dir", folder)
        if {name.lower() for name in whole.classes} <= PARTS:
            raise RequestError(
                f"dataset.val_fraction: {folder} holds {' and '.join(whole.classes)}, which are no "
                f"classes; set dataset.train_dir={folder}/{whole.classes[0]}, or give "
                f"dataset.val_dir with dataset.val_fraction=null"
            )
        return whole

    @classmethod
    def validation(cls, config: DatasetConfig) -> ImageDataset:
        return folder_dataset("dataset.val_dir", config.val_dir)
