"""What the tests share: a lab small enough for a CPU, and real data made on the spot."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image
from torch import nn

from lab.base.launch import SIGNALS
from lab.config.loading import Config
from lab.data.loading import BatchScores, DeviceBatch
from train_ast import Run, ast_forward, load_config, score, train, train_step

REPO = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # three test processes side by side on two cores
os.environ.setdefault("OMP_NUM_THREADS", "1")  # and so for the processes they start
settings.register_profile(
    "lab", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)  # machines may be busy
settings.load_profile("lab")


# Their tests trace a network. A process that has traced cannot fork one that trains.
TRACING = ("test_checkpoint", "test_forward_once", "test_reuse", "test_keys")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files with the most tests first, so that several processes end together; those that trace
    after all others.
    """
    sizes = Counter(item.path for item in items)
    last = {name: place for place, name in enumerate(TRACING, 1)}
    items.sort(key=lambda item: (last.get(item.path.stem, 0), -sizes[item.path], item.path))


@pytest.fixture(autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.getbasetemp() / "hf"))


def make_config(*overrides: str) -> Config:
    """Digits at 8 px on the CPU, sparse from the first epoch, with `overrides` laid over."""
    base = [
        "dataset.image_size=8",
        "training.batch_size=16",
        "training.device=cpu",
        "ast.warmup_epochs=0",
    ]
    return load_config(None, [*base, "metrics.base_flop_per_sample=1e6", *overrides])


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job ignores it, its children too
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class LayerNormNet(nn.Module):
    """Flatten, two layers with a LayerNorm between: every sample's output depends on that sample
    alone.
    """

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * 8 * 8, 24), nn.LayerNorm(24), nn.GELU()
        )
        self.head = nn.Linear(24, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images))


class BatchNormNet(nn.Module):
    """A convolution with BatchNorm: outputs depend on the batch, so scoring and training forwards
    differ.
    """

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images).flatten(1))


def make_run(model: nn.Module, *overrides: str) -> Run:
    run = Run.build(make_config(*overrides), model, torch.device("cpu"), planned_steps=100)
    run.start_epoch(run.config.ast.warmup_epochs, np.arange(0))
    return run


def as_batch(
    images: torch.Tensor, labels: torch.Tensor, indices: torch.Tensor | None = None
) -> DeviceBatch:
    """A batch as it comes from the loader; the samples are the first of the data set unless
    `indices` says which.
    """
    return DeviceBatch(images, labels, torch.arange(len(labels)) if indices is None else indices)


def scores_of(run: Run, images: torch.Tensor, labels: torch.Tensor) -> BatchScores:
    """The scores of a batch by the run's scoring."""
    return score(run, as_batch(images, labels))


def sparse_step(
    run: Run, images: torch.Tensor, labels: torch.Tensor, sparse_epochs: float = 0.0
) -> int | None:
    """Score a batch, and train on its active samples."""
    scores = scores_of(run, images, labels)
    return ast_forward(as_batch(images, labels), scores, run, sparse_epochs)


def trained_on(run: Run, *batch: torch.Tensor) -> int:
    """Forward and backward over a whole batch: images, labels and perhaps indices."""
    return train_step(as_batch(*batch), run)


def make_batch(size: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 10, (size,), generator=generator)


def loaded(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[DeviceBatch]:
    """(images, labels) pairs as they come from the loader."""
    for images, labels in pairs:
        yield DeviceBatch(images, labels, torch.arange(len(labels), device=labels.device))


def save_picture(path: Path, colour: Sequence[int], seed: int, side: int = 40) -> None:
    noise = np.random.default_rng(seed).integers(-40, 40, (side, side + 8, 3))
    pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)


COLOURS = {"blue": (30, 40, 200), "green": (30, 190, 40), "red": (200, 40, 30)}


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """An ImageFolder of JPEGs, three classes by colour: train with 8 a class, val with 3."""
    folder = tmp_path / "images"
    for part, count in (("train", 8), ("val", 3)):
        for label, (name, colour) in enumerate(COLOURS.items()):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                save_picture(
                    folder / part / name / f"{i}.jpg",
                    colour,
                    100 * label + i + 1000 * (part == "val"),
                )
    return folder


@pytest.fixture
def parquet_folder(tmp_path: Path) -> Path:
    """The same pictures as a Hugging Face dataset: train.parquet and test.parquet with image and
    label.
    """
    import datasets

    folder = tmp_path / "parquet"
    folder.mkdir()
    features = datasets.Features(
        {"img": datasets.Image(), "kind": datasets.ClassLabel(names=list(COLOURS))}
    )
    for part, count in (("train", 24), ("test", 9)):
        rows = {"img": [], "kind": []}
        for i in range(count):
            path = tmp_path / f"{part}{i}.png"
            save_picture(path, list(COLOURS.values())[i % 3], i, side=20)
            rows["img"].append({"bytes": path.read_bytes(), "path": None})
            rows["kind"].append(i % 3)
            path.unlink()
        datasets.Dataset.from_dict(rows, features=features).to_parquet(
            str(folder / f"{part}.parquet")
        )
    return folder


MINIMAL = {  # a file of the published lab: the documented keys alone
    "best_accuracy": 71.5,
    "total_time_hours": 0.5,
    "epochs_completed": 2,
    "training_history": {
        "epoch": [1, 2],
        "train_acc": [50.0, 60.0],
        "val_acc": [55.0, 71.5],
        "activation_rate": [0.4, 0.26],
        "threshold": [1.2, 0.9],
        "energy_savings": [60.0, 74.0],
        "step_time_ms": [10.0, 11.0],
        "est_energy_kj": [3.0, 6.5],
        "est_flops_g": [100.0, 170.0],
    },
}


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real runs, two of them one setting, a file with the documented keys, and two that cannot be
    used.
    """
    folder = tmp_path_factory.mktemp("results")
    small = [
        "model.name=test_resnet",
        "dataset.image_size=16",
        "dataset.max_train_samples=64",
        "ast.pack=true",
    ]
    small += ["training.epochs=3", "ast.warmup_epochs=1", f"logging.output_dir={folder}"]
    for overrides in (["ast.mode=ast"], ["ast.mode=ast", "training.seed=1"], ["ast.mode=dense"]):
        train(make_config(*small, *overrides))
    (folder / "final_results_20200101_000000.json").write_text(json.dumps(MINIMAL))
    (folder / "final_results_20200101_000001.json").write_text(json.dumps(MINIMAL)[:100])
    (folder / "final_results_20200101_000002.json").write_text('{"best_accuracy": 3}')
    return folder
