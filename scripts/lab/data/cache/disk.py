"""`dataset.cache: disk`: the pictures of a data set decoded once and kept in one file, for this run
and later ones.

A cache is a folder:
    pixels       the pictures one after the other: raw, uint8 [H, W, 3] each, or JPEG
                 bytes. Squares are [3, side, side]
    index.npz    a row for each picture, see `Index`
    header.json  what it is of, and the checksum of the index: written last, so that a folder
                 without it is unfinished
    lock         held by the process that builds it
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from lab.base.console import print_rank0, progress_bar
from lab.base.errors import RequestError, one_line
from lab.base.files import locked_in_turn, replace_file, replace_text, require_folder, sync_folder
from lab.config.sections import DatasetConfig
from lab.data.datasets import ImageDataset, ReadErrors
from lab.data.images import cached_side, decode_image, encode_jpeg, shrink, squared
from lab.data.loading import as_is
from lab.machine.workers import WorkerLoader, ending_workers

VERSION = 2  # of the format: another one makes other caches, and leaves those there are alone
SAVED_SECONDS = 20.0  # of building that are lost at most where it is interrupted
PROBED = 32  # pictures by which the size of a cache is estimated
# pictures whose checksums are compared when a cache is opened; `--prepare-only` compares all
CHECKED = 64


class Index(NamedTuple):
    """What is known of the pictures of a cache: a row for each, in the order of the data set."""

    lengths: np.ndarray  # int64 [n], bytes
    sizes: np.ndarray  # int32 [n, 2], height and width
    originals: np.ndarray  # int32 [n, 2], those before it was shrunk
    labels: np.ndarray  # int64 [n], without noise
    checksums: np.ndarray  # uint32 [n], CRC-32 of its bytes
    shown: np.ndarray  # int64 [n], the samples that they are of: stand-ins are of others

    @classmethod
    def join(cls, parts: Sequence[Index]) -> Index:
        return cls(*(np.concatenate(columns) for columns in zip(cls.empty(), *parts, strict=True)))

    @classmethod
    def empty(cls) -> Index:
        pairs = np.zeros((0, 2), dtype=np.int32)
        numbers = np.zeros(0, dtype=np.int64)
        return cls(numbers, pairs, pairs, numbers, np.zeros(0, dtype=np.uint32), numbers)


class Recipe(NamedTuple):
    """How pictures are kept: squares of `side` pixels, or in their own shape, the shorter side at
    most `side`.
    """

    side: int
    square: bool
    jpeg: bool = False

    @classmethod
    def of(cls, config: DatasetConfig) -> Recipe:
        square = config.resolved_augment() != "random_resized_crop"
        jpeg = config.cache == "disk" and config.cache_format == "jpeg"
        return cls(cached_side(config), square, jpeg)

    def encode(self, image: Tensor) -> tuple[np.ndarray, tuple[int, int]]:
        """(the bytes of a picture, uint8 [bytes]; its height and width) of uint8 [3, H, W]."""
        if self.square:
            image = squared(image, self.side)
            return image.contiguous().view(-1).numpy(), (self.side, self.side)
        pixels = shrink(image, self.side).permute(1, 2, 0).contiguous().numpy()
        data = np.frombuffer(encode_jpeg(pixels), np.uint8) if self.jpeg else pixels.reshape(-1)
        return data, pixels.shape[:2]

    def __str__(self) -> str:
        return f"{'squares' if self.square else 'pictures'} of {self.side} px"


class Chunk(NamedTuple):
    """Some pictures on their way into a cache."""

    data: Tensor  # uint8 [bytes], one after the other
    index: Index
    unreadable: list[str]


class Encoder(Dataset):
    """The pictures of an ImageDataset decoded and made ready for a cache. The items of several
    indices are one Chunk. One that has no picture, and nothing that stands in for it, is black and
    has the label -1.
    """

    def __init__(self, dataset: ImageDataset, recipe: Recipe):
        self.dataset = dataset
        self.recipe = recipe

    def __getitems__(self, indices: Sequence[int]) -> Chunk:
        unreadable = []
        data = []
        rows = []
        for index in indices:
            sample = self.dataset.load(index)
            unreadable += sample.unreadable
            image = (
                torch.zeros(3, 1, 1, dtype=torch.uint8) if sample.image is None else sample.image
            )
            encoded, size = self.recipe.encode(image)
            data.append(encoded)
            rows.append((size, image.shape[1:], sample.label, zlib.crc32(encoded), sample.index))
        sizes, originals, labels, checksums, shown = zip(*rows, strict=True)
        pairs = (np.array(each, dtype=np.int32) for each in (sizes, originals))
        lengths = np.array([len(each) for each in data])
        numbers = (np.array(labels), np.array(checksums, dtype=np.uint32), np.array(shown))
        index = Index(lengths, *pairs, *numbers)
        return Chunk(torch.from_numpy(np.concatenate(data)), index, unreadable)


def chunks(
    dataset: ImageDataset, indices: np.ndarray, recipe: Recipe, mean: float, options: dict[str, Any]
) -> WorkerLoader:
    """A loader of Chunks of about 8 MB; a worker has two of them in shared memory. mean: bytes a
    picture.
    """
    pictures = int(min(512, max(8, 2**23 // max(1, mean))))
    options = {**options, "collate_fn": as_is}
    return WorkerLoader(Encoder(dataset, recipe), pictures, sampler=indices.tolist(), **options)


def mean_bytes(dataset: ImageDataset, indices: np.ndarray, recipe: Recipe) -> float:
    """About how many bytes a picture needs: those of PROBED pictures, spread evenly. Exact for
    squares.
    """
    if recipe.square:
        return 3 * recipe.side**2
    some = indices[np.linspace(0, len(indices) - 1, min(PROBED, len(indices))).astype(int)]
    lengths = Encoder(dataset, recipe).__getitems__(some.tolist()).index.lengths
    return float(lengths.mean()) if len(lengths) else 0.0


class CacheFile:
    """A finished cache, open for reading. Reads leave no trace in this process's memory, as a
    memory map would.
    """

    def __init__(self, folder: Path, fingerprint: str):
        """Raises RequestError naming the file where it is damaged, or not what `fingerprint` stands
        for.
        """
        self.path = folder / "pixels"
        self.folder = folder
        try:
            header = json.loads((folder / "header.json").read_text(encoding="utf-8"))
            if header["fingerprint"] != fingerprint or header["version"] != VERSION:
                raise self.damaged(folder / "header.json", "it is of other data")
            index = (folder / "index.npz").read_bytes()
            if hashlib.sha256(index).hexdigest() != header["index_sha256"]:
                raise self.damaged(folder / "index.npz", "its checksum differs")
            with np.load(folder / "index.npz") as arrays:
                self.index = Index(*(arrays[name] for name in Index._fields))
            self.unreadable: list[str] = list(header["unreadable"])
            self.recipe = Recipe(*header["recipe"])
            self.file = self.path.open("rb")
        except OSError as error:
            raise self.damaged(
                Path(error.filename or folder), error.strerror or one_line(error)
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise self.damaged(folder / "header.json", one_line(error)) from None
        self.offsets = np.concatenate([[0], np.cumsum(self.index.lengths)])
        if self.file.seek(0, os.SEEK_END) != self.offsets[-1]:
            raise self.damaged(self.path, f"it should have {self.offsets[-1]:,} bytes")
        self.verify(np.linspace(0, len(self) - 1, min(CHECKED, len(self))).astype(int))

    def __len__(self) -> int:
        return len(self.index.lengths)

    def damaged(self, path: Path, why: str) -> RequestError:
        todo = f"delete {self.folder} to have it built again"
        return RequestError(f"dataset.cache: {path} is damaged ({one_line(why)}); {todo}")

    def verify(self, pictures: np.ndarray, threads: int = 1, **bar: Any) -> None:
        """Compare the checksums of pictures, int64 [n]. Raises RequestError naming the file where
        one differs.
        """

        def differs(picture: int) -> bool:
            return zlib.crc32(self.encoded(picture)) != self.index.checksums[picture]

        with ThreadPoolExecutor(threads) as pool:
            found = progress_bar(
                pool.map(differs, pictures.tolist()),
                total=len(pictures),
                **{"disable": True, **bar},
            )
            for picture, wrong in zip(pictures, found, strict=True):
                if wrong:
                    raise self.damaged(self.path, f"the checksum of picture {picture} differs")

    def encoded(self, picture: int) -> np.ndarray:
        """The bytes of a picture as they are kept, uint8 [bytes]."""
        data = np.empty(self.index.lengths[picture], dtype=np.uint8)
        self._read(int(self.offsets[picture]), memoryview(data))
        return data

    def read(
        self, pictures: np.ndarray, first: np.ndarray, spans: np.ndarray, out: np.ndarray
    ) -> None:
        """Fill spans of `out`, uint8 [bytes], with the pixels of pictures.

        pictures: int64 [n]. first: int64 [n], the row of each that is read first; 0 for squares.
        spans: int64 [n, 2], where in `out` the pixels of each begin and end.
        """
        starts = first * 3 * self.index.sizes[pictures, 1]
        if self.recipe.jpeg:
            self._read_jpegs(pictures.tolist(), starts.tolist(), spans.tolist(), out)
            return
        # little Python for each picture: the thread that trains needs the interpreter too
        view = memoryview(out)
        positions = (self.offsets[pictures] + starts).tolist()
        for position, (low, high) in zip(positions, spans.tolist(), strict=True):
            self._read(position, view[low:high])

    def _read_jpegs(
        self,
        pictures: Sequence[int],
        starts: Sequence[int],
        spans: Sequence[Sequence[int]],
        out: np.ndarray,
    ) -> None:
        """`read` of decoded pixels. starts: where in those of each picture its part begins."""
        for picture, start, (low, high) in zip(pictures, starts, spans, strict=True):
            try:
                decoded = decode_image(self.encoded(picture).tobytes())
            except ValueError as error:
                raise self.damaged(self.path, f"picture {picture}: {one_line(error)}") from None
            pixels = decoded.permute(1, 2, 0).contiguous().view(-1).numpy()
            out[low:high] = pixels[start : start + high - low]

    def _read(self, position: int, out: memoryview) -> None:
        """Other threads may read at the same time. Raises RequestError naming the file where it
        ends too early.
        """
        done = 0
        while done < len(out):
            try:
                got = os.preadv(self.file.fileno(), [out[done:]], position + done)
            except OSError as error:
                raise self.damaged(self.path, error.strerror or one_line(error)) from None
            if not got:
                raise self.damaged(self.path, "it has become shorter")
            done += got


def place(
    dataset: ImageDataset, indices: np.ndarray, config: DatasetConfig, split: str
) -> tuple[Path, str]:
    """(the folder of a cache, its fingerprint).

    The fingerprint is a hash of the data (`ImageDataset.content`), of which samples are kept, how,
    and what stands in for unreadable ones. split: train or val, for the name.
    """
    recipe = Recipe.of(config)
    facts = [
        VERSION,
        dataset.content(),
        len(dataset),
        dataset.classes,
        *recipe,
        dataset.max_bad_images,
    ]
    facts.append(hashlib.sha256(indices.astype(np.int64).tobytes()).hexdigest())
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    encoding = "jpeg" if recipe.jpeg else "raw"
    name = f"{split}-{recipe.side}px-{encoding}-{fingerprint[:16]}"
    return Path(config.cache_folder) / name, fingerprint


def find_cache(
    dataset: ImageDataset, indices: np.ndarray, config: DatasetConfig, split: str
) -> CacheFile | None:
    """The cache of the samples at `indices` (int64, ascending, each once), if there is one."""
    if not Path(config.cache_folder).is_dir():  # nothing to look at each picture for
        return None
    folder, fingerprint = place(dataset, indices, config, split)
    return CacheFile(folder, fingerprint) if (folder / "header.json").exists() else None


def find_or_build_cache(
    dataset: ImageDataset,
    indices: np.ndarray,
    config: DatasetConfig,
    split: str,
    options: dict[str, Any],
) -> CacheFile:
    """The cache of the samples at `indices`; built if there is none, while other processes that
    want it wait.

    options: of the DataLoader that decodes. Raises RequestError where the disk is too small, where
    a cache is damaged, and naming the first unreadable picture beyond `dataset.max_bad_images`.
    """
    folder, fingerprint = place(dataset, indices, config, split)
    header = folder / "header.json"
    if not header.exists():
        require_folder(folder, "dataset.cache_folder", folder)
        waits = partial(
            print_rank0, f"dataset.cache: waiting for another process to build {folder}"
        )
        with locked_in_turn(folder / "lock", waits):
            if not header.exists():
                _build(dataset, indices, config, folder, fingerprint, options)
    cache = CacheFile(folder, fingerprint)
    size = cache.offsets[-1] / 2**30
    print_rank0(f"dataset.cache: {len(cache):,} {cache.recipe}, {size:,.2f} GiB, in {folder}")
    return cache


def _build(
    dataset: ImageDataset,
    indices: np.ndarray,
    config: DatasetConfig,
    folder: Path,
    fingerprint: str,
    options: dict[str, Any],
) -> None:
    recipe = Recipe.of(config)
    errors = ReadErrors(config.max_bad_images)
    index = _resumed(folder, errors)
    mean = mean_bytes(dataset, indices, recipe)
    left = indices[len(index.lengths) :]
    _require_space(folder, mean * len(left), f"{len(left):,} {recipe}")
    _name_others(folder)
    bar = progress_bar(
        desc="decoding",
        unit=" pictures",
        total=len(indices),
        initial=len(index.labels),
        disable=None,
    )
    try:
        with (folder / "pixels").open("ab") as file, ending_workers(), bar:
            file.truncate(int(index.lengths.sum()))
            _write(folder, file, chunks(dataset, left, recipe, mean, options), index, errors, bar)
    except OSError as error:
        raise RequestError(
            f"dataset.cache_folder: cannot write to {folder}: {error.strerror or error}"
        ) from None
    digest = hashlib.sha256((folder / "index.npz").read_bytes()).hexdigest()
    header = {
        "version": VERSION,
        "fingerprint": fingerprint,
        "recipe": list(recipe),
        "index_sha256": digest,
    }
    replace_text(
        folder / "header.json", json.dumps({**header, "unreadable": errors.found}, indent=1) + "\n"
    )


def _write(
    folder: Path, file: BinaryIO, made: Iterable[Chunk], index: Index, errors: ReadErrors, bar: tqdm
) -> None:
    """Append chunks to the pixels, and to the `index` of those that are there."""
    parts = [index]
    saved_at = time.monotonic()
    for chunk in made:
        errors.add(chunk.unreadable)
        file.write(memoryview(chunk.data.numpy()))
        parts.append(chunk.index)
        bar.set_postfix_str(f"{file.tell() / 2**30:,.2f} GiB", refresh=False)
        bar.update(len(chunk.index.labels))
        if time.monotonic() - saved_at > SAVED_SECONDS:
            parts = [_save(folder, file, parts, errors)]
            saved_at = time.monotonic()
    _save(folder, file, parts, errors)


def _save(folder: Path, file: BinaryIO, parts: Sequence[Index], errors: ReadErrors) -> Index:
    """Have the pixels so far on the disk, and then the index of them: a build goes on from
    there.
    """
    index = Index.join(parts)
    file.flush()
    os.fsync(file.fileno())
    unreadable = np.frombuffer(json.dumps(errors.found).encode(), np.uint8)

    def write(path: Path) -> None:
        with path.open("wb") as part:
            np.savez(part, **index._asdict(), unreadable=unreadable)

    replace_file(folder / "index.npz", write)
    sync_folder(folder)
    return index


def _resumed(folder: Path, errors: ReadErrors) -> Index:
    """What an interrupted build has left: empty where that is nothing, or nothing whole."""
    index = Index.empty()
    with contextlib.suppress(
        OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile
    ):
        with np.load(folder / "index.npz") as arrays:
            found = Index(*(arrays[name] for name in Index._fields))
            unreadable = arrays["unreadable"]
        if (folder / "pixels").stat().st_size >= found.lengths.sum():
            errors.add(json.loads(unreadable.tobytes()))
            index = found
    return index


def _require_space(folder: Path, needed: float, what: str) -> None:
    """Say how much a cache takes. Raises RequestError where the disk has less."""
    free = shutil.disk_usage(folder).free
    size = f"{what} need about {needed / 2**30:,.2f} GiB"
    if needed > 0.98 * free:
        hint = (
            "set a smaller dataset.cache_resolution, dataset.cache_format=jpeg or another "
            "dataset.cache_folder"
        )
        raise RequestError(
            f"dataset.cache: {size}, and {folder} has {free / 2**30:,.2f} GiB free; {hint}"
        )
    print_rank0(f"dataset.cache: {size}; {folder} has {free / 2**30:,.2f} GiB free")


def _name_others(folder: Path) -> None:
    """Say how much other caches beside a new one take: of data that has changed, say."""
    others = [path for path in folder.parent.glob("*/pixels") if path.parent != folder]
    if others:
        size = sum(path.stat().st_size for path in others) / 2**30
        names = ", ".join(path.parent.name for path in sorted(others)[:3])
        more = ", ..." if len(others) > 3 else ""
        print_rank0(
            f"dataset.cache: {len(others):,} others in {folder.parent} take {size:,.2f} GiB: "
            f"{names}{more}"
        )
