"""Compare finished runs: one table, and plots.

    python scripts/analyze_results.py --results-dir results
    python scripts/analyze_results.py --results-dir results --plot --save-dir results/plots

Reads every final_results_*.json of the folder, also those that hold only the documented keys. Accuracies are in
percent, activation a share of 0 to 1, energy in kJ: measured by NVML, or estimated as time x TDP.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from train_ast import RequestError, run_cli

REQUIRED = ("best_accuracy", "total_time_hours", "epochs_completed", "training_history")
PLOTS = {  # file: (history key, axis label)
    "accuracy": ("val_acc", "validation accuracy (%)"),
    "activation": ("activation_rate", "activation rate"),
    "threshold": ("threshold", "threshold (nats)"),
    "energy": ("est_energy_kj", "energy (kJ), cumulative"),
}
WONG = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")  # safe for the colour-blind


def load_results(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The readable results by name, and the files left out with the reason.

    Raises RequestError where the folder is missing or holds no results at all.
    """
    if not folder.is_dir():
        raise RequestError(f"--results-dir: {folder}: no such folder")
    runs, left_out = {}, {}
    for path in sorted(folder.glob("final_results_*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            missing = [key for key in REQUIRED if key not in result]
            if missing or not isinstance(result["training_history"], dict):
                raise ValueError(f"no {', '.join(missing) or 'training history'}")
            runs[path.stem.removeprefix("final_results_")] = result
        except (OSError, ValueError, TypeError) as error:
            left_out[path.name] = " ".join(str(error).split())
    if not runs and not left_out:
        raise RequestError(f"--results-dir: {folder}: no final_results_*.json in it")
    return runs, left_out


def label(name: str, result: dict[str, Any]) -> str:
    """A short name for a run: model, mode, target and seed where they are known, else its time stamp."""
    config = result.get("config")
    if not config:
        return name
    ast = config["ast"]
    target = "" if ast["mode"] == "dense" else f" {ast['target_activation']:g}"
    return f"{config['model']['name']} {ast['mode']}{target} seed {result['seed']}"


def labels(runs: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The short name of every run, its time stamp added where two share one."""
    short = {name: label(name, result) for name, result in runs.items()}
    shared = {text for text in short.values() if list(short.values()).count(text) > 1}
    return {name: f"{text} ({name})" if text in shared else text for name, text in short.items()}


def table(runs: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """One row a run, indexed by its time stamp; what a file does not say is left empty."""
    return pd.DataFrame.from_dict({name: row(name, result) for name, result in runs.items()}, orient="index")


def row(name: str, result: dict[str, Any]) -> dict[str, Any]:
    history = pd.DataFrame({k: pd.Series(v, dtype=float) for k, v in result["training_history"].items()})
    activation = history.get("activation_rate", pd.Series(dtype=float))
    last = {key: values.iloc[-1] for key, values in history.items() if len(values)}
    return {
        "run": label(name, result),
        "status": result.get("status", "-"),
        "epochs": result["epochs_completed"],
        "best %": result["best_accuracy"],
        "final %": last.get("val_acc"),
        "activation": activation[activation < 1].mean(),  # of the sparse epochs
        "hours": result["total_time_hours"],
        "train s": result.get("train_seconds"),
        "TFLOP": (last.get("total_flops_g", last.get("est_flops_g")) or float("nan")) / 1000,
        "est kJ": last.get("est_energy_kj"),
        "kJ": result.get("energy_kj"),
    }


def plot(runs: dict[str, dict[str, Any]], folder: Path) -> list[Path]:
    """One PNG a subject, every run a line; epochs without a value (the threshold of a dense one) are gaps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"--save-dir: cannot write to {folder}: {error.strerror}") from None
    written, names = [], labels(runs)
    for subject, (key, axis_label) in PLOTS.items():
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        for number, (name, result) in enumerate(runs.items()):
            history = result["training_history"]
            colour, style = WONG[number % len(WONG)], ("-", "--", ":", "-.")[number // len(WONG) % 4]
            values = pd.Series(history.get(key, []), dtype=float)
            epochs = history.get("epoch") or range(1, len(values) + 1)
            marker = "o" if len(values) < 30 else None
            text = names[name] + (" (estimated)" if subject == "energy" else "")
            axes.plot(list(epochs)[: len(values)], values, style, color=colour, marker=marker, ms=3, label=text)
            measured = pd.Series(history.get("energy_kj", []), dtype=float)
            if subject == "energy" and measured.notna().any():
                axes.plot(list(epochs), measured, style, color=colour, alpha=0.5, label=names[name] + " (NVML)")
            target = result.get("config", {}).get("ast", {}).get("target_activation")
            if subject == "activation" and target is not None:
                axes.axhline(target, color=colour, lw=0.7, alpha=0.5)
        axes.set(xlabel="epoch", ylabel=axis_label, title=axis_label.capitalize())
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
        written.append(folder / f"{subject}.png")
        figure.savefig(written[-1], dpi=150)
        plt.close(figure)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results-dir", default="results", type=Path, metavar="DIR", help="default: results")
    parser.add_argument("--plot", action="store_true", help="write accuracy, activation, threshold and energy plots")
    parser.add_argument("--save-dir", type=Path, metavar="DIR", help="for the plots (default: RESULTS_DIR/plots)")
    args = parser.parse_args(argv)
    runs, left_out = load_results(args.results_dir)
    if runs:
        with pd.option_context("display.width", None, "display.max_columns", None):
            print(table(runs).to_string(float_format=lambda value: f"{value:.4g}", na_rep="-"))
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    if args.plot and runs:
        for path in plot(runs, args.save_dir or args.results_dir / "plots"):
            print(f"plot: {path}")
    return 0 if runs else 2


if __name__ == "__main__":
    sys.exit(run_cli(main))
