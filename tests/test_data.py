"""Reading real files, which samples an epoch loads, and that nothing depends on the order of calls."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from conftest import COLOURS, make_config, save_picture
from lab.config import load_config
from lab.data.datasets import collate
from lab.data.images import Augmentation, crop_resize, decode_image, random_crops
from lab.data.loading import EpochPlan, device_batches
from lab.data.randomness import UNIFORMS_PER_SAMPLE, uniform
from lab.errors import RequestError
from train_ast import build_dataloaders, build_datasets

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
    drawn = [index for chunk in chunks for index, _ in chunk]
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) <= set(range(7, n + 7))
    assert len(plan) == len(chunks) == plan.planned_steps(epoch)
    wanted = max(1, round(share * n))
    assert len(drawn) == (wanted // batch_size * batch_size or wanted)
    if wanted >= batch_size:
        assert {len(chunk) for chunk in chunks} == {batch_size}
    again = [key for chunk in plan for key in chunk]  # a function of (seed, epoch)
    assert [index for index, _ in again] == drawn
    rows = uniform(3, epoch, torch.tensor(drawn), UNIFORMS_PER_SAMPLE).numpy()
    assert all(np.array_equal(uniforms, row) for (_, uniforms), row in zip(again, rows, strict=True))


def test_epochs_and_seeds_order_differently():
    def order(seed, epoch):
        plan = EpochPlan(np.arange(64), 64, seed, lambda _: 1.0)
        plan.epoch = epoch
        return next(iter(plan))

    assert len({str([i for i, _ in order(seed, epoch)]) for seed in (0, 1) for epoch in (0, 1)}) == 4


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
    assert counts == [24, 8, 8]  # no file of a sample not drawn is read
    assert plan.dense_samples == 24


@pytest.mark.parametrize("workers", [1, 2])
def test_neither_workers_nor_order_change_what_a_sample_looks_like(image_folder, workers):
    def batches(n, epoch):
        loader, _, plan, _ = build_dataloaders(folder_config(image_folder, f"training.num_workers={n}"), CPU)
        plan.epoch = epoch
        return list(device_batches(loader, CPU))

    for epoch in (0, 3):
        alone, shared = batches(0, epoch), batches(workers, epoch)
        assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(alone, shared, strict=True))


def test_a_picture_is_augmented_by_its_uniforms_alone(image_folder):
    train, _ = build_datasets(folder_config(image_folder, "dataset.augment=random_resized_crop").dataset)
    uniforms = uniform(0, 0, torch.arange(3), UNIFORMS_PER_SAMPLE).numpy()
    first = train[(5, uniforms[0])][0]
    before = torch.get_rng_state()
    assert not torch.equal(train[(5, uniforms[1])][0], first)
    assert torch.equal(train[(5, uniforms[0])][0], first)
    assert torch.equal(torch.get_rng_state(), before)


def test_validation_sees_every_sample_once(image_folder):
    _, loader, _, _ = build_dataloaders(folder_config(image_folder, "training.batch_size=4"), CPU)
    labels = torch.cat([labels for _, labels, _ in device_batches(loader, CPU)])
    assert labels.bincount().tolist() == [3, 3, 3]


def test_subset_is_fixed_mixed_and_the_same_for_every_seed(image_folder):
    def keys(seed):
        limits = ["dataset.max_train_samples=9", "dataset.max_val_samples=5", f"training.seed={seed}"]
        _, val, plan, _ = build_dataloaders(folder_config(image_folder, *limits), CPU)
        return sorted(plan.indices.tolist()), [index for chunk in val.batch_sampler for index, _ in chunk]

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
    samples = [train[(index, np.zeros(UNIFORMS_PER_SAMPLE))] for index in (3, 4, 5)]
    assert samples[1].unreadable[0].startswith(f"{parquet_folder} [train] sample 4: not a readable image")
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


@pytest.mark.parametrize(
    ("overrides", "crops", "moves"),
    [
        (["dataset.image_size=32"], False, True),
        (["dataset.image_size=224"], True, True),
        (["dataset.type=digits"], False, False),
        (["dataset.type=digits", "dataset.augment=pad_crop"], False, True),
    ],
)
def test_augmentation_by_size_and_dataset(overrides, crops, moves):
    config = load_config(None, ["dataset.type=hf", "dataset.name=x", *overrides]).dataset
    assert (Augmentation(config, train=True).crops, Augmentation(config, train=True).random) == (crops, moves)
    assert not Augmentation(config, train=False).random


@pytest.mark.parametrize("train", [True, False])
def test_a_streamed_crop_is_torchvisions(train):
    """The stated box, cut and resized; for validation the same picture as torchvision's resize and centre crop."""
    augmentation = Augmentation(
        load_config(None, ["dataset.image_size=72", "dataset.augment=random_resized_crop"]).dataset, train
    )
    image = v2.functional.resize(pictures(1, 90)[0], [120, 200], antialias=True)
    uniforms = uniform(0, 1, torch.arange(8), UNIFORMS_PER_SAMPLE)
    sides = torch.tensor([[120.0, 200.0]], dtype=torch.float64)
    boxes, mirrors = augmentation.boxes(uniforms, torch.full((8,), 0.6, dtype=torch.float64), sides)
    for row, box, mirror in zip(uniforms, boxes.int().tolist(), mirrors, strict=True):
        expected = v2.functional.resized_crop(image, *box, [72, 72], antialias=True)
        if not train:
            expected = v2.functional.center_crop(v2.functional.resize(image, 82, antialias=True), [72, 72])
        expected = v2.functional.horizontal_flip(expected) if mirror else expected
        assert (augmentation([image], row[None])[0].int() - expected.int()).abs().max() <= (1 if train else 12)
        assert (augmentation([image], row[None])[0].float() - expected.float()).abs().mean() < (
            0.5 if train else 4
        )  # half a pixel
    assert mirrors.any() == train


