"""AST-LAB: Adaptive Sparse Training for image classification. The method is in this file, its
plumbing in `lab/`.

Run it:
    python scripts/train_ast.py --config configs/digits_smoke.yaml
    python scripts/train_ast.py --config configs/cifar10_resnet18_ast.yaml ast.target_activation=0.5
    python scripts/run_experiment.py --config configs/imagenet_resnet50_ast.yaml \\
        --epochs 50 --target-activation 0.3
    torchrun --nproc-per-node 8 scripts/train_ast.py --config configs/imagenet_resnet50_ast.yaml

The law: a sample is active, and only then back-propagated, where
    loss + entropy_weight * entropy(logits) > threshold
and after every step, with error = activation - target,
    threshold += (kp * error + ki * sum of errors) * spread.
A run writes <output_dir>/final_results_<timestamp>.json and, if asked, one JSON line an epoch. What
it needs to go on bit for bit after an interruption (`run_experiment.py --resume auto`) is in
<output_dir>/checkpoints/<run>/last.pt.

To add a measure of significance: one function and one line of MEASURES. A rule of selection: one
class and one line of SELECTIONS. A data set: one class and one line of DATASETS.
"""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lab.config.loading
from lab.base.console import print_rank0, step_bar
from lab.base.errors import RequestError, one_line
from lab.base.files import user_text
from lab.config.loading import Config, checkpoint_folder, first_complaint, require_known
from lab.config.sections import ASTConfig, DatasetConfig
from lab.data.cache.loaders import Split, cached_loaders, prepare_caches
from lab.data.datasets import (
    DigitsDataset,
    FolderDataset,
    ImageDataset,
    ReadErrors,
    measure_moments,
)
from lab.data.hf import HFDataset
from lab.data.images import Augmentation
from lab.data.loading import (
    DeviceBatch,
    EpochPlan,
    Loader,
    ScoreAhead,
    Scores,
    device_batches,
    loader_options,
    loader_processes,
)
from lab.data.queue import ActiveQueue
from lab.data.randomness import UNIFORMS_PER_SAMPLE, label_shifts, random_subset, uniform
from lab.engine.checkpoint import claimed, find_checkpoint, load_checkpoint
from lab.engine.checks import check_start
from lab.engine.optimizer import build_optimizer, copies_of_weights, lr_at
from lab.engine.state import reduce_to_rank0, resume_run, run_state, warm_up
from lab.machine.clock import Clock, Stop, explained
from lab.machine.devices import configure_backends, resolve_device, seed_rank, to_device
from lab.machine.distributed import Dist, average_running_statistics, meet, merge_gradients
from lab.machine.meters import ClassCounts, Ledger, Meter
from lab.machine.stateful import Stateful
from lab.machine.workers import WorkerLoader, ending_workers
from lab.method.labels import FORGET_FROM, REVISIT, doubted
from lab.method.sample_store import SampleStore, Visit
from lab.method.selecting import (
    ACTIVE,
    EXPLORED,
    LEFT_OUT,
    REVISITED,
    Choice,
    auto_target,
    choose_by_mean,
    choose_by_threshold,
    first_target,
    highest,
    out_of_reach,
    plateau,
    top_up,
    with_ties,
)
from lab.method.times_trained import TimesTrained
from lab.models.building import check_resolution, get_model
from lab.models.network import Network
from lab.models.proxy import Proxy
from lab.outputs.banner import announce, say_if_long
from lab.outputs.log import Outputs, live_figures, open_tensorboard, prepare_outputs
from lab.outputs.result import build_result, count_diet
from lab.outputs.suspects import Suspects
from lab.outputs.tables import epoch_line, of_all
from lab.study.cli import RESUME_HELP, command_parser, run_cli

# ------------------------------------------------------------------------------------ PI controller


@dataclass
class PIController(Stateful):
    """Holds the activation rate at `target` by moving the threshold (discrete PI control of its
    increment).

    error = activation - target, so that too many active samples raise the threshold: threshold +=
    (kp * error + ki * sum of errors) * spread, kept within [min_threshold, max_threshold].
    Anti-windup by conditional integration (Astrom & Hagglund, "PID Controllers", 1995, section
    3.5): the sum does not grow while the threshold sits on a bound and the error pushes it further
    out, and is cleared there if it pushes too.
    """

    STATE: ClassVar[tuple[str, ...]] = ("threshold", "integral", "epoch", "frozen")

    target: float  # share of samples to be active
    kp: float = 0.1
    ki: float = 0.01
    min_threshold: float = 0.0  # nats
    max_threshold: float = math.inf
    kp_warmup_epochs: float = 0
    ki_warmup_epochs: float = 0
    threshold: float | None = None  # nats; None until `start`
    integral: float = 0.0  # sum of errors
    epoch: float = 0.0  # sparse epochs so far, with fraction: drives the ramps
    frozen: bool = False  # in dense phases

    @classmethod
    def from_config(cls, ast: ASTConfig) -> PIController:
        gains = ast.model_dump(
            include={"kp", "ki", "min_threshold", "kp_warmup_epochs", "ki_warmup_epochs"}
        )
        threshold = None if ast.initial_threshold == "auto" else ast.initial_threshold
        return cls(target=first_target(ast), threshold=threshold, **gains)

    def start(self, threshold: float) -> None:
        """Begin at `threshold` (nats) with no memory of earlier errors."""
        self.threshold = min(max(threshold, self.min_threshold), self.max_threshold)
        self.integral = 0.0

    def gains(self) -> tuple[float, float]:
        """kp and ki now: each rises linearly from 0 over its warm-up."""
        kp = (
            self.kp * min(1.0, self.epoch / self.kp_warmup_epochs)
            if self.kp_warmup_epochs
            else self.kp
        )
        ki = (
            self.ki * min(1.0, self.epoch / self.ki_warmup_epochs)
            if self.ki_warmup_epochs
            else self.ki
        )
        return kp, ki

    def update(self, activation: float, spread: float = 1.0) -> float:
        """One control step: the new threshold after a batch of which a share `activation` was
        active.
        """
        if self.frozen:
            return self.threshold
        error = activation - self.target
        outward = (error > 0 and self.threshold >= self.max_threshold) or (
            error < 0 and self.threshold <= self.min_threshold
        )
        if not outward:
            self.integral += error
        elif self.integral * error > 0:  # wound up on the way to the bound
            self.integral = 0.0
        kp, ki = self.gains()
        moved = self.threshold + (kp * error + ki * self.integral) * spread
        self.threshold = min(max(moved, self.min_threshold), self.max_threshold)
        return self.threshold


# ------------------------------------------------------------------------------------- Significance


