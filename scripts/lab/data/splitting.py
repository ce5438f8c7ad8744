"""`dataset.val_fraction`: a validation set out of the training pictures."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from torch import Tensor

from lab.base.errors import RequestError, one_line
from lab.config.sections import DatasetConfig
from lab.data.datasets import ImageDataset
from lab.data.folders import read_picture

KEY = b"0"  # of the hash that puts pictures in order: another one makes another split
THREADS = 8  # that read files


def both_parts(
    kind: type[ImageDataset], config: DatasetConfig
) -> tuple[ImageDataset, ImageDataset]:
    """(training, validation) of a kind of data set. Raises RequestError naming the key where data
    is missing.
    """
    whole = None if config.val_fraction is None else kind.whole(config)
    return kind.splits(config) if whole is None else split_off(whole, config.val_fraction)


def validation_part(kind: type[ImageDataset], config: DatasetConfig) -> ImageDataset:
    """The validation set alone; the training set need not be there, unless it is split off it."""
    if config.val_fraction is None:
        return kind.validation(config)
    return both_parts(kind, config)[1]


def split_off(dataset: ImageDataset, fraction: float) -> tuple[ImageDataset, ImageDataset]:
    """(training, validation): a `fraction` of each class, at least one picture, is for validation.

    Which pictures depends on their bytes alone, neither on a seed nor on their names and order: it
    is the same in every run of a study and wherever the pictures lie. Every picture is read once.
    Equal pictures stay on one side, those of several classes in training. Raises RequestError
    naming dataset.val_fraction where a class has too few pictures for both sides.
    """
    labels = dataset.labels()
    hashes = digests(dataset)
    chosen = np.zeros(len(dataset), dtype=bool)
    for label, groups in _groups(labels, hashes).items():
        samples = int((labels == label).sum())
        rows = _chosen(groups, fraction, samples)
        if not rows:
            raise RequestError(_too_few(dataset.classes[label], samples))
        chosen[rows] = True
    train = dataset.part(np.flatnonzero(~chosen))
    val = dataset.part(np.flatnonzero(chosen))
    own = [hashes[index] for index in np.flatnonzero(chosen)]
    val.split = {"pictures": len(val), "digest": fingerprint(own, labels[chosen])}
    return train, val


def repeated(dataset: ImageDataset, indices: np.ndarray, repeat: int | str) -> np.ndarray:
    """The samples int64 [n] as often as `dataset.repeat` says; copy c of sample i is
    i + c * len(dataset). balanced: each class as often as the largest, by whole copies and a random
    part of one.
    """
    if isinstance(repeat, int):
        return np.concatenate([indices + copy * len(dataset) for copy in range(repeat)])
    labels = dataset.labels()[indices]
    counts = np.bincount(labels[labels >= 0])
    generator = np.random.default_rng(0)
    parts = [indices]
    for label in np.flatnonzero(counts):
        own = generator.permutation(indices[labels == label])
        places = np.arange(len(own), counts.max())
        parts.append(own[places % len(own)] + places // len(own) * len(dataset))
    return np.sort(np.concatenate(parts))  # as a cache expects


def digests(dataset: ImageDataset) -> list[bytes]:
    """A keyed hash of each picture's bytes; of its name, where it cannot be read."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda index: _digest(dataset, index), range(len(dataset))))


def _digest(dataset: ImageDataset, index: int) -> bytes:
    try:
        source, _ = dataset.read(index)
        data = read_picture(source) if isinstance(source, Path) else source
    except (OSError, ValueError):  # loading it will tell
        data = os.fsencode(dataset.name_of(index))
    data = data.numpy().tobytes() if isinstance(data, Tensor) else data
    return hashlib.blake2b(data, key=KEY, digest_size=16).digest()


def _groups(labels: np.ndarray, hashes: Sequence[bytes]) -> dict[int, list[list[int]]]:
    """By class, its groups of equal pictures in the order of their hashes; without those that other
    classes have too, and without samples of no class.
    """
    alike = defaultdict(list)
    for index, digest in enumerate(hashes):
        alike[digest].append(index)
    found: dict[int, list[list[int]]] = {int(label): [] for label in np.unique(labels[labels >= 0])}
    for _, rows in sorted(alike.items()):
        if labels[rows[0]] >= 0 and len(set(labels[rows])) == 1:
            found[int(labels[rows[0]])].append(rows)
    return found


def _chosen(groups: Sequence[Sequence[int]], fraction: float, samples: int) -> list[int]:
    """The rows of a class for validation: whole groups, as many as fit into the fraction of its
    samples; none where a side would be empty.
    """
    wanted = min(max(1, round(fraction * samples)), samples - 1)
    rows: list[int] = []
    for group in groups:
        if len(rows) + len(group) <= wanted:
            rows += group
    smallest: Iterable[int] = min(groups, key=len, default=())
    return rows or list(smallest) * (len(smallest) < samples)


def _too_few(name: str, count: int) -> str:
    why = "1 picture" if count == 1 else f"{count:,} pictures, all alike or in other classes too"
    return f"dataset.val_fraction: class {one_line(repr(name), 80)} has {why}; a split needs two"


def fingerprint(hashes: Sequence[bytes], labels: np.ndarray) -> str:
    """A hash of what is in a set, whatever the names and the order of its pictures."""
    rows = sorted(f"{each.hex()} {label}" for each, label in zip(hashes, labels, strict=True))
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]
