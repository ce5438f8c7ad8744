"""The config.json of a weights folder: what the network is, and how its pictures are prepared.

The form is that of timm's `save_for_hf` and `local-dir:`. The lab adds `small_stem`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lab.base.errors import RequestError, one_line
from lab.config.sections import DatasetConfig
from lab.data.images import CENTRE

FACTS = "config.json"
LARGEST = 4096  # pixels, side of a picture: a larger one is a mistake, and would fill the memory
# Of timm.create_model: they would load something else, or build no classifier
NOT_OF_A_MODEL = {
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
    *("scriptable", "exportable", "no_jit", "features_only", "out_indices", "model_name"),
}

Share = Annotated[float, Field(gt=0, le=1)]
Level = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(ge=1, le=LARGEST)]


class View(NamedTuple):
    """What a network is shown of a picture when it is evaluated."""

    size: int  # pixels, side of the square
    crop_mode: str  # center: of the shorter side; squash: of both, made square; border
    crop_pct: float  # share of the picture that is kept
    interpolation: str

    @classmethod
    def of(cls, config: DatasetConfig) -> View:
        """As the lab validates."""
        crops = config.resolved_augment() == "random_resized_crop"
        mode = "center" if crops else "squash"
        return cls(config.image_size, mode, CENTRE if crops else 1.0, "bilinear")

    def __str__(self) -> str:
        return f"{self.size} px, {self.crop_mode} {self.crop_pct:g}, {self.interpolation}"


class _Facts(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())


class Prepared(_Facts):
    """`pretrained_cfg`: of pixels from 0 to 1. What is left out has timm's default."""

    input_size: tuple[Literal[3], Side, Side]
    mean: tuple[Level, Level, Level]
    std: tuple[Share, Share, Share]
    crop_pct: Share = CENTRE
    crop_mode: Literal["center", "squash", "border"] = "center"
    interpolation: Literal["bilinear", "bicubic", "nearest", "box", "hamming", "lanczos"] = (
        "bicubic"
    )
    num_classes: int | None = None
    label_names: list[str] | dict[str, str] | None = None

    @field_validator("input_size")
    @classmethod
    def _square(cls, size: tuple[int, ...]) -> tuple[int, ...]:
        if size[1] != size[2]:
            raise ValueError(f"{list(size)} is not square")
        return size


class Description(_Facts):
    """A config.json that is one of weights."""

    architecture: Annotated[str, Field(min_length=1)]
    num_classes: Annotated[int, Field(ge=0)] | None = None
    label_names: list[str] | dict[str, str] | None = None
    global_pool: str | None = None
    model_args: dict[str, Any] = {}
    small_stem: bool | None = None  # None: not written by the lab
    imports: list[str] = []  # the code that they were trained with, see `lab.config.imports`
    pretrained_cfg: Prepared
    digest: str = ""

    @property
    def by_lab(self) -> bool:
        """Whether the lab has written it, and not timm."""
        return self.small_stem is not None

    @property
    def name(self) -> str:
        """Of the network, without the tag of somebody's weights."""
        return self.architecture.partition(".")[0]

    @property
    def moments(self) -> dict[str, tuple[float, ...]]:
        return {"mean": self.pretrained_cfg.mean, "std": self.pretrained_cfg.std}

    @property
    def view(self) -> View:
        how = self.pretrained_cfg
        size = self.model_args.get("img_size", self.model_args.get("image_size"))
        size = size[0] if isinstance(size, list | tuple) else size
        return View(size or how.input_size[-1], how.crop_mode, how.crop_pct, how.interpolation)

    def arguments(self) -> dict[str, Any]:
        """What the network was built with, its number of classes and channels left out."""
        pool = {} if self.global_pool is None else {"global_pool": self.global_pool}
        given = {**pool, **self.model_args} if not self.by_lab else self.model_args
        known = {name: given[name] for name in given if name not in ("num_classes", "in_chans")}
        return {name: tuple(v) if isinstance(v, list) else v for name, v in known.items()}

    def classes(self) -> list[str]:
        """The name of each class, "0", "1" and so on where none has one. Raises ValueError where
        that is not clear.
        """
        names = self.label_names or self.pretrained_cfg.label_names
        count = self.num_classes
        if count is None:
            count = self.pretrained_cfg.num_classes
        if isinstance(names, dict):
            numbered = [names.get(str(number)) for number in range(len(names))]
            if None in numbered:
                raise ValueError("label_names: not numbered from 0 without a gap")
            names = numbered
        if not names:
            names = [str(number) for number in range(count or 0)]
        if count is not None and count != len(names):
            raise ValueError(f"num_classes is {count}, and label_names has {len(names)}")
        if len(names) < 2:
            raise ValueError(f"{len(names)} classes: there is nothing to tell apart")
        name, count = Counter(names).most_common(1)[0]
        if count > 1:
            raise ValueError(f"label_names: {one_line(repr(name), 60)} comes {count} times")
        return names


def parse_description(text: bytes) -> Description:
    """Raises ValueError where it is no description of weights."""
    raw = json.loads(text.decode("utf-8-sig"))
    if not isinstance(raw, dict):
        raise ValueError(f"expected an object, got {type(raw).__name__}")
    digest = digest_of(raw)
    if "pretrained_cfg" not in raw:  # timm before 0.9
        kept = {name: raw.pop(name) for name in ("architecture", "num_classes") if name in raw}
        raw = {**kept, "label_names": raw.pop("labels", None), "pretrained_cfg": raw}
    try:
        found = Description.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:60] for part in first["loc"])
        raise ValueError(
            f"{where}: {first['msg']}, got {one_line(repr(first['input']), 60)}"
        ) from None
    _check_arguments(found)
    return found.model_copy(update={"digest": digest})


def _check_arguments(found: Description) -> None:
    """Raises ValueError where `model_args` are not those of a classifier of colour pictures."""
    given = found.model_args
    if wrong := sorted(NOT_OF_A_MODEL & given.keys()):
        raise ValueError(f"model_args.{wrong[0]}: no argument of a network")
    if given.get("in_chans", 3) != 3:
        raise ValueError("model_args.in_chans: the lab's pictures have 3 channels")
    count = given.get("num_classes")
    if count is not None and found.num_classes is not None and count != found.num_classes:
        raise ValueError(f"num_classes is {found.num_classes}, and model_args has {count!r}")
    for name in ("img_size", "image_size"):
        size = given.get(name)
        sides = {*size} if isinstance(size, list) else {size}
        if size is not None and not (
            len(sides) == 1 and all(type(side) is int and 0 < side <= LARGEST for side in sides)
        ):
            raise ValueError(f"model_args.{name}: {one_line(repr(size), 60)} is no side in pixels")


def digest_of(facts: dict[str, Any]) -> str:
    """A hash of a description that does not depend on how the file is laid out."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def read_description(path: Path, key: str) -> Description:
    """Raises RequestError naming `key` and the file where it is no description of weights."""
    try:
        return parse_description(path.read_bytes())
    except OSError as error:
        raise RequestError(f"{key}: {path}: cannot read it: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        why = one_line(error, 200)
        raise RequestError(f"{key}: {path}: no description of weights ({why})") from None
