"""Successive halving: of the runs that have reached a rung, which is an epoch, the best part goes
on to the next. By Optuna, whose pruner decides as the runs come (ASHA, Li et al. 2020, arXiv
1810.05934).

The commands that share a folder share the rungs, in `logs/halving.journal`. A run that is stopped
has saved, and its line says `pruned`: a sweep without halving takes it up again with --resume.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lab.base.errors import RequestError
from lab.study.sweep.sharing import Board
from lab.study.sweep.standing import EPOCH

FACTOR = 3  # one in so many goes on from a rung; the next rung is so many times as far


def library() -> Any:
    """Optuna, silent. Raises RequestError where it is not there."""
    try:
        import optuna
    except ImportError:
        raise RequestError(
            "--halving: needs a package that is not there: pip install optuna"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class Halving:
    """Says which of the running runs are to be stopped."""

    def __init__(self, board: Board, least: int):
        """least: the epoch of the first rung."""
        optuna = library()
        journal = optuna.storages.journal
        storage = optuna.storages.JournalStorage(
            journal.JournalFileBackend(str(board.logs / "halving.journal"))
        )
        pruner = optuna.pruners.SuccessiveHalvingPruner(least, FACTOR)
        self.study = optuna.create_study(
            storage=storage,
            pruner=pruner,
            study_name=board.round.started,
            direction="maximize",
            load_if_exists=True,
        )
        self.trials: dict[str, Any] = {}
        self.reported: dict[str, int] = {}  # the last epoch, by run
        self.sizes: dict[str, int] = {}  # of each run's log, at the last look
        self.pruned: set[str] = set()

    def look(self, running: Iterable[Any]) -> None:
        """Report what the `running` runs (`processes.Running`) have validated since the last look.
        Those that are to go no further get SIGTERM, once.
        """
        for run in running:
            key = run.plan.id
            if key in self.pruned or run.process.poll() is not None:
                continue
            if key not in self.trials:
                self.trials[key] = self.study.ask()
            if self._is_behind(key, run.log):
                self.pruned.add(key)
                run.process.send_signal(signal.SIGTERM)

    def _is_behind(self, key: str, log: Path) -> bool:
        """Whether a run is to be stopped, by the epochs that it has printed since the last look."""
        size = log.stat().st_size
        if size == self.sizes.get(key):
            return False
        self.sizes[key] = size
        trial = self.trials[key]
        rows = map(EPOCH.match, log.read_text(encoding="utf-8", errors="replace").splitlines())
        for row in (row for row in rows if row is not None and row[3] is not None):
            epoch = int(row[1])
            if epoch <= self.reported.get(key, 0):
                continue
            self.reported[key] = epoch
            trial.report(float(row[3]), epoch)
            if trial.should_prune():
                return True
        return False

    def ended(self, row: dict[str, Any]) -> dict[str, Any]:
        """The line of a run that has ended, with `pruned` where halving stopped it."""
        if row["id"] in self.pruned and row["status"] == "interrupted":
            behind = {key: value for key, value in row.items() if key != "error"}
            return behind | {"status": "pruned", "exit_code": 0}
        return row
