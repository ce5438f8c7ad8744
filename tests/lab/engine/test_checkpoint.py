"""Checkpoints: a run goes on bit for bit where it was, whatever ended it, and nothing is lost on
the way.
"""

import json
import math
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import train_ast
from conftest import BatchNormNet, make_batch, make_config, make_run, save_picture, trained_on
from lab.base.errors import RequestError, TrainingFailed
from lab.base.files import align_jsonl
from lab.config.loading import Config, checkpoint_folder
from lab.engine.checkpoint import (
    FORMAT,
    Checkpoints,
    host_copy,
    load_checkpoint,
    save_checkpoint,
)
from lab.engine.state import load_state
from lab.machine.clock import Stop
from lab.machine.meters import Ledger
from lab.study.cli import run_cli
from runs import WAYS, CapAfter, StopAfter, final_state, same, untimed
from train_ast import close_epoch, execute, train

SMALL = [
    "model.name=small_conv",
    "dataset.image_size=8",
    "training.batch_size=16",
    "training.lr=0.05",
]
SMALL += [
    "dataset.max_train_samples=100",
    "dataset.max_val_samples=32",
    "training.epochs=3",
    "ast.warmup_epochs=1",
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Nets this small are no faster on two, and on a busy machine far slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


OVERLAP = [
    "layers, Adam",
    "resident",
    "accumulated",
    "dense",
    "packed",
    "top-k",
    "ast",
    "history",
    "history, doubted",
    "history, two workers",
]  # others hold what is in them


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.long] * (way in OVERLAP)) for way in WAYS]
)
def test_a_run_interrupted_anywhere_ends_as_the_uninterrupted_one(way, tmp_path):
    def config(folder):
        return make_config(*SMALL, *WAYS[way], f"logging.output_dir={tmp_path / folder}")

    whole, _ = train(config("whole"))
    for steps in (3, 5, 4, 6):  # 6 steps an epoch: inside epochs, on their last step, across phases
        cut, _ = train(config("cut"), StopAfter(steps), "auto")
        if cut["status"] != "interrupted":
            break
    cut, path = train(config("cut"), resume="auto")
    assert len(list((tmp_path / "cut").glob("final_results_*.json"))) >= 4
    assert json.loads(path.read_text())["status"] == "completed"
    assert untimed(cut) == untimed(whole)
    assert same(final_state(config("cut")), final_state(config("whole")))


# ---------------------------------------------------------------------- Which checkpoint, and whose


def trained(tmp_path: Path, *overrides: str, **arguments) -> tuple[Config, dict]:
    config = make_config(*SMALL, "ast.mode=dense", f"logging.output_dir={tmp_path}", *overrides)
    return config, train(config, **arguments)[0]


def test_a_run_of_more_epochs_goes_on_from_a_finished_one(tmp_path):
    config, short = trained(tmp_path, "training.epochs=2")
    assert short["status"] == "completed"
    before = load_checkpoint(checkpoint_folder(config) / "last.pt", config)["clock"]["elapsed"]
    _, longer = trained(tmp_path, "training.epochs=4", resume=str(checkpoint_folder(config)))
    assert longer["training_history"]["epoch"] == [1, 2, 3, 4]
    assert longer["training_history"]["val_acc"][:2] == short["training_history"]["val_acc"]
    assert (
        3600 * longer["total_time_hours"]
        > before + longer["train_seconds"] - short["train_seconds"]
    )
    assert longer["ledger"]["loaded"] == 2 * short["ledger"]["loaded"]


def test_without_resume_a_run_starts_afresh_and_with_auto_a_finished_one_has_nothing_to_do(
    tmp_path, capsys
):
    _, first = trained(tmp_path)
    assert "starts afresh" not in capsys.readouterr().out
    _, again = trained(tmp_path, resume="auto")
    assert f"resumed from {tmp_path}/checkpoints/" in capsys.readouterr().out
    assert untimed(again) == untimed(first)
    assert again["train_seconds"] == first["train_seconds"]
    _, fresh = trained(tmp_path)
    assert fresh["train_seconds"] != first["train_seconds"]
    trained(tmp_path, "training.seed=1", resume="auto")
    assert "there is no checkpoint of this config, the run starts afresh" in capsys.readouterr().out


