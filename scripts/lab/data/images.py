"""Decoding, augmenting and resizing pictures.

A picture is a uint8 tensor [3, H, W]. A box is the part of it that a crop keeps: (top, left,
height, width) in whole pixels. Streamed pictures are cut one by one (`Augmentation.__call__`),
cached ones in batches: squares by `pad_crop`, pictures of several sizes by `views.cut`. All get
their boxes from `Augmentation.boxes`.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.transforms import v2

from lab.base.errors import one_line
from lab.config.sections import DatasetConfig
from lab.config.tables import Table
from lab.data.randomness import as_seed, host_generator
from lab.machine.devices import IMAGENET_MOMENTS

try:
    import simplejpeg
except ImportError:
    simplejpeg = None


def decode_image(data: bytes) -> Tensor:
    """The picture in the bytes of an image file, uint8 [3, H, W].

    A picture is turned upright by the orientation in its EXIF data, as the `datasets` library and
    Pillow's exif_transpose do, whatever its format and wherever it comes from. Damaged EXIF data
    count as none.

    Raises ValueError where the bytes are no readable picture, or one whose range of grey levels is
    not known.
    """
    pixels = decode_jpeg(data) if data[:3] == b"\xff\xd8\xff" else None
    try:
        if pixels is None:
            return _decode_by_pillow(data)
        turn = _turn_of_jpeg(data) if b"Exif" in data else None
        pixels = pixels if turn is None else np.array(Image.fromarray(pixels).transpose(turn))
        return torch.from_numpy(pixels).permute(2, 0, 1)
    except Exception as error:  # Pillow's decoders raise almost anything on hostile bytes
        # without the address in memory, which is another one in every run
        why = re.sub(r" <_io\.BytesIO.*?>", "", one_line(error))
        raise ValueError(f"not a readable image ({why})") from None


def decode_jpeg(data: bytes) -> np.ndarray | None:
    """The pixels of a JPEG as they are stored, uint8 [H, W, 3], by simplejpeg (libjpeg-turbo).

    None for what it does not take: a damaged file, or one in CMYK. None too where simplejpeg is not
    installed: there are machines without a wheel of it. Pillow then decodes, by the same library to
    the same pixels, but more slowly.
    """
    if simplejpeg is None:
        return None
    with contextlib.suppress(ValueError):
        colours = simplejpeg.decode_jpeg_header(data)[2]
        return None if colours in ("CMYK", "YCCK") else simplejpeg.decode_jpeg(data)
    return None


def encode_jpeg(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as a JPEG of quality 95, colours at half the resolution (4:2:0)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def _decode_by_pillow(data: bytes) -> Tensor:
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        image = _eight_bits(opened)
        turn = _turn(opened)
        image = image if turn is None else image.transpose(turn)
        return v2.functional.pil_to_tensor(image.convert("RGB"))


# of Pillow: damaged data count as none
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns a picture upright, by its EXIF data; None where nothing has to be done."""
    with contextlib.suppress(Exception):  # Pillow's EXIF reader raises almost anything, too
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    return None


def _turn_of_jpeg(data: bytes) -> Image.Transpose | None:
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as image:
        return _turn(image)
    return None


TURNS = {  # by EXIF orientation (CIPA DC-008, tag 0x0112): what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _eight_bits(image: Image.Image) -> Image.Image:
    """A picture of 12 or 16 bits a pixel reduced to the upper 8 of them, any other one as it is.

    Pillow's own conversion would clip the values. It opens such pictures in the modes I;16, and in
    mode I those of PPM and, in older versions, of PNG, scaled to 16 bits. Other pictures of mode I
    hold 32-bit or signed integers, those of mode F floating-point numbers. Neither mode says what
    is black and what white. Raises ValueError for these.
    """
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        numbers = "floating-point" if image.mode == "F" else "32-bit or signed"
        raise ValueError(
            f"{numbers} grey levels, whose black and white are not known; convert it to 8 or 16 "
            f"bits"
        )
    if not image.mode.startswith("I"):
        return image
    bits = image.tag_v2[258][0] if image.format == "TIFF" else 16  # tag BitsPerSample: 12 or 16
    return Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8))


