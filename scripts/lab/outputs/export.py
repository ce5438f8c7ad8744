"""A trained network as one file for other programs: ONNX, or a program of torch.export."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lab.base.errors import RequestError, TrainingFailed, one_line
from lab.outputs.trained import Trained

INPUT = "images"
OUTPUT = "logits"
TOLERANCE = 1e-3  # of the largest logit: float32 in another order differs by far less


class WithNormalisation(nn.Module):
    """A network that takes RGB pixels from 0 to 1 as they are: nobody can forget to normalise."""

    def __init__(self, trained: Trained):
        super().__init__()
        self.model = copy.deepcopy(trained.network.exported).cpu().float().eval()
        moments = (torch.tensor(each).view(1, 3, 1, 1) for each in trained.network.moments.values())
        for name, values in zip(("mean", "std"), moments, strict=True):
            self.register_buffer(name, values.float())

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images - self.mean) / self.std)


class Difference(NamedTuple):
    """How far the logits of an exported network are from those of the network itself."""

    largest: float
    of: float  # the largest logit


class Checked(NamedTuple):
    """An exported file, compared with its network."""

    data: bytes
    difference: Difference
    by: str  # what computed it


def metadata(trained: Trained) -> dict[str, str]:
    """What a program needs beside the file: class names, and how a picture is prepared; JSON."""
    view = trained.view
    prepared = {
        "input": f"{INPUT}: float32 [batch, 3, {view.size}, {view.size}], RGB from 0 to 1",
        "size": view.size,
        "crop_mode": view.crop_mode,
        "crop_pct": view.crop_pct,
        "interpolation": view.interpolation,
        "normalised": "in the file, by this mean and standard deviation",
        **{name: list(values) for name, values in trained.network.moments.items()},
    }
    return {
        "class_names": json.dumps(trained.classes),
        "preprocessing": json.dumps(prepared),
        "architecture": trained.network.model_config.name,
    }


def traced(trained: Trained) -> torch.export.ExportedProgram:
    """The network for any number of pictures. Raises RequestError where it cannot be traced."""
    side = trained.view.size
    example = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    batch = {0: torch.export.Dim("batch", min=1, max=2**20)}
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(
                WithNormalisation(trained), (example,), dynamic_shapes={INPUT: batch}
            )
    except Exception as error:  # of the tracer, in dozens of kinds
        name = trained.network.model_config.name
        why = one_line(error, 200)
        raise RequestError(f"--weights: {name} cannot be traced by torch.export: {why}") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what the exporters print. What fails is an exception."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def as_onnx(trained: Trained, images: Tensor) -> Checked:
    """An ONNX file, run by onnxruntime where that is there, else its trace alone."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise RequestError(
            "--output: a .onnx file needs packages that are not there: pip install onnx onnxscript"
        ) from None
    program = traced(trained)
    try:
        with quiet():
            found = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT]
            )
            found.model.metadata_props.update(metadata(trained))
            data = found.model_proto.SerializeToString()
    except Exception as error:  # of an operator without a counterpart, or of more than 2 GB
        name = trained.network.model_config.name
        raise RequestError(f"--output: {name} has no ONNX form: {one_line(error, 200)}") from None
    try:
        import onnxruntime
    except ImportError:
        difference = compared(trained, images, program.module())
        return Checked(data, difference, "the trace alone; to run the file, install onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def forward(batch: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: batch.numpy()})[0])

    difference = compared(trained, images, forward)
    return Checked(data, difference, f"onnxruntime {onnxruntime.__version__}")


def as_torch(trained: Trained, images: Tensor) -> Checked:
    """A program of torch.export, as `torch.export.load` reads it."""
    program = traced(trained)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        with quiet():
            torch.export.save(program, path, extra_files=metadata(trained))
            forward = torch.export.load(path).module()
        difference = compared(trained, images, forward)
        return Checked(path.read_bytes(), difference, f"torch {torch.__version__}")


FORMS: Mapping[str, Callable[[Trained, Tensor], Checked]] = {".onnx": as_onnx, ".pt2": as_torch}


@torch.no_grad()
def compared(trained: Trained, images: Tensor, forward: Callable[[Tensor], Tensor]) -> Difference:
    """The largest difference of the logits of real pictures, one by one and together, from those of
    the network itself.

    images: uint8 [n, 3, size, size], prepared. Raises TrainingFailed beyond rounding.
    """
    expected = trained.network.predictor()(images.to(trained.network.device)).float().cpu().numpy()
    pixels = images.float() / 255
    together = forward(pixels).numpy()
    alone = np.concatenate([forward(each[None]).numpy() for each in pixels])
    difference = float(max(np.abs(found - expected).max() for found in (together, alone)))
    largest = float(np.abs(expected).max())
    if not difference <= TOLERANCE * largest:
        raise TrainingFailed(
            f"the exported network differs from the trained one: logits of up to {largest:.3g} by "
            f"{difference:.3g}; nothing is written"
        )
    return Difference(difference, largest)
