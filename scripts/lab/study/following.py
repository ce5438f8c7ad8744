"""The table that grows while a run goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from lab.base.console import Columns, table_line
from lab.base.errors import RequestError, one_line
from lab.outputs.tables import EPOCH_COLUMNS

FOLLOWED: Columns = {
    "epoch": ("epoch", "5.0f"),
    **{
        title: EPOCH_COLUMNS[title]
        for title in "loss|train %|val %|active|threshold|loaded|trained".split("|")
    },
    "train s": ("train_seconds", "10.1f"),
    "kJ": ("energy_kj", "10.3f"),
    "ms/step": EPOCH_COLUMNS["ms/step"],
}


def finished_lines(path: Path, position: int) -> Iterator[tuple[int, bytes]]:
    """The lines of a file from byte `position` on that end in a line break, each with the position
    behind it.
    """
    with path.open("rb") as file:
        file.seek(position)
        while (line := file.readline()).endswith(b"\n"):
            yield file.tell(), line


def growing_lines(path: Path, poll_seconds: float) -> Iterator[tuple[int, str]]:
    """The lines of a growing file as they are finished, each with its number. Never ends.

    Waits for a file that does not exist yet, as before a run's first epoch. Starts again when the
    file shrinks. Raises RequestError where it cannot be read.
    """
    position = 0
    count = 0
    while True:
        try:
            if path.stat().st_size < position:
                position = 0
                count = 0
            for end, line in finished_lines(path, position):
                position = end
                count = count + 1
                yield count, line.decode(errors="replace")
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise RequestError(f"--follow: {path.parent}: no such folder") from None
        except OSError as error:
            raise RequestError(f"--follow: {path}: {error.strerror}") from None
        time.sleep(poll_seconds)


def follow(path: Path, poll_seconds: float = 0.5) -> NoReturn:
    """Print the epochs of `logging.jsonl_path` as they are logged, until interrupted.

    Raises RequestError for a line that is no epoch.
    """
    print(table_line(FOLLOWED), flush=True)
    before = 0.0
    for count, line in growing_lines(path, poll_seconds):
        try:
            row = json.loads(line)
            text = table_line(FOLLOWED, row)
            epoch = float(row.get("epoch") or 0)
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            raise RequestError(
                f"--follow: {path}: line {count}: not an epoch: {one_line(line, 60)}"
            ) from None
        if epoch <= before:
            print(f"\n{table_line(FOLLOWED)}")  # another run goes on in the same file
        before = epoch
        print(text, flush=True)
