"""Random numbers, subsets and label noise: functions of seed, epoch and index."""

import pytest
import torch

from conftest import make_config
from helpers import folder_config
from lab.data.loading import device_batches
from lab.data.randomness import uniform
from train_ast import build_dataloaders, build_datasets

CPU = torch.device("cpu")


def test_subset_is_fixed_mixed_and_the_same_for_every_seed(image_folder):
    def keys(seed):
        limits = [
            "dataset.max_train_samples=9",
            "dataset.max_val_samples=5",
            f"training.seed={seed}",
        ]
        _, val, plan, _ = build_dataloaders(folder_config(image_folder, *limits), CPU)
        return sorted(plan.indices.tolist()), [
            index for chunk in val.batch_sampler for index, _ in chunk
        ]

    assert keys(0) == keys(1)
    assert (len(keys(0)[0]), len(keys(0)[1])) == (9, 5)
    assert len({index // 8 for index in keys(0)[0]}) == 3  # not the first class alone


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
    assert [next(known) for _ in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]
    for seed, epoch, index in ((0, 0, 0), (3, 7, 123456), (2**63 - 1, 89, 10**9)):
        key = mix64((mix64((seed + 0x9E3779B97F4A7C15) % 2**64) + epoch) % 2**64)
        stream = splitmix64(mix64((key + index) % 2**64))
        expected = [(next(stream) >> 11) / 2**53 for _ in range(4)]
        assert uniform(seed, epoch, torch.tensor([5, index]), 4)[1].tolist() == expected


@pytest.mark.parametrize("cache", ["none", "device"])
def test_label_noise_is_symmetric_seeded_and_of_training_labels_alone(cache):
    """20 % of the digits' labels, each class turned into each other one, the same streamed and
    resident.
    """

    def labels(seed, noise=0.2):
        keys = [f"dataset.label_noise={noise}", f"training.seed={seed}", f"dataset.cache={cache}"]
        train, val, plan, _ = build_dataloaders(
            make_config(*keys, "training.num_workers=0", "ast.mode=dense"), CPU
        )
        pairs = [
            torch.cat([batch.labels for batch in device_batches(loader, CPU)])
            for loader in (train, val)
        ]
        indices = torch.cat([batch.indices for batch in device_batches(train, CPU)])
        assert sorted(indices.tolist()) == sorted(plan.indices_to_load().tolist())
        return dict(zip(indices.tolist(), pairs[0].tolist(), strict=True)), pairs[1].tolist()

    digits = build_datasets(make_config().dataset)
    clean = [label for _, label in digits[0].samples]
    noisy, val = labels(0)
    moved = {
        index: (clean[index], label) for index, label in noisy.items() if label != clean[index]
    }
    assert 0.15 < len(moved) / len(noisy) < 0.25
    assert len({(new - old) % 10 for old, new in moved.values()}) == 9
    assert val == [label for _, label in digits[1].samples]
    assert labels(0)[0] == noisy
    other = labels(1)[0]
    assert {index for index in other if other[index] != clean[index]} != set(moved)
    assert all(label == clean[index] for index, label in labels(0, 0.0)[0].items())