def per_sample_entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of softmax(logits), nats, in float32. [batch, classes] -> [batch]."""
    return torch.special.entr(logits.float().softmax(-1)).sum(-1)


def significance(logits: Tensor, labels: Tensor, entropy_weight: float) -> Tensor:
    """Cross-entropy + entropy_weight * entropy, nats, in float32. [batch, classes], [batch] ->
    [batch].
    """
    logits = logits.float()
    return F.cross_entropy(logits, labels, reduction="none") + entropy_weight * per_sample_entropy(
        logits
    )


Measure = Callable[[Tensor, Tensor, float], Tensor]
MEASURES: dict[str, Measure] = {"loss_entropy": significance}  # ast.measure


class Active(NamedTuple):
    indices: Tensor  # int64 [active], ascending: the samples to train on
    activation: float  # share of the scores above the threshold, before the min_active floor
    iqr: float  # inter-quartile range of the scores, nats


def select_active(scores: Tensor, threshold: float, min_active: int = 0) -> Active:
    """The samples whose score is above `threshold`, or the top `min_active` where those are fewer.

    scores: [batch], nats, finite. The active samples are the top k of one stable sort, so of equal
    scores the earlier sample comes first.
    """
    n = len(scores)
    ranked, order = scores.sort(descending=True, stable=True)
    above = (scores > threshold).sum()
    count, upper, lower = torch.stack(
        [above.float(), ranked[n // 4], ranked[(3 * n) // 4]]
    ).tolist()
    k = min(max(int(count), min_active), n)
    return Active(order[:k].sort().values, count / n, upper - lower)


# ---------------------------------------------------------------------------------------- Selection


class Scorer(NamedTuple):
    """How a rule has samples scored before it chooses among them."""

    forward: Callable[
        [Tensor, Tensor], Tensor
    ]  # images, labels -> float32 [2, batch], see `Network.scoring_forward`
    cost: float  # of a scored sample, as a share of a training forward + backward
    is_model: (
        bool  # whether its predictions are the trained network's: then they count for train_acc
    )
    on_device: bool = (
        False  # whether the rule chooses on the device: the host does not wait for the scores
    )


class Selection(Stateful):
    """Which samples a step trains on. This class is dense training: all of them.

    A rule overrides what it needs. It may have every loaded batch scored (`scorer`, `choose`), or
    decide before loading (`start_epoch`, `mask`), or weigh and record what is trained on
    (`weights`, `record`). Scoring ahead, packing, counting, the learning rate's pace and scores
    that are not finite are no rule's business.
    """

    STATE = (
        "activations",
        "thresholds",
        "controller",
        "target",
        "store",
        "kinds",
        "believed",
        "forgotten",
    )
    KEEPS_SCORES: ClassVar[bool] = False  # whether it chooses by stored scores
    CHOOSES_BEFORE_LOADING: ClassVar[bool] = False  # whether a sparse epoch loads a share alone
    PLANNED_SHARE: ClassVar[float | None] = (
        None  # that share, as the schedule expects it; None: the target activation
    )

    def __init__(self, config: Config, samples: int, device: torch.device, dist: Dist):
        """samples: how many indices the training set has."""
        self.config = config
        self.device = device
        self.dist = dist
        self.target = first_target(config.ast)  # share of the samples to be active in this epoch
        self.controller = PIController.from_config(config.ast)  # frozen in dense epochs
        self.activations: list[float] = []  # of this epoch's sparse steps: shares of 0 to 1
        self.thresholds: list[
            float | Tensor
        ] = []  # likewise, nats; a tensor is read at the end of the epoch
        self.told = False  # that the target is out of reach
        rate = config.ast.forget_rate if config.ast.mode == "ast" else 0.0
        doubts = rate == "auto" or (rate > 0 and self.KEEPS_SCORES)
        self.forgotten = (
            0.0 if doubts else None
        )  # share of the samples that this epoch leaves out for their labels
        self.store = SampleStore(samples, device, dist, doubts) if self.remembers(config) else None
        kept = samples if self.store else 0
        self.kinds = torch.ones(
            kept, dtype=torch.uint8, device=device
        )  # what this epoch does with each, by index
        self.believed = torch.ones(
            kept, dtype=torch.uint8
        )  # before a choice: ACTIVE, LEFT_OUT or REVISITED

    @classmethod
    def check(cls, config: Config) -> None:
        """Raises ValueError naming the key where the config does not suit this rule."""

    @classmethod
    def remembers(cls, config: Config) -> bool:
        """Whether it stores what each sample was worth when it was last trained on."""
        return cls.KEEPS_SCORES or (config.ast.mode == "ast" and config.ast.forget_rate == "auto")

    @classmethod
    def scores_batches(cls) -> bool:
        """Whether loaded batches are scored: then each has another number of active samples."""
        return cls.scorer is not Selection.scorer

    def scorer(self, network: Network) -> Scorer | None:
        """Asked once. None: nothing is scored before training."""
        return None

    def is_sparse(self, epoch: int) -> bool:
        """Whether `epoch` trains on a selection: as the config says, and with a target of auto
        where that pays.
        """
        return self.config.is_sparse(epoch) and not (
            self.config.ast.target_activation == "auto" and self.target == 1
        )

    def forget(self, epoch: int, order: np.ndarray, progress: float) -> None:
        """Before an epoch of any kind, leave out the samples whose label is not believed
        (`ast.forget_rate: auto`).

        A few of them, drawn by the seed, the epoch and the index, are looked at again, with weight
        0. A sample comes back once the network predicts its label. progress: of the schedule, 0 to
        1.
        """
        if self.forgotten is None:
            return
        self.forgotten = 0.0
        if self.config.ast.forget_rate != "auto" or progress < FORGET_FROM:
            return
        out = doubted(self.store.on_host(), self.believed.numpy() != ACTIVE, progress)
        again = (
            np.random.default_rng((self.config.training.seed, epoch, 2)).random(len(out)) < REVISIT
        )
        self.believed.copy_(torch.from_numpy(np.where(out, again * REVISITED, ACTIVE)))
        self.forgotten = float(out[order].mean())

    def start_epoch(self, epoch: int, order: np.ndarray) -> None:
        """Begin a sparse epoch. order: int64, all indices in the order of the epoch."""
        self.activations = []
        self.thresholds = []
        self.controller.frozen = False
        self.controller.target = self.target
        self.kinds.copy_(self.believed)

    def start_dense_epoch(self) -> None:
        self.activations = []
        self.thresholds = []
        self.controller.frozen = True
        self.kinds.copy_(self.believed)

    def end_epoch(self, train_acc: float | None, scorer: Scorer | None) -> None:
        """With a target of auto, set the next epoch's by how many predictions of this one were
        right. Collective.

        train_acc: percent.
        """
        if self.config.ast.target_activation != "auto" or scorer is None:
            return
        if train_acc is not None:
            # a proxy's choice leaves the network without a prediction of the others: they count as
            # right
            seen = 1.0 if scorer.is_model else self.target
            self.target = auto_target(seen * (1 - train_acc / 100), scorer.cost)
        self.target = self.dist.broadcast(self.target)

    def mask(self) -> np.ndarray | None:
        """uint8 by index, nonzero for the samples that this epoch loads; None: the planned number
        of them.
        """
        return None if self.store is None else self.kinds.cpu().numpy()

    def choose(self, scores: Tensor) -> Tensor:
        """The active samples, int64, ascending, by the scores [batch] (nats, finite, of all ranks,
        on the host).
        """
        return torch.arange(len(scores), device=scores.device)

    def observe(self, batch: DeviceBatch, lr_share: float) -> None:
        """Learn from a whole batch that was scored. lr_share: the learning rate as a share of its
        peak.
        """

    def warm_up(self, images: Tensor, labels: Tensor) -> None:
        """Compile what the rule itself computes."""

    def weights(self, batch: DeviceBatch) -> Tensor | None:
        """Of each sample's loss, float32 [batch]. None: all 1, and nothing is recorded."""
        return None if self.store is None else (self.kinds[batch.indices] != REVISITED).float()

    def record(self, batch: DeviceBatch, visit: Visit, epoch: int) -> None:
        """Learn from a training step what it says of its samples. On the device."""
        if self.store is not None:
            self.store.record(batch.indices, visit, epoch)

    def suspects(self, dataset: ImageDataset) -> Suspects | None:
        """The samples whose labels may be wrong, where `ast.forget_rate` asks for them.
        Collective.
        """
        if self.forgotten is None:
            return None
        columns = self.store.on_host()
        rate = self.config.ast.forget_rate
        out = (
            self.believed.numpy() != ACTIVE
            if rate == "auto"
            else highest(columns["significance"], rate)
        )
        return Suspects(dataset, columns, out)

    def alike(self) -> list[float]:
        """Numbers that every process must have alike."""
        return [self.controller.threshold or 0.0, self.controller.integral]


class RandomShare(Selection):
    """The control: a random share, drawn before loading (by the epoch's plan), through the same
    loop.
    """

    CHOOSES_BEFORE_LOADING = True


