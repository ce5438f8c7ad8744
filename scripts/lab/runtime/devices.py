"""Devices, number types, compilation and normalisation."""

from __future__ import annotations

import contextlib
import copy
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lab.config import ASTConfig, ModelConfig, TrainingConfig
from lab.errors import RequestError, one_line
from lab.runtime.launch import launched


def resolve_device(training: TrainingConfig) -> torch.device:
    """The device to train on, of several processes each its own. Raises RequestError for `cuda` where there is none,
    or where there are fewer GPUs than processes."""
    if training.device == "cuda" and not torch.cuda.is_available():
        raise RequestError("training.device: cuda, but torch sees no GPU here; set training.device=cpu or auto")
    if training.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    _, world, local = launched()
    if world == 1:
        return torch.device("cuda")
    if (processes := int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))) > torch.cuda.device_count():
        raise RequestError(f"training.device: {processes} processes and {torch.cuda.device_count()} GPUs here")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def resolve_amp_dtype(training: TrainingConfig, device: torch.device) -> torch.dtype | None:
    """The autocast type, None for plain float32."""
    if not training.mixed_precision or (training.amp_dtype == "auto" and device.type == "cpu"):
        return None
    if training.amp_dtype != "auto":
        return getattr(torch, training.amp_dtype)
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def configure_backends(ast: ASTConfig, device: torch.device) -> None:
    """On a GPU: TF32 where float32 remains, and cuDNN autotuning where shapes repeat, for unpacked sparse steps
    have a new one nearly every time."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = ast.pack or ast.mode != "ast" or ast.scoring == "history"
        torch.set_float32_matmul_precision("high")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` that the host does not wait for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def compiled(function: Callable, mode: str) -> Callable:
    """torch.compile for calls of one shape. With reduce-overhead (CUDA graphs) a result lives until the next call."""
    if mode == "off":
        return function
    fast = torch.compile(function, dynamic=False, mode=mode)

    def call(*inputs: Tensor) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return fast(*inputs)

    return call if mode == "reduce-overhead" else fast


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine and commit a result came from; never environment variables."""
    folder = str(Path(__file__).resolve().parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    gpu = {"cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    return {**versions, "cuda": None, "gpu": None, **gpu, "platform": platform.platform(), "git_commit": commit}


IMAGENET_MOMENTS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # of its pixels, 0 to 1


class Normalise:
    """uint8 [batch, 3, H, W] to the float32 the model was built for, and the autocast it runs under."""

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        layout: torch.memory_format,
        dtype: torch.dtype | None,
    ):
        self.mean, self.std = (torch.tensor(v, device=device).mul(255).view(1, 3, 1, 1) for v in (mean, std))
        self.kind, self.layout, self.dtype = device.type, layout, dtype

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.kind, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def __call__(self, images: Tensor) -> Tensor:
        return (images.to(torch.float32, memory_format=self.layout) - self.mean) / self.std


def eval_view(model: nn.Module) -> nn.Module:
    """A second module tree over the same parameters and buffers, in eval mode: nothing to copy or to toggle."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared).eval()


def synchronised(model: nn.Module) -> nn.Module:
    """The model with every BatchNorm over the samples of all ranks; timm's keep the activation that is part of them."""
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(model)


def count_flops(model: nn.Module, image_size: int) -> float:
    """Forward + backward FLOP of one sample, counted on shapes alone (torch.utils.flop_counter)."""
    twin = copy.deepcopy(model).to("meta").train()
    with FlopCounterMode(display=False) as counter:  # two samples: BatchNorm refuses one
        twin(torch.empty(2, 3, image_size, image_size, device="meta")).sum().backward()
    return counter.get_total_flops() / 2


def check_resolution(model: nn.Module, config: ModelConfig, resolution: int) -> None:
    """Raises RequestError where the network takes no images of `resolution` px; tried on shapes alone."""
    twin = copy.deepcopy(model).to("meta").eval()
    try:
        twin(torch.empty(1, 3, resolution, resolution, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise RequestError(f"ast.score_resolution: {config.name} at {resolution} px: {one_line(error)}") from None
