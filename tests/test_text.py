"""Configs, by flags, overrides, files and sweeps: read as they were written, to every process, or
refused in one line. Never a traceback and never a hang.

Text comes back verbatim, and numbers as the decimals that they are. After the cases that were
thought of come random ones and mutated presets. The long form says what it met:
`python -m pytest -n 0 -m long -s tests/test_text.py`.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest
import yaml

import run_experiment
import run_sweep
from conftest import REPO
from damage import mutated
from lab.base.errors import RequestError
from lab.base.launch import launch
from lab.config.loading import Config, config_keys, dump_config, takes_text
from lab.study.cli import run_cli
from runs import exit_code, forked
from train_ast import load_config

DIGITS = str(REPO / "configs/digits_smoke.yaml")
HUB = str(REPO / "configs/imagenette_hf_ast.yaml")  # reads keys whose value may be any text
TEXTS = """2026-11-26 @x 1234567 12:30 [x]/y {a} 010 1e3 0x10 true ~ 'quoted' "quoted" C:\\data
    Müll/表 *a &a !x %x yes null.x .inf ${local_rank} $$ 1_000 = << a,b \u2028 `x`""".split(None)
TEXTS += ["/x/exp #3", "a: b", " spaces ", "- x", "# x", "tab\there", "line\nbreak", "\u2028"]


def dry_run(*args: object) -> int:
    """The exit code of run_experiment.py --dry-run."""
    return run_cli(lambda: run_experiment.main([*map(str, args), "--dry-run"]))


def refused(capsys, *args: object) -> str:
    """What a dry run says on stderr: one line, and nothing else."""
    code = dry_run(*args)
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1), err
    return err.removeprefix("error: ").removesuffix("\n")


# -------------------------------------------------------------------------------------------- Text


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_it_is_typed(text, tmp_path, capsys):
    """From an override and a flag, into the resolved config, and back from that as a file."""
    assert dry_run("--config", HUB, "--output-dir", text, f"dataset.subset={text}") == 0
    (tmp_path / "resolved.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    config = load_config(tmp_path / "resolved.yaml")
    folder = os.path.expanduser(text)
    assert (config.logging.output_dir, config.dataset.subset) == (folder, text)
    assert config == load_config(HUB, [f"logging.output_dir={text}", f"dataset.subset={text}"])
    as_json = json.dumps(config.model_dump(), indent="\t")
    (tmp_path / "same.json").write_text(as_json, encoding="utf-8")
    assert load_config(tmp_path / "same.json") == config


def test_null_is_no_value_where_there_may_be_none():
    assert load_config(HUB, ["dataset.subset=null"]).dataset.subset is None
    assert load_config(None, ["training.max_minutes=null"]).training.max_minutes is None
    assert load_config(None, ["logging.output_dir=null"]).logging.output_dir == "null"
    assert load_config(None) == Config()


def test_the_word_null_goes_into_a_file_in_quotes(tmp_path):
    (tmp_path / "a.yaml").write_text('dataset: {subset: "null"}')
    config = load_config(tmp_path / "a.yaml")
    assert config.dataset.subset == "null"
    (tmp_path / "b.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "b.yaml") == config


def test_a_date_in_a_file_is_text_and_a_number_needs_quotes(tmp_path, capsys):
    path = tmp_path / "a.yaml"
    path.write_text("logging: {output_dir: 2026-11-26}\ndataset: {subset: 12:30}\n")
    config = load_config(path)
    assert (config.logging.output_dir, config.dataset.subset) == ("2026-11-26", "12:30")
    path.write_text("dataset: {revision: 1234567}\n")
    assert refused(capsys, "--config", path).endswith("got 1234567; in quotes it is text")


def test_json_may_have_tabs_and_no_key_twice(tmp_path, capsys):
    text = '{\n\t"dataset":\t{"subset": "\\ud83d\\ude00"}\n}'
    for name in ("a.json", "a.JSON", "a.yaml", "a"):
        (tmp_path / name).write_text(text)
        assert load_config(tmp_path / name).dataset.subset == "😀"
    for name in ("b.json", "b.yaml"):
        path = tmp_path / name
        path.write_text('{"training": {"lr": 1,\t"lr": 2}}')
        twice = f"{path}: not valid YAML or JSON: key 'lr' stands there twice"
        assert refused(capsys, "--config", path) == twice
    path = tmp_path / "c.json"
    path.write_text("training: {lr: 1}")
    assert refused(capsys, "--config", path).startswith(
        f"{path}: not valid YAML or JSON: Expecting value"
    )


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
    assert refused(capsys, "--config", tmp_path / "a.json").startswith(f"{tmp_path / 'a.json'}: ")


def test_arguments_that_are_no_text_are_refused(capsys):
    for says, *args in (
        ("logging.output_dir: expected", DIGITS, "--output-dir", b"a\xff"),
        ("cannot read the config", b"/nowhere/\xff.yaml"),
    ):
        assert says in refused(capsys, "--config", *map(os.fsdecode, args))


def test_an_env_file_that_is_not_utf_8_is_named(tmp_path):
    shutil.copytree(REPO / "scripts", tmp_path / "scripts")
    (tmp_path / ".env").write_bytes(b"HF_TOKEN=\xe4\n")
    line = [sys.executable, tmp_path / "scripts/analyze_results.py", "--results-dir", tmp_path]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"error: {tmp_path}/.env: ")


def test_every_process_of_a_run_gets_the_text_as_it_is(tmp_path):
    """torchrun replaces ${local_rank} and $$ in what it passes on, and in the script's own name."""
    script = tmp_path / "a  b #3 ${local_rank} $$ 'c' \"d\".py"
    write = "open(f'{sys.argv[0]}.{os.environ[\"RANK\"]}', 'w').write(json.dumps(sys.argv[1:]))"
    script.write_text(f"import json, os, sys\n{write}\n")
    texts = ["--output-dir", *TEXTS, "--nproc", ""]
    assert exit_code(forked(lambda: launch(script, 2, 0, texts), tmp_path / "output")) == 0
    for rank in range(2):
        assert json.loads(Path(f"{script}.{rank}").read_text()) == texts


