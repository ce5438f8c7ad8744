"""What a run prints: lines, tables and progress bars."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lab.base.launch import launched
from lab.base.streams import print_progress

if TYPE_CHECKING:
    from tqdm import tqdm

LINE_SECONDS = 60.0  # between two lines of a run without a terminal
_line_printed = time.monotonic()  # when there was the last one, of whatever epoch

# title: (key of the row, format); the format gives the width
Columns = Mapping[str, tuple[str, str]]


def print_rank0(text: str) -> None:
    """`print_progress`, of several processes on rank 0 alone."""
    if launched()[0]:
        return
    print_progress(text)


def progress_bar(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """A tqdm bar on a terminal, of several processes on rank 0 alone; it goes when it is done."""
    from tqdm import tqdm  # a tenth of the start of a command that shows none

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
    """A bar over an epoch's steps, or a line every minute where there is no terminal. Yields
    heartbeat(step, images, facts), to be called after each step.

    `facts`, which may read the device, is called about once a second, without a terminal once a
    minute, and after the last step. Its `left` is the time left of the whole run.
    """
    started = shown = time.monotonic()
    total = 0
    with progress_bar(total=steps, desc=label, unit="step") as bar:

        def heartbeat(step: int, images: int, facts: Callable[[], dict[str, str]]) -> None:
            global _line_printed
            nonlocal shown, total
            total += images
            now = time.monotonic()
            is_due = now - _line_printed >= LINE_SECONDS if bar.disable else now - shown >= 1.0
            if not is_due and step < steps:
                return
            shown = now
            figures = facts()
            pace = f"{total / max(now - started, 1e-9):,.0f}"
            bar.set_postfix(figures | {"images/s": pace}, refresh=False)
            bar.update(step - bar.n)
            if bar.disable and is_due:
                _line_printed = now
                print_rank0(step_line(label, step, steps, figures, pace))

        yield heartbeat


def step_line(label: str, step: int, steps: int, figures: Mapping[str, str], pace: str) -> str:
    """What a run without a terminal says of a step. pace: pictures a second."""
    told = [f"{name} {value}" for name, value in figures.items() if name != "left"]
    told.append(f"{pace} pictures/s")
    if "left" in figures:
        told.append(f"{figures['left']} left")
    return f"{label}, step {step:,}/{steps:,}: {', '.join(told)}"
