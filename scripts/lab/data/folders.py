"""The pictures of a folder: which of its folders are classes, which files are pictures, and what is
skipped.
"""

from __future__ import annotations

import os
import stat
import unicodedata
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from lab.base.errors import one_line

MAX_FILE_BYTES = (
    2**30
)  # of a picture: a larger file is called unreadable, before it fills the memory

HIDDEN = "hidden folders"
SYSTEM = "folders of an operating system"
FORKS = "resource forks of a Mac (._*)"
REPEATED = "folders reached twice"
SPECIAL = "FIFOs, sockets and devices"
OUTSIDE = "pictures outside class folders"
OTHER = "files of other types"
# what a Mac, a Synology, a Linux and a Windows disk leave in folders
SYSTEM_FOLDERS = (
    *("__MACOSX", "@eaDir", "lost+found"),
    *("$RECYCLE.BIN", "System Volume Information"),
)
# of pictures that are not read
UNREAD = set(".heic .heif .avif .jxl .jp2 .gif .dng .cr2 .cr3 .nef .arw .raw .psd .svg".split())
SHOWN = 5  # endings that are named


class Skipped(Counter):
    """How many files and folders are no part of the pictures, by the reason why."""

    def __init__(self) -> None:
        super().__init__()
        self.endings: Counter[str] = Counter()  # of those of other types

    def add(self, kind: str, name: str) -> None:
        self[kind] += 1
        if kind == OTHER:
            self.endings[os.path.splitext(name)[1].lower() or "no ending"] += 1

    def __str__(self) -> str:
        """Every reason with its count; of files of other types the most frequent endings."""
        texts = [f"{kind} {count:,}" for kind, count in sorted(self.items())]
        endings = [f"{one_line(end, 12)} {n:,}" for end, n in self.endings.most_common(SHOWN)]
        endings += ["..."] if len(self.endings) > SHOWN else []
        names = f" ({', '.join(endings)})" if endings else ""
        unread = sorted(UNREAD & self.endings.keys())
        hint = f"; {', '.join(unread)}: pictures that are not read; convert them to JPEG"
        text = ", ".join(text + names * text.startswith(OTHER) for text in texts)
        return text + hint * bool(unread)


class FolderScan(NamedTuple):
    """What `scan_folder` has found."""

    pictures: dict[str, list[Path]]  # by class, both sorted; a class may have none
    skipped: Skipped
    joined: list[str]  # classes of several folders, whose names look alike


def composed(name: str) -> str:
    """A name in Unicode's composed form: a Mac writes the letter and its accent apart, and the
    name looks the same.
    """
    return unicodedata.normalize("NFC", name)


def scan_folder(folder: str) -> FolderScan:
    """The pictures of a folder in torchvision's ImageFolder layout, <folder>/<class>/.../<picture>.

    Classes, pictures and their order are those of ImageFolder: each folder in `folder` is a class,
    and each file below it whose name ends as one of IMG_EXTENSIONS is a picture of it. Other than
    there
    - folders whose names start with a dot are ignored, at every depth, and so is what an operating
      system leaves (SYSTEM_FOLDERS, ._name.jpg);
    - folders whose names differ in their Unicode form alone are one class, named in the composed
      one;
    - only regular files are pictures, and links to them. So are broken links, for reading to name
      them;
    - a folder is read once, however many links lead to it. Its own place goes before a link to it;
      a link to `folder`, or to one that holds it, is never followed.

    Raises OSError where `folder` or one below it cannot be read.
    """
    pictures: dict[str, list[Path]] = {}
    folders: dict[str, set[str]] = {}  # by class, its names
    skipped = Skipped()
    for top, entry, kind in _walk(folder):
        name = composed(top)
        if kind == "entered":
            pictures.setdefault(name, [])
            folders.setdefault(name, set()).add(top)
        elif kind == "picture" and name:
            pictures[name].append(Path(entry))
        else:
            skipped.add(OUTSIDE if kind == "picture" else kind, entry)
    for paths in pictures.values():
        paths.sort(key=lambda path: os.path.split(path))
    joined = [name for name, names in folders.items() if len(names) > 1]
    return FolderScan(dict(sorted(pictures.items())), skipped, joined)


def pictures_below(folder: str | Path) -> tuple[list[Path], Skipped]:
    """The pictures in a folder and below it, sorted, by the rules of `scan_folder`. Raises OSError
    likewise.
    """
    found = []
    skipped = Skipped()
    for _, entry, kind in _walk(str(folder)):
        if kind == "picture":
            found.append(Path(entry))
        elif kind != "entered":
            skipped.add(kind, entry)
    return sorted(found), skipped


def _walk(folder: str) -> Iterator[tuple[str, str, str]]:
    """(the folder in `folder` that it lies in, "" for none; its path; its kind) of each file below
    a folder and of what is skipped. A folder that is read comes with the kind "entered".
    """
    root = Path(os.path.realpath(folder))
    reached = {_identity(str(each)) for each in (root, *root.parents)}
    waiting = deque([("", folder)])  # (folder in `folder`, folder to be read)
    links: deque[tuple[str, str]] = deque()  # likewise; followed when no folder waits
    while waiting or links:
        name, place = (waiting or links).popleft()
        if place != folder:
            if (identity := _identity(place)) in reached:
                yield name, place, REPEATED
                continue
            reached.add(identity)
            yield name, place, "entered"
        for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
            kind = _kind(entry)
            if kind == "folder":
                (links if entry.is_symlink() else waiting).append((name or entry.name, entry.path))
            else:
                yield name, entry.path, kind


def _identity(path: str) -> tuple[int, int]:
    facts = os.stat(path)
    return facts.st_dev, facts.st_ino


def _kind(entry: os.DirEntry) -> str:
    """folder, picture or the reason to skip it."""
    link = entry.is_symlink()
    if os.path.isdir(entry.path) if link else entry.is_dir():
        if entry.name in SYSTEM_FOLDERS:
            return SYSTEM
        return HIDDEN if entry.name.startswith(".") else "folder"
    if entry.name.startswith("._"):
        return FORKS
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
