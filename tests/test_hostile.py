"""What comes from outside cannot hurt: mutated configs, results, images and tables, and code that
would trust them.

Short by default; `-m long` for the long form.
"""

import ast
import importlib
import json
import os
import random
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import analyze_results
import run_experiment
from conftest import REPO, make_config
from lab.base.errors import RequestError
from lab.data.datasets import ImageDataset, ReadErrors
from lab.data.loading import device_batches
from lab.data.randomness import UNIFORMS_PER_SAMPLE
from lab.study.cli import run_cli
from lab.study.results import ResultsFile, load_runs, spell
from train_ast import build_dataloaders, train

CPU = torch.device("cpu")
TOKENS = [
    b"null",
    b"true",
    b".nan",
    b"-.inf",
    b"1e999",
    b"9" * 5000,
    b"-1",
    b"0",
    b"''",
    b"[]",
    b"{}",
    b"[[[[",
    b"{{",
]
TOKENS += [
    b"&a [*a]",
    b"*a",
    b"!!python/object/apply:os.system ['touch /tmp/pwned']",
    b"!!binary x",
    b"!!int ''",
    b"!!bool x",
]
TOKENS += [
    b"!!timestamp x",
    b"!!float x",
    b"!!set {a}",
    b"!!omap [1]",
    b"<<: [1]",
    b"? [a]\n: b",
    b"2001-99-99",
    b"\x00",
]
TOKENS += [
    b"\xff\xfe",
    b"\t",
    b"\n",
    b": ",
    b"- ",
    b'"',
    b"'",
    b"%YAML 9.9",
    b"---\n",
    b"...",
    b"\xed\xa0\x80",
    b"#",
]
TOKENS += [
    b"12345678901234567890",
    b"0x1F",
    b"1_000",
    b"12:30:45",
    b"<script>",
    b"../../x",
    b"1e400",
    b"NaN",
    b"Infinity",
]


def mutated(data: bytes, dice: random.Random) -> bytes:
    """`data` with one to four of: a bit turned over, a piece cut out, doubled, moved, or replaced
    by a token.
    """
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(data) + 1)
        length = dice.choice([0, 1, 2, 5, 20, 200])
        piece = data[at : at + length]
        rest = data[at + length :]
        other = dice.randrange(len(rest) + 1)
        data = {
            "flip": data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :]
            if at < len(data)
            else data,
            "cut": data[:at] + rest,
            "end": data[:at],
            "double": data[:at] + piece * 3 + rest,
            "move": data[:at] + rest[:other] + piece + rest[other:],
            "token": data[:at] + dice.choice(TOKENS) + rest,
        }[dice.choice(["flip", "cut", "end", "double", "move", "token", "token"])]
    return data


def outcome(
    main: Callable[[], int], capsys, seconds: float = 10, clock=time.monotonic
) -> tuple[int, str]:
    """The exit code and stderr of a script's main, which may take no longer than the seconds
    given.
    """
    capsys.readouterr()
    started = clock()
    code = run_cli(main)
    assert clock() - started < seconds
    return code, capsys.readouterr().err


def fuzz_configs(times: int, tmp_path: Path, capsys) -> None:
    presets = [path.read_bytes() for path in sorted((REPO / "configs").glob("*.yaml"))]
    dice = random.Random(0)
    path = tmp_path / "config.yaml"
    codes = []
    for _ in range(times):
        path.write_bytes(hostile := mutated(dice.choice(presets), dice))
        code, err = outcome(
            lambda: run_experiment.main(["--config", str(path), "--dry-run"]), capsys
        )
        assert (code, err.count("\n")) in ((0, 0), (2, 1)), (hostile, err)
        codes.append(code)
    assert {0, 2} == set(codes)
    assert not Path("/tmp/pwned").exists()


def fuzz_results(times: int, tmp_path: Path, capsys) -> None:
    published = [
        path.read_bytes() for path in sorted(REPO.glob("results/published/**/final_results_*.json"))
    ]
    good = published[0]
    folder = tmp_path / "results"
    folder.mkdir()
    dice = random.Random(0)
    codes = []
    (folder / "final_results_1.json").write_bytes(good)
    for n in range(times):
        (folder / "final_results_2.json").write_bytes(
            hostile := mutated(dice.choice(published), dice)
        )
        outputs = (
            ["--csv", str(tmp_path / "t.csv"), "--markdown", str(tmp_path / "t.md")]
            if n % 10 == 0
            else []
        )
        args = ["--results-dir", str(folder), *outputs]
        code, err = outcome(lambda args=args: analyze_results.main(args), capsys)
        assert code == 0 or (code, err.count("\n")) == (2, 1), (hostile, err)
        codes.append(code)
    assert 0 in codes