class BatchThreshold(Selection):
    """Scores every loaded sample by a forward; active are those above a threshold that a PI
    controller moves.
    """

    STATE = (*Selection.STATE, "streak", "iqr")
    CHOOSES_ON_DEVICE: ClassVar[bool] = False

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.streak = 0.0  # log probability of the current run of all or none active
        self.iqr: float | None = None  # running inter-quartile range of the scores, nats

    def scorer(self, network: Network) -> Scorer:
        side = self.config.dataset.image_size
        resolution = self.config.ast.score_resolution or side
        forward = network.scorer
        if resolution != side:
            check_resolution(network.model, self.config.model, resolution)
        batch_statistics = self.config.ast.score_statistics == "batch"
        if resolution != side or batch_statistics:
            forward = network.scoring_forward(resolution, batch_statistics=batch_statistics)
        return Scorer(
            forward,
            cost=(resolution / side) ** 2 / 3,
            is_model=True,
            on_device=self.CHOOSES_ON_DEVICE,
        )

    def choose(self, scores: Tensor) -> Tensor:
        ast = self.config.ast
        controller = self.controller
        shared = plateau(scores.numpy(), self.target) if ast.kp or ast.ki else None
        if shared is not None and controller.threshold != shared:
            controller.start(shared)
        if controller.threshold is None:  # after a dense phase, or lost: see below
            controller.start(torch.quantile(scores, 1 - self.target).item())
        active = select_active(scores, controller.threshold, ast.min_active)
        expected = active.activation
        if shared is not None:
            uniforms = self.uniforms(len(scores))
            ties = with_ties(
                scores.numpy(), controller.threshold, self.target, uniforms, ast.min_active
            )
            active = Active(torch.from_numpy(ties.indices), ties.activation, active.iqr)
            expected = ties.expected
        self.activations.append(active.activation)
        self.thresholds.append(controller.threshold)
        self.iqr = active.iqr if self.iqr is None else 0.9 * self.iqr + 0.1 * active.iqr
        controller.update(expected, self.iqr if ast.threshold_unit == "iqr" else 1.0)
        if ast.initial_threshold == "auto" and self.is_lost(active.activation, len(scores)):
            controller.threshold = (
                None  # the scores have left the threshold behind: start again from their quantile
            )
        return active.indices

    def uniforms(self, samples: int) -> np.ndarray:
        """A random number of each sample of the batch, by the seed, the epoch and the sample's
        place in its order.
        """
        places = len(self.activations) * samples + torch.arange(samples)
        return uniform(self.config.training.seed, math.floor(self.controller.epoch), places, 1)[
            :, 0
        ].numpy()

    def is_lost(self, activation: float, samples: int) -> bool:
        """Whether so many samples in a row were all active, or all inactive, that chance (1e-6)
        cannot explain it.
        """
        odds = {0.0: 1 - self.target, 1.0: self.target}.get(activation, 1.0)
        self.streak = self.streak + samples * math.log(odds) if 0 < odds < 1 else 0.0
        lost = self.streak < math.log(1e-6)
        self.streak = 0.0 if lost else self.streak
        return lost


class TopShare(BatchThreshold):
    """The largest scores of each batch, a fixed share (Kawaguchi & Lu 2020, "Ordered SGD").

    Their number is known beforehand, so the device chooses and the host does not wait. The scores
    are always fresh. The threshold that it reports is the lowest score of that share.
    """

    CHOOSES_ON_DEVICE = True

    def choose(self, scores: Tensor) -> Tensor:
        top = max(1, round(self.target * len(scores)))
        ranked, order = scores.sort(descending=True, stable=True)
        self.activations.append(top / len(scores))
        self.thresholds.append(ranked[top - 1])
        return order[: max(top, self.config.ast.min_active)].sort().values


class ProxyScores(BatchThreshold):
    """Scores every loaded sample by a small network beside the large one; see
    `lab.models.proxy`.
    """

    STATE = (*BatchThreshold.STATE, "proxy")

    @classmethod
    def check(cls, config: Config) -> None:
        resolution = config.ast.proxy_resolution
        side = config.dataset.image_size
        first_complaint(
            (
                resolution and resolution > side,
                f"ast.proxy_resolution: larger than dataset.image_size={side}",
            ),
            (
                config.ast.score_resolution,
                "ast.score_resolution: with ast.scoring=proxy it is ast.proxy_resolution",
            ),
        )

    def scorer(self, network: Network) -> Scorer:
        self.proxy = Proxy(network, self.dist)
        return Scorer(
            self.proxy.scores, self.proxy.cost, is_model=False, on_device=self.CHOOSES_ON_DEVICE
        )

    def observe(self, batch: DeviceBatch, lr_share: float) -> None:
        self.proxy.learn(batch, lr_share)

    def warm_up(self, images: Tensor, labels: Tensor) -> None:
        self.proxy.add_gradient(images, labels)
        self.proxy.optimizer.zero_grad()


class ProxyTopShare(ProxyScores, TopShare):
    """The largest scores of each batch by the proxy."""


class HistoryThreshold(Selection):
    """Decides before loading, by each sample's significance when it was last trained on.

    A PI controller holds the share of active and explored samples at the target.
    """

    KEEPS_SCORES = CHOOSES_BEFORE_LOADING = True

    def __init__(self, config: Config, samples: int, device: torch.device, dist: Dist):
        super().__init__(config, samples, device, dist)
        self.explored_weight = (
            min(config.ast.explore_weight_cap, 1 / config.ast.explore)
            if config.ast.explore
            else 1.0
        )

    @classmethod
    def check(cls, config: Config) -> None:
        ast = config.ast
        crowded = ast.explore >= ast.target_activation
        too_few = cls.fixed_rate(ast) + ast.target_activation > 1 + 1e-9
        biased = ast.explore == 0 and ast.explore_weight_cap > 1
        first_complaint(
            (
                crowded,
                (
                    f"ast.explore: {ast.explore:g} or more of all samples, and "
                    f"ast.target_activation is no larger"
                ),
            ),
            (
                too_few,
                (
                    f"ast.forget_rate: leaves fewer than "
                    f"ast.target_activation={ast.target_activation:g} of the samples"
                ),
            ),
            (
                biased,
                (
                    "ast.explore_weight_cap: with ast.explore=0 no weight makes up for the "
                    "samples left out"
                ),
            ),
        )
        cls.check_scoring(config)

    @staticmethod
    def fixed_rate(ast: ASTConfig) -> float:
        """The share that is left out of each choice; with `auto` samples are left out before it."""
        return 0.0 if ast.forget_rate == "auto" else ast.forget_rate

    @classmethod
    def check_scoring(cls, config: Config) -> None:
        """Raises ValueError for settings of a forward that scores, which stored scores do
        without.
        """
        unused = config.ast.score_resolution
        first_complaint(
            (unused, "ast.score_resolution: ast.scoring=history makes no forward to score")
        )

    def start_epoch(self, epoch: int, order: np.ndarray) -> None:
        super().start_epoch(epoch, order)
        self.controller.epoch = float(epoch - self.config.ast.warmup_epochs)
        uniforms = np.random.default_rng((self.config.training.seed, epoch, 1)).random(
            len(order), dtype=np.float32
        )
        believed = self.believed.numpy()
        kept = believed[order] == ACTIVE  # the target is a share of these
        scores = self.store.scores(order)[kept]
        ast = self.config.ast
        world = self.dist.world
        choice = self.choose_epoch(scores, uniforms[kept])
        self.activations = [int(np.count_nonzero(choice.kinds)) / len(scores)]
        self.thresholds = [choice.threshold]
        rate = self.fixed_rate(ast)
        if rate:
            self.forgotten = float((highest(scores, rate) & (choice.kinds == LEFT_OUT)).mean())
        floor = (
            ast.min_active
            if world == 1
            else min(1, ast.min_active) * max(ast.min_active, 2 * world)
        )
        choice.kinds[top_up(choice.kinds, scores, floor, rate)] = ACTIVE
        kinds = np.where(believed == REVISITED, REVISITED, LEFT_OUT)
        kinds[order[kept]] = choice.kinds
        self.kinds.copy_(torch.from_numpy(kinds))

    def choose_epoch(self, scores: np.ndarray, uniforms: np.ndarray) -> Choice:
        """scores: float32 [n], nats, in the order of the epoch. uniforms: float32 [n], a random
        number of each.
        """
        ast = self.config.ast
        batch = self.config.training.batch_size
        if ast.target_activation == 1:
            return Choice(np.full(len(scores), ACTIVE), ast.min_threshold)
        in_iqr = ast.threshold_unit == "iqr"
        rest = (
            (uniforms - ast.explore) / (1 - ast.explore) if ast.kp or ast.ki else None
        )  # of those not explored
        drawn = uniforms < ast.explore
        return choose_by_threshold(
            scores, drawn, self.controller, batch, in_iqr, self.fixed_rate(ast), rest
        )

    def weights(self, batch: DeviceBatch) -> Tensor:
        return torch.where(
            self.kinds[batch.indices] == EXPLORED, self.explored_weight, super().weights(batch)
        )


