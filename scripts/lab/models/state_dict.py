"""The weights of a network in a file of somebody else's: where they are, under which names, and
whether they are sound.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._weights_only_unpickler import _get_allowed_globals

from lab.base.errors import RequestError, one_line

DEEPEST = 8  # levels of dicts and lists that are looked into
AVERAGE = re.compile(
    r"(^|_)(ema|swa|averaged?|avg)(_|$)", re.IGNORECASE
)  # of weights, as trainers call it
# parts of names that DistributedDataParallel, torch.compile, FSDP and DeepSpeed put in
WRAPPERS = {
    *("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
    "_forward_module",
}
USUAL = {"", "state_dict", "model", "model_state_dict", "model_state", "net", "network"}
UNUSED = ("n_averaged", "num_batches_tracked")  # counters that no forward reads
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Inert(dict):
    """Stands in a checkpoint for every object that is no tensor, as the arguments of a training
    script. It takes what the file puts into it, and none of its class's code is run.
    """

    __hash__ = object.__hash__

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any):
        super().__init__()

    def __call__(self, *_: Any, **__: Any) -> Inert:
        return Inert()

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})

    def append(self, _: Any) -> None:
        pass

    extend = append


class _TensorUnpickler(pickle.Unpickler):
    """Knows what torch lets a file of `weights_only` use, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        return _get_allowed_globals().get(f"{module}.{name}", Inert)


def _load(file: BinaryIO, **options: Any) -> Any:
    return _TensorUnpickler(file, **options).load()


# what torch.load asks a pickle module for
TENSORS_ALONE = SimpleNamespace(__name__="tensors", Unpickler=_TensorUnpickler, load=_load)


def read_tensors(path: Path, key: str) -> Any:
    """What a .safetensors file or a file of torch.save holds, tensors on the host. No code in it is
    run: see `Inert`.

    Raises RequestError naming `key` where the file is damaged or none of these.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if _is_program(path):
            raise ValueError("a TorchScript program; save the state_dict of its network")
        return torch.load(path, "cpu", pickle_module=TENSORS_ALONE, weights_only=False)
    except OSError as error:
        raise RequestError(
            f"{key}: {path}: cannot read it: {error.strerror or one_line(error)}"
        ) from None
    except Exception as error:  # both readers raise almost anything on what is none of theirs
        kind = "safetensors" if path.suffix == ".safetensors" else "state_dict"
        raise RequestError(
            f"{key}: {path}: damaged, or no {kind} file ({one_line(error, 150)})"
        ) from None


def _is_program(path: Path) -> bool:
    """Whether a file is of TorchScript, which torch.load would load as a program."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


class Named(NamedTuple):
    """A tensor of a file."""

    place: tuple[str, ...]  # the keys of the dicts around it
    name: str  # these keys and its own, joined by dots, without what wrappers put in
    tensor: Tensor


class Found(NamedTuple):
    """The weights of a network in a file."""

    tensors: dict[str, Tensor]  # by the network's own names, and what else lies beside them
    where: str  # what stands before the names, "" where nothing does
    is_average: bool  # of the weights
    remarks: list[str]  # on what else is there


def flattened(content: Any, wrappers: set[str], place: tuple[str, ...] = ()) -> Iterator[Named]:
    """Every tensor in nested dicts and lists."""
    if isinstance(content, Tensor) and place:
        parts = [part for key in place for part in key.split(".") if part not in wrappers]
        yield Named(place[:-1], ".".join(parts), content)
        return
    if len(place) > DEEPEST:
        return
    items = content.items() if isinstance(content, dict) else ()
    items = enumerate(content) if isinstance(content, list | tuple) else items
    for key, value in items:
        yield from flattened(value, wrappers, (*place, str(key)))