def test_best_is_the_epoch_of_best_accuracy(tmp_path):
    config, result = trained(tmp_path, "training.lr=0.3", "training.epochs=4")
    best = load_checkpoint(checkpoint_folder(config) / "best.pt", config)
    assert best["metrics"]["history"]["epoch"][-1] == result["best_epoch"]
    assert best["metrics"]["history"]["val_acc"][-1] == result["best_accuracy"]


def test_a_checkpoint_of_another_config_is_refused_naming_the_keys(tmp_path):
    config, _ = trained(tmp_path)
    path = str(checkpoint_folder(config) / "last.pt")
    with pytest.raises(RequestError) as caught:
        trained(tmp_path, "training.lr=0.01", "ast.mode=ast", "training.epochs=9", resume=path)
    assert str(caught.value) == (
        f"{path}: a checkpoint of another config: ast.mode (dense there, ast asked for),"
        " training.lr (0.05 there, 0.01 asked for)"
    )
    for missing in (tmp_path / "nowhere.pt", tmp_path):
        with pytest.raises(RequestError, match=r"cannot read the checkpoint: No such file"):
            trained(tmp_path, resume=str(missing))


def test_a_resumed_log_has_every_epoch_once(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"epoch": 1, "of": "an earlier run"}\n')
    keys = [f"logging.jsonl_path={log}", "training.epochs=4"]
    trained(tmp_path, *keys, stop=StopAfter(15))
    rows = log.read_text().splitlines(keepends=True)
    assert len(rows) == 3
    for damage in (
        [*rows, rows[-1], '{"epoch": 3, "trai'],
        rows[:-1],
        [*rows, '{"epoch": 1, "of": "a later run"}\n'],
    ):
        log.write_text("".join(damage))
        align_jsonl(log, history_of(rows[1:]))
        assert log.read_text() == "".join(
            [*rows, *damage[len(rows) :][:1]] if "later" in damage[-1] else rows
        )
    log.write_text("".join(rows[:-1]) + rows[-1][:30])  # torn in the middle of a line
    _, result = trained(tmp_path, *keys, resume="auto")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 1, 2, 3, 4]
    assert history_of(log.read_text().splitlines()[1:]) == result["training_history"]


def history_of(lines: list[str]) -> dict[str, list]:
    rows = [json.loads(line) for line in lines]
    return {key: [row[key] for row in rows] for key in rows[0]}


# ------------------------------------------------------------------------------------------- Damage