@pytest.mark.long
def test_a_sweep_passes_text_on_as_it_is(tmp_path, parquet_folder, capsys):
    """Two runs whose texts differ behind a # only, each with its own log; a config file with = in
    its name.
    """
    path = tmp_path / "lr=1.yaml"
    folder = tmp_path / "exp #3\u2028x"
    path.write_text(
        "model: {name: test_resnet}\ndataset: {type: hf, split_val: test, num_classes: 3}\n"
    )
    names = [f"{tmp_path}/12:30 #{number}" for number in (1, 2)]
    for name in names:
        shutil.copytree(parquet_folder, name)
    quick = "training.epochs=1 ast.mode=dense dataset.max_train_samples=32 training.device=cpu"
    quick += " dataset.max_val_samples=16 training.num_workers=0 dataset.image_size=8"
    args = ["--configs", str(path), "--output-dir", str(folder), *quick.split()]
    args += [f"logging.jsonl_path={tmp_path}/log #1.jsonl"]
    args += ["--grid", f"dataset.name={','.join(names)}"]
    args += ["--variants", "dataset.revision=it\\x"]
    assert run_cli(lambda: run_sweep.main(args)) == 0, capsys.readouterr()
    configs = [
        json.loads(each.read_text())["config"]["dataset"]
        for each in folder.glob("final_results_*.json")
    ]
    assert sorted(each["name"] for each in configs) == names
    assert {each["revision"] for each in configs} == {"it\\x"}
    assert len(list(tmp_path.glob("log #1.*.jsonl"))) == 2
    (summary,) = folder.glob("sweep_summary_*.jsonl")
    assert all(json.loads(line)["results_file"] for line in summary.read_text().splitlines())


def test_a_quote_that_is_not_closed_is_refused(capsys):
    args = ["--configs", DIGITS, "--variants", "dataset.name=it's"]
    assert run_cli(lambda: run_sweep.main(args)) == 2
    said = 'error: --variants "dataset.name=it\'s": No closing quotation\n'
    assert capsys.readouterr().err == said


# ----------------------------------------------------------------------------------------- Numbers


