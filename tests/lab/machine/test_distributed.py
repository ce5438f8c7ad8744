"""Several processes on one run (gloo on the CPU): what they train is what one process would have
trained.
"""

import contextlib
import itertools
import json
import os
import signal
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.nn.functional

import lab.machine.clock
import lab.machine.distributed
import lab.models.network
import run_experiment
import train_ast
from conftest import BatchNormNet, LayerNormNet, as_batch, make_config, trained_on
from lab.base.errors import TrainingFailed
from lab.config.loading import Config, checkpoint_folder
from lab.data import datasets
from lab.data.datasets import ImageDataset
from lab.data.loading import DeviceBatch
from lab.data.queue import ActiveQueue
from lab.engine.checkpoint import load_checkpoint
from lab.machine.clock import Clock, Stop
from lab.machine.distributed import Dist
from lab.method.sample_store import SampleStore, Visit
from lab.models.network import StepResult
from lab.outputs.log import Outputs
from lab.study.cli import run_cli
from runs import (
    TIMED,
    EndedRanks,
    StopAfter,
    exit_code,
    final_state,
    ranks,
    running,
    same,
    untimed,
    wait_until,
)
from train_ast import Run, Trainer, execute, train

# -------------------------------------------------------------------------- The same as one process

TWENTY = ["training.batch_size=24", "dataset.max_train_samples=125", "dataset.max_val_samples=65"]
TWENTY += ["training.epochs=4", "training.lr=0.05", "training.num_workers=0"]  # 4 epochs of 5 steps
HISTORY = [
    "ast.scoring=history",
    "ast.warmup_epochs=1",
    "ast.target_activation=0.5",
    "training.epochs=12",
]
WAYS = {
    "dense": ["ast.mode=dense"],
    "random": ["ast.mode=random", "ast.target_activation=0.5", "training.epochs=10"],
    "ast": [],
    "ast, few active": ["ast.target_activation=0.06", "ast.min_active=1"],
    "accumulated": ["training.grad_accum_steps=4", "training.grad_clip_norm=1.0"],
    "accumulated, AdamW": [
        "training.grad_accum_steps=3",
        "training.optimizer=adamw",
        "training.lr=0.001",
    ],
    "accumulated, few active": [
        "training.grad_accum_steps=2",
        "ast.target_activation=0.03",
        "ast.min_active=0",
    ],
    "packed": ["ast.pack=true", "ast.target_activation=0.4"],
    "packed, accumulated": [
        "ast.pack=true",
        "training.grad_accum_steps=2",
        "ast.target_activation=0.6",
    ],
    "top-k": ["ast.rule=topk", "ast.pack=true"],
    "target auto, packed": [
        *("ast.target_activation=auto", "ast.warmup_epochs=1", "ast.pack=true"),
        *("training.optimizer=adamw", "training.lr=0.02"),  # so that a selection begins
    ],
    "history": HISTORY,
    "history, top-k, doubted": [*HISTORY, "ast.rule=topk", "ast.forget_rate=0.2"],
    "history, doubted by prediction": [
        *HISTORY,
        "ast.forget_rate=auto",
        "dataset.label_noise=0.2",
    ],
    "packed, doubted": ["ast.pack=true", "ast.target_activation=0.4", "ast.forget_rate=0.2"],
    "infobatch of batches": ["ast.rule=infobatch", "ast.entropy_weight=0"],
    "infobatch": [
        *(key for key in HISTORY if "target" not in key),
        *("ast.rule=infobatch", "ast.entropy_weight=0"),
    ],
    "resident": [
        "dataset.cache=device",
        "dataset.augment=pad_crop",
        "dataset.repeat=2",
        "training.epochs=2",
    ],
    "resident history": [*HISTORY, "dataset.cache=device", "dataset.augment=pad_crop"],
    "averaged, erased": [
        "training.weight_average=0.9",
        "ast.mode=dense",
        "dataset.random_erasing=0.5",
    ],
}


def layer_norm_net(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_ast, "get_model", lambda *_: LayerNormNet())


def counts_seen() -> list[list[int]]:
    """A list that fills with how many active samples each rank has, step by step."""
    seen = []
    whole = Dist.local_choice

    def watched(self: Dist, chosen: torch.Tensor, n: int) -> tuple:
        own, counts = whole(self, chosen, n)
        seen.append(counts)
        return own, counts

    Dist.local_choice = watched
    return seen


def last(config: Config) -> dict[str, Any]:
    return load_checkpoint(checkpoint_folder(config) / "last.pt", config)


IN_TWO = ["packed, accumulated", "resident", "history, doubted by prediction"]
IN_THREE = [
    "ast, few active",
    "top-k",
    "infobatch of batches",
    "history, top-k, doubted",
    "target auto, packed",
]


