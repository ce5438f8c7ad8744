"""What a run prints: lines, tables and progress bars."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tqdm import tqdm

from lab.base.launch import launched
from lab.base.streams import print_progress

# title: (key of the row, format); the format gives the width
Columns = Mapping[str, tuple[str, str]]


def print_rank0(text: str) -> None:
    """`print_progress`, of several processes on rank 0 alone."""
    if launched()[0]:
        return
    print_progress(text)


def progress_bar(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """A tqdm bar on a terminal, of several processes on rank 0 alone; it goes when it is done."""
    options = {
        "leave": False,
        "dynamic_ncols": True,
        "disable": True if launched()[0] else None,
        **options,
    }
    return tqdm(iterable, **options)


def cell(value: Any, spec: str) -> str:
    """A figure by its format, or a dash as wide where there is none."""
    return ("-" if value is None else format(value, spec)).rjust(len(format(0, spec)))


def table_line(columns: Columns, row: Mapping[str, Any] | None = None) -> str:
    """A row of a text table, or with None its header."""
    if row is None:
        return " ".join(title.rjust(len(format(0, spec))) for title, (_, spec) in columns.items())
    return " ".join(cell(row.get(key), spec) for key, spec in columns.values())


def aligned(rows: Mapping[str, str]) -> str:
    """A block of lines, the names in one column and what they stand for in another."""
    return "\n".join(f"{name:<16} {value}" for name, value in rows.items())


@contextlib.contextmanager
def step_bar(
    label: str, steps: int
) -> Iterator[Callable[[int, int, Callable[[], dict[str, str]]], None]]:
    """A bar over an epoch's steps. Yields heartbeat(step, images, facts), to be called after each
    step.

    `facts`, which may read the device, is called about once a second and not after every step.
    """
    started = shown = time.monotonic()
    total = 0
    with progress_bar(total=steps, desc=label, unit="step") as bar:

        def heartbeat(step: int, images: int, facts: Callable[[], dict[str, str]]) -> None:
            nonlocal shown, total
            total += images
            now = time.monotonic()
            if now - shown < 1.0 and step < steps:
                return
            shown = now
            bar.set_postfix(
                facts() | {"images/s": f"{total / max(now - started, 1e-9):,.0f}"}, refresh=False
            )
            bar.update(step - bar.n)

        yield heartbeat