WHOLE = {"010": 10, "+7": 7, "0": 0}
DECIMAL = {"1e-3": 0.001, ".5": 0.5, "0010": 10.0}
NO_WHOLE = [
    "0x10",
    "0o10",
    "0b1",
    "1_000",
    "12:30",
    "1e3",
    "１０",
    "9" * 5000,
    "5 # five",
    "",
    "'5'",
]
NO_DECIMAL = ["1_0.5", "1:30"]
NUMBERS = [
    *(("seed", text, WHOLE.get(text)) for text in [*WHOLE, *NO_WHOLE]),
    *(("lr", text, DECIMAL.get(text)) for text in [*DECIMAL, *NO_DECIMAL]),
]


@pytest.mark.parametrize(("key", "text", "number"), NUMBERS)
def test_a_number_has_one_meaning(key, text, number, tmp_path, capsys):
    """As a flag and in a YAML file alike: decimal, or refused in a line that names the key."""
    path = tmp_path / "a.yaml"
    path.write_text(f"training:\n  {key}: {text or '!!str'}\n", encoding="utf-8")
    ways = [["--config", DIGITS, f"--{key}", text], ["--config", str(path)]]
    for args in ways[: 1 if "#" in text else 2]:  # in a file, that is a comment
        if number is None:
            line = refused(capsys, *args)
            assert f"training.{key}" in line or "integer string conversion" in line
        else:
            assert dry_run(*args) == 0
            assert f"  {key}: {number}\n" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- Refusals


def test_an_error_of_an_override_names_it_and_not_the_file(tmp_path, capsys):
    path = tmp_path / "a.yaml"
    path.write_text("training: {lr: 0.1, min_lr: 0.01}\nast: {anneal_epochs: 2}\n")
    expected = {
        "training.lr=x": "training.lr: expected a valid number, got 'x'",
        "training.lr=0.001": "training.min_lr: at most training.lr=0.001",
        "training.epochs=3": (
            "ast.warmup_epochs: with 1 dense epochs at the start and 2 at the end, none of "
            "training.epochs=3 is sparse; lower ast.warmup_epochs or ast.anneal_epochs, or raise "
            "training.epochs"
        ),
        "dataset.type=folder": (
            "dataset.train_dir: needed with dataset.type=folder; also dataset.val_dir: needed with "
            "dataset.type=folder, or dataset.val_fraction"
        ),
        "traning.lr=3": "traning: unknown key; did you mean training?",
    }
    for override, line in expected.items():
        assert refused(capsys, "--config", path, override) == f"override {override!r}: {line}"
    path.write_text("training: {lr: -1}\n")
    line = refused(capsys, "--config", path, "training.epochs=3")
    assert line.startswith(f"{path}: training.lr: ")


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("training.warmup_epochs", "training.lr_warmup_epochs"),
        ("dataset.resolution", "dataset.cache_resolution"),
        ("ast.batch_size", "training.batch_size"),
        ("training.lerning_rate", "training.lr"),
        ("training.learning_rate", "training.lr"),
        ("training.bs", "training.batch_size"),
        ("training.num_epochs", "training.epochs"),
        ("training.weight-decay", "training.weight_decay"),
        ("learning_rate", "training.lr"),
    ],
)
def test_a_suggestion_comes_from_the_same_section_first(key, near, capsys):
    line = refused(capsys, "--config", DIGITS, f"{key}=3")
    said = f"{key}: unknown key" if "." in key else "expected section.key=value"
    assert line.endswith(f"{said}; did you mean {near}?")


def test_all_errors_are_shown_at_once(tmp_path, capsys):
    """Each after the file or the override that it is of; of many, the first ones and how many."""
    path = tmp_path / "a.yaml"
    path.write_text("training: {lr: -1, epochs: two}\nmodel: {nam: x}\n")
    assert refused(capsys, "--config", path, "ast.mode=sparse", "training.seed=x") == (
        f"{path}: model.nam: unknown key; did you mean model.name?; also override "
        "'ast.mode=sparse': ast.mode: expected 'ast', 'dense' or 'random', got 'sparse'; also "
        f"{path}: training.epochs: expected a valid integer, got 'two'; also training.lr: expected "
        "greater than 0, got -1; also override 'training.seed=x': training.seed: expected a valid "
        "integer, got 'x'"
    )
    path.write_text(json.dumps({"ast": {f"no{i}": i for i in range(9)}}))
    assert refused(capsys, "--config", path).endswith("; also 4 more")