@pytest.mark.parametrize(
    ("way", "world"),
    [
        pytest.param(
            way, world, marks=[] if way in short else pytest.mark.long
        )  # each once; the rest is the long form
        for world, short in ((2, IN_TWO), (3, IN_THREE))
        for way in WAYS
    ],
)
def test_weights_after_twenty_steps_are_those_of_one_process(way, world, tmp_path, monkeypatch):
    layer_norm_net(monkeypatch)
    one, many = (
        make_config(*TWENTY, *WAYS[way], f"logging.output_dir={tmp_path}/{name}")
        for name in ("one", "many")
    )
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
    assert result.get("auto_target") == whole.get("auto_target")
    assert "target auto" not in way or result["auto_target"]["selects"]
    if "few" in way:
        assert any(0 in counts and sum(counts) for counts in seen)  # a rank without any takes part
    expected = last(one)
    got = last(many)
    for kind in ("model", "averaged"):
        for name, tensor in (expected[kind] or {}).items():
            assert torch.allclose(tensor, got[kind][name], atol=1e-5, rtol=0), name
    for key, values in whole["training_history"].items():
        if key not in TIMED:
            got_values = result["training_history"][key]
            known = [pair for pair in zip(got_values, values, strict=True) if pair != (None, None)]
            assert [pair[0] for pair in known] == pytest.approx(
                [pair[1] for pair in known], abs=1e-5, rel=1e-4
            ), key
    assert steps >= (5 if "accum" in way or "pack" in way or way == "top-k" else 20)
    if expected["selection"]["store"] is not None:
        stores = [state["selection"]["store"] for state in (expected, got)]
        assert torch.allclose(stores[0]["significance"], stores[1]["significance"], atol=1e-4)
        assert torch.equal(stores[0]["last_epoch"], stores[1]["last_epoch"])
        assert torch.equal(expected["selection"]["weights"], got["selection"]["weights"])
    assert same(expected["selection"]["doubt"], got["selection"]["doubt"])
    if "queue" in expected and expected["queue"]["samples"] is not None:
        for ours, theirs in zip(
            got["queue"]["samples"][1:], expected["queue"]["samples"][1:], strict=True
        ):
            assert sorted(ours.tolist()) == sorted(theirs.tolist())


def test_gradients_are_merged_as_they_lie_in_memory(tmp_path):
    """A channels_last net, 5 samples on one rank, 3 on another, none on the third: the gradient of
    the mean of all.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(8)
    parts = [slice(0, 5), slice(5, 8), slice(8, 8)]

    def gradients(dist: Dist, part: slice) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 10)
        )
        run = Run.build(
            make_config("ast.mode=dense"), net, torch.device("cpu"), planned_steps=9, dist=dist
        )
        run.network.model.to(memory_format=torch.channels_last)
        trained_on(run, images[part], labels[part])
        run.trainer.merge_gradients()
        assert run.network.model[0].weight.grad.is_contiguous(memory_format=torch.channels_last)
        return [parameter.grad for parameter in run.network.model.parameters()]

    merged = ranks(
        3, lambda rank: gradients(Dist.join(torch.device("cpu")), parts[rank]), tmp_path
    ).results()
    whole = gradients(Dist(), slice(0, 8))
    for each in merged:
        assert all(
            torch.allclose(one, other, atol=1e-6) for one, other in zip(each, whole, strict=True)
        )


def test_windows_of_synchronised_ranks_have_one_divisor(tmp_path):
    """Else BatchNorm's backward would mix losses of different scale. A single process can go on
    with their window.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(12) % 10
    parts = [(slice(0, 5), slice(8, 9)), (slice(5, 8), slice(9, 12))]

    def gradients(dist: Dist, *windows: slice) -> list[torch.Tensor] | None:
        torch.manual_seed(0)
        run = Run.build(
            make_config("ast.mode=dense"), LayerNormNet(), torch.device("cpu"), 9, dist=dist
        )
        run.network.synced = dist.world > 1
        for part in windows:
            trained_on(run, images[part], labels[part])
            assert run.trainer.window_divisor == (8 if dist.world > 1 else 12)
        states = dist.gather_objects(run.trainer.local_state())
        return None if states is None else run.trainer.merged(states, 0)["gradients"]

    merged, _ = ranks(
        2, lambda rank: gradients(Dist.join(torch.device("cpu")), *parts[rank]), tmp_path
    ).results()
    whole = gradients(Dist(), slice(0, 12))
    assert all(
        torch.allclose(one, other, atol=1e-6) for one, other in zip(merged, whole, strict=True)
    )


