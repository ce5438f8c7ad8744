"""The pictures of a folder: which of its folders are classes, which files are pictures, and what is
skipped.
"""

from __future__ import annotations

import os
import stat
from collections import Counter, deque
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

MAX_FILE_BYTES = (
    2**30
)  # of a picture: a larger file is called unreadable, before it fills the memory

HIDDEN = "hidden folders"
REPEATED = "folders reached twice"
SPECIAL = "FIFOs, sockets and devices"
OUTSIDE = "pictures outside class folders"
OTHER = "files of other types"


class FolderScan(NamedTuple):
    """What `scan_folder` has found."""

    pictures: dict[str, list[Path]]  # by class, both sorted; a class may have none
    skipped: Counter[str]  # how many of each kind


def scan_folder(folder: str) -> FolderScan:
    """The pictures of a folder in torchvision's ImageFolder layout, <folder>/<class>/.../<picture>.

    Classes, pictures and their order are those of ImageFolder: each folder in `folder` is a class,
    and each file below it whose name ends as one of IMG_EXTENSIONS is a picture of it. Other than
    there
    - folders whose names start with a dot are ignored, at every depth;
    - only regular files are pictures, and links to them. So are broken links, for reading to name
      them;
    - a folder is read once, however many links lead to it. Its own place goes before a link to it;
      a link to `folder`, or to one that holds it, is never followed.

    Raises OSError where `folder` or one below it cannot be read.
    """
    pictures: dict[str, list[Path]] = {}
    skipped: Counter[str] = Counter()
    root = Path(os.path.realpath(folder))
    reached = {_identity(str(each)) for each in (root, *root.parents)}
    waiting = deque([("", folder)])  # (class, folder to be read)
    links: deque[tuple[str, str]] = deque()  # likewise; followed when no folder waits
    while waiting or links:
        name, place = (waiting or links).popleft()
        if place != folder:
            if (identity := _identity(place)) in reached:
                skipped[REPEATED] += 1
                continue
            reached.add(identity)
            pictures.setdefault(name, [])
        for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
            kind = _kind(entry)
            if kind == "folder":
                (links if entry.is_symlink() else waiting).append((name or entry.name, entry.path))
            elif kind == "picture" and name:
                pictures[name].append(Path(entry.path))
            else:
                skipped[OUTSIDE if kind == "picture" else kind] += 1
    for paths in pictures.values():
        paths.sort(key=lambda path: os.path.split(path))
    return FolderScan(dict(sorted(pictures.items())), skipped)


def _identity(path: str) -> tuple[int, int]:
    facts = os.stat(path)
    return facts.st_dev, facts.st_ino


def _kind(entry: os.DirEntry) -> str:
    """folder, picture or the reason to skip it."""
    link = entry.is_symlink()
    if os.path.isdir(entry.path) if link else entry.is_dir():
        return HIDDEN if entry.name.startswith(".") else "folder"
    if not has_file_allowed_extension(entry.name, IMG_EXTENSIONS):
        return OTHER
    sound = (
        os.path.isfile(entry.path) or not os.path.exists(entry.path) if link else entry.is_file()
    )
    return "picture" if sound else SPECIAL


def read_picture(path: Path) -> bytes:
    """The bytes of a file.

    Raises OSError where it cannot be read, and ValueError where it has more than MAX_FILE_BYTES or
    is no regular file: opening a FIFO would wait for somebody to write to it.
    """
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError("not a regular file")
    if facts.st_size > MAX_FILE_BYTES:
        raise ValueError(
            f"not a readable image ({facts.st_size:,} bytes; a picture may have {MAX_FILE_BYTES:,})"
        )
    return path.read_bytes()
