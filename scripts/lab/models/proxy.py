"""A small network that scores samples for a large one."""

from __future__ import annotations

import torch
from torch import Tensor

from lab.base.errors import RequestError
from lab.config.sections import ModelConfig
from lab.data.loading import DeviceBatch
from lab.machine.devices import compiled
from lab.machine.distributed import Dist, merge_gradients
from lab.machine.stateful import Stateful
from lab.method.losses import Loss
from lab.models.building import count_flops, get_model
from lab.models.network import Network, shrunk, training_forward

LR = 0.003  # of AdamW, at the peak of the schedule that it shares with the network


class Proxy(Stateful):
    """Scores batches for `network`, and learns from every `ast.proxy_every`-th of them.

    Coleman et al. 2020, "Selection via proxy: efficient data selection for deep learning", here
    trained beside the network. Its BatchNorm normalises by the batch at hand, in scoring as in
    training: it keeps no running averages that processes would have to share.
    """

    STATE = ("model", "optimizer", "batches")

    def __init__(self, network: Network, dist: Dist):
        """Raises RequestError where `ast.proxy_model` names no network, or one that does not take
        its pictures.
        """
        config = network.config
        resolution = config.ast.proxy_resolution or config.dataset.image_size
        # the network's random numbers are to be those of a run without a proxy
        with torch.random.fork_rng():
            try:
                model = get_model(
                    ModelConfig(name=config.ast.proxy_model), network.classes, resolution
                )
            except RequestError as error:
                named = (
                    str(error)
                    .replace("model.name:", "ast.proxy_model:")
                    .replace("dataset.image_size", "a side")
                )
                raise RequestError(named) from None
        flop = count_flops(model, resolution)
        self.model = model.to(network.device, memory_format=network.normalise.layout).train()
        self.dist = dist
        self.every = config.ast.proxy_every
        self.batches = 0  # scored until now
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LR, fused=network.device.type == "cuda" or None
        )
        self.shrink = network.shrink(resolution)
        self.scores = network.scoring_forward(resolution, of=self.model, batch_statistics=True)
        loss = Loss(config.training, 0, network.classes, network.device, dist)
        step = training_forward(self.model, network.normalise, network.measure, loss)
        self.forward = compiled(step, config.training.compile_scoring or config.training.compile)
        # of a scored sample, its part of the proxy's own training included, as a share of the
        # network's training step
        self.cost = flop / network.base_flop * (1 / 3 + 1 / self.every)

    def add_gradient(self, images: Tensor, labels: Tensor) -> int:
        """Forward and backward over a batch (uint8 [batch, 3, H, W], int64 [batch]). Returns what
        the sum of the losses was divided by.
        """
        samples = max(1, len(labels))
        objective = self.forward(shrunk(images, self.shrink), labels)[0]
        (objective / samples).backward()
        return samples

    def learn(self, batch: DeviceBatch, lr_share: float) -> None:
        """Count a scored batch, and train on it where its turn has come.

        lr_share: the network's learning rate as a share of its peak.
        """
        self.batches += 1
        if (self.batches - 1) % self.every:
            return
        samples = self.add_gradient(batch.images, batch.labels)
        if self.dist.world > 1:
            merge_gradients(
                list(self.model.parameters()), len(batch.labels), samples, None, self.dist
            )
        for group in self.optimizer.param_groups:
            group["lr"] = LR * lr_share
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
