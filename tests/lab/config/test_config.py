"""Configs: strict, named errors, every preset, every documented key."""

import json
import re
from itertools import product
from pathlib import Path

import pytest
import yaml

import run_experiment
from conftest import REPO
from lab.base.errors import RequestError
from lab.config.keys import NAMES
from lab.config.loading import GONE, SECTIONS, Config, config_keys, run_id
from lab.config.names import NETWORK, OPTIMIZER, in_timm
from lab.config.sections import LoggingConfig
from lab.config.together import built_in_traits
from lab.study.cli import options_help, run_cli
from train_ast import load_config, traits_of

PRESETS = sorted((REPO / "configs").glob("*.yaml"))
DOCUMENTED = """
    model.name model.pretrained
    dataset.type dataset.train_dir dataset.val_dir dataset.name dataset.split_train
    dataset.split_val dataset.num_classes dataset.image_size ast.target_activation
    ast.kp ast.ki ast.initial_threshold ast.min_threshold ast.entropy_weight ast.min_active
    ast.kp_warmup_epochs ast.ki_warmup_epochs
    training.lr training.momentum training.weight_decay training.min_lr training.batch_size
    training.epochs training.grad_accum_steps training.mixed_precision training.max_minutes
    training.early_stop_patience
    training.num_workers training.seed
    metrics.base_flop_per_sample metrics.gpu_tdp_watts
    logging.output_dir logging.jsonl_path
    model.small_stem dataset.subset dataset.revision dataset.image_key dataset.label_key
    dataset.max_train_samples dataset.max_val_samples ast.mode ast.scoring ast.pack
    ast.threshold_unit ast.warmup_epochs ast.anneal_epochs training.optimizer
    training.lr_warmup_epochs training.label_smoothing training.grad_clip_norm training.device
""".split()


def test_every_documented_key_exists_and_is_described():
    keys = config_keys()
    assert set(DOCUMENTED) <= set(keys)
    assert all(len(description) > 10 for description, _ in keys.values())
    assert all(key in options_help() for key in keys)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_loads_and_names_only_what_differs(path):
    load_config(path)
    defaults = Config.model_construct().model_dump() | Config().model_dump()
    for section, values in yaml.safe_load(path.read_text()).items():
        for name, value in values.items():
            assert value != defaults[section][name], f"{section}.{name} is the default"


def test_the_documented_presets_are_there():
    expected = (
        "cifar10_resnet18_ast cifar10_resnet18_fast digits_smoke imagenet_resnet50_ast "
        "imagenet_vitb16_ast"
    )
    assert {path.stem for path in PRESETS} >= {
        *expected.split(),
        "imagenette_folder_ast",
        "imagenette_hf_ast",
    }


def test_yaml_json_and_overrides_mean_the_same(tmp_path):
    (tmp_path / "a.yaml").write_text("training:\n  lr: 1e-3\n  epochs: 7\n")
    (tmp_path / "a.json").write_text(json.dumps({"training": {"lr": 1e-3, "epochs": 7}}))
    expected = load_config(None, ["training.lr=1e-3", "training.epochs=7"])
    assert expected.training.lr == 0.001
    assert load_config(tmp_path / "a.yaml") == load_config(tmp_path / "a.json") == expected
    assert load_config(tmp_path / "a.yaml", ["training.lr=0.5"]).training.lr == 0.5


def test_off_is_a_word(tmp_path):
    (tmp_path / "a.yaml").write_text("training:\n  compile: off\n")
    config = load_config(tmp_path / "a.yaml", ["dataset.name=off", "dataset.type=hf"])
    assert (config.training.compile, config.dataset.name) == ("off", "off")
    with pytest.raises(RequestError, match="model.pretrained: expected a valid boolean, got 'yes'"):
        load_config(None, ["model.pretrained=yes"])
    assert load_config(None, ["model.pretrained=true"]).model.pretrained


