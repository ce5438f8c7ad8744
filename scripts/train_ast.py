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
A sample is chosen in `Selection.take`.

A run writes <output_dir>/final_results_<timestamp>.json and, if asked, one JSON line an epoch. What
it needs to go on bit for bit after an interruption (`run_experiment.py --resume auto`) is in
<output_dir>/checkpoints/<run>/last.pt.

To add a measure of significance: one function and one line of MEASURES. A way to score, a rule, a
target, a doubt of labels or a data set: one class and one line of SCORINGS, RULES, TARGETS, DOUBTS
or DATASETS. All of them, and networks, losses, optimizers, schedules and augmentations, may be in a
file of one's own, `--import mine.py`, which says `from train_ast import RULES, Choice, Rule`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from lab.study.cli import refuse_early, run_cli, training_options
from lab.study.finding import finished_run

if __name__ == "__main__":
    refuse_early(training_options)  # before the import of torch, which takes seconds
    sys.modules["train_ast"] = sys.modules[__name__]  # an imported file means these tables

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lab.config.loading
from lab.base.console import print_rank0, step_bar
from lab.base.errors import RequestError, TrainingFailed, one_line
from lab.config.imports import changed_code, identities, kept, origin, use
from lab.config.keys import (
    BUILT_IN,
    LEAST_TARGET,
    RULE_KEYS,
    RULE_REPLACES,
    SCORING_KEYS,
    all_needs,
    idle_keys,
    of_known_parts,
    spelled,
)
from lab.config.loading import Config, checkpoint_folder, default_settings, not_read
from lab.config.names import unknown
from lab.config.sections import NOISY_LABELS, ASTConfig, DatasetConfig
from lab.config.tables import Table, names_of
from lab.config.together import (
    Traits,
    complain,
    complaints_of,
    has_fixed_shape,
    of_above_mean,
    of_parts,
    of_stored_scores,
    reuses,
)
from lab.data.cache.loaders import Split, cached_loaders, prepare_caches
from lab.data.datasets import (
    DigitsDataset,
    FolderDataset,
    ImageDataset,
    LoaderBatch,
    ReadErrors,
    collate,
    measure_moments,
)
from lab.data.hf import HFDataset
from lab.data.images import AUGMENTATIONS, Augmentation
from lab.data.loading import (
    BatchScores,
    DeviceBatch,
    EpochPlan,
    Loader,
    ScoreAhead,
    device_batches,
    loader_options,
    loader_processes,
)
from lab.data.queue import ActiveQueue
from lab.data.randomness import UNIFORMS_PER_SAMPLE, random_subset, uniform
from lab.data.splitting import both_parts, repeated, validation_part
from lab.data.tables import CSVDataset
from lab.engine.checkpoint import (
    FORMAT,
    claimed,
    find_checkpoint,
    folders_of_other_code,
    load_checkpoint,
)
from lab.engine.checks import check_start
from lab.engine.optimizer import OPTIMIZERS, check_optimizer, copies_of_weights, reads_momentum
from lab.engine.state import compile_all, require_alike, resume_parts, state_of
from lab.engine.trainer import Trainer
from lab.machine.clock import Clock, Stop, explained
from lab.machine.devices import (
    RandomGenerators,
    configure_backends,
    resolve_device,
    seed_rank,
    to_device,
)
from lab.machine.distributed import Dist, average_running_statistics, meet
from lab.machine.meters import ClassCounts, Ledger, Meter
from lab.machine.stateful import Stateful
from lab.machine.workers import WorkerLoader, ending_workers
from lab.method.doubt import FORGET_FROM, LEFT_OUT, HighestScores, LabelDoubt, UnlikelyLabels
from lab.method.losses import LOSSES, AsFarAsWrong, Loss
from lab.method.sample_store import SampleStore, Visit
from lab.method.schedule import SCHEDULES, Schedule, Shares
from lab.method.times_trained import TimesTrained
from lab.models.building import MODELS, check_resolution, count_flops, get_model
from lab.models.forward_once import CannotTrace, Rows
from lab.models.network import Network, StepResult
from lab.models.proxy import EVERY, Proxy
from lab.models.reuse import MARGIN, ReusedForward
from lab.outputs.banner import Facts, announce, own_pictures, say_if_long, seconds_left
from lab.outputs.diet import figures as diet_figures
from lab.outputs.log import Outputs, open_tensorboard, prepare_outputs
from lab.outputs.result import build_result, count_diet
from lab.outputs.suspects import Judged, Suspects
from lab.outputs.tables import epoch_line, of_all

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

    STATE: ClassVar[tuple[str, ...]] = ("threshold", "integral", "epoch")

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

    @classmethod
    def from_config(cls, ast: ASTConfig) -> PIController:
        gains = ast.model_dump(
            include={"kp", "ki", "min_threshold", "kp_warmup_epochs", "ki_warmup_epochs"}
        )
        threshold = None if ast.initial_threshold == "auto" else ast.initial_threshold
        return cls(
            target=1.0 if isinstance(ast.target_activation, str) else ast.target_activation,
            threshold=threshold,
            **gains,
        )

    def start(self, threshold: float) -> None:
        """Begin at `threshold` (nats) with no memory of earlier errors."""
        self.threshold = min(max(threshold, self.min_threshold), self.max_threshold)
        self.integral = 0.0

    def gains(self) -> tuple[float, float]:
        """kp and ki now: each rises linearly from 0 over its warm-up."""
        kp_share = self.epoch / self.kp_warmup_epochs if self.kp_warmup_epochs else 1.0
        ki_share = self.epoch / self.ki_warmup_epochs if self.ki_warmup_epochs else 1.0
        return self.kp * min(1.0, kp_share), self.ki * min(1.0, ki_share)

    def update(self, activation: float, spread: float = 1.0) -> float:
        """One control step: the new threshold after a batch of which a share `activation` was
        active.
        """
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


def tried_measure(measure: Callable[[Tensor, Tensor, float], Tensor]) -> str | None:
    """What is wrong with its scores of two samples of three classes; None where nothing is."""
    shape = [*measure(torch.zeros(2, 3), torch.tensor([0, 2]), 1.0).shape]
    return None if shape == [2] else f"the scores of 2 samples have the shape {shape}, not [2]"


