"""Whole runs on real data: what they write, how they end, and that they repeat."""

import json
import math
import os
import re
import signal
import time

import numpy as np
import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F

import train_ast
from conftest import BatchNormNet, LayerNormNet, make_batch, make_config, make_run, trained_on
from lab.base.errors import RequestError, TrainingFailed
from lab.config.sections import ModelConfig, TrainingConfig
from lab.machine.clock import Stop
from lab.machine.devices import resolve_amp_dtype, resolve_device
from lab.method.schedule import lr_at
from lab.models.building import count_flops, get_model
from lab.outputs.result import save_results
from runs import exit_code, program, running, wait_until
from train_ast import HISTORY_KEYS, Run, train

DOCUMENTED = ["best_accuracy", "total_time_hours", "epochs_completed", "training_history"]
FAST = [
    "model.name=small_conv",
    "dataset.image_size=8",
    "training.batch_size=64",
    "ast.pack=true",
]
FAST += [
    "dataset.max_train_samples=512",
    "training.epochs=3",
    "ast.warmup_epochs=1",
    "training.lr=0.05",
]


def run_digits(tmp_path, *overrides):
    return train(make_config(*FAST, f"logging.output_dir={tmp_path}", *overrides))


def test_rate_warms_up_and_decays_to_its_end():
    training = TrainingConfig(epochs=10, lr=0.4, min_lr=0.01)
    assert lr_at(0.0, training, 0.2) == 0
    assert lr_at(0.1, training, 0.2) == pytest.approx(0.2)
    assert lr_at(0.2, training, 0.2) == pytest.approx(0.4)
    assert lr_at(0.6, training, 0.2) == pytest.approx((0.4 + 0.01) / 2)
    assert lr_at(1.0, training, 0.2) == lr_at(1.5, training, 0.2) == pytest.approx(0.01)
    rates = [lr_at(x / 100, training, 0.2) for x in range(20, 101)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("kind", ["folder", "hf", "digits"])
def test_each_kind_of_data_trains_dense_and_sparse(kind, tmp_path, image_folder, parquet_folder):
    data = {
        "folder": [
            f"dataset.train_dir={image_folder}/train",
            f"dataset.val_dir={image_folder}/val",
        ],
        "hf": [f"dataset.name={parquet_folder}", "dataset.split_val=test"],
        "digits": [],
    }[kind]
    small = ["training.batch_size=4", "training.num_workers=1", "training.epochs=2"]
    small.append("dataset.max_train_samples=24")
    result, path = run_digits(tmp_path / "out", f"dataset.type={kind}", *data, *small)
    assert result["status"] == "completed"
    saved = json.loads(path.read_text())
    assert saved == json.loads(json.dumps(result))
    assert list(saved)[:4] == DOCUMENTED
    assert set(saved["training_history"]) == set(HISTORY_KEYS)
    assert {len(values) for values in saved["training_history"].values()} == {2}
    assert saved["training_history"]["threshold"][0] is None
    assert saved["training_history"]["threshold"][1] > 0
    assert saved["ledger"]["scored"] == saved["training_history"]["samples_loaded"][1]


def test_history_adds_up(tmp_path):
    log = tmp_path / "log" / "run.jsonl"
    result, path = run_digits(tmp_path, f"logging.jsonl_path={log}", "metrics.gpu_tdp_watts=100")
    history = result["training_history"]
    ledger = result["ledger"]
    assert [json.loads(line) for line in log.read_text().splitlines()] == [
        {key: history[key][i] for key in HISTORY_KEYS} for i in range(3)
    ]
    assert history["epoch"] == [1, 2, 3]
    assert sum(history["samples_loaded"]) == ledger["loaded"] == 3 * 512
    assert sum(history["samples_scored"]) == ledger["scored"] == 2 * 512
    assert sum(history["samples_trained"]) == ledger["trained"]
    assert sum(history["optimizer_steps"]) == ledger["steps"]
    assert history["activation_rate"][0] == 1.0
    assert history["energy_savings"][0] == 0.0
    for i in (1, 2):
        spent = history["samples_trained"][i] + history["samples_scored"][i] / 3
        assert history["energy_savings"][i] == pytest.approx(1 - spent / 512)
    assert history["est_flops_g"][-1] == pytest.approx(1e6 * ledger["trained"] / 1e9)
    assert history["total_flops_g"][-1] == pytest.approx(
        1e6 * (ledger["trained"] + ledger["scored"] / 3) / 1e9
    )
    assert history["est_energy_kj"][-1] == pytest.approx(result["train_seconds"] * 0.1)
    assert history["train_seconds"] == sorted(history["train_seconds"])
    assert history["energy_kj"] == [None] * 3
    assert (
        result["best_accuracy"]
        == max(history["val_acc"])
        == history["val_acc"][result["best_epoch"] - 1]
    )
    assert result["final_accuracy"] == history["val_acc"][-1]
    assert "HOME" not in path.read_text()
    assert result["environment"]["torch"] == torch.__version__


def test_the_same_seed_gives_the_same_run(tmp_path):
    """Of other modes `test_checkpoint.py` compares a run that was interrupted with a whole one."""
    timed = {"step_time_ms", "est_energy_kj", "train_seconds"}

    def history(seed):
        kept, _ = run_digits(tmp_path, f"training.seed={seed}", "training.epochs=2")
        return {key: values for key, values in kept["training_history"].items() if key not in timed}

    assert history(1) == history(1)
    assert history(1) != history(2)


def test_random_mode_trains_on_its_share_alone(tmp_path):
    result, _ = run_digits(tmp_path, "ast.mode=random", "ast.target_activation=0.25")
    history = result["training_history"]
    assert history["samples_loaded"] == history["samples_trained"] == [512, 128, 128]
    assert history["activation_rate"] == [1.0, 0.25, 0.25]
    assert history["samples_scored"] == [0, 0, 0]


def test_warm_up_leaves_no_trace():
    model = BatchNormNet()
    run = make_run(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    run.warm_up()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert run.metrics.ledger.scored == run.metrics.ledger.loaded == 0


def test_early_stop_waits_for_its_patience(tmp_path):
    still = [
        "training.lr=1e-30",
        "training.epochs=9",
        "ast.mode=dense",
        "training.early_stop_patience=2",
    ]
    result, _ = run_digits(
        tmp_path, *still, "model.name=test_vit", "dataset.image_size=32"
    )  # ViT: no running stats
    assert result["status"] == "early_stopped"
    assert result["epochs_completed"] == 3


def test_time_cap_ends_inside_an_epoch_and_still_validates(tmp_path):
    cap = 0.03  # minutes
    started = time.monotonic()
    result, _ = run_digits(
        tmp_path, f"training.max_minutes={cap}", "training.epochs=100000", "ast.mode=dense"
    )
    assert result["status"] == "time_capped"
    assert time.monotonic() - started < 60 * cap + 10  # the machine may have other work
    assert len(result["training_history"]["val_acc"]) - result["epochs_completed"] in (0, 1)


def test_non_finite_loss_ends_the_run_with_what_was_finished(tmp_path):
    with pytest.raises(TrainingFailed, match=r"non-finite loss in epoch \d+, step \d+"):
        run_digits(tmp_path, "ast.mode=dense", "training.lr=1e20", "training.optimizer=sgd")
    (path,) = tmp_path.glob("final_results_*.json")
    saved = json.loads(path.read_text())
    assert saved["status"] == "failed"
    assert re.fullmatch(r"non-finite loss in epoch \d+, step \d+", saved["error"])


@pytest.mark.parametrize(
    ("spoilt", "complaint"),
    [("scores", "non-finite scores in epoch 2, step 4"), ("loss", "non-finite loss in epoch 2")],
)
def test_what_is_not_finite_in_the_second_epoch_leaves_the_first(
    spoilt, complaint, tmp_path, monkeypatch
):
    """The network breaks in its second step. The third batch was scored before; a loss is read at
    the end of the epoch.
    """
    step = train_ast.train_step

    def spoiling(batch, run, count_correct=True):
        trained = step(batch, run, count_correct)
        if (run.metrics.epoch, run.metrics.step) == (1, 1):
            run.network.model[-1].weight.data.fill_(math.nan)
        return trained

    monkeypatch.setattr(train_ast, "train_step", spoiling)
    way = ["ast.pack=false"] if spoilt == "scores" else ["ast.mode=dense"]
    with pytest.raises(TrainingFailed, match=complaint):
        run_digits(tmp_path, *way)
    (path,) = tmp_path.glob("final_results_*.json")
    saved = json.loads(path.read_text())
    assert saved["status"] == "failed"
    assert saved["error"].startswith(complaint)
    assert saved["training_history"]["epoch"] == [1]


def test_an_image_that_breaks_later_keeps_the_finished_epochs(tmp_path, image_folder):
    """The file goes bad once the log has an epoch: one line names it, results and log keep what was
    finished.
    """
    victim = image_folder / "train" / "red" / "0.jpg"

    class Spoiler(Stop):
        def status(self, reserve_seconds=0.0):
            if list(tmp_path.glob("out/log.jsonl")) and (tmp_path / "out/log.jsonl").read_text():
                victim.write_bytes(b"gone")
            return None

    config = make_config(
        *FAST,
        "dataset.type=folder",
        f"dataset.train_dir={image_folder}/train",
        "training.num_workers=0",
        f"dataset.val_dir={image_folder}/val",
        "training.batch_size=4",
        "ast.mode=dense",
        f"logging.output_dir={tmp_path}/out",
        f"logging.jsonl_path={tmp_path}/out/log.jsonl",
    )
    with pytest.raises(RequestError, match=r"red/0\.jpg"):
        train(config, Spoiler())
    (path,) = (tmp_path / "out").glob("final_results_*.json")
    saved = json.loads(path.read_text())
    assert saved["status"] == "failed"
    logged = [
        json.loads(line)["epoch"] for line in (tmp_path / "out/log.jsonl").read_text().splitlines()
    ]
    assert saved["training_history"]["epoch"] == logged
    assert logged in ([1], [1, 2])  # the log is written beside the next epoch's first steps


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_its_results(number, code, tmp_path):
    log = tmp_path / "log.jsonl"
    overrides = [
        *FAST,
        "training.epochs=100000",
        f"logging.output_dir={tmp_path}",
        f"logging.jsonl_path={log}",
    ]
    work = program(["scripts/train_ast.py", "--config", "configs/digits_smoke.yaml", *overrides])
    with running(work, tmp_path / "out", tmp_path / "err") as child:
        wait_until(lambda: log.exists() and log.read_text())
        os.kill(child, number)
        ended = exit_code(child)
    out = (tmp_path / "out").read_text()
    err = (tmp_path / "err").read_text()
    assert ended == code, err
    (path,) = tmp_path.glob("final_results_*.json")
    saved = json.loads(path.read_text())
    assert saved["status"] == "interrupted"
    assert saved["training_history"]["epoch"][0] == 1
    assert f"results: {path}" in out
    assert "Traceback" not in err


def test_results_of_one_second_get_two_names_and_none_is_overwritten(tmp_path):
    paths = [save_results({"n": n}, tmp_path) for n in range(6)]
    assert len(set(paths)) == 6
    assert [json.loads(path.read_text())["n"] for path in paths] == list(range(6))
    assert sorted(tmp_path.iterdir()) == sorted(paths)  # no temporary file left


def test_an_output_folder_that_cannot_be_written_is_found_at_the_start():
    with pytest.raises(RequestError, match=r"logging\.output_dir: cannot write to /proc/nowhere"):
        train(make_config(*FAST, "logging.output_dir=/proc/nowhere"))


def test_devices_and_types():
    cpu = torch.device("cpu")
    assert resolve_amp_dtype(TrainingConfig(), cpu) is None
    assert resolve_amp_dtype(TrainingConfig(mixed_precision="bfloat16"), cpu) == torch.bfloat16
    assert resolve_amp_dtype(TrainingConfig(mixed_precision="float16"), cpu) == torch.float16
    assert resolve_amp_dtype(TrainingConfig(mixed_precision=False), cpu) is None
    assert resolve_device(TrainingConfig(device="cpu")) == cpu
    if not torch.cuda.is_available():
        with pytest.raises(RequestError, match="training.device: cuda, but torch sees no GPU"):
            resolve_device(TrainingConfig(device="cuda"))
        assert resolve_device(TrainingConfig()) == cpu


def test_sparse_training_learns_and_holds_its_target(tmp_path):
    """The whole point, small: digits at a quarter of the backward passes, activation where it was
    asked to be.
    """
    gains = [
        "ast.kp=1.0",
        "ast.ki=0.05",
        "ast.warmup_epochs=3",
        "training.epochs=10",
        "training.batch_size=32",
    ]
    adam = ["training.optimizer=adamw", "training.lr=0.003", "dataset.max_train_samples=null"]
    result, _ = run_digits(tmp_path, *gains, *adam)
    history = result["training_history"]
    assert result["final_accuracy"] > 90
    assert np.abs(np.array(history["activation_rate"][5:]) - 0.25).max() < 0.06
    assert all(saved > 0.3 for saved in history["energy_savings"][3:])
    assert math.isclose(history["lr"][-1], 0, abs_tol=1e-4)


def test_a_schedule_over_time_ends_at_its_budget_fully_decayed(tmp_path):
    budget = 2.0  # seconds
    schedule = [
        "training.lr_decay=time",
        f"training.max_minutes={budget / 60}",
        "training.epochs=1000",
    ]
    result, _ = run_digits(
        tmp_path, *schedule, "ast.mode=dense", "training.lr=0.1", "training.min_lr=0.001"
    )
    rates = result["training_history"]["lr"]
    assert result["status"] == "completed"
    assert result["epochs_completed"] < 1000
    seconds = result["training_history"]["train_seconds"]
    assert (
        [0.0, *seconds][-2] < budget <= seconds[-1] == result["train_seconds"]
    )  # none begun after its time
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.05
    assert rates[-1] == pytest.approx(0.001, abs=1e-3)


@pytest.mark.parametrize("cache", ["none", "device"])
def test_scoring_at_a_lower_resolution_is_counted(cache, tmp_path):
    more = [
        "dataset.image_size=16",
        "ast.score_resolution=8",
        f"dataset.cache={cache}",
        "training.epochs=2",
    ]
    result, _ = run_digits(tmp_path, "ast.warmup_epochs=0", *more)
    ledger = result["ledger"]
    flop = result["base_flop_per_sample"] / 1e9
    assert ledger["scored"] == ledger["loaded"] > 0
    network = get_model(ModelConfig(name="small_conv"), 10, 16)
    share = count_flops(network, 8) / count_flops(network, 16)  # a little over a quarter
    spent = flop * (ledger["trained"] + ledger["scored"] * share / 3)
    assert result["training_history"]["total_flops_g"][-1] == pytest.approx(spent)


def test_a_machine_that_cannot_compile_is_told_so(tmp_path):
    no_compiler = torch._inductor.config.patch({"cpp.cxx": (None, "/nonexistent/c++")})
    message = (
        r"training.compile: nothing can be compiled here \(.*/nonexistent/c.*\); install .* or set"
    )
    with no_compiler, pytest.raises(RequestError, match=message):
        run_digits(tmp_path, "training.compile=default")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings",
    [
        ["ast.mode=dense"],
        ["ast.mode=dense", "training.label_smoothing=0.3"],
        ["ast.scoring=history", "ast.rule=infobatch", "ast.entropy_weight=0"],
        [
            "ast.scoring=history",
            "ast.rule=infobatch",
            "ast.entropy_weight=0",
            "training.label_smoothing=0.3",
        ],
    ],
)
def test_the_reported_loss_is_the_plain_mean_over_the_trained_samples(settings):
    """Neither weights nor smoothing: those are the objective's."""
    config = make_config(*settings)
    run = Run.build(config, LayerNormNet(), torch.device("cpu"), planned_steps=100, samples=16)
    images, labels = make_batch()
    if config.ast.scoring == "history":
        run.selection.weights[:8] = 2
    with torch.no_grad():
        expected = F.cross_entropy(run.network.model(run.network.normalise(images)), labels)
    trained_on(run, images, labels)
    assert run.metrics.meter.read()[0] == pytest.approx(expected.item(), rel=1e-6)


def test_without_smoothing_and_weights_the_loss_is_the_objective_bit_for_bit():
    run = make_run(LayerNormNet(), "ast.mode=dense")
    (images, labels) = make_batch()
    for weights in (None, torch.ones(16)):
        result = run.network.forward(images, labels, weights)
        assert result.loss.item() == result.objective.item()


def test_weighted_and_smoothed_runs_report_a_loss_like_any_other(tmp_path):
    """Ten classes from nothing: about ln 10 in the first epoch, whatever the objective adds."""
    request = [
        "training.label_smoothing=0.9",
        "training.lr=1e-6",
        "training.epochs=1",
        "ast.mode=dense",
    ]
    result, _ = run_digits(tmp_path, *request)
    plain, _ = run_digits(tmp_path, *request, "training.label_smoothing=0")
    losses = [each["training_history"]["train_loss"][0] for each in (result, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