def test_resolved_config_loads_again(tmp_path):
    config = load_config(REPO / "configs/imagenet_vitb16_ast.yaml")
    (tmp_path / "resolved.yaml").write_text(yaml.safe_dump(config.model_dump()))
    assert load_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "ast.target_activaton=0.3",
            "ast.target_activaton: unknown key; did you mean ast.target_activation?",
        ),
        ("ast.batch_size=3", "ast.batch_size: unknown key; did you mean training.batch_size?"),
        ("ast.target=0.3", "ast.target: unknown key; did you mean ast.target_activation?"),
        ("ast.warmup=3", "ast.warmup: unknown key; did you mean ast.warmup_epochs?"),
        ("training.decay=3", "training.decay: unknown key; did you mean training.weight_decay?"),
        ("dataset.root=x", "dataset.root: unknown key; did you mean dataset.train_dir?"),
        ("traning.lr=3", "traning: unknown key; did you mean training?"),
        ("epochs=3", "did you mean training.epochs?"),
        ("training.epochs", "expected section.key=value"),
        ("training.epochs=ten", "training.epochs: expected a valid integer, got 'ten'"),
        ("training.epochs=2.5", "training.epochs: expected a valid integer"),
        ("training.epochs=true", "training.epochs: expected a valid integer"),
        ("training.lr=.nan", "training.lr: expected a finite number"),
        ("training.lr=-1", "training.lr: expected greater than 0, got -1"),
        ("model.pretrained=1", "model.pretrained: expected a valid boolean"),
        ("ast.mode=sparse", "ast.mode: expected 'ast', 'dense' or 'random', got 'sparse'"),
        (
            "ast.initial_threshold=high",
            "ast.initial_threshold: expected a valid number or 'auto', got 'high'",
        ),
        ("ast.target_activation=0", "ast.target_activation: expected greater than 0"),
        ("training.lr=[", "not a valid value"),
        ("dataset.type=folder", "dataset.train_dir: needed with dataset.type=folder"),
        ("dataset.type=hf", "dataset.name: dataset.type=hf needs"),
        ("training.epochs=1", "none of training.epochs=1 is sparse; lower ast.warmup_epochs"),
        ("ast.min_active=500", "ast.min_active: at most training.batch_size=128"),
        ("training.compile=default", "training.compile: needs ast.pack=true"),
        ("training.compile=max", "training.compile: expected"),
        ("ast.score_resolution=64", "ast.score_resolution: at most dataset.image_size=32"),
        (
            "dataset.cache_resolution=40",
            "dataset.cache_resolution: nothing reads it here; it needs dataset.cache=device or "
            "disk and dataset.augment=random_resized_crop",
        ),
        ("training.lr_decay=time", "training.max_minutes: needed with training.lr_decay=time"),
        ("training.min_lr=9", "training.min_lr: at most training.lr=0.1"),
        (
            "training.min_lr=0.01 training.lr_schedule=constant",
            "training.min_lr: nothing reads it here; it needs training.lr_schedule=cosine or",
        ),
        (
            "model.freeze=true",
            "model.freeze: random features are no use; set model.pretrained=true or model.weights",
        ),
        ("dataset.repeat=0", "dataset.repeat: expected greater than or equal to 1 or 'balanced'"),
        ("training.layer_decay=0", "training.layer_decay: expected greater than 0, got 0"),
        ("training.weight_average=1", "training.weight_average: expected less than 1, got 1"),
        (
            "dataset.augment_policy=auto",
            "dataset.augment_policy: expected 'none', 'rand_augment' or 'trivial_augment'",
        ),
        (
            "dataset.augment_policy=trivial_augment dataset.cache=device",
            "dataset.augment_policy: trivial_augment needs dataset.cache=none",
        ),
        (
            "ast.scoring=history training.mixup=0.2",
            "training.mixup: ast.scoring=history remembers each sample",
        ),
        (
            "ast.scoring=history training.cutmix=1",
            "training.cutmix: ast.scoring=history remembers each sample",
        ),
        ("ast.initial_threshold=-1", "ast.initial_threshold: at least ast.min_threshold=0"),
        ("ast.rule=infobatch", "ast.entropy_weight: 0 for ast.rule=infobatch"),
        (
            "ast.scoring=batch ast.rule=infobatch ast.entropy_weight=0 training.mixup=0.2",
            "training.mixup: ast.rule=infobatch weighs each sample, and a mixture has no one",
        ),
        (
            "ast.forget_rate=0.2 training.cutmix=1",
            "training.cutmix: ast.forget_rate=0.2 remembers each sample",
        ),
        ("ast.scoring=loss", "ast.scoring: expected 'batch', 'proxy' or 'history', got 'loss'"),
        ("ast.rule=top", "ast.rule: expected 'pi', 'topk' or 'infobatch', got 'top'"),
        ("ast.measure=loss", "ast.measure: expected 'loss_entropy', got 'loss'"),
        ("ast.forget_rate=half", "ast.forget_rate: expected 'auto', got 'half'"),
        ("ast.target_activation=half", "ast.target_activation: expected 'auto', got 'half'"),
        (
            "ast.target_activation=unseen",
            "ast.target_activation: unseen is gone: auto judges by pictures kept out",
        ),
        (
            "ast.mode=random ast.target_activation=auto",
            "ast.target_activation: auto needs ast.mode=ast",
        ),
        ("ast.scoring=history ast.explore=0.3", "ast.explore: 0.3 or more of all samples"),
        (
            "ast.scoring=history ast.forget_rate=0.8",
            "ast.forget_rate: leaves fewer than ast.target_activation=0.25",
        ),
        (
            "ast.scoring=history ast.score_resolution=8",
            "ast.score_resolution: nothing reads it here; it needs ast.scoring=batch or proxy",
        ),
        (
            "ast.rule=topk ast.kp=0.3",
            "override 'ast.kp=0.3': ast.kp: nothing reads it here; it needs ast.rule=pi",
        ),
        (
            "ast.explore=0.2",
            "ast.explore: nothing reads it here; it needs ast.scoring=history",
        ),
        (
            "ast.rule=infobatch ast.entropy_weight=0 ast.explore=0.2",
            "ast.explore: nothing reads it here; it needs ast.scoring=history and ast.rule=pi or "
            "topk",
        ),
        (
            "training.optimizer=adamw training.momentum=0.8",
            "training.momentum: nothing reads it here; it needs training.optimizer=sgd or muon",
        ),
        ("training.mixed_precision=int8", "training.mixed_precision: expected"),
        ("training.mixed_precision=1", "training.mixed_precision: expected"),
        ("dataset.label_noise=1", "dataset.label_noise: expected less than 1"),
        ("dataset.label_noise=-0.1", "dataset.label_noise: expected greater than or equal to 0"),
        ("dataset.repeat=0", "dataset.repeat: expected greater than or equal to 1"),
        (
            "training.nesterov=true training.momentum=0",
            "training.nesterov: needs training.momentum",
        ),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_key(override, message):
    with pytest.raises(RequestError) as caught:
        load_config(
            None, override.split() if " " in override and "=" in override.split()[1] else [override]
        )
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


