"""The results file of a run: what is in it, its name, and the table that sums it up."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from lab.base.files import utc_now, write_result
from lab.config.loading import Config, checkpoint_folder
from lab.data.datasets import ImageDataset
from lab.machine.clock import Clock
from lab.method.times_trained import TimesTrained
from lab.outputs import diet


def weights_folder(checkpoints: Path) -> Path:
    """Where a run writes the weights of its best epoch."""
    return checkpoints / "weights"


def save_results(result: dict[str, Any], output_dir: str | Path) -> Path:
    """Write final_results_<timestamp>.json whole or not at all, under a name nobody has taken.

    Raises TrainingFailed where the disk does not take it.
    """
    stamp = datetime.now().strftime("%Y%m%d_%H%M%S")
    whole = Path(output_dir) / f"final_results.{os.getpid()}"
    write_result(result, whole)
    for tail in chain([""], (f"_{n}" for n in count(1))):
        path = Path(output_dir) / f"final_results_{stamp}{tail}.json"
        try:
            os.link(whole, path)  # claims the name and fills the file in one
        except OSError as error:
            if isinstance(error, FileExistsError) or path.exists():
                continue
            os.replace(whole, path)  # a file system without hard links
        break
    whole.unlink(missing_ok=True)
    return path


def count_diet(
    dataset: ImageDataset, indices: np.ndarray, counts: TimesTrained | None
) -> diet.Diet | None:
    """What the run was trained on; None without counts, and where the device has failed.

    indices: int64 [n], of the training set. counts: on rank 0, those of all processes.
    """
    if counts is None:
        return None
    with contextlib.suppress(RuntimeError):
        return diet.Diet.of(dataset, indices, counts.times.cpu().numpy())
    return None


def build_result(
    config: Config,
    outcome: Mapping[str, str],
    counted: Mapping[str, Any],
    clock: Clock,
    facts: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """The contents of a results file: the documented keys first, then how they came about.

    outcome: `status`, and perhaps the `error`. counted: of `Metrics.result`.
    """
    folder = weights_folder(checkpoint_folder(config))
    trained = counted["final_accuracy"] is not None
    return {
        "best_accuracy": counted["best_accuracy"],
        "total_time_hours": clock.elapsed() / 3600,
        "epochs_completed": counted["epochs_completed"],
        "training_history": counted["training_history"],
        **outcome,
        "seed": config.training.seed,
        "best_epoch": counted["best_epoch"],
        "final_accuracy": counted["final_accuracy"],
        "train_seconds": clock.train_seconds,
        "energy_kj": clock.energy_kj,
        "weights": str(folder.relative_to(config.logging.output_dir)) if trained else None,
        **facts,
        "ledger": counted["ledger"],
        "bad_images": counted["bad_images"],
        "config": config.model_dump(),
        "environment": {**environment, "finished_utc": utc_now()},
    }