class InfoBatch(HistoryThreshold):
    """Drops half of the samples below the mean loss, and counts the other half of them twice; see
    `choose_by_mean`.
    """

    # how many are below the mean shows at each epoch's start; the plan takes half of them for it
    PLANNED_SHARE = 0.75

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.explored_weight = 2.0

    @classmethod
    def check(cls, config: Config) -> None:
        ast = config.ast
        first_complaint(
            (ast.entropy_weight, "ast.entropy_weight: 0 for ast.rule=infobatch, the loss alone"),
            (
                ast.anneal_epochs,
                "ast.anneal_epochs: 0 for ast.rule=infobatch, its own is an eighth",
            ),
        )
        cls.check_scoring(config)

    def choose_epoch(self, scores: np.ndarray, uniforms: np.ndarray) -> Choice:
        return choose_by_mean(scores, uniforms < 0.5)


SELECTIONS: dict[
    tuple[str, ...], type[Selection]
] = {  # by ast.mode, and for mode ast by ast.scoring and ast.rule
    ("dense",): Selection,
    ("random",): RandomShare,
    ("ast", "batch", "pi"): BatchThreshold,
    ("ast", "batch", "topk"): TopShare,
    ("ast", "proxy", "pi"): ProxyScores,
    ("ast", "proxy", "topk"): ProxyTopShare,
    ("ast", "history", "pi"): HistoryThreshold,
    ("ast", "history", "infobatch"): InfoBatch,
}


def selection_class(config: Config) -> type[Selection]:
    ast = config.ast
    return SELECTIONS[(ast.mode, ast.scoring, ast.rule) if ast.mode == "ast" else (ast.mode,)]


def planned_share(config: Config, epoch: int) -> float:
    """Which share of the samples `epoch` is planned to load."""
    rule = selection_class(config)
    share = rule.PLANNED_SHARE or config.ast.target_activation
    return share if rule.CHOOSES_BEFORE_LOADING and config.is_sparse(epoch) else 1.0


def step_share(config: Config, epoch: int, target: float) -> float:
    """How many optimizer steps `epoch` takes for a loaded batch, at a target of `target`: packing
    makes them fewer.
    """
    packed = (
        config.ast.pack and selection_class(config).scores_batches() and config.is_sparse(epoch)
    )
    return target if packed else 1.0


def lr_warmup_share(config: Config, of_loaded: bool = False) -> float:
    """Which share of the planned optimizer steps training.lr_warmup_epochs are; or of the batches
    loaded until then.
    """
    epochs = range(config.training.epochs)
    target = 1.0 if of_loaded else first_target(config.ast)
    shares = (planned_share(config, epoch) * step_share(config, epoch, target) for epoch in epochs)
    before = np.cumsum([0.0, *shares])
    return float(
        np.interp(config.training.lr_warmup_epochs, np.arange(len(before)), before / before[-1])
    )


def check_config(config: Config) -> None:
    """Raises ValueError naming the key: for a value that is in none of the tables, or one that the
    chosen rule or data set cannot work with.
    """
    ast = config.ast
    rules = [key[1:] for key in SELECTIONS if len(key) > 1]
    require_known("dataset.type", config.dataset.type, DATASETS)
    require_known("ast.measure", ast.measure, MEASURES)
    require_known("ast.scoring", ast.scoring, dict.fromkeys(scoring for scoring, _ in rules))
    require_known("ast.rule", ast.rule, dict.fromkeys(rule for _, rule in rules))
    if (ast.scoring, ast.rule) not in rules:
        needed = " or ".join(scoring for scoring, rule in rules if rule == ast.rule)
        raise ValueError(f"ast.rule: {ast.rule} needs ast.scoring={needed}")
    DATASETS[config.dataset.type].check(config.dataset)
    rule = selection_class(config)
    unscored = ast.target_activation == "auto" and ast.mode != "dense" and not rule.scores_batches()
    first_complaint(
        (
            unscored,
            "ast.target_activation: auto needs ast.mode=ast and scored batches (ast.scoring=batch)",
        )
    )
    varying = config.training.compile != "off" and rule.scores_batches() and not ast.pack
    mixing = next((key for key in ("mixup", "cutmix") if getattr(config.training, key)), None)
    keeper = "ast.scoring=history" if rule.KEEPS_SCORES else "ast.forget_rate=auto"
    keeper = "training.loss" if config.training.loss == "early_learning" else keeper
    keeps = keeper == "training.loss" or rule.remembers(config)
    first_complaint(
        (varying, "training.compile: needs ast.pack=true, for per-batch steps differ in shape"),
        (
            mixing and keeps,
            f"training.{mixing}: {keeper} remembers each sample, and a mixture has no one label",
        ),
    )
    rule.check(config)


load_config = partial(lab.config.loading.load_config, check=check_config)

# -------------------------------------------------------------------------------------- AST forward


@torch.no_grad()
def score(scorer: Scorer, local_batch: int, dist: Dist, batch: DeviceBatch) -> Scores:
    """Start scoring a batch, without gradient. The device is not waited for."""
    rows = dist.all_gather_columns(scorer.forward(batch.images, batch.labels), local_batch)
    if not rows.is_cuda or (scorer.on_device and dist.world == 1):
        return Scores(rows, None, scorer.is_model)
    host = torch.empty(rows.shape, pin_memory=True)
    arrived = torch.cuda.Event()
    host.copy_(rows, non_blocking=True)
    arrived.record()
    return Scores(host, arrived, scorer.is_model)


def ast_forward(
    batch: DeviceBatch,
    scores: Scores,
    selection: Selection,
    queue: ActiveQueue | None,
    trainer: Trainer,
) -> int | None:
    """Choose the active samples of a loaded batch by their scores, and train on them alone.

    queue: packs active samples into full batches; None: each batch is trained on as it is. Returns
    the number of samples back-propagated, 0 if none was active, None while packing waits for a full
    batch. A batch whose scores are not all finite is left out; raises TrainingFailed after
    `training.max_nonfinite_steps` of them.

    Of several processes each has its part of the batch and the scores of all of it. All choose
    alike, and train on an even part of the active samples. The number returned is that of all.
    """
    dist = trainer.dist
    metrics = trainer.metrics
    significances, correct = scores.read()
    metrics.add_scored(len(significances), correct if scores.is_model else None)
    if (
        not significances.is_cuda and not significances.isfinite().all()
    ):  # on a GPU the loss will tell
        metrics.skip_batch()
        return 0
    own, counts = dist.own_chosen(selection.choose(significances), len(significances))
    selection.observe(batch, trainer.lr / trainer.training.lr)
    rows = own if own.is_cuda else to_device(own, trainer.device)
    active = DeviceBatch(*(tensor[rows] for tensor in batch))
    ready = (
        DeviceBatch(*dist.balance(counts, active)) if queue is None else queue.push(active, counts)
    )
    if ready is None:
        return None
    trained = sum(counts) if queue is None else queue.batch_size
    if trained:
        trainer.train_step(ready, selection, count_correct=not scores.is_model)
    return trained


# ------------------------------------------------------------------------------------------ Trainer


