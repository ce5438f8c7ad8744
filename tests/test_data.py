"""Reading real files, which samples an epoch loads, and that nothing depends on the order of calls."""

import io
import math

import numpy as np
import pytest
import torch
from conftest import COLOURS, make_config, save_picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from train_ast import (
    EpochPlan,
    RequestError,
    build_dataloaders,
    build_datasets,
    collate,
    decode_image,
    device_batches,
    load_config,
)

CPU = torch.device("cpu")


def folder_config(folder, *overrides):
    paths = [f"dataset.train_dir={folder}/train", f"dataset.val_dir={folder}/val"]
    return make_config("dataset.type=folder", "dataset.image_size=32", "training.batch_size=8", *paths, *overrides)


def hf_config(folder, *overrides):
    return make_config("dataset.type=hf", f"dataset.name={folder}", "dataset.split_val=test", *overrides)


@pytest.mark.parametrize("kind", ["jpeg", "png", "grey", "cmyk", "palette", "bmp", "gif", "webp", "16 bit"])
def test_every_kind_of_image_becomes_three_uint8_channels(kind):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = 200, 60
    image = Image.fromarray(pixels)
    modes = {"grey": "L", "cmyk": "CMYK", "palette": "P"}
    formats = {"jpeg": "JPEG", "grey": "JPEG", "cmyk": "JPEG", "bmp": "BMP", "gif": "GIF", "webp": "WEBP"}
    image = image.convert(modes.get(kind, "RGB"))
    if kind == "16 bit":
        image = Image.fromarray(np.full((20, 30), 51400, np.uint16))
    buffer = io.BytesIO()
    image.save(buffer, formats.get(kind, "PNG"))
    decoded = decode_image(buffer.getvalue())
    assert decoded.dtype == torch.uint8
    assert decoded.shape == (3, 20, 30)
    mean = decoded.float().mean((1, 2)).tolist()
    assert mean == pytest.approx({"grey": [95] * 3, "16 bit": [200] * 3}.get(kind, [200, 60, 0]), abs=12)


def test_rubbish_is_a_value_error():
    for data in (b"", b"no image", b"\xff\xd8\xff\xe0" + bytes(50)):
        with pytest.raises(ValueError, match="not a readable image"):
            decode_image(data)


@pytest.mark.parametrize("kind", ["folder", "hf"])
def test_images_and_labels_belong_together(kind, image_folder, parquet_folder):
    config = folder_config(image_folder) if kind == "folder" else hf_config(parquet_folder)
    config.dataset.augment = "none"
    train, val = build_datasets(config.dataset)
    assert train.classes == val.classes == list(COLOURS)
    assert (len(train), len(val)) == (24, 9)
    for dataset in (train, val):
        for index in range(len(dataset)):
            image, label = dataset[(0, index)]
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
    with pytest.raises(RequestError, match="dataset.label_key: cannot tell the column; set it to one of img, kind"):
        build_datasets(hf_config(tmp_path / "plain").dataset)


def test_digits_are_the_real_ones():
    train, val = build_datasets(make_config().dataset)
    assert (len(train), len(val)) == (1437, 360)
    counts = np.bincount([label for _, label in val.samples])
    assert counts.min() >= 34  # stratified
    assert train.samples[0][0].shape == (3, 8, 8)