VALUES = [
    None,
    True,
    -1,
    0,
    1e300,
    10**400,
    "90",
    "x",
    "=1+1",
    "\ud800",
    [],
    {},
    [[1]],
    [None],
    float("nan"),
]
VALUES += [
    float("inf"),
    -float("inf"),
    1e-300,
    101.0,
    {"a": {"b": []}},
    "<script>",
    ["1"],
    [True],
    [1e300, 1],
]


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
    folder = path.parent
    foreign = [
        b"[1, 2]",
        b"3",
        b"null",
        b"{}",
        b'{"best_accuracy": 3}',
        b'"x"',
        b"[" * 10**5,
        b'{"a":' * 10**5,
        b"9" * 5000,
    ]
    kind = dice.choice(
        "bytes bytes values values values values end empty foreign rename config pipe".split()
    )
    if kind == "bytes":
        path.write_bytes(mutated(data, dice))
    elif kind == "values":
        path.write_text(json.dumps(spoiled(json.loads(data), dice)))
    elif kind == "end":
        path.write_bytes(data[: dice.randrange(len(data))])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "foreign":
        path.write_bytes(dice.choice(foreign))
    elif kind == "rename":
        names = [
            "final_results_.json",
            "final_results_ =1\n.json",
            "final_results_<b>.json",
            "final_results_\udcff.json",
        ]
        path.rename(folder / dice.choice([*names, "final_results_x.JSON", "other.json"]))
    elif kind == "config":
        configs = [
            None,
            {},
            [],
            3,
            {"ast": {"mode": "ast"}},
            {"ast": None},
            {"lr": 0.1},
            {"dataset": {"type": "hf"}},
        ]
        path.write_text(json.dumps(json.loads(data) | {"config": dice.choice(configs)}))
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


def fuzz_folders(times: int, tmp_path: Path, capsys) -> None:
    """Folders of published results of three groups, most of them spoiled: no traceback, no hang,
    exit code 0 or 2.
    """
    published = sorted(REPO.glob("results/published/cifar10_study_h100/*/final_results_*.json"))
    dice = random.Random(0)
    codes = Counter()
    kinds = Counter()
    accepted = 0
    refused = 0
    for n in range(times):
        folder = tmp_path / str(n)
        outputs = tmp_path / f"{n}_out"
        folder.mkdir()
        for number, source in enumerate(dice.sample(published, 6)):
            path = folder / f"final_results_{number}.json"
            path.write_bytes(source.read_bytes())
            if number or dice.random() < 0.2:
                kinds[damage(path, dice)] += 1
        args = [
            "--results-dir",
            str(folder),
            "--csv",
            f"{outputs}/t.csv",
            "--latex",
            f"{outputs}/t.tex",
        ]
        args += [
            "--markdown",
            f"{outputs}/t.md",
            *(["--report", f"{outputs}/r.html"] if n % 3 == 0 else []),
        ]
        args += ["--plot", "--save-dir", f"{outputs}/plots"] if n % 6 == 0 else []
        seconds, clock = (
            (20, time.process_time) if n % 3 == 0 else (20, time.monotonic)
        )  # figures of four groups
        code, err = outcome(lambda args=args: analyze_results.main(args), capsys, seconds, clock)
        assert (code, err.count("\n")) in ((0, 0), (2, 1)), (n, code, err)
        codes[code] += 1
        found = len(list(folder.glob("final_results_*.json")))
        if code == 0:
            runs, left_out = load_runs([folder])
            assert len(runs) + len(left_out) == found, n
            for run in runs:
                check_reading(run)
            accepted = accepted + len(runs)
            refused = refused + len(left_out)
            assert len(pd.read_csv(f"{outputs}/t.csv")) == len({run.key for run in runs})
    with capsys.disabled():
        print(
            f"\n{times} folders: exit codes {dict(codes)}; {accepted} files accepted, "
            f"{refused} left out; {dict(kinds)}"
        )
    assert codes[0] > 0


