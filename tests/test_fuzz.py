"""Random configs and overrides: refused in one line or read right, never a traceback and never a
hang.

Text must come back verbatim, and numbers as the decimals that they are. The long form says what it
met: `python -m pytest -n 0 -m long -s tests/test_fuzz.py`.
"""

import json
import os
import random
import re
import time
from collections import Counter
from decimal import Decimal

import pytest
import yaml

import run_experiment
from conftest import REPO
from lab.base.errors import RequestError
from lab.config.loading import Config, takes_text
from lab.study.cli import run_cli
from train_ast import load_config

SEED = 20261126
DIGITS = str(REPO / "configs/digits_smoke.yaml")
KEYS = [
    (section, name)
    for section, part in Config.model_fields.items()
    for name in part.annotation.model_fields
]
FREE = [
    "dataset.subset",
    "dataset.revision",
    "dataset.name",
    "dataset.train_dir",
    "logging.output_dir",
]  # any text
FREE += ["logging.jsonl_path", "dataset.cache_dir", "dataset.split_train", "model.name"]
PATHS = [key for key in FREE if key not in ("dataset.subset", "dataset.revision", "model.name")]
PATHS.remove("dataset.split_train")
WHOLE = [
    "training.seed",
    "training.epochs",
    "dataset.max_train_samples",
    "training.early_stop_patience",
]
REAL = [
    "training.lr",
    "training.max_minutes",
    "ast.entropy_weight",
    "ast.kp",
    "metrics.gpu_tdp_watts",
]
ALPHABET = (
    "abcXYZ0123456789 "
    "\t\n\r#:;,.=+-_*&!%@`'\"\\/|<>()[]{}~^?$äß表😀\u00a0\u0085\u2028\ufeff\x0b\x1b\x7f\0\udcff"
)
WORDS = [
    "null",
    "Null",
    "~",
    "true",
    "no",
    "off",
    "yes",
    "2026-11-26",
    "12:30",
    "010",
    "0x1F",
    "0o17",
    "1_000",
    "1e3",
]
WORDS += [
    ".inf",
    "-.NaN",
    "#",
    " #",
    ": ",
    "- ",
    "---",
    "...",
    "%YAML 1.1",
    "!!int 3",
    "&a",
    "*a",
    "<<",
    "=",
    "@x",
    "|",
]
WORDS += [
    "${local_rank}",
    "$$",
    "9" * 400,
    "1e999",
    "'",
    '"',
    "[",
    "]",
    "{",
    "}",
    "{}",
    "[]",
    "''",
    '""',
    "\\ud800",
]


def some_text(dice: random.Random) -> str:
    pieces = [
        dice.choice(WORDS) if dice.random() < 0.4 else dice.choice(ALPHABET)
        for _ in range(dice.randint(0, 6))
    ]
    return "".join(pieces)


def some_number(dice: random.Random) -> str:
    digits = "".join(dice.choice("0123456789") for _ in range(dice.randint(1, 4)))
    forms = [
        digits,
        f"0{digits}",
        f"+{digits}",
        f"-{digits}",
        f"{digits}.{digits}",
        f".{digits}",
        f"{digits}e-{digits[:1]}",
    ]
    forms += [
        f"0x{digits}",
        f"0o{digits}",
        f"{digits}_{digits}",
        f"{digits}:{digits}",
        f"{digits}.",
        f"{digits}E2",
        " 1",
    ]
    return dice.choice(forms)


def decimal(text: str) -> Decimal | None:
    """The number that a text is, by the one meaning that numbers have; None where it is none."""
    return (
        Decimal(text)
        if re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", text)
        else None
    )


def value_of(config: Config, key: str):
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
    return (
        value == meant(key, text)
        if is_text
        else decimal(text) is not None and float(decimal(text)) == float(value)
    )


def expect(right: bool, case: object) -> None:
    assert right, case


def refusal(error: RequestError) -> str:
    line = str(error)
    assert "\n" not in line
    assert "Traceback" not in line
    return line


def fuzz_overrides(dice: random.Random, met: Counter) -> None:
    """One override, in process: read right, or refused in a line that names it."""
    key = dice.choice(FREE + WHOLE + REAL)
    text = some_number(dice) if key not in FREE or dice.random() < 0.2 else some_text(dice)
    try:
        config = load_config(DIGITS, [f"{key}={text}"])
    except RequestError as error:
        expect(key in refusal(error), (key, text))
        sound = (
            text
            and not {"\0", "\udcff"} & set(text)
            and key in FREE
            and key != "logging.jsonl_path"
            and not (key in PATHS and meant(key, text).startswith("~"))  # of no user
        )
        expect(not sound, (key, text))
        met["override refused"] += 1
    else:
        assert read_right(key, text, value_of(config, key)), (key, text, value_of(config, key))
        met["override read"] += 1


