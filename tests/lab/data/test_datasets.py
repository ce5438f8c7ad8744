"""Pictures and labels of folders, tables and digits, and what is said where they are missing."""

import io
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import COLOURS, make_config, save_picture
from helpers import folder_config, hf_config, write_parquet
from lab.base.errors import RequestError
from lab.data.datasets import ReadErrors, collate
from lab.data.loading import device_batches
from lab.data.randomness import UNIFORMS_PER_SAMPLE
from train_ast import build_dataloaders, build_datasets, train

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["folder", "hf"])
def test_images_and_labels_belong_together(kind, image_folder, parquet_folder):
    config = folder_config(image_folder) if kind == "folder" else hf_config(parquet_folder)
    config.dataset.augment = "none"
    train, val = build_datasets(config.dataset)
    assert train.classes == val.classes == list(COLOURS)
    assert (len(train), len(val)) == (24, 9)
    for dataset in (train, val):
        for index in range(len(dataset)):
            image, label, *_ = dataset[(index, np.zeros(UNIFORMS_PER_SAMPLE))]
            assert image.shape == (3, config.dataset.image_size, config.dataset.image_size)
            assert image.dtype == torch.uint8
            brightest = int(image.float().mean((1, 2)).argmax())
            assert train.classes[label] == {0: "red", 1: "green", 2: "blue"}[brightest]


def test_hf_columns_can_be_named_and_integers_are_classes(parquet_folder, tmp_path):
    import datasets

    rows = datasets.load_dataset(str(parquet_folder), split="train")
    plain = rows.cast_column("kind", datasets.Value("int64")).add_column("other", [0] * 24)
    (tmp_path / "plain").mkdir()
    for part in ("train", "test"):
        plain.to_parquet(str(tmp_path / "plain" / f"{part}.parquet"))
    config = hf_config(tmp_path / "plain", "dataset.label_key=kind")
    train, _ = build_datasets(config.dataset)
    assert train.classes == ["0", "1", "2"]
    with pytest.raises(
        RequestError, match="dataset.label_key: cannot tell the column; set it to one of img, kind"
    ):
        build_datasets(hf_config(tmp_path / "plain").dataset)


def test_digits_are_the_real_ones():
    train, val = build_datasets(make_config().dataset)
    assert (len(train), len(val)) == (1437, 360)
    counts = np.bincount([label for _, label in val.samples])
    assert counts.min() >= 34  # stratified
    assert train.samples[0][0].shape == (3, 8, 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named(image_folder, workers):
    bad = image_folder / "train" / "green" / "3.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    loader, _, _, _ = build_dataloaders(
        folder_config(image_folder, f"training.num_workers={workers}"), CPU
    )
    with pytest.raises(RequestError, match=r"green/3\.jpg: not a readable image"):
        list(device_batches(loader, CPU))


@pytest.mark.parametrize("cache", ["none", "device", "disk"])
def test_what_stands_in_comes_with_its_own_index_and_label(cache, image_folder, tmp_path):
    """Else what is learned of it would be kept for the unreadable picture. Of copies, the copy."""
    (image_folder / "train" / "blue" / "7.jpg").write_bytes(
        b"no image"
    )  # the last one of its class
    (image_folder / "train" / "red" / "7.jpg").write_bytes(b"no image")  # the last of all
    keys = [f"dataset.cache={cache}", "dataset.max_bad_images=2", "dataset.repeat=2"]
    keys += [] if cache == "none" else [f"dataset.cache_folder={tmp_path}/cache"]
    config = folder_config(image_folder, *keys, "dataset.label_noise=0.5", "training.batch_size=4")
    data = build_dataloaders(config, CPU)
    dataset = data.train.dataset
    batches = list(device_batches(data.train, CPU, ReadErrors(2)))
    indices = np.concatenate([batch.indices.numpy() for batch in batches])
    labels = np.concatenate([batch.labels.numpy() for batch in batches])
    expected = [{7: 8, 23: 0}.get(each, each) for each in range(24)]
    assert sorted(indices) == sorted(expected + [24 + each for each in expected])
    assert (dataset.label_shifts > 0).any()
    right = dataset.labels()[indices % 24]
    assert np.array_equal(labels, dataset.noisy_labels(right, indices))


