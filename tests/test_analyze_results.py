"""The command: what it prints and writes, how it refuses, and how long it takes."""

import json
import re
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from conftest import MINIMAL, REPO
from helpers import analyze, studies_of, write_run
from lab.base.errors import RequestError
from lab.study.analysis.tables import text_table, verdict


@pytest.mark.parametrize(
    ("prepare", "args", "message"),
    [
        (lambda folder: None, [], "--results-dir: {folder}: no such folder"),
        (
            lambda folder: folder.mkdir(),
            [],
            "--results-dir: {folder}: no final_results_*.json in it",
        ),
        (
            lambda folder: write_run(folder, "1").write_text('{"best_acc'),
            [],
            "nothing to compare: {folder}/final_results_1.json: not valid JSON: "
            "Unterminated string",
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
        (
            lambda folder: write_run(folder, "1"),
            ["--csv", "."],
            "--csv: cannot write to .: it is a folder",
        ),
        (
            lambda folder: write_run(folder, "1"),
            ["--frontier", "frontier.pdf"],
            "--frontier: expected a file that ends in .png or .svg, got frontier.pdf",
        ),
        (
            lambda folder: write_run(folder, "1"),
            ["--same-data", "CIFAR"],
            "--same-data: CIFAR: expected NAME=DIR,DIR",
        ),
        (
            lambda folder: write_run(folder, "1"),
            ["--same-data", "CIFAR=elsewhere"],
            "--same-data: elsewhere: not in --results-dir",
        ),
        (
            lambda folder: write_run(folder, "1"),
            ["--same-data", "one={folder}", "two={folder}"],
            "--same-data: {folder}: two names",
        ),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(prepare, args, message, tmp_path, capsys):
    folder = tmp_path / "results"
    prepare(folder)
    before = sorted(tmp_path.rglob("*"))
    args = [text.format(folder=folder) for text in args]
    asked = ["--results-dir", str(folder), "--markdown", str(tmp_path / "table.md"), *args]
    assert analyze(asked) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: " + message.format(folder=folder))
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written


def test_runs_on_the_same_pictures_are_compared_wherever_these_were(tmp_path, capsys):
    """Two folders of pictures are two groups, each with its panel; by a name they are one."""
    for place, mode in (("here", "ast"), ("there", "dense")):
        keys = {"dataset__type": "folder", "dataset__val_dir": place, "ast__mode": mode}
        write_run(tmp_path / place, mode, (50.0, 60.0, 70.0), **keys)
    folders = [str(tmp_path / place) for place in ("here", "there")]
    figure = tmp_path / "frontier.svg"
    asked = ["--results-dir", *folders, "--frontier", str(figure)]
    assert analyze(asked) == 0
    assert "2 comparison groups: nothing is compared" in capsys.readouterr().out
    drawn = figure.read_text()
    assert "folder:here" in drawn
    assert "folder:there" in drawn
    assert analyze([*asked, "--same-data", f"cats={','.join(folders)}"]) == 0
    printed = capsys.readouterr().out
    assert "comparison groups" not in printed
    assert "difference: in points, against dense" in printed
    assert "training time: cats" in figure.read_text()


def test_the_same_pictures_are_apart_where_a_config_is_damaged_or_validates_on_others(
    tmp_path, capsys
):
    keys = {"dataset__type": "folder", "dataset__cache": "disk"}
    for number, more in enumerate([{"image_size": "wide"}, {"val_fraction": 0.1}, {}]):
        write_run(tmp_path, str(number), **keys, **{f"dataset__{k}": v for k, v in more.items()})
    assert analyze(["--results-dir", str(tmp_path), "--same-data", f"cats={tmp_path}"]) == 0
    assert "3 comparison groups: nothing is compared" in capsys.readouterr().out


def test_command_prints_the_table_and_writes_tables_and_figures(results, tmp_path, capsys):
    paths = {kind: tmp_path / f"out/table.{kind}" for kind in ("csv", "markdown", "latex")}
    flags = [text for kind, path in paths.items() for text in (f"--{kind}", str(path))]
    plots = tmp_path / "plots"
    assert analyze(["--results-dir", str(results), *flags, "--plot", "--save-dir", str(plots)]) == 0
    printed = capsys.readouterr().out
    studies = studies_of(results)
    study, _ = studies.values()
    tables = [text_table(each) for each in studies.values()]
    for cell in np.concatenate([table.to_numpy().ravel() for table in tables]):
        assert cell in printed
    assert f"left out: {results}/final_results_20200101_000001.json: not valid JSON" in printed
    assert verdict(study) in printed
    assert all(f"== {title}\n" in printed for title in studies)
    csv = pd.read_csv(paths["csv"]).set_index("setting")
    for title, each in studies.items():
        own = csv[csv["group"] == title]
        assert own["final_mean"].to_dict() == pytest.approx(
            each.table["final_mean"].to_dict(), abs=1e-12
        )
    lines = paths["markdown"].read_text().splitlines()
    assert [line for line in lines if line.startswith("#")] == [f"## {title}" for title in studies]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("| ")
    ]
    assert [row for row in rows if row[0] not in ("setting", "---")] == [
        row for table in tables for row in table.to_numpy().tolist()
    ]
    latex = paths["latex"].read_text()
    assert latex.count("\\\\") == sum(len(table) + 2 for table in tables)
    assert "20200101\\_000000 & 1 & 71.50" in latex
    names = [
        "accuracy",
        "accuracy_by_time",
        "activation",
        "frontier_time",
        "samples",
        "threshold",
    ]  # of energy nothing is known without a GPU
    assert len(list(plots.iterdir())) == 2  # a folder a group
    folders = [{path.name for path in folder.iterdir()} for folder in plots.iterdir()]
    assert {f"{name}.{kind}" for name in names for kind in ("png", "svg")} in folders
    assert min(map(len, folders)) < 12  # what the documented keys alone do not say is not drawn
    for path in plots.glob("*/*.png"):
        with Image.open(path) as image:
            assert image.size[0] >= 800
            assert (
                len(image.convert("RGB").getcolors(10**6)) > 50
            )  # lines, text and anti-aliasing: not blank
    assert all(path.read_text().rstrip().endswith("</svg>") for path in plots.glob("*/*.svg"))


def test_clean_and_noisy_runs_together_are_two_tables(tmp_path, capsys):
    """Noisy data is harder: a clean run of one seed must not be its baseline, nor the other way
    round.
    """
    for seed in range(2):
        write_run(tmp_path, f"c{seed}", (1.0, 95.0 + seed), ast__mode="dense", training__seed=seed)
        noisy = {"dataset__label_noise": 0.2, "training__seed": seed}
        write_run(tmp_path, f"n{seed}", (1.0, 80.0 + seed), ast__mode="dense", **noisy)
        write_run(tmp_path, f"s{seed}", (1.0, 90.0 + seed), **noisy)
    page = tmp_path / "page.html"
    csv = tmp_path / "table.csv"
    assert analyze(["--results-dir", str(tmp_path), "--report", str(page), "--csv", str(csv)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        "2 comparison groups: nothing is compared across them.\n\n== digits, resnet18\n"
    )
    assert "ast has the highest final accuracy: 90.50 ± 6.35 % (2 seeds)." in printed
    assert "It beats dense by 10.00 ± 3.04 points." in printed
    table = pd.read_csv(csv)
    assert table.groupby("group")["baseline"].unique().str.join(" ").tolist() == ["dense", "dense"]
    assert table.loc[table["setting"] == "ast", "best_dense"].tolist() == [10.0]
    text = page.read_text()
    assert text.count('<h1 class="group">') == 2
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    with pytest.raises(
        RequestError, match="--baseline: random: none of the settings: dense, ast, dense"
    ):
        studies_of(tmp_path, baseline="random")


@pytest.mark.parametrize(
    "spoil",
    ["no accuracy", "foreign config", pytest.param("no runs' config", marks=pytest.mark.long)],
)
def test_what_is_missing_is_a_dash(spoil, tmp_path, capsys):
    result = json.loads(write_run(tmp_path, "1").read_text())
    if spoil == "no accuracy":
        result["training_history"]["val_acc"] = [None, None, None]
        result |= {"best_accuracy": None, "final_accuracy": None}
    else:
        result["config"] = {"ast": {"mode": "ast"}} if spoil == "foreign config" else None
    (tmp_path / "final_results_1.json").write_text(json.dumps(result))
    plots = [
        "--plot",
        "--save-dir",
        str(tmp_path / "plots"),
        "--report",
        str(tmp_path / "page.html"),
    ]
    assert analyze(["--results-dir", str(tmp_path), *plots]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    said = "No run has an accuracy." if spoil == "no accuracy" else "listed, not compared"
    assert said in out
    assert len(list((tmp_path / "plots").glob("*.png"))) == (3 if spoil == "no accuracy" else 6)
    head, row = out.splitlines()[:2]
    assert head.split()[:4] == ["setting", "n", "final", "%"]
    assert row.split()[1:3] == (["0", "-"] if spoil == "no accuracy" else ["1", "70.00"])


def test_what_is_no_text_is_shown_as_a_question_mark(tmp_path, capsys):
    half = "\ud800"  # of a surrogate pair
    path = write_run(
        tmp_path, "1", dataset__type=f"x{half}", extra={"environment": {"gpu": half, half: half}}
    )
    path.rename(
        tmp_path / "final_results_\udcff\n.json"
    )  # a name of bytes that are no text, with a line break
    write_run(tmp_path, "2", ast__mode=half, training__seed=1)
    outputs = [
        "--csv",
        str(tmp_path / "t.csv"),
        "--report",
        str(tmp_path / "r.html"),
        "--latex",
        str(tmp_path / "t.tex"),
    ]
    assert analyze(["--results-dir", str(tmp_path), *outputs]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "== x?, resnet18" in out
    assert pd.read_csv(tmp_path / "t.csv", keep_default_na=False)["machine"].tolist() == [
        "null",
        "?",
    ]
    assert "final_results_? .json" in (tmp_path / "r.html").read_text()


def test_a_thousand_files_are_quick(tmp_path):
    """Time and memory of the command over 1,000 files of 100 epochs, in a process of its own."""
    text = write_run(
        tmp_path, "0000", [50 + i / 3 for i in range(100)], training__epochs=100
    ).read_text()
    for number in range(1000):
        result = json.loads(text)
        result["seed"] = number % 5
        result["config"]["ast"]["kp"] = 1 + number // 5
        (tmp_path / f"final_results_{number:04}.json").write_text(json.dumps(result, indent=2))
    program = "import sys, analyze_results; code = analyze_results.main(sys.argv[1:]);"
    # maxrss would be the parent's
    program += "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]);"
    program += "print('torch' in sys.modules); sys.exit(code)"
    command = [
        sys.executable,
        "-c",
        program,
        "--results-dir",
        str(tmp_path),
        "--csv",
        str(tmp_path / "table.csv"),
    ]
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
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=REPO, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def figures_in(tmp_path, monkeypatch, **variables):
    """The command with plots and a page, in a process with these variables; it must say nothing on
    stderr.
    """
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for number in range(2):
        write_run(tmp_path, str(number), training__seed=number, ast__threshold_unit="表示 $x_{")
    args = [
        "--plot",
        "--save-dir",
        str(tmp_path / "plots"),
        "--report",
        str(tmp_path / "page.html"),
    ]
    command = [
        sys.executable,
        REPO / "scripts/analyze_results.py",
        "--results-dir",
        str(tmp_path),
        *args,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list((tmp_path / "plots").iterdir())) == 12
    return (tmp_path / "plots" / "accuracy.png").read_bytes()


@pytest.mark.parametrize(
    "backend",
    [
        "module://matplotlib_inline.backend_inline",
        pytest.param("nonsense", marks=pytest.mark.long),
        pytest.param("TkAgg", marks=pytest.mark.long),
    ],
)
def test_the_backend_of_a_notebook_is_no_matter(backend, tmp_path, monkeypatch):
    figures_in(tmp_path, monkeypatch, MPLBACKEND=backend)


@pytest.mark.long
def test_the_settings_of_a_user_change_nothing(tmp_path, monkeypatch):
    """Neither those of the working directory nor those that a variable names; and no glyph is
    missed aloud.
    """
    plain = figures_in(tmp_path / "plain", monkeypatch)
    settings = (
        "text.usetex: True\nfigure.facecolor: red\nbackend: nonsense\nno.such.key: "
        "1\naxes.prop_cycle: x\n"
    )
    (tmp_path / "matplotlibrc").write_text(settings)
    (tmp_path / "cwd").mkdir()
    (tmp_path / "cwd" / "matplotlibrc").write_text(settings)
    assert (
        figures_in(tmp_path / "variable", monkeypatch, MATPLOTLIBRC=str(tmp_path / "matplotlibrc"))
        == plain
    )
    assert figures_in(tmp_path / "cwd", monkeypatch) == plain


def test_results_of_earlier_days_are_compared_and_keep_their_names(tmp_path, capsys):
    folder = REPO / "results/published/cifar10_study_h100/noise"
    assert analyze(["--results-dir", str(folder), "--csv", str(tmp_path / "t.csv")]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("left out: ") == 1  # one was interrupted
    assert printed.err == ""
    table = pd.read_csv(tmp_path / "t.csv")
    assert len(table) == 9
    assert "ast target_activation=0.8 explore=0.05 anneal_epochs=0 epochs=50" in set(
        table["setting"]
    )


@pytest.mark.parametrize("start", ["=", "+", "-", "@"])
def test_no_text_of_a_table_is_a_formula(start, tmp_path, capsys):
    write_run(tmp_path, f"{start}1+1").write_text(json.dumps(MINIMAL))
    write_run(tmp_path, "2", seconds=90.0)
    assert analyze(["--results-dir", str(tmp_path), "--csv", str(tmp_path / "t.csv")]) == 0
    table = pd.read_csv(tmp_path / "t.csv", dtype=str, keep_default_na=False)
    assert f"'{start}1+1" in set(table["setting"])
    assert all(float(value) for value in table["final_mean"])
