"""What a run writes: checkpoints, log, TensorBoard, results."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lab.base.console import print_rank0
from lab.base.errors import RequestError
from lab.base.files import append_jsonl, replace_text, require_appendable, require_folder, utc_now
from lab.config.sections import LoggingConfig
from lab.engine.checkpoint import Checkpoints, host_copy, state_bytes
from lab.machine.devices import environment, synchronize
from lab.machine.distributed import Dist
from lab.models.weights import WeightsFolder
from lab.outputs import diet
from lab.outputs.card import write_card
from lab.outputs.result import save_results, weights_folder
from lab.outputs.tables import summary


class Outputs:
    """Checkpoints, log and TensorBoard of a run. Of several processes rank 0 writes, with what all
    have.
    """

    def __init__(self, logging: LoggingConfig, folder: Path, device: torch.device, dist: Dist):
        """folder: where the run's checkpoints go."""
        self.logging = logging
        self.folder = folder
        self.device = device
        self.dist = dist
        self.checkpoints: Checkpoints | None = None  # from `open` on
        self.weights: WeightsFolder | None = None  # likewise
        self.board: Any | None = None
        # (epoch, step) of this session's newest checkpoint
        self.saved_at: tuple[int, int] | None = None
        # now: at the end, a dead loader worker would break into its subprocess
        self.environment = environment(device) | {
            "processes": dist.world,
            "command": shlex.join(sys.argv),
            "started_utc": utc_now(),
        }

    def open(
        self,
        board: Any | None,
        model: nn.Module,
        copies: int,
        facts: dict[str, Any],
        code: Mapping[str, bytes],
    ) -> None:
        """Begin to write.

        copies: of each weight in the optimizer. facts: of `Network.describe`. code: of
        `imports.kept`. Raises RequestError where the disk has no room for the checkpoints.
        """
        if self.dist.rank == 0:
            self.board = board
            self.checkpoints = Checkpoints(self.folder)
            self.weights = WeightsFolder(weights_folder(self.folder), facts, code)
            self.checkpoints.require_space(state_bytes(model, copies), state_bytes(model, 0))

    def save(
        self, state_dict: Callable[[], dict[str, Any]], at: tuple[int, int], best: bool = False
    ) -> None:
        """Write a checkpoint, where the run keeps any. Collective. at: (epoch, step)."""
        if self.checkpoints is None and self.dist.world == 1:
            return
        state = state_dict()
        self.saved_at = at
        if self.checkpoints is not None:
            self.checkpoints.save(state, self.device, best)

    def export(self, state: dict[str, Tensor], row: dict[str, Any]) -> None:
        """Write the weights of the best epoch so far, those that were validated. row: of that
        epoch.
        """
        if self.checkpoints is not None:
            copied = host_copy(state)
            synchronize(self.device)
            self.checkpoints.then(
                self.weights.write, copied, {key: row[key] for key in ("epoch", "val_acc")}
            )

    def checkpoint_due(self) -> bool:
        """Whether logging.checkpoint_minutes have passed since the last checkpoint."""
        minutes = self.logging.checkpoint_minutes if self.dist.rank == 0 else None
        return minutes is not None and time.monotonic() - self.checkpoints.saved >= 60 * minutes

    def close_epoch(self, row: dict[str, Any]) -> None:
        """Show an epoch's row of the history in TensorBoard."""
        if self.board is not None:
            add_scalars(self.board, row)

    def log(self, row: dict[str, Any], whole: bool) -> None:
        """Append the row to the log once the checkpoint is on the disk.

        The line of an epoch that was cut short (`whole` false) is kept beside the checkpoint too. A
        resumed run repeats the epoch, and takes the line back.
        """
        if self.checkpoints is not None and self.logging.jsonl_path is not None:
            self.checkpoints.then(self._append, row, whole)

    def _append(self, row: dict[str, Any], whole: bool) -> None:
        if not whole:
            replace_text(self.checkpoints.capped, json.dumps(row) + "\n")
        append_jsonl(self.logging.jsonl_path, row)

    def finish(self) -> None:
        """Wait until everything is on the disk. Raises TrainingFailed where the disk does not take
        it.
        """
        if self.checkpoints is not None:
            self.checkpoints.wait()

    def close(self, result: dict[str, Any], eaten: diet.Diet | None = None) -> Path | None:
        """Write the results file, what was trained on beside it, and print the summary.

        Returns the file, None on ranks other than 0.
        """
        if self.checkpoints is None:
            return None
        self.checkpoints.close()
        path = save_results(result, self.logging.output_dir)
        print_rank0(f"{summary(result)}\nresults: {path}")
        # a run that was resumed with nothing left to do has its weights where it began
        weights = weights_folder(self.folder)
        has_weights = result["weights"] is not None and weights.is_dir()
        if has_weights:
            of = f"of epoch {result['best_epoch']}, {result['best_accuracy']:.2f} %"
            print_rank0(f"weights: {weights} ({of})")
        if eaten is not None and result["status"] not in ("failed", "interrupted"):
            if has_weights:
                write_card(weights, result)
            chose = result["config"]["ast"]["mode"] == "ast"  # or chance alone says who is most
            sheets = diet.SHEETS if chose else ()
            eaten.write(path, {name: result["times_trained"][name] for name in sheets})
        return path


def open_tensorboard(outputs: LoggingConfig) -> Any | None:
    """torch's SummaryWriter into a folder of this run, or None where none is asked for.

    Raises RequestError, saying what to install, where the package is missing.
    """
    if not outputs.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RequestError(
            "logging.tensorboard: needs a package that is not there: pip install tensorboard"
        ) from None
    return SummaryWriter(
        Path(outputs.output_dir) / "tensorboard" / f"{datetime.now():%Y%m%d_%H%M%S}_{os.getpid()}"
    )


def add_scalars(board: Any, row: dict[str, Any]) -> None:
    """Write what was measured of an epoch's row to TensorBoard."""
    for key, value in row.items():
        if value is not None:
            board.add_scalar(key, value, row["epoch"])
    board.flush()


def prepare_outputs(outputs: LoggingConfig) -> None:
    """Make the output folders. Raises RequestError where nothing could be written at the end."""
    require_folder(Path(outputs.output_dir), "logging.output_dir", outputs.output_dir)
    if outputs.jsonl_path is not None:
        require_appendable(Path(outputs.jsonl_path), "logging.jsonl_path")
