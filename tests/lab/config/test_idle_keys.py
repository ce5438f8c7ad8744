"""Which part reads which key, and what becomes of a key that nothing reads."""

import json

import pytest
import yaml

import run_sweep
import train_ast
from conftest import REPO, make_config
from helpers import run_digits
from lab.config import keys
from lab.config.keys import all_needs, idle_keys, spelled, unmet
from lab.config.loading import Config, config_keys
from lab.config.sections import ASTConfig
from lab.study.cli import options_help, run_cli
from train_ast import RULES, SCORINGS, Rule, train, unread_keys

DEFAULTS = spelled(Config().model_dump())
SMALL = ["model.name=test_resnet", "dataset.image_size=16", "dataset.max_train_samples=64"]
SMALL += ["dataset.max_val_samples=32", "training.epochs=2", "ast.warmup_epochs=1"]


def settings(**changed):
    return DEFAULTS | {key.replace("__", "."): value for key, value in changed.items()}


def test_the_parts_read_the_keys_of_the_page():
    """And no part has a key that the config does not know."""
    assert {name: part.KEYS for name, part in SCORINGS.items()} == keys.SCORING_KEYS
    assert {name: part.KEYS for name, part in RULES.items()} == keys.RULE_KEYS
    replaced = {name: part.REPLACES for name, part in RULES.items() if part.REPLACES}
    assert replaced == keys.RULE_REPLACES
    for key, needs in all_needs().items():
        assert {key, *needs} <= config_keys().keys()
    assert {leaf for part in SCORINGS.values() for leaf in part.KEYS} <= set(ASTConfig.model_fields)


@pytest.mark.parametrize(
    ("key", "changed", "missing"),
    [
        ("ast.kp", {}, []),
        ("ast.kp", {"ast__rule": "topk"}, ["ast.rule=pi"]),
        ("ast.explore", {}, ["ast.scoring=history"]),
        ("ast.explore", {"ast__scoring": "history"}, []),
        (
            "ast.explore",
            {"ast__rule": "infobatch"},
            ["ast.scoring=history", "ast.rule=pi or topk"],
        ),
        ("ast.target_activation", {"ast__rule": "infobatch"}, ["ast.rule=pi or topk"]),
        ("ast.pack", {"ast__scoring": "proxy"}, []),
        ("ast.pack", {"ast__scoring": "history"}, ["ast.scoring=batch or proxy"]),
        ("dataset.cache_folder", {}, ["dataset.cache=device or disk"]),
        ("dataset.cache_folder", {"dataset__cache": "device"}, []),  # files that are there
        ("ast.mode", {"ast__scoring": "history"}, []),  # every run reads it
        ("training.momentum", {"training__optimizer": "lamb"}, ["training.optimizer=sgd or muon"]),
        ("dataset.padding", {}, ["dataset.augment=pad_crop"]),  # auto, of digits: none
        ("dataset.padding", {"dataset__type": "folder"}, []),  # at 32 px: pad_crop
        (
            "dataset.padding",
            {"dataset__type": "folder", "dataset__image_size": "65"},
            ["dataset.augment=pad_crop"],
        ),
        (
            "dataset.cache_resolution",
            {"dataset__type": "folder", "dataset__image_size": "65", "dataset__cache": "disk"},
            [],
        ),
    ],
)
def test_what_would_have_to_be_for_a_key_to_be_read(key, changed, missing):
    assert list(unmet(key, settings(**changed), all_needs())) == missing


def test_only_what_differs_from_its_default_is_idle():
    needs = all_needs()
    assert idle_keys(DEFAULTS, DEFAULTS, needs) == {}
    changed = settings(
        ast__rule="topk", ast__kp="0.3", ast__ki=DEFAULTS["ast.ki"], ast__pack="true"
    )
    assert idle_keys(changed, DEFAULTS, needs) == {"ast.kp": "ast.rule=pi"}
    for mode in ("dense", "random"):  # they are compared with a sparse run of the same file
        assert idle_keys(changed | {"ast.mode": mode}, DEFAULTS, needs) == {}
    adamw = changed | {"ast.mode": "dense", "training.optimizer": "adamw", "training.momentum": "0"}
    assert list(idle_keys(adamw, DEFAULTS, needs)) == ["training.momentum"]


