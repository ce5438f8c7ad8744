"""Views cut out of pictures of several sizes, on the host and by the GPU's kernel."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from conftest import REPO
from helpers import pictures
from lab.data import views

BOXES = np.array(
    [[0, 0, 60, 80], [5, 7, 30, 20], [40, 1, 20, 79], [3, 30, 57, 9], [10, 10, 24, 24.0]]
)
MIRROR = np.array([False, True, False, True, True])


def whole_table(boxes, mirror, originals, sizes):
    """A table for pictures that lie one after the other, whole."""
    table, first = views.table_of_views(boxes, mirror, originals, sizes)
    offsets = np.concatenate([[0], np.cumsum(3 * sizes.prod(1))])[:-1]
    table[:, views.FIRST] = offsets + first * 3 * sizes[:, 1]
    return table, first


@pytest.mark.parametrize("size", [16, 48])
def test_a_view_is_torchvisions(size):
    image = v2.functional.resize(pictures(1, 80)[0], [60, 80], antialias=True)
    sizes = np.tile([60, 80], (5, 1))
    flat = image.permute(1, 2, 0).reshape(-1).repeat(5)
    ours = views.cut(flat, torch.from_numpy(whole_table(BOXES, MIRROR, sizes, sizes)[0]), size)
    for box, flipped, got in zip(BOXES.astype(int).tolist(), MIRROR, ours, strict=True):
        expected = v2.functional.resized_crop(image.float(), *box, [size, size], antialias=True)
        expected = v2.functional.horizontal_flip(expected) if flipped else expected
        assert (got.float() - expected).abs().max() <= 0.51  # rounded once, from the exact values


def test_other_rows_of_the_picture_change_nothing():
    generator = torch.Generator().manual_seed(0)
    sizes = np.array([[50, 61], [33, 20], [7, 90], [50, 61], [1, 1]])
    originals = np.array([[60, 80], [70, 42], [60, 800], [60, 80], [60, 80]])
    flat = torch.randint(
        0, 256, (int(3 * sizes.prod(1).sum()),), dtype=torch.uint8, generator=generator
    )
    boxes = BOXES * (originals / [60, 80])[:, [0, 1, 0, 1]]
    table, first = whole_table(boxes, MIRROR, originals, sizes)
    cut = views.cut(flat, torch.from_numpy(table), 24)
    needed = views.bytes_needed(table)
    parts = [
        flat[int(at) : int(at + n)] for at, n in zip(table[:, views.FIRST], needed, strict=True)
    ]
    table[:, views.FIRST] = np.concatenate([[0], np.cumsum(needed)[:-1]])
    assert torch.equal(views.cut(torch.cat(parts), torch.from_numpy(table), 24), cut)
    assert first.max() > 0
    assert needed.sum() < len(flat)


INTERPRETED = """
import numpy as np, torch, triton
from lab.data import views
generator = torch.Generator().manual_seed(0)
sizes = np.array([[40, 60], [33, 21], [80, 50], [5, 7], [1, 1]])
originals = sizes * np.array([1.5, 2.0])
size = (int(3 * sizes.prod(1).sum()),)
flat = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
boxes = np.array([[3, 5, 40, 70], [0, 0, 49, 42], [10, 20, 50, 60], [1, 1, 2, 3], [0, 0, 1.5, 2]])
table, first = views.table_of_views(boxes, np.array([0, 1, 1, 0, 1]), originals, sizes)
table[:, views.FIRST] = np.concatenate([[0], np.cumsum(3 * sizes.prod(1))])[:-1]
table[:, views.FIRST] += first * 3 * sizes[:, 1]
table, size = torch.from_numpy(table), 20
expected, found = views.cut(flat, table, size), torch.zeros(5, 3, size, size, dtype=torch.uint8)
views._cut_kernel[(triton.cdiv(size * size, 256), 5)](flat, table, found, SIZE=size, PIXELS=256)
apart = (found.int() - expected.int()).abs()
assert expected.float().std() > 20 and apart.max() <= 1 and apart.float().mean() < 0.01, apart
"""


@pytest.mark.skipif(views.triton is None, reason="no Triton on this machine")
def test_the_kernel_of_the_gpu_gives_the_same_views():
    """By Triton's interpreter, which needs no GPU."""
    env = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(REPO / "scripts")}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