def random_crops(
    uniforms: Tensor,
    aspects: Tensor,
    sides: Tensor,
    areas: tuple[float, float] = (0.08, 1.0),
    ratio: float = 4 / 3,
) -> Tensor:
    """Random boxes, float64 [n, 4], for training.

    A box covers a share of its picture from `areas`, at a ratio of width to height from 1 / ratio
    to ratio. By default these are those of Szegedy et al. 2015, section 6. As in torchvision's
    RandomResizedCrop, the first of ten random boxes that fits into the picture is taken. If none
    fits, the box lies in the middle and is as large as the ratios allow.

    uniforms: float64 [n, >= 22] in [0, 1): ten areas, ten ratios, a vertical and a horizontal
    position.
    aspects: float64 [n], height / width of the original pictures.
    sides: float64 [n, 2] or [1, 2], height and width in pixels of the pictures that the boxes are
    cut from.
    """
    smallest, largest = areas
    area = smallest + (largest - smallest) * uniforms[:, :10]
    shape = torch.exp(math.log(ratio) * (2 * uniforms[:, 10:20] - 1))
    heights = area / shape / aspects[:, None]
    widths = area * shape * aspects[:, None]
    tries = torch.stack([heights, widths], 1).sqrt()  # [n, 2, 10], shares of the picture's sides
    fits = (tries <= 1).all(1)
    found = fits.any(1, keepdim=True)
    first = fits.int().argmax(1)[:, None, None].expand(-1, 2, 1)
    largest_in_middle = torch.stack([ratio / aspects, ratio * aspects], 1).clamp(max=1)
    shares = torch.where(found, tries.gather(2, first)[..., 0], largest_in_middle)
    lengths = (shares * sides).round().clamp(min=1)
    random_starts = uniforms[:, 20:22] * (sides - lengths + 1)
    starts = torch.where(found, random_starts, (sides - lengths) / 2).floor()
    return torch.cat([starts, lengths], 1)


# side of the validation crop / shorter side of the picture, with random_resized_crop
CENTRE = 0.875


def centre_crops(aspects: Tensor, sides: Tensor) -> Tensor:
    """Square boxes in the middle of the pictures, float64 [n, 4], for validation; arguments as of
    `random_crops`.
    """
    square = torch.stack([1 / aspects, aspects], 1).clamp(max=1)  # the largest, as shares
    lengths = (CENTRE * sides * square).round().clamp(min=1)
    return torch.cat([((sides - lengths) / 2).floor(), lengths], 1)


def rand_augment() -> Callable[[Tensor], Tensor]:
    """What is done to each training picture, uint8 [3, size, size] to the same. Chance in it is
    drawn from torch's generator, which is seeded by the picture's own number.
    """
    return v2.RandAugment(interpolation=v2.InterpolationMode.BILINEAR)


def trivial_augment() -> Callable[[Tensor], Tensor]:
    return v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)


def tried_augmentation(build: Callable[[], Callable[[Tensor], Tensor]]) -> str | None:
    """What is wrong with a transform, by a grey picture; None where nothing is."""
    with host_generator():
        view = build()(torch.full((3, 8, 8), 128, dtype=torch.uint8))
    sound = isinstance(view, Tensor) and view.dtype == torch.uint8 and view.shape == (3, 8, 8)
    return None if sound else "it does not make a uint8 [3, 8, 8] of a uint8 [3, 8, 8]"


AUGMENTATIONS = Table(
    "dataset.augment_policy",
    rand_augment,
    {"rand_augment": rand_augment, "trivial_augment": trivial_augment},
    others=("none",),
    tried=tried_augmentation,
)


