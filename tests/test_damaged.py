"""Damaged data: folders of pictures and parquet files, spoiled in many ways, read by the loaders
and by whole runs.

What is refused is refused in one line, what is accepted is read right, nothing hangs and no file is
lost. The long form, `python -m pytest -n 0 -m long -s tests/test_damaged.py`, has 1,000 cases.
"""

import contextlib
import ctypes
import io
import json
import os
import random
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from conftest import COLOURS, REPO, make_config
from damage import mutated
from helpers import folder_config
from lab.base.errors import RequestError
from lab.data.datasets import ImageDataset, ReadErrors
from lab.data.loading import device_batches
from runs import SOON, cases, forked_run, real_run, span
from train_ast import build_dataloaders, build_datasets, train

CPU = torch.device("cpu")
SIDE = 32  # pixels, as the loaders are asked for, so that nothing is resized
SECONDS = 60  # for a case, on a busy machine
EARLIER = '{"status": "completed"}'  # a results file that is there before
ENDINGS = ("jpg", "png", "webp", "bmp", "tif", "ppm")
KEYS = [
    "model.name=test_resnet",
    f"dataset.image_size={SIDE}",
    "training.batch_size=8",
    "training.epochs=1",
]
KEYS += [
    "ast.mode=dense",
    "dataset.augment=none",
    "metrics.base_flop_per_sample=1e6",
    "training.device=cpu",
]


class Known(NamedTuple):
    """What the bytes of a picture file show."""

    pixels: np.ndarray  # uint8 [SIDE, SIDE, 3]
    kind: str  # its class
    off: float  # the mean difference, in grey levels, that its format may make


class Originals(NamedTuple):
    folder: Path  # images/{train,val}/<class>/<n>.<ending> and parquet/{train,test}.parquet
    known: dict[bytes, Known]


def encoded(pixels: np.ndarray, ending: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels)
    names = {"jpg": "JPEG", "tif": "TIFF"}
    lossless = (
        {"lossless": True} if ending == "webp" else {"quality": 95} if ending == "jpg" else {}
    )
    picture.save(buffer, names.get(ending, ending.upper()), **lossless, **options)
    return buffer.getvalue()


def some_pixels(kind: str, seed: int) -> np.ndarray:
    """Smooth, in the colour of its class, unlike any other; not square symmetric, so that a turned
    one shows.
    """
    noise = np.random.default_rng(seed).uniform(-60, 60, (4, 4, 3))
    smooth = np.asarray(
        Image.fromarray(np.uint8(np.clip(np.array(COLOURS[kind]) + noise, 0, 255))).resize(
            (SIDE, SIDE)
        )
    )
    return smooth.copy()


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Originals:
    """18 + 9 pictures of three classes, as folders and as parquet files."""
    import datasets

    folder = tmp_path_factory.mktemp("originals")
    known = {}
    (folder / "parquet").mkdir()
    features = datasets.Features(
        {"img": datasets.Image(), "kind": datasets.ClassLabel(names=list(COLOURS))}
    )
    for part, count in (("train", 6), ("val", 3)):
        rows: dict[str, list] = {"img": [], "kind": []}
        for label, kind in enumerate(COLOURS):
            (folder / "images" / part / kind).mkdir(parents=True)
            for n in range(count):
                pixels = some_pixels(kind, 1000 * label + n + 100 * (part == "val"))
                ending = ENDINGS[n % 6]
                data = encoded(pixels, ending)
                (folder / "images" / part / kind / f"{n}.{ending}").write_bytes(data)
                known[data] = Known(pixels, kind, 4 if ending == "jpg" else 0)
                data = encoded(pixels, "png")
                known[data] = Known(pixels, kind, 0)
                rows["img"].append({"bytes": data, "path": f"{kind}{n}.png"})
                rows["kind"].append(label)
        order = np.random.default_rng(0).permutation(len(rows["kind"]))
        rows = {key: [values[i] for i in order] for key, values in rows.items()}
        name = {"train": "train", "val": "test"}[part]
        datasets.Dataset.from_dict(rows, features=features).to_parquet(
            str(folder / "parquet" / f"{name}.parquet")
        )
    return Originals(folder, known)


