"""Download Imagenette (10 ImageNet classes, 9,469 + 3,925 images) in ImageFolder
layout.

    python scripts/download_imagenette.py
    python scripts/download_imagenette.py --size 320px --dest data

Checks the archive and writes <dest>/imagenette2-160/{train,val}/<class>/*.JPEG;
the other sizes are imagenette2-320 and imagenette2. Does nothing where that
folder is there.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from lab.base.errors import RequestError, one_line
from lab.base.files import locked, user_path
from lab.base.hub import no_endless_wait
from lab.base.launch import forget_launch
from lab.base.streams import print_progress
from lab.study.cli import command_parser, run_cli


def download(size: str, dest: Path) -> Path:
    """Fetch, verify and unpack beside `dest`, then move into place whole: the folder.

    Raises RequestError where `dest` cannot be written, where another process downloads the same,
    where the archive cannot be fetched or its checksum is wrong.
    """
    folder = dest / ("imagenette2" if size == "full" else f"imagenette2-{size.removesuffix('px')}")
    if folder.is_dir():
        print_progress(f"{folder}: already there")
        return folder
    import torchvision  # here, because it takes seconds

    try:
        with scratch_folder(dest / f".{folder.name}.part") as scratch, no_endless_wait():
            torchvision.datasets.Imagenette(scratch, split="train", size=size, download=True)
            os.replace(scratch / folder.name, folder)
    except (
        OSError,
        RuntimeError,
        http.client.HTTPException,
        tarfile.TarError,
        EOFError,
    ) as error:  # URLError is an OSError; a wrong checksum a RuntimeError
        raise RequestError(
            f"Imagenette {size}: {one_line(error)}; check the network and {dest}, then try again"
        ) from None
    print_progress(f"{folder}: ready")
    return folder


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """An empty folder that goes at the end, whatever ends the process but a kill. What a killed one
    has left goes at the beginning.

    Raises RequestError where another process has it.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    path.mkdir(parents=True, exist_ok=True)
    lock = path / "lock"
    with locked(lock, f"{path}: another process is downloading it"):
        for left in path.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
            elif left != lock:
                left.unlink()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def _leave(number: int, _: object) -> None:
    sys.exit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--size",
        choices=("160px", "320px", "full"),
        default="160px",
        help="shorter side of the images",
    )
    parser.add_argument(
        "--dest", type=user_path, default=Path("data"), metavar="DIR", help="default: data"
    )
    args = parser.parse_args(argv)
    forget_launch()
    download(args.size, args.dest)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
