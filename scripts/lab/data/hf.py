"""Data sets of the `datasets` library: from the Hugging Face hub, or a local folder of tables."""

from __future__ import annotations

import contextlib
import logging
import re
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np
from pyarrow import parquet

from lab.base.errors import RequestError, one_line
from lab.base.hub import quick_hub
from lab.config.sections import DatasetConfig
from lab.config.together import complain, of_dataset
from lab.data.datasets import ImageDataset
from lab.data.folders import composed


def load_hub_split(config: DatasetConfig, key: Literal["split_train", "split_val"]) -> Any:
    """A split of a data set of the `datasets` library; `key` is the config key that names the
    split.

    Raises RequestError naming the config key where there is no such data set or split.
    """
    import datasets

    logging.getLogger("datasets").setLevel(
        logging.CRITICAL
    )  # its message becomes part of our one line
    name = config.name
    split = getattr(config, key)
    if name.startswith((".", "/")) and not Path(name).exists():
        raise RequestError(f"dataset.name: {name}: no such folder")
    options = {"split": split, "revision": config.revision}
    answers = True
    try:
        with contextlib.nullcontext(True) if Path(name).exists() else quick_hub() as answers:
            rows = datasets.load_dataset(name, config.subset, **options)
            del options["split"]
            return with_own_names(
                rows, datasets.load_dataset_builder(name, config.subset, **options)
            )
    except Exception as error:  # dozens of kinds, all of them about the request or the network
        why = f"{type(error).__name__}: {one_line(error)[:300]}"
        if isinstance(error, ValueError) and "split" in str(error).lower():
            raise RequestError(f"dataset.{key}: no split {split!r} in {name}: {why}") from None
        hint = (
            "check the name, subset and revision, the network and HF_TOKEN in .env, or give a "
            "local folder"
        )
        network = (
            ""
            if answers
            else (
                "the hub does not answer or HF_HUB_OFFLINE is set, and it was not downloaded "
                "before; "
            )
        )
        raise RequestError(f"dataset.name: cannot load {name!r} ({why}); {network}{hint}") from None


def with_own_names(rows: Any, builder: Any) -> Any:
    """A split of parquet files whose label columns have the class names of its own files.

    The `datasets` library gives every split the names of the first split, whatever their order in
    the others. The first file of a split is asked; a file on the hub that cannot be reached now is
    taken to have the same names.
    """
    import datasets

    files = (builder.config.data_files or {}).get(re.split(r"[^\w.]", str(rows.split))[0])
    if builder.name != "parquet" or not files:
        return rows
    try:
        with fsspec.open(files[0]) as file:
            own = datasets.Features.from_arrow_schema(parquet.read_schema(file))
    except Exception:  # of a network, in dozens of kinds; files on the disk have just been read
        return rows
    for column, feature in own.items():
        given = rows.features.get(column)
        if (
            isinstance(feature, datasets.ClassLabel)
            and isinstance(given, datasets.ClassLabel)
            and given != feature
        ):
            rows = rows.cast_column(column, feature)
    return rows


def find_column(key: str, asked: str | None, features: Any, kind: type) -> str:
    """The name of the image or label column: the one `asked` for, or else the only one whose
    feature is of `kind`.

    Without either, a column that is named like the config key without "_key". Raises RequestError
    naming the `key` where that leaves none or several.
    """
    usual = key.removesuffix("_key")
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    found = [asked] if asked is not None else found or [name for name in features if name == usual]
    if len(found) != 1 or found[0] not in features:
        problem = "cannot tell the column" if asked is None else f"no column {asked!r}"
        raise RequestError(f"dataset.{key}: {problem}; set it to one of {', '.join(features)}")
    return found[0]


MAX_CLASSES = (
    100_000  # in a column of integers; larger numbers are taken for the ids of something else
)