def fuzz_files(dice: random.Random, met: Counter, folder) -> None:
    """A file of random texts, as JSON or YAML in some encoding, read and read again from what
    --dry-run prints.
    """
    texts = {key: some_text(dice) for key in dice.sample(FREE, dice.randint(1, 4))}
    sections: dict = {}
    for key, text in texts.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = text
    kind = dice.choice(["json", "tabs", "yaml", "unicode"])
    if kind == "yaml":
        written = yaml.safe_dump(sections, default_flow_style=dice.choice([True, False]))
    else:
        written = json.dumps(
            sections, ensure_ascii=kind != "unicode", indent="\t" if kind == "tabs" else None
        )
    encoding = dice.choice(["utf-8"] * 6 + ["utf-8-sig", "latin-1", "utf-16", "cp1252"])
    path = folder / dice.choice(["a.json", "a.yaml", "a"]) if kind != "yaml" else folder / "a.yaml"
    path.write_bytes(
        written.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")
    )
    try:
        config = load_config(path)
    except RequestError as error:
        expect(str(path) in refusal(error), written)
        met[f"{kind} refused"] += 1
        return
    if encoding.startswith("utf-8"):
        assert {key: value_of(config, key) for key in texts} == {
            key: meant(key, text) for key, text in texts.items()
        }, written
    met[f"{kind} read"] += 1


def fuzz_numbers(dice: random.Random, met: Counter, folder) -> None:
    """A number in a YAML file means what it means in an override, or is refused there too."""
    key = dice.choice(WHOLE + REAL)
    text = some_number(dice).strip()
    section, name = key.split(".")
    (folder / "b.yaml").write_text(f"{section}:\n  {name}: {text}\n")
    try:
        value = value_of(load_config(folder / "b.yaml"), key)
    except RequestError as error:
        expect(key in refusal(error), (key, text))
        with pytest.raises(RequestError):
            load_config(None, [f"{key}={text}"])
        met["number refused"] += 1
    else:
        assert read_right(key, text, value), (key, text, value)
        met["number read"] += 1


def fuzz_command(dice: random.Random, met: Counter, folder, capsys) -> None:
    """Overrides of any key, by the command with --dry-run; what it prints is read again as the same
    config.
    """
    pairs = [
        (".".join(dice.choice(KEYS)), dice.choice([some_text, some_number])(dice))
        for _ in range(dice.randint(0, 2))
    ]
    pairs.append((dice.choice(FREE), some_text(dice)))
    overrides = [f"{key}={text}" for key, text in pairs]
    capsys.readouterr()
    code = run_cli(lambda: run_experiment.main(["--config", DIGITS, "--dry-run", *overrides]))
    out, err = capsys.readouterr()
    assert (code, err.count("\n")) in ((0, 0), (2, 1)), (overrides, err)
    met[f"command with exit code {code}"] += 1
    if code == 0:
        (folder / "printed.yaml").write_text(out, encoding="utf-8")
        assert load_config(folder / "printed.yaml") == load_config(DIGITS, overrides), overrides
    else:
        assert err.startswith("error: "), err


def fuzz(times: int, folder, capsys) -> Counter:
    """`times` cases of the four kinds in turn. Returns how each ended."""
    dice = random.Random(SEED)
    met = Counter()
    for number in range(times):
        started = time.monotonic()
        if number % 4 == 0:
            fuzz_overrides(dice, met)
        elif number % 4 == 1:
            fuzz_files(dice, met, folder)
        elif number % 4 == 2:
            fuzz_numbers(dice, met, folder)
        else:
            fuzz_command(dice, met, folder, capsys)
        assert time.monotonic() - started < 10
    return met


def test_two_hundred_random_configs_are_read_right_or_refused(tmp_path, capsys):
    met = fuzz(200, tmp_path, capsys)
    assert {
        "override refused",
        "override read",
        "json read",
        "yaml read",
        "command with exit code 2",
    } <= met.keys()


@pytest.mark.long
def test_ten_thousand_random_configs_are_read_right_or_refused(tmp_path, capsys):
    met = fuzz(10_000, tmp_path, capsys)
    with capsys.disabled():
        print(f"\nseed {SEED}: {dict(sorted(met.items()))}")