def test_a_damaged_checkpoint_is_refused_and_the_whole_one_beside_it_works(tmp_path):
    """Cut at 20 places, bits turned over at 40: one line naming the file, each time."""
    config, _ = trained(tmp_path)
    last = checkpoint_folder(config) / "last.pt"
    best = checkpoint_folder(config) / "best.pt"
    whole = last.read_bytes()
    cuts = [whole[: len(whole) * i // 20] for i in range(20)]
    places = np.random.default_rng(0).integers(0, len(whole), 40)
    flips = [
        whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in places.tolist()
    ]
    for hostile in [*cuts, *flips, b"rubbish" * 100]:
        last.unlink()
        last.write_bytes(hostile)
        with pytest.raises(
            RequestError, match=r"last\.pt: damaged, or no checkpoint of this lab"
        ) as caught:
            load_checkpoint(last, config)
        assert "\n" not in str(caught.value)
    assert load_checkpoint(best, config)["metrics"]["epoch"] > 0


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("hostile", ["code", "a list", "no config", "no model", "another shape"])
def test_a_checkpoint_made_to_harm_runs_no_code_and_is_refused(hostile, tmp_path):
    config, _ = trained(tmp_path)
    path = checkpoint_folder(config) / "last.pt"
    state = load_checkpoint(path, config)
    if hostile == "code":
        state["bomb"] = Bomb(tmp_path / "exploded")
    elif hostile == "another shape":
        state["model"]["0.weight"] = torch.zeros(3)
    elif hostile == "no model":
        del state["model"]
    elif hostile != "a list":
        del state[hostile.removeprefix("no ")]
    save_checkpoint([1, 2] if hostile == "a list" else state, path)
    with pytest.raises(
        RequestError, match=rf"{path}: (no checkpoint of this lab|a checkpoint that does not fit)"
    ):
        train(config, resume="auto")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("number", [None, 1, 2, 3, FORMAT + 1])
def test_a_checkpoint_of_another_format_is_refused_in_one_line(number, tmp_path, capsys):
    """One of earlier days also has a config that this lab no longer reads: the format is told
    first.
    """
    config, _ = trained(tmp_path, "training.epochs=1")
    path = checkpoint_folder(config) / "last.pt"
    state = load_checkpoint(path, config)
    state["config"]["ast"]["explore_weight_cap"] = 1.0
    state.pop("format")
    save_checkpoint(state if number is None else state | {"format": number}, path)
    before = path.read_bytes()
    for results in tmp_path.glob("final_results_*.json"):
        results.unlink()  # or the run is finished, and needs no checkpoint
    assert run_cli(lambda: execute(config, "auto")) == 2
    error = capsys.readouterr().err
    assert error == (
        f"error: {path}: a checkpoint of another version of the lab; start the run afresh\n"
    )
    assert path.read_bytes() == before


def test_a_write_that_fails_leaves_the_checkpoint_before_it(tmp_path):
    """The disk takes no more than so many bytes of the new file."""
    path = tmp_path / "last.pt"
    save_checkpoint({"n": 1, "weights": torch.zeros(1000)}, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (0, 1, 500, 4096, 8192):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            with pytest.raises((OSError, RuntimeError)):
                save_checkpoint({"n": 2, "weights": torch.zeros(4000)}, path)
            assert path.read_bytes() == before
            assert list(tmp_path.iterdir()) == [path]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("limit", [100_000, 400_000])
def test_a_disk_that_fills_up_ends_the_run_in_one_line(limit, tmp_path):
    """Files may not outgrow `limit` bytes from the second epoch on, as on a disk that is nearly
    full.
    """
    config, _ = trained(tmp_path)
    before = (checkpoint_folder(config) / "last.pt").read_bytes()
    assert len(before) > limit
    longer = make_config(
        *SMALL, "ast.mode=dense", f"logging.output_dir={tmp_path}", "training.epochs=3"
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        with pytest.raises(
            TrainingFailed, match=r"last\.pt.*: cannot write, the checkpoint before is whole"
        ):
            train(longer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (checkpoint_folder(config) / "last.pt").read_bytes() == before
    newest = max(tmp_path.glob("final_results_*.json"), key=lambda path: path.stat().st_mtime)
    saved = json.loads(newest.read_text())
    assert saved["status"] == "failed"
    assert saved["training_history"]["epoch"]


def test_too_little_room_is_found_before_training(tmp_path):
    with pytest.raises(
        RequestError,
        match=r"logging.output_dir: the checkpoints in .* need [\d,]+ MiB, and [\d,]+ MiB",
    ):
        Checkpoints(tmp_path / "run").require_space(shutil.disk_usage(tmp_path).free)


# ------------------------------------------------------------------------------- Signals and limits


@pytest.mark.parametrize("capped", [False, True])
def test_a_signal_during_validation_leaves_it_for_the_resumed_run(capped, tmp_path):
    whole_config, whole = trained(tmp_path / "whole", "training.grad_accum_steps=4")

    stop = CapAfter(3) if capped else Stop()
    keys = [
        "ast.mode=dense",
        "training.grad_accum_steps=4",
        f"logging.output_dir={tmp_path / 'cut'}",
    ]
    config = make_config(*SMALL, *keys)
    batches = train_ast.device_batches

    def signalled(loader, *rest):
        for number, batch in enumerate(batches(loader, *rest)):
            if isinstance(loader.batch_sampler, list) and number == 1:  # the validation's
                stop.signal = 15
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_ast, "device_batches", signalled)
        cut, _ = train(config, stop)
    assert (cut["status"], cut["training_history"]["epoch"]) == ("interrupted", [])
    cut, _ = train(config, resume="auto")
    assert untimed(cut) == untimed(whole)
    assert same(final_state(config), final_state(whole_config))


def test_a_cap_inside_an_epoch_can_be_resumed_too(tmp_path):
    whole_config, whole = trained(tmp_path / "whole", "training.grad_accum_steps=4")

    stop = CapAfter(10)
    config = make_config(
        *SMALL,
        "ast.mode=dense",
        "training.grad_accum_steps=4",
        f"logging.output_dir={tmp_path}/cut",
    )
    cut, _ = train(config, stop)
    assert (cut["status"], cut["training_history"]["epoch"]) == ("time_capped", [1, 2])
    cut, _ = train(config, resume="auto")
    assert untimed(cut) == untimed(whole)
    assert same(final_state(config), final_state(whole_config))


@pytest.mark.parametrize("mode", ["dense", "ast"])
def test_a_run_that_ended_with_its_time_ends_the_same_when_resumed(mode, tmp_path):
    """The epoch that the end cut short is closed once more, from the checkpoint before."""
    log = tmp_path / "log.jsonl"
    keys = [
        "training.lr_decay=time",
        "training.max_minutes=0.01",
        "training.epochs=1000",
        f"ast.mode={mode}",
    ]
    keys += ["training.batch_size=4"]  # 50 steps an epoch: the time hardly ever ends with one
    keys += ["training.grad_accum_steps=4", "ast.warmup_epochs=0", f"logging.jsonl_path={log}"]
    _, first = trained(tmp_path, *keys)
    for _ in range(2):
        _, again = trained(tmp_path, *keys, resume="auto")
        assert untimed(again) == untimed(first)
        rows = [json.loads(line)["val_acc"] for line in log.read_text().splitlines()]
        assert rows == first["training_history"]["val_acc"]


@pytest.mark.parametrize("caps", [[3], [3, 2], [10], [3, 7]])
def test_an_epoch_capped_and_resumed_is_logged_once(caps, tmp_path):
    """Capped in the first epoch, twice in it, in the second, and in both; lines of other runs
    stay.
    """
    log = tmp_path / "log.jsonl"
    other = '{"epoch": 1, "of": "another run"}\n'
    log.write_text(other)
    keys = [f"logging.jsonl_path={log}"]
    for session, steps in enumerate(caps):
        _, cut = trained(
            tmp_path, *keys, stop=CapAfter(steps), resume=None if session == 0 else "auto"
        )
        assert cut["status"] == "time_capped"
        assert history_of(log.read_text().splitlines()[1:]) == cut["training_history"]
    log.write_text(log.read_text() + other)  # logged after the cap
    _, result = trained(tmp_path, *keys, resume="auto")
    lines = log.read_text().splitlines(keepends=True)
    own = [line for line in lines if line != other]
    assert len(lines) == len(own) + 2
    assert history_of(own) == result["training_history"]
    assert result["training_history"]["epoch"] == [1, 2, 3]


def slow_to_validate(folder: Path, pictures: int) -> list[str]:
    """24 small pictures to train on, and so many names of one that takes about 30 ms to decode."""
    for kind in ("a", "b"):
        (folder / "train" / kind).mkdir(parents=True)
        (folder / "val" / kind).mkdir(parents=True)
        for i in range(12):
            save_picture(folder / "train" / kind / f"{i}.jpg", (80, 80, 80), i)
    save_picture(folder / "large.jpg", (80, 80, 80), 0, side=1600)
    for i in range(pictures):
        (folder / "val" / "ab"[i % 2] / f"{i}.jpg").symlink_to(folder / "large.jpg")
    data = [
        "dataset.type=folder",
        f"dataset.train_dir={folder}/train",
        f"dataset.val_dir={folder}/val",
    ]
    small = [
        "model.name=test_resnet",
        "dataset.image_size=32",
        "training.batch_size=8",
        "training.num_workers=0",
    ]
    return [*data, *small, "ast.mode=dense", "training.epochs=100000"]


def cap_test(tmp_path: Path, minutes: float, validation: float, sessions: int) -> None:
    """`validation`: how long one takes, in parts of `minutes`. All must end in a tenth over the cap
    and 2 s.
    """
    keys = slow_to_validate(tmp_path / "images", 40)
    started = time.monotonic()
    train(make_config(*keys[:-1], "training.epochs=1", f"logging.output_dir={tmp_path / 'probe'}"))
    pictures = round(40 * validation * 60 * minutes / (time.monotonic() - started))
    keys = slow_to_validate(tmp_path / "more", pictures)
    config = make_config(
        *keys, f"training.max_minutes={minutes}", f"logging.output_dir={tmp_path / 'out'}"
    )
    for _ in range(sessions):
        started = time.monotonic()
        result, path = train(config, resume="auto")
        seconds = time.monotonic() - started
        epochs = result["training_history"]["epoch"]
        print(
            f"{pictures} pictures to validate on, cap {60 * minutes:.0f} s: took "
            f"{seconds:.1f} s, epochs {epochs}"
        )
        assert result["status"] == json.loads(path.read_text())["status"] == "time_capped"
        assert seconds < 66 * minutes + 2
        saved = load_checkpoint(checkpoint_folder(config) / "last.pt", config)["metrics"][
            "history"
        ]["epoch"]
        assert saved == epochs[: result["epochs_completed"]]
        assert len(epochs) - len(saved) in (
            0,
            1,
        )  # one that the cap cut short is repeated by a resumed run
    assert bool(epochs) == (validation < 1)


@pytest.mark.parametrize("validation", [0.4, pytest.param(3.0, marks=pytest.mark.long)])
def test_a_cap_holds_however_long_the_validation_takes(validation, tmp_path):
    cap_test(tmp_path, 0.05, validation, sessions=1)


@pytest.mark.long
@pytest.mark.parametrize("validation", [0.6, 3.0])
def test_a_cap_of_one_minute_holds_however_long_the_validation_takes(validation, tmp_path):
    cap_test(tmp_path, 1.0, validation, sessions=2)


def test_checkpoints_within_an_epoch_come_as_often_as_asked(tmp_path):
    """Each is whole and goes on to the same end; the run that wrote them is not changed by it."""
    whole_config, whole = trained(tmp_path / "whole")
    config = make_config(
        *SMALL,
        "ast.mode=dense",
        f"logging.output_dir={tmp_path}/cut",
        "logging.checkpoint_minutes=1e-9",
    )
    often, _ = train(config)
    assert untimed(often) == untimed(whole)
    assert same(final_state(config), final_state(whole_config))


def spoilt(forward):
    """A forward whose losses are not a number, and its gradients neither."""

    def spoil(*inputs):
        result = forward(*inputs)
        return result._replace(loss=result.loss * math.nan, objective=result.objective * math.nan)

    return spoil


def test_a_state_with_a_loss_that_is_not_finite_is_not_kept():
    """The step is named once the epoch's sums are read; what was before is whole."""
    run = make_run(BatchNormNet(), "ast.mode=dense", "training.lr=0.01")
    run.start_epoch(1, np.arange(0))
    images, labels = make_batch()
    whole = run.network.forward
    for number in range(4):
        run.network.forward = spoilt(whole) if number == 2 else whole
        trained_on(run, images, labels)
        run.optimizer_step()
        run.metrics.step += 1
        if number == 1:
            host_copy(run.state())
    with pytest.raises(TrainingFailed, match="non-finite loss in epoch 2, step 3$"):
        run.state()
    run.clock.epoch_seconds = 1.0
    with pytest.raises(TrainingFailed, match="non-finite loss in epoch 2, step 3$"):
        close_epoch(run, 10.0, 48)
    assert run.metrics.history["epoch"] == []


def test_the_ledger_of_an_unfinished_epoch_goes_on_where_it_was():
    """In the results and, once resumed, in the epoch's row."""
    run = make_run(BatchNormNet(), "ast.mode=dense")
    images, labels = make_batch()
    for _ in range(3):
        run.metrics.ledger.loaded += len(labels)
        trained_on(run, images, labels)
        run.optimizer_step()
        run.metrics.step += 1
    state = host_copy(run.state())
    ledger = asdict(Ledger(loaded=48, trained=48, steps=3))
    assert run.metrics.result()["ledger"] == ledger
    resumed = make_run(BatchNormNet(), "ast.mode=dense")
    load_state(resumed.parts(), state, resumed.dist)
    assert same(host_copy(resumed.state()) | {"clock": None}, state | {"clock": None})
    assert resumed.metrics.result()["ledger"] == ledger
    resumed.clock.epoch_seconds = 1.0
    row = close_epoch(resumed, 10.0, 48)
    assert (row["samples_trained"], row["optimizer_steps"]) == (48, 3)
    assert row["train_loss"] == pytest.approx(run.metrics.meter.read()[0])


def test_a_run_that_diverges_leaves_the_last_good_checkpoint(tmp_path):
    keys = ["model.name=test_vit", "dataset.image_size=32"]
    config, _ = trained(tmp_path, *keys, "training.epochs=1")
    state = load_checkpoint(checkpoint_folder(config) / "last.pt", config)
    state["model"]["head.bias"].fill_(math.nan)  # what a diverged run would be
    diverged = tmp_path / "diverged.pt"
    save_checkpoint(state, diverged)
    with pytest.raises(TrainingFailed, match=r"non-finite loss in epoch 2, step 1"):
        trained(tmp_path, *keys, resume=str(diverged))
    longer = make_config(*SMALL, "ast.mode=dense", f"logging.output_dir={tmp_path}", *keys)
    assert not (checkpoint_folder(longer) / "last.pt").exists()
