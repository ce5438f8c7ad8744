"""Text and numbers reach the program as they were typed: from flags, overrides, sweeps and files,
to every process.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

import run_experiment
import run_sweep
from conftest import REPO
from lab.config.loading import Config, dump_config
from lab.study.cli import run_cli
from runs import command
from train_ast import load_config

DIGITS = str(REPO / "configs/digits_smoke.yaml")
QUICK = [
    "model.name=test_resnet",
    "training.epochs=1",
    "ast.mode=dense",
    "dataset.max_train_samples=32",
]
QUICK += [
    "dataset.max_val_samples=16",
    "training.device=cpu",
    "training.num_workers=0",
    "dataset.image_size=8",
]
TEXTS = [
    "/x/exp #3",
    "2026-11-26",
    "@x",
    "1234567",
    "12:30",
    "[x]/y",
    "{a}",
    "010",
    "1e3",
    "0x10",
    "true",
    "~",
    "a: b",
]
TEXTS += [
    "'quoted'",
    '"quoted"',
    " spaces ",
    "C:\\data",
    "Müll/表",
    "*a",
    "&a",
    "!x",
    "%x",
    "- x",
    "tab\there",
    "yes",
]
TEXTS += [
    "line\nbreak",
    "null.x",
    ".inf",
    "${local_rank}",
    "$$",
    "1_000",
    "=",
    "<<",
    "# x",
    "a,b",
    "\u2028",
    "`x`",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_it_is_typed(text, tmp_path, capsys):
    """From an override and a flag, into the resolved config, and back from that as a file."""
    args = ["--config", DIGITS, "--output-dir", text, f"dataset.subset={text}", "--dry-run"]
    assert run_cli(lambda: run_experiment.main(args)) == 0
    (tmp_path / "resolved.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    config = load_config(tmp_path / "resolved.yaml")
    folder = os.path.expanduser(text)
    assert (config.logging.output_dir, config.dataset.subset) == (folder, text)
    assert config == load_config(DIGITS, [f"logging.output_dir={text}", f"dataset.subset={text}"])
    (tmp_path / "same.json").write_text(
        json.dumps(config.model_dump(), indent="\t"), encoding="utf-8"
    )
    assert load_config(tmp_path / "same.json") == config


def test_null_is_no_value_where_there_may_be_none():
    assert load_config(None, ["dataset.subset=null"]).dataset.subset is None
    assert load_config(None, ["training.max_minutes=null"]).training.max_minutes is None
    assert load_config(None, ["logging.output_dir=null"]).logging.output_dir == "null"


def test_the_word_null_goes_into_a_file_in_quotes(tmp_path):
    (tmp_path / "a.yaml").write_text('dataset: {subset: "null"}')
    config = load_config(tmp_path / "a.yaml")
    assert config.dataset.subset == "null"
    (tmp_path / "b.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "b.yaml") == config


NUMBERS = [
    ("010", 10),
    ("+7", 7),
    ("0", 0),
    ("0x10", None),
    ("0o10", None),
    ("1_000", None),
    ("12:30", None),
]
NUMBERS += [
    ("1e3", None),
    ("１０", None),
    ("9" * 5000, None),
    ("5 # five", None),
    ("", None),
    ("'5'", None),
    ("0b1", None),
]


@pytest.mark.parametrize(("text", "number"), NUMBERS)
def test_a_whole_number_has_one_meaning(text, number, tmp_path, capsys):
    """As a flag and in a YAML file alike: decimal, or refused in a line that names the key."""
    (tmp_path / "a.yaml").write_text(f"training:\n  seed: {text or '!!str'}\n", encoding="utf-8")
    in_a_file = str(tmp_path / "a.yaml")
    for args in (["--config", DIGITS, "--seed", text], ["--config", in_a_file]):
        if args[1] == in_a_file and "#" in text:
            continue  # a comment
        code = run_cli(lambda args=args: run_experiment.main([*args, "--dry-run"]))
        out, err = capsys.readouterr()
        if number is None:
            assert (code, err.count("\n"), out) == (2, 1, ""), text
            assert "training.seed" in err or "integer string conversion" in err
        else:
            assert code == 0
            assert f"  seed: {number}\n" in out


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-3", 0.001), (".5", 0.5), ("0010", 10.0), ("1_0.5", None), ("1:30", None)],
)
def test_a_decimal_number_has_one_meaning(text, number, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(f"training:\n  lr: {text}\n")
    for args in (["--config", DIGITS, "--lr", text], ["--config", str(tmp_path / "a.yaml")]):
        code = run_cli(lambda args=args: run_experiment.main([*args, "--dry-run"]))
        out, err = capsys.readouterr()
        assert code == (2 if number is None else 0)
        assert "training.lr: expected" in err if number is None else f"  lr: {number}" in out


def test_a_date_in_a_file_is_text_and_a_number_needs_quotes(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(
        "logging: {output_dir: 2026-11-26}\ndataset: {subset: 12:30}\n"
    )
    config = load_config(tmp_path / "a.yaml")
    assert (config.logging.output_dir, config.dataset.subset) == ("2026-11-26", "12:30")
    (tmp_path / "b.yaml").write_text("dataset: {revision: 1234567}\n")
    assert (
        run_cli(lambda: run_experiment.main(["--config", str(tmp_path / "b.yaml"), "--dry-run"]))
        == 2
    )
    assert capsys.readouterr().err.endswith("got 1234567; in quotes it is text\n")


def test_json_may_have_tabs_and_no_key_twice(tmp_path):
    text = '{\n\t"dataset":\t{"subset": "\\ud83d\\ude00"}\n}'
    for name in ("a.json", "a.JSON", "a.yaml", "a"):
        (tmp_path / name).write_text(text)
        assert load_config(tmp_path / name).dataset.subset == "😀"
    for name in ("b.json", "b.yaml"):
        (tmp_path / name).write_text('{"training": {"lr": 1,\t"lr": 2}}')
        assert (
            refusal(tmp_path / name)
            == f"error: {tmp_path / name}: not valid YAML or JSON: key 'lr' stands there twice\n"
        )
    (tmp_path / "c.json").write_text("training: {lr: 1}")
    assert refusal(tmp_path / "c.json").startswith(
        f"error: {tmp_path / 'c.json'}: not valid YAML or JSON: Expecting value"
    )


def refusal(path, *args):
    """What a dry run of a config says on stderr, with exit code 2."""
    args = [os.fsdecode(arg) for arg in args]
    done = command(["scripts/run_experiment.py", "--config", path, "--dry-run", *args])
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    return done.stderr


@pytest.mark.parametrize(
    "text",
    [
        '{"logging": {"output_dir": "a\\ud800b"}}',
        '{"dataset": {"subset": "a\\u0000b"}}',
        '{"dataset": {"subset": ""}}',
        '{"dataset": {"\\udc80": 1}}',
        '{"\\udc80": 1}',
    ],
)
def test_text_that_no_file_can_take_is_refused(text, tmp_path, capsys):
    (tmp_path / "a.json").write_text(text)
    assert (
        run_cli(lambda: run_experiment.main(["--config", str(tmp_path / "a.json"), "--dry-run"]))
        == 2
    )
    line = capsys.readouterr().err
    assert line.startswith(f"error: {tmp_path / 'a.json'}: ")
    assert line.count("\n") == 1


def test_arguments_that_are_no_text_are_refused():
    assert "logging.output_dir: expected" in refusal(DIGITS, "--output-dir", b"a\xff")
    assert "cannot read the config" in refusal(
        b"/nowhere/\xff.yaml".decode("utf-8", "surrogateescape")
    )


def test_an_env_file_that_is_not_utf_8_is_named(tmp_path):
    shutil.copytree(REPO / "scripts", tmp_path / "scripts")
    (tmp_path / ".env").write_bytes(b"HF_TOKEN=\xe4\n")
    line = [sys.executable, tmp_path / "scripts/analyze_results.py", "--results-dir", tmp_path]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"error: {tmp_path}/.env: ")


def test_every_process_of_a_run_gets_the_text_as_it_is(tmp_path):
    """torchrun replaces ${local_rank} and $$ in what it passes on."""
    folder = tmp_path / "a  b #3 ${local_rank} $$ 'c' \"d\""
    log = folder / "1_000: [x].jsonl"
    args = [
        "--config",
        DIGITS,
        "--nproc",
        "2",
        "--output-dir",
        str(folder),
        f"logging.jsonl_path={log}",
        *QUICK,
    ]
    done = command(["scripts/run_experiment.py", *args])
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    (path,) = folder.glob("final_results_*.json")
    assert (
        json.loads(path.read_text())["config"]["logging"]
        | {"output_dir": str(folder), "jsonl_path": str(log)}
        == (json.loads(path.read_text())["config"]["logging"])
    )
    assert len(log.read_text().splitlines()) == 1


@pytest.mark.long
def test_a_sweep_passes_text_on_as_it_is(tmp_path, monkeypatch, capsys):
    """Two runs whose texts differ behind a # only, each with its own log; a config file with = in
    its name.
    """
    path = tmp_path / "lr=1.yaml"
    folder = tmp_path / "exp #3\u2028x"
    path.write_text("model: {name: test_resnet}\n")
    args = [
        "--configs",
        str(path),
        "--output-dir",
        str(folder),
        f"logging.jsonl_path={tmp_path}/log #1.jsonl",
        *QUICK,
    ]
    args += [
        "--grid",
        "dataset.subset=12:30 #1,12:30 #2",
        "--variants",
        "dataset.revision=1234567 dataset.name=it\\x",
    ]
    assert run_cli(lambda: run_sweep.main(args)) == 0, capsys.readouterr()
    configs = [
        json.loads(each.read_text())["config"] for each in folder.glob("final_results_*.json")
    ]
    assert sorted(each["dataset"]["subset"] for each in configs) == ["12:30 #1", "12:30 #2"]
    assert {(each["dataset"]["revision"], each["dataset"]["name"]) for each in configs} == {
        ("1234567", "it\\x")
    }
    assert len(list(tmp_path.glob("log #1.*.jsonl"))) == 2
    (summary,) = folder.glob("sweep_summary_*.jsonl")
    assert all(json.loads(line)["results_file"] for line in summary.read_text().splitlines())


def test_a_quote_that_is_not_closed_is_refused(capsys):
    assert (
        run_cli(lambda: run_sweep.main(["--configs", DIGITS, "--variants", "dataset.name=it's"]))
        == 2
    )
    assert (
        capsys.readouterr().err == 'error: --variants "dataset.name=it\'s": No closing quotation\n'
    )


def test_an_error_of_an_override_names_it_and_not_the_file(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("training: {lr: 0.1, min_lr: 0.01}\nast: {anneal_epochs: 2}\n")
    expected = {
        "training.lr=x": "override 'training.lr=x': training.lr: expected a valid number, got 'x'",
        "training.lr=0.001": (
            "override 'training.lr=0.001': training.min_lr: at most training.lr=0.001"
        ),
        "training.epochs=3": "override 'training.epochs=3': ast.warmup_epochs: with 1 dense epochs "
        "at the "
        "start and 2 "
        "at the end, none of training.epochs=3 is sparse; lower ast.warmup_epochs or "
        "ast.anneal_epochs, or raise "
        "training.epochs",
        "dataset.type=folder": (
            "override 'dataset.type=folder': dataset.train_dir: needed with dataset.type=folder"
        ),
        "traning.lr=3": "override 'traning.lr=3': traning: unknown key; did you mean training?",
    }
    for override, line in expected.items():
        code = run_cli(
            lambda override=override: run_experiment.main(
                ["--config", str(tmp_path / "a.yaml"), override]
            )
        )
        assert (code, capsys.readouterr().err) == (2, f"error: {line}\n")
    (tmp_path / "a.yaml").write_text("training: {lr: -1}\n")
    assert (
        run_cli(
            lambda: run_experiment.main(["--config", str(tmp_path / "a.yaml"), "training.epochs=3"])
        )
        == 2
    )
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'a.yaml'}: training.lr: ")


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("training.warmup_epochs", "training.lr_warmup_epochs"),
        ("dataset.resolution", "dataset.cache_resolution"),
        ("ast.batch_size", "training.batch_size"),
    ],
)
def test_a_suggestion_comes_from_the_same_section_first(key, near, capsys):
    assert run_cli(lambda: run_experiment.main(["--config", DIGITS, f"{key}=3"])) == 2
    assert capsys.readouterr().err.endswith(f"{key}: unknown key; did you mean {near}?\n")


def test_the_default_config_is_read_back():
    assert Config() == load_config(None)
