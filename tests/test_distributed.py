"""Several processes on one run (gloo on the CPU): what they train is what one process would have trained."""

import contextlib
import json
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import train_ast
from conftest import LayerNormNet, make_config
from test_checkpoint import TIMED
from train_ast import Config, Dist, checkpoint_folder, load_checkpoint, train


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def as_rank(rank: int, world: int, port: int, work: Callable[[int], Any], folder: Path) -> None:
    """What a process of `ranks` does: `work`, as torchrun would have started it; its output goes to a file."""
    code = 99
    with (folder / f"{rank}.out").open("w", 1) as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ.update({key: str(value) for key, value in facts.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
        torch.set_num_threads(1)
        try:
            torch.save(work(rank), folder / f"{rank}.pt")
            code = 0
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            file.flush()
            os._exit(code)


class Ended:
    """How the processes of `ranks` ended: exit codes, what they printed, what their work returned."""

    def __init__(self, codes: list[int], folder: Path):
        self.codes, self.folder = codes, folder
        self.texts = [(folder / f"{rank}.out").read_text() for rank in range(len(codes))]

    def results(self) -> list[Any]:
        assert self.codes == [0] * len(self.codes), "\n".join(self.texts)
        return [torch.load(self.folder / f"{rank}.pt", weights_only=False) for rank in range(len(self.codes))]


def ranks(world: int, work: Callable[[int], Any], folder: Path, seconds: float = 60) -> Ended:
    """`work(rank)` in `world` processes that torchrun might have started."""
    folder.mkdir(parents=True, exist_ok=True)
    context, port = multiprocessing.get_context("fork"), free_port()
    processes = [
        context.Process(target=as_rank, args=(rank, world, port, work, folder), daemon=False) for rank in range(world)
    ]
    deadline = time.monotonic() + seconds
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        with contextlib.suppress(AttributeError):
            process.kill()
        process.join()
    assert not hanging, f"ranks {hanging} did not end"
    return Ended([process.exitcode for process in processes], folder)


# ----------------------------------------------------------------------------------- The same as one process

TWENTY = ["training.batch_size=24", "dataset.max_train_samples=125", "dataset.max_val_samples=65"]
TWENTY += ["training.epochs=4", "training.lr=0.05", "training.num_workers=0"]  # 4 epochs of 5 steps
HISTORY = ["ast.scoring=history", "ast.warmup_epochs=1", "ast.target_activation=0.5", "training.epochs=12"]
WAYS = {
    "dense": ["ast.mode=dense"],
    "random": ["ast.mode=random", "ast.target_activation=0.5", "training.epochs=10"],
    "ast": [],
    "ast, few active": ["ast.target_activation=0.06", "ast.min_active=1"],
    "ast, scored on the spot": ["ast.score_ahead=false", "ast.warmup_epochs=1"],
    "accumulated": ["training.grad_accum_steps=4", "training.grad_clip_norm=1.0"],
    "accumulated, AdamW": ["training.grad_accum_steps=3", "training.optimizer=adamw", "training.lr=0.001"],
    "accumulated, few active": ["training.grad_accum_steps=2", "ast.target_activation=0.03", "ast.min_active=0"],
    "packed": ["ast.pack=true", "ast.target_activation=0.4"],
    "packed, accumulated": ["ast.pack=true", "training.grad_accum_steps=2", "ast.target_activation=0.6"],
    "top-k": ["ast.rule=topk", "ast.pack=true"],
    "history": [*HISTORY, "ast.explore_weight_cap=4"],
    "infobatch": [*HISTORY, "ast.rule=infobatch", "ast.entropy_weight=0"],
    "resident": ["dataset.cache=device", "dataset.augment=pad_crop", "dataset.repeat=2", "training.epochs=2"],
    "steps left out": ["training.max_nonfinite_steps=3", "ast.mode=dense"],
}


def lab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_ast, "get_model", lambda *_: LayerNormNet())


def counts_seen() -> list[list[int]]:
    """A list that fills with how many active samples each rank has, step by step."""
    seen, whole = [], Dist.own_part

    def watched(self: Dist, chosen: torch.Tensor, n: int) -> tuple:
        own, counts = whole(self, chosen, n)
        seen.append(counts)
        return own, counts

    Dist.own_part = watched
    return seen


def last(config: Config) -> dict[str, Any]:
    return load_checkpoint(checkpoint_folder(config) / "last.pt", config)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_weights_after_twenty_steps_are_those_of_one_process(way, world, tmp_path, monkeypatch):
    lab(monkeypatch)
    one, many = (make_config(*TWENTY, *WAYS[way], f"logging.output_dir={tmp_path}/{name}") for name in ("one", "many"))
    whole, _ = train(one)
    steps = sum(whole["training_history"]["optimizer_steps"])

    def work(rank: int) -> Any:
        seen = counts_seen()
        result, path = train(many)
        return result, path, seen

    (result, path, seen), *others = ranks(world, work, tmp_path / "ranks").results()
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert all(other[1] == path for other in others)
    assert len(list((tmp_path / "many").glob("final_results_*.json"))) == 1
    assert result.keys() == whole.keys()
    assert result["ledger"] == whole["ledger"]
    if "few" in way:
        assert any(0 in counts and sum(counts) for counts in seen)  # a rank without any takes part
    expected, got = last(one), last(many)
    for name, tensor in expected["model"].items():
        assert torch.allclose(tensor, got["model"][name], atol=1e-5, rtol=0), name
    for key, values in whole["training_history"].items():
        if key not in TIMED:
            got_values = result["training_history"][key]
            known = [pair for pair in zip(got_values, values, strict=True) if pair != (None, None)]
            assert [pair[0] for pair in known] == pytest.approx([pair[1] for pair in known], abs=1e-5, rel=1e-4), key
    assert steps >= (5 if "accum" in way or "pack" in way or way == "top-k" else 20)
    if expected["past"] is not None:
        assert torch.allclose(expected["past"]["significance"], got["past"]["significance"], atol=1e-4)
        assert torch.equal(expected["past"]["seen"], got["past"]["seen"])
        assert torch.equal(expected["past"]["kinds"], got["past"]["kinds"])
    if expected["queue"][1] is not None:
        assert sorted(expected["queue"][1].tolist()) == sorted(got["queue"][1].tolist())