def test_a_shifted_picture_is_padded_and_cropped():
    augmentation = Augmentation(
        load_config(None, ["dataset.image_size=32", "dataset.augment=pad_crop"]).dataset, train=True
    )
    image = pictures(1, 32)[0]
    padded, seen = v2.functional.pad(image, [4, 4, 4, 4]), set()
    for row in uniform(0, 0, torch.arange(400), UNIFORMS_PER_SAMPLE):
        boxes, mirror = augmentation.boxes(row[None], torch.ones(1), torch.full((1, 2), 32.0))
        top, left, height, width = boxes[0].int().tolist()
        expected = v2.functional.crop(padded, top + 4, left + 4, height, width)
        assert torch.equal(
            augmentation([image], row[None])[0], v2.functional.horizontal_flip(expected) if mirror else expected
        )
        seen |= {top, left + 100, 1000 + int(mirror)}
    assert seen == {*range(-4, 5), *range(96, 105), 1000, 1001}


def pictures(count, side, seed=0):
    """Smooth random pictures: what resizing errors would show on."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 255
    return v2.functional.resize(coarse, [side, side], antialias=True).round().to(torch.uint8)


def smooth_pictures(folder):
    """Replace the noisy pictures of a folder by smooth ones, on which a second resizing shows little."""
    for i, path in enumerate(sorted(folder.rglob("*.jpg"))):
        pixels = v2.functional.resize(pictures(1, 60, seed=i)[0], [60, 80], antialias=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path, quality=95)


@pytest.mark.parametrize("size", [24, 40, 64])  # smaller than the crops, between, larger
def test_cropping_on_the_device_is_torchvisions(size):
    images = pictures(5, 48)
    boxes = torch.tensor([[0, 0, 48, 48], [5, 7, 30, 20], [40, 1, 8, 47], [3, 30, 40, 9], [10, 10, 24, 24]])
    mirror = torch.tensor([False, True, False, True, True])
    ours = crop_resize(images, boxes.double(), mirror, size)
    for image, box, flipped, got in zip(images, boxes.tolist(), mirror, ours, strict=True):
        expected = v2.functional.resized_crop(image.float(), *box, [size, size], antialias=True)
        expected = v2.functional.horizontal_flip(expected) if flipped else expected
        assert (got.float() - expected).abs().max() <= 0.51  # rounded once, from the exact values
        in_uint8 = v2.functional.resized_crop(image, *box, [size, size], antialias=True)
        in_uint8 = v2.functional.horizontal_flip(in_uint8) if flipped else in_uint8
        assert (got.int() - in_uint8.int()).abs().max() <= 1


def test_shifting_on_the_device_is_padding_and_cropping():
    images = pictures(6, 32)
    tops, lefts = torch.tensor([-4, -1, 0, 2, 4, 3]), torch.tensor([0, 4, -4, 1, -2, 3])
    boxes = torch.stack([tops, lefts, torch.full((6,), 32), torch.full((6,), 32)], 1)
    mirror = torch.tensor([False, True] * 3)
    padded = v2.functional.pad(images, [4, 4, 4, 4])
    for i, got in enumerate(crop_resize(images, boxes, mirror, 32)):
        expected = v2.functional.crop(padded[i], int(tops[i]) + 4, int(lefts[i]) + 4, 32, 32)
        assert torch.equal(got, v2.functional.horizontal_flip(expected) if mirror[i] else expected)


def splitmix64(state):
    """The generator as published, over Python's unbounded integers."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        yield mix64(state)


