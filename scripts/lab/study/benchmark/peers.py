"""Training loops as others write them, to compare the lab's own with.

All but the first run in one process alone. The last three run uncompiled, as published.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lab.machine.devices import IMAGENET_MOMENTS, Normalise, configure_backends
from lab.study.benchmark.timing import Loop, Workload

IMAGENET_SAMPLES = 1_281_167  # of the training set: how large a store of scores is


class Bench:
    """What a hand-written script sets up: model, optimizer and scaler.

    `ours`: in the lab's settings (bfloat16, channels_last, fused optimizer). Otherwise float16,
    contiguous memory and an optimizer that is not fused. On a CPU both compute in float32.

    With several processes the model is in DistributedDataParallel, which sends gradients while the
    backward goes on. Gradients are views of its buckets, and each process keeps its own running
    statistics, as in the lab.
    """

    def __init__(self, workload: Workload, ours: bool = True):
        config = workload.config
        device = workload.images.device
        self.kind = device.type
        self.keep = round(config.ast.target_activation * config.training.batch_size)
        configure_backends(True, device)  # every batch has one shape
        layout = torch.channels_last if ours and self.kind == "cuda" else torch.contiguous_format
        model = workload.get_model(
            config.model, config.dataset.num_classes, config.dataset.image_size
        )
        self.model = model.to(device, memory_format=layout).train()
        if workload.dist.world > 1:
            known = inspect.signature(DistributedDataParallel).parameters
            buffers = (
                "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            )  # its old name
            options = {"device_ids": [device] if self.kind == "cuda" else None, buffers: False}
            self.model = DistributedDataParallel(
                self.model, gradient_as_bucket_view=True, **options
            )
        self.dtype = torch.bfloat16 if ours else torch.float16
        self.mixed = self.kind != "cpu"  # as the lab
        fused = True if ours and self.kind == "cuda" else None
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=fused
        )
        self.scaler = torch.amp.GradScaler(self.kind, enabled=self.mixed and not ours)
        self.normalise = Normalise(**IMAGENET_MOMENTS, device=device, layout=layout, dtype=None)

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(self.kind, self.dtype, enabled=self.mixed):
            return self.model(self.normalise(images))

    def step(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


def hand_written_steps(workload: Workload, compiled: str, stored: bool = False) -> Loop:
    """Forward, backward and step with nothing else, in the lab's settings: what a good dense
    training script does.

    `stored`: on the chosen share alone, recording each sample's significance for later epochs.
    """
    bench = Bench(workload)
    images = workload.images
    labels = workload.labels
    store = torch.zeros(IMAGENET_SAMPLES, device=images.device)
    rows = torch.arange(len(labels), device=images.device)

    def loss_of(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = bench.forward(images)
        return F.cross_entropy(logits.float(), labels), workload.significance(
            logits.detach(), labels, 1.0
        )

    fast = loss_of if compiled == "off" else torch.compile(loss_of, dynamic=False, mode=compiled)
    share = workload.config.ast.target_activation if stored else 1.0

    def steps(n: int) -> None:
        for _ in range(max(1, round(share * n))):
            torch.compiler.cudagraph_mark_step_begin()
            loss, scores = fast(images, labels)
            if stored:
                store[rows] = scores
            bench.step(loss)

    return Loop(steps)


def masked(losses: Tensor, scores: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """(mean loss of the `keep` samples with the highest scores, the mask that selects them)."""
    mask = (scores >= scores.topk(keep).values[-1]).float()
    return (losses * mask).sum() / mask.sum(), mask


def masked_loss_steps(workload: Workload, _: str, ours: bool) -> Loop:
    """The masked loss of the published Adaptive Sparse Training code: forward and backward of the
    whole batch, and a second forward for the training accuracy.

    `ours`: in the lab's settings, and without the reads by the host that the published code makes
    each step.
    """
    bench = Bench(workload, ours)
    images = workload.images
    labels = workload.labels

    def steps(n: int) -> None:
        for _ in range(n):
            logits = bench.forward(images)
            losses = F.cross_entropy(logits.float(), labels, reduction="none")
            loss, mask = masked(
                losses, workload.significance(logits.detach(), labels, 1.0), bench.keep
            )
            bench.step(loss)
            with torch.no_grad():
                correct = (bench.forward(images).argmax(-1) == labels).sum()
            if not ours:
                correct.item(), mask.mean().item(), losses.mean().item()

    return Loop(steps)


def two_forward_steps(workload: Workload, _: str, top_k: bool) -> Loop:
    """A forward to score, then a forward to train, in the lab's settings.

    `top_k`: forward and backward of the top share alone (selective backprop). Otherwise of the
    whole batch, the loss masked.
    """
    bench = Bench(workload)
    images = workload.images
    labels = workload.labels

    def steps(n: int) -> None:
        for _ in range(n):
            with torch.no_grad():
                scores = workload.significance(bench.forward(images), labels, 1.0)
            if top_k:
                chosen = scores.topk(bench.keep).indices
                loss = F.cross_entropy(bench.forward(images[chosen]).float(), labels[chosen])
            else:
                losses = F.cross_entropy(bench.forward(images).float(), labels, reduction="none")
                loss, _ = masked(losses, scores, bench.keep)
            bench.step(loss)

    return Loop(steps)
