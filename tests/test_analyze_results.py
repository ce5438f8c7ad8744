"""The command: what it prints and writes, how it refuses, and how long it takes."""

import json
import subprocess
import sys
import time

import pandas as pd
import pytest
from PIL import Image

from conftest import MINIMAL, REPO
from helpers import analyze, study_of, write_run
from lab.analysis.tables import text_table, verdict


@pytest.mark.parametrize(
    ("prepare", "args", "message"),
    [
        (lambda folder: None, [], "--results-dir: {folder}: no such folder"),
        (lambda folder: folder.mkdir(), [], "--results-dir: {folder}: no final_results_*.json in it"),
        (
            lambda folder: write_run(folder, "1").write_text('{"best_acc'),
            [],
            "nothing to compare: {folder}/final_results_1.json: not valid JSON: Unterminated string",
        ),
        (
            lambda folder: (
                write_run(folder, "1"),
                write_run(folder, "2", dataset__type="folder", dataset__val_dir="x"),
            ),
            [],
            "--results-dir: several datasets: digits (1 runs), folder:x (1 runs); choose one with --dataset",
        ),
        (
            lambda folder: write_run(folder, "1"),
            ["--baseline", "dense"],
            "--baseline: dense: none of the settings: ast",
        ),
        (lambda folder: write_run(folder, "1"), ["--dataset", "mnist"], "nothing to compare: "),
        (
            lambda folder: write_run(folder, "1"),
            ["--plot", "--save-dir", "/proc/plots"],
            "--save-dir: cannot write to /proc/plots",
        ),
        (
            lambda folder: write_run(folder, "1"),
            ["--csv", "/proc/x/table.csv"],
            "--csv: cannot write to /proc/x/table.csv",
        ),
        (lambda folder: write_run(folder, "1"), ["--csv", "."], "--csv: cannot write to .: it is a folder"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(prepare, args, message, tmp_path, capsys):
    folder = tmp_path / "results"
    prepare(folder)
    before = sorted(tmp_path.rglob("*"))
    assert analyze(["--results-dir", str(folder), "--markdown", str(tmp_path / "table.md"), *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: " + message.format(folder=folder))
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written


def test_command_prints_the_table_and_writes_tables_and_figures(results, tmp_path, capsys):
    paths = {kind: tmp_path / f"out/table.{kind}" for kind in ("csv", "markdown", "latex")}
    flags = [text for kind, path in paths.items() for text in (f"--{kind}", str(path))]
    plots = tmp_path / "plots"
    assert analyze(["--results-dir", str(results), *flags, "--plot", "--save-dir", str(plots)]) == 0
    printed = capsys.readouterr().out
    study = study_of(results)
    table = text_table(study)
    for cell in table.to_numpy().ravel():
        assert cell in printed
    assert f"left out: {results}/final_results_20200101_000001.json: not valid JSON" in printed
    assert verdict(study) in printed
    csv = pd.read_csv(paths["csv"]).set_index("setting")
    assert csv["final_mean"].to_dict() == pytest.approx(study.table["final_mean"].to_dict(), abs=1e-12)
    rows = [line.strip("|").split("|") for line in paths["markdown"].read_text().splitlines()]
    assert [[cell.strip() for cell in row] for row in rows[2:]] == table.to_numpy().tolist()
    latex = paths["latex"].read_text()
    assert latex.count("\\\\") == len(table) + 1
    assert "20200101\\_000000 & 1 & 71.50" in latex
    names = ["accuracy", "accuracy_by_time", "activation", "energy", "frontier_energy", "frontier_time", "samples"]
    names += ["threshold"]
    assert sorted(path.name for path in plots.iterdir()) == sorted(
        f"{name}.{kind}" for name in names for kind in ("png", "svg")
    )
    for path in plots.glob("*.png"):
        with Image.open(path) as image:
            assert image.size[0] >= 800
            assert len(image.convert("RGB").getcolors(10**6)) > 50  # lines, text and anti-aliasing: not blank
    assert all(path.read_text().rstrip().endswith("</svg>") for path in plots.glob("*.svg"))


def test_a_thousand_files_are_quick(tmp_path):
    """Time and memory of the command over 1,000 files of 100 epochs, in a process of its own."""
    text = write_run(tmp_path, "0000", [50 + i / 3 for i in range(100)], training__epochs=100).read_text()
    for number in range(1000):
        result = json.loads(text)
        result["seed"], result["config"]["ast"]["kp"] = number % 5, 1 + number // 5
        (tmp_path / f"final_results_{number:04}.json").write_text(json.dumps(result, indent=2))
    program = "import sys, analyze_results; code = analyze_results.main(sys.argv[1:]);"
    program += "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]);"  # maxrss would be the parent's
    program += "print('torch' in sys.modules); sys.exit(code)"
    command = [sys.executable, "-c", program, "--results-dir", str(tmp_path), "--csv", str(tmp_path / "table.csv")]
    started = time.monotonic()
    done = subprocess.run(command, cwd=REPO / "scripts", capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 10
    *_, kilobytes, has_torch = done.stdout.split()
    assert int(kilobytes) < 2**20
    assert has_torch == "False"
    table = pd.read_csv(tmp_path / "table.csv")
    assert (len(table), table["n"].sum()) == (200, 1000)


def test_a_reader_who_has_seen_enough_is_no_error(tmp_path):
    for number in range(400):
        write_run(tmp_path, f"final_results_{number}.json", training__lr=1.0 + number)
    command = f"{sys.executable} scripts/analyze_results.py --results-dir {tmp_path} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=REPO, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def figures_in(tmp_path, monkeypatch, **variables):
    """The command with plots and a page, in a process with these variables; it must say nothing on stderr."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for number in range(2):
        write_run(tmp_path, str(number), training__seed=number, ast__threshold_unit="表示 $x_{")
    args = ["--plot", "--save-dir", str(tmp_path / "plots"), "--report", str(tmp_path / "page.html")]
    command = [sys.executable, REPO / "scripts/analyze_results.py", "--results-dir", str(tmp_path), *args]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list((tmp_path / "plots").iterdir())) == 16
    return (tmp_path / "plots" / "accuracy.png").read_bytes()


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense", "TkAgg"])
def test_the_backend_of_a_notebook_is_no_matter(backend, tmp_path, monkeypatch):
    figures_in(tmp_path, monkeypatch, MPLBACKEND=backend)


def test_the_settings_of_a_user_change_nothing(tmp_path, monkeypatch):
    """Neither those of the working directory nor those that a variable names; and no glyph is missed aloud."""
    plain = figures_in(tmp_path / "plain", monkeypatch)
    settings = "text.usetex: True\nfigure.facecolor: red\nbackend: nonsense\nno.such.key: 1\naxes.prop_cycle: x\n"
    (tmp_path / "matplotlibrc").write_text(settings)
    (tmp_path / "cwd").mkdir()
    (tmp_path / "cwd" / "matplotlibrc").write_text(settings)
    assert figures_in(tmp_path / "variable", monkeypatch, MATPLOTLIBRC=str(tmp_path / "matplotlibrc")) == plain
    assert figures_in(tmp_path / "cwd", monkeypatch) == plain


@pytest.mark.parametrize("start", ["=", "+", "-", "@"])
def test_no_text_of_a_table_is_a_formula(start, tmp_path, capsys):
    write_run(tmp_path, f"{start}1+1").write_text(json.dumps(MINIMAL))
    write_run(tmp_path, "2", seconds=90.0)
    assert analyze(["--results-dir", str(tmp_path), "--csv", str(tmp_path / "t.csv")]) == 0
    table = pd.read_csv(tmp_path / "t.csv", dtype=str, keep_default_na=False)
    assert f"'{start}1+1" in set(table["setting"])
    assert all(float(value) for value in table["final_mean"])
