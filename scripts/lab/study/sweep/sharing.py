"""Who does which run of a sweep: several commands may work on one folder, here and on other
machines that share the disk.

All goes by locks on files in `<output_dir>/logs`, which the system takes back from a process that
dies. `lock` is held for an instant, to join and to write to the summary. `members/` has a lock for
each command that is at work, and `<run>.lock` is held by whoever does that run. The first command
begins a round, `round.json`; those that come while one of its members lives work on the same round.
A run is done in a round once its line is in the summary. One that was begun in the round and did
not end, because its holder died or was told to end, goes on from its checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lab.base.files import append_jsonl, attempt_lock, locked_in_turn, replace_text, utc_now
from lab.config.loading import checkpoint_folder
from lab.study.sweep.plans import Planned
from lab.study.sweep.summary import finished_runs, is_done, read_rows

LOOK_SECONDS = 1.0  # between two looks at what others do


@dataclass(frozen=True)
class Round:
    """What the commands that work on one folder have in common."""

    summary: str  # the file that each run adds a line to
    started: str  # UTC, by the clock of the machine that began it
    resume: bool  # finished runs are left, interrupted ones go on


def living(members: Path) -> list[str]:
    """The commands that are at work. What dead ones have left is removed. `lock` is held."""
    alive = []
    for path in sorted(members.glob("*.lock")):
        lock = attempt_lock(path)
        if lock is None:
            alive.append(path.stem)
        else:
            with lock:
                path.unlink(missing_ok=True)
    return alive


def enter(held: contextlib.ExitStack, logs: Path) -> None:
    """Be one of the commands that are at work on the folder `logs` until `held` ends. `lock` is
    held.
    """
    name = f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.lock"
    path = logs / "members" / name
    path.parent.mkdir(exist_ok=True)
    held.enter_context(attempt_lock(path))
    held.callback(path.unlink, missing_ok=True)


@contextlib.contextmanager
def member(logs: Path) -> Iterator[None]:
    """`enter`, for the length of the block."""
    with contextlib.ExitStack() as held:
        with locked_in_turn(logs / "lock", int):
            enter(held, logs)
        yield


@contextlib.contextmanager
def joined(logs: Path, begin: Callable[[str], Round]) -> Iterator[tuple[Round, bool]]:
    """Take part in the folder's round for the length of the block: (the round, whether another
    command has begun it).

    begin: makes a round that starts at the given UTC time, where no command is at work.
    """
    place = logs / "round.json"
    with contextlib.ExitStack() as held:
        with locked_in_turn(logs / "lock", int):
            is_joined = bool(living(logs / "members")) and place.exists()
            if is_joined:
                current = Round(**json.loads(place.read_text(encoding="utf-8")))
            else:
                current = begin(utc_now())
                replace_text(place, json.dumps(asdict(current)) + "\n")
            enter(held, logs)
        yield current, is_joined


class Board:
    """Which of a command's runs are done, free, or with another command."""

    def __init__(self, logs: Path, current: Round, plans: Sequence[Planned]):
        self.logs = logs
        self.round = current
        self.plans = {plan.id: plan for plan in plans}
        self.rows: dict[str, dict[str, Any]] = {}  # of those that are done, by id
        self.tried: set[str] = set()  # a command does no run twice, however it ended
        self.held: dict[str, contextlib.AbstractContextManager] = {}  # locks of runs
        self.read = b""  # of the summary, at the last look
        self.looked = 0.0  # time.monotonic() seconds

    def look(self, or_stopped: bool = False) -> list[dict[str, Any]]:
        """Read the summary, and return the lines that others have added since the last look.

        or_stopped: those of interrupted runs too, which otherwise are still to be done.
        """
        self.looked = time.monotonic()
        path = Path(self.round.summary)
        text = path.read_bytes()
        if text == self.read and not or_stopped:
            return []
        self.read = text
        new = [
            row
            for key, row in read_rows(path).items()
            if key in self.plans and key not in self.rows and self.ends(row, or_stopped)
        ]
        self.rows |= {row["id"]: row for row in new}
        return new

    def keep(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Take runs that were finished before the round for done. rows: their lines, by id."""
        self.look()
        for key in rows.keys() - self.rows.keys():
            self._append(rows[key])
            self.rows[key] = dict(rows[key])

    def ends(self, row: Mapping[str, Any], or_stopped: bool = False) -> bool:
        """Whether a line of the summary means that its run is done in this round."""
        if row.get("status") == "interrupted" and not or_stopped:
            return False
        kept = self.round.resume and row.get("exit_code") == 0
        return kept or self.is_fresh(row)

    def is_fresh(self, row: Mapping[str, Any]) -> bool:
        """Whether a run ended in this round."""
        return (row.get("finished_utc") or "") >= self.round.started

    def ahead(self) -> list[Planned]:
        """The runs that are not done, also those that someone does now."""
        return [plan for key, plan in self.plans.items() if key not in self.rows]

    def is_due(self) -> bool:
        """Whether it is time for another look."""
        return time.monotonic() - self.looked >= LOOK_SECONDS

    def take(self) -> Planned | None:
        """The next free run, which is this command's until `finish`; None where none is free."""
        return next(filter(None, map(self.claim, self.ahead())), None)

    def claim(self, plan: Planned) -> Planned | None:
        """This run, as `take` gives it; None where it is not free."""
        lock = None if plan.id in self.tried else attempt_lock(self._lock(plan))
        if lock is None:
            return None
        if self._is_free(plan):
            self.held[plan.id] = lock
            self.tried.add(plan.id)
            return self._begun(plan)
        with lock:  # gives it back
            return None

    def finish(self, row: dict[str, Any]) -> None:
        """Add the line of a run that this command has done to the summary, and give the run
        back.
        """
        self._append(row)
        self.rows[row["id"]] = row
        with self.held.pop(row["id"]):
            pass

    def _append(self, row: dict[str, Any]) -> None:
        with locked_in_turn(self.logs / "lock", int):
            append_jsonl(self.round.summary, row)

    def _lock(self, plan: Planned) -> Path:
        return self.logs / f"{plan.id}.lock"

    def _mark(self, plan: Planned) -> Path:
        """The file that says in which round a run was last begun."""
        return self.logs / f"{plan.id}.begun"

    def was_begun(self, plan: Planned) -> bool:
        """Whether someone has begun the run in this round."""
        mark = self._mark(plan)
        return mark.exists() and mark.read_text(encoding="utf-8") == self.round.started

    def _is_free(self, plan: Planned) -> bool:
        """Whether a run whose lock is held is still to be done.

        Its holder may have died between the run's end and its line; then the line is added here. Or
        the run itself has outlived its holder, and is about to save.
        """
        rows = {row["id"]: row for row in read_rows(Path(self.round.summary)).values()}
        if plan.id in rows and self.ends(rows[plan.id]):
            return False
        if plan.config is None:
            return True
        folder = checkpoint_folder(plan.config) / "lock"
        lock = attempt_lock(folder) if folder.exists() else contextlib.nullcontext()
        if lock is None:
            return False
        with lock:
            pass
        if not self.was_begun(plan):
            return True
        row = finished_runs([plan]).get(plan.id)
        if row is None or not is_done(plan, row) or not self.is_fresh(row):
            return True
        self._append(row)
        return False

    def _begun(self, plan: Planned) -> Planned:
        """The run as it is to be done: where it was begun in this round, from its checkpoint if
        that is of this round too.
        """
        mark = self._mark(plan)
        again = self.was_begun(plan)
        if not again:
            replace_text(mark, self.round.started)
        if plan.config is None:
            return plan
        last = checkpoint_folder(plan.config) / "last.pt"
        # both files are on one disk: no two clocks are compared
        saved = again and last.exists() and last.stat().st_mtime >= mark.stat().st_mtime
        return replace(plan, resume=self.round.resume or saved)
