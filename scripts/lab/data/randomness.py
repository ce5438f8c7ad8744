"""Random numbers as functions of seed, epoch and sample index, never of the order of calls."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

DRAWS = 23  # random numbers a sample's augmentation may use


def uniform(seed: int, epoch: int, indices: Tensor, draws: int) -> Tensor:
    """Random numbers in [0, 1) as a function of (seed, epoch, sample index) alone: [n] -> float64 [n, draws].

    SplitMix64's output function (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators",
    figure 17) over a counter, in int64 arithmetic, so that CPU and GPU draw the same.
    """

    def shifted(x: Tensor, bits: int) -> Tensor:  # logical shift: int64's own keeps the sign
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    def mix(x: Tensor) -> Tensor:
        x = (x ^ shifted(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
        x = (x ^ shifted(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
        return x ^ shifted(x, 31)

    golden = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15
    key = mix(mix(torch.tensor([seed], device=indices.device) + golden) + epoch)
    counter = torch.arange(1, draws + 1, device=indices.device) * golden
    return shifted(mix(mix(key + indices.long())[:, None] + counter), 11).double() * 2.0**-53


def label_shifts(samples: int, classes: int, share: float, seed: int) -> np.ndarray | None:
    """By how many classes each label moves for symmetric label noise: to any other class alike, [samples], int64.

    None without noise. A function of the seed and the sample's index.
    """
    if not share:
        return None
    draws = uniform(seed, 2**40, torch.arange(samples), 2).numpy()  # an epoch that never comes
    return np.where(draws[:, 0] < share, 1 + draws[:, 1] * (classes - 1), 0).astype(np.int64)


def random_subset(size: int, limit: int | None) -> np.ndarray:
    """Indices of a random subset, the same for every seed, of at most `limit` samples."""
    if limit is None or limit >= size:
        return np.arange(size)
    return np.sort(np.random.default_rng(0).permutation(size)[:limit])