@contextlib.contextmanager
def bound_by_modes() -> Iterator[None]:
    """Take root's right to read what its mode forbids, from this process and those it forks."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    libc.capget(header, data)
    before = data[0]
    data[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, of the effective ones
    libc.capset(header, data)
    try:
        yield
    finally:
        data[0] = before
        libc.capset(header, data)


@contextlib.contextmanager
def within(seconds: int, case: object) -> Iterator[None]:
    """Raise TimeoutError in this process where the block takes longer."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"{case} took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def everything(folder: Path) -> dict[str, tuple]:
    """What stands in a folder: names, kinds, sizes, times and the files' own numbers."""
    found = {}
    for place, folders, files in os.walk(os.fsencode(folder)):
        for name in (*folders, *files):
            facts = os.lstat(path := os.path.join(place, name))
            found[path] = facts.st_mode, facts.st_size, facts.st_mtime_ns, facts.st_ino
    return found


# ------------------------------------------------------------------------------------------- Bytes


def flipped(data: bytes, dice: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.choice([1, 1, 3, 20])):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def foreign(dice: random.Random, known: dict[bytes, Known], kind: str) -> bytes:
    """Bytes of another kind than the name says; entered into `known` where they are a picture that
    can be read.
    """
    pixels = some_pixels(kind, dice.randrange(10**6) + 10**4)
    grey = np.repeat(pixels.mean(2).astype(np.uint8)[..., None], 3, 2)
    turned = Image.Exif()
    turned[0x0112] = 6  # it is stored turned to the left
    deep = Image.fromarray(grey[..., 0].astype(np.uint16) * 257)

    def saved(picture: Image.Image, form: str, **options: object) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, form, **options)
        return buffer.getvalue()

    readable: list[tuple[Callable[[], bytes], np.ndarray, float]] = [
        (lambda: encoded(pixels, dice.choice(["png", "webp", "bmp", "tif"])), pixels, 0),
        (lambda: saved(Image.fromarray(np.rot90(pixels).copy()), "PNG", exif=turned), pixels, 0),
        (
            lambda: saved(
                Image.fromarray(np.rot90(pixels).copy()), "JPEG", exif=turned, quality=95
            ),
            pixels,
            5,
        ),
        (lambda: saved(deep, "PNG"), grey, 1),
        (lambda: saved(deep, "TIFF"), grey, 1),
        (lambda: saved(Image.fromarray(grey[..., 0]), "JPEG", quality=95), grey, 5),
        (lambda: saved(Image.fromarray(pixels).convert("RGBA"), "PNG"), pixels, 0),
        (
            lambda: saved(
                Image.fromarray(pixels).convert("P", palette=Image.Palette.ADAPTIVE), "PNG"
            ),
            pixels,
            25,
        ),
        (lambda: saved(Image.fromarray(grey[..., 0]).convert("LA"), "PNG"), grey, 1),
        (lambda: encoded(pixels, "png") + b"more behind the end", pixels, 0),
    ]
    rubbish: list[Callable[[], bytes]] = [
        lambda: saved(Image.fromarray(grey[..., 0].astype(np.float32)), "TIFF"),
        lambda: saved(Image.fromarray(grey[..., 0].astype(np.int32)), "TIFF"),
        lambda: b"<!doctype html><title>404 Not Found</title>",
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
        lambda: b"\0" * dice.choice([1, 100, 10**5]),
        lambda: dice.randbytes(dice.choice([1, 8, 3000])),
        lambda: b"\xff\xd8\xff" + dice.randbytes(500),
        lambda: b"\x89PNG\r\n\x1a\n" + dice.randbytes(500),
        lambda: b"GIF89a" + dice.randbytes(50),
        lambda: b"RIFF\xff\xff\xff\xffWEBPVP8 " + dice.randbytes(50),
        lambda: b"II*\0" + dice.randbytes(200),
        lambda: b"P6 99999 99999 255\n",
        lambda: saved(
            Image.new("1", (20000, 20000)), "PNG"
        ),  # 50 kB that say they are 400 million pixels
    ]
    choice = dice.randrange(len(readable) + len(rubbish))
    if choice >= len(readable):
        return rubbish[choice - len(readable)]()
    make, shown, off = readable[choice]
    known[data := make()] = Known(shown, kind, off)
    return data


