"""A validation set out of the training pictures: who is in it, and that it is always the same."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest

from conftest import COLOURS, make_config, save_picture
from helpers import hf_config
from lab.base.errors import RequestError
from lab.study.results import read_run
from train_ast import build_datasets, build_splits, train


def flat_config(folder, *overrides):
    return make_config(
        "dataset.type=folder",
        f"dataset.train_dir={folder}",
        "dataset.val_fraction=0.2",
        "dataset.image_size=16",
        *overrides,
    )


def names(dataset):
    return [source.relative_to(source.parents[1]).as_posix() for source, _ in dataset.samples]


@pytest.fixture
def flat(tmp_path):
    """One folder of three classes of 4, 10 and 31 pictures."""
    folder = tmp_path / "flat"
    for (name, colour), count in zip(COLOURS.items(), (4, 10, 31), strict=True):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            save_picture(folder / name / f"{i}.jpg", colour, 100 * count + i, side=16)
    return folder


def test_each_class_gives_its_share_and_no_picture_is_on_both_sides(flat):
    train_set, val = build_datasets(flat_config(flat).dataset)
    assert train_set.classes == val.classes == list(COLOURS)
    assert Counter(label for _, label in val.samples) == {0: 1, 1: 2, 2: 6}
    assert not set(names(train_set)) & set(names(val))
    assert len(train_set) + len(val) == 45
    _, few = build_datasets(flat_config(flat, "dataset.val_fraction=0.01").dataset)
    assert Counter(label for _, label in few.samples) == {0: 1, 1: 1, 2: 1}
    most, _ = build_datasets(flat_config(flat, "dataset.val_fraction=0.99").dataset)
    assert Counter(label for _, label in most.samples) == {0: 1, 1: 1, 2: 1}


def test_the_split_is_that_of_the_bytes_whatever_the_place_and_the_names(flat, tmp_path):
    _, val = build_datasets(flat_config(flat).dataset)
    _, other_seed = build_datasets(flat_config(flat, "training.seed=9").dataset)
    assert names(other_seed) == names(val)
    contents = {source.read_bytes() for source, _ in val.samples}
    moved = tmp_path / "moved"
    for path in flat.rglob("*.jpg"):
        (moved / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, moved / path.parent.name / f"{path.stem[::-1]}_{path.stat().st_ino}.jpg")
    _, again = build_datasets(flat_config(moved).dataset)
    assert {source.read_bytes() for source, _ in again.samples} == contents
    assert again.split == val.split
    assert val.split["pictures"] == 9


def test_equal_pictures_stay_on_one_side(flat):
    """Also those that two classes have: they are trained on."""
    for path in sorted((flat / "red").iterdir())[:20]:
        shutil.copy(path, path.with_name(f"copy of {path.name}"))
    for path in sorted((flat / "green").iterdir())[:3]:
        shutil.copy(path, flat / "blue" / f"green {path.name}")
    train_set, val = build_datasets(flat_config(flat).dataset)
    sides = [{source.read_bytes() for source, _ in each.samples} for each in (train_set, val)]
    assert not sides[0] & sides[1]
    assert Counter(label for _, label in val.samples)[2] == 10
    assert not [name for name in names(val) if "green " in name]


def test_hf_rows_are_split_alike_and_keep_their_numbers(parquet_folder):
    config = hf_config(parquet_folder, "dataset.val_fraction=0.25", "dataset.split_val=validation")
    train_set, val = build_datasets(config.dataset)
    assert (len(train_set), len(val)) == (18, 6)
    assert Counter(val.labels().tolist()) == {0: 2, 1: 2, 2: 2}
    whole, _ = build_datasets(hf_config(parquet_folder).dataset)
    for part in (train_set, val):
        for index in range(len(part)):
            number = int(part.name_of(index).rpartition(" ")[2])
            assert part.read(index) == whole.read(number)
    assert train_set.content() != val.content()


def refused(config):
    with pytest.raises(RequestError) as caught:
        build_datasets(config.dataset)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_split_is_named(flat, image_folder):
    for path in sorted((flat / "blue").iterdir())[1:]:
        path.unlink()
    assert refused(flat_config(flat)) == (
        "dataset.val_fraction: class 'blue' has 1 picture; a split needs two"
    )
    for i in range(3):
        shutil.copy(flat / "blue" / "0.jpg", flat / "blue" / f"copy{i}.jpg")
    assert "class 'blue' has 4 pictures, all alike or in other" in refused(flat_config(flat))
    assert refused(flat_config(image_folder)).startswith(
        f"dataset.val_fraction: {image_folder} holds train and val, which are no classes; set "
        f"dataset.train_dir={image_folder}/train, or give dataset.val_dir with"
    )
    with pytest.raises(RequestError, match="dataset.val_dir: nothing reads it here; it needs"):
        flat_config(flat, "dataset.val_dir=x")
    with pytest.raises(RequestError, match="it needs dataset.type=folder or hf or csv"):
        make_config("dataset.val_fraction=0.1")
    with pytest.raises(RequestError, match="expected less than 1, got 1"):
        flat_config(flat, "dataset.val_fraction=1.0")


def test_a_bad_picture_is_split_by_its_name_and_named_when_read(flat):
    (flat / "red" / "30.jpg").write_bytes(b"none")
    (flat / "red" / "gone.jpg").symlink_to(flat / "nowhere.jpg")
    train_set, val = build_datasets(flat_config(flat).dataset)
    assert len(train_set) + len(val) == 46


def test_a_balanced_set_has_as_many_of_each_class(flat):
    splits = build_splits(flat_config(flat, "dataset.repeat=balanced").dataset)
    train_set, indices = splits["train"]
    labels = train_set.labels()
    assert np.bincount(labels).tolist() == [3, 8, 25]
    assert np.bincount(labels[indices % len(train_set)]).tolist() == [25, 25, 25]
    assert len(set(indices.tolist())) == 75  # every copy with an augmentation of its own
    times = np.bincount(indices % len(train_set))
    for label in range(3):
        assert np.ptp(times[labels == label]) <= 1
    again, _ = build_splits(flat_config(flat, "dataset.repeat=balanced").dataset)["train"][::-1]
    assert (again == indices).all()
    assert len(splits["val"].indices) == 9


@pytest.mark.parametrize("cache", ["none", "device"])
def test_a_run_on_a_balanced_set_trains_on_each_class_alike(cache, flat, tmp_path):
    small = ["model.name=test_resnet", "training.epochs=2", "ast.mode=dense"]
    small += ["training.num_workers=0", f"dataset.cache={cache}", "training.batch_size=15"]
    more = ["dataset.repeat=balanced", "training.class_weights=balanced"]
    result, _ = train(flat_config(flat, *small, *more, f"logging.output_dir={tmp_path}/out"))
    assert result["classes"]["times_trained"] == [50, 50, 50]


@pytest.mark.parametrize("cache", ["none", "device"])
def test_a_run_records_its_split(cache, flat, tmp_path):
    small = ["model.name=test_resnet", "training.epochs=1", "ast.mode=dense"]
    small += ["training.num_workers=0", f"dataset.cache={cache}"]
    config = flat_config(flat, *small, f"logging.output_dir={tmp_path}/out")
    _, val = build_datasets(config.dataset)
    result, path = train(config)
    assert result["val_split"] == val.split == json.loads(path.read_text())["val_split"]
    assert result["classes"]["val_samples"] == [1, 2, 6]
    assert np.sum(result["times_trained"]["histogram"]) == 36
    assert read_run(path).dataset == f"folder:{flat}:0.2"
