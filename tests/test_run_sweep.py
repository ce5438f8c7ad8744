"""The sweep as a command: real runs, signals, resumption, wrong requests, and a summary that holds
each run once.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from conftest import REPO
from helpers import ALONE, processes
from lab.base.errors import RequestError
from lab.config.grid import random_points
from lab.data.cache import loaders as cache
from lab.study.cli import run_cli
from run_sweep import main
from runs import command, exit_code, program, running, untimed, wait_until

DIGITS = str(REPO / "configs/digits_smoke.yaml")
QUICK = [
    "training.epochs=2",
    "ast.warmup_epochs=1",
    "dataset.max_train_samples=64",
    "training.batch_size=16",
]
ENDLESS = ["training.epochs=100000", "dataset.max_train_samples=64"]


def rows_of(folder):
    (summary,) = folder.glob("sweep_summary_*.jsonl")
    return [json.loads(line) for line in summary.read_text().splitlines()]


def test_failed_and_killed_runs_are_listed_and_the_others_complete(tmp_path, monkeypatch, capsys):
    """A bad value, a run that is killed, one that is sound; then the same again with --resume.

    What torchrun has left in the environment is not for the runs: none waits for another.
    """
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)
    killer = threading.Thread(
        target=lambda: os.kill(wait_until(lambda: processes("training.lr=0.002"))[0], 9)
    )
    killer.start()
    common = [
        "--configs",
        DIGITS,
        "--output-dir",
        str(tmp_path),
        *QUICK,
        "ast.mode=dense",
        "training.optimizer=sgd",
    ]
    args = [
        *common,
        "--grid",
        "training.lr=-1,0.002,0.003",
        "--seeds",
        "7",
        "--jobs",
        "3",
    ]
    assert run_cli(lambda: main(args)) == 1
    killer.join()
    rows = rows_of(tmp_path)
    assert len(rows) == len({row["id"] for row in rows}) == 3
    by_rate = {row["overrides"][-2].partition("=")[2]: row for row in rows}
    bad, killed, done = (by_rate[rate] for rate in ("-1", "0.002", "0.003"))
    shown = capsys.readouterr().out
    assert all(row["error"] in shown for row in (bad, killed))
    assert (bad["status"], bad["exit_code"]) == ("failed", 2)
    assert "training.lr: expected greater than 0, got -1" in bad["error"]
    assert (killed["status"], killed["exit_code"]) == ("failed", -9)
    assert killed["error"] == "ended by SIGKILL: by hand, or for want of memory"
    result = json.loads(Path(done["results_file"]).read_text())
    assert (done["status"], done["exit_code"], done["seed"]) == ("completed", 0, 7)
    assert all(
        done[key] == result[key]
        for key in ("best_accuracy", "final_accuracy", "train_seconds", "energy_kj")
    )
    assert done["duration_seconds"] > done["train_seconds"] > 0

    files = sorted(tmp_path.glob("final_results_*.json"))
    again = [*common, "--grid", "training.lr=-1,0.003", "--seeds", "7", "--resume"]
    assert (
        run_cli(lambda: main(again)) == 1
    )  # the bad one is bad again, the finished one is not repeated
    assert sorted(row["id"] for row in rows_of(tmp_path)) == sorted(row["id"] for row in rows)
    assert sorted(tmp_path.glob("final_results_*.json")) == files


def test_a_sweep_killed_in_the_middle_resumes_without_repeating_a_finished_run(tmp_path):
    common = ["--configs", DIGITS, "--output-dir", str(tmp_path), *QUICK]
    grid = [*common, "--seeds", "0", "1"]
    assert run_cli(lambda: main([*common, "--seeds", "0", "--one-process"])) == 0
    sweep = program(["scripts/run_sweep.py", *grid, "--resume"])
    with running(sweep, tmp_path / "output") as child:
        wait_until(lambda: processes("training.seed=1"))
        os.kill(child, signal.SIGKILL)
    wait_until(lambda: not processes("training.seed=1"), 10)  # it takes its runs with it
    (first,) = tmp_path.glob("final_results_*.json")
    (tmp_path / "final_results_20200101_000000.json").write_text("{")  # what another writer left
    with next(tmp_path.glob("sweep_summary_*.jsonl")).open("a") as file:
        file.write('{"id": "cut sho')
    assert run_cli(lambda: main([*grid, "--resume", "--one-process"])) == 0
    rows = rows_of(tmp_path)
    assert [(row["seed"], row["status"], row["exit_code"]) for row in rows] == [
        (0, "completed", 0),
        (1, "completed", 0),
    ]
    assert rows[0]["results_file"] == str(first)
    assert len({row["id"] for row in rows}) == 2
    assert rows[1]["results_file"] in map(str, tmp_path.glob("final_results_*.json"))


def test_ctrl_c_lets_the_running_ones_save_and_starts_no_other(tmp_path, capsys):
    def interrupt():
        wait_until(lambda: list(tmp_path.glob("log.*.jsonl")))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    overrides = [
        *ENDLESS,
        f"logging.jsonl_path={tmp_path}/log.jsonl",
        "--output-dir",
        str(tmp_path),
    ]
    assert run_cli(lambda: main(["--configs", DIGITS, *overrides, "--seeds", "0", "1"])) == 130
    (row,) = rows_of(tmp_path)
    assert (row["status"], row["exit_code"]) == ("interrupted", 130)
    assert json.loads(Path(row["results_file"]).read_text())["training_history"]["epoch"][0] == 1
    assert "0 of 2 runs done, 1 not started" in capsys.readouterr().out


def test_dry_run_shows_the_plan_once_each_and_writes_nothing(tmp_path, capsys):
    grid = [
        "--grid",
        "ast.mode=ast,dense",
        "ast.target_activation=0.25,0.5",
        "--seeds",
        "0",
        "0",
        "1",
    ]
    assert (
        main(
            ["--configs", DIGITS, DIGITS, "--output-dir", str(tmp_path / "out"), *grid, "--dry-run"]
        )
        == 0
    )
    *plan, total = capsys.readouterr().out.splitlines()
    assert len(plan) == len(set(plan)) == 8
    assert total == "8 runs, 1 at a time: no finished run to estimate their time from"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--grid", "ast.target_activaton=0.1"],
            "ast.target_activaton: unknown key; did you mean ast.target_act",
        ),
        (["training.epochz=3"], "training.epochz: unknown key; did you mean training.epochs?"),
        (["--grid", "training.lr="], "--grid training.lr: expected key=value,value..."),
        (["--grid", "training.lr"], "--grid training.lr: expected key=value,value..."),
        (["--grid", "training.lr=1", "training.lr=2"], "--grid training.lr: given twice"),
        (
            ["--grid", "logging.output_dir=a,b"],
            "--grid logging.output_dir: does not make a run another",
        ),
        (["--grid", "training.seed=1", "--seeds", "2"], "--seeds: training.seed is in --grid too"),
        (
            ["--grid", "training.lr=1,2", "--seeds", "1", "training.lr=3"],
            "--grid training.lr: override 'training.lr=3' sets training.lr too; leave out one",
        ),
        (
            ["--grid", "training.lr=1,2", "--variants", "training.lr=3"],
            "--grid training.lr: --variants set training.lr too; leave out one",
        ),
        (
            ["--seeds", "1", "2", "training.seed=7"],
            "--seeds: override 'training.seed=7' sets training.seed too; leave out one",
        ),
        (
            ["--seeds", "1", "2", "--variants", "training.seed=7"],
            "--seeds: --variants set training.seed too; leave out one",
        ),
        (
            ["--output-dir", "x", "logging.output_dir=y"],
            "override 'logging.output_dir=y': a flag says logging.output_dir=x",
        ),
        (["--seeds", "one"], "--seeds: expected whole numbers, got 'one'"),
        (["--jobs", "0"], "--jobs: expected at least 1, got 0"),
        (
            ["--gpus", "0", "1"],
            "--gpus 0 1: expected how many GPUs each run gets, at least 1; which ones are used: "
            "CUDA_VISIBLE_DEVICES=0,1; how many runs at a time: --jobs",
        ),
        (["--cpus", "2"], "--cpus: only with --launcher"),
        (["--launcher", "local", "--partition", "p"], "--partition: only with --launcher slurm"),
        (["--launcher", "local", "--timeout-min", "0"], "--timeout-min: expected at least 1, got"),
        (["--random", "2"], "--random: expected N key=log(A,B) .., with N at least 1"),
        (["--random", "2", "training.lr=log(0,1)"], "log(0,1): expected two numbers above 0 that"),
        (["--random", "2", "training.lr=1"], "--random training.lr=1: expected key=log(A,B), uni"),
        (
            ["--random", "2", "training.lr=log(1,2)", "--grid", "training.lr=1,2"],
            "--random training.lr: override 'training.lr=1' sets training.lr too; leave out one",
        ),
        (["--dense-twin", "ast.mode=dense"], "--dense-twin: none of the runs is sparse"),
        (["--output-dir", "/proc/nowhere"], "logging.output_dir: cannot write to /proc/nowhere"),
        (
            ["training.epochs=2", "ast.warmup_epochs=3"],
            "error: override 'ast.warmup_epochs=3': ast.warmup_epochs: with",
        ),
        (
            ["--grid", "training.lr=-1,0", "--dry-run"],
            "training.lr=-1: training.lr: expected greater than 0, got -1; none of 2 runs "
            "can start",
        ),
    ],
)
def test_a_wrong_request_starts_nothing(args, message, tmp_path, capsys):
    output = [] if "--output-dir" in args else ["--output-dir", str(tmp_path)]
    assert run_cli(lambda: main(["--configs", DIGITS, *output, *args])) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_variants_are_sets_of_overrides_that_go_together(tmp_path, capsys):
    variants = [
        "ast.mode=dense training.epochs=3",
        "ast.mode=random",
        "ast.scoring=history ast.target_activation=0.5",
    ]
    args = [
        "--configs",
        DIGITS,
        "--variants",
        *variants,
        "--seeds",
        "0",
        "1",
        "--output-dir",
        str(tmp_path),
        "--dry-run",
    ]
    assert main(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert [
        line.endswith("ast.mode=dense training.epochs=3 training.seed=1") for line in lines[:2]
    ] == [False, True]
    assert len({line.split()[0] for line in lines[:6]}) == 6
    with pytest.raises(RequestError, match="ast.mod: unknown key; did you mean ast.mode?"):
        main(["--configs", DIGITS, "--variants", "ast.mod=dense"])


@pytest.mark.long
def test_runs_in_one_process_end_as_those_in_their_own(tmp_path):
    """Resident data, a failing run among them; the same summary lines but for times and places."""
    common = ["--configs", DIGITS, *QUICK, "dataset.cache=device", "training.num_workers=0"]
    common += [
        "--variants",
        "ast.mode=dense",
        "ast.scoring=history ast.target_activation=0.5",
        "training.lr=1e30",
    ]
    ends = []
    for name, flags in (("own", []), ("one", ["--one-process"])):
        code = run_cli(
            lambda flags=flags, name=name: main(
                [*common, *flags, "--output-dir", str(tmp_path / name)]
            )
        )
        assert code == 1
        rows = {row["id"]: row for row in rows_of(tmp_path / name)}
        ends.append(rows)
    assert ends[0].keys() == ends[1].keys()
    for key, row in ends[0].items():
        for what in ("status", "exit_code", "final_accuracy", "error", "activation_error"):
            assert row.get(what) == ends[1][key].get(what), (key, what)
    assert sorted(row["status"] for row in ends[0].values()) == ["completed"] * 2 + ["failed"]
    assert cache.SHARED_PICTURES is None  # nothing stays on the device after the sweep


def test_one_process_takes_no_slots():
    with pytest.raises(RequestError, match="--one-process: one run at a time"):
        main(["--configs", DIGITS, "--one-process", "--jobs", "2"])


def test_runs_that_record_graphs_of_their_own_get_a_process_each():
    graphs = ["training.compile=reduce-overhead", "ast.reuse_forward=auto", "ast.pack=false"]
    sweep = ["--configs", DIGITS, "--one-process", "--dry-run", *graphs]
    with pytest.raises(RequestError, match="--one-process: .* needs a process of its own"):
        main([*sweep, "--seeds", "0", "1"])
    assert main(sweep) == 0  # a single run


@pytest.mark.parametrize("flags", [[], ["--one-process"], ["--dry-run"]])
def test_missing_configs_are_refused_and_write_nothing_anywhere(
    flags, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    args = ["--configs", "no.yaml", "nor.yaml", "--output-dir", "out", *flags]
    assert run_cli(lambda: main(args)) == 2
    assert (
        "error: no.yaml: cannot read the config: No such file or directory; none of 2 "
        "runs can start\n"
    ) in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def sweep_from_stdin(text, *args):
    return command(["scripts/run_sweep.py", "--configs", "/dev/stdin", *args], text=text)


@pytest.mark.parametrize("flags", [pytest.param([], marks=pytest.mark.long), ["--one-process"]])
def test_a_config_that_can_be_read_only_once_reaches_every_run(flags, tmp_path):
    text = (
        "model: {name: test_resnet}\ntraining: {epochs: 1, device: cpu}\nast: {mode: dense}  "
        "# and so on\n"
    )
    text += "dataset: {max_train_samples: 64}\n"
    done = sweep_from_stdin(text, "--seeds", "0", "1", "--output-dir", str(tmp_path), *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [
        json.loads(path.read_text())["config"] for path in tmp_path.glob("final_results_*.json")
    ]
    assert [(each["model"]["name"], each["training"]["epochs"]) for each in results] == [
        ("test_resnet", 1)
    ] * 2
    assert {row["config"] for row in rows_of(tmp_path)} == {"/dev/stdin"}
    (copy,) = (tmp_path / "logs").glob("stdin.*.yaml")
    assert copy.read_text() == text


def test_an_empty_config_of_a_sweep_is_refused(tmp_path):
    done = sweep_from_stdin("", "--output-dir", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: /dev/stdin: empty")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def share_test(folder, seeds, flags, kill_at):
    """Two commands on one folder, one of them killed outright once `kill_at` results are there: the
    other does its runs, and none is done twice.
    """
    args = ["--configs", DIGITS, "--output-dir", str(folder), *QUICK, *flags, "--seeds", *seeds]
    sweep = program(["scripts/run_sweep.py", *args])
    folder.mkdir()
    with running(sweep, folder / "first") as first, running(sweep, folder / "second") as second:
        wait_until(lambda: len(list(folder.glob("final_results_*.json"))) >= kill_at, 300)
        os.kill(first, signal.SIGKILL)
        assert exit_code(first) == -signal.SIGKILL
        assert exit_code(second) == 0
    results = [json.loads(path.read_text()) for path in folder.glob("final_results_*.json")]
    completed = [result["seed"] for result in results if result["status"] == "completed"]
    assert sorted(completed) == sorted(map(int, seeds))
    rows = [row for row in rows_of(folder) if row["status"] == "completed"]
    assert sorted(row["seed"] for row in rows) == sorted(map(int, seeds))
    assert (folder / "first").read_text().count("start ") >= 1
    assert f"{len(seeds)} of {len(seeds)} runs done" in (folder / "second").read_text()
    helped = "another command is at work there, this one helps it"
    assert sum(helped in (folder / name).read_text() for name in ("first", "second")) == 1


def test_two_commands_share_a_folder_and_one_does_the_runs_of_the_other_that_dies(tmp_path):
    share_test(tmp_path / "out", [str(seed) for seed in range(5)], ["--one-process"], 2)


@pytest.mark.long
def test_two_commands_of_processes_share_eight_runs_and_one_dies(tmp_path):
    share_test(tmp_path / "out", [str(seed) for seed in range(8)], ["training.epochs=10"], 3)


def test_random_points_are_seeded_and_more_of_them_keep_the_first():
    draws = [
        "training.lr=log(1e-4,1e-1)",
        "training.batch_size=log(16,256)",
        "ast.target_activation=uniform(0.1,0.5)",
        "ast.mode=choice(ast,random)",
    ]
    few, many = (random_points(draws, count, 3) for count in (20, 200))
    assert many[:20] == few
    assert few == random_points(draws, 20, 3) != random_points(draws, 20, 4)
    values = [dict(text.split("=") for text in point) for point in many]
    rates = sorted(float(value["training.lr"]) for value in values)
    assert 1e-4 <= rates[0] < rates[-1] <= 1e-1
    assert 1.5e-3 < rates[100] < 6e-3  # half lie below the geometric mean
    shares = sorted(float(value["ast.target_activation"]) for value in values)
    assert 0.1 <= shares[0] < shares[-1] <= 0.5
    assert 0.25 < shares[100] < 0.35
    assert all(16 <= int(value["training.batch_size"]) <= 256 for value in values)
    assert {value["ast.mode"] for value in values} == {"ast", "random"}


def test_random_points_of_a_sweep_are_crossed_with_seeds(tmp_path, capsys):
    args = ["--configs", DIGITS, "--dry-run", "--output-dir", str(tmp_path / "out")]
    assert main([*args, "--random", "3", "training.lr=log(1e-3,1e-1)", "--seeds", "0", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert len({line.split("training.lr=")[1].split()[0] for line in lines[:6]}) == 3


def test_runs_in_one_process_share_pictures_and_what_is_wrong_with_them(tmp_path, image_folder):
    for name in ("train/red/3.jpg", "val/blue/0.jpg"):
        (image_folder / name).write_bytes(b"no image")
    (tmp_path / "config.yaml").write_text("model: {name: test_resnet}\nast: {mode: dense}\n")
    data = [
        "dataset.type=folder",
        f"dataset.train_dir={image_folder}/train",
        f"dataset.val_dir={image_folder}/val",
    ]
    data += [
        "dataset.cache=device",
        "dataset.max_bad_images=2",
        "training.num_workers=0",
        "training.epochs=1",
    ]
    args = [
        "--configs",
        str(tmp_path / "config.yaml"),
        "--output-dir",
        str(tmp_path / "out"),
        *data,
        "--seeds",
        "0",
        "1",
    ]
    assert (
        run_cli(
            lambda: main([*args, "--one-process", "training.batch_size=8", "training.device=cpu"])
        )
        == 0
    )
    rows = rows_of(tmp_path / "out")
    listed = [json.loads(Path(row["results_file"]).read_text())["bad_images"] for row in rows]
    assert [len(each) for each in listed] == [2, 2]
    assert listed[0] == listed[1]
    asked = ["dataset.cache: " in Path(row["log"]).read_text() for row in rows]
    assert asked == [True, False]  # the second run needs no memory of its own


@pytest.mark.long
def test_jobs_of_submitit_run_save_and_come_back_by_its_hook(tmp_path):
    """On this machine, by the path of SLURM. A job that is warned saves, is requeued by submitit,
    and goes on from its checkpoint; the histories are those of an undisturbed sweep.
    """
    pytest.importorskip("submitit")
    quick = ["--configs", DIGITS, *QUICK, "training.epochs=40", "training.device=cpu"]
    jobs = [*quick, "--launcher", "local", "--output-dir", str(tmp_path / "jobs")]
    sweep = program(["scripts/run_sweep.py", *jobs], variables={"OMP_NUM_THREADS": "1"})
    with running(sweep, tmp_path / "output") as child:
        wait_until(lambda: list(tmp_path.glob("jobs/checkpoints/*/last.pt")))
        own = processes(str(tmp_path / "jobs/logs/jobs"))
        (task,) = {*processes("submitit.core._submit")} & {*own}
        os.kill(task, signal.SIGUSR2)
        assert exit_code(child) == 0
    printed = (tmp_path / "output").read_text()
    (log,) = tmp_path.glob("jobs/logs/jobs/*_log.out")
    assert "Requeued job" in log.read_text()
    assert "interrupted" in log.read_text()
    assert "1 of 1 runs done" in printed
    (run_log,) = tmp_path.glob("jobs/logs/*.log")
    assert "resumed from " in run_log.read_text()
    assert (
        run_cli(lambda: main([*quick, "--one-process", "--output-dir", str(tmp_path / "o")])) == 0
    )
    results = {"jobs": [], "o": []}
    for name, found in results.items():
        for path in tmp_path.glob(f"{name}/final_results_*.json"):
            result = json.loads(path.read_text())
            found += [untimed(result)] if result["status"] == "completed" else []
    assert len(results["o"]) == 1
    assert results["jobs"] == results["o"]


def test_a_launcher_without_its_package_or_scheduler_is_refused(monkeypatch, tmp_path, capsys):
    args = ["--configs", DIGITS, "--output-dir", str(tmp_path / "out"), "--launcher", "slurm"]
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert run_cli(lambda: main(args)) == 2
    assert "pip install submitit" in capsys.readouterr().err
    monkeypatch.undo()
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_cli(lambda: main(args)) == 2
    assert "--launcher slurm: there is no sbatch here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