def find_network(content: Any, own: Mapping[str, Tensor]) -> Found:
    """Where the names of a network, `own` (its state_dict), stand in the content of a file.

    What stands before a name, as `state_dict.` or `model.` (Lightning), is where most names with
    their shapes are found. An average of the weights goes before them: it is what was validated.
    Raises ValueError where no name is found, or where it is not clear which of several weights is
    meant.
    """
    parts = {part for name in own for part in name.split(".")}
    there = [*flattened(content, WRAPPERS - parts)]
    fits: Counter[str] = Counter()
    for each in there:
        for before, name in _splits(each.name):
            if name in own:
                fits[before] += 2 if each.tensor.shape == own[name].shape else 1
    if not fits:
        raise ValueError(_nothing(content, there))
    good = [before for before, count in fits.items() if 2 * count >= max(fits.values())]
    averages = [before for before in good if is_average(before)]
    most = max(fits[before] for before in averages or good)
    best = [before for before in averages or good if fits[before] == most]
    usual = [each for each in best if each.rpartition(".")[2] in USUAL]
    before = _only(usual or best, there)
    below = _below(before, there)
    inside = {each.place for each in below if each.name in own}
    tensors: dict[str, Tensor] = {}
    for each in below:
        if each.place in inside:
            _add(tensors, each.name, each.tensor)
    return Found(tensors, before, bool(averages), _remarks(there, good, averages, before))


def is_average(before: str) -> bool:
    return any(AVERAGE.search(part) for part in before.split("."))


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """A name in two, at every dot and before the first part."""
    parts = name.split(".")
    for at in range(len(parts)):
        yield ".".join(parts[:at]), ".".join(parts[at:])


def _nothing(content: Any, there: list[Named]) -> str:
    """Why no name of the network is found."""
    objects = [content, *(content.values() if isinstance(content, dict) else ())]
    if any("_modules" in getattr(each, "__dict__", {}) for each in objects):
        return (
            "it holds more than tensors, a whole module, which is not loaded; save its state_dict"
        )
    if not there:
        return "no state_dict: expected tensors by name"
    return f"{one_line(there[0].name, 80)} is no part of the network"


def _add(tensors: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in tensors and not _same(tensors[name], tensor):
        raise ValueError(f"{one_line(name, 80)} is there twice, and not alike")
    tensors[name] = tensor


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _only(candidates: list[str], there: list[Named]) -> str:
    """The first of several places, where all hold the same. Raises ValueError naming two that do
    not.
    """
    first = {each.name: each.tensor for each in _below(candidates[0], there)}
    for other in candidates[1:]:
        tensors = {each.name: each.tensor for each in _below(other, there)}
        alike = tensors.keys() == first.keys() and all(
            _same(tensors[name], first[name]) for name in first
        )
        if not alike:
            two = " and ".join(one_line(repr(each), 60) for each in (candidates[0], other))
            raise ValueError(f"{two} both fit, and differ; save the one that is meant alone")
    return candidates[0]


def _below(before: str, there: list[Named]) -> list[Named]:
    """The tensors whose names begin so, without that beginning."""
    start = f"{before}." if before else ""
    return [
        each._replace(name=each.name[len(start) :]) for each in there if each.name.startswith(start)
    ]


def _remarks(there: list[Named], good: list[str], averages: list[str], chosen: str) -> list[str]:
    """What is said of other weights in the file."""
    remarks = []
    if averages:
        remarks.append(f"the average of the weights, {one_line(chosen, 60)}")
    others = [before for before in good if before != chosen and not averages]
    if others:
        remarks.append(f"left aside: {one_line(', '.join(others), 100)}")
    lone = {
        ".".join(each.place)
        for each in there
        if not averages and "optim" not in each.name.lower() and is_average(".".join(each.place))
    }
    if lone:
        remarks.append(f"its average, {one_line(min(lone), 60)}, does not fit and is left aside")
    return remarks


def unsound(name: str, tensor: Tensor, own: Tensor) -> str | None:
    """What is wrong with a tensor that is to be loaded as `own`; None where nothing is."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return f"{name} is sparse, quantised or without values"
    if own.is_floating_point() and tensor.dtype not in FLOATS:
        return f"{name} holds {_kind(tensor)}, and numbers of floating point are needed"
    if not own.is_floating_point() and (tensor.is_floating_point() or tensor.is_complex()):
        return f"{name} holds {_kind(tensor)}, and {_kind(own)} is needed"
    if own.is_floating_point() and not tensor.to(own.dtype).isfinite().all():
        return f"{name} holds values that are not finite"
    if name.endswith("running_var") and (tensor < 0).any():
        return f"{name} holds variances below 0"
    return None


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
