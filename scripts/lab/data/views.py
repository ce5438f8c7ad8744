"""Views of pictures of several sizes: cut out, resized and mirrored in one step, on the device that
holds the pixels.

The pixels of many pictures lie in one flat tensor, each picture as [H, W, 3]. A view needs some
rows of its picture, at their full width. It does not matter which other rows are there, so that
views of a whole set on the device and views of the few rows that were read from a disk have the
same pixels, bit for bit.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no package of it for this machine
    triton = None

COLUMNS = 8  # of a table of views
FIRST, ROWS, WIDTH, TOP, LEFT, HEIGHT, LENGTH, MIRROR = range(COLUMNS)


def table_of_views(
    boxes: np.ndarray, mirror: np.ndarray, originals: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(a table of views; int64 [n], the first row of its picture that each needs).

    boxes: float64 [n, 4], (top, left, height, width) in pixels of the original pictures. mirror:
    bool [n]. originals, sizes: int [n, 2], height and width of the originals, and of the smaller
    ones that the views are cut from. A box is the same part of both: its edges need not be whole
    pixels.

    The table is float64 [n, 8], every number exact: FIRST, where the first row that is needed
    begins in the flat tensor, in bytes, still 0; ROWS, how many are needed; WIDTH of the picture;
    the box in pixels, its TOP counted from the first row that is needed, LEFT, HEIGHT and LENGTH;
    MIRROR, 1 for a mirrored view.
    """
    scales = sizes / originals
    lengths = np.maximum(boxes[:, 2:] * scales, 1.5)  # so wide that it has a pixel's centre in it
    starts = np.clip(boxes[:, :2] * scales, 0, np.maximum(0, sizes - lengths))
    first = np.floor(starts[:, 0]).astype(np.int64)
    last = np.minimum(np.ceil(starts[:, 0] + lengths[:, 0]), sizes[:, 0])
    columns = (
        np.zeros(len(boxes)),
        last - first,
        sizes[:, 1],
        starts[:, 0] - first,
        starts[:, 1],
        *lengths.T,
        mirror,
    )
    return np.stack([np.asarray(column, dtype=np.float64) for column in columns], 1), first


def bytes_needed(table: np.ndarray) -> np.ndarray:
    """How many bytes the rows of each view have, int64 [n]."""
    return (3 * table[:, ROWS] * table[:, WIDTH]).astype(np.int64)


def cut(flat: Tensor, table: Tensor, size: int) -> Tensor:
    """Views as uint8 [n, 3, size, size], bilinear with antialiasing, as in Pillow and torchvision.

    flat: uint8 [bytes]. table: float64 [n, 8], see `table_of_views`, on the same device. On a GPU
    it is one kernel. On a CPU, and without Triton, the host cuts one view after the other.
    """
    out = torch.empty(len(table), 3, size, size, dtype=torch.uint8, device=flat.device)
    if flat.is_cuda and triton is not None:
        if len(table):
            grid = (triton.cdiv(size * size, PIXELS_A_PROGRAM), len(table))
            with torch.cuda.device(flat.device):
                _cut_kernel[grid](flat, table, out, SIZE=size, PIXELS=PIXELS_A_PROGRAM)
        return out
    for view, row in zip(out, table.tolist(), strict=True):
        first, rows, width = (int(row[i]) for i in (FIRST, ROWS, WIDTH))
        pixels = flat[first : first + 3 * rows * width].cpu().numpy().reshape(rows, width, 3)
        view.copy_(torch.from_numpy(_cut_one(pixels, row, size)).permute(2, 0, 1))
    return out


def _cut_one(pixels: np.ndarray, row: list[float], size: int) -> np.ndarray:
    """A view, uint8 [size, size, 3], of the rows of a picture that it needs, uint8 [rows, width,
    3].
    """
    lines, down = _taps(row[TOP], row[HEIGHT], size, len(pixels))
    places, across = _taps(row[LEFT], row[LENGTH], size, pixels.shape[1])
    left = places.min()
    pixels = pixels[:, left : places.max() + 1]
    places = places - left
    tall = sum(down[:, k, None, None] * pixels[lines[:, k]] for k in range(lines.shape[1]))
    view = sum(across[:, k, None] * tall[:, places[:, k]] for k in range(places.shape[1]))
    view = (view + 0.5).astype(np.uint8)
    return view[:, ::-1].copy() if row[MIRROR] else view


