"""What a run prints: lines, tables and progress bars."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tqdm import tqdm

from lab.config import Config
from lab.launch import launched
from lab.streams import print_progress

Columns = Mapping[str, tuple[str, str]]  # title: (key of the row, format); the format gives the width


def print_rank0(text: str) -> None:
    """`print_progress`, of several processes on rank 0 alone."""
    if launched()[0]:
        return
    print_progress(text)


def progress_bar(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """A tqdm bar on a terminal, of several processes on rank 0 alone; it goes when it is done."""
    options = {"leave": False, "dynamic_ncols": True, "disable": True if launched()[0] else None, **options}
    return tqdm(iterable, **options)


def cell(value: Any, spec: str) -> str:
    """A figure by its format, or a dash as wide where there is none."""
    return ("-" if value is None else format(value, spec)).rjust(len(format(0, spec)))


def table_line(columns: Columns, row: Mapping[str, Any] | None = None) -> str:
    """A row of a text table, or with None its header."""
    if row is None:
        return " ".join(title.rjust(len(format(0, spec))) for title, (_, spec) in columns.items())
    return " ".join(cell(row.get(key), spec) for key, spec in columns.values())


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
    """What follows an epoch's number, "/20"; nothing where the schedule is by time: then as many come as fit."""
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
    ledger, energy, final = result["ledger"], result["energy_kj"], result["final_accuracy"]
    training = result["config"]["training"]
    best = f"best {result['best_accuracy']:.2f} % in epoch {result['best_epoch']}"
    rows = {
        "status": result["status"] + (f": {result['error']}" if "error" in result else ""),
        "accuracy": "-" if final is None else f"{best}, final {final:.2f} %",
        "epochs": str(result["epochs_completed"]) + (f" of {training['epochs']}" * (training["lr_decay"] == "epochs")),
        "time": f"{result['train_seconds']:.1f} s training, {3600 * result['total_time_hours']:.1f} s in all",
        "samples": f"{ledger['loaded']:,} loaded, {ledger['scored']:,} scored, {ledger['trained']:,} trained",
        "optimizer steps": f"{ledger['steps']:,}",
        "GPU energy": "not measured" if energy is None else f"{energy:.3f} kJ in training",
    }
    return f"\n{aligned(rows)}"


def aligned(rows: Mapping[str, str]) -> str:
    """A block of lines, the names in one column and what they stand for in another."""
    return "\n".join(f"{name:<16} {value}" for name, value in rows.items())


@contextlib.contextmanager
def step_bar(label: str, steps: int) -> Iterator[Callable[[int, int, Callable[[], dict[str, str]]], None]]:
    """A bar over an epoch's steps. Yields heartbeat(step, images, facts), to be called after each step.

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
            bar.set_postfix(facts() | {"images/s": f"{total / max(now - started, 1e-9):,.0f}"}, refresh=False)
            bar.update(step - bar.n)

        yield heartbeat