class Half(Rule):
    """The first half of a pool, by a key that another rule reads too."""

    KEYS = ("kp",)


def test_a_part_of_ones_own_says_itself_what_it_reads(monkeypatch):
    monkeypatch.setitem(RULES, "half", Half)
    assert unread_keys(make_config("ast.rule=half", "ast.kp=0.3")) == {}
    with pytest.raises(train_ast.RequestError, match="ast.ki: nothing reads it here; it needs a"):
        make_config("ast.rule=half", "ast.ki=0.3")
    own = Config.model_validate({"ast": {"rule": "topk", "kp": 0.3}})
    assert unread_keys(own) == {"ast.kp": "ast.rule=pi or half"}


def test_the_help_says_what_reads_a_key():
    text = " ".join(options_help().split())
    for key, reader in (
        ("ast.kp (default 0.1)", ". Read with ast.rule=pi ast.ki ("),
        ("ast.explore (default", ". Read with ast.scoring=history and ast.rule=pi or topk ast."),
    ):
        told = text.partition(f" {key}")[2]
        assert told.index(reader) < 200


def written(tmp_path, **sections):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.dump(sections))
    return str(path)


def test_an_idle_key_in_a_file_is_noted_once_and_kept_in_the_results(tmp_path, capsys):
    asked = {
        "ast": {"rule": "topk", "kp": 0.3},
        "training": {"optimizer": "adamw", "momentum": 0.5},
    }
    more = [*SMALL, "training.device=cpu", "training.num_workers=0"]
    argv = ["--config", written(tmp_path, **asked), *more, f"logging.output_dir={tmp_path}/out"]
    for _ in range(2):  # a resumed run says so too
        assert run_cli(lambda: train_ast.main([*argv, "--resume", "auto"])) == 0
        printed = capsys.readouterr().out
        notes = [line for line in printed.splitlines() if "nothing reads" in line]
        assert notes == ["note: nothing reads ast.kp, training.momentum in this run"]
        (path,) = (tmp_path / "out").glob("final_results_*.json")
        assert json.loads(path.read_text())["idle_keys"] == ["ast.kp", "training.momentum"]
        path.unlink()  # or the run is finished, and is not resumed


def test_a_run_without_idle_keys_says_nothing_of_them(tmp_path, capsys):
    result, _ = train(make_config(*SMALL, f"logging.output_dir={tmp_path}"))
    assert result["idle_keys"] == []
    assert "nothing reads" not in capsys.readouterr().out


def test_an_idle_key_on_the_command_line_trains_nothing(tmp_path, capsys):
    assert run_digits(tmp_path, "ast.rule=topk", "ast.kp=2") == 2
    assert capsys.readouterr().err == (
        "error: override 'ast.kp=2': ast.kp: nothing reads it here; it needs ast.rule=pi\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "asked",
    [
        ["--grid", "ast.kp=0.5,2", "--dry-run"],
        ["--grid", "ast.kp=0.5,2"],
        ["--variants", "ast.kp=2", "ast.kp=3 training.seed=2"],
        ["--seeds", "1", "ast.kp=2"],
    ],
)
def test_a_sweep_over_an_idle_key_is_refused_naming_what_would_read_it(asked, tmp_path, capsys):
    config = written(tmp_path, ast={"rule": "topk"})
    argv = ["--configs", config, "--output-dir", str(tmp_path / "out"), *asked]
    assert run_cli(lambda: run_sweep.main(argv)) == 2
    error = capsys.readouterr().err
    assert "ast.kp: nothing reads it here; it needs ast.rule=pi" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_in_a_sweep_over_rules_the_idle_points_alone_are_refused(tmp_path, capsys):
    """The dense one among them counts as read: it is the baseline of the others."""
    smoke = str(REPO / "configs/digits_smoke.yaml")
    grid = ["--grid", "ast.rule=pi,topk", "ast.kp=2", "ast.mode=ast,dense", "--dry-run"]
    argv = ["--configs", smoke, "--output-dir", str(tmp_path / "out"), *grid]
    assert run_cli(lambda: run_sweep.main(argv)) == 0
    captured = capsys.readouterr()
    said = (captured.out + captured.err).splitlines()
    refused = [line for line in said if "nothing reads it here" in line]
    assert len(refused) == 1
    assert "ast.rule=topk ast.kp=2 ast.mode=ast" in refused[0]
