"""A small network that scores samples for a large one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from lab.base.errors import RequestError
from lab.config.sections import ASTConfig, ModelConfig, TrainingConfig
from lab.data.loading import DeviceBatch
from lab.machine.devices import compiled, to_device
from lab.machine.distributed import Dist, merge_gradients
from lab.machine.stateful import Stateful
from lab.method.losses import Loss
from lab.models.building import count_flops, eval_view, get_model
from lab.models.network import Network, shrunk

EVERY = 4  # batches for one that it learns from, scored or of the dense epochs before
LR = 0.003  # of AdamW, at the peak of the schedule that it shares with the network


class AdamW(nn.Module):
    """All weights of a network in one tensor, and AdamW over it, with PyTorch's defaults
    (Loshchilov & Hutter 2019, "Decoupled weight decay regularization").

    So a step is a few operations, however many parameters there are, and compiles together with
    the gradient. A module: CUDA graphs change in place nothing but what a module holds.
    """

    BETAS = (0.9, 0.999)  # what the means of the gradient and of its square keep at a step
    DECAY = 0.01
    EPS = 1e-8

    def __init__(self, model: nn.Module):
        """Moves the parameters of `model` into the tensor: they are views of it from now on."""
        super().__init__()
        self.shapes = {name: each.shape for name, each in model.named_parameters()}
        weights = torch.cat([each.detach().flatten() for each in model.parameters()])
        self.weights = nn.Parameter(weights, requires_grad=False)
        self.register_buffer("mean", torch.zeros_like(weights))
        self.register_buffer("square", torch.zeros_like(weights))
        views = self.named(weights)
        for name, parameter in model.named_parameters():
            parameter.data = views[name]

    def named(self, weights: Tensor) -> dict[str, Tensor]:
        """The parameters by name, views of the one tensor."""
        parts = weights.split([shape.numel() for shape in self.shapes.values()])
        shapes = self.shapes.items()
        return {name: part.view(shape) for part, (name, shape) in zip(parts, shapes, strict=True)}

    def factors(self, lr: float, step: int) -> Tensor:
        """Of step number `step`, from 1: of the weights, of the mean, of the root of the square.
        On the host: a graph takes them as a tensor.
        """
        first, second = (1 - beta**step for beta in self.BETAS)
        return torch.tensor([1 - lr * self.DECAY, -lr / first, second**0.5])

    def step(self, gradient: Tensor, factors: Tensor) -> None:
        """Change the weights."""
        kept, size, scale = factors
        first, second = self.BETAS
        self.mean.lerp_(gradient, 1 - first)
        self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = self.square.sqrt() / scale + self.EPS
        self.weights.mul_(kept).add_(size * self.mean / root)


class Proxy(Stateful):
    """Scores batches for `network`, and learns from one in EVERY of them.

    Coleman et al. 2020, "Selection via proxy: efficient data selection for deep learning", here
    trained beside the network. It computes alike in scoring and in learning: its BatchNorm
    normalises by the batch at hand, so that there are no running averages that processes would have
    to share, and nothing drops out. So the forward that it learns from gives the scores too.
    """

    STATE = ("optimizer", "batches")

    def __init__(self, network: Network, ast: ASTConfig, training: TrainingConfig, dist: Dist):
        """Raises RequestError where `ast.proxy_model` names no network, or one that does not take
        its pictures.
        """
        resolution = ast.score_resolution or network.side
        # the network's random numbers are to be those of a run without a proxy
        with torch.random.fork_rng():
            model = _build(ast.proxy_model, network.classes, resolution)
        flop = count_flops(model, resolution)
        self.model = eval_view(model.to(network.device), batch_statistics=True)
        self.optimizer = AdamW(self.model)
        self.dist = dist
        self.batches = 0  # that it was shown until now
        self.network = network
        self.loss = Loss(training, 0, network.classes, network.device, dist)
        self.shrink = network.shrink(resolution)
        self.scores = network.scoring_forward(resolution, of=self.model, batch_statistics=True)
        self.gradient = compiled(self._gradient, network.compile)
        self.step = compiled(self._step, network.compile)
        # of a sample that it learns from, as a share of the network's training step; of one that
        # it scores, a third
        self.cost = flop / network.base_flop

    def _objective(self, weights: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss of a batch (uint8 [batch, 3, H, W], int64 [batch]), and its scores as of
        `scoring_forward`.
        """
        normalise = self.network.normalise
        images = normalise(shrunk(images, self.shrink))
        with normalise.autocast():
            logits = functional_call(self.model, self.optimizer.named(weights), (images,))
        losses, _ = self.loss(logits.float(), labels)
        significance = self.network.measure(logits.detach(), labels)
        correct = logits.argmax(-1) == labels
        return losses.sum() / max(1, len(labels)), torch.stack([significance, correct.float()])

    def _gradient(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the weights, and the scores."""
        return grad(self._objective, has_aux=True)(self.optimizer.weights, images, labels)

    def _step(self, images: Tensor, labels: Tensor, factors: Tensor) -> Tensor:
        """Score a batch and learn from it, in one call."""
        gradient, scores = self._gradient(images, labels)
        self.optimizer.step(gradient, factors)
        return scores

    @torch.no_grad()
    def learn(self, batch: DeviceBatch, lr_share: float) -> Tensor | None:
        """Count a batch, and train on it where its turn has come. Returns its scores by the weights
        before, as of `scoring_forward`; None where it was not trained on.

        lr_share: the network's learning rate as a share of its peak.
        """
        turn, later = divmod(self.batches, EVERY)
        self.batches += 1
        if later:
            return None
        factors = to_device(self.optimizer.factors(LR * lr_share, turn + 1), batch.labels.device)
        if self.dist.world == 1:
            return self.step(batch.images, batch.labels, factors)
        weights = self.optimizer.weights
        weights.grad, scores = self.gradient(batch.images, batch.labels)
        samples = len(batch.labels)
        merge_gradients([weights], samples, max(1, samples), self.dist)
        self.optimizer.step(weights.grad, factors)
        return scores


def _build(name: str, classes: int, resolution: int) -> nn.Module:
    """The proxy. What is wrong with it is said of `ast.proxy_model`."""
    try:
        return get_model(ModelConfig(name=name), classes, resolution)
    except RequestError as error:
        complaint = str(error).replace("model.name:", "ast.proxy_model:")
        raise RequestError(complaint.replace("dataset.image_size", "a side")) from None
