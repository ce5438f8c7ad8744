"""What the lab trained before must be what it trains now: ledgers, and the weights bit for bit.

`golden.json` holds them. Where a change of the training is meant, write it anew:

    PYTHONPATH=scripts python tests/test_golden.py
"""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_config
from lab.config.loading import Config, checkpoint_folder
from lab.engine.checkpoint import load_checkpoint
from runs import StopAfter, ranks
from train_ast import train

GOLDEN = Path(__file__).with_name("golden.json")
TINY = [
    "model.name=test_resnet",
    "dataset.image_size=16",
    "training.batch_size=32",
    "training.lr=0.05",
]
TINY += [
    "dataset.max_train_samples=256",
    "dataset.max_val_samples=64",
    "training.epochs=3",
    "ast.warmup_epochs=1",
]
HISTORY = ["ast.scoring=history", "ast.target_activation=0.5"]
CASES = {  # settings, number of processes, the step at which the run is interrupted and resumed
    "dense": (["ast.mode=dense"], 1, 0),
    "random": (["ast.mode=random"], 1, 0),
    "batch-scored": ([], 1, 0),
    "batch-scored, interrupted": ([], 1, 12),
    "packed, accumulated": (["ast.pack=true", "training.grad_accum_steps=2"], 1, 0),
    "packed, accumulated, interrupted": (["ast.pack=true", "training.grad_accum_steps=2"], 1, 14),
    "top-k": (["ast.rule=topk"], 1, 0),
    "low resolution": (
        ["ast.score_resolution=8", "training.optimizer=adamw", "training.lr=0.003"],
        1,
        0,
    ),
    "history": ([*HISTORY, "ast.explore_weight_cap=4"], 1, 0),
    "history, interrupted": ([*HISTORY, "ast.explore_weight_cap=4"], 1, 10),
    "InfoBatch": (["ast.scoring=history", "ast.rule=infobatch", "ast.entropy_weight=0"], 1, 0),
    "cached": (
        ["dataset.cache=device", "dataset.augment=pad_crop", "training.grad_clip_norm=1"],
        1,
        0,
    ),
    "batch-scored, two processes": (["ast.target_activation=0.5"], 2, 0),
    "history, two processes": (HISTORY, 2, 0),
}


def kind_of_machine() -> str:
    """Float arithmetic repeats bit for bit on the same torch and instruction set alone."""
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


def weights_of(config: Config) -> str:
    """SHA-256 of the last checkpoint's weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in load_checkpoint(checkpoint_folder(config) / "last.pt", config)[
        "model"
    ].items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def figures(name: str, folder: Path) -> dict[str, Any]:
    """The ledger of a case and the hash of its weights."""
    settings, processes, step = CASES[name]
    config = make_config(*TINY, *settings, f"logging.output_dir={folder}/out")
    if processes > 1:
        result = ranks(processes, lambda rank: train(config)[0], folder / "ranks").results()[0]
    else:
        if step:
            assert train(config, StopAfter(step))[0]["status"] == "interrupted"
        result, _ = train(config, resume="auto" if step else None)
    return {"ledger": result["ledger"], "weights": weights_of(config)}


@pytest.mark.parametrize("name", CASES)
def test_a_run_trains_what_it_always_did(name, tmp_path):
    golden = json.loads(GOLDEN.read_text())
    got = figures(name, tmp_path)
    expected = golden["cases"][name]
    assert got["ledger"]["loaded"] == pytest.approx(expected["ledger"]["loaded"], rel=0.1)
    assert got["ledger"]["trained"] == pytest.approx(expected["ledger"]["trained"], rel=0.1)
    if golden["machine"] == kind_of_machine():
        assert got == expected


def test_an_interruption_changes_nothing():
    cases = json.loads(GOLDEN.read_text())["cases"]
    assert all(each == cases[name.removesuffix(", interrupted")] for name, each in cases.items())


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        cases = {
            name: figures(name, Path(scratch) / str(number)) for number, name in enumerate(CASES)
        }
    GOLDEN.write_text(json.dumps({"machine": kind_of_machine(), "cases": cases}, indent=2) + "\n")