class SummedBatchNorm(torch.nn.BatchNorm2d):
    """Over the samples of all ranks, by autograd's own collectives: torch's synchronised one wants
    GPUs.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count = x.new_full((x.shape[1],), x[:, 0].numel())
        sums = torch.stack([count, x.sum((0, 2, 3)), (x * x).sum((0, 2, 3))])
        if torch.distributed.is_initialized():
            sums = torch.distributed.nn.functional.all_reduce(sums)
        mean, square = (sums[1:] / sums[0])[..., None, None]
        return (x - mean) / (square - mean**2 + self.eps).sqrt() * self.weight[
            :, None, None
        ] + self.bias[:, None, None]


@pytest.mark.parametrize("windows", [[[5, 3, 0]], [[5, 3, 0], [0, 1, 3]]])
def test_the_gradient_through_synchronised_batchnorm_is_that_of_one_process(
    windows, tmp_path, monkeypatch
):
    """Unequal counts, a rank without any, one and two forwards a step."""
    monkeypatch.setattr(lab.models.network, "synchronised", lambda model: model)
    generator = torch.Generator().manual_seed(0)
    ends = [0, *itertools.accumulate(chain(*windows))]
    images = torch.randint(0, 256, (ends[-1], 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(ends[-1]) % 10

    def gradients(dist: Dist, parts: list[slice]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = BatchNormNet()
        net.body[1] = SummedBatchNorm(8)
        config = make_config(
            "ast.mode=dense", "training.sync_batchnorm=true", "training.batch_size=9"
        )
        run = Run.build(config, net, torch.device("cpu"), 9, dist=dist)
        for part in parts:
            trained_on(run, images[part], labels[part])
        run.trainer.merge_gradients()
        return [parameter.grad for parameter in run.network.model.parameters()]

    bounds = list(itertools.starmap(slice, itertools.pairwise(ends)))
    merged = ranks(
        3, lambda rank: gradients(Dist.join(torch.device("cpu")), bounds[rank::3]), tmp_path
    ).results()
    whole = gradients(Dist(), [slice(ends[at], ends[at + 3]) for at in range(0, len(ends) - 1, 3)])
    assert whole[0].abs().max() > 1e-3
    for each in merged:
        assert all(
            torch.allclose(one, other, atol=1e-6) for one, other in zip(each, whole, strict=True)
        )


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet"])
def test_synchronised_batchnorm_keeps_what_a_model_computes(name):
    """In eval mode, for on a CPU torch has no more of it; test_gpu.py trains with it."""
    config = make_config(
        "training.sync_batchnorm=true", f"model.name={name}", "dataset.image_size=64"
    )
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = train_ast.get_model(config.model, 10, 64)
    before = model.eval()(images)
    run = Run.build(config, model, torch.device("cpu"), 9, dist=Dist(0, 2))
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in run.network.model.modules())
    assert torch.equal(run.network.model.eval()(images), before)


def test_packed_steps_on_resident_parts_train_as_much_as_one_process(tmp_path, monkeypatch):
    """In another order: the weights differ, and the ranks have them alike (else the run would end
    as failed).
    """
    layer_norm_net(monkeypatch)
    keys = [
        *TWENTY,
        "ast.pack=true",
        "ast.target_activation=0.4",
        "dataset.cache=device",
        "dataset.augment=pad_crop",
    ]
    one, many = (
        make_config(*keys, f"logging.output_dir={tmp_path}/{name}") for name in ("one", "many")
    )
    whole, _ = train(one)
    result = ranks(2, lambda rank: train(many)[0], tmp_path / "ranks").results()[0]
    for key in ("loaded", "scored"):
        assert result["ledger"][key] == whole["ledger"][key]
    assert abs(result["ledger"]["trained"] - whole["ledger"]["trained"]) <= 24
    losses = [each["training_history"]["train_loss"][-1] for each in (result, whole)]
    assert losses[0] == pytest.approx(losses[1], 0.1)


# --------------------------------------------------------------- Interrupted, and resumed by others


@pytest.mark.parametrize(
    ("way", "before", "after", "interval"),
    [
        ("packed, accumulated", 2, 3, 1),
        ("packed, accumulated", 1, 2, 1),
        ("accumulated", 2, 1, 1),
        ("history", 3, 1, 1),
        ("ast", 2, 2, 1),
        ("ast", 2, 1, 2),
        pytest.param("packed, accumulated", 3, 1, 1, marks=pytest.mark.long),
        pytest.param("accumulated", 1, 2, 1, marks=pytest.mark.long),
        pytest.param("history", 2, 3, 1, marks=pytest.mark.long),
    ],
)
def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_others_go_on(
    way, before, after, interval, tmp_path, monkeypatch
):
    layer_norm_net(monkeypatch)
    monkeypatch.setattr(lab.machine.clock, "vote_interval", lambda world: interval)
    one, many = (
        make_config(*TWENTY, *WAYS[way], f"logging.output_dir={tmp_path}/{name}")
        for name in ("one", "many")
    )
    whole, _ = train(one)

    def interrupted(rank: int) -> Any:
        return train(many, StopAfter(8) if rank == before - 1 else Stop())[0], last(many)[
            "metrics"
        ]["step"]

    results = ranks(before, interrupted, tmp_path / "before").results()
    assert {result["status"] for result, _ in results} == {"interrupted"}
    (step,) = {step for _, step in results}
    assert step > 0  # in the middle of an epoch
    resumed = ranks(
        after, lambda rank: train(many, resume="auto")[0], tmp_path / "after"
    ).results()[0]
    assert resumed["status"] == "completed"
    assert resumed["ledger"] == whole["ledger"]
    expected = last(one)
    got = last(many)
    for name, tensor in expected["model"].items():
        assert torch.allclose(tensor, got["model"][name], atol=1e-5, rtol=0), name
    for key in (
        "samples_loaded",
        "samples_scored",
        "samples_trained",
        "optimizer_steps",
        "val_acc",
        "activation_rate",
    ):
        assert resumed["training_history"][key] == whole["training_history"][key], key


MIXED = [
    "training.mixup=0.2",
    "training.cutmix=1",
    "training.weight_average=0.9",
    "dataset.random_erasing=0.5",
]
PROXY = ["ast.scoring=proxy"]


@pytest.mark.long
def test_labels_that_may_be_wrong_are_judged_alike_on_all_ranks(tmp_path):
    """A sample's memory goes to all of them; the run goes on where it was, bit for bit."""
    keys = [*TWENTY, "training.noisy_labels=true", "training.mixup=1", "training.epochs=5"]
    keys.append("dataset.label_noise=0.2")
    one, many = (
        make_config(*keys, f"logging.output_dir={tmp_path}/{name}") for name in ("one", "many")
    )
    whole = ranks(2, lambda rank: train(one)[0], tmp_path / "whole").results()[0]
    assert whole["training_history"]["remedy"][2] > 0
    assert whole["ledger"]["seen"] > 0
    before = ranks(2, lambda rank: train(many, StopAfter(13))[0], tmp_path / "before").results()[0]
    assert before["status"] == "interrupted"
    resumed = ranks(2, lambda rank: train(many, resume="auto")[0], tmp_path / "after").results()[0]
    assert untimed(resumed) == untimed(whole)