# ------------------------------------------------------------------------------------------ Random


SEED = 20261126
PRESETS = [path.read_bytes() for path in sorted((REPO / "configs").glob("*.yaml"))]
KEYS = list(config_keys())
FREE = """dataset.subset dataset.revision dataset.name dataset.split_train logging.output_dir
    logging.jsonl_path dataset.label_key""".split()  # any text, in HUB
PATHS = ["dataset.name", "logging.output_dir", "logging.jsonl_path"]  # of them
NUMERIC = """training.seed training.epochs dataset.max_train_samples training.early_stop_patience
    training.lr training.max_minutes ast.entropy_weight ast.kp metrics.gpu_tdp_watts""".split()
ALPHABET = (
    "abcXYZ0123456789 "
    "\t\n\r#:;,.=+-_*&!%@`'\"\\/|<>()[]{}~^?$äß表😀\u00a0\u0085\u2028\ufeff\x0b\x1b\x7f\0\udcff"
)
WORDS = """null Null ~ true no off yes 2026-11-26 12:30 010 0x1F 0o17 1_000 1e3 .inf -.NaN # ---
    ... !!int &a *a << = @x | ${local_rank} $$ 1e999 ' " [ ] { } {} [] '' "" \\ud800""".split()
WORDS += [" #", ": ", "- ", "%YAML 1.1", "!!int 3", "9" * 400]
FORMS = "{0} 0{0} +{0} -{0} {0}.{0} .{0} {0}e-{1} 0x{0} 0o{0} {0}_{0} {0}:{0} {0}. {0}E2".split()


def some_text(dice: random.Random) -> str:
    pieces = [
        dice.choice(WORDS) if dice.random() < 0.4 else dice.choice(ALPHABET)
        for _ in range(dice.randint(0, 6))
    ]
    return "".join(pieces)


def some_number(dice: random.Random) -> str:
    digits = "".join(dice.choice("0123456789") for _ in range(dice.randint(1, 4)))
    return dice.choice([*FORMS, " 1"]).format(digits, digits[0])


def decimal(text: str) -> Decimal | None:
    """The number that a text is, by the one meaning that numbers have; None where it is none."""
    form = r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?"
    return Decimal(text) if re.fullmatch(form, text) else None


