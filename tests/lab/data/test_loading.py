"""Which samples an epoch loads, and that nothing depends on the order of calls."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import folder_config
from lab.data.loading import EpochPlan, device_batches
from lab.data.randomness import UNIFORMS_PER_SAMPLE, uniform
from train_ast import build_dataloaders

CPU = torch.device("cpu")


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
    assert all(
        np.array_equal(uniforms, row) for (_, uniforms), row in zip(again, rows, strict=True)
    )


def test_epochs_and_seeds_order_differently():
    def order(seed, epoch):
        plan = EpochPlan(np.arange(64), 64, seed, lambda _: 1.0)
        plan.epoch = epoch
        return next(iter(plan))

    assert (
        len({str([i for i, _ in order(seed, epoch)]) for seed in (0, 1) for epoch in (0, 1)}) == 4
    )


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
        loader, _, plan, _ = build_dataloaders(
            folder_config(image_folder, f"training.num_workers={n}"), CPU
        )
        plan.epoch = epoch
        return list(device_batches(loader, CPU))

    for epoch in (0, 3):
        alone = batches(0, epoch)
        shared = batches(workers, epoch)
        assert all(
            torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
            for a, b in zip(alone, shared, strict=True)
        )


def test_validation_sees_every_sample_once(image_folder):
    _, loader, _, _ = build_dataloaders(folder_config(image_folder, "training.batch_size=4"), CPU)
    labels = torch.cat([batch.labels for batch in device_batches(loader, CPU)])
    assert labels.bincount().tolist() == [3, 3, 3]


@pytest.mark.parametrize("cache", ["none", "device"])
def test_repeated_images_come_so_often_each_time_augmented_anew(cache, image_folder):
    keys = [
        "dataset.repeat=3",
        "dataset.max_train_samples=5",
        f"dataset.cache={cache}",
        "training.num_workers=0",
    ]
    config = folder_config(
        image_folder, *keys, "training.batch_size=15", "dataset.augment=pad_crop"
    )
    train, _, plan, _ = build_dataloaders(config, CPU)
    (batch,) = device_batches(train, CPU)
    images, labels, indices = batch.tensors()
    assert len(plan.indices) == len(set(indices.tolist())) == 15
    groups = {}
    for image, label, index in zip(images, labels.tolist(), indices.tolist(), strict=True):
        groups.setdefault((index % 24, label), []).append(image)
    assert {len(group) for group in groups.values()} == {3}
    assert len(groups) == 5
    assert any(not torch.equal(group[0], group[1]) for group in groups.values())