@pytest.mark.parametrize(
    "more",
    [[], pytest.param(MIXED, marks=pytest.mark.long), PROXY],
    ids=["packed", "packed, mixed, averaged", "packed, by a proxy"],
)
def test_what_waits_on_each_rank_is_its_own_after_a_resumption(more, tmp_path, monkeypatch):
    """Else BatchNorm would see other batches, and the run would end another way than one left
    alone.
    """
    monkeypatch.setattr(train_ast, "get_model", lambda *_: BatchNormNet())
    keys = [*TWENTY, *WAYS["packed"], *more]
    one, many = (
        make_config(*keys, f"logging.output_dir={tmp_path}/{name}") for name in ("one", "many")
    )
    whole = ranks(2, lambda rank: train(one)[0], tmp_path / "whole").results()[0]
    ranks(
        2, lambda rank: train(many, StopAfter(13) if rank else Stop()), tmp_path / "before"
    ).results()
    waiting = last(many)["queue"]["pending"]
    assert more or abs(waiting[0] - waiting[1]) > 1
    resumed = ranks(2, lambda rank: train(many, resume="auto")[0], tmp_path / "after").results()[0]
    assert untimed(resumed) == untimed(whole)
    assert same(final_state(many), final_state(one))


def test_a_checkpoint_that_is_due_is_written_once_by_all_a_step_later(tmp_path, monkeypatch):
    layer_norm_net(monkeypatch)
    config = make_config(*TWENTY, "training.epochs=2", f"logging.output_dir={tmp_path}/out")

    def work(rank: int) -> list[tuple[int, int]]:
        saved = []
        save = Outputs.save
        vote = Clock.vote
        due = (2, 3)  # until it is written
        Clock.vote = lambda clock, step, last, _: vote(clock, step, last, rank == 0 and step in due)
        Outputs.save = lambda outputs, state, at, best=False: (
            saved.append(at),
            save(outputs, state, at, best),
        )
        train(config)
        return saved

    for saved in ranks(2, work, tmp_path / "ranks").results():
        assert saved == [(0, 3), (1, 0), (1, 3), (2, 0)]


