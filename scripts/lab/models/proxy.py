"""A small network that scores samples for a large one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lab.base.errors import RequestError
from lab.config.sections import ASTConfig, ModelConfig, TrainingConfig
from lab.data.loading import DeviceBatch
from lab.machine.devices import compiled
from lab.machine.distributed import Dist, merge_gradients
from lab.machine.stateful import Stateful
from lab.method.losses import Loss
from lab.models.building import count_flops, get_model
from lab.models.network import Network, shrunk, training_forward

EVERY = 4  # batches for one that it learns from, scored or of the dense epochs before
LR = 0.003  # of AdamW, at the peak of the schedule that it shares with the network


class Proxy(Stateful):
    """Scores batches for `network`, and learns from one in EVERY of them.

    Coleman et al. 2020, "Selection via proxy: efficient data selection for deep learning", here
    trained beside the network. Its BatchNorm normalises by the batch at hand, in scoring as in
    training: it keeps no running averages that processes would have to share.
    """

    STATE = ("model", "optimizer", "batches")

    def __init__(self, network: Network, ast: ASTConfig, training: TrainingConfig, dist: Dist):
        """Raises RequestError where `ast.proxy_model` names no network, or one that does not take
        its pictures.
        """
        resolution = ast.score_resolution or network.side
        # the network's random numbers are to be those of a run without a proxy
        with torch.random.fork_rng():
            model = _build(ast.proxy_model, network.classes, resolution)
        flop = count_flops(model, resolution)
        self.model = model.to(network.device, memory_format=network.normalise.layout).train()
        self.dist = dist
        self.batches = 0  # that it was shown until now
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LR, fused=network.device.type == "cuda" or None
        )
        self.shrink = network.shrink(resolution)
        self.scores = network.scoring_forward(resolution, of=self.model, batch_statistics=True)
        loss = Loss(training, 0, network.classes, network.device, dist)
        step = training_forward(self.model, network.normalise, network.measure, loss)
        self.forward = compiled(step, network.compile)
        # of a sample that it learns from, as a share of the network's training step; of one that
        # it scores, a third
        self.cost = flop / network.base_flop

    def add_gradient(self, images: Tensor, labels: Tensor) -> int:
        """Forward and backward over a batch (uint8 [batch, 3, H, W], int64 [batch]). Returns what
        the sum of the losses was divided by.
        """
        samples = max(1, len(labels))
        step = self.forward(shrunk(images, self.shrink), labels)
        (step.objective / samples).backward()
        return samples

    def learn(self, batch: DeviceBatch, lr_share: float) -> int:
        """Count a batch, and train on it where its turn has come. Returns the number of samples
        trained on.

        lr_share: the network's learning rate as a share of its peak.
        """
        self.batches += 1
        if (self.batches - 1) % EVERY:
            return 0
        samples = self.add_gradient(batch.images, batch.labels)
        if self.dist.world > 1:
            merge_gradients(list(self.model.parameters()), len(batch.labels), samples, self.dist)
        for group in self.optimizer.param_groups:
            group["lr"] = LR * lr_share
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return len(batch.labels)


def _build(name: str, classes: int, resolution: int) -> nn.Module:
    """The proxy. What is wrong with it is said of `ast.proxy_model`."""
    try:
        return get_model(ModelConfig(name=name), classes, resolution)
    except RequestError as error:
        complaint = str(error).replace("model.name:", "ast.proxy_model:")
        raise RequestError(complaint.replace("dataset.image_size", "a side")) from None
