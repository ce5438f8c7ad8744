"""What a run must train, written a second time: plainly, in float64, sharing no line with the lab.

Networks come from timm, optimizers from torch. All else is here: pictures, order, augmentation,
significance, control law, rules of selection, packing, accumulation and the rate's schedule. What a
setting means where a config does not name it stands in DEFAULTS, so a changed default is a change.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
import yaml
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

CLASSES = 10
SIDE = 8  # pixels of a digit; none is resized
MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)
DEFAULTS = {
    "model.name": "resnet18",
    "dataset.augment": "none",
    "dataset.random_erasing": 0.0,
    "dataset.max_train_samples": None,
    "dataset.max_val_samples": None,
    "ast.mode": "ast",
    "ast.scoring": "batch",
    "ast.rule": "pi",
    "ast.target_activation": 0.25,
    "ast.entropy_weight": 1.0,
    "ast.score_resolution": SIDE,
    "ast.kp": 0.1,
    "ast.ki": 0.01,
    "ast.kp_warmup_epochs": 0,
    "ast.explore": 0.1,
    "ast.min_active": 2,
    "ast.pack": False,
    "ast.warmup_epochs": 1,
    "ast.anneal_epochs": 0,
    "training.epochs": 10,
    "training.batch_size": 128,
    "training.lr": 0.1,
    "training.lr_warmup_epochs": 0,
    "training.optimizer": "sgd",
    "training.momentum": 0.9,
    "training.weight_decay": 5e-4,
    "training.label_smoothing": 0.0,
    "training.grad_accum_steps": 1,
    "training.grad_clip_norm": None,
    "training.seed": 0,
}


def settings_of(overrides: Iterable[str]) -> dict[str, Any]:
    """The settings by key. Raises KeyError for one that the reference would pass over."""
    settings = dict(DEFAULTS)
    for key, _, text in (override.partition("=") for override in overrides):
        assert settings[key] is None or key in settings
        settings[key] = yaml.safe_load(text)
    return settings


# --------------------------------------------------------------------------------------------- Data


def digits(part: int) -> tuple[Tensor, Tensor]:
    """Pictures uint8 [n, 3, 8, 8] and labels int64 [n] of training (0) or validation (1)."""
    pixels, labels = load_digits(return_X_y=True)
    chosen = train_test_split(
        np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels
    )[part]
    grey = np.round(pixels[chosen] * 255 / 16).astype(np.uint8).reshape(-1, 1, SIDE, SIDE)
    return torch.from_numpy(grey.repeat(3, axis=1)), torch.from_numpy(labels[chosen])


def subset(size: int, limit: int | None) -> np.ndarray:
    return np.sort(np.random.default_rng(0).permutation(size)[:limit])


WORD = 2**64 - 1
GOLDEN_RATIO = 0x9E3779B97F4A7C15


def mixed(x: int) -> int:
    """SplitMix64's output function."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & WORD
    return x ^ (x >> 31)


def uniforms(seed: int, epoch: int, index: int, count: int = 47) -> list[float]:
    """Numbers in [0, 1) of a sample: the counter mode of SplitMix64."""
    key = mixed(mixed(seed + GOLDEN_RATIO & WORD) + epoch & WORD)
    start = mixed(key + index & WORD)
    return [(mixed(start + k * GOLDEN_RATIO & WORD) >> 11) / 2**53 for k in range(1, count + 1)]


def shifted(image: Tensor, numbers: list[float]) -> Tensor:
    """Moved by up to a pixel each way over black, and mirrored by chance."""
    top = math.floor(3 * numbers[0])
    left = math.floor(3 * numbers[1])
    image = F.pad(image, [1, 1, 1, 1])[:, top : top + SIDE, left : left + SIDE]
    return image.flip(-1) if numbers[22] < 0.5 else image


def erased(image: Tensor, numbers: list[float], chance: float) -> Tensor:
    """With a grey box of 2 to 33 % of the picture, by chance (Zhong et al. 2020, algorithm 1)."""
    if numbers[24] >= chance:
        return image
    for area, ratio in zip(numbers[25:35], numbers[35:45], strict=True):
        area = 0.02 + (1 / 3 - 0.02) * area
        ratio = math.exp(math.log(10 / 3) * (2 * ratio - 1))
        height = math.sqrt(area / ratio)
        width = math.sqrt(area * ratio)
        if max(height, width) <= 1:
            break
    else:
        raise AssertionError("no box of these numbers fits: choose another seed")
    height = max(1, round(height * SIDE))
    width = max(1, round(width * SIDE))
    top = math.floor(numbers[45] * (SIDE - height + 1))
    left = math.floor(numbers[46] * (SIDE - width + 1))
    image = image.clone()
    image[:, top : top + height, left : left + width] = (255 * MEAN).round().to(torch.uint8)
    return image