def children(parent: int) -> dict[int, int]:
    """The ranks that a torchrun process has started, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, StopIteration):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                names = dict(
                    each.split(b"=", 1)
                    for each in (folder / "environ").read_bytes().split(b"\0")
                    if each
                )
                found[int(names[b"RANK"])] = int(folder.name)
    return found


@pytest.mark.long
def test_a_killed_rank_ends_the_run_which_restarts_and_ends_as_if_undisturbed(
    tmp_path, monkeypatch
):
    keys = [
        "model.name=test_resnet",
        "dataset.image_size=16",
        "training.batch_size=32",
        "training.epochs=12",
    ]
    keys += [
        "dataset.max_train_samples=320",
        "dataset.max_val_samples=65",
        "ast.pack=true",
        "ast.warmup_epochs=1",
    ]
    keys += ["training.device=cpu", "training.lr=0.02", "training.num_workers=0"]
    config = make_config(*keys, f"logging.output_dir={tmp_path}/whole")
    whole = ranks(2, lambda rank: train(config)[0], tmp_path / "ranks").results()[0]
    (tmp_path / "empty.yaml").write_text("{}")
    killed = make_config(*keys, f"logging.output_dir={tmp_path}/killed")
    flags = ["--config", str(tmp_path / "empty.yaml"), "--nproc", "2", "--max-restarts", "1"]
    flags += ["metrics.base_flop_per_sample=1e6", *keys, f"logging.output_dir={tmp_path}/killed"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with running(lambda: run_cli(lambda: run_experiment.main(flags)), tmp_path / "output") as child:
        wait_until((checkpoint_folder(killed) / "last.pt").exists)
        os.kill(children(child)[1], signal.SIGKILL)
        killed_at = time.monotonic()
        code = exit_code(child)
    assert time.monotonic() - killed_at < 60
    text = (tmp_path / "output").read_text()
    print(
        f"{time.monotonic() - killed_at:.1f} s from the kill to the end of the restarted "
        f"run\n{text}"
    )
    assert code == 0, text
    assert text.count("error: another process of the run has ended") == 1
    assert f"resumed from {checkpoint_folder(killed)}" in text
    results = [
        json.loads(path.read_text()) for path in (tmp_path / "killed").glob("final_results_*.json")
    ]
    assert sorted(result["status"] for result in results) == ["completed", "failed"]
    finished = next(result for result in results if result["status"] == "completed")
    assert untimed(finished) == untimed(json.loads(json.dumps(whole)))
    assert same(final_state(killed), final_state(config))


# ---------------------------------------------------------------------------------------- Bad input


def command(config: Config) -> None:
    """Train as a command does, and exit."""
    raise SystemExit(run_cli(lambda: execute(config)))


def refused(ended: EndedRanks, code: int, message: str) -> None:
    assert ended.codes == [code] * len(ended.codes), "\n".join(ended.texts)
    assert len(ended.errors()) == 1, "\n".join(ended.texts)
    assert message in ended.errors()[0]


def test_what_the_processes_cannot_share_is_one_line_and_exit_code_2(tmp_path, monkeypatch):
    layer_norm_net(monkeypatch)
    folder = f"logging.output_dir={tmp_path}/out"
    config = make_config(*TWENTY, folder, "training.batch_size=25")
    refused(
        ranks(2, lambda rank: command(config), tmp_path / "batch"),
        2,
        "training.batch_size: 25 is no multiple of 2",
    )
    configs = [make_config(*TWENTY, folder, f"training.lr={rate}") for rate in (0.1, 0.1, 0.2)]
    different = ranks(3, lambda rank: command(configs[rank]), tmp_path / "config")
    refused(different, 2, "the processes were given different configs, rank 2 other than rank 0")
    synced = make_config(*TWENTY, folder, "training.sync_batchnorm=true")
    refused(ranks(2, lambda rank: command(synced), tmp_path / "sync"), 2, "training.sync_batchnorm")
    few = make_config(*TWENTY, folder, "dataset.max_train_samples=2", "training.batch_size=3")
    refused(
        ranks(3, lambda rank: command(few), tmp_path / "few"),
        2,
        "2 training samples for 3 processes",
    )
    assert not list((tmp_path / "out").glob("*.json"))


def test_other_data_on_one_rank_is_refused(tmp_path, monkeypatch):
    layer_norm_net(monkeypatch)
    config = make_config(*TWENTY, f"logging.output_dir={tmp_path}/out")
    whole = datasets.digits_dataset

    def relabelled(part: str) -> ImageDataset:
        dataset = whole(part)
        dataset.samples[7] = (dataset.samples[7][0], (dataset.samples[7][1] + 1) % 10)
        return dataset

    def work(rank: int) -> None:
        datasets.digits_dataset = relabelled if rank == 1 else whole
        command(config)

    refused(
        ranks(2, work, tmp_path / "ranks"),
        2,
        "dataset: the processes see different data, rank 1 other",
    )


def test_more_processes_than_gpus_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = make_config(*TWENTY, "training.device=cuda", f"logging.output_dir={tmp_path}/out")
    refused(
        ranks(2, lambda rank: command(config), tmp_path / "ranks"),
        2,
        "training.device: 2 processes and 1 GPUs",
    )


def test_a_rank_that_never_comes_is_an_error_and_no_hang(tmp_path, monkeypatch):
    layer_norm_net(monkeypatch)
    monkeypatch.setattr(lab.machine.distributed, "CONTACT_SECONDS", 2.0)
    config = make_config(*TWENTY, f"logging.output_dir={tmp_path}/out")
    ended = ranks(3, lambda rank: command(config), tmp_path / "ranks", seconds=30, missing=[1])
    refused(ended, 1, "another process of the run has ended or does not answer")


def test_a_rank_that_fails_ends_all_and_says_why_once(tmp_path, monkeypatch):
    layer_norm_net(monkeypatch)
    config = make_config(*TWENTY, f"logging.output_dir={tmp_path}/out")
    step = Trainer.train_step

    def failing(trainer: Trainer, batch: DeviceBatch, weights: None, epoch: int, at: int) -> Any:
        if epoch == 2:
            raise TrainingFailed("the disk is gone")
        return step(trainer, batch, weights, epoch, at)

    def work(rank: int) -> None:
        Trainer.train_step = failing if rank == 1 else step
        command(config)

    refused(ranks(2, work, tmp_path / "ranks", seconds=30), 1, "the disk is gone")
    (path,) = (tmp_path / "out").glob("final_results_*.json")
    result = json.loads(path.read_text())
    assert (result["status"], result["error"]) == ("failed", "the disk is gone")
    assert len(result["training_history"]["epoch"]) == 2


# ------------------------------------------------------------------------------------ Single pieces


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_queues_of_several_ranks_take_the_batches_of_one(world, tmp_path):
    """Uneven counts, none on some ranks: each batch is of the oldest, spread evenly, and nothing is
    lost.
    """
    generator = torch.Generator().manual_seed(world)
    batch = 30
    steps = [torch.randint(0, 7, (world,), generator=generator).tolist() for _ in range(40)]

    def samples(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = 1000 * step + 100 * rank + torch.arange(steps[step][rank])
        return (labels % 251).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2), labels

    def work(rank: int) -> Any:
        dist = Dist.join(torch.device("cpu"))
        queue = ActiveQueue(batch, torch.device("cpu"), dist)
        batches = []
        for step, counts in enumerate(steps):
            images, labels = samples(step, rank)
            ready = queue.push(as_batch(images, labels, labels + 5), counts)
            if ready is not None:
                assert torch.equal(ready.images[:, 0, 0, 0], (ready.labels % 251).to(torch.uint8))
                assert torch.equal(ready.indices, ready.labels + 5)
                batches.append(ready.labels.tolist())
        return batches, queue.state_dict()["samples"][1].tolist()

    results = ranks(world, work, tmp_path).results() if world > 1 else [work(0)]
    one = ActiveQueue(batch, torch.device("cpu"))
    expected = []
    for step in range(len(steps)):
        parts = zip(*(samples(step, rank) for rank in range(world)), strict=True)
        ready = one.push(as_batch(*(torch.cat(part) for part in parts)))
        expected += [] if ready is None else [ready.labels.tolist()]
    for number, whole in enumerate(expected):
        parts = [batches[number] for batches, _ in results]
        assert {len(part) for part in parts} == {batch // world}
        assert sorted(chain(*parts)) == sorted(whole)
    assert all(sorted(left) == sorted(one.samples.labels.tolist()) for _, left in results)


def test_a_store_in_parts_is_one_store(tmp_path):
    """Whoever records it, each significance ends with the rank that keeps it; two of three epochs,
    one rank idle.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(50, generator=generator)
    columns = [
        *torch.rand(3, 2, 50, generator=generator),
        *torch.randint(3, (2, 2, 50), generator=generator),
    ]
    visits = [
        (order[:31], (0, 11, 31, 31)),
        (order[20:47], (0, 0, 5, 27)),
    ]  # indices, where each rank's part begins

    def work(rank: int) -> Any:
        store = SampleStore(50, torch.device("cpu"), Dist.join(torch.device("cpu")), labels=True)
        for epoch, (indices, edges) in enumerate(visits):
            part = indices[edges[rank] : edges[rank + 1]]
            store.record(part, Visit(*(column[epoch][part] for column in columns)), epoch)
            store.merge()
        state = {name: tensor.clone() for name, tensor in store.state_dict().items()}
        whole = state if rank == 0 else None
        again = SampleStore(50, torch.device("cpu"), store.dist, labels=True)
        again.load_state_dict(store.dist.broadcast(whole))
        assert all(
            torch.equal(again.columns[name], column) for name, column in store.columns.items()
        )
        assert {name: column.tolist() for name, column in store.on_host().items()} == columns_of(
            one
        )
        return (
            state,
            store.scores(order.numpy()),
            sum(column.nbytes for column in store.columns.values()),
        )

    def columns_of(store: SampleStore) -> dict[str, list[float]]:
        return {name: column.tolist() for name, column in store.state_dict().items()}

    one = SampleStore(50, torch.device("cpu"), labels=True)
    for epoch, (indices, _) in enumerate(visits):
        one.record(indices, Visit(*(column[epoch][indices] for column in columns)), epoch)
    (state, *_), *_ = results = ranks(3, work, tmp_path).results()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert all(scores.tolist() == one.significance[order].tolist() for _, scores, _ in results)
    assert sum(size for *_, size in results) == 43 * 50
    assert one.columns["streak"].max() == 2