def value_of(config: Config, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def meant(key: str, text: str) -> str:
    """What a text stands for: in a path `~` is the home folder."""
    return os.path.expanduser(text) if key in PATHS else text


def read_right(key: str, text: str, value: object) -> bool:
    """Whether an accepted value is what was written."""
    is_text, may_be_null = takes_text(*key.split("."))
    if value is None:
        return text == "null" if is_text else may_be_null or text in ("null", "Null", "NULL", "~")
    if is_text:
        return value == meant(key, text)
    return decimal(text) is not None and float(decimal(text)) == float(value)


def refusal(error: RequestError, named: object) -> str:
    line = str(error)
    assert "\n" not in line
    assert "Traceback" not in line
    assert str(named) in line
    return line


def try_override(dice: random.Random, met: Counter, *_: object) -> None:
    """One override, in process: read right, or refused in a line that names it."""
    key = dice.choice(FREE + NUMERIC)
    text = some_number(dice) if key not in FREE or dice.random() < 0.2 else some_text(dice)
    try:
        value = value_of(load_config(HUB, [f"{key}={text}"]), key)
    except RequestError as error:
        refusal(error, key)
        sound = text and not {"\0", "\udcff"} & set(text)
        nobody = key in PATHS and meant(key, text).startswith("~")
        free = key in FREE and key != "logging.jsonl_path" and not nobody
        assert not (sound and free), (key, text)
        met["override refused"] += 1
    else:
        assert read_right(key, text, value), (key, text, value)
        met["override read"] += 1


def try_file(dice: random.Random, met: Counter, folder: Path, _: object) -> None:
    """A file of random texts, as JSON or YAML in some encoding."""
    texts = {key: some_text(dice) for key in dice.sample(FREE, dice.randint(1, 4))}
    sections: dict[str, dict[str, str]] = {}
    for key, text in texts.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = text
    kind = dice.choice(["json", "tabs", "yaml", "unicode"])
    written = json.dumps(
        sections, ensure_ascii=kind != "unicode", indent="\t" if kind == "tabs" else None
    )
    if kind == "yaml":
        written = yaml.safe_dump(sections, default_flow_style=dice.choice([True, False]))
    encoding = dice.choice(["utf-8"] * 6 + ["utf-8-sig", "latin-1", "utf-16", "cp1252"])
    errors = "surrogatepass" if encoding.startswith("utf") else "replace"
    path = folder / ("a.yaml" if kind == "yaml" else dice.choice(["a.json", "a.yaml", "a"]))
    path.write_bytes(written.encode(encoding, errors))
    try:
        config = load_config(path)
    except RequestError as error:
        refusal(error, path)
        met[f"{kind} refused"] += 1
        return
    if encoding.startswith("utf-8"):
        found = {key: value_of(config, key) for key in texts}
        assert found == {key: meant(key, text) for key, text in texts.items()}, written
    met[f"{kind} read"] += 1


def try_number(dice: random.Random, met: Counter, folder: Path, _: object) -> None:
    """A number in a YAML file means what it means in an override, or is refused there too."""
    key = dice.choice(NUMERIC)
    text = some_number(dice).strip()
    section, name = key.split(".")
    (folder / "b.yaml").write_text(f"{section}:\n  {name}: {text}\n")
    try:
        value = value_of(load_config(folder / "b.yaml"), key)
    except RequestError as error:
        refusal(error, key)
        with pytest.raises(RequestError):
            load_config(None, [f"{key}={text}"])
        met["number refused"] += 1
    else:
        assert read_right(key, text, value), (key, text, value)
        met["number read"] += 1


def ended_well(args: list[str], capsys, case: object) -> str | None:
    """What a dry run prints; None where it is refused in one line."""
    capsys.readouterr()
    code = dry_run(*args)
    out, err = capsys.readouterr()
    assert (code, err.count("\n")) in ((0, 0), (2, 1)), (case, err)
    assert code == 0 or err.startswith("error: "), err
    return out if code == 0 else None


def try_command(dice: random.Random, met: Counter, folder: Path, capsys) -> None:
    """Overrides of any key, by the command; what it prints is read again as the same config."""
    pairs = [
        (dice.choice(KEYS), dice.choice([some_text, some_number])(dice))
        for _ in range(dice.randint(0, 2))
    ]
    pairs.append((dice.choice(FREE), some_text(dice)))
    overrides = [f"{key}={text}" for key, text in pairs]
    printed = ended_well(["--config", HUB, *overrides], capsys, overrides)
    met["command refused" if printed is None else "command read"] += 1
    if printed is not None:
        (folder / "printed.yaml").write_text(printed, encoding="utf-8")
        assert load_config(folder / "printed.yaml") == load_config(HUB, overrides), overrides


def try_preset(dice: random.Random, met: Counter, folder: Path, capsys) -> None:
    """A preset with some of its bytes changed, by the command."""
    path = folder / "config.yaml"
    path.write_bytes(hostile := mutated(dice.choice(PRESETS), dice))
    printed = ended_well(["--config", str(path)], capsys, hostile)
    met["preset refused" if printed is None else "preset read"] += 1
    assert not Path("/tmp/pwned").exists()


TRIES = (try_override, try_file, try_number, try_command, try_preset)


def try_all(times: int, folder: Path, capsys) -> Counter:
    """So many random cases of each kind. Returns how each ended."""
    dice = random.Random(SEED)
    met: Counter = Counter()
    for _ in range(times):
        for try_one in TRIES:
            started = time.monotonic()
            try_one(dice, met, folder, capsys)
            assert time.monotonic() - started < 10
    return met


def test_random_configs_are_read_right_or_refused(tmp_path, capsys):
    met = try_all(100, tmp_path, capsys)
    for kind in ("override", "json", "number", "command", "preset"):
        assert met[f"{kind} read"] > 5, kind
        assert met[f"{kind} refused"] > 0, kind


@pytest.mark.long
def test_twelve_thousand_random_configs_are_read_right_or_refused(tmp_path, capsys):
    met = try_all(2500, tmp_path, capsys)
    with capsys.disabled():
        print(f"\nseed {SEED}: {dict(sorted(met.items()))}")