def read_classes(
    rows: Any, column: str, key: str, training: list[str] | None = None
) -> tuple[list[str], list[int]]:
    """(class names, the label of each number in a label column) of a split of the `datasets`
    library.

    The names are those of the column. A column of integers gets "0", "1" and so on. key: the config
    key that names the split, dataset.split_train or dataset.split_val. training: the class names of
    the training split, for validation. The names are then these. Numbers of a column with names get
    the label that the same name has in training, so that the order of the names does not matter.
    Numbers of a column without names are labels as they are.

    Raises RequestError naming dataset.label_key where the column holds no classes, and `key` where
    no sample has one or where a class is not among the training classes.
    """
    feature = rows.features[column]
    if not str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
        raise RequestError(
            f"dataset.label_key: column {column!r} holds no class labels or integers"
        )
    numbers = (
        rows.select_columns([column]).with_format("arrow")[:].column(column).drop_null().to_numpy()
    )
    names = getattr(feature, "names", None)
    largest = int(numbers.max()) if len(numbers) else -1
    if names is None and largest >= MAX_CLASSES:
        problem = (
            f"numbers up to {largest:,}, and there may be {MAX_CLASSES:,} classes, numbered from 0"
        )
        raise RequestError(f"dataset.label_key: column {column!r} holds {problem}")
    count = largest + 1 if names is None else len(names)
    if len(rows) and not ((numbers >= 0) & (numbers < count)).any():
        found = (
            f"all are {numbers[0]}"
            if len(np.unique(numbers)) == 1
            else "none of them is a class's number"
        )
        hint = "choose another split, or another dataset.label_key"
        raise RequestError(
            f"{key}: no sample of split {str(rows.split)!r} has a class in {column!r}, "
            f"{found}; {hint}"
        )
    if training is None:
        return names or [str(number) for number in range(count)], list(range(count))
    if names is None and count > len(training):
        raise RequestError(
            f"{key}: label {largest} in column {column!r}, and {len(training)} training classes"
        )
    known = {composed(name): number for number, name in enumerate(training)}
    if unknown := [name for name in names or () if composed(name) not in known]:
        raise RequestError(f"{key}: class {unknown[0]!r} is not among the training classes")
    return training, [known[composed(name)] for name in names] if names else list(range(count))


class HFDataset(ImageDataset):
    """A split of a Hugging Face dataset; its image and label columns are found from the features.

    key: split_train or split_val. classes: those of the training split, for validation; see
    `read_classes`.
    """

    @classmethod
    def check(cls, config: DatasetConfig) -> None:
        complain(of_dataset(config))

    @classmethod
    def splits(cls, config: DatasetConfig) -> tuple[HFDataset, HFDataset]:
        train = cls(load_hub_split(config, "split_train"), config, "split_train")
        return train, cls(load_hub_split(config, "split_val"), config, "split_val", train.classes)

    @classmethod
    def whole(cls, config: DatasetConfig) -> HFDataset:
        return cls(load_hub_split(config, "split_train"), config, "split_train")

    @classmethod
    def validation(cls, config: DatasetConfig) -> HFDataset:
        return cls(load_hub_split(config, "split_val"), config, "split_val")

    def __init__(
        self, rows: Any, config: DatasetConfig, key: str, classes: list[str] | None = None
    ):
        import datasets

        self.image_key = find_column("image_key", config.image_key, rows.features, datasets.Image)
        self.label_key = find_column(
            "label_key", config.label_key, rows.features, datasets.ClassLabel
        )
        classes, self.label_of = read_classes(rows, self.label_key, f"dataset.{key}", classes)
        if isinstance(rows.features[self.image_key], datasets.Image):
            rows = rows.cast_column(self.image_key, datasets.Image(decode=False))  # left as bytes
        super().__init__(rows.select_columns([self.image_key, self.label_key]), classes)
        self.name_prefix = f"{config.name} [{rows.split}] "

    def _samples_at(self, indices: list[int]) -> Any:
        return self.samples.select(indices)

    def labels(self) -> np.ndarray:
        known = dict(enumerate(self.label_of))
        numbers = self.samples[self.label_key]
        return np.fromiter((known.get(number, -1) for number in numbers), np.int64, len(self))

    def read(self, index: int) -> tuple[Path | bytes, int]:
        row = self.samples[index]
        image = row[self.image_key]
        number = row[self.label_key]
        if not isinstance(number, int) or not 0 <= number < len(self.label_of):
            raise ValueError(f"label {number!r} is no class")
        if not isinstance(image, dict) or not (image.get("bytes") or image.get("path")):
            raise ValueError(f"no image in column {self.image_key!r}")
        return image.get("bytes") or Path(image["path"]), self.label_of[number]