def measure_of(ast: ASTConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """logits [batch, classes], labels [batch] -> significance [batch], nats."""
    found = MEASURES[ast.measure]
    weight = ast.entropy_weight
    return lambda logits, labels: found(logits, labels, weight)


MEASURES = Table("ast.measure", significance, {"loss_entropy": significance}, tried=tried_measure)


# --------------------------------------------------------------------------- Parts of a selection


class Pool(NamedTuple):
    """Among whom a rule chooses: the samples of a batch, or of an epoch by their stored scores."""

    scores: Tensor  # float32 [n], nats; infinite for a sample never seen
    uniforms: Callable[[], Tensor]  # [n], a random number of each, made only where a rule asks
    epoch: float  # sparse epochs so far

    def at(self, rows: Tensor) -> Pool:
        """The pool of these rows alone."""
        return Pool(self.scores[rows], lambda: self.uniforms()[rows], self.epoch)


class Choice(NamedTuple):
    """Who of a pool is trained on."""

    rows: Tensor  # int64 [active], ascending
    threshold: float | Tensor  # nats; a tensor on the device is read at the epoch's end
    weights: Tensor | None = None  # float32 [active], of each row's loss; None: all 1

    def weights_of(self, n: int) -> Tensor:
        """float32 [n], of a pool of n; 1 for those who are not chosen."""
        weights = torch.ones(n, device=self.rows.device)
        return weights if self.weights is None else weights.index_copy_(0, self.rows, self.weights)


def with_floor(choice: Choice, scores: Tensor, kept: Tensor | None, floor: int) -> Choice:
    """Where fewer than `floor` are active, the highest scores of the others come on top, those not
    kept last. Nothing is read from a device.
    """
    n = len(scores)
    lacking = min(floor, n) - len(choice.rows)
    if lacking <= 0:
        return choice
    if kept is not None:
        last = torch.full_like(scores, torch.finfo(scores.dtype).min)
        scores = last.index_copy_(0, kept, scores[kept])
    others = scores.index_fill(0, choice.rows, -math.inf)
    more = others.sort(descending=True, stable=True).indices[:lacking]
    rows = torch.cat([choice.rows, more]).sort().values
    weights = None if choice.weights is None else choice.weights_of(n)[rows]
    return Choice(rows, choice.threshold, weights)


class Scores(Stateful):
    """What samples are worth, and what asking costs. This class asks nobody: dense and random runs,
    whose epochs load who is trained on.
    """

    KEYS: ClassVar[tuple[str, ...]] = ()  # the keys of `ast` that it reads
    before_loading: ClassVar[bool] = True  # whether a sparse epoch loads only who was chosen
    keeps_visits: ClassVar[bool] = False  # whether it needs a store of what samples were worth
    predicts: ClassVar[bool] = False  # whether its predictions are the trained network's
    forward: Callable[[Tensor, Tensor], Tensor] | None = None  # see `Network.scoring_forward`
    reuse: ReusedForward | None = None  # where the forward that scores is the one trained on
    told: Rows | None = None  # by `reuse`, of the batch that was scored last
    cost: float = 0.0  # of a scored sample, as a share of a training forward + backward
    learning_cost: float = 0.0  # of one that the scores are learned from, on top of that
    explored: float = 0.0  # share of the samples that are trained on whatever their scores

    def __init__(self, config: Config, network: Network, store: SampleStore | None, dist: Dist):
        pass

    @classmethod
    def check(cls, config: Config) -> None:
        """Raises ValueError naming the key where the config does not suit."""

    def of_batch(self, batch: DeviceBatch) -> Tensor:
        """The scores of a loaded batch, on the device: see `scoring_forward`."""
        return self.forward(batch.images, batch.labels)

    def of_epoch(self, order: np.ndarray) -> Tensor | None:
        """The scores of all samples, known before loading: float32 [n], on the host. Collective.

        order: int64 [n], the samples. None: they are not known.
        """
        return None

    def epoch_cost(self, target: float) -> float:
        """Of an epoch with this share of active samples among all that are scored, as a share of a
        dense one.
        """
        return self.cost + target * (1 if self.reuse is None else 2 / 3)

    def observe(self, batch: DeviceBatch, lr_share: float) -> int:
        """Learn from a whole batch, before it is scored. Returns from how many samples. lr_share:
        the rate as a share of its peak.
        """
        return 0


class NetworkScores(Scores):
    """A forward of the network over every loaded batch."""

    KEYS = SCORING_KEYS["batch"]
    before_loading = False
    predicts = True

    def __init__(self, config: Config, network: Network, store: SampleStore | None, dist: Dist):
        self.forward = network.scorer  # validation's, so that one function is compiled for both
        self.cost = 1 / 3
        if reuses(config):
            self.reuse = reused_forward(config, network, dist)
            return
        resolution = config.ast.score_resolution or network.side
        by_batch = config.ast.score_statistics == "batch"
        if resolution != network.side:
            check_resolution(network.model, config.model, resolution)
            sizes = (resolution, network.side)
            small, full = (count_flops(network.model, side) for side in sizes)
            self.cost = small / full / 3
        if resolution != network.side or by_batch:
            self.forward = network.scoring_forward(resolution, batch_statistics=by_batch)

    def of_batch(self, batch: DeviceBatch) -> Tensor:
        self.told = None
        # it was traced for whole batches: without some pictures a batch takes two passes
        if self.reuse is None or not self.reuse.fits(batch):
            return super().of_batch(batch)
        self.told = self.reuse.forward(batch)
        return torch.stack([self.told.significance, self.told.correct.float()])


QUARTERS = 4  # in which an automatic target moves, where each share is compiled for itself


def reused_forward(config: Config, network: Network, dist: Dist) -> ReusedForward | None:
    """What `ast.reuse_forward` asks for; None where it is `auto` and cannot be had, which is said.

    Collective. Raises RequestError where it is `true` and cannot be had.
    """
    exact = RULES[config.ast.rule].on_device
    total = candidate_batch(config, dist.world) // dist.world
    rows = round(network.local_batch * (1 if exact else MARGIN))
    moves = parts_of(config).target.MOVES
    more = [part * total // QUARTERS for part in range(1, QUARTERS)] if moves else []
    reason = "another process cannot"
    found = None
    try:
        found = ReusedForward(network, total, rows, more)
    except CannotTrace as error:
        reason = str(error)
    if dist.all_gather([found is not None]).all():
        return found
    if config.ast.reuse_forward is True:
        raise RequestError(f"ast.reuse_forward: {reason}; auto takes two passes then")
    if config.training.compile != "off" and not exact:
        raise RequestError(
            f"ast.reuse_forward: {reason}; two passes of training.compile="
            f"{config.training.compile} need ast.reuse_forward=false and ast.pack=true"
        )
    print_rank0(f"note: ast.reuse_forward=auto takes two passes: {reason}")
    return None


class ProxyScores(Scores):
    """A forward of a small network that learns beside the large one; see `lab.models.proxy`."""

    KEYS = SCORING_KEYS["proxy"]
    STATE = ("proxy",)
    before_loading = False

    def __init__(self, config: Config, network: Network, store: SampleStore | None, dist: Dist):
        self.proxy = Proxy(network, config.ast, config.training, dist)
        self.forward = self.proxy.scores
        self.known: Tensor | None = None  # the scores of the observed batch
        self.cost = self.proxy.cost / 3
        self.learning_cost = self.proxy.cost * 2 / 3

    def epoch_cost(self, target: float) -> float:
        return self.cost + self.learning_cost / EVERY + target

    def observe(self, batch: DeviceBatch, lr_share: float) -> int:
        self.known = self.proxy.learn(batch, lr_share)
        return 0 if self.known is None else len(batch.labels)

    def of_batch(self, batch: DeviceBatch) -> Tensor:
        return super().of_batch(batch) if self.known is None else self.known


class StoredScores(Scores):
    """What a sample was worth when it was last trained on. Some are explored: scores grow old."""

    KEYS = SCORING_KEYS["history"]
    keeps_visits = True

    def __init__(self, config: Config, network: Network, store: SampleStore | None, dist: Dist):
        self.store = store
        replaced = "explore" in RULES[config.ast.rule].REPLACES
        self.explored = 0.0 if replaced else config.ast.explore

    @classmethod
    def check(cls, config: Config) -> None:
        complain(of_stored_scores(config, RULES[config.ast.rule].REPLACES))

    def of_epoch(self, order: np.ndarray) -> Tensor:
        return torch.from_numpy(self.store.scores(order))


SCORINGS = Table(
    "ast.scoring",
    Scores,
    {"batch": NetworkScores, "proxy": ProxyScores, "history": StoredScores},
)


class Rule(Stateful):
    """Who of the scored is active. This class: all of them.

    A rule knows neither where scores come from nor who is doubted. It counts and logs nothing.
    """

    KEYS: ClassVar[tuple[str, ...]] = ()  # the keys of `ast` that it reads
    REPLACES: ClassVar[tuple[str, ...]] = ()  # keys of other parts that say nothing beside it
    target: ClassVar[float | None] = None  # its own, in place of ast.target_activation
    weighs: ClassVar[bool] = False  # whether its choices have weights
    on_device: ClassVar[bool] = False  # whether `choose` reads no tensor: the host does not wait

    def __init__(self, config: Config):
        pass

    @classmethod
    def check(cls, config: Config) -> None:
        """Raises ValueError naming the key where the config does not suit."""

    def choose(self, pool: Pool, target: float) -> Choice:
        """Whom to train on, so that a share `target` of the pool is active. No other effect but on
        its own controller.
        """
        return Choice(torch.arange(len(pool.scores), device=pool.scores.device), 0.0)


class Threshold(Rule):
    """Active are those above a threshold that a PI controller moves, so that a share `target` is.

    The controller takes a step after every batch. Stored scores are walked in batches too: a sample
    comes once an epoch, so its score is the same now as at its turn, and nothing is loaded for it.
    """

    KEYS = RULE_KEYS["pi"]
    STATE = ("controller", "iqr", "streak")

    def __init__(self, config: Config):
        self.controller = PIController.from_config(config.ast)
        self.batch_size = config.training.batch_size
        self.moves = config.ast.kp > 0 or config.ast.ki > 0
        self.in_iqr = config.ast.threshold_unit == "iqr"
        self.restarts = config.ast.initial_threshold == "auto"
        self.iqr = 0.0  # running inter-quartile range of the scores, nats; 0: none yet
        self.streak = 0.0  # log probability of the current run of all or none active

    def choose(self, pool: Pool, target: float) -> Choice:
        scores = pool.scores.numpy()
        n = len(scores)
        if target >= 1:
            return Choice(torch.arange(n), self.controller.min_threshold)
        known = scores[: 2**16]  # the order is random, so any part of it is a fair sample
        known = known[np.isfinite(known)]
        known = known if len(known) else np.zeros(1, dtype=np.float32)
        self.observe_spread(known, batches=math.ceil(n / self.batch_size))
        self.controller.target = target
        # no threshold takes a share of equal scores: it stands on them, and draws among them
        tied = plateau(known, target) if self.moves else None
        if tied is not None and self.controller.threshold != tied:
            self.controller.start(tied)
        draws = None if tied is None else pool.uniforms().numpy()
        size = self.batch_size if tied is None else n  # a step would leave equal scores
        active = np.zeros(n, dtype=bool)
        thresholds = []
        for start in range(0, n, size):
            here = slice(start, start + size)
            if self.controller.threshold is None:  # at the first choice, or lost
                start_at = torch.quantile(torch.from_numpy(known), 1 - target)
                self.controller.start(start_at.item())
            thresholds.append(self.controller.threshold)
            self.controller.epoch = pool.epoch + start / n
            active[here] = self.step(scores[here], None if draws is None else draws[here])
        return Choice(torch.from_numpy(np.flatnonzero(active)), statistics.fmean(thresholds))

    def observe_spread(self, known: np.ndarray, batches: int) -> None:
        """Take in the inter-quartile range of the scores, with the weight of so many batches: that
        of one alone is noisy.
        """
        last = len(known) - 1
        upper = last - len(known) // 4
        lower = max(0, last - 3 * len(known) // 4)
        ranked = np.partition(known, (lower, upper))
        iqr = float(ranked[upper]) - float(ranked[lower])
        keep = 0.9**batches
        self.iqr = keep * self.iqr + 0.1 * (1 - keep) / (1 - 0.9) * iqr if self.iqr else iqr

    def step(self, scores: np.ndarray, draws: np.ndarray | None) -> np.ndarray:
        """Who of a batch is active, bool [batch]; then the threshold moves."""
        controller = self.controller
        active = scores > controller.threshold
        expected = int(np.count_nonzero(active)) / len(active)  # a checkpoint takes plain numbers
        if draws is not None:
            ties = draw_ties(scores, active, controller.threshold, controller.target, draws)
            active = active | ties.taken
            expected = ties.expected
        controller.update(expected, self.iqr if self.in_iqr else 1.0)
        if self.restarts and self.is_lost(int(np.count_nonzero(active)), len(active)):
            controller.threshold = None  # the scores have left it behind
        return active

    def is_lost(self, active: int, samples: int) -> bool:
        """Whether chance (1e-6) cannot explain so many in a row all active, or all inactive."""
        target = self.controller.target
        odds = {0: 1 - target, samples: target}.get(active, 1.0)
        self.streak = self.streak + samples * math.log(odds) if 0 < odds < 1 else 0.0
        lost = self.streak < math.log(1e-6)
        self.streak = 0.0 if lost else self.streak
        return lost


def plateau(scores: np.ndarray, share: float) -> float | None:
    """The score in which the top `share` ends, where more than a tenth of all samples have it; else
    None.

    No threshold takes that share then: it takes all of those samples or none.
    """
    last = len(scores) - 1
    rank = last - min(last, int(share * len(scores)))
    value = np.partition(scores, rank)[rank]
    return float(value) if np.count_nonzero(scores == value) > max(1, len(scores) / 10) else None


class Ties(NamedTuple):
    """What becomes of the samples whose score is the threshold itself."""

    taken: np.ndarray  # bool [n]
    expected: float  # share of all n to be active then, on average over the draws


def draw_ties(
    scores: np.ndarray, active: np.ndarray, threshold: float, target: float, uniforms: np.ndarray
) -> Ties:
    """Take so many of the samples at the threshold, at random, that a share `target` of all is
    expected to be active.

    active: bool [n], those that are in any case. uniforms: [n], a random number of each sample.
    """
    ties = (scores == threshold) & ~active
    above = int(np.count_nonzero(active))
    tied = int(np.count_nonzero(ties))
    lacking = min(max(0.0, target * len(scores) - above), tied)
    return Ties(ties & (uniforms * tied < lacking), (above + lacking) / len(scores))


def out_of_reach(
    least: float, target: float | None, activations: Sequence[float], thresholds: Sequence[float]
) -> bool:
    """Whether the threshold sat on its lower bound `least` (nats) for the later half of an epoch,
    with too few samples above it. Prints so, with the share that is above it.
    """
    later = len(thresholds) // 2
    if target is None or not thresholds or max(thresholds[later:]) > least:
        return False
    reached = float(np.mean(activations[later:]))
    if reached > target - 0.01:
        return False
    print_rank0(
        f"note: ast.target_activation={target:g} is out of reach: only {reached:.3f} of the "
        f"samples are above ast.min_threshold={least:g}"
    )
    return True


class TopShare(Rule):
    """The largest scores, a fixed share (Kawaguchi & Lu 2020, "Ordered SGD").

    Their number is known beforehand, so the device chooses and the host does not wait. The
    threshold that it reports is the lowest score of that share.
    """

    KEYS = RULE_KEYS["topk"]
    on_device = True

    def choose(self, pool: Pool, target: float) -> Choice:
        n = len(pool.scores)
        count = min(n, max(1, round(target * n)))
        ranked, order = pool.scores.sort(descending=True, stable=True)
        return Choice(order[:count].sort().values, ranked[count - 1])


class AboveMean(Rule):
    """InfoBatch (Qin et al. 2024, "InfoBatch: lossless training speed up by unbiased dynamic data
    pruning", section 3): all above the mean loss, and each of the others with probability 1/2, and
    then twice the weight.
    """

    KEYS = RULE_KEYS["infobatch"]
    REPLACES = RULE_REPLACES["infobatch"]
    target = 0.75  # as the schedule expects it; how many lie below the mean shows at each choice
    weighs = True

    @classmethod
    def check(cls, config: Config) -> None:
        complain(of_above_mean(config))

    def choose(self, pool: Pool, target: float) -> Choice:
        scores = pool.scores.numpy()
        known = scores[np.isfinite(scores)]
        mean = float(known.mean(dtype=np.float64)) if len(known) else 0.0
        below = scores < mean
        rows = np.flatnonzero(~below | (pool.uniforms().numpy() < 0.5))
        weights = np.where(below[rows], np.float32(2), np.float32(1))
        return Choice(torch.from_numpy(rows), mean, torch.from_numpy(weights))


RULES = Table("ast.rule", Rule, {"pi": Threshold, "topk": TopShare, "infobatch": AboveMean})


# Of a sparse epoch with such a target, as a share of a dense one.
Cost = Callable[[float], float]


class Evidence(NamedTuple):
    """What an epoch says of the network."""

    wrong: float  # share of the samples predicted wrongly, of those whose labels are believed
    decides: bool  # whether the next epoch may train on a selection
    left: float  # share of the run's sparse epochs that come after the next epoch
    kept_out: int = 0  # how many pictures were kept out and predicted, see `Target.KEEPS_OUT`
    # share of these predicted wrongly, less that of doubted labels; None: there are none
    unseen_wrong: float | None = None


class Target(Stateful):
    """Which share of the samples is to be active: a number."""

    KEYS: ClassVar[tuple[str, ...]] = ("target_activation",)
    MOVES: ClassVar[bool] = False  # whether it changes from epoch to epoch
    # training pictures, a fortieth of all at most, that are predicted after every epoch that
    # decides, and trained on once `keeps_out` is false
    KEEPS_OUT: ClassVar[int] = 0
    STATE = ("value",)
    moves_in_quarters = False  # whether each share is compiled for itself, see `trained_share`

    def __init__(self, value: float):
        self.value = value

    @property
    def keeps_out(self) -> bool:
        """Whether the next epoch is without the pictures kept out."""
        return False

    def trained_share(self, share: float) -> float:
        """What is trained on where `share` is wanted: the smallest of the QUARTERS that is no
        smaller, where it moves in these.
        """
        if not self.moves_in_quarters:
            return share
        return math.ceil(share * QUARTERS - 1e-9) / QUARTERS

    def end_epoch(self, evidence: Evidence, cost: Cost) -> None:
        """Set the next epoch's share."""

    def why_dense(self, cost: Cost) -> str | None:
        """Of a run without a sparse epoch: what decided so, and what would change it; None where
        the target is not what decides.
        """
        return None

    def facts(self) -> dict[str, Any] | None:
        """What results say of it, as JSON; None: nothing."""
        return None


class AutoTarget(Target):
    """All samples while many are predicted wrongly, later three times their share.

    At most WRONG_SHARE of the active ones are wrongly predicted: a network that has far to go
    cannot learn from the hardest samples alone. No fewer than LEAST are active. Where that and the
    scoring cost more than training on all samples, all are.

    Whether a selection begins is decided once, by pictures that are kept out until then. The first
    time that it would cost less, it begins, unless the pictures kept out are predicted wrongly more
    often than those that it would train on, by two standard errors of a share, at most
    1 / sqrt(pictures). Then the network knows its samples by heart: it lacks other pictures, not
    more of the hardest. After TRIALS such epochs, or once fewer than LEFT of the sparse epochs
    would be left, or where it would never cost less, all samples are trained on to the end.
    """

    MOVES = True
    KEEPS_OUT = 250
    STATE = (
        *("value", "selects", "refused", "epochs_without", "fewest_wrong"),
        *("kept_out", "unseen_wrong", "active_wrong"),
    )
    LEAST: ClassVar[float] = LEAST_TARGET
    WRONG_SHARE: ClassVar[float] = 1 / 3
    TRIALS: ClassVar[int] = 3  # predictions of one epoch scatter with its last steps
    LEFT: ClassVar[float] = 0.5  # no selection that began later has shown a gain

    def __init__(self, value: float):
        super().__init__(value)
        self.selects: bool | None = None  # None: not decided yet
        self.refused = 0  # epochs after which a selection would have cost less and did not begin
        self.epochs_without = 0  # the pictures kept out
        self.fewest_wrong = math.inf  # of the epochs after which it could begin; a share
        # at the last of these after which it would have cost less: how many were kept out, the
        # share of them that was wrong, and that of those whom it would have trained on
        self.kept_out = 0
        self.unseen_wrong: float | None = None
        self.active_wrong: float | None = None

    @property
    def keeps_out(self) -> bool:
        return self.selects is None

    def end_epoch(self, evidence: Evidence, cost: Cost) -> None:
        target = self.trained_share(max(self.LEAST, evidence.wrong / self.WRONG_SHARE))
        self.value = target if cost(target) < 1 else 1.0
        if self.selects is None:
            self.epochs_without += 1
            if evidence.decides:
                self.judge(evidence)
            never = evidence.left < self.LEFT or cost(self.LEAST) >= 1
            if self.selects is None and never:
                self.selects = False
        if not self.selects:
            self.value = 1.0

    def judge(self, evidence: Evidence) -> None:
        """Decide whether a selection begins, where this epoch can tell."""
        self.fewest_wrong = min(self.fewest_wrong, evidence.wrong)
        if self.value == 1:
            return
        self.kept_out = evidence.kept_out
        self.unseen_wrong = evidence.unseen_wrong
        self.active_wrong = evidence.wrong / self.value
        # without pictures kept out nothing speaks against it
        if not self.kept_out or self.unseen_wrong - self.kept_out**-0.5 <= self.active_wrong:
            self.selects = True
            return
        self.refused += 1
        if self.refused == self.TRIALS:
            self.selects = False

    def why_dense(self, cost: Cost) -> str:
        if self.selects:
            return "the run ended before the selection began"
        if cost(self.LEAST) >= 1:
            return (
                f"scoring all and training on half cost {cost(self.LEAST):.2f} of training on all: "
                "score at less cost (ast.score_resolution)"
            )
        if self.fewest_wrong == math.inf:
            return "no sparse epoch came after its first; see ast.warmup_epochs and anneal_epochs"
        if self.refused:
            return (
                f"{100 * self.unseen_wrong:.1f} % of {self.kept_out} pictures kept out were "
                "predicted wrongly, and of those that a selection would train on "
                f"{100 * self.active_wrong:.1f} %: it knows these by heart; more or more varied "
                "pictures would change it"
            )
        dearest = max((n for n in range(1000) if cost(n / 1000) < 1), default=0) / 1000
        bar = self.WRONG_SHARE * dearest
        return (
            f"{100 * self.fewest_wrong:.1f} % of the samples were predicted wrongly at best while "
            f"half of the sparse epochs were left, and a selection begins below {100 * bar:.1f} %: "
            "train longer, score at less cost (ast.score_resolution), or give "
            "ast.target_activation a number"
        )

    def facts(self) -> dict[str, Any]:
        names = ("selects", "epochs_without", "unseen_wrong", "active_wrong")
        return {name: getattr(self, name) for name in names}


class Parts(NamedTuple):
    """The classes that a config composes a selection of."""

    scores: type[Scores]
    rule: type[Rule]
    target: type[Target]
    doubt: type[LabelDoubt]


# where the values are no numbers
TARGETS = Table("ast.target_activation", Target, {"auto": AutoTarget})
DOUBTS = Table("ast.forget_rate", LabelDoubt, {"auto": UnlikelyLabels})


def parts_of(config: Config) -> Parts:
    ast = config.ast
    if ast.mode != "ast":
        return Parts(Scores, Rule, Target, LabelDoubt)
    rule = RULES[ast.rule]
    target = Target
    if rule.target is None and isinstance(ast.target_activation, str):
        target = TARGETS[ast.target_activation]
    doubt = HighestScores if ast.forget_rate else LabelDoubt
    if isinstance(ast.forget_rate, str):
        doubt = DOUBTS[ast.forget_rate]
    return Parts(SCORINGS[ast.scoring], rule, target, doubt)


def packs_batches(config: Config) -> bool:
    """Whether the active samples of several loaded batches make one step."""
    scored = not parts_of(config).scores.before_loading
    return config.ast.pack and scored and not reuses(config)


def fixed_shape(config: Config) -> bool:
    """Whether all training steps of a kind of epoch are of one number of samples."""
    return has_fixed_shape(config, parts_of(config).scores.before_loading)


def shares_of(config: Config) -> Shares:
    """What the epochs of a run are expected to load and to train on."""
    ast = config.ast
    parts = parts_of(config)
    # with an automatic target a run begins with all: nothing is learned yet
    target = 1.0 if isinstance(ast.target_activation, str) else ast.target_activation
    target = target if parts.rule.target is None else parts.rule.target
    doubted = ast.forget_rate if parts.doubt is HighestScores else 0.0
    packs = packs_batches(config)
    narrows = ast.mode == "ast" and not parts.scores.before_loading
    candidates = ast.candidates if narrows else 1.0
    widened = 1.0
    if reuses(config):  # so that a step has training.batch_size active samples
        least = AutoTarget.LEAST if isinstance(ast.target_activation, str) else target
        widened = max(candidates, least) / least
    return Shares(
        config.training.epochs,
        config.sparse_span(),
        parts.scores.before_loading,
        packs,
        min(target, 1 - doubted),
        candidates,
        widened,
    )


def candidate_batch(config: Config, world: int) -> int:
    """How many samples a batch of a sparse epoch has, on all `world` processes together."""
    return world * round(config.training.batch_size / world * shares_of(config).widened)


class Selection(Stateful):
    """Which samples a step trains on, and with which weights: scores, a rule, a target and doubt of
    labels, composed.

    A loaded batch is scored, and `choose` takes from it; or an epoch is chosen before loading
    (`start_epoch`, `mask`). Both go through `take`, which is the method.
    """

    STATE = (
        *("scores", "rule", "target", "doubt", "store", "weights", "activations", "thresholds"),
        "generalises",
    )

    def __init__(
        self, config: Config, network: Network, samples: int, device: torch.device, dist: Dist
    ):
        """samples: how many indices the training set has."""
        parts = parts_of(config)
        seed = config.training.seed
        self.min_active = config.ast.min_active
        self.seed = seed
        self.device = device
        self.dist = dist
        self.doubt = parts.doubt(config.ast.forget_rate, samples, seed, device, dist)
        # share of the samples that a sparse epoch loads, by their scores so far
        self.candidates = shares_of(config).candidates
        narrows = self.candidates < 1
        labels = self.doubt.keeps_labels or config.training.list_suspects
        stores = parts.scores.keeps_visits or labels or narrows
        self.store = SampleStore(samples, device, dist, labels) if stores else None
        self.scores = parts.scores(config, network, self.store, dist)
        self.rule = parts.rule(config)
        self.target = parts.target(shares_of(config).target)
        self.target.moves_in_quarters = self.target.MOVES and self.scores.reuse is not None
        self.unseen: ClassCounts | None = None  # of this epoch, see `Target.KEEPS_OUT`
        # whether the last epoch was no better on its samples than on the validation set
        self.generalises = False
        # of the losses of this epoch, by index; LEFT_OUT for who is not loaded, LOOKED_AT for who
        # is not trained on. Empty where each loaded batch decides
        by_index = stores or (config.ast.mode == "ast" and parts.scores.before_loading)
        self.weights = torch.ones(samples if by_index else 0, dtype=torch.float16, device=device)
        self.activations: list[float] = []  # of this epoch's sparse steps: shares of 0 to 1
        self.thresholds: list[float | Tensor] = []  # likewise, nats; see `Choice`

    @property
    def share(self) -> float:
        """Which share of the samples is to be active: the target, or what doubt leaves of them."""
        return min(self.target.value, 1 - self.doubt.share)

    @property
    def loads(self) -> float:
        """Which share of the samples a sparse epoch scores: the candidates, and no fewer than are
        to be active.
        """
        return max(self.candidates, self.share)

    def start_epoch(self, epoch: int, order: np.ndarray, schedule: Schedule) -> None:
        """Begin an epoch of any kind. Collective. order: int64, all indices as the epoch goes."""
        self.activations = []
        self.thresholds = []
        self.unseen = None
        self.doubt.start_epoch(epoch, order, schedule.progress(), self.store)
        self.weights.fill_(1)
        if self.doubt.weights is not None:
            self.weights.copy_(self.doubt.weights)
        if not len(self.weights) or not schedule.is_sparse(epoch, self.share):
            return
        if self.candidates < 1:
            self.narrow(epoch, order)
        else:
            self.choose_epoch(epoch, order, schedule.sparse_epochs(epoch))

    def choose_epoch(self, epoch: int, order: np.ndarray, sparse_epochs: float) -> None:
        """Whom a sparse epoch loads, where scores are known before loading."""
        generator = np.random.default_rng((self.seed, epoch, 1))
        uniforms = generator.random(len(order), dtype=np.float32)
        kept = self.weights.cpu().numpy()[order] == 1
        order = order[kept]
        scores = self.scores.of_epoch(order)
        if scores is None or not len(order):
            return
        drawn = torch.from_numpy(uniforms[kept])
        floor = self.min_active
        if self.dist.world > 1 and floor:  # BatchNorm cannot normalise a single sample
            floor = max(floor, 2 * self.dist.world)
        indices = torch.from_numpy(order).to(self.device)
        choice = self.take(Pool(scores, lambda: drawn, sparse_epochs), floor, indices, slice(None))
        weights = torch.full((len(order),), LEFT_OUT)
        weights[choice.rows] = choice.weights_of(len(order))[choice.rows]
        self.weights.index_copy_(0, indices, weights.to(self.weights))

    def narrow(self, epoch: int, order: np.ndarray) -> None:
        """Load the candidates alone: those of the highest scores so far, the longer ago the
        higher.
        """
        scores = torch.from_numpy(self.store.scores(order, epoch))
        count = max(1, round(self.loads * len(order)))
        others = scores.sort(descending=True, stable=True).indices[count:]
        left_out = torch.from_numpy(order)[others].to(self.device)
        self.weights.index_fill_(0, left_out, LEFT_OUT)

    def note_scores(self, indices: Tensor, scores: Tensor, epoch: int) -> None:
        """Keep the fresh scores of a loaded batch, [n] as in `choose`, for the epochs to come."""
        if self.candidates < 1:
            local = to_device(self.dist.shard(scores), self.device)
            self.store.record_scores(indices, local, epoch)

    def choose(self, indices: Tensor, scores: Tensor, sparse_epochs: float) -> Choice:
        """Whom to train on of a batch. indices: int64, of this process's part of it.

        scores: [n], nats, finite, of the batches of all processes in order. All choose alike.
        """
        n = len(scores)
        edges = self.dist.shard_edges(n)
        local = slice(edges[self.dist.rank], edges[self.dist.rank + 1])
        uniforms = partial(self.uniforms, n, math.floor(sparse_epochs))
        return self.take(Pool(scores, uniforms, sparse_epochs), self.min_active, indices, local)

    def uniforms(self, n: int, epoch: int) -> Tensor:
        """A random number of each sample of a batch, by the seed, the epoch and its place there."""
        places = len(self.activations) * n + torch.arange(n)
        return uniform(self.seed, epoch, places, 1)[:, 0]

    def take(self, pool: Pool, floor: int, indices: Tensor, local: slice) -> Choice:
        """The method: doubt, exploration, the rule, the count of the active, the floor, the note.

        indices, local: see `LabelDoubt.note`.
        """
        n = len(pool.scores)
        kept = self.doubt.keep(pool.scores)
        choice = self.explore(pool if kept is None else pool.at(kept))
        if kept is not None:
            choice = choice._replace(rows=kept[choice.rows])
        self.activations.append(self.loads * len(choice.rows) / n)
        self.thresholds.append(choice.threshold)
        choice = with_floor(choice, pool.scores, kept, floor)
        if kept is not None:
            left_out = torch.ones(n, dtype=torch.bool, device=kept.device)
            left_out = left_out.index_fill(0, kept, False).index_fill(0, choice.rows, False)
            self.doubt.note(left_out, indices, local)
        return choice

    def explore(self, pool: Pool) -> Choice:
        """Whom chance takes, and whom the rule takes of the others."""
        target = self.share / (1 - self.doubt.share) / self.loads
        chance = self.scores.explored
        if not chance:
            return self.by_rule(pool, target)
        uniforms = pool.uniforms()
        explored = uniforms < chance
        others = torch.nonzero(~explored)[:, 0]
        # uniform in [0, 1) again, for those who are not explored
        rest = Pool(pool.scores, lambda: (uniforms - chance) / (1 - chance), pool.epoch).at(others)
        choice = self.by_rule(rest, (target - chance) / (1 - chance))
        rows = torch.nonzero(explored.index_fill(0, others[choice.rows], True))[:, 0]
        if choice.weights is None:
            return Choice(rows, choice.threshold)
        weights = torch.ones(len(uniforms))
        weights[others] = choice.weights_of(len(others))
        return Choice(rows, choice.threshold, weights[rows])

    def by_rule(self, pool: Pool, target: float) -> Choice:
        """Whom the rule takes: of nobody, nobody, with no threshold."""
        if not len(pool.scores):  # all are doubted, or explored
            return Choice(torch.arange(0, device=pool.scores.device), math.nan)
        return self.rule.choose(pool, target)

    def mask(self) -> np.ndarray | None:
        """uint8 by index, nonzero for the samples that this epoch loads for its steps; None: the
        planned number of them.
        """
        return (self.weights > 0).byte().cpu().numpy() if len(self.weights) else None

    def loss_weights(self, batch: DeviceBatch) -> Tensor | None:
        """Of each sample's loss, float32 [batch]; None: all 1. It is one or the other in all epochs
        of a run, for the step is compiled with weights or without.
        """
        weights = batch.weights
        if weights is None and self.rule.weighs:
            weights = torch.ones_like(batch.labels, dtype=torch.float32)
        if not len(self.weights):
            return weights
        known = self.weights[batch.indices].float()
        # who was chosen in the last epoch and waited for a full batch is trained on as chosen
        known = torch.where(known > 0, known, 1.0)
        return known if weights is None else known * weights

    def record(self, batch: DeviceBatch, visit: Visit | None, epoch: int, fair: bool) -> None:
        """Keep what a training step says of its samples. On the device. fair: see
        `Run.is_fair`.
        """
        if self.store is not None and visit is not None:
            self.store.record(batch.indices, visit, epoch, fair)

    def end_epoch(
        self,
        train_acc: float | None,
        is_sparse: bool,
        decides: bool,
        left: float,
        val_acc: float = 0.0,
    ) -> None:
        """Set the next epoch's target. Collective.

        train_acc: percent of those predicted; None on all processes but one. decides, left: see
        `Evidence`. val_acc: percent.
        """
        all_predicted = self.scores.predicts or not is_sparse
        fits = train_acc is None or not all_predicted or train_acc > val_acc
        self.generalises = self.dist.broadcast(not fits)
        if train_acc is not None:
            # those whom the network has not predicted count as right
            predicted = self.loads if is_sparse else 1.0
            wrong = (1 - train_acc / 100) * (predicted if all_predicted else self.share)
            doubted = self.doubt.mispredicted(all_predicted)
            unseen = self.unseen_evidence()
            evidence = Evidence(max(0.0, wrong - doubted), decides, left, *unseen)
            self.target.end_epoch(evidence, self.epoch_cost)
            self.target.value = self.target.trained_share(self.target.value)
        self.target.load_state_dict(self.dist.broadcast(self.target.state_dict()))

    def epoch_cost(self, target: float) -> float:
        """What an epoch with this target costs, as a share of a dense one."""
        return self.scores.epoch_cost(self.target.trained_share(target))

    def unseen_evidence(self) -> tuple[int, float | None]:
        """Of the pictures kept out that could be predicted: how many, and which share wrongly."""
        if self.unseen is None:
            return 0, None
        wrong = 1 - self.unseen.accuracy() / 100
        return sum(self.unseen.count), max(0.0, wrong - (self.doubt.forgotten() or 0.0))

    def suspects(self, dataset: ImageDataset, error: float) -> Suspects | None:
        """The samples whose labels may be wrong, where `ast.forget_rate` or
        `training.list_suspects` asks for them. Collective. error: see `Judged.share`.
        """
        out = self.doubt.left_out()
        if self.store is None or not self.store.labels:
            return None
        columns = self.store.on_host()
        if out is None:
            out = np.zeros(len(columns["visits"]), dtype=bool)
        return Suspects(dataset, Judged.of_visits(columns, out, len(dataset)), error)

    def alike(self) -> list[float]:
        """Numbers that every process must have alike."""
        return [self.target.value, *(float(each) for each in self.thresholds[-1:])]


def value_of(config: Config, table: Table) -> Any:
    """Which of a table's names a config gives."""
    section, _, name = table.key.partition(".")
    return getattr(getattr(config, section), name)


def own_parts(config: Config) -> dict[str, str]:
    """By key, the import that the config's part comes from, where that is one of its imports."""
    tables = (*CLOSED, MODELS, OPTIMIZERS)
    found = {table.key: origin(table.key, value_of(config, table)) for table in tables}
    return {key: identity for key, identity in found.items() if identity is not None}


def unread_keys(config: Config) -> dict[str, str]:
    """The keys that differ from their defaults and that nothing in use reads, each with what it
    would need.
    """
    scorings = {name: part.KEYS for name, part in SCORINGS.items()}
    rules = {name: part.KEYS for name, part in RULES.items()}
    replaced = {name: part.REPLACES for name, part in RULES.items()}
    settings = spelled(config.model_dump())
    known = {**BUILT_IN, "ast.scoring": tuple(scorings), "ast.rule": tuple(rules)}
    optimizer = config.training.optimizer
    by_timm = optimizer not in OPTIMIZERS
    if by_timm:
        known["training.optimizer"] += (optimizer,)
    needs = of_known_parts(all_needs(scorings, rules, replaced), settings, known)
    if by_timm and reads_momentum(optimizer):
        needs["training.momentum"] = {}
    return idle_keys(settings, default_settings(), needs)


def check_config(config: Config, given: Sequence[str] = ()) -> None:
    """Raises ValueError naming the key: for a value that is in none of the tables, for one that a
    part or the data set cannot work with, and for a key of those `given` on a command line that
    nothing reads. Runs the files that the config imports, where this process has not; raises
    RequestError for an error in one.
    """
    use(config.imports)
    texts = []
    for table in CLOSED:
        value = value_of(config, table)
        if isinstance(value, str):  # a target and a doubt may be a number
            texts += unknown(table.key, value, names_of(table.key))
    complain(texts)  # what is below looks at the parts of these names
    check_optimizer(config.training)
    parts = parts_of(config)
    checks = (
        lambda: complain(not_read(given, unread_keys(config))),
        lambda: DATASETS[config.dataset.type].check(config.dataset),
        lambda: complain(of_parts(config, traits_of(config))),
        lambda: parts.scores.check(config),
        lambda: parts.rule.check(config),
    )
    complain(complaints_of(*checks))


def traits_of(config: Config) -> Traits:
    """What the parts of a run say of themselves."""
    parts = parts_of(config)
    loss = LOSSES[config.training.loss]
    return Traits(
        before_loading=parts.scores.before_loading,
        keeps_visits=parts.scores.keeps_visits,
        own_target=parts.rule.target is not None,
        weighs=parts.rule.weighs,
        keeps_labels=parts.doubt.keeps_labels,
        recalls=loss.recall is not Loss.recall and loss.seen is Loss.seen,
    )


load_config = partial(lab.config.loading.load_config, check=check_config)


# ------------------------------------------------------------------------------------- AST forward


def score(run: Run, batch: DeviceBatch) -> BatchScores:
    """Start scoring a batch, from which the scores may learn. The device is not waited for."""
    observe(batch, run)
    dist = run.dist
    local_batch = candidate_batch(run.config, dist.world) // dist.world
    with torch.no_grad():
        rows = dist.all_gather_columns(run.selection.scores.of_batch(batch), local_batch)
    # where the rule chooses on the device, no score need travel to the host
    if not rows.is_cuda or (run.selection.rule.on_device and dist.world == 1):
        return BatchScores(rows)
    host = torch.empty(rows.shape, pin_memory=True)
    arrived = torch.cuda.Event()
    host.copy_(rows, non_blocking=True)
    arrived.record()
    return BatchScores(host, arrived)


def ast_forward(
    batch: DeviceBatch, scores: BatchScores, run: Run, sparse_epochs: float
) -> int | None:
    """Choose the active samples of a loaded batch by their scores, and train on them alone.

    Returns the number of samples back-propagated, 0 if none was active, None while packing waits
    for a full batch. Raises TrainingFailed for scores that are not finite.

    Of several processes each has its part of the batch and the scores of all of it. All choose
    alike, and train on an even part of the active samples. The number returned is that of all.
    """
    selection = run.selection
    dist = run.dist
    significances, correct = scores.read()
    predicts = selection.scores.predicts
    run.metrics.add_scored(len(significances), correct if predicts else None)
    # on a GPU the loss will tell, for the host does not wait
    if not significances.is_cuda and not significances.isfinite().all():
        raise TrainingFailed(f"non-finite scores in {run.metrics.place()}")
    selection.note_scores(batch.indices, significances, run.metrics.epoch)
    choice = selection.choose(batch.indices, significances, sparse_epochs)
    local, counts = dist.local_choice(choice.rows, len(significances))
    if selection.scores.told is not None:
        backward_rows(batch, local, run)
        return sum(counts)
    active = active_rows(batch, local, choice, sum(counts[: dist.rank]), selection.rule.weighs)
    if run.queue is None:
        ready = DeviceBatch(*dist.balance(counts, active.tensors()))
    else:
        ready = run.queue.push(active, counts)
    if ready is None:
        return None
    trained = sum(counts) if run.queue is None else run.queue.batch_size
    if trained:
        train_step(ready, run, count_correct=not predicts)
    return trained


def observe(batch: DeviceBatch, run: Run) -> int:
    """Let what scores learn from a loaded batch, as much of it as is this process's. Returns from
    how many samples it did.
    """
    lr_share = run.schedule.lr / run.config.training.lr
    learned = run.selection.scores.observe(batch, lr_share)
    run.metrics.ledger.learned += learned
    return learned


def active_rows(
    batch: DeviceBatch, local: Tensor, choice: Choice, first: int, weighs: bool
) -> DeviceBatch:
    """The chosen samples of this process's part of a batch.

    local: int64, their rows in it. first: how many of the choice other processes have before them.
    weighs: whether weights travel with the rows, through the queue and to other processes.
    """
    device = batch.labels.device
    rows = to_device(local, device)
    active = DeviceBatch(*(tensor[rows] for tensor in batch.tensors()))
    if not weighs:
        return active
    weights = choice.weights
    if weights is None:
        weights = torch.ones(len(choice.rows))
    return active._replace(weights=to_device(weights[first : first + len(local)], device))


def backward_rows(batch: DeviceBatch, local: Tensor, run: Run) -> None:
    """Train on the forward that scored a batch: the rows `local` of this process's part of it go
    backward.
    """
    if not len(local):
        return
    metrics = run.metrics
    selection = run.selection
    rows = to_device(local, run.device)
    active = DeviceBatch(batch.images[:0], batch.labels[rows], batch.indices[rows])
    active = active._replace(weights=selection.loss_weights(active))
    forward = selection.scores.reuse
    result = run.trainer.backward_rows(forward, selection.scores.told, active, rows)
    selection.record(active, result.visit, metrics.epoch, run.is_fair())
    metrics.add_step(active.indices, result, count_correct=False)
    metrics.ledger.padding += forward.capacity(len(rows)) - len(rows)


# Of so many samples trained on as mixtures, one is predicted unmixed: 2 % of a dense epoch.
UNMIXED_EVERY = 16


@torch.no_grad()
def predict_unmixed(batch: DeviceBatch, run: Run) -> None:
    """Count the predictions of pictures before they are mixed. A mixture has no one right answer,
    so that an automatic target cannot judge by it.
    """
    meter = run.metrics.meter
    if len(batch.labels) and UNMIXED_EVERY * meter.predicted <= meter.trained:
        correct = run.network.scorer(batch.images, batch.labels)[1]
        run.metrics.ledger.add_judged(len(batch.labels))
        meter.add_correct(correct.sum(), len(batch.labels))


@torch.no_grad()
def see_unmixed(batch: DeviceBatch, run: Run, count_correct: bool) -> None:
    """Predict the pictures of a step before they are mixed, and keep what that says of the samples:
    for the loss and the list of suspects.
    """
    metrics = run.metrics
    n = len(batch.labels)
    if not n:
        return
    loss = run.network.loss
    visit, rows = run.network.seer(batch.images, batch.labels, loss.recall(batch.indices))
    if rows is not None:
        loss.remember(batch.indices, rows)
    run.selection.record(batch, visit, metrics.epoch, run.is_fair())
    if count_correct:
        metrics.meter.add_correct((visit.predicted == visit.given).sum(), n)
    metrics.ledger.seen += n


def train_step(batch: DeviceBatch, run: Run, count_correct: bool = True) -> int:
    """Forward and backward over a batch, and what is learned of it. Returns how many samples it is.

    count_correct: whether its predictions count for train_acc; scoring may have counted them.
    """
    metrics = run.metrics
    if run.network.seer is not None and run.network.mixes(metrics.epoch, metrics.step):
        see_unmixed(batch, run, count_correct)
        count_correct = False
    elif count_correct and run.judges_unmixed:
        predict_unmixed(batch, run)
        count_correct = False
    weights = run.selection.loss_weights(batch)
    result = run.trainer.train_step(batch, weights, metrics.epoch, metrics.step)
    if result is None:
        return 0
    run.selection.record(batch, result.visit, metrics.epoch, run.is_fair())
    metrics.add_step(batch.indices, result, count_correct)
    return len(batch.labels)


def look_again(run: Run, batches: Iterable[DeviceBatch], count: int) -> None:
    """Predict the samples of the first `count` batches, whose labels are not believed, and keep
    what becomes of these: a part of training, in its time, but no step.
    """
    ledger = run.metrics.ledger
    for batch in islice(batches, count):
        n = len(batch.labels)
        ledger.loaded += n
        ledger.looked += n
        if n:
            visit = run.network.look(batch.images, batch.labels)
            # they have not been trained on since they were left out
            run.selection.store.record(batch.indices, visit, run.metrics.epoch, fair=True)


def dense_step(batch: DeviceBatch, run: Run) -> int:
    """Train on a whole batch. Before the sparse epochs, what will score learns from it too."""
    if run.metrics.epoch < run.schedule.shares.span.start:
        run.metrics.ledger.scored += observe(batch, run)  # by the forward that it learns from
    return train_step(batch, run) or int(run.dist.world > 1)  # another rank has some


# --------------------------------------------------------------------------------------------- Data


DATASETS = Table(
    "dataset.type",
    ImageDataset,
    {"digits": DigitsDataset, "folder": FolderDataset, "hf": HFDataset, "csv": CSVDataset},
    built=False,  # `splits` makes them
    needs=("splits",),
)
# the tables that know every name of their keys; networks and optimizers may be timm's
CLOSED = (DATASETS, AUGMENTATIONS, MEASURES, SCORINGS, RULES, TARGETS, DOUBTS, LOSSES, SCHEDULES)


def build_datasets(config: DatasetConfig) -> tuple[ImageDataset, ImageDataset]:
    """Training and validation set, their classes checked against each other and
    dataset.num_classes.

    Raises RequestError naming the key where data is missing or does not fit.
    """
    train, val = both_parts(DATASETS[config.type], config)
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
    val = validation_part(DATASETS[config.type], config)
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
    return {
        "train": Split(train, repeated(train, indices, dataset.repeat)),
        "val": Split(val, random_subset(len(val), dataset.max_val_samples)),
    }


class Data(NamedTuple):
    """What a run trains and validates on."""

    train: Loader
    val: Loader
    plan: EpochPlan  # drives the first
    classes: int

    @property
    def kept_out(self) -> np.ndarray:
        """The pictures that are kept out at first, int64, each once."""
        return np.unique(self.plan.kept_out % len(self.train.dataset))


def kept_out_of(indices: np.ndarray, size: int, most: int, seed: int) -> np.ndarray:
    """Those of int64 [n] training samples that are kept out: `most` pictures, a fortieth at most,
    with all their copies (`dataset.repeat`). size: of the data set.
    """
    pictures = np.unique(indices % size)
    count = min(most, len(pictures) // 40)
    drawn = np.random.default_rng((seed, 3)).permutation(pictures)[:count]
    return indices[np.isin(indices % size, drawn)]


def load_kept_out(data: Data, config: Config) -> list[LoaderBatch] | None:
    """This process's part of the pictures that are kept out, as validation would show them; None
    where there are none, or none can be read: nothing stands in for them. Collective.
    """
    plain = copy.copy(data.train.dataset)
    plain.augmentation = Augmentation(config.dataset, train=False)
    plain.max_bad_images = 0
    batches = in_order(data.kept_out, config, data.plan.dist)
    loaded = [collate(plain.__getitems__(batch)) for batch in batches]
    readable = data.plan.dist.all_gather([sum(len(batch.labels) for batch in loaded)])
    return loaded if readable.any() else None


def in_order(indices: np.ndarray, config: Config, dist: Dist) -> list[list[tuple[int, np.ndarray]]]:
    """Samples int64 [n] once, in their order, as batches of keys for an ImageDataset; of several
    processes, this one's part.
    """
    size = config.training.batch_size // dist.world
    keys = [(index, np.zeros(UNIFORMS_PER_SAMPLE)) for index in dist.shard(indices).tolist()]
    return [keys[start : start + size] for start in range(0, len(keys), size)]


def build_dataloaders(config: Config, device: torch.device, dist: Dist | None = None) -> Data:
    """The loaders of a run, and the plan of its epochs.

    Of several processes each has its part of every training batch, and of the validation set, in
    batches of its share.
    """
    dataset = config.dataset
    training = config.training
    dist = dist or Dist()
    splits = build_splits(dataset)
    train, indices = splits["train"]
    val = splits["val"].dataset
    if dist.world > 1:
        dist.require_same(
            "dataset: the processes see different data", [train.fingerprint(), val.fingerprint()]
        )
    train.mislabel(dataset.label_noise, training.seed)
    if len(indices) < dist.world:
        raise RequestError(f"dataset: {len(indices)} training samples for {dist.world} processes")
    kept_out = kept_out_of(indices, len(train), parts_of(config).target.KEEPS_OUT, training.seed)
    share = shares_of(config).loaded
    wide = candidate_batch(config, dist.world)
    plan = EpochPlan(indices, training.batch_size, training.seed, share, dist, wide, kept_out)
    options = loader_options(config, device, train)
    if dataset.cache != "none":
        loaders = cached_loaders(splits, plan, config, device, dist, options)
    else:
        val_loader = build_val_loader(splits["val"], config, device, dist)
        loaders = [WorkerLoader(train, batch_sampler=plan, **options), val_loader]
    return Data(*loaders, plan, len(train.classes))


def build_val_loader(split: Split, config: Config, device: torch.device, dist: Dist) -> Loader:
    """Every sample of the validation set once, in order; of several processes, this one's part."""
    options = loader_options(config, device, split.dataset)
    if config.dataset.cache != "none":
        return cached_loaders({"val": split}, None, config, device, dist, options)[0]
    batches = in_order(split.indices, config, dist)
    return WorkerLoader(split.dataset, batch_sampler=batches, **options)


# ------------------------------------------------------------------------------------------ Metrics

HISTORY_KEYS = (
    *("epoch", "train_acc", "val_acc", "activation_rate", "threshold", "energy_savings"),
    *("step_time_ms", "est_energy_kj", "est_flops_g"),
    *("target", "lr", "train_loss", "samples_loaded", "samples_scored", "samples_trained"),
    *("optimizer_steps", "train_seconds", "energy_kj", "total_flops_g", "forgotten"),
    *("contradicted", "remedy"),
)


class Metrics(Stateful):
    """Where the run stands, and what it has counted: the ledger of work, the epoch's meter, the
    history.
    """

    STATE = ("epoch", "step", "history", "epochs_completed", "times_trained", "by_class")
    LOCAL = ("ledger", "ledger_before", "meter")

    def __init__(self, device: torch.device, dist: Dist, samples: int = 0, max_bad_images: int = 0):
        """samples: how many indices the training set has."""
        self.device = device
        self.dist = dist
        self.ledger = Ledger()
        self.history: dict[str, list] = {key: [] for key in HISTORY_KEYS}
        self.epochs_completed = 0
        self.read_errors = ReadErrors(max_bad_images)
        self.times_trained = TimesTrained(samples, device, dist)
        self.by_class: list[list[int]] = [[], []]  # of the last validation: `ClassCounts`
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.step = 0
        self.meter = Meter(self.device, epoch)
        self.ledger_before = copy.copy(self.ledger)

    def place(self) -> str:
        """Where the run stands, in words."""
        return f"epoch {self.epoch + 1}, step {self.step + 1}"

    def add_scored(self, samples: int, correct: int | Tensor | None) -> None:
        """Count the scored samples of all processes once; with `correct`, their predictions count
        for train_acc.
        """
        if self.dist.rank == 0:
            self.ledger.scored += samples
            if correct is not None:
                self.meter.add_correct(correct, samples)

    def add_step(self, indices: Tensor, result: StepResult, count_correct: bool) -> None:
        """Count a forward and backward over the samples int64 [batch]."""
        n = len(indices)
        self.times_trained.add(indices)
        self.meter.add_loss(result.loss, result.objective.detach(), n, self.step)
        if count_correct:
            self.meter.add_correct(result.correct.sum(), n)

    def add_optimizer_step(self, samples: int, reused: int) -> None:
        self.ledger.trained += samples
        self.ledger.reused += reused
        self.ledger.steps += 1

    def reduce_to_rank0(self) -> None:
        """Move to rank 0 what the ranks have counted by themselves since the last time.
        Collective.
        """
        if self.dist.world == 1:
            return
        self.times_trained.merge()
        self.ledger.reduce_to_rank0(self.dist)
        self.meter.reduce_to_rank0(self.dist)
        if self.read_errors.limit:
            for found in self.dist.all_gather_objects(self.read_errors.found):
                if self.dist.rank == 0:
                    self.read_errors.add(found)

    def close_epoch(self, row: dict[str, Any]) -> None:
        for key in HISTORY_KEYS:
            self.history[key].append(row[key])
        self.meter = Meter(self.device, self.epoch)

    def newest(self) -> dict[str, Any]:
        """The newest row of the history."""
        return {key: values[-1] for key, values in self.history.items()}

    def result(self) -> dict[str, Any]:
        """What a results file says of them."""
        accuracies = self.history["val_acc"]
        best = max(accuracies, default=0.0)
        return {
            "best_accuracy": best,
            "epochs_completed": self.epochs_completed,
            "training_history": self.history,
            "best_epoch": accuracies.index(best) + 1 if accuracies else None,
            "final_accuracy": accuracies[-1] if accuracies else None,
            "ledger": asdict(self.ledger),
            "bad_images": self.read_errors.found,
        }

    def is_best(self) -> bool:
        """Whether the newest epoch has the highest validation accuracy, above all before it."""
        *before, newest = self.history["val_acc"]
        return newest > max(before, default=-1.0)

    def local_state(self) -> dict[str, Any]:
        return {**super().local_state(), "read_errors": self.read_errors.found}

    def load_local_state(self, state: dict[str, Any]) -> None:
        super().load_local_state(state)
        self.meter.epoch = self.epoch
        self.read_errors.add(state["read_errors"])

    def merged(self, states: Sequence[dict[str, Any]], rank: int) -> dict[str, Any]:
        """Rank 0 has what all had counted."""
        local = {name: [each[name] for each in states] for name in self.LOCAL}
        errors = [text for each in states for text in each["read_errors"]]
        return {
            "ledger": self.ledger.merged(local["ledger"], rank),
            "ledger_before": self.ledger.merged(local["ledger_before"], rank),
            "meter": self.meter.merged(local["meter"], rank),
            "read_errors": errors if rank == 0 else [],
        }


def close_epoch(
    run: Run, val_acc: float, dense_samples: float, considered: float | None = None
) -> dict[str, Any]:
    """Add the epoch's row to the history and return it: the one place that defines every figure.

    dense_samples: how many samples a dense epoch would have trained on. considered: out of how many
    this one was drawn, where that is another number.
    """
    metrics = run.metrics
    clock = run.clock
    selection = run.selection
    if selection.unseen is not None and run.dist.rank == 0:
        metrics.ledger.add_judged(sum(selection.unseen.count))
    run.reduce_to_rank0()
    loss, train_acc = metrics.meter.read()
    ledger = metrics.ledger
    done = ledger.since(metrics.ledger_before)
    seconds = clock.close_epoch()
    costs = (selection.scores.cost, selection.scores.learning_cost)
    # a top share of samples never seen has no finite threshold
    thresholds = [float(each) for each in selection.thresholds if math.isfinite(each)]
    active = selection.activations
    in_steps = done.loaded - done.looked
    activation = statistics.fmean(active) if active else in_steps / (considered or dense_samples)
    is_sparse = run.is_sparse()
    has_target = is_sparse and selection.rule.target is None
    watts = run.config.metrics.gpu_tdp_watts * run.dist.world
    energy_before = (metrics.history["est_energy_kj"] or [0.0])[-1]
    base_flop = run.network.base_flop
    row = {
        "epoch": metrics.epoch + 1,
        "train_acc": train_acc,
        "val_acc": val_acc,
        "activation_rate": activation,
        "threshold": statistics.fmean(thresholds) if thresholds else None,
        "energy_savings": 1 - done.dense_equivalents(*costs) / dense_samples,
        "step_time_ms": 1000 * seconds / metrics.step if metrics.step else None,
        "est_energy_kj": energy_before + seconds * watts / 1000,
        "est_flops_g": base_flop * ledger.trained / 1e9,
        "target": selection.share if has_target else None,
        "lr": run.schedule.lr,
        "train_loss": loss,
        "samples_loaded": done.loaded,
        "samples_scored": done.scored,
        "samples_trained": done.trained,
        "optimizer_steps": done.steps,
        "train_seconds": clock.train_seconds,
        "energy_kj": clock.energy_kj,
        "total_flops_g": base_flop * ledger.dense_equivalents(*costs) / 1e9,
        "forgotten": selection.doubt.forgotten(),
        "contradicted": run.network.loss.contradicted,
        "remedy": run.network.loss.remedy if run.network.loss.adapts else None,
    }
    metrics.close_epoch(row)
    if not run.warned_out_of_reach:
        least = run.config.ast.min_threshold
        run.warned_out_of_reach = out_of_reach(least, row["target"], active, thresholds)
    selection.end_epoch(train_acc, is_sparse, run.decides, run.sparse_left, val_acc)
    return row


# --------------------------------------------------------------------------------------------- Run


@dataclass
class Run:
    """The parts of a run. Each holds its own state; a checkpoint is nested by them."""

    config: Config
    device: torch.device
    dist: Dist
    network: Network
    selection: Selection
    schedule: Schedule
    trainer: Trainer
    queue: ActiveQueue | None  # with ast.pack
    ahead: ScoreAhead
    metrics: Metrics
    clock: Clock
    outputs: Outputs
    warned_out_of_reach: bool = False  # that the target is
    # of a run that was resumed with another text of its imports: the identities before
    earlier_imports: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def build(
        cls,
        config: Config,
        model: nn.Module,
        device: torch.device,
        planned_steps: float,
        samples: int = 0,
        dist: Dist | None = None,
        stop: Stop | None = None,
        started: float | None = None,
        classes: int = 0,
        fit: Callable[[Network], None] = lambda network: None,
    ) -> Run:
        """planned_steps: see `Schedule`; samples: how many indices the training set has; started:
        time.monotonic() seconds, by default now; fit: sets what the network takes from the data,
        before anything of it is traced or compiled.
        """
        dist = dist or Dist()
        training = config.training
        started = time.monotonic() if started is None else started
        measure = measure_of(config.ast)
        network = Network(model, config, measure, device, dist, samples, classes)
        fit(network)
        selection = Selection(config, network, samples, device, dist)
        clock = Clock(training, device, dist, stop or Stop(), started)
        is_auto = parts_of(config).target.MOVES
        schedule = Schedule(training, shares_of(config), planned_steps, clock, is_auto)
        trainer = Trainer(network, training, schedule, dist)
        queue = ActiveQueue(training.batch_size, device, dist) if packs_batches(config) else None
        waits = not selection.scores.before_loading and not selection.rule.on_device
        return cls(
            config,
            device,
            dist,
            network,
            selection,
            schedule,
            trainer,
            queue,
            ScoreAhead(ahead=waits and not reuses(config)),
            Metrics(device, dist, samples, config.dataset.max_bad_images),
            clock,
            Outputs(config.logging, checkpoint_folder(config), device, dist),
        )

    @property
    def judges_unmixed(self) -> bool:
        """Whether pictures are trained on as mixtures, and judged before."""
        return self.network.mixing is not None and self.schedule.is_auto

    @property
    def decides(self) -> bool:
        """Whether the next epoch may train on a selection, by what this one shows."""
        return self.metrics.epoch + 1 in self.schedule.shares.span

    @property
    def sparse_left(self) -> float:
        """Which share of the epochs that may be sparse comes after the next epoch; where the time
        ends the run, no more than is left of it.
        """
        span = self.schedule.shares.span
        later = range(max(self.metrics.epoch + 2, span.start), span.stop)
        by_time = self.config.training.lr_decay == "time"
        left = 1 - self.schedule.progress() if by_time else 1.0
        return min(left, len(later) / max(1, len(span)))

    def is_sparse(self) -> bool:
        """Whether this epoch trains on a selection."""
        return self.schedule.is_sparse(self.metrics.epoch, self.selection.share)

    def is_fair(self) -> bool:
        """Whether what a training step says of its labels counts as judgement (`SampleStore`).

        A network learns first what labels have in common, later single ones by heart. It judges in
        the part of the schedule in which nobody is left out, and after that while it was no better
        on what it trained on, in the last epoch, than on the validation set.
        """
        return self.schedule.progress() < FORGET_FROM or self.selection.generalises

    def start_epoch(self, epoch: int, order: np.ndarray) -> None:
        """Begin an epoch; where scores are known before loading, choose what it loads now. order:
        see `Selection.start_epoch`.
        """
        self.metrics.start_epoch(epoch)
        self.trainer.loss.start_epoch(self.schedule.progress())
        self.selection.start_epoch(epoch, order, self.schedule)
        if self.queue is not None and not self.is_sparse():
            self.queue.clear()

    def parts(self) -> dict[str, Stateful]:
        """What a checkpoint keeps, by name. Each part is saved and loaded in this order."""
        found = {
            "network": self.network,
            "selection": self.selection,
            "schedule": self.schedule,
            "trainer": self.trainer,
            "queue": self.queue,
            "ahead": self.ahead,
            "metrics": self.metrics,
            "clock": self.clock,
            "random": RandomGenerators(self.device),
        }
        return {name: part for name, part in found.items() if part is not None}

    def state(self) -> dict[str, Any]:
        """Everything that the steps to come depend on. Collective.

        The running clock is paused, so that the time so far is counted. Raises TrainingFailed
        rather than keep a non-finite loss.
        """
        clocked = self.clock.running_since is not None
        if clocked:
            self.clock.pause()
        self.require_alike()
        self.metrics.meter.read()
        if clocked:
            self.clock.start()
        state = state_of(self.parts(), self.dist)
        weights = state.pop("network")  # at the top: others read them from a checkpoint too
        code = {"earlier_imports": self.earlier_imports} if self.earlier_imports else {}
        return {"format": FORMAT, "config": self.config.model_dump(), **code, **weights, **state}

    def save(self, best: bool = False) -> None:
        """Write a checkpoint, where the run keeps any. Collective."""
        self.outputs.save(self.state, (self.metrics.epoch, self.metrics.step), best)

    def export(self) -> None:
        """Write the weights if the newest epoch is the best one."""
        if self.metrics.is_best():
            self.outputs.export(self.network.exported.state_dict(), self.metrics.newest())

    def require_alike(self) -> None:
        """Raises TrainingFailed where the processes are not in the same state. Collective."""
        parts = (self.selection, self.schedule, self.network)
        numbers = (
            [number for part in parts for number in part.alike()] if self.dist.world > 1 else []
        )
        require_alike(numbers, self.metrics.place(), self.dist)

    def reduce_to_rank0(self) -> None:
        """At the end of an epoch, move to rank 0 what the ranks have counted. Collective."""
        self.require_alike()
        self.metrics.reduce_to_rank0()
        self.clock.reduce_to_rank0()

    def optimizer_step(self) -> None:
        """Apply the window's gradient, and count it where it was applied."""
        reused = self.trainer.window_reused
        samples = self.trainer.optimizer_step()
        if samples is None:
            return
        self.metrics.add_optimizer_step(samples, reused)
        if self.network.average is not None:
            self.network.average.update(self.metrics.ledger.steps)

    def warm_up(self) -> None:
        """Compile and autotune every function on blank images, before the clock starts.

        Leaves weights, buffers and random generators as they were.
        """
        network = self.network
        side = network.side
        size = (network.local_batch, 3, side, side)
        images = torch.zeros(size, dtype=torch.uint8, device=self.device)
        labels = torch.zeros(len(images), dtype=torch.int64, device=self.device)
        blank = DeviceBatch(images, labels, labels)
        scorings = dict.fromkeys([network.evaluator, self.selection.scores.forward])
        if self.judges_unmixed:
            scorings[network.scorer] = None

        def once() -> None:
            with torch.no_grad():
                for forward in filter(None, scorings):
                    forward(images, labels)
            for mixes in self.ways_of_steps():
                self.blank_step(blank, mixes)
            before = copy.deepcopy(self.selection.scores.state_dict())
            self.selection.scores.observe(blank, 0.0)
            self.selection.scores.load_state_dict(before)

        passes = 3 if self.config.training.compile == "reduce-overhead" else 1
        compile_all(once, list(network.model.buffers()), passes)

    def ways_of_steps(self) -> list[bool]:
        """Whether steps of this run mix their pictures: some, or all."""
        if self.network.mixing is None:
            return [False]
        return [False, True] if self.network.loss.adapts else [True]

    def blank_step(self, blank: DeviceBatch, mixes: bool) -> None:
        """The forward and the backward of a step, whose gradient is dropped."""
        network = self.network
        inputs = (blank.images, blank.labels)
        weights = self.selection.loss_weights(blank)
        memory = network.loss.recall(blank.indices)
        if mixes:
            if network.seer is not None:
                with torch.no_grad():
                    network.seer(*inputs, memory)
            *inputs, memory = network.mixing(*inputs, 0, 0, memory)
            weights = None
        network.forward(*inputs, weights, memory).objective.backward()
        self.trainer.clear_gradients()

    def live_figures(self, steps: int) -> dict[str, str]:
        """What the progress bar shows. A device read. Raises TrainingFailed on a non-finite
        loss. steps: of the epoch.
        """
        loss, _ = self.metrics.meter.read()
        shown = {"loss": f"{loss:.3f}" if loss is not None else "-"}
        if self.selection.activations:
            shown["active"] = f"{self.selection.activations[-1]:.3f}"
            shown["threshold"] = f"{self.selection.thresholds[-1]:.3f}"
        done = self.metrics.step / steps
        sparse = partial(self.schedule.is_sparse, target=self.selection.share)
        history = self.metrics.history["train_seconds"]
        left = seconds_left(self.clock, history, sparse, self.metrics.epoch + done)
        return shown | {"left": str(timedelta(seconds=round(left)))}


def train_one_epoch(run: Run, batches: Iterable[DeviceBatch], steps: int) -> bool:
    """Train on `batches`, the rest of the epoch's `steps`. Returns False where a signal or the time
    ended it early.

    An open accumulation window ends with the epoch, and with a time cap, which checkpoints before.
    After a signal it is left for the checkpoint. Raises TrainingFailed on a non-finite loss.
    """
    trainer = run.trainer
    metrics = run.metrics
    clock = run.clock
    any_active_in_accum = trainer.window_open()
    signalled = False
    label = f"epoch {metrics.epoch + 1}{of_all(run.config)}"
    batches = () if clock.out_of_time() else batches
    scores_batches = not run.selection.scores.before_loading and run.is_sparse()
    scoring = partial(score, run) if scores_batches else None
    with step_bar(label, steps) as heartbeat:
        for batch, scores in run.ahead.pairs(batches, scoring):
            metrics.ledger.loaded += len(batch.labels)
            if scores is not None:
                sparse_epochs = run.schedule.sparse_epochs(metrics.epoch, metrics.step / steps)
                trained = ast_forward(batch, scores, run, sparse_epochs)
            else:
                trained = dense_step(batch, run)
            metrics.step += 1
            run.schedule.advance()
            if trained is not None:
                trainer.window_forwards += 1
                any_active_in_accum |= trained > 0
            window_full = trainer.window_forwards == run.config.training.grad_accum_steps
            if window_full and any_active_in_accum:
                run.optimizer_step()
            if window_full:
                any_active_in_accum = False
                trainer.window_forwards = 0
            figures = partial(run.live_figures, steps)
            heartbeat(metrics.step, len(batch.labels) * run.dist.world, figures)
            is_last = metrics.step == steps
            due = run.outputs.checkpoint_due()
            signalled, capped, due = clock.vote(metrics.step, is_last, due)
            if due:
                run.save()
            if capped or signalled:
                break
        if any_active_in_accum and not signalled:
            run.optimizer_step()
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
    for images, labels, *_ in batches:
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


def predict_kept_out(run: Run, kept_out: Sequence[LoaderBatch] | None) -> None:
    """After an epoch that decides, predict the pictures kept out: a part of training, in its time.
    Collective.
    """
    selection = run.selection
    if kept_out is None or not selection.target.keeps_out or not run.decides:
        return
    batches = device_batches(kept_out, run.device, run.metrics.read_errors)
    selection.unseen = evaluate(run.network, batches, run.clock)


def begin_epoch(run: Run, plan: EpochPlan) -> None:
    """Take `plan` to where the run stands. At an epoch's start, choose what it trains on."""
    epoch = run.metrics.epoch
    step = run.metrics.step
    plan.keeps_out = run.selection.target.keeps_out
    plan.start_epoch(epoch, step)
    looks = None  # they come before step 0
    if step == 0:
        order = plan.permutation()
        run.start_epoch(epoch, order)
        looks = run.selection.doubt.looks(order)
    wide = reuses(run.config) and run.is_sparse()
    plan.start_epoch(epoch, step, run.selection.mask(), wide, looks)
    if step == 0:
        run.schedule.begin_epoch(epoch, plan, run.selection.share)


def run_epochs(run: Run, data: Data) -> str:
    """Train and validate epoch by epoch. Returns completed, early_stopped, time_capped or
    interrupted.
    """
    metrics = run.metrics
    clock = run.clock
    outputs = run.outputs
    plan = data.plan
    kept_out = load_kept_out(data, run.config) if run.selection.target.keeps_out else None
    print_rank0(epoch_line(run.config))
    clock.eval_steps = len(data.val)
    while (status := clock.ending(metrics.epoch, metrics.step, metrics.history["val_acc"])) is None:
        clock.start()
        begin_epoch(run, plan)
        batches = device_batches(data.train, run.device, metrics.read_errors)
        look_again(run, batches, plan.look_batches)
        whole = train_one_epoch(run, batches, len(plan))
        predict_kept_out(run, kept_out)
        clock.pause()
        if not whole and not metrics.step:
            status = "completed" if metrics.epoch else "time_capped"
            print_rank0("training.max_minutes are over: no step of this epoch fitted in")
            break
        val_acc = validate(run, data.val)
        if val_acc is None:
            status = "interrupted" if clock.stop.signal is not None else "time_capped"
            if status == "time_capped":
                print_rank0(
                    "training.max_minutes are over: the last validation did not fit in and was left"
                )
            break
        end_epoch(run, plan, val_acc, whole)
        if not whole:  # the checkpoint is the one before the cap
            return "completed" if clock.out_of_time() else "time_capped"
    at = (metrics.epoch, metrics.step)
    if status in ("interrupted", "time_capped") and outputs.saved_at != at:
        run.save()
    return status


def end_epoch(run: Run, plan: EpochPlan, val_acc: float, whole: bool) -> None:
    """Close the epoch: its row, its checkpoint, the weights if it is the best, its line of the
    log. whole: whether it was trained to its end.
    """
    metrics = run.metrics
    done = metrics.step / len(plan) if len(plan) else 1.0
    considered = plan.considered_samples(metrics.epoch)
    row = close_epoch(run, val_acc, done * plan.dense_samples, done * considered)
    metrics.epochs_completed += whole
    print_rank0(epoch_line(run.config, row))
    run.outputs.close_epoch(row)
    if whole:
        metrics.epoch += 1
        metrics.step = 0
        run.save(best=metrics.is_best())
    run.export()
    run.outputs.log(row, whole)
    if whole and metrics.epoch == 1 and run.device.type == "cpu":
        say_if_long(run.config.training, run.clock.train_seconds + run.clock.eval_seconds)


def validate(run: Run, loader: Loader) -> float | None:
    """`evaluate` over `loader` with the running statistics of all processes, timed.

    None where it was cut short; the statistics are then as before, so that the resumed run ends as
    one left alone.
    """
    started = time.monotonic()
    if run.clock.signalled():
        return None
    local = average_running_statistics(run.network.statistics(), run.dist)
    batches = device_batches(loader, run.device, run.metrics.read_errors)
    counts = evaluate(run.network, batches, run.clock)
    if counts is not None:
        run.clock.eval_seconds = time.monotonic() - started
        run.metrics.by_class = list(counts)
        return counts.accuracy()
    for buffer, value in local:
        buffer.copy_(value)
    return None


class Session(NamedTuple):
    """What a process has before it knows its data: its place among others, and its time."""

    device: torch.device
    dist: Dist
    stop: Stop
    started: float  # time.monotonic() seconds


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
    folder = checkpoint_folder(config)
    settings = config.model_dump(exclude={"logging", "imports"})
    dist = meet(config.training, device, [settings, identities(config.imports), str(folder)])
    session = Session(device, dist, stop, started)
    if dist.rank == 0:
        prepare_outputs(config.logging)
    with claimed(folder) if dist.rank == 0 else contextlib.nullcontext():
        outcome = train_in_folder(config, session, resume)
    dist.leave()
    return outcome


def train_in_folder(
    config: Config, session: Session, resume: str | None
) -> tuple[dict[str, Any], Path]:
    """`train`, in a checkpoint folder that is this run's own. Each step needs what the one before
    returns.
    """
    device, dist, stop, _ = session
    path = dist.broadcast(find_checkpoint(config, resume))
    state = None if path is None else load_checkpoint(path, config)
    board = open_tensorboard(config.logging) if dist.rank == 0 else None
    data = build_data(config, device, dist)
    model = build_model(config, data)
    run = build_run(config, model, data, session)
    introduce(run, data)
    if device.type == "cuda" or config.training.compile != "off":
        run.warm_up()
    if resume is not None:
        continue_from(run, path, state)
    copies = copies_of_weights(config.training)
    facts = run.network.describe(data.train.dataset.classes)
    if config.imports:
        own = own_parts(config)
        facts |= {"imports": identities(config.imports), "own_model": "model.name" in own}
    run.outputs.open(board, run.network.model, copies, facts, kept(config.imports))
    stop.training = True
    return train_and_report(run, data)


def build_data(config: Config, device: torch.device, dist: Dist) -> Data:
    """The data of a run. Collective."""
    configure_backends(fixed_shape(config), device)
    return build_dataloaders(config, device, dist)


def build_model(config: Config, data: Data) -> nn.Module:
    """The network that the run starts from, by the seed. Raises RequestError where a step of this
    plan would be of a single sample that its BatchNorm cannot normalise.
    """
    torch.manual_seed(config.training.seed)
    model = get_model(config.model, data.classes, config.dataset.image_size)
    check_start(config, model, data.plan, not parts_of(config).scores.before_loading)
    return model


def fit_to_data(network: Network, data: Data) -> None:
    """Give the network the moments and the class weights of its training set, where asked for."""
    dataset = data.train.dataset
    indices = data.plan.all_indices
    if network.dataset.normalise == "measured":
        network.normalise_by(measure_moments(dataset, indices))
    if network.loss.balances:
        network.loss.weigh_classes(class_counts(dataset, indices), network.device)
    if isinstance(network.loss, AsFarAsWrong):
        network.loss.know_labels(labels_by_index(dataset, indices))


def build_run(config: Config, model: nn.Module, data: Data, session: Session) -> Run:
    device, dist, stop, started = session
    planned = shares_of(config).planned(data.plan)
    samples = int(data.plan.all_indices.max()) + 1
    if config.dataset.max_bad_images:  # a stand-in may be a sample that is not trained on
        size = len(data.train.dataset)
        samples = math.ceil(samples / size) * size
    build = partial(Run.build, config, model, device, planned, samples, dist, stop, started)
    run = build(data.classes, partial(fit_to_data, data=data))
    if dist.rank:
        seed_rank(config.training.seed, dist.rank)
    return run


def class_counts(dataset: ImageDataset, indices: np.ndarray) -> np.ndarray:
    """How many of the samples int64 [n] each class has, int64 [classes], with label noise."""
    labels = labels_by_index(dataset, indices)
    return np.bincount(labels[labels >= 0], minlength=len(dataset.classes))


def labels_by_index(dataset: ImageDataset, indices: np.ndarray) -> np.ndarray:
    """The labels of the samples at `indices`, int64, with label noise, by index; -1 elsewhere."""
    found = np.full(int(indices.max()) + 1, -1)
    labels = dataset.labels()[indices % len(dataset)]
    found[indices] = np.where(labels < 0, -1, dataset.noisy_labels(labels, indices))
    return found


def say_noisy_labels(config: Config) -> None:
    """Print what `training.noisy_labels` has set, or the config in its place."""
    settings = spelled(config.model_dump())
    names = [f"{part}.{name}" for part, values in NOISY_LABELS.items() for name in values]
    print_rank0(
        f"training.noisy_labels: {', '.join(f'{name}={settings[name]}' for name in names)}; early "
        "learning and any mixing act as far as labels look wrong\n"
    )


def introduce(run: Run, data: Data) -> None:
    """Print what is about to be trained. Collective."""
    size = sum(parameter.numel() for parameter in run.network.model.parameters())
    pictures = run.dist.all_gather([own_pictures(data.val)])
    facts = Facts(run.outputs.environment["gpu"], run.dist.world, size, run.network.base_flop)
    announce(run.config, facts, data.plan, data.classes, int(pictures.sum()))
    if run.config.training.noisy_labels:
        say_noisy_labels(run.config)
    kept_out = len(data.kept_out)
    if kept_out:
        key = f"ast.target_activation={run.config.ast.target_activation}"
        print_rank0(
            f"note: {key} keeps {kept_out:,} pictures out until it is decided by them whether a "
            "selection begins"
        )
    unread = unread_keys(run.config)
    if unread:
        print_rank0(f"note: nothing reads {', '.join(unread)} in this run\n")


def continue_from(run: Run, path: Path | None, state: dict[str, Any] | None) -> None:
    """Go on from a checkpoint, or say that there is none."""
    if state is None:
        print_rank0("--resume auto: there is no checkpoint of this config, the run starts afresh")
        for folder in folders_of_other_code(run.config) if run.dist.rank == 0 else ():
            print_rank0(
                f"note: {folder} has one of this config with another text of its imports: "
                f"--resume {folder} goes on from it with today's"
            )
        return
    run.earlier_imports = list(state.get("earlier_imports", []))
    changed = changed_code(state["config"].get("imports", []), run.config.imports)
    if changed:
        run.earlier_imports += identities(state["config"]["imports"])
        print_rank0(f"note: resumed with other code than it began with: {'; '.join(changed)}")
    log = run.config.logging.jsonl_path
    resume_parts(run.parts(), path, state, log, lambda: run.metrics.history, run.dist)
    print_rank0(f"resumed from {path}: epoch {run.metrics.epoch + 1}, step {run.metrics.step}")


def say_of_target(run: Run, status: str, kept_out: int) -> None:
    """At a run's end, say what an automatic target did without, and why it let every epoch train on
    all samples, where it did. kept_out: how many pictures were kept out at first.
    """
    target = run.selection.target
    facts = target.facts()
    if status == "interrupted":
        return
    said = []
    if all(share is None for share in run.metrics.history["target"]):
        why = target.why_dense(run.selection.epoch_cost)
        said += [] if why is None else [f"trained on all samples in every epoch: {why}"]
    if kept_out and facts is not None:
        epochs = facts["epochs_without"]
        said.append(f"kept {kept_out:,} pictures out of {epochs} epoch{'s' * (epochs != 1)}")
    if said:
        key = f"ast.target_activation={run.config.ast.target_activation}"
        print_rank0(f"note: {key} {'; it '.join(said)}")


def code_facts(run: Run) -> dict[str, Any]:
    """What results say of imports: which parts come from which, their texts, and what the run was
    trained with before it was resumed with another text.
    """
    imports = run.config.imports
    if not imports:
        return {}
    texts = {name: text.decode("utf-8", "replace") for name, text in kept(imports).items()}
    earlier = {"earlier_imports": run.earlier_imports} if run.earlier_imports else {}
    return {"own_parts": own_parts(run.config), "imports": texts, **earlier}


def train_and_report(run: Run, data: Data) -> tuple[dict[str, Any], Path]:
    """Train to the end, and leave the results whatever that end is: (the result, its file)."""
    outcome = {"status": "failed"}
    suspects = None
    dataset = data.train.dataset
    try:
        with ending_workers():
            outcome = {"status": run_epochs(run, data)}
        say_of_target(run, outcome["status"], len(data.kept_out))
        run.outputs.finish()
        if outcome["status"] != "interrupted":
            error = 100 - max(run.metrics.history["val_acc"], default=0.0)
            suspects = run.selection.suspects(dataset, error)
    except Exception as error:
        known = explained(error, run.config.logging.output_dir)
        outcome = {"status": "failed", "error": one_line(known)}
        if known is not error:
            raise known from None
        raise
    finally:
        metrics = run.metrics
        counts = metrics.times_trained if run.outputs.checkpoints else None
        diet = count_diet(dataset, data.plan.all_indices, counts)
        target = run.selection.target.facts()
        target = (
            {} if target is None else {"auto_target": {"kept_out": len(data.kept_out), **target}}
        )
        facts = {
            **diet_figures(diet, metrics.by_class),
            "base_flop_per_sample": run.network.base_flop,
            "idle_keys": sorted(unread_keys(run.config)),
            **code_facts(run),
            "val_split": data.val.dataset.split,
            "suspected_labels": None if suspects is None else suspects.summary(),
            **target,
        }
        environment = run.outputs.environment
        result = build_result(run.config, outcome, metrics.result(), run.clock, facts, environment)
        results_path = run.outputs.close(result, diet)
        if suspects is not None and results_path is not None:
            suspects.write(results_path)
    return run.dist.broadcast((result, results_path))


# --------------------------------------------------------------------------------------------- Main


def execute(config: Config, resume: str | None = None) -> int:
    """Train `config` as a command does: signals watched, results saved. Returns the exit code.

    Where a run that is to be resumed has come to its end, it says where its results are.
    """
    folder = checkpoint_folder(config)
    own = resume == "auto" or (resume is not None and Path(resume) in (folder, folder / "last.pt"))
    done = finished_run(folder) if own else None
    if done is not None:
        print_rank0(f"this run is finished: {done.path}; without --resume it is trained again")
        return 0
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
    args = training_options(argv)
    config = load_config(args.config, args.overrides, imports=args.imports)
    return prepare(config) if args.prepare_only else execute(config, args.resume)


if __name__ == "__main__":
    sys.exit(run_cli(main))
