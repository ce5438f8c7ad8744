"""What a network says of pictures, a line or a row of a file for each."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from lab.base.errors import RequestError, one_line
from lab.base.files import FORMULA, no_formula
from lab.data.folders import pictures_below, read_picture
from lab.data.images import decode_image
from lab.outputs.evaluation import require_finite
from lab.outputs.trained import Trained

if TYPE_CHECKING:
    import pandas as pd


def find_pictures(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """(the files, and of each folder the pictures below it, sorted; what was skipped in each
    folder).

    Raises RequestError naming what is missing, and a folder without any.
    """
    found: list[Path] = []
    remarks = []
    for path in paths:
        if not path.exists():
            raise RequestError(f"--images: {path}: no such file or folder")
        if not path.is_dir():
            found.append(path)
            continue
        try:
            pictures, skipped = pictures_below(path)
        except OSError as error:
            raise RequestError(f"--images: {error.filename or path}: {error.strerror}") from None
        said = f"skipped: {skipped}" if skipped else ""
        if not pictures:
            endings = f"their names end in {', '.join(IMG_EXTENSIONS)}"
            raise RequestError(f"--images: {path}: no pictures in it; {endings}; {said}")
        remarks += [f"--images: {path}: {said}"] if said else []
        found += pictures
    return found, remarks


class Guess(NamedTuple):
    """What a network says of a picture, or why it could not be asked."""

    path: Path
    classes: list[tuple[str, float]]  # names and probabilities, the likeliest first
    problem: str | None = None
    logits: np.ndarray | None = None  # float32 [classes]

    def __str__(self) -> str:
        name = str(self.path) if str(self.path).isprintable() else one_line(self.path)
        if self.problem is not None:
            return f"{name}: {self.problem}"
        shares = (f"{one_line(each, 60)} {100 * share:.1f} %" for each, share in self.classes)
        return f"{name}: {', '.join(shares)}"


def guesses(trained: Trained, paths: Sequence[Path], top: int) -> Iterator[Guess]:
    """Of each picture its likeliest classes; of one that cannot be read, why. Raises RequestError
    where a logit is not finite.
    """
    network = trained.network
    batch = min(64, network.local_batch)
    forward = network.predictor()
    for start in range(0, len(paths), batch):
        part = [(path, *_decoded(path)) for path in paths[start : start + batch]]
        images = trained.prepare([image for _, image, _ in part if image is not None])
        rows = iter(_logits(forward, torch.stack(images).to(network.device)) if images else ())
        for path, image, problem in part:
            if image is None:
                yield Guess(path, [], problem)
                continue
            logits = next(rows)
            numbers, shares = likeliest(logits[None], top)
            names = [trained.classes[number] for number in numbers[0]]
            yield Guess(path, list(zip(names, shares[0].tolist(), strict=True)), None, logits)


@torch.no_grad()
def _logits(forward: Callable[[Tensor], Tensor], images: Tensor) -> np.ndarray:
    """float32 [n, classes]. Raises RequestError where one is not finite."""
    logits = forward(images).float().cpu().numpy()
    require_finite(logits)
    return logits


def likeliest(logits: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """(int64, float32 [n, top]): the `top` likeliest classes and their probabilities. Of equal
    logits the first class comes first. logits: float32 [n, classes].
    """
    numbers = (-logits).argsort(1, kind="stable")[:, :top]
    return numbers, np.take_along_axis(softmax(logits, axis=1), numbers, 1)


def _decoded(path: Path) -> tuple[Tensor | None, str | None]:
    """(a picture, None), or (None, why it cannot be read)."""
    try:
        return decode_image(read_picture(path)), None
    except (OSError, ValueError) as error:
        return None, one_line(getattr(error, "strerror", None) or error)


def read_pictures(paths: Sequence[Path]) -> list[Tensor]:
    """uint8 [3, H, W] each. Raises RequestError naming the first one that cannot be read."""
    images = []
    for path in paths:
        image, problem = _decoded(path)
        if image is None:
            raise RequestError(f"--images: {one_line(path)}: {problem}")
        images.append(image)
    return images


class Row(NamedTuple):
    """A picture of a file of predictions."""

    name: str  # its path, or its number in the data set
    label: str | None  # where it is known
    logits: np.ndarray | None  # float32 [classes]; None where it could not be read
    problem: str | None  # why


def as_table(
    rows: Sequence[Row], classes: Sequence[str], top: int, all_logits: bool
) -> pd.DataFrame:
    """A row a picture: path, label, the `top` likeliest classes with their probabilities, why it
    could not be read, and perhaps every logit. What is not known is null.

    A file's name whose bytes are no UTF-8 has them as \\xff, so that every program reads the table.
    """
    import pandas as pd

    top = min(top, len(classes))
    logits = np.full((len(rows), len(classes)), np.nan, dtype=np.float32)
    for number, row in enumerate(rows):
        if row.logits is not None:
            logits[number] = row.logits
    known = ~np.isnan(logits).any(1)
    numbers, shares = likeliest(logits, top)
    names = np.array(classes, dtype=object)[numbers]
    names[~known] = None
    columns = {
        "path": [os.fsencode(row.name).decode("utf-8", "backslashreplace") for row in rows],
        "label": pd.Series([row.label for row in rows], dtype=object),
    }
    for place in range(top):
        columns[f"class_{place + 1}"] = names[:, place]
        columns[f"probability_{place + 1}"] = shares[:, place]
    columns["problem"] = pd.Series([row.problem for row in rows], dtype=object)
    if all_logits:
        columns |= {f"logit {name}": logits[:, i] for i, name in enumerate(classes)}
    return pd.DataFrame(columns)


def encoded(table: pd.DataFrame, form: str) -> bytes:
    """A table as a file: .csv, .jsonl or .parquet. In a CSV no cell is a formula to a spreadsheet:
    a path gets `./` before it, which is the same file, other text an apostrophe.
    """
    from pandas.api.types import is_numeric_dtype

    if form == ".jsonl":
        return table.to_json(orient="records", lines=True, double_precision=15).encode()
    if form == ".parquet":
        file = io.BytesIO()
        table.to_parquet(file, index=False)
        return file.getvalue()
    safe = table.rename(columns=no_formula)
    safe["path"] = [f"./{path}" if path.startswith(FORMULA) else path for path in safe["path"]]
    for column in safe:
        if not is_numeric_dtype(safe[column]):
            safe[column] = safe[column].map(no_formula)
    return safe.to_csv(index=False, lineterminator="\n").encode()
