"""Which key acts in which combination of parts: trained, and compared with what the table says."""

from __future__ import annotations

import csv
import functools
import itertools
import json
import tempfile
from pathlib import Path

import pytest
import yaml

import train_ast
from lab.config.keys import BUILT_IN, all_needs, spelled, unmet
from train_ast import RULES, SCORINGS, load_config, train

PAIRS = list(itertools.product(SCORINGS, RULES))
# By key, a value that shows in a run of the base config wherever the key is read.
AST_VALUES = {
    "measure": "margin",
    "entropy_weight": 0.2,
    "target_activation": 0.75,
    "forget_rate": 0.2,
    "warmup_epochs": 2,
    "anneal_epochs": 1,
    "min_active": 16,
    "kp": 2.0,
    "ki": 1.0,
    "kp_warmup_epochs": 8.0,
    "ki_warmup_epochs": 8.0,
    "initial_threshold": 2.0,
    "min_threshold": 8.0,
    "threshold_unit": "raw",
    "explore": 0.3,
    "score_resolution": 8,
    "score_statistics": "batch",
    "proxy_model": "test_resnet",
    "pack": True,
    "candidates": 0.8,
    "reuse_forward": True,
}
BASE = {
    "model": {"name": "small_conv"},
    "dataset": {
        "image_size": 12,
        "max_train_samples": 96,
        "max_val_samples": 32,
        "label_noise": 0.2,
    },
    "training": {"batch_size": 16, "epochs": 4, "device": "cpu", "lr": 0.1},
    "ast": {"kp": 1.0, "ki": 0.1, "target_activation": 0.4},
    "metrics": {"base_flop_per_sample": 1e6},
}
CLOCKED = {"step_time_ms", "est_energy_kj", "train_seconds", "energy_kj"}


def margin(logits, labels, entropy_weight):
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -1e9).amax(1, keepdim=True)
    return (others - own)[:, 0].float().exp()


def laid_over(*changes: dict) -> dict:
    """BASE with sections of values laid over it."""
    config = {section: dict(values) for section, values in BASE.items()}
    for change in changes:
        for section, values in change.items():
            config.setdefault(section, {}).update(values)
    return config


@functools.cache
def figures(text: str) -> tuple[str, list]:
    """What a run of a config leaves that its keys decide: its history, its list of suspects."""
    with tempfile.TemporaryDirectory() as folder:
        result, _ = train(load_config(None, [f"logging.output_dir={folder}"], text))
        lists = Path(folder).glob("suspected_labels_*.csv")
        listed = [list(csv.reader(path.open())) for path in lists]
    history = {k: v for k, v in result["training_history"].items() if k not in CLOCKED}
    return json.dumps(history), listed


def pair_config(scoring: str, rule: str) -> dict:
    ast = {"scoring": scoring, "rule": rule}
    if rule == "infobatch":
        ast["entropy_weight"] = 0.0
    return laid_over({"ast": ast})


def check_key(scoring: str, rule: str, leaf: str) -> None:
    """A key changes the run where the table says that it acts, and nowhere else."""
    base = pair_config(scoring, rule)
    changed = pair_config(scoring, rule)
    changed["ast"][leaf] = AST_VALUES[leaf]
    settings = spelled(load_config(None, text=yaml.dump(base)).model_dump())
    acts = not list(unmet(f"ast.{leaf}", settings, all_needs()))
    one = figures(yaml.dump(base))
    two = figures(yaml.dump(changed))
    assert (one != two) == acts, f"ast.{leaf} with {scoring} and {rule}"


CELLS = [(*pair, leaf) for pair in PAIRS for leaf in AST_VALUES]
# infobatch refuses a weight of the entropy; a store whose choice is far larger has no floor
CELLS = [
    cell
    for cell in CELLS
    if cell[1:] != ("infobatch", "entropy_weight")
    and (cell[0], cell[2]) != ("history", "min_active")
    # refused elsewhere, from a file too: what it replaces would be idle there
    and (cell[2] != "reuse_forward" or cell[:2] in (("batch", "pi"), ("batch", "topk")))
]


@pytest.fixture(autouse=True)
def _margin(monkeypatch):
    monkeypatch.setitem(train_ast.MEASURES, "margin", margin)


@pytest.mark.parametrize(("scoring", "rule", "leaf"), CELLS[::19])
def test_a_key_acts_where_the_table_says_so(scoring, rule, leaf):
    check_key(scoring, rule, leaf)


@pytest.mark.long
@pytest.mark.parametrize(("scoring", "rule", "leaf"), CELLS)
def test_every_key_acts_where_the_table_says_so(scoring, rule, leaf):
    check_key(scoring, rule, leaf)


def test_the_table_of_cells_holds_every_key():
    known = {key.partition(".")[2] for key in spelled({"ast": load_config(None).ast.model_dump()})}
    assert known == {"mode", "scoring", "rule", *AST_VALUES}


def test_what_is_known_without_torch_is_what_the_tables_hold():
    tables = (*train_ast.CLOSED, train_ast.MODELS, train_ast.OPTIMIZERS)
    held = {table.key: {*table.others, *table} - {"margin"} for table in tables}
    assert held == {key: {*names} for key, names in BUILT_IN.items()}


OTHER = [  # a key, its value, where it is idle, where it acts
    ("training.momentum", 0.5, {"training": {"optimizer": "adamw", "lr": 0.01}}, {}),
    ("training.nesterov", True, {"training": {"optimizer": "adamw", "lr": 0.01}}, {}),
    ("training.min_lr", 0.05, {"training": {"lr_schedule": "constant"}}, {}),
    (
        "training.label_smoothing",
        0.2,
        {"training": {"loss": "generalised_cross_entropy"}},
        {"training": {"loss": "early_learning"}},
    ),
    ("dataset.padding", "reflect", {}, {"dataset": {"augment": "pad_crop"}}),
    ("dataset.train_dir", "nowhere", {}, None),
    ("dataset.name", "nowhere", {}, None),
    ("dataset.cache_resolution", 9, {"dataset": {"cache": "device"}}, None),
    ("dataset.cache_format", "raw", {}, None),
]


@pytest.mark.parametrize(("key", "value", "idle", "acting"), OTHER)
def test_a_key_outside_the_selection_acts_where_the_table_says_so(key, value, idle, acting):
    section, _, leaf = key.partition(".")
    change = {section: {leaf: value}}
    dense = {"ast": {"mode": "dense"}, "training": {"epochs": 2}}
    for number, where in enumerate(each for each in (idle, acting) if each is not None):
        config = laid_over(dense, where)
        settings = spelled(load_config(None, text=yaml.dump(config)).model_dump())
        acts = not list(unmet(key, settings, all_needs()))
        assert acts == (number == 1)
        one = figures(yaml.dump(config))
        two = figures(yaml.dump(laid_over(dense, where, change)))
        assert (one != two) == acts