# what may become of the bytes of any file
SPOILT: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flip": flipped,
    "mutate": mutated,
    "cut": lambda data, dice: data[: dice.randrange(len(data))],
    "empty": lambda data, dice: b"",
}


# ----------------------------------------------------------------------------------------- Folders


def damage_picture(path: Path, dice: random.Random, known: dict[bytes, Known]) -> str:
    """Spoil one picture, and say how."""
    data = path.read_bytes()
    how = dice.choice(
        "flip flip mutate cut empty foreign foreign rename link type mode huge".split()
    )
    if how in SPOILT:
        path.write_bytes(SPOILT[how](data, dice))
    elif how == "foreign":
        path.write_bytes(foreign(dice, known, path.parent.name))
    elif how == "rename":
        names = [
            b".hidden.png",
            b"\xff\xfe.jpg",
            b"a\nb.png",
            b" .png",
            b"x.PNG",
            b"x.txt",
            b"x",
            b"x.jpg.part",
        ]
        names += [
            "日本語 %s {0} $HOME.png".encode(),
            b"--help.png",
            b"a: b.png",
            b"w" * 250 + b".jpg",
        ]
        os.rename(os.fsencode(path), os.path.join(os.fsencode(path.parent), dice.choice(names)))
    elif how == "huge":
        os.truncate(path, dice.choice([10**6, 5 * 2**30]))
    elif how == "mode":
        path.chmod(dice.choice([0o000, 0o222, 0o111, 0o444, 0o7777]))
    else:
        path.unlink()
        others = sorted(each for each in path.parent.iterdir() if each.is_file())
        with socket.socket(socket.AF_UNIX) as listener:
            made = (
                [
                    lambda: path.symlink_to("nowhere"),
                    lambda: path.symlink_to(path.name),
                    lambda: path.symlink_to("/dev/zero"),
                    lambda: path.symlink_to(".."),
                    lambda: path.symlink_to("/"),
                    lambda: path.symlink_to("/dev/stdin"),
                    lambda: others and path.symlink_to(dice.choice(others)),
                    lambda: others and os.link(others[0], path),
                ]
                if how == "link"
                else [
                    path.mkdir,
                    lambda: os.mkfifo(path),
                    lambda: listener.bind(os.path.relpath(path)),
                ]
            )
            dice.choice(made)()
    return how