def fuzz_images(times: int, folder: Path) -> None:
    victim = folder / "train" / "red" / "0.jpg"
    original = victim.read_bytes()
    dice = random.Random(0)
    bad = 0
    train_set = ImageDataset([(victim, 0), (folder / "train" / "red" / "1.jpg", 0)], ["red"])
    train_set.augmentation = lambda images, uniforms: images
    train_set.max_bad_images = 1
    for _ in range(times):
        victim.write_bytes(mutated(original, dice))
        sample = train_set[(0, np.zeros(UNIFORMS_PER_SAMPLE))]
        assert sample.image.dtype == torch.uint8
        assert sample.image.shape[0] == 3
        assert all(str(victim) in name and "\n" not in name for name in sample.unreadable)
        bad += len(sample.unreadable)
    assert 0 < bad < times


def fuzz_parquet(times: int, folder: Path, tmp_path: Path) -> None:
    original = (folder / "train.parquet").read_bytes()
    dice = random.Random(0)
    ends = []
    for n in range(times):
        (folder / "train.parquet").write_bytes(mutated(original, dice))
        data = [
            "dataset.type=hf",
            f"dataset.name={folder}",
            f"dataset.cache_dir={tmp_path / f'cache{n}'}",
        ]
        config = make_config(
            *data, "dataset.split_val=test", "training.num_workers=0", "dataset.max_bad_images=30"
        )
        found = ReadErrors(30)
        try:
            loader, *_ = build_dataloaders(config, CPU)
            list(device_batches(loader, CPU, found))
            ends.append(len(found.found))
        except RequestError as error:
            ends.append(str(error))
    assert any(isinstance(end, str) for end in ends)
    assert all("dataset" in end and "\n" not in end for end in ends if isinstance(end, str))


def fuzz_runs(times: int, victim: Path, keys: list[str], tmp_path: Path, capsys) -> None:
    """A run on a folder whose file `victim` is a mutated one, by the command: it goes through, what
    could not be read counted and listed, or is refused in a line that names it or its key.
    """
    original = victim.read_bytes()
    dice = random.Random(0)
    ends = []
    small = [
        "model.name=test_resnet",
        "training.batch_size=8",
        "training.device=cpu",
        "training.num_workers=0",
    ]
    small += [
        "training.epochs=1",
        "ast.mode=dense",
        "metrics.base_flop_per_sample=1e6",
        f"logging.output_dir={tmp_path}",
    ]
    for n in range(times):
        victim.write_bytes(hostile := mutated(original, dice))
        allowed = n % 2 * 24
        args = [
            "--config",
            str(REPO / "configs/digits_smoke.yaml"),
            *small,
            f"dataset.max_bad_images={allowed}",
        ]
        more = [key.format(n=n) for key in keys]
        code, err = outcome(lambda args=[*args, *more]: run_experiment.main(args), capsys)
        assert code in (0, 2), (hostile, err)
        assert "Traceback" not in err
        if code == 2:
            line = err.splitlines()[-1]
            assert line.startswith("error: dataset"), err
            assert str(victim.parent) in line, err
        else:
            newest = max(
                tmp_path.glob("final_results_*.json"), key=lambda path: path.stat().st_mtime_ns
            )
            found = json.loads(newest.read_text())["bad_images"]
            assert len(found) <= allowed
            assert all(str(victim.parent) in name for name in found), found
            code = len(found) and 1
        ends.append(code)
    bad = sum(end > 0 for end in ends)
    counts = (
        f"{times} runs on mutated {victim.name}: {bad} refused ({ends.count(2)}) or with "
        f"images counted"
    )
    if times >= 100:  # the long form says what it met
        with capsys.disabled():
            print(counts)
    assert bad > 0
    assert times < 100 or bad < times


def image_keys(folder: Path) -> list[str]:
    return [
        "dataset.type=folder",
        f"dataset.train_dir={folder}/train",
        f"dataset.val_dir={folder}/val",
    ]


def parquet_keys(folder: Path, tmp_path: Path) -> list[str]:
    cache = f"dataset.cache_dir={tmp_path}/cache{{n}}"
    return ["dataset.type=hf", f"dataset.name={folder}", cache, "dataset.split_val=test"]


def test_mutated_configs_are_run_or_refused_in_one_line(tmp_path, capsys):
    fuzz_configs(300, tmp_path, capsys)


def test_mutated_results_are_read_or_left_out(tmp_path, capsys):
    fuzz_results(40, tmp_path, capsys)


def test_damaged_folders_of_results_are_read_right_or_refused(tmp_path, capsys):
    fuzz_folders(6, tmp_path, capsys)


@pytest.mark.long
def test_three_hundred_damaged_folders_of_results(tmp_path, capsys):
    fuzz_folders(300, tmp_path, capsys)


def test_mutated_images_are_read_or_counted(image_folder):
    fuzz_images(60, image_folder)