def _taps(start: float, length: float, size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """(which pixels, int [size, taps], make up each pixel of a view along an axis; their weights,
    float32, likewise).

    A triangle whose half width is max(1, length / size) pixels, within the picture and [start,
    start + length].
    """
    scale = length / size
    half = max(1.0, scale)
    centres = start + (np.arange(size)[:, None] + 0.5) * scale
    pixels = np.floor(centres - half).astype(np.int64) + np.arange(int(2 * half) + 2)
    weights = np.maximum(0, 1 - np.abs(pixels + 0.5 - centres) / half)
    inside = (
        (pixels >= 0) & (pixels < side) & (pixels + 0.5 >= start) & (pixels + 0.5 <= start + length)
    )
    weights = (weights * inside).astype(np.float32)
    return pixels.clip(0, side - 1), weights / weights.sum(1, keepdims=True)


PIXELS_A_PROGRAM = 256

if triton is not None:

    @triton.jit
    def _cut_kernel(flat, table, out, SIZE: tl.constexpr, PIXELS: tl.constexpr):  # noqa: N803
        """The views of `cut`: a program makes PIXELS pixels of one view, all three colours."""
        view = tl.program_id(1)
        row = table + view * 8
        first = tl.load(row).to(tl.int64)
        rows = tl.load(row + 1).to(tl.int32)
        width = tl.load(row + 2).to(tl.int32)
        top = tl.load(row + 3).to(tl.float32)
        left = tl.load(row + 4).to(tl.float32)
        height = tl.load(row + 5).to(tl.float32)
        length = tl.load(row + 6).to(tl.float32)
        mirror = tl.load(row + 7) > 0
        pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
        inside = pixel < SIZE * SIZE
        y = pixel // SIZE
        x = pixel % SIZE
        x = tl.where(mirror, SIZE - 1 - x, x)
        scale_y = height / SIZE
        scale_x = length / SIZE
        half_y = tl.maximum(scale_y, 1.0)
        half_x = tl.maximum(scale_x, 1.0)
        centre_y = top + (y.to(tl.float32) + 0.5) * scale_y
        centre_x = left + (x.to(tl.float32) + 0.5) * scale_x
        from_y = tl.floor(centre_y - half_y).to(tl.int32)
        from_x = tl.floor(centre_x - half_x).to(tl.int32)
        red = tl.zeros([PIXELS], tl.float32)
        green = tl.zeros([PIXELS], tl.float32)
        blue = tl.zeros([PIXELS], tl.float32)
        total = tl.zeros([PIXELS], tl.float32)
        for dy in range((2 * half_y).to(tl.int32) + 2):
            at_y = from_y + dy
            near_y = at_y.to(tl.float32) + 0.5
            weight_y = tl.maximum(1 - tl.abs(near_y - centre_y) / half_y, 0.0)
            good_y = (
                (at_y >= 0) & (at_y < rows) & (near_y >= top) & (near_y <= top + height) & inside
            )
            weight_y = tl.where(good_y, weight_y, 0.0)
            line = flat + first + at_y.to(tl.int64) * width * 3
            for dx in range((2 * half_x).to(tl.int32) + 2):
                at_x = from_x + dx
                near_x = at_x.to(tl.float32) + 0.5
                weight = weight_y * tl.maximum(1 - tl.abs(near_x - centre_x) / half_x, 0.0)
                good = (
                    (at_x >= 0)
                    & (at_x < width)
                    & (near_x >= left)
                    & (near_x <= left + length)
                    & (weight > 0)
                )
                weight = tl.where(good, weight, 0.0)
                place = line + at_x * 3
                red += weight * tl.load(place, mask=good, other=0).to(tl.float32)
                green += weight * tl.load(place + 1, mask=good, other=0).to(tl.float32)
                blue += weight * tl.load(place + 2, mask=good, other=0).to(tl.float32)
                total += weight
        total = tl.maximum(total, 1e-6)
        place = out + view.to(tl.int64) * 3 * SIZE * SIZE + pixel
        tl.store(place, tl.floor(red / total + 0.5).to(tl.uint8), mask=inside)
        tl.store(place + SIZE * SIZE, tl.floor(green / total + 0.5).to(tl.uint8), mask=inside)
        tl.store(place + 2 * SIZE * SIZE, tl.floor(blue / total + 0.5).to(tl.uint8), mask=inside)
