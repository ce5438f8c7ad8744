"""Random numbers as functions of seed, epoch and sample index, never of the order of calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

# uniform numbers that the augmentation of one sample may use, see `images.Augmentation`
UNIFORMS_PER_SAMPLE = 47
LABEL_NOISE_EPOCH = 2**40  # stands for an epoch in `label_shifts`; no run gets so far
MIXING_EPOCH = 2**41  # added to an epoch in `mixing.Mixing`


def uniform(seed: int, epoch: int, indices: Tensor, count: int) -> Tensor:
    """`count` uniform numbers in [0, 1) for each sample: [n] -> float64 [n, count].

    The numbers of a sample depend on (seed, epoch, its index) and on nothing else. The method is
    SplitMix64's output function over a counter (Steele, Lea & Flood 2014, "Fast splittable
    pseudorandom number generators", figure 17). It is written in int64 arithmetic, so that CPU and
    GPU give the same numbers.
    """

    def shift_right(x: Tensor, bits: int) -> Tensor:
        # a logical shift: int64's own repeats the sign
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    def mix(x: Tensor) -> Tensor:
        x = (x ^ shift_right(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
        x = (x ^ shift_right(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
        return x ^ shift_right(x, 31)

    golden = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15
    key = mix(mix(torch.tensor([seed], device=indices.device) + golden) + epoch)
    counter = torch.arange(1, count + 1, device=indices.device) * golden
    return shift_right(mix(mix(key + indices.long())[:, None] + counter), 11).double() * 2.0**-53


@contextlib.contextmanager
def host_generator() -> Iterator[torch.Generator]:
    """torch's generator of the host, to be seeded for what a library draws; afterwards it is as
    before.
    """
    with torch.random.fork_rng(devices=[]):
        yield torch.default_generator


def as_seed(number: float) -> int:
    """A seed from a uniform number in [0, 1): all of its 53 bits."""
    return int(number * 2**53)


def label_shifts(samples: int, classes: int, share: float, seed: int) -> np.ndarray | None:
    """By how many classes symmetric label noise moves each label, int64 [samples]; None without
    noise.

    A `share` of the labels moves, to each of the other classes with the same chance. The shift of a
    sample is a function of the seed and its index.
    """
    if not share:
        return None
    uniforms = uniform(seed, LABEL_NOISE_EPOCH, torch.arange(samples), 2).numpy()
    return np.where(uniforms[:, 0] < share, 1 + uniforms[:, 1] * (classes - 1), 0).astype(np.int64)


def random_subset(size: int, limit: int | None) -> np.ndarray:
    """Ascending indices, int64, of `limit` random samples out of `size`; of all where there are no
    more than that.

    The subset is the same for every seed of a run.
    """
    if limit is None or limit >= size:
        return np.arange(size)
    return np.sort(np.random.default_rng(0).permutation(size)[:limit])
