"""Small pictures side by side in one file, for a report that shows what a run has done with its
data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lab.base.errors import one_line
from lab.base.files import replace_file
from lab.data.datasets import ImageDataset

SHOWN = 24  # pictures on a sheet of a run
SIDE = 80  # pixels of a tile
COLUMNS = 8
LINE = 12  # pixels of a line of a caption
LINES = 2  # of a caption, at most
CAPTION = "#767e87"  # to be read on white and on a dark page


def own_picture(dataset: ImageDataset, index: int) -> Tensor | None:
    """A sample's picture, uint8 [3, H, W]; None where it cannot be read, and no other one in its
    place.
    """
    sample = dataset.load(index)
    return None if sample.unreadable else sample.image


def contact_sheet(path: Path, samples: Sequence[tuple[Tensor | None, str]]) -> None:
    """Write pictures with their captions as one PNG, eight in a row, whole or not at all.

    samples: (uint8 [3, H, W] of any size, caption of up to two lines); None stands for a picture
    that is gone, and gets a grey tile. Each picture is shrunk or enlarged to fit, and keeps its
    shape. Raises OSError naming the file.
    """
    rows = max(1, -(-len(samples) // COLUMNS))
    tall = SIDE + LINES * LINE + 4
    sheet = Image.new("RGBA", (COLUMNS * (SIDE + 4), rows * tall))  # transparent
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(LINE - 2)
    for number, (picture, caption) in enumerate(samples):
        left = number % COLUMNS * (SIDE + 4) + 2
        top = number // COLUMNS * tall + 2
        if picture is None:
            draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), "lightgrey")
        else:
            tile = thumbnail(picture)
            sheet.paste(tile, (left + (SIDE - tile.width) // 2, top + (SIDE - tile.height) // 2))
        for line, text in enumerate(caption.split("\n")[:LINES]):
            place = (left, top + SIDE + line * LINE)
            draw.text(place, _fitting(one_line(text, 80), font), CAPTION, font)
    replace_file(path, lambda part: sheet.save(part, "PNG"))


def thumbnail(picture: Tensor) -> Image.Image:
    """A picture, uint8 [3, H, W], as an image whose longer side is SIDE pixels."""
    height, width = picture.shape[1:]
    scale = SIDE / max(height, width)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    if scale >= 1:  # of few pixels: each stays to be seen
        small = F.interpolate(picture[None], size, mode="nearest-exact")
    else:
        small = F.interpolate(picture[None], size, mode="bilinear", antialias=True)
    return Image.fromarray(small[0].permute(1, 2, 0).contiguous().numpy())


def _fitting(text: str, font: ImageFont.ImageFont) -> str:
    """So much of `text` as is no wider than a tile."""
    if font.getlength(text) <= SIDE:
        return text
    while text and font.getlength(text + "…") > SIDE:
        text = text[:-1]
    return text + "…"
