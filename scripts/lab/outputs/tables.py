"""The tables that a run prints: a row an epoch, and the figures at its end. No torch at import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lab.base.console import Columns, aligned, table_line
from lab.config.loading import Config

EPOCH_COLUMNS: Columns = {
    "loss": ("train_loss", "7.3f"),
    "train %": ("train_acc", "8.2f"),
    "val %": ("val_acc", "7.2f"),
    "active": ("activation_rate", "7.3f"),
    "threshold": ("threshold", "10.4f"),
    "lr": ("lr", "9.6f"),
    "loaded": ("samples_loaded", "10,.0f"),
    "trained": ("samples_trained", "10,.0f"),
    "ms/step": ("step_time_ms", "8.1f"),
    "saved": ("energy_savings", "7.1%"),  # of the FLOPs of a dense epoch
}


def of_all(config: Config) -> str:
    """What follows an epoch's number, "/20"; nothing for a schedule by time."""
    return f"/{config.training.epochs}" if config.training.lr_decay == "epochs" else ""


def epoch_line(config: Config, row: Mapping[str, Any] | None = None) -> str:
    """A row of the table that grows while a run goes on, or its header."""
    line = f"{'epoch':>9} {'phase':>6}"
    if row is not None:
        phase = config.ast.mode if config.is_sparse(row["epoch"] - 1) else "dense"
        line = f"{row['epoch']:>5}{of_all(config):<4} {phase:>6}"
    return f"{line} {table_line(EPOCH_COLUMNS, row)}"


def summary(result: Mapping[str, Any]) -> str:
    """The table at the end of a run."""
    ledger = result["ledger"]
    energy = result["energy_kj"]
    final = result["final_accuracy"]
    training = result["config"]["training"]
    best = f"best {result['best_accuracy']:.2f} % in epoch {result['best_epoch']}"
    rows = {
        "status": result["status"] + (f": {result['error']}" if "error" in result else ""),
        "accuracy": "-" if final is None else f"{best}, final {final:.2f} %",
        "epochs": str(result["epochs_completed"])
        + (f" of {training['epochs']}" * (training["lr_decay"] == "epochs")),
        "time": (
            f"{result['train_seconds']:.1f} s training, "
            f"{3600 * result['total_time_hours']:.1f} s in all"
        ),
        "samples": (
            f"{ledger['loaded']:,} loaded, {ledger['scored']:,} scored, "
            f"{ledger['trained']:,} trained"
        ),
        "optimizer steps": f"{ledger['steps']:,}",
        "GPU energy": "not measured" if energy is None else f"{energy:.3f} kJ in training",
    }
    return f"\n{aligned(rows)}"