MANY = {  # overrides: what is said of each; None: nothing, for another says why
    "training.lr=-1": "training.lr: expected greater than 0, got -1",
    "ast.rule=top": "ast.rule: expected 'pi', 'topk' or 'infobatch', got 'top'",
    "model.name=resnet19": "model.name: no model 'resnet19'; did you mean resnet18?",
    "training.optimizer=adamx": "training.optimizer: no 'adamx'; did you mean adamax?",
    "ast.min_active=999": "ast.min_active: at most training.batch_size=128",
    "training.min_lr=1": None,
    "ast.kp=0.3": None,
}


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(RequestError) as caught:
        load_config(None, list(MANY))
    told = [f"override {given!r}: {why}" for given, why in MANY.items() if why is not None]
    assert str(caught.value) == "; also ".join(told)


def test_all_that_does_not_go_together_is_told_at_once():
    """By the sections, the parts and the data, and what nothing reads; the first five."""
    given = ["training.lr_decay=time", "ast.explore=0.2", "training.compile=default"]
    with pytest.raises(RequestError) as caught:
        load_config(None, [*given, "dataset.type=folder", "ast.score_resolution=64"])
    told = str(caught.value).split("; also ")
    assert [re.search(r"[a-z]+[.][a-z_]+(?=: )", each)[0] for each in told[:5]] == [
        "ast.score_resolution",
        "training.max_minutes",
        "ast.explore",
        "dataset.train_dir",
        "dataset.val_dir",
    ]
    assert told[5:] == ["1 more"]