@given(st.integers(1, 300), st.integers(1, 64), st.floats(0.05, 1), st.integers(0, 5))
def test_an_epoch_draws_without_repeats_in_full_chunks(n, batch_size, share, epoch):
    plan = EpochPlan(np.arange(n) + 7, batch_size, 3, lambda _: share)
    plan.epoch = epoch
    chunks = list(plan)
    drawn = [index for chunk in chunks for _, index in chunk]
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) <= set(range(7, n + 7))
    assert len(plan) == len(chunks) == plan.steps(epoch)
    wanted = max(1, round(share * n))
    assert len(drawn) == (wanted // batch_size * batch_size or wanted)
    if wanted >= batch_size:
        assert {len(chunk) for chunk in chunks} == {batch_size}
    assert list(plan) == chunks  # a function of (seed, epoch)
    assert {e for chunk in chunks for e, _ in chunk} == {epoch}


def test_epochs_and_seeds_order_differently():
    def order(seed, epoch):
        plan = EpochPlan(np.arange(64), 64, seed, lambda _: 1.0)
        plan.epoch = epoch
        return next(iter(plan))

    assert len({str([i for _, i in order(seed, epoch)]) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_random_mode_draws_before_loading_and_dense_phases_load_all(image_folder):
    config = folder_config(
        image_folder,
        "ast.mode=random",
        "ast.target_activation=0.34",
        "training.epochs=3",
        "ast.warmup_epochs=1",
        "training.num_workers=0",
    )
    loader, _, plan, _ = build_dataloaders(config, CPU)
    loaded = []
    read = loader.dataset.read
    loader.dataset.read = lambda index: (loaded.append(index), read(index))[1]
    counts = []
    for plan.epoch in range(3):
        loaded.clear()
        list(loader)
        counts.append(len(loaded))
    assert counts == [24, 8, 8]  # no file of an undrawn sample is read
    assert plan.considered == 24


@pytest.mark.parametrize("workers", [1, 2])
def test_neither_workers_nor_order_change_what_a_sample_looks_like(image_folder, workers):
    def batches(n, epoch):
        loader, _, plan, _ = build_dataloaders(folder_config(image_folder, f"training.num_workers={n}"), CPU)
        plan.epoch = epoch
        return [(images, labels) for images, labels in device_batches(loader, CPU)]

    for epoch in (0, 3):
        alone, shared = batches(0, epoch), batches(workers, epoch)
        assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(alone, shared, strict=True))
    train, _ = build_datasets(folder_config(image_folder).dataset)
    first = train[(0, 5)][0]
    for other in ((0, 3), (1, 5), (0, 7)):
        train[other]
    assert torch.equal(train[(0, 5)][0], first)
    assert not torch.equal(train[(1, 5)][0], first)  # another epoch, another crop


def test_reading_leaves_the_global_random_state_alone(image_folder):
    train, _ = build_datasets(folder_config(image_folder, "dataset.augment=random_resized_crop").dataset)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train[(0, 0)]
    assert torch.equal(torch.get_rng_state(), before)


def test_validation_sees_every_sample_once(image_folder):
    _, loader, _, _ = build_dataloaders(folder_config(image_folder, "training.batch_size=4"), CPU)
    labels = torch.cat([labels for _, labels in device_batches(loader, CPU)])
    assert labels.bincount().tolist() == [3, 3, 3]


def test_subset_is_fixed_mixed_and_the_same_for_every_seed(image_folder):
    def keys(seed):
        limits = ["dataset.max_train_samples=9", "dataset.max_val_samples=5", f"training.seed={seed}"]
        _, val, plan, _ = build_dataloaders(folder_config(image_folder, *limits), CPU)
        return sorted(plan.indices.tolist()), [index for chunk in val.batch_sampler for _, index in chunk]

    assert keys(0) == keys(1)
    assert (len(keys(0)[0]), len(keys(0)[1])) == (9, 5)
    assert len({index // 8 for index in keys(0)[0]}) == 3  # not the first class alone


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named(image_folder, workers):
    bad = image_folder / "train" / "green" / "3.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    loader, _, _, _ = build_dataloaders(folder_config(image_folder, f"training.num_workers={workers}"), CPU)
    with pytest.raises(RequestError, match=r"green/3\.jpg: not a readable image"):
        list(device_batches(loader, CPU))


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
    assert train[(0, 4)].startswith("sample 4: not a readable image")
    assert "no class" in train[(0, 5)]
    batch = collate([train[(0, 3)], train[(0, 4)], train[(0, 5)]])
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
    assert "no class folders" in complaint(folder_config(image_folder, f"dataset.train_dir={tmp_path}/empty"))
    assert "no images" in complaint(folder_config(image_folder, f"dataset.train_dir={tmp_path}/hollow"))
    (image_folder / "val" / "zebra").mkdir()
    save_picture(image_folder / "val" / "zebra" / "1.jpg", (1, 2, 3), 0)
    assert "class 'zebra' is not among the training classes" in complaint(folder_config(image_folder))
    assert "dataset.num_classes: 10, but the data has 3" in complaint(
        hf_config(parquet_folder, "dataset.num_classes=10")
    )
    assert "dataset.split_val: no split 'dev'" in complaint(hf_config(parquet_folder, "dataset.split_val=dev"))
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


def test_augmentation_by_size_and_dataset():
    def names(*overrides):
        from train_ast import build_transforms

        config = load_config(None, ["dataset.type=hf", "dataset.name=x", *overrides])
        return [type(step).__name__ for step in build_transforms(config.dataset, True).transforms]

    assert names("dataset.image_size=32") == ["Resize", "RandomCrop", "RandomHorizontalFlip"]
    assert names("dataset.image_size=224") == ["RandomResizedCrop", "RandomHorizontalFlip"]
    assert names("dataset.type=digits") == ["Resize"]
    assert math.isclose(make_config().dataset.image_size, 8)