def damage_class(folder: Path, dice: random.Random) -> str:
    """Spoil one class folder, and say how."""
    how = dice.choice(
        (
            "class-away class-empty class-hidden class-renamed class-file class-link "
            "class-mode class-more"
        ).split()
    )
    if how == "class-away":
        shutil.rmtree(folder)
    elif how == "class-empty":
        for each in folder.iterdir():
            each.unlink() if not each.is_dir() or each.is_symlink() else shutil.rmtree(each)
    elif how == "class-hidden":
        folder.rename(folder.parent / f".{folder.name}")
    elif how == "class-renamed":
        new = dice.choice(
            [
                b"Red",
                b"\xff",
                b"a\nb",
                b"red ",
                b"0",
                b"null",
                "日本".encode(),
                b"$(id)",
                b"w" * 255,
            ]
        )
        os.rename(os.fsencode(folder), os.path.join(os.fsencode(folder.parent), new))
    elif how == "class-file":
        shutil.rmtree(folder)
        folder.write_bytes(b"no folder")
    elif how == "class-link":
        shutil.move(
            folder, folder.parent.parent.parent / f"moved_{folder.parent.name}_{folder.name}"
        )
        folder.symlink_to(
            dice.choice(
                [
                    ".",
                    "..",
                    "nowhere",
                    folder.name,
                    f"../../moved_{folder.parent.name}_{folder.name}",
                ]
            )
        )
    elif how == "class-mode":
        folder.chmod(dice.choice([0o000, 0o444, 0o111, 0o555]))
    else:
        loop = folder / "deep" / "deeper"
        loop.mkdir(parents=True)
        (loop / "loop").symlink_to(dice.choice(["..", "../..", "../../..", "/proc/self"]))
        (folder / "notes.txt").write_bytes(b"")
        (folder.parent / "loose.png").write_bytes(b"")
        (folder.parent / dice.choice([".git", "__MACOSX", "empty"])).mkdir(exist_ok=True)
    return how


def spoil_folder(folder: Path, dice: random.Random, known: dict[bytes, Known]) -> list[str]:
    """Spoil one to six pictures of a folder, and in a third of the cases a class; say how."""
    paths = sorted(path for path in folder.rglob("*.*") if path.is_file())
    done = [
        damage_picture(path, dice, known) for path in dice.sample(paths, dice.choice([1, 1, 2, 6]))
    ]
    if dice.random() < 0.35:
        done.append(damage_class(dice.choice(sorted(folder.glob("*/*"))[:6]), dice))
    return done


def must_be_found(folder: Path) -> set[bytes]:
    """The regular files that are certainly pictures of a part: in a class folder, not hidden, named
    as a picture.
    """
    found = set()
    for place, folders, files in os.walk(os.fsencode(folder)):
        folders[:] = [name for name in folders if not name.startswith(b".")]
        paths = (
            [os.path.join(place, name) for name in files] if place != os.fsencode(folder) else []
        )
        ends = tuple(f".{ending}".encode() for ending in ENDINGS)
        found |= {
            path
            for path in paths
            if os.path.isfile(path) and not os.path.islink(path) and path.lower().endswith(ends)
        }
    return found


def source_of(dataset: ImageDataset, index: int) -> tuple[bytes | None, str | None]:
    """The bytes of a sample, None where they cannot be read, and its class by its folder (None: of
    no folder).
    """
    try:
        source, _ = dataset.read(index)
        if not isinstance(source, Path):
            return source, None
        sound = source.is_file() and source.stat().st_size < 2**20
        return source.read_bytes() if sound else None, source.parent.name
    except (OSError, ValueError):
        return None, None


# ----------------------------------------------------------------------------------------- Parquet


def rewritten(path: Path, dice: random.Random, known: dict[bytes, Known]) -> str:
    """Write a parquet file again with another layout, other types or other content, and say how."""
    table = parquet.read_table(path)
    how = dice.choice(sorted(LAYOUTS))
    LAYOUTS[how](path, table, dice, known)
    return how


def write_rows(path: Path, table: pa.Table, **columns: list) -> None:
    """The table with other values in columns of the same types."""
    for name, values in columns.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(
            at, table.schema.field(name), pa.array(values, table.schema.field(name).type)
        )
    parquet.write_table(table, path)


def other_order(path: Path, table: pa.Table, dice: random.Random, _: object) -> None:
    """The same classes under other numbers."""
    import datasets

    names = list(COLOURS)
    dice.shuffle(names)
    labels = [names.index(list(COLOURS)[label]) for label in table["kind"].to_pylist()]
    features = datasets.Features(
        {"img": datasets.Image(), "kind": datasets.ClassLabel(names=names)}
    )
    rows = {"img": table["img"].to_pylist(), "kind": labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))