class Trainer(Stateful):
    """Forward, backward and optimizer step, with gradient accumulation.

    An accumulation window is `grad_accum_steps` forwards; its gradient is the mean over all of its
    samples, however many each forward had. Losses are summed and divided by `window_divisor`, the
    sample count of the first forward; `optimizer_step` corrects that to the count of the whole
    window, on all processes.
    """

    STATE = (
        "lr",
        "scheduled",
        "unscheduled",
        "pace",
        "window_forwards",
        "optimizer",
        "scaler",
        "loss",
    )
    OWN = ("window_samples", "window_divisor")

    def __init__(
        self,
        network: Network,
        config: Config,
        planned_steps: int,
        clock: Clock,
        metrics: Metrics,
        dist: Dist,
    ):
        """planned_steps: optimizer steps of the whole run, times training.grad_accum_steps."""
        training = config.training
        self.network = network
        self.training = training
        self.planned_steps = planned_steps
        self.loss = network.loss
        self.clock = clock
        self.metrics = metrics
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
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=network.amp_dtype == torch.float16
        )
        self.optimizer = build_optimizer(network.model, training, self.device)
        self.lr_warmup = lr_warmup_share(config)
        self.lr = lr_at(0.0, training, self.lr_warmup)
        self.scheduled = self.unscheduled = (
            0  # planned steps whose gradient was applied: the rate's; and those since
        )
        self.pace = 1.0  # planned steps a loop step of this epoch: see `pace`
        self.window_samples = self.window_divisor = self.window_forwards = 0
        self.window_bad: Tensor | None = (
            None  # whether a loss of the window is not finite, on the device
        )
        self.forgiving = training.max_nonfinite_steps > 0
        self.statistics = (
            [b for b in network.model.buffers() if b.is_floating_point()] if self.forgiving else []
        )

    def progress(self) -> float:
        """How far the schedule is, 0 to 1: by the planned steps whose gradient was applied, or by
        training time.
        """
        if self.training.lr_decay == "time":
            return self.clock.schedule()
        return (self.scheduled + self.unscheduled / 2) / self.planned_steps

    def train_step(
        self, batch: DeviceBatch, selection: Selection, count_correct: bool = True
    ) -> int:
        """Forward and backward over a batch, added to the window's gradient. Returns how many
        samples that is.

        count_correct: whether its predictions count for train_acc; scoring may have counted them
        already.
        """
        network = self.network
        n = len(batch.labels)
        if (
            n == 0 and not network.synced
        ):  # synchronised BatchNorm needs every rank, even one without samples
            return 0
        statistics_before = [buffer.clone() for buffer in self.statistics]
        weights = selection.weights(batch)
        rows = self.loss.recall(batch.indices)
        given = {
            name: each for name, each in (("weights", weights), ("rows", rows)) if each is not None
        }
        inputs = batch.images, batch.labels
        inputs = (
            network.mixed(*inputs, self.metrics.epoch, self.metrics.step)
            if weights is None
            else inputs
        )
        objective, correct, loss, *seen = network.forward(*inputs, **given)
        if weights is not None:
            selection.record(batch, seen.pop(0), self.metrics.epoch)
        if rows is not None:
            self.loss.remember(batch.indices, seen.pop())
        # synchronised, a sample's loss reaches the gradients of other ranks: all must divide alike
        self.change_divisor(
            network.local_batch if network.synced else self.window_divisor or max(1, n)
        )
        self.scaler.scale(objective / self.window_divisor).backward()
        self.window_samples += n
        self.metrics.times_trained.add(batch.indices)
        bad = self.metrics.meter.add_loss(loss, n, self.metrics.step, objective.detach())
        self.window_bad = bad if self.window_bad is None else self.window_bad | bad
        for buffer, before in zip(self.statistics, statistics_before, strict=True):
            buffer.copy_(torch.where(bad, before, buffer))
        if count_correct:
            self.metrics.meter.add_correct(correct.sum(), n)
        return n

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

    def merge_gradients(self) -> int | Tensor:
        """Make the gradient the mean over the window's samples of all processes. Returns their
        number.
        """
        if self.dist.world == 1:
            self.change_divisor(self.window_samples)
            return self.window_samples
        samples, self.window_bad = merge_gradients(
            self.parameters, self.window_samples, self.window_divisor, self.window_bad, self.dist
        )
        return samples

    def optimizer_step(self) -> None:
        """Step on the mean gradient of the window, and clear it. The schedule advances by the loop
        steps it took.

        A step that the GradScaler skips (overflow in float16) advances neither the schedule nor the
        ledger. One with a loss that is not finite changes no weight. Only the device knows of it:
        the ledger learns it with the meter.
        """
        forgiving = self.forgiving and not self.scaler.is_enabled()
        self.merge_gradients()
        if forgiving:
            self.metrics.meter.add_skipped(self.window_bad, self.window_samples)
        self.lr = lr_at(self.progress(), self.training, self.lr_warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group.get("lr_scale", 1.0)  # see training.layer_decay
        if self.training.grad_clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.model.parameters(), self.training.grad_clip_norm)
        scale = self.scaler.get_scale()  # a device read, in float16 alone
        obeys = self.optimizer.defaults.get(
            "fused"
        )  # fused optimizers leave out a step by themselves
        if forgiving and obeys:
            self.optimizer.grad_scale = None
            self.optimizer.found_inf = self.window_bad.float()
        if not forgiving or obeys or not self.window_bad:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.clear_gradients()
        if self.scaler.get_scale() >= scale:
            self.metrics.add_optimizer_step(self.window_samples)
            if self.network.average is not None:
                self.network.average.update(self.metrics.ledger.steps)
            self.scheduled += self.unscheduled
        self.window_samples = self.window_divisor = self.unscheduled = 0
        self.window_bad = None

    def clear_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=not self.keeps_gradients)

    def alike(self) -> list[float]:
        """Numbers that every process must have alike."""
        return [self.lr, self.scheduled, self.network.weight_sum()]

    def own_state(self) -> dict[str, Any]:
        gradients = [p.grad for p in self.parameters] if self.window_samples else None
        return {**super().own_state(), "gradients": gradients, "window_bad": self.window_bad}

    def load_own_state(self, state: dict[str, Any]) -> None:
        super().load_own_state(state)
        bad = state["window_bad"]
        self.window_bad = None if bad is None else bad.to(self.device)
        for parameter, gradient in zip(self.parameters, state["gradients"] or []):  # noqa: B905
            if parameter.grad is None:
                parameter.grad = (
                    None if gradient is None else torch.empty_like(parameter).copy_(gradient)
                )
            elif gradient is not None:
                parameter.grad.copy_(gradient)


# --------------------------------------------------------------------------------------------- Data


DATASETS: dict[str, type[ImageDataset]] = {
    "digits": DigitsDataset,
    "folder": FolderDataset,
    "hf": HFDataset,
}


def build_datasets(config: DatasetConfig) -> tuple[ImageDataset, ImageDataset]:
    """Training and validation set, their classes checked against each other and
    dataset.num_classes.

    Raises RequestError naming the key where data is missing or does not fit.
    """
    train, val = DATASETS[config.type].splits(config)
    if config.num_classes not in (None, len(train.classes)):
        raise RequestError(
            f"dataset.num_classes: {config.num_classes}, but the data has "
            f"{len(train.classes)} classes"
        )
    if len(train.classes) < 2 or len(val.classes) > len(train.classes):
        raise RequestError(
            f"dataset: {len(train.classes)} training and {len(val.classes)} validation classes"
        )
    if not len(train) or not len(val):
        raise RequestError(f"dataset: {len(train)} training and {len(val)} validation samples")
    train.augmentation = Augmentation(config, train=True)
    val.augmentation = Augmentation(config, train=False)
    train.max_bad_images = config.max_bad_images  # validation counts only what it could read
    return train, val


