"""The points of a sweep: which overrides each of its runs gets."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path

from lab.base.errors import RequestError, one_line
from lab.config.loading import config_keys, load_config


def is_override(text: str) -> bool:
    """Whether an argument is key=value, and not a file with such a name."""
    return "=" in text and not Path(text).exists()


def as_overrides(flags: Mapping[str, str | None], overrides: Sequence[str]) -> list[str]:
    """Flags that are short for a key, as overrides; None: not given.

    Raises RequestError where one of the `overrides` gives its key another value.
    """
    given = {override.partition("=")[0]: override for override in overrides}
    found = [f"{key}={value}" for key, value in flags.items() if value is not None]
    for text in found:
        other = given.get(text.partition("=")[0], text)
        if other != text:
            raise RequestError(f"override {one_line(repr(other), 200)}: a flag says {text}")
    return found


def parse_grid(texts: Sequence[str]) -> list[list[str]]:
    """["a.b=1,2", "c.d=x"] becomes [["a.b=1", "a.b=2"], ["c.d=x"]].

    Raises RequestError for a key that is unknown, given twice or without values. Keys of `logging`
    are refused: they do not tell one run from another.
    """
    axes = [(key, values.split(",")) for key, _, values in (text.partition("=") for text in texts)]
    for key, values in axes:
        if not all(values):
            raise RequestError(f"--grid {key}: expected key=value,value...")
        check_keys([f"{key}={values[0]}"])
        if key.startswith("logging."):
            raise RequestError(
                f"--grid {key}: does not make a run another; every run is logged under its own name"
            )
        if [other for other, _ in axes].count(key) > 1:
            raise RequestError(f"--grid {key}: given twice")
    return [[f"{key}={value}" for value in values] for key, values in axes]


def check_keys(overrides: Iterable[str]) -> None:
    """Raises RequestError, with the nearest known key, for an override that is malformed or of an
    unknown key.
    """
    for override in overrides:
        if override.partition("=")[0] not in config_keys():
            load_config(None, [override])


def cross(
    grid: Sequence[str], variants: Sequence[str], seeds: Sequence[str], common: Sequence[str] = ()
) -> list[tuple[str, ...]]:
    """Every variant crossed with every point of the grid and every seed, as the overrides of each.

    common: the overrides of all runs, which variants may replace. Raises RequestError for a wrong
    override, naming it, and for a key with values from two sides.
    """
    axes = parse_grid(grid)
    if bad := next((seed for seed in seeds if not re.fullmatch("[0-9]+", seed)), None):
        raise RequestError(f"--seeds: expected whole numbers, got {bad!r}")
    if seeds:
        if any(axis[0].startswith("training.seed=") for axis in axes):
            raise RequestError("--seeds: training.seed is in --grid too")
        axes.append([f"training.seed={seed}" for seed in seeds])
    split = [split_variant(text) for text in variants] or [[]]
    check_keys(override for variant in split for override in variant)
    for axis in axes:
        _require_one_side(axis[0].partition("=")[0], common, split, seeds)
    return [(*variant, *point) for variant, point in product(split, product(*axes))]


def _require_one_side(
    key: str, common: Sequence[str], variants: Sequence[Sequence[str]], seeds: Sequence[str]
) -> None:
    """Raises RequestError where `key`, of the grid or of --seeds, is set elsewhere too."""
    option = "--seeds" if seeds and key == "training.seed" else f"--grid {key}"
    for override in common:
        if override.partition("=")[0] == key:
            raise RequestError(f"{option}: override {override!r} sets {key} too; leave out one")
    for variant in variants:
        for override in variant:
            if override.partition("=")[0] == key:
                raise RequestError(f"{option}: --variants set {key} too; leave out one")


def split_variant(text: str) -> list[str]:
    """The overrides of a variant. Quotes hold a value with spaces together; all else is taken as it
    is written.
    """
    words = shlex.shlex(text, posix=True)
    words.whitespace_split = True
    words.commenters = ""
    words.escape = ""
    try:
        return list(words)
    except ValueError as error:
        raise RequestError(f"--variants {text!r}: {one_line(error)}") from None