def test_a_run_with_stand_ins_that_it_does_not_train_on_goes_well(image_folder, tmp_path):
    """What stands in for the last sample trained on is none of those."""
    config = folder_config(image_folder, "dataset.max_train_samples=8", "training.batch_size=4")
    last = int(build_dataloaders(config, CPU).plan.all_indices.max())
    assert last < 23
    name = build_datasets(config.dataset)[0].name_of(last)
    Path(name).write_bytes(b"no image")
    keys = ["dataset.max_bad_images=1", "dataset.max_train_samples=8", "training.batch_size=4"]
    keys += ["training.noisy_labels=true", "training.mixup=1", "training.epochs=2"]
    keys += [f"logging.output_dir={tmp_path}/out", "training.num_workers=0"]
    result, _ = train(folder_config(image_folder, *keys, "model.name=test_resnet"))
    assert result["status"] == "completed"
    assert len(result["bad_images"]) == 1


def test_a_deleted_image_is_named(image_folder):
    loader, _, _, _ = build_dataloaders(folder_config(image_folder, "training.num_workers=0"), CPU)
    (image_folder / "train" / "red" / "1.jpg").unlink()
    with pytest.raises(RequestError, match=r"red/1\.jpg.*No such file"):
        list(device_batches(loader, CPU))


def test_a_bad_row_of_a_parquet_file_is_named(parquet_folder):
    train, _ = build_datasets(hf_config(parquet_folder).dataset)
    rows = [train.samples[i] for i in range(24)]
    rows[4] = {**rows[4], "img": {"bytes": b"rubbish", "path": None}}
    rows[5] = {**rows[5], "kind": None}
    train.samples = rows
    samples = [train[(index, np.zeros(UNIFORMS_PER_SAMPLE))] for index in (3, 4, 5)]
    assert (
        samples[1]
        .unreadable[0]
        .startswith(f"{parquet_folder} [train] sample 4: not a readable image")
    )
    assert "no class" in samples[2].unreadable[0]
    batch = collate(samples)
    assert len(batch.images) == len(batch.labels) == 1
    assert len(batch.unreadable) == 2


def test_missing_data_is_named(image_folder, parquet_folder, tmp_path):
    def complaint(config):
        with pytest.raises(RequestError) as caught:
            build_dataloaders(config, CPU)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "cat").mkdir(parents=True)
    assert "dataset.train_dir" in complaint(folder_config("/nowhere"))
    assert "no class folders" in complaint(
        folder_config(image_folder, f"dataset.train_dir={tmp_path}/empty")
    )
    assert "no images" in complaint(
        folder_config(image_folder, f"dataset.train_dir={tmp_path}/hollow")
    )
    (image_folder / "val" / "zebra").mkdir()
    save_picture(image_folder / "val" / "zebra" / "1.jpg", (1, 2, 3), 0)
    assert "class 'zebra' is not among the training classes" in complaint(
        folder_config(image_folder)
    )
    assert "dataset.num_classes: 10, but the data has 3" in complaint(
        hf_config(parquet_folder, "dataset.num_classes=10")
    )
    assert "dataset.split_val: no split 'dev'" in complaint(
        hf_config(parquet_folder, "dataset.split_val=dev")
    )
    assert "no column 'image'; set it to one of img, kind" in complaint(
        hf_config(parquet_folder, "dataset.image_key=image")
    )
    assert "dataset.name: ./nowhere: no such folder" in complaint(hf_config("./nowhere"))


def test_a_class_without_validation_images_keeps_the_labels_right(image_folder):
    for path in (image_folder / "val" / "blue").iterdir():
        path.unlink()
    (image_folder / "val" / "blue").rmdir()
    _, val = build_datasets(folder_config(image_folder).dataset)
    assert sorted({label for _, label in val.samples}) == [1, 2]  # green and red, as in training