@pytest.mark.parametrize(("cache", "world"), [("device", 2), ("device", 3), ("disk", 2)])
@pytest.mark.parametrize("augment", ["pad_crop", "random_resized_crop"])
def test_cached_parts_give_the_batches_of_one_process(
    augment, cache, world, image_folder, tmp_path
):
    """Each rank keeps its part of the pictures, or reads it; a batch holds the same samples,
    cropped the same, spread evenly; in an epoch of all samples and in one of a choice that has many
    on one rank and few on another.
    """
    keys = [
        "dataset.type=folder",
        f"dataset.train_dir={image_folder}/train",
        f"dataset.val_dir={image_folder}/val",
    ]
    keys += [
        f"dataset.cache={cache}",
        f"dataset.augment={augment}",
        "dataset.image_size=16",
        "training.batch_size=6",
    ]
    keys.append(f"dataset.cache_folder={tmp_path}/cache")
    config = make_config(*keys, "training.num_workers=0")
    chosen = np.array([1] * 10 + [0] * 6 + [0, 1] * 4, dtype=np.uint8)

    def batches(dist: Dist) -> tuple[int, list[dict[int, torch.Tensor]]]:
        loader, _, plan, _ = train_ast.build_dataloaders(config, torch.device("cpu"), dist)
        found = []
        for epoch, start, choice in ((0, 0, None), (3, 1, None), (4, 0, chosen)):
            plan.start_epoch(epoch, start, choice)
            for batch in loader:
                keyed = zip(batch.labels.tolist(), batch.images.clone(), strict=True)
                found.append(dict(zip(batch.indices.tolist(), keyed, strict=True)))
        return len(loader.offsets) - 1 if cache == "device" else len(loader.indices), found

    def work(rank: int) -> Any:
        return batches(Dist.join(torch.device("cpu")))

    results = ranks(world, work, tmp_path).results()
    kept, whole = batches(Dist())
    assert kept == 24
    assert [size for size, _ in results] == [24 // world if cache == "device" else 24] * world
    assert all(len(found) == len(whole) == 4 + 3 + 2 for _, found in results)
    for number, batch in enumerate(whole):
        parts = [found[number] for _, found in results]
        assert [len(part) for part in parts] == [6 // world] * world
        joined = {index: sample for part in parts for index, sample in part.items()}
        assert joined.keys() == batch.keys()
        assert all(joined[index][0] == label for index, (label, _) in batch.items())
        assert all(torch.equal(joined[index][1], image) for index, (_, image) in batch.items())


@pytest.mark.parametrize("cache", ["none", "device"])
@pytest.mark.parametrize("samples", [2, 65, 72])
def test_validation_counts_every_sample_once(samples, cache, tmp_path):
    """Whether the ranks divide them or not, streamed or resident; a rank may have none."""
    config = make_config(*TWENTY, f"dataset.max_val_samples={samples}", f"dataset.cache={cache}")

    def work(rank: int) -> list[int]:
        dist = Dist.join(torch.device("cpu"))
        _, loader, _, _ = train_ast.build_dataloaders(config, torch.device("cpu"), dist)
        return [index for batch in loader for index in batch.indices.tolist()]

    seen = ranks(3, work, tmp_path).results()
    _, loader, _, _ = train_ast.build_dataloaders(config, torch.device("cpu"))
    assert sorted(chain(*seen)) == [index for batch in loader for index in batch.indices.tolist()]
    assert sum(map(len, seen)) == samples


def test_running_statistics_are_averaged_and_alike_before_validation(tmp_path, monkeypatch):
    monkeypatch.setattr(train_ast, "get_model", lambda *_: BatchNormNet())
    config = make_config(*TWENTY, "ast.mode=dense", f"logging.output_dir={tmp_path}/out")
    whole = train_ast.evaluate
    seen = []

    def watched(network: train_ast.Network, *inputs: Any) -> float | None:
        seen.append(network.model.body[1].running_mean.clone())
        return whole(network, *inputs)

    def work(rank: int) -> Any:
        train_ast.evaluate = watched
        mean = train_ast.average_running_statistics
        own = []
        train_ast.average_running_statistics = lambda statistics, dist: (
            own.append(statistics[0].clone()),
            mean(statistics, dist),
        )[1]
        train(config)
        return seen, own[0]

    (seen, own), (others, other) = ranks(2, work, tmp_path / "ranks").results()
    assert len(seen) == 4
    assert all(torch.equal(one, two) for one, two in zip(seen, others, strict=True))
    assert not torch.equal(own, other)
    assert torch.allclose(seen[0], (own + other) / 2)


def test_a_schedule_over_time_is_the_same_on_all_ranks(tmp_path, monkeypatch):
    """Ranks of different speed: the rates are alike, else the weights would drift apart, which ends
    a run.
    """
    layer_norm_net(monkeypatch)
    keys = ["training.lr_decay=time", "training.max_minutes=0.02", "training.epochs=1000"]
    config = make_config(*TWENTY, *keys, f"logging.output_dir={tmp_path}/out")
    step = Trainer.train_step

    def work(rank: int) -> Any:
        Trainer.train_step = lambda *inputs, **options: (
            time.sleep(0.01 * rank),
            step(*inputs, **options),
        )[1]
        return train(config)[0]

    for result in ranks(2, work, tmp_path / "ranks").results():
        assert result["status"] == "completed"
        ends = [0.0, *result["training_history"]["train_seconds"]]
        longest = max(after - before for before, after in itertools.pairwise(ends))
        assert 1.2 <= result["train_seconds"] < 1.2 + longest
        assert 3 < len(result["training_history"]["epoch"]) < 1000


def test_unreadable_pictures_are_counted_over_all_ranks(image_folder, tmp_path):
    for name in ("train/red/1.jpg", "train/blue/5.jpg"):
        (image_folder / name).write_bytes(b"no picture")
    folders = [
        "dataset.type=folder",
        f"dataset.train_dir={image_folder}/train",
        f"dataset.val_dir={image_folder}/val",
    ]
    keys = [
        "model.name=test_resnet",
        "dataset.image_size=32",
        "training.batch_size=8",
        "training.epochs=2",
    ]
    keys += ["ast.mode=dense", "training.num_workers=0", f"logging.output_dir={tmp_path}/out"]
    allowed = make_config(*folders, *keys, "dataset.max_bad_images=2")
    result = ranks(2, lambda rank: train(allowed)[0], tmp_path / "ranks").results()[0]
    assert len(result["bad_images"]) == 2
    one_too_few = make_config(*folders, *keys, "dataset.max_bad_images=1", "training.seed=1")
    refused(
        ranks(2, lambda rank: command(one_too_few), tmp_path / "few"),
        2,
        "dataset.max_bad_images=1 allows no more",
    )


@pytest.mark.parametrize("way", ["dense", "accumulated"])
def test_a_loss_that_is_not_finite_on_one_rank_ends_the_run_on_all(way, tmp_path, monkeypatch):
    """With one line, that of the rank which found it first; one process names the step itself."""
    layer_norm_net(monkeypatch)
    one, many = (
        make_config(*TWENTY, *WAYS[way], f"logging.output_dir={tmp_path}/{name}")
        for name in ("one", "many")
    )
    step = Trainer.train_step

    def spoilt(trainer: Trainer, batch: DeviceBatch, weights: None, epoch: int, at: int) -> Any:
        whole = trainer.network.forward

        def forward(*inputs: Any) -> StepResult:
            result = whole(*inputs)
            nan = float("nan")
            return result._replace(loss=result.loss * nan, objective=result.objective * nan)

        trainer.network.forward = forward if (epoch, at) == (1, 2) else whole
        trained = step(trainer, batch, weights, epoch, at)
        trainer.network.forward = whole
        return trained

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", spoilt)
        with pytest.raises(TrainingFailed, match="^non-finite loss in epoch 2, step 3$"):
            train(one)

    def work(rank: int) -> None:
        # rank 1 may have no active sample in that step
        Trainer.train_step = spoilt if rank == 0 else step
        command(many)

    ended = ranks(2, work, tmp_path / "ranks")
    refused(ended, 1, "error: non-finite loss in epoch 2, step ")
    assert int(ended.errors()[0].rpartition(" ")[2]) in (3, 4, 5)
    (path,) = (tmp_path / "many").glob("final_results_*.json")
    result = json.loads(path.read_text())
    assert (result["status"], result["training_history"]["epoch"]) == ("failed", [1])
    kept = last(many)
    assert kept["metrics"]["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in kept["model"].values())


@pytest.mark.parametrize(
    ("world", "total", "shares"),
    [(2, 3, [3, 0]), (2, 2, [2, 0]), (3, 5, [2, 3, 0]), (2, 1, [1, 0])],
)
def test_no_rank_trains_on_a_single_sample_while_others_have_more(world, total, shares, tmp_path):
    """BatchNorm cannot normalise one sample of 1 x 1."""

    def work(rank: int) -> list[int]:
        dist = Dist.join(torch.device("cpu"))
        own = torch.arange(total) if rank == world - 1 else torch.arange(0)
        return dist.balance([0] * (world - 1) + [total], [own])[0].tolist()

    results = ranks(world, work, tmp_path).results()
    assert [len(own) for own in results] == shares
    assert sorted(chain(*results)) == list(range(total))


def test_few_active_samples_train_a_network_whose_batchnorm_sees_single_pixels(tmp_path):
    """Two processes, unpacked, the default min_active of 2: it used to end with "Expected more than
    1 value".
    """
    keys = [
        "model.name=test_resnet",
        "dataset.image_size=16",
        "training.batch_size=32",
        "training.epochs=3",
    ]
    keys += [
        "dataset.max_train_samples=256",
        "dataset.max_val_samples=64",
        "ast.warmup_epochs=1",
        "training.lr=0.05",
    ]
    config = make_config(*keys, "ast.target_activation=0.1", f"logging.output_dir={tmp_path}/out")
    result = ranks(2, lambda rank: train(config)[0], tmp_path / "ranks").results()[0]
    assert result["status"] == "completed"


def test_the_energy_estimate_counts_every_process(tmp_path, monkeypatch):
    layer_norm_net(monkeypatch)
    config = make_config(*TWENTY, "metrics.gpu_tdp_watts=100", f"logging.output_dir={tmp_path}/out")
    result, _ = ranks(2, lambda _: train(config), tmp_path / "ranks").results()[0]
    assert result["training_history"]["est_energy_kj"][-1] == pytest.approx(
        2 * 0.1 * result["train_seconds"]
    )