def mix64(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_random_numbers_are_splitmix64_over_seed_epoch_and_index():
    known = splitmix64(1234567)  # published test values
    assert [next(known) for _ in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    for seed, epoch, index in ((0, 0, 0), (3, 7, 123456), (2**63 - 1, 89, 10**9)):
        key = mix64((mix64((seed + 0x9E3779B97F4A7C15) % 2**64) + epoch) % 2**64)
        stream = splitmix64(mix64((key + index) % 2**64))
        expected = [(next(stream) >> 11) / 2**53 for _ in range(4)]
        assert uniform(seed, epoch, torch.tensor([5, index]), 4)[1].tolist() == expected


def test_random_crops_have_torchvisions_distribution():
    uniforms = uniform(0, 0, torch.arange(20000), 22)
    for height, width in ((300, 400), (100, 400), (640, 200)):
        aspects = torch.full((20000,), height / width, dtype=torch.float64)
        top, left, tall, wide = (random_crops(uniforms, aspects, torch.full((1, 2), 512.0)) / 512).T
        assert top.min() >= 0 and left.min() >= 0 and (top + tall).max() <= 1 and (left + wide).max() <= 1  # noqa: PT018
        torch.manual_seed(0)
        params = [v2.RandomResizedCrop(8).make_params([torch.empty(3, height, width)]) for _ in range(4000)]
        for name, ours, theirs in (
            ("height", tall, [p["height"] / height for p in params]),
            ("width", wide, [p["width"] / width for p in params]),
            ("top", top, [p["top"] / height for p in params]),
            ("left", left, [p["left"] / width for p in params]),
        ):
            quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
            theirs = torch.tensor(theirs, dtype=torch.float64)
            assert torch.allclose(ours.quantile(quantiles), theirs.quantile(quantiles), atol=0.04), name


@pytest.mark.parametrize("kind", ["folder", "hf"])
def test_resident_validation_is_the_streamed_one(kind, image_folder, parquet_folder):
    make = folder_config if kind == "folder" else hf_config
    source = image_folder if kind == "folder" else parquet_folder
    size = ["dataset.image_size=72"] if kind == "folder" else ["dataset.image_size=32"]
    smooth_pictures(image_folder)
    batches = {}
    for cache in ("none", "device"):
        config = make(source, *size, f"dataset.cache={cache}", "training.num_workers=0", "training.batch_size=4")
        _, val, _, _ = build_dataloaders(config, CPU)
        batches[cache] = list(device_batches(val, CPU))
    streamed, kept = ([torch.cat(part) for part in zip(*batches[cache], strict=True)] for cache in ("none", "device"))
    assert torch.equal(streamed[1], kept[1])
    assert len(kept[1]) == 9
    difference = (streamed[0].float() - kept[0].float()).abs().mean()
    assert difference == 0 if kind == "hf" else difference < 1.5  # centre crops: resized twice


@pytest.mark.parametrize(("size", "apart"), [(32, 0), (72, 4)])
def test_a_sample_looks_the_same_streamed_and_resident(size, apart, image_folder):
    smooth_pictures(image_folder)
    batches = {}
    for cache in ("none", "device"):
        config = folder_config(image_folder, f"dataset.image_size={size}", f"dataset.cache={cache}")
        train, _, plan, _ = build_dataloaders(config, CPU)
        plan.epoch = 3
        batches[cache] = list(device_batches(train, CPU))
    for (streamed, labels, _), (kept, kept_labels, _) in zip(batches["none"], batches["device"], strict=True):
        assert torch.equal(labels, kept_labels)
        difference = (streamed.float() - kept.float()).abs().mean()
        assert difference <= apart  # crops of down to a few pixels, their edges rounded twice
        assert (streamed.float() - kept.float().flip(-1)).abs().mean() > 20


def test_resident_batches_follow_the_plan_and_depend_on_the_seed_and_epoch_alone(image_folder):
    def epoch(number, seed=0, *overrides):
        config = folder_config(image_folder, "dataset.cache=device", f"training.seed={seed}", *overrides)
        train, _, plan, _ = build_dataloaders(config, CPU)
        plan.epoch = number
        images, labels, _ = (torch.cat(part) for part in zip(*device_batches(train, CPU), strict=True))
        return plan.indices_to_load().tolist(), images, labels

    order, images, labels = epoch(1)
    assert labels.tolist() == [index // 8 for index in order]  # eight pictures a class
    means = images.float().mean((2, 3))
    assert torch.equal(means.argmax(1), 2 - labels)  # blue, green, red
    again = epoch(1)
    assert torch.equal(again[1], images)
    for other in (epoch(2), epoch(1, seed=1)):
        positions = [other[0].index(index) for index in order]
        assert positions != list(range(len(order)))
        assert not torch.equal(other[1][positions], images)  # augmented anew, not only reordered
    by_index = dict(zip(order, images, strict=True))
    small = epoch(1, 0, "training.batch_size=4")
    assert all(torch.equal(by_index[index], image) for index, image in zip(small[0], small[1], strict=True))
    limited = epoch(1, 0, "dataset.max_train_samples=8", "dataset.augment=none")
    kept = epoch(3, 5, "dataset.augment=none")
    for index, image, label in zip(*limited, strict=True):
        assert label == index // 8
        assert torch.equal(image, kept[1][kept[0].index(index)])


def test_a_cache_larger_than_memory_is_refused_before_anything_is_decoded(image_folder):
    config = folder_config(image_folder, "dataset.cache=device", "dataset.image_size=300000")
    (image_folder / "train" / "red" / "0.jpg").write_bytes(b"")  # would be the error, if it came to that
    with pytest.raises(RequestError, match=r"dataset.cache: 33 pictures of 342857 px need .* GiB free; set "):
        build_dataloaders(config, CPU)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_of_a_cache_is_named(image_folder, workers):
    (image_folder / "train" / "red" / "3.jpg").write_bytes(b"no image")
    config = folder_config(image_folder, "dataset.cache=device", f"training.num_workers={workers}")
    with pytest.raises(RequestError, match=r"red/3.jpg: not a readable image"):
        build_dataloaders(config, CPU)


@pytest.mark.parametrize("cache", ["none", "device"])
def test_label_noise_is_symmetric_seeded_and_of_training_labels_alone(cache):
    """20 % of the digits' labels, each class turned into each other one, the same streamed and resident."""

    def labels(seed, noise=0.2):
        keys = [f"dataset.label_noise={noise}", f"training.seed={seed}", f"dataset.cache={cache}"]
        train, val, plan, _ = build_dataloaders(make_config(*keys, "training.num_workers=0", "ast.mode=dense"), CPU)
        pairs = [torch.cat([batch.labels for batch in device_batches(loader, CPU)]) for loader in (train, val)]
        indices = torch.cat([batch.indices for batch in device_batches(train, CPU)])
        assert sorted(indices.tolist()) == sorted(plan.indices_to_load().tolist())
        return dict(zip(indices.tolist(), pairs[0].tolist(), strict=True)), pairs[1].tolist()

    digits = build_datasets(make_config().dataset)
    clean = [label for _, label in digits[0].samples]
    noisy, val = labels(0)
    moved = {index: (clean[index], label) for index, label in noisy.items() if label != clean[index]}
    assert 0.15 < len(moved) / len(noisy) < 0.25
    assert len({(new - old) % 10 for old, new in moved.values()}) == 9
    assert val == [label for _, label in digits[1].samples]
    assert labels(0)[0] == noisy
    other = labels(1)[0]
    assert {index for index in other if other[index] != clean[index]} != set(moved)
    assert all(label == clean[index] for index, label in labels(0, 0.0)[0].items())


@pytest.mark.parametrize("cache", ["none", "device"])
def test_repeated_images_come_so_often_each_time_augmented_anew(cache, image_folder):
    keys = ["dataset.repeat=3", "dataset.max_train_samples=5", f"dataset.cache={cache}", "training.num_workers=0"]
    config = folder_config(image_folder, *keys, "training.batch_size=15", "dataset.augment=pad_crop")
    train, _, plan, _ = build_dataloaders(config, CPU)
    ((images, labels, indices),) = device_batches(train, CPU)
    assert len(plan.indices) == len(set(indices.tolist())) == 15
    groups = {}
    for image, label, index in zip(images, labels.tolist(), indices.tolist(), strict=True):
        groups.setdefault((index % 24, label), []).append(image)
    assert {len(group) for group in groups.values()} == {3}
    assert len(groups) == 5
    assert any(not torch.equal(group[0], group[1]) for group in groups.values())
