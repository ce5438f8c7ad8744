"""The results file of a run: what is in it, its name, and the table that sums it up."""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from lab.base.files import utc_now, write_result
from lab.config.loading import Config, checkpoint_folder
from lab.data.datasets import ImageDataset
from lab.outputs import diet


def weights_folder(config: Config) -> Path:
    """Where a run writes the weights of its best epoch."""
    return checkpoint_folder(config) / "weights"


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


def count_diet(run: Any, dataset: ImageDataset, indices: np.ndarray) -> diet.Diet | None:
    """What the run was trained on; None on ranks other than 0, and where the device has failed.
    indices: int64 [n], of the training set.
    """
    if run.outputs.checkpoints is None:
        return None
    with contextlib.suppress(RuntimeError):
        return diet.Diet.of(dataset, indices, run.metrics.times_trained.times.cpu().numpy())
    return None


def build_result(run: Any, outcome: dict[str, str], eaten: diet.Diet | None) -> dict[str, Any]:
    """The contents of a results file: the documented keys first, then how they came about."""
    metrics = run.metrics
    clock = run.clock
    folder = weights_folder(run.config)
    with contextlib.suppress(
        RuntimeError
    ):  # of an unfinished epoch; a device that failed cannot say
        metrics.settle()
    accuracies = metrics.history["val_acc"]
    best = max(accuracies, default=0.0)
    return {
        "best_accuracy": best,
        "total_time_hours": clock.elapsed() / 3600,
        "epochs_completed": metrics.epochs_completed,
        "training_history": metrics.history,
        **outcome,
        "seed": run.config.training.seed,
        "best_epoch": accuracies.index(best) + 1 if accuracies else None,
        "final_accuracy": accuracies[-1] if accuracies else None,
        "train_seconds": clock.train_seconds,
        "energy_kj": clock.energy_kj,
        "weights": str(folder.relative_to(run.config.logging.output_dir)) if accuracies else None,
        **diet.figures(eaten, metrics.by_class),
        "base_flop_per_sample": run.network.base_flop,
        "ledger": asdict(metrics.ledger),
        "nonfinite_steps": metrics.nonfinite_steps,
        "bad_images": metrics.read_errors.found,
        "config": run.config.model_dump(),
        "environment": run.outputs.environment | {"finished_utc": utc_now()},
    }