def build_validation(config: DatasetConfig) -> Split:
    """The validation set alone, with the classes that it has itself: for weights that are trained.

    Raises RequestError naming the key where data is missing.
    """
    val = DATASETS[config.type].validation(config)
    if not len(val):
        raise RequestError("dataset: 0 validation samples")
    val.augmentation = Augmentation(config, train=False)
    return Split(val, random_subset(len(val), config.max_val_samples))


def build_splits(dataset: DatasetConfig) -> dict[str, Split]:
    """The training and the validation set, train and val, with the samples of them that are
    used.
    """
    train, val = build_datasets(dataset)
    indices = random_subset(len(train), dataset.max_train_samples)
    indices = np.concatenate([indices + copy * len(train) for copy in range(dataset.repeat)])
    return {
        "train": Split(train, indices),
        "val": Split(val, random_subset(len(val), dataset.max_val_samples)),
    }


def build_dataloaders(
    config: Config, device: torch.device, dist: Dist | None = None
) -> tuple[Loader, Loader, EpochPlan, int]:
    """Training loader, validation loader, the plan that drives the first, and the number of
    classes.

    Of several processes each has its part of every training batch, and of the validation set, in
    batches of its share.
    """
    dataset = config.dataset
    training = config.training
    dist = dist or Dist()
    splits = build_splits(dataset)
    (train, indices) = splits["train"]
    val = splits["val"].dataset
    if dist.world > 1:
        dist.require_same(
            "dataset: the processes see different data", [train.fingerprint(), val.fingerprint()]
        )
    train.label_shifts = label_shifts(
        len(train), len(train.classes), dataset.label_noise, training.seed
    )
    if len(indices) < dist.world:
        raise RequestError(f"dataset: {len(indices)} training samples for {dist.world} processes")
    plan = EpochPlan(
        indices, training.batch_size, training.seed, partial(planned_share, config), dist
    )
    options = loader_options(config, device, train)
    if dataset.cache != "none":
        return (
            *cached_loaders(splits, plan, config, device, dist, options),
            plan,
            len(train.classes),
        )
    train_loader = WorkerLoader(train, batch_sampler=plan, **options)
    return (
        train_loader,
        build_val_loader(splits["val"], config, device, dist),
        plan,
        len(train.classes),
    )


def build_val_loader(split: Split, config: Config, device: torch.device, dist: Dist) -> Loader:
    """Every sample of the validation set once, in order; of several processes, this one's part."""
    local_batch = config.training.batch_size // dist.world
    options = loader_options(config, device, split.dataset)
    if config.dataset.cache != "none":
        return cached_loaders({"val": split}, None, config, device, dist, options)[0]
    keys = [(index, np.zeros(UNIFORMS_PER_SAMPLE)) for index in dist.shard(split.indices).tolist()]
    chunks = [keys[start : start + local_batch] for start in range(0, len(keys), local_batch)]
    return WorkerLoader(split.dataset, batch_sampler=chunks, **options)


# ------------------------------------------------------------------------------------------ Metrics

HISTORY_KEYS = (
    *("epoch", "train_acc", "val_acc", "activation_rate", "threshold", "energy_savings"),
    *("step_time_ms", "est_energy_kj", "est_flops_g"),
    *(
        "target",
        "lr",
        "train_loss",
        "samples_loaded",
        "samples_scored",
        "samples_trained",
        "optimizer_steps",
    ),
    *("train_seconds", "energy_kj", "total_flops_g", "forgotten"),
)


class Metrics(Stateful):
    """Where the run stands, and what it has counted: the ledger of work, the epoch's meter, the
    history.
    """

    STATE = (
        "epoch",
        "step",
        "history",
        "epochs_completed",
        "nonfinite_steps",
        "times_trained",
        "by_class",
    )
    OWN = ("ledger", "ledger_before", "meter")

    def __init__(self, config: Config, device: torch.device, dist: Dist, samples: int = 0):
        """samples: how many indices the training set has."""
        self.allowed = config.training.max_nonfinite_steps
        self.device = device
        self.dist = dist
        self.ledger = Ledger()
        self.history: dict[str, list] = {key: [] for key in HISTORY_KEYS}
        self.epochs_completed = self.nonfinite_steps = 0  # of the finished epochs
        self.read_errors = ReadErrors(config.dataset.max_bad_images)
        self.times_trained = TimesTrained(samples, device, dist)
        self.by_class: list[list[int]] = [[], []]  # of the last validation: `ClassCounts`
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.step = 0
        self.meter = self.new_meter()
        self.ledger_before = copy.copy(self.ledger)

    def new_meter(self) -> Meter:
        """For the current epoch, with what the earlier ones have left of
        training.max_nonfinite_steps.
        """
        return Meter(self.device, self.epoch, self.allowed - self.nonfinite_steps)

    def add_scored(self, samples: int, correct: int | None) -> None:
        """Count the scored samples of all processes once; with `correct`, their predictions count
        for train_acc.
        """
        if self.dist.rank == 0:
            self.ledger.scored += samples
            if correct is not None:
                self.meter.add_correct(correct, samples)

    def skip_batch(self) -> None:
        """Count a batch whose scores are not finite. Raises TrainingFailed where it is one too
        many.
        """
        if self.dist.rank == 0:
            self.meter.skip_batch(self.step)

    def add_optimizer_step(self, samples: int) -> None:
        self.ledger.trained += samples
        self.ledger.steps += 1

    def settle(self) -> None:
        """Take optimizer steps that were skipped for a non-finite loss out of the ledger. Ends the
        meter.
        """
        bad_steps, skipped, untrained = self.meter.skipped()
        self.nonfinite_steps += bad_steps
        self.ledger.steps = self.ledger.steps - skipped
        self.ledger.trained = self.ledger.trained - untrained
        self.meter = self.new_meter()

    def close_epoch(self, row: dict[str, Any]) -> None:
        for key in HISTORY_KEYS:
            self.history[key].append(row[key])

    def is_best(self) -> bool:
        """Whether the newest epoch has the highest validation accuracy, above all before it."""
        *before, newest = self.history["val_acc"]
        return newest > max(before, default=-1.0)

    def own_state(self) -> dict[str, Any]:
        return {**super().own_state(), "read_errors": self.read_errors.found}

    def load_own_state(self, state: dict[str, Any]) -> None:
        super().load_own_state(state)
        self.meter.epoch = self.epoch
        self.meter.allowed = self.allowed - self.nonfinite_steps
        self.read_errors.add(state["read_errors"])


def close_epoch(
    run: Run, val_acc: float, dense_samples: float, considered: float | None = None
) -> dict[str, Any]:
    """Add the epoch's row to the history and return it: the one place that defines every figure.

    dense_samples: how many samples a dense epoch would have trained on. considered: out of how many
    this one was drawn, where that is another number.
    """
    metrics = run.metrics
    clock = run.clock
    reduce_to_rank0(run)
    loss, train_acc = metrics.meter.read()
    metrics.settle()
    done = metrics.ledger.since(metrics.ledger_before)
    ledger = metrics.ledger
    seconds = clock.close_epoch()
    scoring_cost = run.scorer.cost if run.scorer else 0.0
    activations = run.selection.activations
    thresholds = [float(each) for each in run.selection.thresholds]
    watts = run.config.metrics.gpu_tdp_watts * run.dist.world
    row = {
        "epoch": metrics.epoch + 1,
        "train_acc": train_acc,
        "val_acc": val_acc,
        "activation_rate": statistics.fmean(activations)
        if activations
        else done.loaded / (considered or dense_samples),
        "threshold": statistics.fmean(thresholds) if thresholds else None,
        "energy_savings": 1 - done.dense_equivalents(scoring_cost) / dense_samples,
        "step_time_ms": 1000 * seconds / metrics.step if metrics.step else None,
        "est_energy_kj": (metrics.history["est_energy_kj"] or [0.0])[-1] + seconds * watts / 1000,
        "est_flops_g": run.network.base_flop * ledger.trained / 1e9,
        "target": run.selection.target if run.selection.is_sparse(metrics.epoch) else None,
        "lr": run.trainer.lr,
        "train_loss": loss,
        "samples_loaded": done.loaded,
        "samples_scored": done.scored,
        "samples_trained": done.trained,
        "optimizer_steps": done.steps,
        "train_seconds": clock.train_seconds,
        "energy_kj": clock.energy_kj,
        "total_flops_g": run.network.base_flop * ledger.dense_equivalents(scoring_cost) / 1e9,
        "forgotten": run.selection.forgotten,
    }
    metrics.close_epoch(row)
    run.selection.told = run.selection.told or out_of_reach(
        run.config.ast, row["target"], activations, thresholds
    )
    run.selection.end_epoch(train_acc, run.scorer)
    return row


