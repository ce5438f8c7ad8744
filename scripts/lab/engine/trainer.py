"""What a training step does: forward, backward, and the optimizer step at the end of a window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lab.config.sections import TrainingConfig
from lab.data.loading import DeviceBatch
from lab.engine.optimizer import build_optimizer
from lab.machine.distributed import Dist, merge_gradients
from lab.machine.stateful import Stateful
from lab.method.schedule import Schedule
from lab.models.forward_once import Rows
from lab.models.network import Network, StepResult
from lab.models.reuse import ReusedForward, result_of


class Trainer(Stateful):
    """Forward, backward and optimizer step, with gradient accumulation.

    An accumulation window is `grad_accum_steps` forwards; its gradient is the mean over all of its
    samples, however many each forward had. Losses are summed and divided by `window_divisor`, the
    sample count of the first forward; `optimizer_step` corrects that to the count of the whole
    window, on all processes.
    """

    STATE = ("window_forwards", "optimizer", "scaler", "loss")
    LOCAL = ("window_samples", "window_divisor", "window_reused")

    def __init__(self, network: Network, training: TrainingConfig, schedule: Schedule, dist: Dist):
        self.network = network
        self.training = training
        self.schedule = schedule
        self.loss = network.loss
        self.dist = dist
        self.device = network.device
        self.parameters = [p for p in network.model.parameters() if p.requires_grad]
        # CUDA graphs write gradients where the last replay wrote them: what accumulates must lie
        # elsewhere
        self.keeps_gradients = (
            training.compile == "reduce-overhead" and training.grad_accum_steps > 1
        )
        if self.keeps_gradients:
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)
        in_float16 = network.amp_dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=in_float16)
        self.optimizer = build_optimizer(network.model, training, self.device)
        self.window_samples = 0
        self.window_divisor = 0
        self.window_reused = 0  # samples that went through `backward_rows`
        self.window_forwards = 0

    def train_step(
        self, batch: DeviceBatch, weights: torch.Tensor | None, epoch: int, step: int
    ) -> StepResult | None:
        """Forward and backward over a batch, added to the window's gradient.

        weights: float32 [batch], of the losses; None: all 1. epoch, step: for what is drawn at
        random. Returns None where there is nothing to do. Of pictures that are mixed nothing is
        remembered (`Network.seer`), and no step weighs them.
        """
        n = len(batch.labels)
        # synchronised BatchNorm needs every rank, even one without samples
        if n == 0 and not self.network.synced:
            return None
        inputs = (batch.images, batch.labels)
        memory = self.loss.recall(batch.indices)
        mixes = self.network.mixes(epoch, step)
        if mixes:
            *inputs, memory = self.network.mixing(*inputs, epoch, step, memory)
            weights = None
        result = self.network.forward(*inputs, weights, memory)
        if memory is not None and not mixes:
            self.loss.remember(batch.indices, result.memory)
        # synchronised, a sample's loss reaches the gradients of other ranks: all divide alike
        divisor = self.window_divisor or max(1, n)
        self.change_divisor(self.network.local_batch if self.network.synced else divisor)
        self.scaler.scale(result.objective / self.window_divisor).backward()
        self.window_samples += n
        return result

    def backward_rows(
        self, forward: ReusedForward, told: Rows, batch: DeviceBatch, rows: torch.Tensor
    ) -> StepResult:
        """Backward of some rows of a batch that was forwarded whole, added to the window's
        gradient.

        told: of the whole batch. rows: int64, at least one. batch: those rows, without pictures.
        """
        n = len(rows)
        result = result_of(told, rows, batch.labels, batch.weights)
        if result.memory is not None:
            self.loss.remember(batch.indices, result.memory)
        self.change_divisor(self.window_divisor or n)
        weights = batch.weights
        if weights is None:
            weights = torch.ones(n, device=self.device)
        forward.backward(rows, self.scaler.scale(weights / self.window_divisor))
        self.window_samples += n
        self.window_reused += n
        return result

    def change_divisor(self, divisor: int) -> None:
        """Rescale the window's gradient so far to that of the summed loss over `divisor`."""
        if self.window_divisor not in (0, divisor):
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(self.window_divisor / divisor)
        self.window_divisor = divisor

    def window_open(self) -> bool:
        """Whether any process has samples in the window. Collective."""
        return bool(self.dist.all_gather([self.window_samples]).any())

    def merge_gradients(self) -> None:
        """Make the gradient the mean over the window's samples of all processes."""
        if self.dist.world == 1:
            self.change_divisor(self.window_samples)
        else:
            merge_gradients(self.parameters, self.window_samples, self.window_divisor, self.dist)

    def optimizer_step(self) -> int | None:
        """Step on the mean gradient of the window, and clear it. The schedule advances by the loop
        steps it took.

        Returns the number of this process's samples; None where the GradScaler skipped the step for
        an overflow in float16, which moves neither the weights nor the schedule.
        """
        self.merge_gradients()
        lr = self.schedule.next_lr()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)  # see training.layer_decay
        if self.training.grad_clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.model.parameters(), self.training.grad_clip_norm)
        scale = self.scaler.get_scale()  # a device read, in float16 alone
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.clear_gradients()
        applied = self.scaler.get_scale() >= scale
        self.schedule.close_window(applied)
        samples = self.window_samples
        self.window_samples = 0
        self.window_divisor = 0
        self.window_reused = 0
        return samples if applied else None

    def clear_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=not self.keeps_gradients)

    def local_state(self) -> dict[str, Any]:
        gradients = [p.grad for p in self.parameters] if self.window_samples else None
        return {**super().local_state(), "gradients": gradients}

    def load_local_state(self, state: dict[str, Any]) -> None:
        super().load_local_state(state)
        if state["gradients"] is None:
            return
        for parameter, gradient in zip(self.parameters, state["gradients"], strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(gradient)

    def merged(self, states: Sequence[dict[str, Any]], rank: int) -> dict[str, Any]:
        """Rank 0 goes on with the mean gradient of all open windows, the others with none."""
        samples = sum(each["window_samples"] for each in states) if rank == 0 else 0
        reused = sum(each["window_reused"] for each in states) if rank == 0 else 0
        return {
            "window_samples": samples,
            "window_divisor": samples,
            "window_reused": reused,
            "gradients": window_gradients(states, samples) if samples else None,
        }


def window_gradients(states: Sequence[dict[str, Any]], samples: int) -> list[torch.Tensor | None]:
    """The mean over the window's `samples` of all processes, a tensor a parameter; None where it
    has no gradient. states: of their trainers.
    """
    windows = [each for each in states if each["gradients"] is not None]
    divisors = [each["window_divisor"] for each in windows]
    merged = []
    for gradients in zip(*(each["gradients"] for each in windows), strict=True):
        sums = [
            divisor * gradient
            for divisor, gradient in zip(divisors, gradients, strict=True)
            if gradient is not None
        ]
        merged.append(sum(sums) / samples if sums else None)
    return merged
