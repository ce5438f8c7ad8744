"""Data sets: a picture and a label by index, and what could not be read."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lab.config import DatasetConfig
from lab.data.images import View, decode_image
from lab.data.randomness import DRAWS
from lab.errors import RequestError, one_line

EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # what says nothing about a picture


class Batch(NamedTuple):
    images: Tensor  # uint8 [batch, 3, H, W]
    labels: Tensor  # int64 [batch]
    unreadable: list[str]  # what could not be decoded, by name, with the reason; other samples stand in for it
    indices: Tensor  # int64 [batch], of the samples asked for


class BadImages:
    """The images that could not be read, each counted once, in the order they were met."""

    def __init__(self, limit: int):
        self.limit, self.found = limit, []

    def add(self, unreadable: Iterable[str]) -> None:
        """Raises RequestError naming the first image beyond `limit`."""
        known = {text.partition(": ")[0]: text for text in [*unreadable, *self.found]}  # reasons may change
        self.found += [text for name, text in known.items() if not any(t.startswith(f"{name}: ") for t in self.found)]
        if len(self.found) > self.limit:
            allowed = f"; dataset.max_bad_images={self.limit} allows no more" if self.limit else ""
            raise RequestError(f"dataset: {self.found[self.limit]}{allowed}")


class Sample(NamedTuple):
    image: Tensor | None  # uint8 [3, H, W]; None where nothing could be read
    label: int
    unreadable: list[str]  # what this one stands in for, by name, with the reason
    index: int  # as it was asked for


class ImageDataset(Dataset):
    """Item (index, draws) is a Sample of side `size`: the index's own or, where that cannot be read, a later one.

    `samples[index]` is (what holds the image: a path, bytes or a uint8 tensor [3, H, W]; label); `draws` are the
    random numbers of its augmentation, see `EpochPlan`.
    """

    def __init__(self, samples: Sequence[tuple[Path | bytes | Tensor, int]], classes: list[str]):
        self.samples, self.classes = samples, classes
        self.view: View | None = None  # what `build_datasets` adds
        self.stand_ins = 0  # and this: dataset.max_bad_images
        self.shifts: np.ndarray | None = None  # by how many classes `dataset.label_noise` moves each label
        self.origin = ""  # what a sample that is no file is named after

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[Path | bytes | Tensor, int]:
        return self.samples[index]

    def load(self, index: int) -> Sample:
        """The picture as it is, or the first readable one of the `stand_ins` after it. Beyond the last index it goes
        on with the first (`dataset.repeat`)."""
        unreadable = []
        for at in range(index, index + self.stand_ins + 1):
            at, source = at % len(self), None
            try:
                source, label = self.read(at)
                data = source.read_bytes() if isinstance(source, Path) else source
                image = data if isinstance(data, Tensor) else decode_image(data)
                return Sample(image, label, unreadable, index)
            except (OSError, ValueError) as error:
                if getattr(error, "errno", None) in EXHAUSTED:
                    raise
                name = source if isinstance(source, Path) else f"{self.origin}sample {at}"
                unreadable.append(f"{name}: {one_line(error)}")
        return Sample(None, -1, unreadable, index)

    def noisy(self, labels: Sequence[int], indices: Sequence[int]) -> np.ndarray:
        """The labels as `dataset.label_noise` has them, int64 [n], of the samples at `indices`."""
        labels = np.asarray(labels, dtype=np.int64)
        if self.shifts is None:
            return labels
        return (labels + self.shifts[np.asarray(indices) % len(self)]) % len(self.classes)

    def labels(self) -> Iterable[int]:
        return (label for _, label in self.samples)

    def fingerprint(self) -> str:
        """A hash of what tells this data from other: names of classes and files, labels."""
        digest = hashlib.sha256(json.dumps([len(self), self.classes]).encode())
        digest.update(np.fromiter(self.labels(), np.int64).tobytes())
        for source, _ in self.samples if isinstance(self.samples, list) else ():
            digest.update(source.name.encode() if isinstance(source, Path) else b"")
        return digest.hexdigest()

    def __getitem__(self, key: tuple[int, np.ndarray]) -> Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, np.ndarray]]) -> list[Sample]:
        """The items of `keys`, four at a time: boxes cost less drawn together, and pictures are cut while in cache."""
        samples: list[Sample] = []
        for start in range(0, len(keys), 4):
            chunk = keys[start : start + 4]
            loaded = [self.load(index) for index, _ in chunk]
            if self.shifts is not None:
                labels = self.noisy([sample.label for sample in loaded], [index for index, _ in chunk])
                loaded = [sample._replace(label=int(label)) for sample, label in zip(loaded, labels, strict=True)]
            good = [i for i, sample in enumerate(loaded) if sample.image is not None]
            draws = torch.from_numpy(np.stack([chunk[i][1] for i in good])) if good else torch.empty(0, DRAWS)
            for i, image in zip(good, self.view([loaded[i].image for i in good], draws), strict=True):
                loaded[i] = loaded[i]._replace(image=image)
            samples += loaded
        return samples


def collate(samples: list[Sample]) -> Batch:
    good = [sample for sample in samples if sample.image is not None]
    images = default_collate([sample.image for sample in good]) if good else torch.empty(0, dtype=torch.uint8)
    labels, indices = (torch.tensor([s[at] for s in good], dtype=torch.int64) for at in (1, 3))
    return Batch(images, labels, [bad for sample in samples for bad in sample.unreadable], indices)


def folder_dataset(key: str, folder: str, classes: list[str] | None = None) -> ImageDataset:
    """ImageFolder layout, <folder>/<class>/<image>. `classes` fixes the labels; None: the folder's own.

    Raises RequestError naming the config `key` where folders, classes or images are missing.
    """
    try:
        found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise RequestError(f"{key}: {folder}: {error.strerror}") from None
    classes = found if classes is None else classes
    if not found:
        raise RequestError(f"{key}: {folder}: no class folders in it; expected <folder>/<class>/<image>")
    if unknown := sorted(set(found) - set(classes)):
        raise RequestError(f"{key}: {folder}: class {unknown[0]!r} is not among the training classes")
    labels = {name: label for label, name in enumerate(classes)}
    extensions = torchvision.datasets.folder.IMG_EXTENSIONS
    samples = torchvision.datasets.folder.make_dataset(folder, labels, extensions, allow_empty=True)
    if not samples:
        raise RequestError(f"{key}: {folder}: no images in its class folders")
    return ImageDataset([(Path(path), label) for path, label in samples], classes)


def digits_dataset(part: Literal["train", "val"]) -> ImageDataset:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels (Alpaydin & Kaynak, UCI 1998): nothing to download.

    A fixed stratified fifth is for validation.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    grey = torch.from_numpy(np.round(pixels * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8).expand(-1, 3, -1, -1)
    chosen = parts[0 if part == "train" else 1]
    return ImageDataset([(grey[i], int(labels[i])) for i in chosen], [str(digit) for digit in range(10)])


def load_hub_split(config: DatasetConfig, key: Literal["split_train", "split_val"]) -> Any:
    import datasets

    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it has to say is in the one line
    name, split = config.name, getattr(config, key)
    if name.startswith((".", "/")) and not Path(name).exists():
        raise RequestError(f"dataset.name: {name}: no such folder")
    options = {"split": split, "revision": config.revision, "cache_dir": config.cache_dir}
    try:
        return datasets.load_dataset(name, config.subset, **options)
    except Exception as error:  # the library raises dozens of kinds, all of them about the request or the network
        why = f"{type(error).__name__}: {one_line(error)[:300]}"
        if isinstance(error, ValueError) and "split" in str(error).lower():
            raise RequestError(f"dataset.{key}: no split {split!r} in {name}: {why}") from None
        hint = "check the name, subset and revision, the network and HF_TOKEN in .env, or give a local folder"
        raise RequestError(f"dataset.name: cannot load {name!r} ({why}); {hint}") from None


def find_column(key: str, asked: str | None, features: Any, kind: type) -> str:
    usual = key.removesuffix("_key")
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    found = [asked] if asked is not None else found or [name for name in features if name == usual]
    if len(found) != 1 or found[0] not in features:
        problem = "cannot tell the column" if asked is None else f"no column {asked!r}"
        raise RequestError(f"dataset.{key}: {problem}; set it to one of {', '.join(features)}")
    return found[0]