def test_what_a_wrong_mode_may_allow_is_not_complained_of():
    given = ["ast.mode=dens", "training.compile=default", "ast.warmup_epochs=30", "training.lr=-1"]
    with pytest.raises(RequestError) as caught:
        load_config(None, given)
    told = [each.partition(": ")[0] for each in str(caught.value).split("; also ")]
    assert told == ["override 'ast.mode=dens'", "override 'training.lr=-1'"]


@pytest.mark.parametrize("key", ["null", "true", "1", "1.5", "!!binary aGk="])
def test_a_key_that_is_no_text_is_one_line_beside_what_else_is_wrong(key):
    keys = {
        f"? {key}\n: 3\nast: {{rule: top}}": [
            ": expected Keys should be strings, got ",
            "ast.rule",
        ],
        f"training: {{? {key} : 3, lr: -1}}": ["training.lr", ": expected Keys should be strings"],
    }
    for text, said in keys.items():
        with pytest.raises(RequestError) as caught:
            load_config(None, text=text)
        assert all(each in str(caught.value) for each in said)


def test_imports_that_are_no_list_are_one_line(recwarn):
    with pytest.raises(RequestError, match="^config: imports: expected a valid list, got {}$"):
        load_config(None, text="imports: {}")
    assert not recwarn.list


def test_names_of_timm_are_known_without_it(monkeypatch):
    """All that it has, old names too; what is suggested is what it lists."""
    import timm
    from timm.models._registry import _model_entrypoints
    from timm.optim import list_optimizers

    found = in_timm("models", NETWORK)
    own = {name for name, build in _model_entrypoints.items() if build.__module__[:5] == "timm."}
    assert own <= {name for names in found for name in names}
    assert {name for name, _ in found if name} == set(timm.list_models()) & own
    monkeypatch.setitem(_model_entrypoints, "own_net", None)
    assert load_config(None, ["model.name=own_net"]).model.name == "own_net"
    found = in_timm("optim", OPTIMIZER)
    assert {*list_optimizers()} == {name for names in found for name in names if name}


def test_what_parts_say_of_themselves_is_known_without_them():
    names = [NAMES["ast.scoring"], NAMES["ast.rule"], [0.0, 0.2, "auto"], ["ast", "random"]]
    for values in product(*names):
        ast = dict(zip(("scoring", "rule", "forget_rate", "mode"), values, strict=True))
        for loss in NAMES["training.loss"]:
            config = Config.model_validate({"ast": ast, "training": {"loss": loss}})
            assert built_in_traits(config) == traits_of(config)


@pytest.mark.parametrize("key", GONE)
def test_an_old_name_is_one_line_that_says_what_replaced_it(key, tmp_path, capsys):
    """On the command line and in a file; the key that it names is one of today."""
    section, _, leaf = key.partition(".")
    (tmp_path / "old.yaml").write_text(f"{section}:\n  {leaf}: 3\n")
    common = ["--output-dir", str(tmp_path / "out"), "--config"]
    for source, argv in (
        (f"override '{key}=3'", [*common, str(REPO / "configs/digits_smoke.yaml"), f"{key}=3"]),
        (tmp_path / "old.yaml", [*common, str(tmp_path / "old.yaml")]),
    ):
        assert run_cli(lambda argv=argv: run_experiment.main(argv)) == 2
        assert capsys.readouterr().err == f"error: {source}: {key}: {GONE[key]}\n"
    named = re.findall(r"\b(?:ast|dataset|training)\.\w+", GONE[key])
    assert set(named) <= config_keys().keys()
    assert not (tmp_path / "out").exists()