@pytest.mark.parametrize("cache", ["none", "device"])
@pytest.mark.parametrize("file", ["JPEG", "PNG"])
@pytest.mark.parametrize("kind", ["folder", "hf"])
def test_every_way_into_a_batch_turns_pictures_upright(kind, file, cache, tmp_path):
    """White above and black below, stored lying on its side: the orientation 6 says to turn it
    clockwise.
    """
    lying = Image.new("L", (32, 32))
    exif = Image.Exif()
    buffer = io.BytesIO()
    lying.paste(255, (0, 0, 16, 32))
    exif[0x0112] = 6
    lying.save(buffer, file, exif=exif)
    if kind == "folder":
        for part, name in product(("train", "val"), "ab"):
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / f"1.{file.lower()}").write_bytes(buffer.getvalue())
    else:
        write_parquet(tmp_path, "train", ["a", "b"], [0, 1], image=buffer.getvalue())
        write_parquet(tmp_path, "test", ["a", "b"], [0, 1], image=buffer.getvalue())
    make = folder_config if kind == "folder" else hf_config
    config = make(
        tmp_path, "dataset.augment=none", f"dataset.cache={cache}", "training.num_workers=0"
    )
    config.dataset.image_size = 32
    for loader in build_dataloaders(config, CPU)[:2]:
        (batch,) = device_batches(loader, CPU)
        assert (batch.images[:, :, :15] > 250).all()
        assert (batch.images[:, :, 17:] < 5).all()


@pytest.mark.parametrize("cache", ["none", "device"])
def test_validation_labels_are_matched_by_name(cache, tmp_path):
    write_parquet(tmp_path, "train", ["cat", "dog", "eel"], [0, 0, 1, 2])
    write_parquet(tmp_path, "test", ["eel", "cat"], [0, 1, 0, 1])
    config = hf_config(tmp_path, f"dataset.cache={cache}", "training.num_workers=0")
    train, val = build_datasets(config.dataset)
    assert train.classes == val.classes == ["cat", "dog", "eel"]
    assert val.labels().tolist() == [val.read(index)[1] for index in range(4)] == [2, 0, 2, 0]
    loaded = [batch.labels for batch in device_batches(build_dataloaders(config, CPU)[1], CPU)]
    assert torch.cat(loaded).tolist() == [2, 0, 2, 0]
    _, part = build_datasets(hf_config(tmp_path, "dataset.split_val=test[1:3]").dataset)
    assert part.labels().tolist() == [0, 2]


PETS = ["cat", "dog"]


@pytest.mark.parametrize(
    ("train", "test", "complaint"),
    [
        (
            (PETS, [0, 1]),
            (["cat", "emu"], [0, 0]),
            "dataset.split_val: class 'emu' is not among the training classes",
        ),
        (
            (None, [0, 1]),
            (None, [1, 2]),
            "dataset.split_val: label 2 in column 'kind', and 2 training classes",
        ),
        (
            (None, [0, 2**60]),
            (None, [0, 1]),
            "dataset.label_key: column 'kind' holds numbers up to 1,152,921,504,",
        ),
        (
            (None, [0, 1]),
            (None, [10**9, 1]),
            "dataset.label_key: column 'kind' holds numbers up to 1,000,000,000, ",
        ),
        (
            (PETS, [0, 1]),
            (PETS, [-1, -1]),
            "dataset.split_val: no sample of split 'test' has a class in 'kind'",
        ),
        (
            (None, [0, 1]),
            (None, [-1, -1]),
            "in 'kind', all are -1; choose another split, or another dataset.label_key",
        ),
        (
            (PETS, [None, None]),
            (PETS, [0, 1]),
            "dataset.split_train: no sample of split 'train' has a class in 'kind'",
        ),
    ],
)
def test_labels_that_are_no_classes_are_refused_at_the_start(train, test, complaint, tmp_path):
    write_parquet(tmp_path, "train", *train)
    write_parquet(tmp_path, "test", *test)
    with pytest.raises(RequestError, match=complaint) as caught:
        build_datasets(hf_config(tmp_path, "dataset.label_key=kind").dataset)
    assert "\n" not in str(caught.value)


def test_a_missing_label_among_integers_is_a_read_error(tmp_path):
    write_parquet(tmp_path, "train", None, [0, None, 1])
    write_parquet(tmp_path, "test", None, [0, 1])
    train, _ = build_datasets(hf_config(tmp_path, "dataset.label_key=kind").dataset)
    assert train.classes == ["0", "1"]
    assert train.labels().tolist() == [0, -1, 1]
    assert (
        train[(1, np.zeros(UNIFORMS_PER_SAMPLE))]
        .unreadable[0]
        .endswith("sample 1: label None is no class")
    )