class Augmentation:
    """From a picture [3, H, W] to what the network sees of it, uint8 [3, size, size].

    `dataset.augment` names the kind:
    - random_resized_crop: a random crop, mirrored by chance. Validation: the crop in the middle.
    - pad_crop: the whole picture, resized to `size`, shifted by up to `margin` pixels and mirrored
      by chance (He et al. 2016, section 4.2). Validation: neither shifted nor mirrored. Beyond the
      edge the picture is black, or with `dataset.padding: reflect` its own reflection.
    - none: the whole picture, resized to `size`.

    In training, `dataset.augment_policy` and then `dataset.random_erasing` follow.

    `crops`: whether parts of pictures are cut out and resized. `random`: whether the uniform
    numbers matter.
    """

    def __init__(self, config: DatasetConfig, train: bool):
        augment = config.resolved_augment()
        self.size = config.image_size
        self.crops = augment == "random_resized_crop"
        self.random = train and augment != "none"
        self.margin = max(1, self.size // 8)  # pixels; 4 at a size of 32
        self.reflects = config.padding == "reflect"
        build = AUGMENTATIONS.get(config.augment_policy) if train else None
        self.policy = build and build()
        self.erasing = config.random_erasing if train else 0.0  # chance
        # what erasing covers with
        self.grey = torch.tensor(IMAGENET_MOMENTS["mean"]).mul(255).round().to(torch.uint8)

    def boxes(self, uniforms: Tensor, aspects: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes, float64 [n, 4], and which pictures are mirrored, bool [n].

        uniforms: float64 [n, UNIFORMS_PER_SAMPLE]. aspects, sides: as of `random_crops`. Boxes of
        pad_crop begin outside the picture where it is shifted: top and left lie between -margin and
        margin.
        """
        mirror = (uniforms[:, 22] < 0.5) & self.random
        if self.crops and self.random:
            return random_crops(uniforms, aspects, sides), mirror
        if self.crops:
            return centre_crops(aspects, sides), mirror
        starts = ((uniforms[:, :2] * (2 * self.margin + 1)).floor() - self.margin) * self.random
        return torch.cat([starts, torch.full_like(starts, self.size)], 1), mirror

    def __call__(self, images: Sequence[Tensor], uniforms: Tensor) -> list[Tensor]:
        """The pictures [3, H, W], of any sizes, augmented to [3, size, size]. uniforms: [n,
        UNIFORMS_PER_SAMPLE].
        """
        if not self.crops:
            images = [squared(image, self.size) for image in images]
        if images and (self.crops or self.random):
            sides = torch.tensor([image.shape[1:] for image in images], dtype=torch.float64)
            boxes, mirrors = self.boxes(uniforms, sides[:, 0] / sides[:, 1], sides)
            images = [
                self._cut(*each)
                for each in zip(images, boxes.int().tolist(), mirrors.tolist(), strict=True)
            ]
        if images and self.policy is not None:
            images = self._by_policy(images, uniforms[:, 23].tolist())
        if images and self.erasing:
            images = erase(torch.stack(list(images)), self.erasures(uniforms), self.grey).unbind()
        return list(images)

    def _by_policy(self, images: Sequence[Tensor], numbers: Sequence[float]) -> list[Tensor]:
        """The pictures after the policy. What it draws is a function of a picture's own uniform
        number.
        """
        changed = []
        with host_generator() as generator:
            for image, number in zip(images, numbers, strict=True):
                generator.manual_seed(as_seed(number))
                changed.append(self.policy(image))
        return changed

    def erasures(self, uniforms: Tensor) -> Tensor:
        """The boxes that are erased, float64 [n, 4]; their sides are 0 where nothing is.

        Zhong et al. 2020, "Random erasing data augmentation", algorithm 1, with timm's areas and
        ratios. Neither timm nor torchvision draws them for a whole batch by each picture's own
        numbers without waiting for the device.
        """
        square = torch.ones(len(uniforms), dtype=uniforms.dtype, device=uniforms.device)
        sides = torch.full((1, 2), self.size, dtype=uniforms.dtype, device=uniforms.device)
        boxes = random_crops(uniforms[:, 25:47], square, sides, areas=(0.02, 1 / 3), ratio=10 / 3)
        return boxes * (uniforms[:, 24:25] < self.erasing)

    def _cut(self, image: Tensor, box: Sequence[int], mirror: bool) -> Tensor:
        top, left, height, width = box
        if not self.crops:
            around = [self.margin] * 4
            image = (
                F.pad(image[None].float(), around, "reflect")[0].to(image)
                if self.reflects
                else F.pad(image, around)
            )
            top = top + self.margin
            left = left + self.margin
        image = image[:, top : top + height, left : left + width]
        image = resize(image, self.size, self.size) if self.crops else image
        return image.flip(-1) if mirror else image


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, height, width], bilinear with antialiasing."""
    # as decoders leave it, and the fast layout
    image = image[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(image, (height, width), mode="bilinear", antialias=True)[0]


def squared(image: Tensor, side: int) -> Tensor:
    """The whole picture, uint8 [3, H, W], as a square: resized where it is none of this side."""
    return image if image.shape[1:] == (side, side) else resize(image, side, side)


def erase(images: Tensor, boxes: Tensor, colour: Tensor) -> Tensor:
    """uint8 [batch, 3, H, W] with a colour, uint8 [3], in the boxes, float [batch, 4]."""
    boxes = boxes.float()
    within = []
    for axis, side in enumerate(images.shape[2:]):
        pixels = torch.arange(side, device=images.device)
        start = boxes[:, axis, None]
        within.append((pixels >= start) & (pixels < start + boxes[:, axis + 2, None]))
    rows, columns = within
    inside = (rows[:, :, None] & columns[:, None, :])[:, None]
    return torch.where(inside, colour.view(3, 1, 1), images)


def pad_crop(images: Tensor, boxes: Tensor, mirror: Tensor, reflects: bool = False) -> Tensor:
    """Shift and mirror each picture of a batch: uint8 [batch, 3, S, S] -> the same.

    One gather for the whole batch, so that the device is not waited for. boxes: float [batch, 4] of
    S x S whole pixels, which may begin outside the picture; mirror: bool [batch]. Beyond the edge
    the picture is black, or with `reflects` its own reflection without the edge pixels repeated.
    """
    side = images.shape[-1]
    pixels = torch.arange(side, device=images.device)
    rows = boxes[:, :1].long() + pixels
    columns = boxes[:, 1:2].long() + torch.where(mirror[:, None], pixels.flip(0), pixels)
    if reflects:
        last = side - 1
        rows = last - (last - rows.abs()).abs()
        columns = last - (last - columns.abs()).abs()
    else:  # all that lies beyond the edge is looked up in a black frame
        images = F.pad(images, [1, 1, 1, 1])
        rows = (rows + 1).clamp(0, side + 1)
        columns = (columns + 1).clamp(0, side + 1)
    places = rows[:, :, None] * images.shape[-1] + columns[:, None, :]
    places = places.flatten(1)[:, None].expand(-1, 3, -1)
    return images.flatten(2).gather(2, places).unflatten(2, (side, side))


def resize_weights(size: int, side: int, device: torch.device) -> Tensor:
    """The matrix that resizes one axis of pictures from `side` to `size` pixels: [size, side].

    Row i holds the weights of the pixels that make up pixel i of the result: bilinear with
    antialiasing, as in Pillow and torchvision, a triangle whose half width is max(1, side / size)
    pixels. Each row sums to 1. float32 on the CPU; float16 on a GPU, which holds every grey level
    exactly.
    """
    scale = torch.tensor(side / size, device=device)
    centres = (torch.arange(size, device=device) + 0.5) * scale
    pixels = torch.arange(side, device=device) + 0.5
    weights = 1 - (pixels - centres[:, None]).abs() / scale.clamp(min=1)
    weights = weights.clamp(min=0)
    weights = weights / weights.sum(1, keepdim=True)
    return weights.to(torch.float16 if device.type == "cuda" else torch.float32)


SHRUNK = 25 / 14  # short side of cached pictures / image_size: 400 px for 224


def cached_side(config: DatasetConfig) -> int:
    """Short side, in pixels, that no cached picture exceeds.

    Crops are cut out of pictures that keep their shape. A view of 224 px out of 400 px then differs
    from the streamed one by 0.4 grey levels on average, out of 320 px by 2.0, and out of 256 px by
    3.0 (125 pictures of ImageNet). Where nothing is cropped, pictures are cached as squares of
    `image_size`.
    """
    if config.resolved_augment() != "random_resized_crop":
        return config.image_size
    return config.cache_resolution or round(config.image_size * SHRUNK)


def shrink(image: Tensor, side: int) -> Tensor:
    """A picture, uint8 [3, H, W], whose shorter side is at most `side` pixels, in the same shape.
    None is enlarged.
    """
    height, width = image.shape[1:]
    scale = side / min(height, width)
    return image if scale >= 1 else resize(image, round(height * scale), round(width * scale))