# ---------------------------------------------------------------------------------------------- Run


@dataclass
class Run:
    """The parts of a run. Each holds its own state; a checkpoint is nested by them."""

    config: Config
    device: torch.device
    dist: Dist
    network: Network
    selection: Selection
    scorer: Scorer | None
    trainer: Trainer
    queue: ActiveQueue | None  # with ast.pack
    ahead: ScoreAhead
    metrics: Metrics
    clock: Clock
    outputs: Outputs

    @classmethod
    def build(
        cls,
        config: Config,
        model: nn.Module,
        device: torch.device,
        planned_steps: int,
        samples: int = 0,
        dist: Dist | None = None,
        stop: Stop | None = None,
        started: float | None = None,
        classes: int = 0,
    ) -> Run:
        """planned_steps: see `Trainer`; samples: how many indices the training set has; started:
        time.monotonic() seconds, by default now."""
        dist = dist or Dist()
        started = time.monotonic() if started is None else started
        measure = partial(MEASURES[config.ast.measure], entropy_weight=config.ast.entropy_weight)
        network = Network(model, config, measure, device, dist, samples, classes)
        selection = selection_class(config)(config, samples, device, dist)
        scorer = selection.scorer(network)
        clock = Clock(config, device, dist, stop or Stop(), started)
        metrics = Metrics(config, device, dist, samples)
        trainer = Trainer(network, config, planned_steps, clock, metrics, dist)
        queue = (
            ActiveQueue(config.training.batch_size, dist)
            if config.ast.pack and scorer is not None
            else None
        )
        scoring = None if scorer is None else partial(score, scorer, network.local_batch, dist)
        ahead = ScoreAhead(
            scoring, config.ast.score_ahead and scorer is not None and not scorer.on_device
        )
        outputs = Outputs(config, device, dist)
        return cls(
            config,
            device,
            dist,
            network,
            selection,
            scorer,
            trainer,
            queue,
            ahead,
            metrics,
            clock,
            outputs,
        )

    @property
    def scoring(self) -> bool:
        """Whether this epoch's samples are scored before training."""
        return self.scorer is not None and self.selection.is_sparse(self.metrics.epoch)

    def start_epoch(self, epoch: int, order: np.ndarray) -> None:
        """Begin an epoch; a rule that chooses before loading does so now. order: see
        `Selection.start_epoch`.
        """
        self.metrics.start_epoch(epoch)
        self.trainer.loss.merge()
        self.selection.forget(epoch, order, self.trainer.progress())
        if self.selection.is_sparse(epoch):
            self.selection.start_epoch(epoch, order)
        else:
            self.selection.start_dense_epoch()
            if self.queue is not None:
                self.queue.clear()

    def save(self, best: bool = False) -> None:
        """Write a checkpoint, where the run keeps any. Collective."""
        self.outputs.save(partial(run_state, self), (self.metrics.epoch, self.metrics.step), best)

    def export(self) -> None:
        """Write the weights if the newest epoch is the best one."""
        if self.metrics.is_best():
            newest = {key: values[-1] for key, values in self.metrics.history.items()}
            self.outputs.export(self.network.exported.state_dict(), newest)


def train_one_epoch(run: Run, batches: Iterable[DeviceBatch], steps: int) -> bool:
    """Train on `batches`, the rest of the epoch's `steps`. Returns False where a signal or the time
    ended it early.

    An open accumulation window ends with the epoch, and with a time cap, which checkpoints before.
    After a signal it is left for the checkpoint. Raises TrainingFailed on a non-finite loss too
    many.
    """
    trainer = run.trainer
    metrics = run.metrics
    clock = run.clock
    selection = run.selection
    any_active_in_accum = trainer.window_open()
    signalled = False
    label = f"epoch {metrics.epoch + 1}{of_all(run.config)}"
    with step_bar(label, steps) as heartbeat:
        for batch, scores in run.ahead.pairs(() if clock.out_of_time() else batches, run.scoring):
            metrics.ledger.loaded += len(batch.labels)
            if scores is not None:
                selection.controller.epoch = (
                    metrics.epoch - run.config.ast.warmup_epochs + metrics.step / steps
                )
                trained = ast_forward(batch, scores, selection, run.queue, trainer)
            else:
                trained = trainer.train_step(batch, selection) or int(
                    run.dist.world > 1
                )  # another rank has some
            metrics.step = metrics.step + 1
            trainer.unscheduled = trainer.unscheduled + trainer.pace
            if trained is not None:
                trainer.window_forwards += 1
                any_active_in_accum |= trained > 0
            window_full = trainer.window_forwards == run.config.training.grad_accum_steps
            if window_full and any_active_in_accum:
                trainer.optimizer_step()
            if window_full:
                any_active_in_accum = False
                trainer.window_forwards = 0
            heartbeat(metrics.step, len(batch.labels) * run.dist.world, partial(live_figures, run))
            signalled, capped, due = clock.vote(
                metrics.step, metrics.step == steps, run.outputs.checkpoint_due()
            )
            if due:
                run.save()
            if capped or signalled:
                break
        if any_active_in_accum and not signalled:
            trainer.optimizer_step()
            trainer.window_forwards = 0
    return metrics.step == steps


@torch.no_grad()
def evaluate(network: Network, batches: Iterable[DeviceBatch], clock: Clock) -> ClassCounts | None:
    """Validate: every sample is counted once; a last, smaller batch is padded to one shape.

    Of several processes each forwards its part, and all get the counts of the whole. None where a
    signal came before its end, or where it outlasts training.max_minutes by more than a tenth of
    that. Raises TrainingFailed where logits are not finite.
    """
    # labels; 1 for a correct one; 1 for finite logits
    found = [torch.empty(3, 0, dtype=torch.int64, device=network.device)]
    cut = False
    deadline = clock.validation_deadline()
    for images, labels, _ in batches:
        if cut := clock.stop.signal is not None or time.monotonic() > deadline:
            break
        if not len(labels):  # none of them could be read
            continue
        padding = network.local_batch - len(labels)
        whole = (
            torch.cat([tensor, tensor.new_zeros(padding, *tensor.shape[1:])])
            for tensor in (images, labels)
        )
        scores, correct = network.evaluator(*whole)[:, : len(labels)]
        found.append(torch.stack([labels, correct.long(), scores.isfinite().long()]))
    rows = clock.dist.all_gather([cut, clock.stop.signal or 0])
    if rows[:, 0].any():
        clock.stop.signal = int(rows[:, 1].max()) or clock.stop.signal
        return None
    return ClassCounts.of(clock.dist.all_gather_objects(torch.cat(found, 1).cpu().numpy()))


def begin_epoch(run: Run, plan: EpochPlan) -> None:
    """Take `plan` to where the run stands. At an epoch's start, choose what it trains on."""
    epoch = run.metrics.epoch
    plan.start_epoch(epoch, run.metrics.step)
    if run.metrics.step == 0:
        run.start_epoch(epoch, plan.permutation())
    plan.start_epoch(epoch, run.metrics.step, run.selection.mask())
    if run.metrics.step == 0:
        run.trainer.pace = pace(run, plan)
    if not len(plan):  # nobody was chosen: the schedule goes on all the same
        run.trainer.unscheduled += plan.planned_steps(epoch)


