"""Devices, number types, compilation, and models as functions of shapes."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from lab.base.errors import RequestError
from lab.base.launch import available_cores, has_own_gpu, launched, launched_here
from lab.config.sections import TrainingConfig
from lab.machine.stateful import Stateful


def resolve_device(training: TrainingConfig) -> torch.device:
    """The device to train on; each of several processes has its own.

    Raises RequestError for `cuda` where there is none, or where there are fewer GPUs than
    processes.
    """
    if training.device == "cuda" and not torch.cuda.is_available():
        raise RequestError(
            "training.device: cuda, but torch sees no GPU here; set training.device=cpu or auto"
        )
    if training.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    _, world, local = launched()
    if world == 1:
        return torch.device("cuda")
    if has_own_gpu():
        local = 0
    elif (processes := launched_here(local + 1)) > torch.cuda.device_count():
        raise RequestError(
            f"training.device: {processes} processes and {torch.cuda.device_count()} GPUs here"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def resolve_amp_dtype(training: TrainingConfig, device: torch.device) -> torch.dtype | None:
    """The autocast type, None for plain float32."""
    if isinstance(training.mixed_precision, str):
        return getattr(torch, training.mixed_precision)
    if not training.mixed_precision or device.type == "cpu":
        return None
    return (
        torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    )


def configure_backends(shapes_repeat: bool, device: torch.device) -> None:
    """On a GPU: TF32 where float32 remains; cuDNN autotuning only where shapes repeat, because it
    costs a search for each new shape.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = shapes_repeat
        torch.set_float32_matmul_precision("high")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; where it is not there yet, a copy that the host does not wait for."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def compiled(function: Callable, mode: str) -> Callable:
    """torch.compile for calls of one shape. With reduce-overhead (CUDA graphs) a result lives until
    the next call.
    """
    if mode == "off":
        return function
    fast = torch.compile(function, dynamic=False, mode=mode)

    def call(*inputs: Tensor, **named: Tensor) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return fast(*inputs, **named)

    return call if mode == "reduce-overhead" else fast


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine and commit behind a result. Environment variables stay out: they may hold
    secrets.
    """
    folder = str(Path(__file__).resolve().parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        **versions("timm", "numpy", "datasets", "pillow", "simplejpeg"),
        "cuda": torch.version.cuda if on_gpu else None,
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "host": platform.node(),
        "processor": processor(),
        "cores": available_cores(),
        "platform": platform.platform(),
        "git_commit": commit,
    }


def versions(*names: str) -> dict[str, str | None]:
    """The installed version of each package; None for one that is not installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def processor() -> str:
    """The name of the CPU, as Linux gives it; elsewhere what Python knows of it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


# of its pixels, 0 to 1
IMAGENET_MOMENTS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class Normalise:
    """uint8 [batch, 3, H, W] to float32 by the mean and standard deviation that the model expects
    (of pixels from 0 to 1); and the autocast the model runs under.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        layout: torch.memory_format,
        dtype: torch.dtype | None,
    ):
        self.device = device
        self.device_type = device.type
        self.layout = layout
        self.dtype = dtype
        self.set_moments(mean, std)

    def set_moments(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = self._levels(mean)
        self.std = self._levels(std)

    def _levels(self, moments: Sequence[float]) -> Tensor:
        """A moment of each colour in grey levels, 0 to 255, float32 [1, 3, 1, 1]."""
        return torch.tensor(moments, device=self.device).mul(255).view(1, 3, 1, 1)

    def autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device_type, self.dtype or torch.bfloat16, enabled=self.dtype is not None
        )

    def __call__(self, images: Tensor) -> Tensor:
        return (images.to(torch.float32, memory_format=self.layout) - self.mean) / self.std


class RandomGenerators(Stateful):
    """The generators that dropout draws from: torch's, of the host and of the device."""

    def __init__(self, device: torch.device):
        self.device = device

    def local_state(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {"host": torch.get_rng_state(), "cuda": cuda, "rank": 0}

    def load_local_state(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["host"])
        if state["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)
        if state["rank"]:
            seed_rank(int(torch.randint(2**31, ())), state["rank"])

    def merged(self, states: Sequence[dict[str, Any]], rank: int) -> dict[str, Any]:
        """Rank 0 goes on with the numbers of rank 0, each other one with numbers of its own."""
        return {**states[0], "rank": rank}


def seed_rank(seed: int, rank: int) -> None:
    """Give a rank random numbers of its own for dropout."""
    torch.manual_seed(seed + 1000003 * rank)
