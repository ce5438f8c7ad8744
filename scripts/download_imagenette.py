"""Download Imagenette (10 ImageNet classes, 9,469 + 3,925 images) in ImageFolder layout.

    python scripts/download_imagenette.py
    python scripts/download_imagenette.py --size 320px --dest data

Leaves <dest>/imagenette2-160/{train,val}/<class>/*.JPEG (imagenette2-320, imagenette2 for the other
sizes), the archive's checksum verified; does nothing where that folder is there already.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torchvision

from lab.base.errors import RequestError
from lab.base.launch import forget_launch
from lab.base.streams import print_progress
from lab.study.cli import command_parser, run_cli


def download(size: str, dest: Path) -> Path:
    """Fetch, verify and unpack beside `dest`, then move into place whole: the folder.

    Raises RequestError where `dest` cannot be written, the archive cannot be fetched or its
    checksum is wrong.
    """
    folder = dest / ("imagenette2" if size == "full" else f"imagenette2-{size.removesuffix('px')}")
    if folder.is_dir():
        print_progress(f"{folder}: already there")
        return folder
    try:
        dest.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=dest, prefix=".imagenette-") as scratch:
            torchvision.datasets.Imagenette(scratch, split="train", size=size, download=True)
            os.replace(Path(scratch) / folder.name, folder)
    except (
        OSError,
        RuntimeError,
    ) as error:  # URLError is an OSError; a wrong checksum a RuntimeError
        raise RequestError(
            f"Imagenette {size}: {error}; check the network and {dest}, then try again"
        ) from None
    print_progress(f"{folder}: ready")
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--size",
        choices=("160px", "320px", "full"),
        default="160px",
        help="shorter side of the images",
    )
    parser.add_argument(
        "--dest", type=Path, default=Path("data"), metavar="DIR", help="default: data"
    )
    args = parser.parse_args(argv)
    forget_launch()
    download(args.size, args.dest)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
