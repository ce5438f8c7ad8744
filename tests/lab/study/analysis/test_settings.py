"""Comparison groups, their titles, and the labels of settings."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import MINIMAL, REPO, make_config
from helpers import studies_of, study_of, write_run
from lab.config.loading import GONE, Config, config_keys
from lab.study.analysis.settings import LABEL_CHARACTERS, UNKNOWN, comparison_group, label_settings
from lab.study.analysis.tables import verdict
from lab.study.results import FORMER, RENAMED, load_runs, settings_of


def label(settings):
    return label_settings(settings, ["file"] * len(settings))


def settings(*overrides):
    return settings_of({"config": make_config(*overrides).model_dump()})


# ------------------------------------------------------------------------------------------- Groups

CHANGES = [
    ("dataset__label_noise", 0.2, "label_noise=0.2"),
    ("dataset__repeat", 4, "repeat=4"),
    ("dataset__max_train_samples", 500, "max_train_samples=500"),
    ("dataset__max_val_samples", 50, "max_val_samples=50"),
    ("dataset__image_size", 32, "image_size=32"),
    ("dataset__augment", "pad_crop", "augment=pad_crop"),
    ("model__small_stem", True, "small_stem=true"),
    ("model__pretrained", True, "pretrained=true"),
]


@pytest.mark.parametrize(("key", "value", "words"), CHANGES)
def test_other_data_or_another_model_is_another_group(key, value, words, tmp_path):
    write_run(tmp_path, "1", (1.0, 90.0), ast__mode="dense")
    write_run(tmp_path, "2", (1.0, 70.0), ast__mode="dense", **{key: value})
    write_run(tmp_path, "3", (1.0, 71.0), **{key: value})
    plain, changed = studies_of(tmp_path).values()
    words, plain_words = (
        (f", {words}", "") if key != "dataset__image_size" else ("", ", image_size=8")
    )  # 32: default
    assert (plain.title, changed.title) == (
        f"digits, resnet18{plain_words}",
        f"digits, resnet18{words}",
    )
    assert list(changed.table["difference"].dropna()) == [1.0]  # its own baseline
    assert "It is 1.00 points above dense" in verdict(changed)


@pytest.mark.parametrize(
    "override",
    "dataset.cache=device training.num_workers=3 dataset.max_bad_images=2 dataset.num_classes=10 "
    "dataset.augment=none training.lr=0.3 dataset.random_erasing=0.25 "
    "dataset.augment_policy=rand_augment".split(),
)
def test_what_changes_no_picture_of_the_data_makes_no_group(override):
    assert comparison_group(settings(override)) == comparison_group(settings())


@pytest.mark.parametrize("key", ["train_dir", "cache_folder", "cache_dir"])
def test_a_folder_that_is_not_read_makes_no_group(key):
    """As it may stand in a file; `cache_dir` in one of earlier days."""
    config = make_config().model_dump()
    config["dataset"][key] = "unread"
    assert comparison_group(settings_of({"config": config})) == comparison_group(settings())


def test_the_size_of_the_cache_counts_where_crops_are_cut_from_it():
    large = ["dataset.type=hf", "dataset.name=x", "dataset.image_size=128"]
    groups = {
        comparison_group(settings(*large, *more))
        for more in (
            [],
            ["dataset.cache=device"],
            ["dataset.cache=device", "dataset.cache_resolution=200"],
        )
    }
    assert len(groups) == 3
    small = [*large[:2], "dataset.image_size=32"]
    assert comparison_group(settings(*small)) == comparison_group(
        settings(*small, "dataset.cache=device")
    )


def test_runs_that_do_not_say_what_they_are_of_are_listed_and_not_compared(tmp_path):
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "final_results_x.json").write_text(json.dumps(MINIMAL))
    foreign = MINIMAL | {
        "config": {"ast": {"mode": "dense"}},
        "best_accuracy": 99.0,
        "final_accuracy": 99.0,
    }
    (tmp_path / "a" / "final_results_y.json").write_text(json.dumps(foreign))
    write_run(tmp_path / "a", "known")
    known, unknown = studies_of(*(tmp_path / name for name in "abc")).values()
    assert len(known.table) == 1
    assert unknown.title == UNKNOWN
    assert list(unknown.table.index) == [
        "y",
        "x (3)",
        "x (2)",
        "x",
    ]  # each stands alone, under its own label
    assert list(unknown.table["n"]) == [1, 1, 1, 1]
    assert unknown.baseline is None
    assert "listed, not compared" in verdict(unknown)


def test_older_results_are_the_same_setting_as_newer_ones(tmp_path):
    """Keys that came later have their defaults, renamed ones their new names."""
    write_run(tmp_path, "new", ast__forget_rate=0.2)
    old = json.loads(write_run(tmp_path, "old", training__seed=1).read_text())
    for key in (
        "dataset.repeat",
        "dataset.cache",
        "ast.measure",
        "training.lr_decay",
        "ast.forget_rate",
    ):
        section, leaf = key.split(".")
        del old["config"][section][leaf]
    old["config"]["ast"]["leave_out"] = 0.2
    del old["seed"]  # the config says it
    (tmp_path / "final_results_old.json").write_text(json.dumps(old))
    table = study_of(tmp_path).table
    assert (list(table.index), list(table["n"]), list(table["seeds"])) == (["ast"], [2], ["0 1"])


def test_keys_that_are_gone_stand_in_the_way_of_nothing():
    """Every one has its value of today in a run that does not know it, and a line that refuses
    it.
    """
    assert {*FORMER, *RENAMED} == set(GONE)
    assert not {*FORMER, *RENAMED} & config_keys().keys()
    old = make_config().model_dump()
    for key, value in FORMER.items():
        section, leaf = key.split(".")
        old[section][leaf] = {"null": None, "true": True, "auto": "auto"}.get(value, value)
    assert settings_of({"config": old}) == settings()


def test_a_published_dense_run_is_the_baseline_of_a_run_of_today(tmp_path):
    """They are one comparison group, and the same settings are one setting."""
    (old,) = read_published("cifar10_study_h200/dense", count=1)
    result = json.loads(old.path.read_text())
    assert result["config"]["ast"]["mode"] == "dense"
    config = result["config"]
    for key in GONE:
        section, leaf = key.split(".")
        config[section].pop(leaf, None)
    today = Config.model_validate(config).model_dump()
    for name, changes in (
        ("again", {"training": {"seed": 77}}),
        ("sparse", {"ast": {"mode": "ast"}}),
    ):
        changed = {section: today[section] | changes.get(section, {}) for section in today}
        facts = {"environment": result["environment"], "seed": changed["training"]["seed"]}
        write_run(tmp_path, name, extra={**facts, "config": changed})
    shutil.copy(old.path, tmp_path)
    study = study_of(tmp_path)
    assert study.baseline == "dense"
    assert dict(study.table["n"]) == {"dense": 2, "ast": 1}


# ------------------------------------------------------------------------------------------- Labels

PUBLISHED = {  # by folder, the labels of its settings as they were before keys were gone
    "cifar10_study_h100/noise": [
        "ast target_activation=0.8 explore=0.05 anneal_epochs=0 epochs=50",
        "ast target_activation=0.4 explore=0.1 anneal_epochs=0 epochs=88",
        "ast target_activation=0.8 explore=0.05 anneal_epochs=0 epochs=25",
        "dense epochs=40",
        "dense epochs=20",
        "random target_activation=0.4 anneal_epochs=9 epochs=88",
        "random target_activation=0.8 anneal_epochs=0 epochs=50",
        "ast target_activation=0.8 explore=0.05 anneal_epochs=0 epochs=12",
        "dense epochs=10",
    ],
    "cifar10_half_h100/black": [
        "dense epochs=60",
        "dense epochs=40",
        "ast rule=pi score_ahead=true warmup_epochs=5 anneal_epochs=5 epochs=47",
        "ast rule=topk score_ahead=true warmup_epochs=5 anneal_epochs=5 epochs=47",
        "ast rule=topk score_ahead=true warmup_epochs=2 anneal_epochs=2 epochs=50",
        "ast rule=topk score_ahead=true warmup_epochs=0 anneal_epochs=0 epochs=56",
        "ast rule=pi score_ahead=true warmup_epochs=2 anneal_epochs=2 epochs=50",
        "ast rule=topk score_ahead=false warmup_epochs=2 anneal_epochs=2 epochs=50",
        "random warmup_epochs=5 anneal_epochs=5 epochs=47",
        "dense epochs=20",
    ],
    "cifar10_resnet18_h200": [
        "dense ki=0.2 num_workers=4",
        "dense ki=0.05 num_workers=null",
        "ast target_activation=0.5",
        "random target_activation=0.5 ki=0.2 num_workers=4",
        "random target_activation=0.5 ki=0.05 num_workers=null",
        "random target_activation=0.25 ki=0.2 num_workers=4",
        "random target_activation=0.25 ki=0.05 num_workers=null",
        "ast target_activation=0.25",
    ],
}


def read_published(folder, count=None):
    """The first runs of a folder of published results."""
    runs, _ = load_runs([REPO / "results" / "published" / folder])
    return runs[:count]


@pytest.mark.parametrize("folder", PUBLISHED)
def test_published_results_are_labelled_as_they_were(folder):
    studies = studies_of(REPO / "results" / "published" / folder)
    assert [label for study in studies.values() for label in study.table.index] == PUBLISHED[folder]


def test_a_key_of_earlier_days_is_named_where_it_had_a_say():
    stored = settings("ast.scoring=history", "ast.target_activation=0.5")
    weighted = stored | {"ast.explore_weight_cap": "4"}
    assert label([settings(), stored, weighted]) == [
        "ast scoring=batch target_activation=0.25",
        "ast scoring=history target_activation=0.5 explore_weight_cap=1",
        "ast scoring=history target_activation=0.5 explore_weight_cap=4",
    ]
    late = settings() | {"ast.score_ahead": "false"}
    assert label([settings(), late]) == ["ast score_ahead=true", "ast score_ahead=false"]


def test_a_part_of_ones_own_may_read_every_key():
    own = settings() | {"ast.rule": "mine", "ast.kp": "3"}
    top = settings("ast.rule=topk") | {"ast.kp": "5"}
    assert label([own, own | {"ast.kp": "4"}, top]) == [
        "ast rule=mine kp=3",
        "ast rule=mine kp=4",
        "ast rule=topk",
    ]


def test_labels_name_every_key_that_sets_a_setting_apart():
    base = settings()
    plain = settings("ast.scoring=history", "training.epochs=88", "ast.anneal_epochs=9")
    noisy = settings(
        "ast.scoring=history",
        "training.epochs=50",
        "ast.forget_rate=0.2",
        "ast.target_activation=0.8",
    )
    assert label([plain, noisy, settings("ast.mode=dense"), settings("ast.mode=random")]) == [
        "ast target_activation=0.25 forget_rate=0 anneal_epochs=9 epochs=88",
        "ast target_activation=0.8 forget_rate=0.2 anneal_epochs=0 epochs=50",
        "dense epochs=10",  # what a rule does or leaves out says nothing of it
        "random target_activation=0.25 anneal_epochs=0 epochs=10",
    ]
    assert label([base]) == ["ast"]
    infobatch = settings("ast.scoring=history", "ast.rule=infobatch", "ast.entropy_weight=0")
    assert label([base, infobatch]) == [
        "ast scoring=batch rule=pi entropy_weight=1",
        "ast scoring=history rule=infobatch entropy_weight=0",
    ]
    assert label([base, base | {"new.key": "3"}]) == ["ast key=unset", "ast key=3"]
    two = [base | {"dataset.name": "d"}, base | {"dataset.name": "d", "model.name": "b"}]
    assert label(two) == [
        "ast model.name=resnet18",
        "ast model.name=b",
    ]  # `name` alone would be two keys


def test_what_changes_no_training_is_named_only_where_it_alone_differs():
    idle = [
        "training.num_workers=3",
        "training.compile=default",
        "ast.pack=true",
        "training.max_minutes=9",
    ]
    other = settings("ast.kp=0.3", *idle)
    assert label([settings("ast.pack=true"), other]) == ["ast kp=0.1", "ast kp=0.3"]
    workers = [
        settings(),
        settings("training.num_workers=3"),
        settings("training.num_workers=4", "ast.kp=0.3"),
    ]
    assert label(workers) == [
        "ast kp=0.1 num_workers=null",
        "ast kp=0.1 num_workers=3",
        "ast kp=0.3",
    ]
    by_time = ["training.lr_decay=time", "training.max_minutes=9"]
    assert (
        label([settings(*by_time), settings(*by_time, "training.epochs=99")])[1] == "ast epochs=99"
    )


def test_labels_are_readable_at_any_length():
    values = {f"training.key{number}": "x" * 50 for number in range(12)}
    one = settings() | values
    two = settings() | dict.fromkeys(values, "y" * 50)
    three = two | {"training.key11": "z"}
    labels = label([one, two, three])
    assert len(set(labels)) == 3
    assert all(len(text) <= LABEL_CHARACTERS + len(" (file)") for text in labels)
    assert "key0=xxxxxxxxxx…" in labels[0]
    assert labels[0].endswith(" more")


@given(st.lists(st.tuples(*[st.sampled_from("01")] * 4), unique=True, min_size=1))
def test_labels_are_distinct(rows):
    found = label([dict(zip(("ast.mode", "a.x", "a.y", "a.z"), row, strict=True)) for row in rows])
    assert len(set(found)) == len(rows)
    assert not any("file" in text for text in found)


def test_without_a_config_the_file_is_the_label():
    assert label_settings([{}, {}], ["20200101", "20200102"]) == ["20200101", "20200102"]
    assert label_settings([{}, {}, {}], ["x", "x", "x"]) == ["x", "x (2)", "x (3)"]
