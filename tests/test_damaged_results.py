"""Folders of results files, published ones and spoiled ones: read right, or left out by name.

The long form, `python -m pytest -n 0 -m long -s tests/test_damaged_results.py`, has 300 folders.
"""

import json
import os
import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from conftest import REPO
from damage import mutated
from helpers import analyze
from lab.study.results import ResultsFile, load_runs, spell

PUBLISHED = sorted(REPO.glob("results/published/cifar10_study_h100/*/final_results_*.json"))
VALUES = [None, True, -1, 0, 101.0, 1e300, 1e-300, 10**400, "90", "x", "=1+1", "\ud800", "<script>"]
VALUES += [[], {}, [[1]], [None], ["1"], [True], [1e300, 1], {"a": {"b": []}}]
VALUES += [float("nan"), float("inf"), -float("inf")]
FOREIGN = [b"[1, 2]", b"3", b"null", b"{}", b'"x"', b'{"best_accuracy": 3}']
FOREIGN += [b"[" * 10**5, b'{"a":' * 10**5, b"9" * 5000]
NAMES = """final_results_.json final_results_<b>.json final_results_\udcff.json other.json
    final_results_x.JSON""".split()
CONFIGS = [None, {}, [], 3, {"ast": {"mode": "ast"}}, {"ast": None}, {"lr": 0.1}]
CONFIGS += [{"dataset": {"type": "hf"}}]
KINDS = "bytes bytes values values values values end empty foreign rename config pipe".split()


def spoiled(result: dict, dice: random.Random) -> dict:
    """A results file's content with one to three values deep in it replaced, deleted or added."""
    for _ in range(dice.randint(1, 3)):
        part = result
        depth = dice.randint(0, 3)
        for _ in range(depth):
            inner = [
                value for value in (part.values() if isinstance(part, dict) else part) if value
            ]
            inner = [value for value in inner if isinstance(value, dict | list)]
            part = dice.choice(inner) if inner else part
        key = dice.choice(list(part)) if isinstance(part, dict) else dice.randrange(len(part))
        kind = dice.choice(["value", "value", "value", "delete", "add"])
        if kind == "value":
            part[key] = dice.choice(VALUES)
        elif kind == "delete":
            del part[key]
        elif isinstance(part, dict):
            part["new" + str(key)] = dice.choice(VALUES)
        if not result:
            break
    return result


def damage(path: Path, dice: random.Random) -> str:
    """Spoil a results file in one of many ways, and say in which."""
    data = path.read_bytes()
    kind = dice.choice(KINDS)
    if kind == "bytes":
        path.write_bytes(mutated(data, dice))
    elif kind == "values":
        path.write_text(json.dumps(spoiled(json.loads(data), dice)))
    elif kind == "end":
        path.write_bytes(data[: dice.randrange(len(data))])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "foreign":
        path.write_bytes(dice.choice(FOREIGN))
    elif kind == "rename":
        path.rename(path.parent / dice.choice([*NAMES, "final_results_ =1\n.json"]))
    elif kind == "config":
        path.write_text(json.dumps(json.loads(data) | {"config": dice.choice(CONFIGS)}))
    else:
        path.unlink()
        make = [
            path.mkdir,
            lambda: os.mkfifo(path),
            lambda: path.symlink_to("/dev/zero"),
            lambda: path.symlink_to("no"),
        ]
        dice.choice(make)()
    return kind


def check_reading(run: ResultsFile) -> None:
    """What was read is what stands in the file, by another reading of it."""
    result = json.loads(run.path.read_text())

    def same(value: object, read: float) -> bool:
        known = type(value) in (int, float) and np.isfinite(value)
        return np.isclose(read, value, rtol=1e-12) if known else np.isnan(read)

    history = result["training_history"]
    config = result.get("config") or {}
    assert same(result["best_accuracy"], run.figures["best_accuracy"])
    assert same(result.get("train_seconds"), run.figures["train_seconds"])
    final = result.get("final_accuracy", (history.get("val_acc") or [None])[-1])
    assert same(final, run.figures["final_accuracy"])
    assert not run.figures["final_accuracy"] > 100
    assert run.figures["epochs"] == result["epochs_completed"]
    assert run.history.keys() == history.keys()
    for key, values in history.items():
        assert len(values) == len(run.history[key])
        assert all(same(value, read) for value, read in zip(values, run.history[key], strict=True))
    for key in (
        "ast.mode",
        "ast.forget_rate",
        "ast.target_activation",
        "training.epochs",
        "dataset.label_noise",
    ):
        section, _, leaf = key.partition(".")
        part = config.get(section)
        if isinstance(part, dict) and leaf in part and "twin" not in result:
            assert run.settings[key] == spell(part[leaf])


def spoiled_folder(folder: Path, dice: random.Random, kinds: Counter) -> None:
    """Six published results of three groups, most of them spoiled."""
    folder.mkdir()
    for number, source in enumerate(dice.sample(PUBLISHED, 6)):
        path = folder / f"final_results_{number}.json"
        path.write_bytes(source.read_bytes())
        if number or dice.random() < 0.2:
            kinds[damage(path, dice)] += 1


def check_folder(folder: Path, outputs: Path, met: Counter) -> None:
    """Every file is a run that was read right, or left out by name; the table has all settings."""
    runs, left_out = load_runs([folder])
    assert len(runs) + len(left_out) == len(list(folder.glob("final_results_*.json")))
    for run in runs:
        check_reading(run)
    met["files accepted"] += len(runs)
    met["files left out"] += len(left_out)
    assert len(pd.read_csv(outputs / "t.csv")) == len({run.key for run in runs})


def try_folders(times: int, tmp_path: Path, capsys, report_each: int, plot_each: int) -> Counter:
    """No traceback, no hang, exit code 0 or 2. Returns how the folders ended, and what was spoiled.

    report_each, plot_each: every so-manieth folder gets a report, and figures.
    """
    dice = random.Random(0)
    met: Counter = Counter()
    for n in range(times):
        folder = tmp_path / str(n)
        outputs = tmp_path / f"{n}_out"
        spoiled_folder(folder, dice, met)
        args = ["--results-dir", folder, "--csv", outputs / "t.csv", "--latex", outputs / "t.tex"]
        args += ["--markdown", outputs / "t.md"]
        args += ["--report", outputs / "r.html"] if n % report_each == 0 else []
        args += ["--plot", "--save-dir", outputs / "plots"] if n % plot_each == 0 else []
        capsys.readouterr()
        started = time.process_time()
        code = analyze([*map(str, args)])
        err = capsys.readouterr().err
        assert time.process_time() - started < 20, n
        assert (code, err.count("\n")) in ((0, 0), (2, 1)), (n, code, err)
        met[f"exit code {code}"] += 1
        if code == 0:
            check_folder(folder, outputs, met)
    return met


def test_damaged_folders_of_results_are_read_right_or_refused(tmp_path, capsys):
    met = try_folders(4, tmp_path, capsys, report_each=4, plot_each=4)
    assert met["exit code 0"] > 0
    assert met["files accepted"] > 0
    assert met["files left out"] > 0


@pytest.mark.long
def test_three_hundred_damaged_folders_of_results(tmp_path, capsys):
    met = try_folders(300, tmp_path, capsys, report_each=3, plot_each=6)
    with capsys.disabled():
        print(f"\n300 folders: {dict(sorted(met.items()))}")