def pace(run: Run, plan: EpochPlan) -> float:
    """How many of the run's planned steps a loop step of this epoch takes."""
    trainer = run.trainer
    selection = run.selection
    epoch = run.metrics.epoch
    share = partial(step_share, run.config, target=selection.target)
    steps = plan.planned_steps(epoch) / max(1, len(plan)) * share(epoch)
    if (
        run.config.ast.target_activation == "auto"
    ):  # what is left is planned anew by the target of today
        left = sum(
            plan.planned_steps(later) * share(later)
            for later in range(epoch, run.config.training.epochs)
        )
        steps *= (trainer.planned_steps - trainer.scheduled - trainer.unscheduled) / left
    return steps


def run_epochs(run: Run, train_loader: Loader, val_loader: Loader, plan: EpochPlan) -> str:
    """Train and validate epoch by epoch. Returns completed, early_stopped, time_capped or
    interrupted.
    """
    metrics = run.metrics
    clock = run.clock
    outputs = run.outputs
    print_rank0(epoch_line(run.config))
    clock.eval_steps = len(val_loader)
    while (status := clock.ending(metrics.epoch, metrics.step, metrics.history["val_acc"])) is None:
        clock.start()
        begin_epoch(run, plan)
        whole = train_one_epoch(
            run, device_batches(train_loader, run.device, metrics.read_errors), len(plan)
        )
        clock.pause()
        if not whole and not metrics.step:
            status = "completed" if metrics.epoch else "time_capped"
            print_rank0("training.max_minutes are over: no step of this epoch fitted in")
            break
        val_acc = validate(run, val_loader)
        if val_acc is None:
            status = "interrupted" if clock.stop.signal is not None else "time_capped"
            if status == "time_capped":
                print_rank0(
                    "training.max_minutes are over: the last validation did not fit in and was left"
                )
            break
        done = metrics.step / len(plan) if len(plan) else 1.0
        considered = plan.considered_samples(metrics.epoch)
        row = close_epoch(run, val_acc, done * plan.dense_samples, done * considered)
        metrics.epochs_completed += whole
        outputs.close_epoch(row)
        if not whole:  # the checkpoint is the one before the cap
            run.export()
            outputs.log(row, whole)
            return "completed" if clock.out_of_time() else "time_capped"
        metrics.epoch = metrics.epoch + 1
        metrics.step = 0
        run.save(best=metrics.is_best())
        run.export()
        outputs.log(row, whole)
        say_if_long(run)
    if status in ("interrupted", "time_capped") and outputs.saved_at != (
        metrics.epoch,
        metrics.step,
    ):
        run.save()
    return status


def validate(run: Run, loader: Loader) -> float | None:
    """`evaluate` over `loader` with the running statistics of all processes, timed.

    None where it was cut short; the statistics are then as before, so that the resumed run ends as
    one left alone.
    """
    started = time.monotonic()
    if run.clock.signalled():
        return None
    own = average_running_statistics(run.network.statistics(), run.dist)
    counts = evaluate(
        run.network, device_batches(loader, run.device, run.metrics.read_errors), run.clock
    )
    if counts is not None:
        run.clock.eval_seconds = time.monotonic() - started
        run.metrics.by_class = list(counts)
        return counts.accuracy()
    for buffer, value in own:
        buffer.copy_(value)
    return None


def train(
    config: Config, stop: Stop | None = None, resume: str | None = None
) -> tuple[dict[str, Any], Path]:
    """Run a config to its end and save the results: (the result, its file).

    `resume`: the checkpoint to go on from, a path, or `auto` for the config's own where there is
    one. Raises RequestError before anything is trained where the request is wrong. Whatever ends
    the training later, the epochs finished until then are saved first, with `status` failed and the
    `error`.
    """
    started = time.monotonic()
    stop = stop or Stop()
    if config.training.max_minutes is not None and config.training.lr_decay == "epochs":
        stop.deadline = started + 60 * config.training.max_minutes
    device = resolve_device(config.training)
    dist = meet(config, device)
    if dist.rank == 0:
        prepare_outputs(config.logging)
    with claimed(checkpoint_folder(config)) if dist.rank == 0 else contextlib.nullcontext():
        outcome = _train(config, device, dist, stop, resume, started)
    dist.leave()
    return outcome


def _train(
    config: Config, device: torch.device, dist: Dist, stop: Stop, resume: str | None, started: float
) -> tuple[dict[str, Any], Path]:
    """`train`, in a checkpoint folder that is this run's own."""
    path = dist.broadcast(find_checkpoint(config, resume))
    state = None if path is None else load_checkpoint(path, config)
    board = open_tensorboard(config.logging) if dist.rank == 0 else None
    torch.manual_seed(config.training.seed)
    configure_backends(config.ast.pack or not selection_class(config).scores_batches(), device)
    train_loader, val_loader, plan, num_classes = build_dataloaders(config, device, dist)
    model = get_model(config.model, num_classes, config.dataset.image_size)
    check_start(config, model, plan, selection_class(config).scores_batches())
    target = first_target(config.ast)
    planned = sum(
        plan.planned_steps(e) * step_share(config, e, target) for e in range(config.training.epochs)
    )
    run = Run.build(
        config,
        model,
        device,
        planned,
        int(plan.indices.max()) + 1,
        dist,
        stop,
        started,
        num_classes,
    )
    dataset = train_loader.dataset
    if config.dataset.normalise == "measured":
        run.network.normalise_by(measure_moments(dataset, plan.indices))
    if dist.rank:
        seed_rank(config.training.seed, dist.rank)
    announce(run, plan, num_classes, val_loader)
    if device.type == "cuda" or config.training.compile != "off":
        warm_up(run)
    if resume is not None:
        resume_run(run, path, state)
    copies = copies_of_weights(config.training)
    run.outputs.open(board, run.network.model, copies, run.network.describe(dataset.classes))
    outcome = {"status": "failed"}
    stop.training = True
    suspects = None
    try:
        with ending_workers():
            outcome = {"status": run_epochs(run, train_loader, val_loader, plan)}
        run.outputs.finish()
        suspects = run.selection.suspects(dataset) if outcome["status"] != "interrupted" else None
    except Exception as error:
        known = explained(error, config)
        outcome = {"status": "failed", "error": one_line(known)}
        if known is not error:
            raise known from None
        raise
    finally:
        diet = count_diet(run, dataset, plan.indices)
        result = build_result(run, outcome, diet)
        results_path = run.outputs.close(result, diet)
        if suspects is not None and results_path is not None:
            suspects.write(results_path)
    return dist.broadcast((result, results_path))


# --------------------------------------------------------------------------------------------- Main


def execute(config: Config, resume: str | None = None) -> int:
    """Train `config` as a command does: signals watched, results saved. Returns the exit code."""
    stop = Stop()
    stop.watch_signals()
    result, _ = train(config, stop, resume)
    return 128 + stop.signal if result["status"] == "interrupted" else 0


def prepare(config: Config) -> int:
    """Build the files of `dataset.cache: disk`, check every picture in them, and train nothing."""
    if config.dataset.cache == "none":
        raise RequestError("--prepare-only: needs dataset.cache=disk")
    splits = build_splits(config.dataset)
    prepare_caches(
        splits, config, loader_processes(config.training, splits["train"].dataset.IN_MEMORY)
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser(
        "Train one config. run_experiment.py does the same and has more flags.", config_help=True
    )
    parser.add_argument(
        "--config", required=True, type=user_text, metavar="FILE", help="YAML or JSON config"
    )
    parser.add_argument("--resume", type=user_text, metavar="PATH|auto", help=RESUME_HELP)
    parser.add_argument(
        "--prepare-only", action="store_true", help="build or check the files of dataset.cache=disk"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example training.lr=0.05"
    )
    args = parser.parse_intermixed_args(argv)
    config = load_config(args.config, args.overrides)
    return prepare(config) if args.prepare_only else execute(config, args.resume)


if __name__ == "__main__":
    sys.exit(run_cli(main))
