"""Data sets of a CSV file: a picture's file and its label in each row."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lab.base.errors import RequestError, one_line
from lab.config.sections import DatasetConfig
from lab.config.together import complain, of_dataset
from lab.data.datasets import ImageDataset
from lab.data.folders import composed

if TYPE_CHECKING:
    import pandas as pd

SPLIT = "split"  # the column that says to which part a row belongs
VALIDATION = ("validation", "val", "valid")  # names of one split
KNOWN = ("train", VALIDATION[0], "test")  # splits that a file may have and a run need not use


class CSVDataset(ImageDataset):
    """The rows of the file `dataset.name`."""

    @classmethod
    def check(cls, config: DatasetConfig) -> None:
        complain(of_dataset(config))

    @classmethod
    def splits(cls, config: DatasetConfig) -> tuple[ImageDataset, ImageDataset]:
        table = read_table(config)
        if SPLIT not in table:
            raise _refused(config, f"no column {SPLIT!r}; add it, or set dataset.val_fraction")
        train = cls.of(rows_of_split(table, config, "split_train"))
        val = rows_of_split(table, config, "split_val")
        if unknown := sorted(set(val["label"]) - set(train.classes)):
            raise RequestError(
                f"dataset.split_val: class {one_line(repr(unknown[0]), 80)} is not among the "
                f"training classes"
            )
        return train, cls.of(val, train.classes)

    @classmethod
    def whole(cls, config: DatasetConfig) -> ImageDataset:
        table = read_table(config)
        if SPLIT in table:
            raise RequestError(
                f"dataset.val_fraction: {config.name} has a column {SPLIT!r}; leave out one"
            )
        return cls.of(table)

    @classmethod
    def validation(cls, config: DatasetConfig) -> ImageDataset:
        """Without a column of splits all rows."""
        table = read_table(config)
        return cls.of(rows_of_split(table, config, "split_val") if SPLIT in table else table)

    @classmethod
    def of(cls, table: pd.DataFrame, classes: list[str] | None = None) -> CSVDataset:
        """The rows of `read_table`. classes: None takes those of the rows, sorted."""
        classes = sorted(set(table["label"])) if classes is None else classes
        numbers = {name: number for number, name in enumerate(classes)}
        pairs = zip(table["file"], table["label"], strict=True)
        return cls([(Path(file), numbers[label]) for file, label in pairs], classes)


def read_table(config: DatasetConfig) -> pd.DataFrame:
    """The rows of `dataset.name` as text: file (as it is found from here), label, and split where
    there is such a column. The first row is row 2, as an editor counts.

    Raises RequestError naming the file and the row that cannot be used.
    """
    import pandas as pd

    options = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
    try:
        table = pd.read_csv(config.name, skip_blank_lines=False, **options)
    except UnicodeDecodeError as error:
        why = f"byte {error.object[error.start]:#04x} is not UTF-8; save the file in that encoding"
        raise _refused(config, why) from None
    except OSError as error:
        raise _refused(config, error.strerror or one_line(error)) from None
    except (ValueError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise _refused(config, one_line(error)[:200]) from None
    names = {config.image_key or "file": "file", config.label_key or "label": "label"}
    if missing := [name for name in names if name not in table]:
        found = one_line(", ".join(map(repr, table.columns)), 120)
        raise _refused(config, f"no column {missing[0]!r}; its columns are {found}")
    others = [name for name in ("file", "label") if name not in names]  # another column is used
    table = table.drop(columns=others, errors="ignore")
    table = table.rename(columns=names).fillna("")  # a row may end early
    table.index += 2
    return _checked(table[(table != "").any(axis=1)].copy(), config)  # without blank lines


def _checked(table: pd.DataFrame, config: DatasetConfig) -> pd.DataFrame:
    """Raises RequestError naming the first row with an empty cell, a file that another row has, an
    unknown split, or more missing files than dataset.max_bad_images allows.
    """
    if not len(table):
        raise _refused(config, "no rows in it")
    for column in [name for name in ("file", "label", SPLIT) if name in table]:
        table[column] = table[column].str.strip().map(composed if column == "label" else str)
        empty = table.index[table[column] == ""]
        if len(empty):
            raise _refused(config, f"row {empty[0]} has no {column}")
    folder = os.path.dirname(config.name)
    table["file"] = [os.path.normpath(os.path.join(folder, file)) for file in table["file"]]
    doubled = table[table["file"].duplicated()]
    if len(doubled):
        file = doubled["file"].iloc[0]
        first = table.index[table["file"] == file][0]
        raise _refused(
            config, f"row {doubled.index[0]}: {one_line(file)} is in row {first} already"
        )
    missing = [row for row, file in table["file"].items() if not os.path.exists(file)]
    if len(missing) > config.max_bad_images:
        more = f" (and {len(missing) - 1:,} more)" if len(missing) > 1 else ""
        file = one_line(table["file"][missing[0]])
        raise _refused(config, f"row {missing[0]}: {file}: no such file{more}")
    if SPLIT in table:
        _check_splits(table, config)
    return table


def _check_splits(table: pd.DataFrame, config: DatasetConfig) -> None:
    known = {*KNOWN, _known_as(config.split_train), _known_as(config.split_val)}
    table[SPLIT] = table[SPLIT].map(_known_as)
    unknown = table[~table[SPLIT].isin(known)]
    if len(unknown):
        name = one_line(repr(unknown[SPLIT].iloc[0]), 60)
        raise _refused(
            config,
            f"row {unknown.index[0]}: unknown split {name}; known: {', '.join(sorted(known))}",
        )


def _known_as(split: str) -> str:
    return VALIDATION[0] if split in VALIDATION else split


def rows_of_split(table: pd.DataFrame, config: DatasetConfig, key: str) -> pd.DataFrame:
    """Raises RequestError naming the config key of the split where it has no rows."""
    name = getattr(config, key)
    rows = table[table[SPLIT] == _known_as(name)]
    if not len(rows):
        there = ", ".join(sorted(set(table[SPLIT])))
        raise RequestError(f"dataset.{key}: no split {name!r} in {config.name}, which has {there}")
    return rows


def _refused(config: DatasetConfig, why: str) -> RequestError:
    return RequestError(f"dataset.name: {one_line(config.name)}: {why}")