def test_mutated_tables_are_read_or_refused(parquet_folder, tmp_path):
    fuzz_parquet(6, parquet_folder, tmp_path)


def test_runs_on_mutated_files_go_through_or_name_them(
    image_folder, parquet_folder, tmp_path, capsys
):
    fuzz_runs(
        8,
        image_folder / "train" / "red" / "0.jpg",
        image_keys(image_folder),
        tmp_path / "i",
        capsys,
    )
    fuzz_runs(
        8,
        parquet_folder / "train.parquet",
        parquet_keys(parquet_folder, tmp_path),
        tmp_path / "p",
        capsys,
    )


@pytest.mark.long
def test_five_hundred_runs_on_mutated_files(image_folder, parquet_folder, tmp_path, capsys):
    fuzz_runs(
        250,
        image_folder / "train" / "red" / "0.jpg",
        image_keys(image_folder),
        tmp_path / "i",
        capsys,
    )
    fuzz_runs(
        250,
        parquet_folder / "train.parquet",
        parquet_keys(parquet_folder, tmp_path),
        tmp_path / "p",
        capsys,
    )


@pytest.mark.long
def test_five_thousand_mutated_configs(tmp_path, capsys):
    fuzz_configs(5000, tmp_path, capsys)


@pytest.mark.long
def test_two_thousand_mutated_results(tmp_path, capsys):
    fuzz_results(2000, tmp_path, capsys)


@pytest.mark.long
def test_five_hundred_mutated_images_and_tables(image_folder, parquet_folder, tmp_path):
    fuzz_images(400, image_folder)
    fuzz_parquet(100, parquet_folder, tmp_path)


SMALL = [
    "model.name=test_resnet",
    "training.batch_size=4",
    "training.epochs=2",
    "ast.warmup_epochs=1",
]


@pytest.mark.parametrize("cache", ["none", "device"])
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_within_the_limit_are_replaced_and_listed(
    cache, workers, tmp_path, image_folder
):
    (image_folder / "train" / "red" / "3.jpg").write_bytes(b"no image")
    (image_folder / "train" / "red" / "7.jpg").write_bytes(b"the last one of all")
    (image_folder / "val" / "blue" / "0.jpg").unlink()
    (image_folder / "val" / "blue" / "0.jpg").symlink_to("nowhere")
    data = [
        "dataset.type=folder",
        f"dataset.train_dir={image_folder}/train",
        f"dataset.val_dir={image_folder}/val",
    ]
    data += [
        *SMALL,
        f"dataset.cache={cache}",
        f"training.num_workers={workers}",
        f"logging.output_dir={tmp_path}/out",
    ]
    result, path = train(make_config(*data, "dataset.max_bad_images=3"))
    assert result["status"] == "completed"
    assert result["training_history"]["samples_loaded"] == [24, 24]
    names = sorted(
        text.partition(":")[0].removeprefix(f"{image_folder}/") for text in result["bad_images"]
    )
    assert names == ["train/red/3.jpg", "train/red/7.jpg", "val/blue/0.jpg"]
    assert json.loads(path.read_text())["bad_images"] == result["bad_images"]
    with pytest.raises(RequestError, match=r"\.jpg: .*; dataset\.max_bad_images=1 allows no more"):
        train(make_config(*data, "dataset.max_bad_images=1"))


def test_no_script_trusts_what_it_reads():
    """No pickle, no code from text, no loader but a safe one, no archive unpacked by hand."""
    for path in sorted((REPO / "scripts").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "dill", "joblib", "marshal", "shelve"}, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                given = {each.arg: ast.unparse(each.value) for each in node.keywords}
                assert called not in (
                    "eval",
                    "exec",
                    "compile",
                    "os.system",
                    "yaml.unsafe_load",
                    "pd.read_pickle",
                ), path
                assert not called.endswith(("extractall", "unpack_archive")), path
                assert called != "torch.load" or given.get("weights_only") == "True", path
                assert called != "yaml.load" or given.get("Loader") == "_Loader", path
                assert given.get("shell") is None, path
                assert given.get("allow_pickle") is None, path
    loader = importlib.import_module("lab.config.loading")._Loader
    assert issubclass(loader, importlib.import_module("yaml").SafeLoader)


def test_a_run_touches_no_network_and_nothing_outside_its_folder(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    names = [
        "model.name=test_resnet",
        "training.epochs=1",
        "ast.mode=dense",
        "dataset.max_train_samples=64",
    ]
    train(make_config(*names, "logging.output_dir=out", "dataset.cache_dir=../../x"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