def test_a_run_is_known_by_what_decides_its_figures():
    """Not by where its files lie, and not by how many processes read its pictures."""
    disk = ["dataset.cache=disk"]
    whole = run_id(load_config(None, disk))
    others = {
        "dataset.cache_folder": "elsewhere",
        "training.num_workers": "3",
        "logging.output_dir": "elsewhere",
        "logging.jsonl_path": "log",
        "logging.checkpoint_minutes": "2",
        "logging.tensorboard": "true",
    }
    for key, value in others.items():
        assert run_id(load_config(None, [*disk, f"{key}={value}"])) == whole, key
    assert {f"logging.{key}" for key in LoggingConfig.model_fields} < others.keys()
    for other in ("dataset.cache=none", "training.seed=1", "training.device=cpu", "ast.kp=0.2"):
        assert run_id(load_config(None, [*disk, other])) != whole, other
    assert run_id(Config.model_validate(load_config(None, disk).model_dump())) == whole


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read the config: No such file or directory"),
        ("", "empty"),
        ("\n \n", "empty"),
        ("training: [1, 2]", "training: expected"),
        ("- 1\n- 2", "expected a mapping of sections, got list"),
        ("training: {lr: 1", "not valid YAML or JSON"),
        ("training:\n  lr: 1\n  lr: 2\n", "key 'lr' stands there twice"),
        ("training: !!python/object/apply:os.system ['true']", "not valid YAML or JSON"),
        (b"\xff\xfe\x00", "not valid YAML or JSON"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RequestError) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_empty_config_is_all_defaults(tmp_path):
    for text in ("# nothing\ntraining:\n", "# nothing\n", "{}"):
        (tmp_path / "empty.yaml").write_text(text)
        assert load_config(tmp_path / "empty.yaml") == Config()


def test_phases():
    config = load_config(None, ["training.epochs=6", "ast.warmup_epochs=2", "ast.anneal_epochs=1"])
    assert [config.is_sparse(epoch) for epoch in range(6)] == [
        False,
        False,
        True,
        True,
        True,
        False,
    ]
    dense = load_config(None, ["training.epochs=6", "ast.mode=dense"])
    assert not any(dense.is_sparse(epoch) for epoch in range(6))


def test_importing_the_lab_has_no_side_effects(tmp_path):
    import subprocess
    import sys

    code = "import signal, sys; before = signal.getsignal(signal.SIGINT); import train_ast; "
    code += "assert signal.getsignal(signal.SIGINT) is before"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(REPO / "scripts")}
    )
    assert done.returncode == 0
    assert list(Path(tmp_path).iterdir()) == []


PATHS = ["model.weights", "dataset.train_dir", "dataset.val_dir", "dataset.name"]
PATHS += ["dataset.cache_folder", "logging.output_dir", "logging.jsonl_path"]
READ_WITH = {  # what each of them needs to be read
    "dataset.train_dir": ["dataset.type=folder", "dataset.val_dir=x"],
    "dataset.val_dir": ["dataset.type=folder", "dataset.train_dir=x"],
    "dataset.name": ["dataset.type=hf"],
    "dataset.cache_folder": ["dataset.cache=disk"],
}


@pytest.mark.parametrize("key", PATHS)
def test_the_home_folder_is_meant_by_its_sign(key, tmp_path, monkeypatch):
    """In overrides and in files: `~` once made a folder of that name."""
    monkeypatch.setenv("HOME", "/home/somebody")
    section, name = key.split(".")
    (tmp_path / "a.yaml").write_text(f"{section}:\n  {name}: ~/x y\n")
    base = READ_WITH.get(key, [])
    for config in (
        load_config(None, [*base, f"{key}=~/x y"]),
        load_config(tmp_path / "a.yaml", base),
    ):
        assert getattr(getattr(config, section), name) == "/home/somebody/x y"
    config = load_config(None, [*base, f"{key}=./~"])
    assert getattr(getattr(config, section), name) == "./~"
    with pytest.raises(RequestError, match=f"{key}.*: ~nobody_here: no such user") as caught:
        load_config(None, [*base, f"{key}=~nobody_here/x"])
    assert "\n" not in str(caught.value)


def test_every_key_that_reads_like_a_path_is_one():
    """A new key of a folder or file must know the home folder too."""
    for section, part in SECTIONS.items():
        for name in part.model_fields:
            if name.endswith(("_dir", "_folder", "_path")) or name == "weights":
                assert f"{section}.{name}" in PATHS
                assert name in part.PATHS


def test_a_flag_and_an_override_of_one_key(capsys):
    """Which of the two holds is not guessed; the same value twice is no question."""
    asked = ["--config", str(REPO / "configs/digits_smoke.yaml"), "--dry-run", "--epochs", "9"]
    assert run_cli(lambda: run_experiment.main([*asked, "training.epochs=9"])) == 0
    assert run_cli(lambda: run_experiment.main([*asked, "training.epochs=4"])) == 2
    said = "error: override 'training.epochs=4': a flag says training.epochs=9\n"
    assert capsys.readouterr().err == said
