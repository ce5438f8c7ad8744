"""How far the runs of a sweep are, read from what they print."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from lab.base.streams import print_progress
from lab.study.sweep.sharing import Board

SHOW_SECONDS = 60.0  # between two lines of a run
TAIL_BYTES = 4096  # of what a run prints: a few lines
# a row of the table of epochs (`outputs.tables.epoch_line`), its epoch, of how many, and where it
# is a number the validation accuracy; and the line that a run without a terminal prints every
# minute (`base.console.step_bar`)
EPOCH = re.compile(r"^ *(\d+)(?:/(\d+))? +(?:dense|ast|random) (?: *\S+ +\S+ +([\d.]+) )?")
MINUTE = re.compile(r"^epoch (\d+)(?:/(\d+))?, step .*?(?:, ([\d:]+(?: days?, [\d:]+)?) left)?$")


def standing(text: str, epochs_here: int, seconds: float | None) -> str:
    """ "epoch 4/20, 0:01:10 left", of a run that prints `text`.

    epochs_here: how many it has ended since it was started `seconds` ago; None: nobody knows when.
    """
    found = "starting"
    for line in text.splitlines():
        if row := EPOCH.match(line):
            done = int(row[1])
            total = int(row[2] or 0)
            found = f"epoch {done} of {total} done" if total else f"epoch {done} done"
            if total and epochs_here and seconds is not None:
                left = (total - done) * seconds / epochs_here
                found += f", {timedelta(seconds=round(left))} left"
        elif row := MINUTE.match(line):
            found = f"epoch {row[1]}" + (f"/{row[2]}" if row[2] else "")
            found += f", {row[3]} left" if row[3] else ""
    return found


def read_standing(log: Path, seconds: float | None) -> str:
    """`standing` of the run that prints to `log`."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "starting"
    epochs = sum(EPOCH.match(line) is not None for line in text.splitlines())
    return standing(text[-TAIL_BYTES:], epochs, seconds)


class Standings:
    """Shows once a minute what each run is at."""

    def __init__(self, board: Board):
        self.board = board
        self.shown = time.monotonic()

    def show(self, started: Mapping[str, float]) -> None:
        """started: time.monotonic() seconds of the start of each run of this command, by id."""
        now = time.monotonic()
        if now - self.shown < SHOW_SECONDS:
            return
        self.shown = now
        for plan in self.board.ahead():
            if self.board.was_begun(plan):
                since = started.get(plan.id)
                seconds = None if since is None else now - since
                where = read_standing(self.board.logs / f"{plan.id}.log", seconds)
                print_progress(f"{'':>9} running      {plan.name}  {where}")
