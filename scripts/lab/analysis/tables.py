"""A study as text: the table of settings, the verdict, and the table that grows while a run goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd

from lab.analysis.study import Study
from lab.console import Columns, table_line
from lab.errors import RequestError, one_line
from lab.results import ACTIVATION_BAND


def text_table(study: Study) -> pd.DataFrame:
    """The table of settings, text throughout: the terminal, Markdown, LaTeX and the page show these same figures."""
    table = study.table

    def show(column: str, spec: str) -> list[str]:
        return ["-" if pd.isna(value) else format(value, spec) for value in table[column]]

    columns = {
        "setting": list(table.index),
        "n": show("n", "d"),
        "final %": show("final_mean", ".2f"),
        "sd": show("final_sd", ".2f"),
        "± 95 %": show("final_ci95", ".2f"),
        "best %": show("best_mean", ".2f"),
    }
    if study.baseline is not None:
        columns |= {"difference": show("difference", "+.2f"), "± of it": show("difference_ci95", ".2f")}
    ratios = zip(show("time_to_match", ".2f"), table["time_to_match_bound"], strict=True)
    columns |= {
        "time to match": [f"{bound} {ratio}".strip() for ratio, bound in ratios],
        "train s": show("train_seconds_mean", ".1f"),
        "s sd": show("train_seconds_sd", ".1f"),
        "kJ": show("energy_kj_mean", ".4g"),
        "est kJ": show("est_energy_kj_mean", ".4g"),
        "TFLOP": show("tflop", ".4g"),
        "epochs": show("epochs", ".4g"),
        "activation": show("activation", ".3f"),
        "off target": show("activation_error", ".3f"),
    }
    return pd.DataFrame({name: texts for name, texts in columns.items() if set(texts) != {"-"}})


def verdict(study: Study) -> str:
    """Which setting wins, by how much, its time to match, and whether the controller kept to its target."""
    figures = text_table(study).set_index("setting").to_dict("index")
    table, best = study.table, study.table.index[0]
    spread = f", 95 % interval ± {figures[best]['± 95 %']}" if figures[best].get("± 95 %", "-") != "-" else ""
    text = f"{best} has the highest final accuracy: {figures[best]['final %']} % (n = {figures[best]['n']}{spread})."
    base = study.baseline
    others = sorted(table.index[1:], key=lambda name: table.loc[name, "dense"])  # the sparse ones first
    other = base if base != best else next(iter(others), None)
    if base is not None and other is not None:
        winner, loser = (best, base) if best != base else (other, base)
        row, half = figures[winner], table.loc[winner, "difference_ci95"]
        text += f" {winner} is {row['difference']} points from {loser}"
        if np.isnan(half):
            text += ", without an interval: that takes two seeds of each."
        elif abs(table.loc[winner, "difference"]) > half:
            text += f" ± {row['± of it']}: beyond chance."
        else:
            text += f" ± {row['± of it']}: not told apart by these seeds."
    sparse = table[~table["dense"] & table["time_to_match"].notna()].sort_values("time_to_match", kind="stable")
    reached = sparse.index[sparse["time_to_match_bound"] != ">"]
    if len(reached):
        text += f" Least time to match the dense frontier: {figures[reached[0]]['time to match']} ({reached[0]})."
    elif len(sparse):
        text += " No sparse setting is as accurate as the shortest dense one: its time to match is only bounded."
    elif not study.frontiers:
        text += " No finished dense run with its time was found: time to match is not known."
    errors = table["activation_error"].dropna()
    if len(errors):
        worst = errors.idxmax()
        text += f" Activation was at most {figures[worst]['off target']} off its target after the first sparse epoch"
        text += f" ({worst})." if errors.max() > ACTIVATION_BAND else "."
    return text


def frontier_lines(study: Study) -> list[str]:
    """The dense frontiers in words, one line each; where there are several, with what sets their groups apart."""
    lines = []
    for group, frontier in study.frontiers.items():
        others = [other.split("\n") for other in study.frontiers if other != group]
        own = [pair for pair in group.split("\n") if any(pair not in other for other in others)]
        where = f" ({' '.join(own)})" if own else ""
        points = ", ".join(f"{percent:.2f} % in {seconds:.1f} s" for seconds, percent in frontier)
        lines.append(one_line(f"dense frontier{where}: {points}"))
    return lines


def to_markdown(table: pd.DataFrame) -> str:
    rows = [list(table.columns), ["---", *["--:"] * (len(table.columns) - 1)], *table.to_numpy().tolist()]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)


def to_latex(table: pd.DataFrame) -> str:
    style = table.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis="columns")
    return style.to_latex(hrules=True, column_format="l" + "r" * (len(table.columns) - 1))


# ------------------------------------------------------------------------------------------- Following

FOLLOWED: Columns = {
    "epoch": ("epoch", "5.0f"),
    "loss": ("train_loss", "7.3f"),
    "train %": ("train_acc", "8.2f"),
    "val %": ("val_acc", "7.2f"),
    "active": ("activation_rate", "7.3f"),
    "threshold": ("threshold", "10.4f"),
    "loaded": ("samples_loaded", "10,.0f"),
    "trained": ("samples_trained", "10,.0f"),
    "train s": ("train_seconds", "10.1f"),
    "est kJ": ("est_energy_kj", "10.3f"),
    "kJ": ("energy_kj", "10.3f"),
    "ms/step": ("step_time_ms", "8.1f"),
}


def finished_lines(path: Path, position: int) -> Iterator[tuple[int, bytes]]:
    """The lines of a file from byte `position` on that end in a line break, each with the position behind it."""
    with path.open("rb") as file:
        file.seek(position)
        while (line := file.readline()).endswith(b"\n"):
            yield file.tell(), line


def growing_lines(path: Path, poll_seconds: float) -> Iterator[tuple[int, str]]:
    """The lines of a growing file as they are finished, each with its number. Never ends.

    Waits for a file that does not exist yet, as before a run's first epoch. Starts again when the file shrinks.
    Raises RequestError where it cannot be read.
    """
    position, count = 0, 0
    while True:
        try:
            if path.stat().st_size < position:
                position, count = 0, 0
            for end, line in finished_lines(path, position):
                position, count = end, count + 1
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
            text, epoch = table_line(FOLLOWED, row), float(row.get("epoch") or 0)
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            raise RequestError(f"--follow: {path}: line {count}: not an epoch: {one_line(line, 60)}") from None
        if epoch <= before:
            print(f"\n{table_line(FOLLOWED)}")  # another run goes on in the same file
        before = epoch
        print(text, flush=True)
