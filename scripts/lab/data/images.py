"""Decoding, cropping and resizing pictures."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torchvision.transforms import v2

from lab.config import DatasetConfig
from lab.errors import one_line


def decode_image(data: bytes) -> Tensor:
    """uint8 [3, H, W] from the bytes of an image file: torchvision.io for JPEG, Pillow for the rest, because
    torchvision's PNG decoder ends the whole process on some damaged files.

    Raises ValueError where neither can read it.
    """
    if data[:3] == b"\xff\xd8\xff":
        with contextlib.suppress(RuntimeError, ValueError, AttributeError):  # AttributeError: it is to be given up
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return torchvision.io.decode_image(encoded, torchvision.io.ImageReadMode.RGB)
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as opened:
            if opened.mode.startswith("I"):  # 16 bits a pixel, which conversion would clip
                opened = Image.fromarray((np.asarray(opened) // 256).astype(np.uint8))
            return v2.functional.pil_to_tensor(opened.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise almost anything on hostile bytes
        why = re.sub(r" <_io\.BytesIO.*?>", "", one_line(error))  # an address, another one every time
        raise ValueError(f"not a readable image ({why})") from None


def random_crops(draws: Tensor, aspects: Tensor, sides: Tensor) -> Tensor:
    """Boxes [n, 4] (top, left, height, width, whole pixels) that cover 8 to 100 % of a picture at ratios from 3:4 to
    4:3 (Szegedy et al. 2015, section 6; as torchvision's RandomResizedCrop: ten tries, then the middle).

    draws: [n, 22], uniform; aspects: [n], height over width of the pictures; sides: [n, 2], height and width at
    which they are kept.
    """
    area, ratio = 0.08 + 0.92 * draws[:, :10], torch.exp(math.log(4 / 3) * (2 * draws[:, 10:20] - 1))
    tries = torch.stack([area / ratio / aspects[:, None], area * ratio * aspects[:, None]], 1).sqrt()  # [n, 2, 10]
    fits = (tries <= 1).all(1)
    found, first = fits.any(1, keepdim=True), fits.int().argmax(1)[:, None, None].expand(-1, 2, 1)
    middle = torch.stack([4 / 3 / aspects, 4 / 3 * aspects], 1).clamp(max=1)
    lengths = (torch.where(found, tries.gather(2, first)[..., 0], middle) * sides).round().clamp(min=1)
    starts = torch.where(found, draws[:, 20:22] * (sides - lengths + 1), (sides - lengths) / 2).floor()
    return torch.cat([starts, lengths], 1)


CENTRE = 0.875  # side of the validation crop over the picture's shorter side, where training crops at random


def centre_crops(aspects: Tensor, sides: Tensor) -> Tensor:
    """Boxes [n, 4], likewise, of the square in the middle of each picture."""
    lengths = (CENTRE * sides * torch.stack([1 / aspects, aspects], 1).clamp(max=1)).round().clamp(min=1)
    return torch.cat([((sides - lengths) / 2).floor(), lengths], 1)


class View:
    """What the network sees of a picture: uint8 [3, H, W] -> uint8 [3, size, size]; the device normalises it.

    random_resized_crop: a random crop and mirror; the middle for validation. pad_crop: the whole picture resized to
    `size`, shifted over black and mirrored (He et al. 2016, section 4.2); not shifted for validation. none: resized.
    """

    def __init__(self, config: DatasetConfig, train: bool):
        augment, self.size = config.resolved_augment(), config.image_size
        self.crops, self.random = augment == "random_resized_crop", train and augment != "none"
        self.margin = max(1, self.size // 8)  # of the shift, pixels: 4 at 32

    def boxes(self, draws: Tensor, aspects: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes [n, 4] and mirrors [n]; arguments as of `random_crops`, with [n, UNIFORMS_PER_SAMPLE] draws."""
        mirror = (draws[:, 22] < 0.5) & self.random
        if self.crops:
            return random_crops(draws, aspects, sides) if self.random else centre_crops(aspects, sides), mirror
        starts = ((draws[:, :2] * (2 * self.margin + 1)).floor() - self.margin) * self.random
        return torch.cat([starts, torch.full_like(starts, self.size)], 1), mirror

    def __call__(self, images: Sequence[Tensor], draws: Tensor) -> list[Tensor]:
        """Each picture by its row of `draws` [n, UNIFORMS_PER_SAMPLE]."""
        if not self.crops:
            images = [image if image.shape[1:] == (self.size,) * 2 else resize(image, self.size) for image in images]
        if not images or not (self.crops or self.random):
            return list(images)
        sides = torch.tensor([image.shape[1:] for image in images], dtype=torch.float64)
        boxes, mirrors = self.boxes(draws, sides[:, 0] / sides[:, 1], sides)
        return [self._cut(*each) for each in zip(images, boxes.int().tolist(), mirrors.tolist(), strict=True)]

    def _cut(self, image: Tensor, box: Sequence[int], mirror: bool) -> Tensor:
        top, left, height, width = box
        if not self.crops:
            image, top, left = F.pad(image, [self.margin] * 4), top + self.margin, left + self.margin
        image = image[:, top : top + height, left : left + width]
        image = resize(image, self.size) if self.crops else image
        return image.flip(-1) if mirror else image


def resize(image: Tensor, size: int) -> Tensor:
    """uint8 [3, H, W] -> [3, size, size], bilinear with antialiasing; fast in the layout that decoders leave."""
    image = image[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(image, (size, size), mode="bilinear", antialias=True)[0]


def axis_weights(start: Tensor, length: Tensor, size: int, side: int, mirror: Tensor | None = None) -> Tensor:
    """Weights [batch, size, side] that crop one axis of `side` pixels to [start, start + length) and resize that to
    `size`: bilinear with antialiasing as in Pillow and torchvision, a triangle over max(1, length / size) pixels.

    start, length: float [batch], whole pixels; what lies outside the picture counts as black. mirror: bool
    [batch], turns the axis round.
    """
    start, length = start.float()[:, None, None], length.float()[:, None, None]
    scale = length / size
    outputs = torch.arange(size, device=start.device) + 0.5
    if mirror is not None:
        outputs = torch.where(mirror[:, None], size - outputs, outputs)
    pixels = torch.arange(side, device=start.device) + 0.5 - start
    weights = (1 - (pixels - outputs.view(-1, size, 1) * scale).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((pixels > 0) & (pixels < length))
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)
    return weights.to(torch.float16 if start.is_cuda else torch.float32)  # float16 holds every grey level exactly


def crop_resize(images: Tensor, boxes: Tensor, mirror: Tensor, size: int) -> Tensor:
    """Crop, resize and mirror every picture by its own numbers: uint8 [batch, 3, S, S] -> uint8 [batch, 3, size, size].

    boxes: float [batch, 4], top, left, height and width in pixels; mirror: bool [batch].
    """
    side = images.shape[-1]
    rows = axis_weights(boxes[:, 0], boxes[:, 2], size, side)
    columns = axis_weights(boxes[:, 1], boxes[:, 3], size, side, mirror)
    narrow = images.to(columns.dtype).flatten(1, 2) @ columns.mT
    return (rows[:, None] @ narrow.unflatten(1, (3, side))).round().clamp(0, 255).to(torch.uint8)


def kept_side(config: DatasetConfig) -> int:
    """Side of the pictures a ResidentLoader keeps, pixels."""
    cropped = config.resolved_augment() == "random_resized_crop"
    return config.cache_resolution or (round(config.image_size / CENTRE) if cropped else config.image_size)
