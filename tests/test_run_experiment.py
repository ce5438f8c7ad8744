"""The single runner: flags, overrides, dry runs, exit codes, secrets."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

import analyze_results
import benchmark
import download_imagenette
import evaluate
import export
import run_experiment
import run_sweep
import train_ast
from conftest import REPO
from helpers import run_digits
from lab.base.errors import RequestError
from lab.config.loading import SECTIONS
from lab.study.cli import run_cli
from lab.study.results import dense_step_ms, read_history, settings_of
from runs import command
from train_ast import load_config

SCRIPT = "scripts/run_experiment.py"
CONFIG = str(REPO / "configs/digits_smoke.yaml")


def test_dry_run_prints_the_resolved_config(capsys):
    flags = [
        "--epochs",
        "7",
        "--target-activation",
        "0.3",
        "--lr",
        "1e-3",
        "--batch-size",
        "8",
        "--seed",
        "5",
    ]
    flags += [
        "--max-minutes",
        "2.5",
        "--output-dir",
        "out",
        "ast.pack=false",
        "--dry-run",
        "training.weight_decay=0.02",
    ]
    assert run_experiment.main(["--config", CONFIG, *flags]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    overrides = [
        "training.epochs=7",
        "ast.target_activation=0.3",
        "training.lr=0.001",
        "training.batch_size=8",
    ]
    overrides += [
        "training.seed=5",
        "training.max_minutes=2.5",
        "logging.output_dir=out",
        "ast.pack=false",
    ]
    expected = load_config(CONFIG, [*overrides, "training.weight_decay=0.02"])
    assert printed == expected.model_dump()


def shown_by(main, flag, capsys):
    with pytest.raises(SystemExit) as left:
        main([flag])
    assert left.value.code == 0
    return capsys.readouterr().out


def test_help_fits_a_screen_and_the_keys_have_their_own(capsys):
    for command_ in (
        run_experiment,
        run_sweep,
        analyze_results,
        benchmark,
        evaluate,
        export,
        download_imagenette,
        train_ast,
    ):
        lines = shown_by(command_.main, "--help", capsys).splitlines()
        assert len(lines) <= 45, command_
        assert max(map(len, lines)) <= 80, command_  # a terminal's width
    assert all(
        word in shown_by(run_experiment.main, "--help", capsys)
        for word in [*run_experiment.FLAGS, "--dry-run"]
    )
    for command_ in (run_experiment, evaluate, train_ast):
        lines = shown_by(command_.main, "--help-config", capsys).splitlines()
        assert [line for line in lines if line in SECTIONS] == list(SECTIONS)
        assert "imports (default none)" in lines
        assert "  ast.target_activation (default 0.25)" in lines
        assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["ast.target_activaton=0.3"],
            "ast.target_activaton: unknown key; did you mean ast.target_activation?",
        ),
        (["--epochs", "ten"], "training.epochs: expected a valid integer, got 'ten'"),
        (["model.name=resnt50"], "model.name: no model 'resnt50'"),
        (["dataset.num_classes=11"], "dataset.num_classes: 11, but the data has 10 classes"),
        (
            ["dataset.type=folder", "dataset.train_dir=/no", "dataset.val_dir=/no"],
            "dataset.train_dir: /no",
        ),
    ],
)
def test_a_wrong_request_is_exit_code_2_and_one_line(args, message, capsys, tmp_path):
    code = run_cli(
        lambda: run_experiment.main(["--config", CONFIG, "--output-dir", str(tmp_path), *args])
    )
    captured = capsys.readouterr()
    assert code == 2
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_missing_config_as_a_command():
    done = command([SCRIPT, "--config", "configs/nowhere.yaml"])
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: configs/nowhere.yaml: cannot read the config: No such file or directory\n"
    )


@pytest.mark.parametrize(
    "variable",
    [
        {"HF_ENDPOINT": "http://127.0.0.1:9"},
        pytest.param({"HF_HUB_OFFLINE": "1"}, marks=pytest.mark.long),
    ],
)
def test_a_hub_that_does_not_answer_is_one_line_within_seconds(variable, tmp_path):
    """Of a data set and of weights. The hub's library reads the environment when it is imported, so
    these are the requests of a fresh process.
    """
    requests = [
        [CONFIG, "model.name=resnet10t", "model.pretrained=true"],
        ["configs/cifar10_resnet18_fast.yaml"],
    ]
    program = "import json, sys, time, run_experiment, train_ast\n"
    program += "from lab.study.cli import run_cli\n"
    program += "for arguments in json.loads(sys.argv[1]):\n"
    program += "    started = time.monotonic()\n"
    program += "    print(run_cli(lambda: run_experiment.main(['--config', *arguments])))\n"
    program += "    assert time.monotonic() - started < 20\n"
    requests = [[*each, "--output-dir", str(tmp_path)] for each in requests]
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(requests)],
        cwd=REPO,
        env=os.environ | variable | {"PYTHONPATH": str(REPO / "scripts")},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ["2", "2"], done.stderr
    weights, data = done.stderr.splitlines()
    assert weights.startswith("error: model.pretrained: ")
    assert "network" in weights
    assert data.startswith("error: dataset.name: cannot load 'uoft-cs/cifar10'")
    assert "check the name, subset and revision, the network" in data


def test_a_failed_run_is_exit_code_1(tmp_path):
    args = [
        "ast.mode=dense",
        "training.lr=1e20",
        "training.optimizer=sgd",
        "--output-dir",
        tmp_path,
    ]
    done = command([SCRIPT, "--config", CONFIG, *args])
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: non-finite loss in epoch 1, step")
    assert len(list(tmp_path.glob("final_results_*.json"))) == 1


def test_secrets_of_the_environment_stay_out_of_the_results(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_planted_secret")
    quick = [
        "training.epochs=2",
        "ast.warmup_epochs=1",
        "dataset.max_train_samples=64",
        "--output-dir",
        tmp_path,
    ]
    done = command([SCRIPT, "--config", CONFIG, *quick])
    assert done.returncode == 0, done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"last.pt", "best.pt"} < {path.name for path in files}
    written = b"".join(path.read_bytes() for path in files) + (done.stdout + done.stderr).encode()
    assert b"planted" not in written


SMALL = [
    "dataset.max_train_samples=512",
    "training.epochs=4",
    "ast.warmup_epochs=1",
    "training.lr_warmup_epochs=1",
]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_dense_twin_has_the_sparse_runs_time_and_both_name_each_other(processes, tmp_path):
    options = [
        "--output-dir",
        tmp_path,
        f"logging.jsonl_path={tmp_path}/log.jsonl",
        "training.device=cpu",
    ]
    done = command(
        [SCRIPT, "--config", CONFIG, "--nproc", processes, "--dense-twin", *SMALL, *options]
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    assert printed.count("verdict: ") == 1
    names = [
        Path(line.removeprefix("results: ")).name
        for line in printed.splitlines()
        if line.startswith("results: ")
    ]
    sparse, dense = (json.loads((tmp_path / name).read_text()) for name in names)
    assert [sparse["twin"], dense["twin"]] == names[::-1]
    assert len(list(tmp_path.glob("final_results_*.json"))) == 2
    assert dense["config"]["training"]["max_minutes"] == sparse["train_seconds"] / 60
    assert dense["status"] == "completed"
    budget = sparse["train_seconds"]
    seconds = [0.0, *dense["training_history"]["train_seconds"]]
    assert (
        seconds[-2] < budget <= seconds[-1] == dense["train_seconds"]
    )  # no epoch begun after its time
    assert dense["training_history"]["lr"][-1] < 0.003 * 0.05
    assert dense["ledger"]["scored"] == 0
    changed = {
        f"{section}.{key}"
        for section, part in sparse["config"].items()
        for key, value in part.items()
        if value != dense["config"][section][key]
    }
    assert changed == {"ast.mode", "logging.jsonl_path"} | {
        f"training.{key}" for key in ("epochs", "lr_decay", "lr_warmup_epochs", "max_minutes")
    }
    lead = sparse["final_accuracy"] - dense["final_accuracy"]
    verdict = re.fullmatch(
        r"verdict: (.*): ast (\S+) % in (\S+) s, its dense twin (\S+) % in (\S+) s of training",
        printed.splitlines()[-1],
    )
    shares = [each["final_accuracy"] / 100 for each in (sparse, dense)]
    noise = 196 * (sum(share * (1 - share) for share in shares) / 360) ** 0.5
    words = (
        f"level: {lead:+.2f} points, and 360 validation pictures resolve no less than {noise:.2f}"
    )
    words = (
        words
        if abs(lead) <= noise
        else f"{'ast' if lead > 0 else 'dense'} wins by {abs(lead):.2f} points"
    )
    steps = [
        dense_step_ms(read_history(each["training_history"]), settings_of(each))
        for each in (sparse, dense)
    ]
    if max(steps) > 1.1 * min(steps):  # other work on this machine
        words = void_words(*sorted(steps))
    accuracies = [f"{each['final_accuracy']:.2f}" for each in (sparse, dense)]
    seconds = [f"{each['train_seconds']:.1f}" for each in (sparse, dense)]
    assert verdict.groups() == (words, accuracies[0], seconds[0], accuracies[1], seconds[1])


def void_words(fast, slow):
    return (
        f"void: dense steps took {fast:.4g} ms in one run and {slow:.4g} ms in the other, so the "
        f"same time was not the same work"
    )


@pytest.mark.parametrize(("slow", "void"), [(26.0, True), (10.9, False)])
def test_nobody_wins_where_the_machine_was_busy_in_one_of_the_two_runs(slow, void):
    config = load_config(CONFIG, ["training.epochs=4", "ast.warmup_epochs=2"]).model_dump()
    history = {"activation_rate": [1.0, 1.0, 0.25, 0.25], "step_time_ms": [40.0, slow, 7.0, 7.0]}
    runs = [
        {"final_accuracy": each, "train_seconds": 1.0, "config": config, "training_history": steps}
        for each, steps in ((95.0, history), (90.0, {"activation_rate": [1.0] * 4}))
    ]
    runs[0]["classes"] = {"val_samples": [10_000]}
    runs[1]["training_history"]["step_time_ms"] = [30.0, 10.0, 10.0, 10.0]
    runs[1]["config"] = config | {"ast": config["ast"] | {"mode": "dense"}}
    words = void_words(10, slow) if void else "ast wins by 5.00 points"
    assert run_experiment.verdict(*runs).startswith(f"verdict: {words}: ast 95.00 % in 1.0 s, ")


def test_a_twin_warms_up_for_the_same_share_of_its_time():
    config = load_config(CONFIG, SMALL)
    twin = run_experiment.time_matched_baseline(config, 90.0)
    assert (twin.training.max_minutes, twin.ast.mode) == (1.5, "dense")
    shares = [each.training.lr_warmup_epochs / each.training.epochs for each in (config, twin)]
    assert shares[0] == shares[1] == 0.25
    assert twin.training.epochs >= 100


def test_a_dense_twin_needs_a_sparse_run_that_ended(tmp_path, capsys):
    args = ["--config", CONFIG, "--dense-twin", "--output-dir", str(tmp_path)]
    assert run_cli(lambda: run_experiment.main([*args, "ast.mode=dense"])) == 2
    assert (
        capsys.readouterr().err
        == "error: --dense-twin: ast.mode is dense; a twin is of a sparse or random run\n"
    )
    log = tmp_path / "log.jsonl"

    def interrupt():
        deadline = time.monotonic() + 60
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert (
        run_cli(
            lambda: run_experiment.main([*args, "--epochs", "100000", f"logging.jsonl_path={log}"])
        )
        == 130
    )
    (path,) = tmp_path.glob("final_results_*.json")
    assert "twin" not in json.loads(path.read_text())


@pytest.mark.parametrize(
    ("flags", "named"),
    [(["--nproc", "0"], "--nproc"), (["--nproc", "2", "--max-restarts", "-1"], "--max-restarts")],
)
def test_processes_that_cannot_be_started_are_refused(flags, named):
    with pytest.raises(RequestError, match=named):
        run_experiment.main(["--config", str(REPO / "configs" / "digits_smoke.yaml"), *flags])


def test_processes_get_the_config_its_overrides_and_what_to_resume(monkeypatch):
    got = []
    monkeypatch.setattr(run_experiment, "launch", lambda *arguments: got.append(arguments) or 0)
    config = str(REPO / "configs" / "digits_smoke.yaml")
    flags = ["--epochs", "5", "--nproc", "2"]
    assert run_experiment.main(["--config", config, *flags, "training.lr=0.1"]) == 0
    assert run_experiment.main(["--config", config, *flags, "--max-restarts", "3"]) == 0
    assert (
        run_experiment.main(["--config", config, *flags, "--dense-twin", "--resume", "x.pt"]) == 0
    )
    script = REPO / "scripts" / "run_experiment.py"
    assert got == [
        (script, 2, 0, ["--config", config, "training.lr=0.1", "training.epochs=5"]),
        (script, 2, 3, ["--config", config, "--resume", "auto", "training.epochs=5"]),
        (
            script,
            2,
            0,
            ["--config", config, "--resume", "x.pt", "--dense-twin", "training.epochs=5"],
        ),
    ]


def results_of(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("final_results_*.json"))]


@pytest.mark.parametrize("min_active", [0, 2])
def test_an_epoch_that_chooses_nobody_ends_like_any_other(min_active, tmp_path):
    """The floor of `ast.min_active` holds for it; without one nothing is trained on."""
    request = [
        "ast.scoring=history",
        "ast.explore=0",
        "ast.initial_threshold=100",
        f"ast.min_active={min_active}",
    ]
    network = [
        "model.name=test_vit",
        "dataset.image_size=32",
    ]  # without BatchNorm, which refuses min_active=0
    assert run_digits(tmp_path, *request, *network, "training.epochs=3") == 0
    (result,) = results_of(tmp_path)
    history = result["training_history"]
    assert result["status"] == "completed"
    assert history["activation_rate"][1] == 0
    assert history["samples_trained"][1] == min_active
    assert (history["step_time_ms"][1] is None) == (min_active == 0)
    assert len(history["val_acc"]) == 3


@pytest.mark.parametrize("decay", ["time", "epochs"])
def test_a_run_without_time_for_a_step_ends_in_peace(decay, tmp_path, capsys):
    assert run_digits(tmp_path, f"training.lr_decay={decay}", "training.max_minutes=1e-9") == 0
    (result,) = results_of(tmp_path)
    assert (result["status"], result["final_accuracy"], result["ledger"]["trained"]) == (
        "time_capped",
        None,
        0,
    )
    assert "time_capped" in capsys.readouterr().out


def test_without_the_environment_one_line_says_what_is_missing():
    """An interpreter that sees no installed package."""
    done = subprocess.run(
        [sys.executable, "-E", "-S", SCRIPT, "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: package \w+ is missing: source \.venv/bin/activate, or .*\n", done.stderr
    )


def test_no_verdict_on_a_run_without_an_accuracy(tmp_path, capsys):
    assert run_digits(tmp_path, "--dense-twin", "training.max_minutes=0.0001") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "verdict: none: training.max_minutes=0.0001 left no time for an epoch"


def test_what_is_finished_is_neither_resumed_nor_trained_again_beside_its_twin(tmp_path, capsys):
    small = ["--output-dir", str(tmp_path), "dataset.max_train_samples=128", "training.epochs=2"]
    small += ["ast.warmup_epochs=1", "training.lr_warmup_epochs=1", "training.device=cpu"]

    def run(*more):
        assert run_cli(lambda: run_experiment.main(["--config", CONFIG, *small, *more])) == 0
        return capsys.readouterr().out, sorted(tmp_path.glob("final_results_*.json"))

    said, (result,) = run()
    before = result.read_bytes()
    said, files = run("--resume", "auto")
    assert said == f"this run is finished: {result}; without --resume it is trained again\n"
    assert (files, result.read_bytes()) == ([result], before)
    said, files = run("--dense-twin")
    assert f"note: the ast run is there, and is not trained again: {result}\n" in said
    assert said.count("verdict: ") == 1
    assert len(files) == 2
    again, _ = run("--dense-twin")
    assert again.splitlines()[-1] == said.splitlines()[-1]
    assert again.count("is not trained again") == 2
    assert len(run()[1]) == 3  # without --resume it is


@pytest.mark.parametrize(
    ("accuracies", "pictures", "words"),
    [
        (
            (45.4545, 54.5454),
            11,
            "level: -9.09 points, and 11 validation pictures resolve no less than 41.61",
        ),
        ((91.0, 90.0), 10_000, "ast wins by 1.00 points"),
        (
            (90.0, 90.8),
            10_000,
            "level: -0.80 points, and 10,000 validation pictures resolve no less than 0.82",
        ),
        (
            (100.0, 100.0),
            360,
            "level: +0.00 points, and 360 validation pictures resolve no less than 0.00",
        ),
    ],
)
def test_a_verdict_needs_more_than_a_few_pictures(accuracies, pictures, words):
    runs = [
        {"final_accuracy": each, "train_seconds": 1.0, "config": {"ast": {"mode": "ast"}}}
        for each in accuracies
    ]
    runs[0]["classes"] = {"val_samples": [1, pictures - 1]}
    assert run_experiment.verdict(*runs).startswith(
        f"verdict: {words}: ast {accuracies[0]:.2f} % in 1.0 s, "
    )


def test_no_verdict_on_a_twin_without_an_accuracy():
    result = {"final_accuracy": 50.0, "train_seconds": 1e-5, "config": {"ast": {"mode": "ast"}}}
    twin = {"final_accuracy": None, "train_seconds": 0.0}
    assert (
        run_experiment.verdict(result, twin)
        == "verdict: none: no step of the dense twin fitted into 1e-05 s of training"
    )


@pytest.mark.parametrize(("target", "share"), [(0.25, 359 / 1437), (0.5, 512 / 1437), (1.0, 1.0)])
def test_a_random_epoch_reports_the_share_it_drew(target, share, tmp_path):
    """Of 1,437 samples two batches of 512 are a dense epoch."""
    request = ["ast.mode=random", f"ast.target_activation={target}", "training.batch_size=512"]
    assert (
        run_digits(tmp_path, *request, "dataset.max_train_samples=null", "dataset.image_size=8")
        == 0
    )
    (result,) = results_of(tmp_path)
    assert result["training_history"]["activation_rate"] == [1.0, pytest.approx(share)]