def smaller(images: Tensor, resolution: int) -> Tensor:
    """Pictures [n, 3, 8, 8] at another resolution, bilinear with antialiasing."""
    scale = SIDE / resolution
    pixels = torch.arange(SIDE, dtype=torch.float64) + 0.5
    centres = (torch.arange(resolution, dtype=torch.float64) + 0.5) * scale
    weights = (1 - (pixels - centres[:, None]).abs() / scale).clamp(min=0)
    weights = weights / weights.sum(1, keepdim=True)
    return weights @ images @ weights.T


# ------------------------------------------------------------------------------------------ The run


def small_conv(_: str, num_classes: int) -> nn.Module:
    """Four 3x3 convolutions with BatchNorm. Rounding does not grow in it as in deeper networks."""
    layers: list[nn.Module] = []
    for before, after in ((3, 40), (40, 80), (80, 160), (160, 160)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    layers[-1] = nn.AdaptiveMaxPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(160, num_classes))


def cross_entropy(likely: Tensor, labels: Tensor) -> Tensor:
    """Of log-probabilities [n, classes], nats [n]."""
    return -likely.gather(1, labels[:, None])[:, 0]


class Batch(NamedTuple):
    images: Tensor  # uint8 [n, 3, 8, 8], augmented
    labels: Tensor  # int64 [n]
    indices: Tensor  # int64 [n]


class Outcome(NamedTuple):
    ledger: dict[str, int]
    history: dict[str, list]
    trained_by_class: list[int]  # how often samples of each class were trained on
    weights: dict[str, Tensor]  # and buffers, float64
    first: dict[str, Tensor]  # what they were before training
    margin: float  # how far the decision nearest to the other choice was from it


