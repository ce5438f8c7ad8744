"""The points of a sweep: which overrides each of its runs gets."""

from __future__ import annotations

import argparse
import math
import random
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path

from lab.base.errors import RequestError, one_line
from lab.config.loading import config_keys, load_config, takes_whole_numbers


def is_override(text: str) -> bool:
    """Whether an argument is key=value, and not a file with such a name."""
    return "=" in text and not Path(text).exists()


def take_overrides(args: argparse.Namespace, *names: str) -> None:
    """Move the key=value that options of several values took to `args.overrides`: in `--configs
    a.yaml training.lr=1` the option takes the override too.
    """
    for name in names:
        values = getattr(args, name) or []
        args.overrides += [value for value in values if is_override(value)]
        setattr(args, name, [value for value in values if not is_override(value)])


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


DRAW = re.compile(r"(log|uniform|choice)\((.*)\)")


def parse_draws(texts: Sequence[str]) -> dict[str, Callable[[random.Random], str]]:
    """["training.lr=log(1e-4,1e-1)", "model.name=choice(a,b)"]: by key, what draws a value of it as
    text.

    log: uniform in the logarithm; uniform; both between two numbers, and whole ones for a key of
    whole numbers; choice: one of the values. Raises RequestError for a key that is unknown or given
    twice, and for anything else than these.
    """
    draws: dict[str, Callable[[random.Random], str]] = {}
    for text in texts:
        key, _, spec = text.partition("=")
        found = DRAW.fullmatch(spec)
        values = [value.strip() for value in found[2].split(",")] if found else []
        if not found or not all(values):
            raise RequestError(
                f"--random {one_line(text, 80)}: expected key=log(A,B), uniform(A,B) or "
                f"choice(A,B,..)"
            )
        check_keys([f"{key}={values[0]}"])
        if key in draws:
            raise RequestError(f"--random {key}: given twice")
        if key.startswith("logging."):
            raise RequestError(f"--random {key}: does not make a run another")
        if found[1] == "choice":
            draws[key] = partial(_choose, values)
        else:
            draws[key] = partial(_draw, found[1], *_bounds(key, found[1], values))
    return draws


def _bounds(key: str, kind: str, values: Sequence[str]) -> tuple[float, float, bool]:
    """(low, high, whether the key wants whole numbers)."""
    try:
        low, high = map(float, values)
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(low) and low < high < math.inf) or (kind == "log" and low <= 0):
        above = "above 0 " if kind == "log" else ""
        raise RequestError(
            f"--random {key}: {kind}({','.join(values)}): expected two numbers {above}that ascend"
        )
    return low, high, takes_whole_numbers(key)


def _choose(values: Sequence[str], dice: random.Random) -> str:
    return dice.choice(values)


def _draw(kind: str, low: float, high: float, whole: bool, dice: random.Random) -> str:
    if kind == "log":
        value = math.exp(dice.uniform(math.log(low), math.log(high)))
    else:
        value = dice.uniform(low, high)
    if whole:
        return str(round(value))
    return format(min(high, max(low, float(f"{value:.4g}"))), ".10g")


def random_points(texts: Sequence[str], count: int, seed: int) -> list[tuple[str, ...]]:
    """`count` points drawn at random (`parse_draws`), as the overrides of each.

    A value depends on the seed, its key and the number of its point alone: more points keep those
    there were.
    """
    draws = parse_draws(texts)
    return [
        tuple(
            f"{key}={draw(random.Random(f'{seed} {number} {key}'))}" for key, draw in draws.items()
        )
        for number in range(count)
    ]


def check_keys(overrides: Iterable[str]) -> None:
    """Raises RequestError, with the nearest known key, for an override that is malformed or of an
    unknown key.
    """
    for override in overrides:
        if override.partition("=")[0] not in config_keys():
            load_config(None, [override])


def cross(
    grid: Sequence[str],
    variants: Sequence[str],
    seeds: Sequence[str],
    common: Sequence[str] = (),
    drawn: Sequence[tuple[str, ...]] = (),
) -> list[tuple[str, ...]]:
    """Every variant crossed with every point of the grid, every point that was `drawn` at random
    and every seed, as the overrides of each.

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
    for override in drawn[0] if drawn else ():
        key = override.partition("=")[0]
        _require_one_side(key, [*common, *(axis[0] for axis in axes)], split, (), "--random")
    return [
        (*variant, *found, *point)
        for variant, found, point in product(split, drawn or [()], product(*axes))
    ]


def _require_one_side(
    key: str,
    common: Sequence[str],
    variants: Sequence[Sequence[str]],
    seeds: Sequence[str],
    option: str = "--grid",
) -> None:
    """Raises RequestError where `key`, of the `option` or of --seeds, is set elsewhere too."""
    option = "--seeds" if seeds and key == "training.seed" else f"{option} {key}"
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