def odd_labels(path: Path, table: pa.Table, dice: random.Random, _: object) -> None:
    labels = table["kind"].to_pylist()
    for at in dice.sample(range(len(labels)), dice.choice([1, 3])):
        labels[at] = dice.choice([None, -1, 3, 99, 2**62, -(2**63)])
    write_rows(path, table, kind=labels)


def odd_pictures(
    path: Path, table: pa.Table, dice: random.Random, known: dict[bytes, Known]
) -> None:
    rows = table["img"].to_pylist()
    labels = table["kind"].to_pylist()
    for at in dice.sample(range(len(rows)), dice.choice([1, 3])):
        data = rows[at]["bytes"]
        kind = list(COLOURS)[labels[at]]
        choices = [
            None,
            {"bytes": None, "path": None},
            {"bytes": b"", "path": ""},
            {"bytes": None, "path": "/dev/zero"},
        ]
        choices += [
            {"bytes": None, "path": str(path)},
            {"bytes": None, "path": "http://127.0.0.1:9/x.png"},
        ]
        choices += [
            {"bytes": None, "path": "\ud7ff/\n/nowhere.png"},
            {"bytes": data[: len(data) // 2], "path": None},
        ]
        choices += [
            {"bytes": flipped(data, dice), "path": None},
            {"bytes": foreign(dice, known, kind), "path": None},
        ]
        rows[at] = dice.choice(choices)
    write_rows(path, table, img=rows)


def retyped(path: Path, table: pa.Table, dice: random.Random, _: object) -> None:
    """The labels as a column of another type, without the names."""
    labels = table["kind"].to_pylist()
    kinds = list(COLOURS)
    columns = [
        pa.array(labels, pa.uint8()),
        pa.array(labels, pa.int32()),
        pa.array(labels, pa.float64()),
        pa.array([kinds[label] for label in labels]),
        pa.array([bool(label) for label in labels]),
        pa.array([[label] for label in labels]),
        pa.nulls(len(labels)),
        pa.array([kinds[label] for label in labels]).dictionary_encode(),
    ]
    table = table.set_column(1, "kind", dice.choice(columns)).replace_schema_metadata(None)
    parquet.write_table(table, path)


def odd_schema(path: Path, table: pa.Table, dice: random.Random, _: object) -> None:
    """Without its metadata or with broken ones, without a column, with a column twice, pictures as
    plain bytes.
    """
    metadata = [
        None,
        {"huggingface": "{"},
        {"huggingface": "[]"},
        {"huggingface": '{"info": {"features": {"img": 3}}}'},
    ]
    metadata += [
        {"huggingface": '{"info": {"features": {"img": {"_type": "os.system"}}}}'},
        {b"huggingface": b"\xff"},
    ]
    plain = pa.array([row["bytes"] for row in table["img"].to_pylist()])
    choices = [table.replace_schema_metadata(each) for each in metadata]
    choices += [
        table.drop_columns(["img"]),
        table.drop_columns(["kind"]),
        table.append_column("kind", table["kind"]),
    ]
    choices += [
        table.append_column("more", table["img"]),
        table.set_column(0, "img", plain),
        table.slice(0, 0),
    ]
    choices.append(table.rename_columns(["", "kind"]))
    parquet.write_table(dice.choice(choices), path)


def layout(path: Path, table: pa.Table, dice: random.Random, _: object) -> None:
    """Nothing but the layout of the file: all of it must be read as before."""
    version = dice.choice(["1.0", "2.4", "2.6"])
    codec = dice.choice(["none", "snappy", "gzip", "zstd", "lz4", "brotli"])
    options = {
        "row_group_size": dice.choice([1, 5, 100]),
        "use_dictionary": dice.choice([True, False]),
    }
    parquet.write_table(table, path, version=version, compression=codec, **options)


def in_parts(path: Path, table: pa.Table, dice: random.Random, _: object) -> None:
    half = len(table) // 2
    path.unlink()
    first = table.slice(0, half)
    second = table.slice(half)
    if dice.random() < 0.3:
        second = dice.choice(
            [second.drop_columns(["kind"]), second.append_column("more", second["kind"])]
        )
    for number, part in enumerate((first, second)):
        parquet.write_table(part, path.parent / f"{path.stem}-0000{number}-of-00002.parquet")


LAYOUTS: dict[str, Callable] = {
    "order": other_order,
    "labels": odd_labels,
    "pictures": odd_pictures,
    "types": retyped,
    "schema": odd_schema,
    "layout": layout,
    "parts": in_parts,
}


def damage_file(path: Path, dice: random.Random, known: dict[bytes, Known]) -> str:
    """Spoil a parquet file, and say how."""
    data = path.read_bytes()
    hows = "flip flip flip mutate cut empty foreign rename link type mode beside"
    how = dice.choice([*hows.split(), *["write"] * 12])
    if how == "write":
        return rewritten(path, dice, known)
    if how in SPOILT:
        path.write_bytes(SPOILT[how](data, dice))
    elif how == "foreign":
        texts = [
            b"a,b\n1,2\n",
            b'{"img": 1}\n',
            b"PAR1PAR1",
            b"PAR1" + b"\0" * 100 + b"PAR1",
            b"PK\3\4",
            dice.randbytes(2000),
        ]
        path.write_bytes(dice.choice([*texts, encoded(some_pixels("red", 0), "png")]))
    elif how == "rename":
        names = [
            "train.parquet.bak",
            "Train.PARQUET",
            ".train.parquet",
            "x.parquet",
            "données train.parquet",
        ]
        path.rename(path.parent / dice.choice([*names, "train [0-9]*.parquet", "train%20.parquet"]))
    elif how == "mode":
        path.chmod(dice.choice([0o000, 0o222, 0o444]))
    elif how == "beside":
        names = [
            "README.md",
            "dataset_infos.json",
            f"{path.parent.name}.py",
            "test.csv",
            "train/0.png",
            "dataset_dict.json",
        ]
        beside = path.parent / dice.choice(names)
        beside.parent.mkdir(exist_ok=True)
        texts = [
            b"---\nconfigs: 3\n---\n",
            b"{",
            b"raise SystemExit(77)",
            b"---\n{[\n---\n",
            b"\xff\xfe",
            b"",
        ]
        beside.write_bytes(dice.choice(texts))
    else:
        moved = path.parent.parent / f"moved_{path.name}"
        path.rename(moved)
        dice.choice(
            [
                lambda: path.symlink_to(moved),
                lambda: path.symlink_to("nowhere"),
                lambda: path.symlink_to(path.name),
                lambda: path.symlink_to("/dev/zero"),
                lambda: path.symlink_to(".."),
            ]
            if how == "link"
            else [path.mkdir, lambda: os.mkfifo(path)]
        )()
    return how


# ------------------------------------------------------------------------------------------- Cases


class Case(NamedTuple):
    number: int
    folder: Path
    done: list[str]  # what was done to the data
    keys: list[str]
    known: dict[bytes, Known]
    limit: int  # dataset.max_bad_images


def make_case(number: int, folder: Path, originals: Originals) -> Case:
    """Damaged data; even numbers have a folder of pictures, odd ones parquet files."""
    dice = random.Random(number)
    known = dict(originals.known)
    data = folder / "data"
    limit = dice.choice([0, 2, 50])
    keys = [f"dataset.cache={dice.choice(['none', 'device'])}", f"dataset.max_bad_images={limit}"]
    if number % 2:
        shutil.copytree(originals.folder / "parquet", data)
        parts = dice.choice([["train"], ["train"], ["test"], ["train", "test"]])
        done = [damage_file(data / f"{part}.parquet", dice, known) for part in parts]
        keys += [
            "dataset.type=hf",
            f"dataset.name={data}",
            "dataset.split_val=test",
        ]
    else:
        shutil.copytree(originals.folder / "images", data)
        done = spoil_folder(data, dice, known)
        keys += [
            "dataset.type=folder",
            f"dataset.train_dir={data}/train",
            f"dataset.val_dir={data}/val",
        ]
    return Case(number, folder, done, keys, known, limit)


def check_sample(
    case: Case, dataset: ImageDataset, index: int, image: torch.Tensor, label: int
) -> bool:
    """Whether a sample is one that is known; if so its pixels and its label must be right."""
    data, kind = source_of(dataset, index)
    if data not in case.known:
        return False
    known = case.known[data]
    off = np.abs(image.permute(1, 2, 0).numpy().astype(int) - known.pixels).mean()
    assert off <= known.off, (case.done, index, off)
    name = dataset.classes[label]
    if kind is not None:
        assert name == kind, case.done
    elif {"labels", "types", "flip", "mutate"}.isdisjoint(
        case.done
    ):  # numbers without names are classes of their own
        expected = (
            known.kind
            if "schema" not in case.done
            else (known.kind, str(list(COLOURS).index(known.kind)))
        )
        assert name in expected if isinstance(expected, tuple) else name == expected, case.done
    return True


def check_table(case: Case, dataset: ImageDataset, part: str) -> None:
    """What was loaded of a damaged parquet file is what stands in the file, by a reading of it
    alone.
    """
    path = case.folder / "data" / f"{part}.parquet"
    if {"flip", "mutate"}.isdisjoint(case.done) or not path.is_file():
        return
    table = parquet.read_table(path)
    assert len(table) == len(dataset)
    rows = table.to_pylist()
    image, label = (table.schema.names[dataset_column] for dataset_column in (0, 1))
    for read, row in zip(dataset.samples, rows, strict=True):
        assert (read.get("img") or {}).get("bytes") == (row[image] or {}).get("bytes")
        assert read.get("kind") == row[label]


def read_in_process(case: Case, met: Counter) -> None:
    """Build the loaders and read both sets to the end."""
    config = make_config(*KEYS, *case.keys, "training.num_workers=0")
    read_errors = ReadErrors(case.limit)
    try:
        parts = build_datasets(config.dataset)
        loaders = build_dataloaders(config, CPU)[:2]
        read = [list(device_batches(loader, CPU, read_errors)) for loader in loaders]
    except RequestError as error:
        line = str(error)
        assert line.startswith("dataset"), (case.done, line)
        assert "\n" not in line
        met["refused"] += 1
        return
    met["accepted"] += 1
    for part, dataset, batches in zip(("train", "val"), parts, read, strict=True):
        sure = 0
        for batch in batches:
            for image, label, index in zip(
                batch.images, batch.labels.tolist(), batch.indices.tolist(), strict=True
            ):
                sure += check_sample(case, dataset, index, image, label)
        met["pictures read right"] += sure
        if case.number % 2 == 0:
            found = [os.path.realpath(os.fsencode(source)) for source, _ in dataset.samples]
            there = {os.path.realpath(path) for path in must_be_found(case.folder / "data" / part)}
            assert there <= set(found), case.done
        else:
            check_table(case, dataset, {"train": "train", "val": "test"}[part])


def read_by_a_run(case: Case, met: Counter, command: bool) -> None:
    """A run in a process of its own, by the command as a user starts it or by a fork of this
    process.
    """
    keys = [*KEYS, *case.keys, "training.num_workers=2", f"logging.output_dir={case.folder}/out"]
    args = ["--config", str(REPO / "configs/digits_smoke.yaml"), *keys]
    ended = (real_run if command else forked_run)(args, case.folder)
    assert ended.code in (0, 2), (case.done, ended.printed)
    assert len(ended.errors) == (ended.code > 0), (case.done, ended.printed)
    assert all(line.startswith("dataset") for line in ended.errors), (case.done, ended.printed)
    assert "Traceback" not in ended.printed
    assert ended.seconds < SOON
    results = [
        json.loads(path.read_text()) for path in case.folder.glob("out/final_results_2*.json")
    ]
    if ended.code == 0:
        (result,) = results
        assert result["status"] == "completed"
        assert len(result["bad_images"]) <= case.limit
        assert all(str(case.folder / "data") in name for name in result["bad_images"])
    assert all(result["status"] == "failed" for result in results if ended.code)
    met[f"run with exit code {ended.code}"] += 1


def try_damaged(
    number: int, tmp_path: Path, originals: Originals, met: Counter, monkeypatch
) -> None:
    """A case: every fifth by a run, every twentieth by the command itself."""
    folder = tmp_path / str(number)
    folder.mkdir()
    monkeypatch.chdir(folder)
    case = make_case(number, folder, originals)
    by_run = number % 10 in (8, 9)
    if by_run:
        (folder / "out").mkdir()
        (folder / "out" / "final_results_0.json").write_text(EARLIER)
    before = everything(folder / "data")
    started = time.monotonic()
    with bound_by_modes(), within(SECONDS, (number, case.done)):
        if by_run:
            read_by_a_run(case, met, command=number % 40 in (8, 19))
        else:
            read_in_process(case, met)
    assert time.monotonic() - started < SECONDS
    assert everything(folder / "data") == before, case.done
    assert not by_run or (folder / "out" / "final_results_0.json").read_text() == EARLIER
    met.update(f"{'parquet' if number % 2 else 'folder'}: {how}" for how in case.done)
    for each in folder.rglob("*"):
        if each.is_dir() and not each.is_symlink():
            each.chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("cache", ["none", "device"])
def test_bad_images_within_the_limit_are_replaced_and_listed(cache, tmp_path, image_folder):
    (image_folder / "train" / "red" / "3.jpg").write_bytes(b"no image")
    (image_folder / "train" / "red" / "7.jpg").write_bytes(b"the last one of all")
    (image_folder / "val" / "blue" / "0.jpg").unlink()
    (image_folder / "val" / "blue" / "0.jpg").symlink_to("nowhere")
    more = ["training.num_workers=2", f"dataset.cache={cache}", f"logging.output_dir={tmp_path}/o"]

    def run(allowed: int) -> tuple[dict, Path]:
        limit = f"dataset.max_bad_images={allowed}"
        return train(folder_config(image_folder, *KEYS, *more, "training.epochs=2", limit))

    result, path = run(3)
    assert result["status"] == "completed"
    assert result["training_history"]["samples_loaded"] == [24, 24]
    names = sorted(
        text.partition(":")[0].removeprefix(f"{image_folder}/") for text in result["bad_images"]
    )
    assert names == ["train/red/3.jpg", "train/red/7.jpg", "val/blue/0.jpg"]
    assert json.loads(path.read_text())["bad_images"] == result["bad_images"]
    with pytest.raises(RequestError, match=r"\.jpg: .*; dataset\.max_bad_images=1 allows no more"):
        run(1)


def test_ten_damaged_data_sets(tmp_path, originals, monkeypatch):
    met: Counter = Counter()
    for number in range(10):
        try_damaged(number, tmp_path, originals, met, monkeypatch)
    assert {"refused", "accepted"} <= met.keys()
    assert met["pictures read right"] > 25


@pytest.mark.long
def test_a_thousand_damaged_data_sets(tmp_path, originals, monkeypatch):
    met = Counter()
    done = []
    wrong = []
    for number in cases(1000):
        try:
            try_damaged(number, tmp_path, originals, met, monkeypatch)
        except Exception as error:  # the others are tried all the same
            wrong.append(number)
            print(f"case {number}: {type(error).__name__}: {error}", flush=True)
        done.append(number)
    print(f"ENDS damaged data: cases {span(done)}, wrong: {wrong}, {dict(sorted(met.items()))}")
    assert not wrong