class Reference:
    """A run of these settings, one process, one thread of thought."""

    def __init__(self, overrides: Iterable[str]):
        self.settings = settings_of(overrides)
        seed = self.settings["training.seed"]
        torch.manual_seed(seed)
        name = self.settings["model.name"]
        build = {"small_conv": small_conv}.get(name, timm.create_model)
        self.model = build(name, num_classes=CLASSES).double().train()
        self.first = {key: each.clone() for key, each in self.model.state_dict().items()}
        self.images, self.labels = digits(0)
        self.indices = subset(len(self.labels), self.settings["dataset.max_train_samples"])
        self.optimizer = self.build_optimizer()
        self.sparse = False
        self.threshold: float | None = None
        self.integral = 0.0
        self.iqr: float | None = None
        self.stored = np.full(len(self.labels), np.inf)  # significance at the last visit
        self.weight_of = np.ones(len(self.labels))  # of a sample's loss
        self.queue: list[Batch] = []
        self.window: list[Batch] = []
        self.window_samples = 0
        self.done = 0.0  # planned steps that the rate has seen
        self.since = 0.0  # and loop steps since, in planned ones
        self.margin = math.inf
        self.times = np.zeros(len(self.labels), int)
        self.ledger = dict.fromkeys(("loaded", "scored", "trained", "steps"), 0)
        self.history: dict[str, list] = {}

    def build_optimizer(self) -> torch.optim.Optimizer:
        decay = self.settings["training.weight_decay"]
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        if self.settings["training.optimizer"] == "adamw":
            return torch.optim.AdamW(groups)
        return torch.optim.SGD(groups, momentum=self.settings["training.momentum"])

    # ------------------------------------------------------------------------------------- Planning

    def is_sparse(self, epoch: int) -> bool:
        epochs = self.settings["training.epochs"]
        at_end = self.settings["ast.anneal_epochs"]
        if self.settings["ast.rule"] == "infobatch":  # the last eighth, as its paper has it
            at_end = math.ceil(epochs / 8)
        inside = self.settings["ast.warmup_epochs"] <= epoch < epochs - at_end
        return inside and self.settings["ast.mode"] != "dense"

    def scores_batches(self) -> bool:
        return self.settings["ast.mode"] == "ast" and self.settings["ast.scoring"] == "batch"

    def planned(self, epoch: int) -> tuple[float, float]:
        """(the share of the samples an epoch loads, as planned; optimizer steps a loaded batch)."""
        target = self.settings["ast.target_activation"]
        if not self.is_sparse(epoch):
            return 1.0, 1.0
        if self.scores_batches():
            return 1.0, target if self.settings["ast.pack"] else 1.0
        return 0.75 if self.settings["ast.rule"] == "infobatch" else target, 1.0

    def whole_batches(self, samples: int) -> int:
        batch = self.settings["training.batch_size"]
        assert samples >= batch
        return samples // batch

    def planned_steps(self, epoch: int) -> float:
        share, per_batch = self.planned(epoch)
        return self.whole_batches(round(share * len(self.indices))) * per_batch

    def rate(self) -> float:
        """The learning rate now: linear up, then half a cosine down."""
        epochs = range(self.settings["training.epochs"])
        progress = (self.done + self.since / 2) / sum(map(self.planned_steps, epochs))
        shares = [math.prod(self.planned(epoch)) for epoch in epochs]
        warmup = sum(shares[: self.settings["training.lr_warmup_epochs"]]) / sum(shares)
        if progress < warmup:
            return self.settings["training.lr"] * progress / warmup
        fallen = min(1.0, (progress - warmup) / (1 - warmup))
        return self.settings["training.lr"] * (1 + math.cos(math.pi * fallen)) / 2

    def batch_of(self, epoch: int, indices: np.ndarray) -> Batch:
        images = []
        for index in indices.tolist():
            image = self.images[index]
            if self.settings["dataset.augment"] == "pad_crop":
                numbers = uniforms(self.settings["training.seed"], epoch, index)
                image = shifted(image, numbers)
                image = erased(image, numbers, self.settings["dataset.random_erasing"])
            images.append(image)
        return Batch(torch.stack(images), self.labels[indices], torch.from_numpy(indices))

    # -------------------------------------------------------------------------------------- Scoring

    def logits(self, images: Tensor, resolution: int = SIDE) -> Tensor:
        pixels = images.double()
        pixels = pixels if resolution == SIDE else smaller(pixels, resolution)
        return self.model((pixels / 255 - MEAN) / STD)

    def significance(self, logits: Tensor, labels: Tensor) -> Tensor:
        likely = logits.log_softmax(-1)
        entropy = -(likely.exp() * likely).sum(-1)
        return cross_entropy(likely, labels) + self.settings["ast.entropy_weight"] * entropy

    @torch.no_grad()
    def score(self, batch: Batch) -> tuple[Tensor, int]:
        """(significance [n], correct predictions), by running averages as in validation."""
        self.model.eval()
        logits = self.logits(batch.images, self.settings["ast.score_resolution"])
        self.model.train()
        return self.significance(logits, batch.labels), self.right(logits, batch.labels)

    def right(self, logits: Tensor, labels: Tensor) -> int:
        first, second = logits.topk(2).values.T
        self.margin = min(self.margin, float((first - second).min()))
        return int((logits.argmax(-1) == labels).sum())

    # ------------------------------------------------------------------------------------- Choosing

    def move_threshold(self, activation: float, target: float, spread: float, epoch: float) -> None:
        """The law. epoch: sparse epochs so far, with their fraction."""
        warmup = self.settings["ast.kp_warmup_epochs"]
        kp = self.settings["ast.kp"] * (min(1.0, epoch / warmup) if warmup else 1.0)
        error = activation - target
        self.integral += error
        self.threshold += (kp * error + self.settings["ast.ki"] * self.integral) * spread
        assert self.threshold > 0, "on its bound the law is another one: choose another seed"

    def far(self, scores: Any, threshold: float) -> None:
        gaps = np.abs(np.asarray(scores) - threshold)
        self.margin = min(self.margin, float(gaps.min()))

    def choose_of_batch(self, scores: Tensor, epoch: float, row: dict[str, list]) -> np.ndarray:
        """Positions in the batch, ascending."""
        scores = scores.numpy()
        order = np.argsort(-scores)
        ranked = scores[order]
        target = self.settings["ast.target_activation"]
        floor = self.settings["ast.min_active"]
        if self.settings["ast.rule"] == "topk":
            count = round(target * len(scores))
            self.far(ranked[count : count + 1], ranked[count - 1])
            row["activation"].append(count / len(scores))
            row["threshold"].append(ranked[count - 1])
            return np.sort(order[:count])
        if self.threshold is None:
            self.threshold = float(np.quantile(scores, 1 - target))
        self.far(scores, self.threshold)
        above = int((scores > self.threshold).sum())
        assert 0 < above < len(scores), "a lost threshold starts anew: choose another seed"
        row["activation"].append(above / len(scores))
        row["threshold"].append(self.threshold)
        iqr = ranked[len(scores) // 4] - ranked[3 * len(scores) // 4]
        self.iqr = iqr if self.iqr is None else 0.9 * self.iqr + 0.1 * iqr
        self.move_threshold(above / len(scores), target, self.iqr, epoch)
        return np.sort(order[: max(above, floor)])

    def choose_of_epoch(self, epoch: int, order: np.ndarray, row: dict[str, list]) -> np.ndarray:
        """Before loading, by stored scores: the indices to load, in order."""
        dice = np.random.default_rng((self.settings["training.seed"], epoch, 1))
        drawn = dice.random(len(order), dtype=np.float32)
        scores = self.stored[order]
        known = scores[np.isfinite(scores)]
        self.weight_of[:] = 1.0
        if self.settings["ast.rule"] == "infobatch":
            mean = known.mean()
            self.far(scores, mean)
            easy = scores < mean
            self.weight_of[order[easy]] = 2.0
            chosen = ~easy | (drawn < 0.5)
            row["activation"].append(chosen.mean())
            row["threshold"].append(mean)
            return order[chosen]
        explored = drawn < np.float32(self.settings["ast.explore"])
        # the threshold is for the others, of whom so many are to be active that all are the target
        share = self.settings["ast.explore"]
        target = (self.settings["ast.target_activation"] - share) / (1 - share)
        others = np.flatnonzero(~explored)
        known = np.sort(scores[others][np.isfinite(scores[others])])[::-1]
        size = self.settings["training.batch_size"]
        iqr = known[len(known) // 4] - known[3 * len(known) // 4]
        for _ in range(math.ceil(len(others) / size)):  # it counts as that of every batch
            self.iqr = iqr if self.iqr is None else 0.9 * self.iqr + 0.1 * iqr
        if self.threshold is None:
            self.threshold = float(np.quantile(known, 1 - target))
        chosen = explored.copy()
        for start in range(0, len(others), size):
            here = others[start : start + size]
            self.far(scores[here], self.threshold)
            chosen[here] = scores[here] > self.threshold
            row["threshold"].append(self.threshold)
            passed = epoch - self.settings["ast.warmup_epochs"] + start / len(others)
            self.move_threshold(chosen[here].mean(), target, self.iqr, passed)
        row["activation"].append(chosen.mean())
        return order[chosen]

    # ------------------------------------------------------------------------------------- Training

    def train_on(self, batch: Batch, row: dict[str, list], count_right: bool) -> None:
        """Add the gradient of the summed loss to the window's."""
        logits = self.logits(batch.images)
        smoothing = self.settings["training.label_smoothing"]
        likely = logits.log_softmax(-1)
        plain = cross_entropy(likely, batch.labels)
        losses = (1 - smoothing) * plain - smoothing * likely.mean(-1)
        (losses * torch.from_numpy(self.weight_of[batch.indices])).sum().backward()
        self.window_samples += len(batch.labels)
        row["loss"] += plain.tolist()
        np.add.at(self.times, batch.indices, 1)
        scores = self.significance(logits.detach(), batch.labels)
        self.stored[batch.indices] = scores.numpy()
        if count_right:
            row["right"].append(self.right(logits.detach(), batch.labels))
            row["predicted"].append(len(batch.labels))

    def step(self, row: dict[str, list]) -> None:
        """Step on the mean gradient over all samples of the window."""
        parameters = list(self.model.parameters())
        for parameter in parameters:
            parameter.grad /= self.window_samples
        limit = self.settings["training.grad_clip_norm"]
        if limit is not None:
            norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters))
            for parameter in parameters:
                parameter.grad *= min(1.0, limit / (norm + 1e-6))
        row["lr"] = [self.rate()]
        for group in self.optimizer.param_groups:
            group["lr"] = row["lr"][0]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += self.since
        self.since = 0.0
        self.ledger["trained"] += self.window_samples
        self.ledger["steps"] += 1
        self.window_samples = 0

    def packed(self, batch: Batch) -> Batch | None:
        """The oldest full batch of what was chosen, once there is one."""
        self.queue.append(batch)
        waiting = Batch(*map(torch.cat, zip(*self.queue, strict=True)))
        size = self.settings["training.batch_size"]
        if len(waiting.labels) < size:
            return None
        self.queue = [Batch(*(each[size:] for each in waiting))]
        return Batch(*(each[:size] for each in waiting))

    def scored(self, batches: list[Batch]) -> Iterator[tuple[Batch, Tensor, int]]:
        """Batches with their scores: but for topk, a batch ahead of the training."""
        ahead = self.settings["ast.rule"] != "topk"
        found = [self.score(batches[0])] if ahead else []
        for number, batch in enumerate(batches):
            if number + ahead < len(batches):
                found.append(self.score(batches[number + ahead]))
            yield batch, *found.pop(0)

    def chosen(self, batches: list[Batch], epoch: int, row: dict[str, list]) -> Iterator:
        """What each loop step trains on; None while packing waits."""
        if not (self.sparse and self.scores_batches()):
            yield from batches
            return
        for number, (batch, scores, right) in enumerate(self.scored(batches)):
            self.ledger["scored"] += len(scores)
            row["right"].append(right)
            row["predicted"].append(len(scores))
            passed = epoch - self.settings["ast.warmup_epochs"] + number / len(batches)
            at = self.choose_of_batch(scores, passed, row)
            active = Batch(*(each[at] for each in batch))
            yield self.packed(active) if self.settings["ast.pack"] else active

    def train_epoch(self, epoch: int, row: dict[str, list]) -> None:
        self.sparse = self.is_sparse(epoch)
        seed = self.settings["training.seed"]
        order = np.random.default_rng((seed, epoch)).permutation(self.indices)
        if not self.sparse:
            self.queue = []
            self.weight_of[:] = 1.0
        elif self.settings["ast.scoring"] == "history":
            order = self.choose_of_epoch(epoch, order, row)
        share, per_batch = self.planned(epoch)
        planned = self.whole_batches(round(share * len(self.indices)))
        if not (self.sparse and self.settings["ast.scoring"] == "history"):
            order = order[: planned * self.settings["training.batch_size"]]
        steps = self.whole_batches(len(order))
        parts = np.split(order[: steps * self.settings["training.batch_size"]], steps)
        batches = [self.batch_of(epoch, part) for part in parts]
        scored = self.sparse and self.scores_batches()
        forwards = 0
        for ready in self.chosen(batches, epoch, row):
            self.ledger["loaded"] += self.settings["training.batch_size"]
            self.since += planned / steps * per_batch
            if ready is None:
                continue
            self.train_on(ready, row, count_right=not scored)
            forwards += 1
            if forwards == self.settings["training.grad_accum_steps"]:
                self.step(row)
                forwards = 0
        if forwards:
            self.step(row)

    @torch.no_grad()
    def validate(self) -> float:
        """Accuracy, percent."""
        images, labels = digits(1)
        indices = subset(len(labels), self.settings["dataset.max_val_samples"])
        self.model.eval()
        right = self.right(self.logits(images[indices]), labels[indices])
        self.model.train()
        return 100 * right / len(indices)

    def run(self) -> Outcome:
        for epoch in range(self.settings["training.epochs"]):
            before = dict(self.ledger)
            row: dict[str, list] = {
                key: [] for key in ("activation", "threshold", "loss", "right", "predicted", "lr")
            }
            self.train_epoch(epoch, row)
            done = {key: value - before[key] for key, value in self.ledger.items()}
            loads_all = self.planned(epoch)[0] == 1
            size = self.settings["training.batch_size"]
            dense = self.whole_batches(len(self.indices)) * size
            considered = dense if loads_all else len(self.indices)
            figures = {
                "train_acc": 100 * sum(row["right"]) / sum(row["predicted"]),
                "val_acc": self.validate(),
                "activation_rate": mean(row["activation"]) or done["loaded"] / considered,
                "threshold": mean(row["threshold"]),
                "train_loss": mean(row["loss"]),
                "lr": row["lr"][-1],
                **{f"samples_{key}": done[key] for key in ("loaded", "scored", "trained")},
                "optimizer_steps": done["steps"],
            }
            for key, value in figures.items():
                self.history.setdefault(key, []).append(value)
        by_class = np.bincount(self.labels, self.times, CLASSES).astype(int).tolist()
        weights = self.model.state_dict()
        return Outcome(self.ledger, self.history, by_class, weights, self.first, self.margin)


def mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
