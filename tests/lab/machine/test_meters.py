"""Counting: sums on the device, the ledger, energy, JSON lines."""

import json
import math
import sys
from dataclasses import asdict

import pytest
import torch

from lab.base.errors import RequestError, TrainingFailed
from lab.base.files import append_jsonl
from lab.config.sections import LoggingConfig
from lab.machine.meters import EnergyMeter, Ledger, Meter
from lab.outputs.log import add_scalars, open_tensorboard

CPU = torch.device("cpu")


def test_meter_means_over_samples_not_over_batches():
    meter = Meter(CPU, epoch=0)
    for loss, samples in ((6.0, 3), (10.0, 1)):
        meter.add_loss(torch.tensor(loss), torch.tensor(99.0), samples, step=0)
    meter.add_correct(torch.tensor(1), samples=2)  # counted on the device
    meter.add_correct(2, samples=2)  # or by the host
    assert meter.read() == (4.0, 75.0)
    assert Meter(CPU, 0).read() == (None, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("of", ["loss", "objective"])
def test_meter_names_the_first_non_finite_step(of, bad):
    meter = Meter(CPU, epoch=2)
    for step, value in enumerate([1.0, bad, 1.0, bad]):
        values = {
            "loss": torch.tensor(1.0),
            "objective": torch.tensor(1.0),
            of: torch.tensor(value),
        }
        meter.add_loss(**values, samples=2, step=step)
    for _ in range(2):
        with pytest.raises(TrainingFailed, match="non-finite loss in epoch 3, step 2$"):
            meter.read()
    assert meter.sums[0].isfinite()


def test_counts_of_several_processes_add_up():
    """On rank 0 of another number of them; the first bad step of any is the first of all."""
    states = []
    for rank, (loss, bad) in enumerate([(6.0, 0), (2.0, 5), (1.0, 3)]):
        meter = Meter(CPU, 0)
        meter.add_loss(torch.tensor(loss), torch.tensor(1.0), samples=2, step=0)
        if bad:
            meter.add_loss(torch.tensor(math.nan), torch.tensor(1.0), samples=1, step=bad - 1)
        meter.add_correct(torch.tensor(1), samples=2)
        meter.add_correct(rank, samples=2)
        states.append(meter.state_dict())
    merged = [meter.merged(states, rank) for rank in (0, 1)]
    assert [(each["correct"], each["trained"], each["predicted"]) for each in merged] == [
        (3, 8, 12),
        (0, 0, 0),
    ]
    assert [each["sums"].tolist() for each in merged] == [[9, 3, 3], [0, 0, 0]]
    ledgers = [Ledger(10, 5, 3, 7, reused=3).state_dict()]
    ledgers.append(Ledger(20, 6, 4, 7, padding=1).state_dict())
    assert Ledger().merged(ledgers, 0) == asdict(Ledger(30, 11, 7, 7, reused=3, padding=1))
    assert Ledger().merged(ledgers, 1) == asdict(Ledger(steps=7))


def test_ledger_differences_and_equivalents():
    before = Ledger(100, 60, 30, 3)
    after = Ledger(250, 180, 90, 10)
    assert after.since(before) == Ledger(150, 120, 60, 7)
    assert Ledger(scored=90, trained=25).dense_equivalents() == 55
    assert Ledger(scored=90, trained=25).dense_equivalents(scoring_cost=0.1) == 34
    counted = Ledger(scored=30, trained=25)
    counted.add_judged(60)  # by the network itself, whatever a score costs
    assert counted.scored == 90
    assert counted.dense_equivalents(scoring_cost=0.1) == pytest.approx(25 + 3 + 20)


def test_no_energy_counter_on_a_cpu():
    assert EnergyMeter(CPU).read_kj() is None


def test_jsonl_appends_whole_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"epoch": 0}\n')
    append_jsonl(path, {"epoch": 1, "threshold": None})
    append_jsonl(path, {"epoch": 2, "threshold": 0.5})
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [0, 1, 2]
    with pytest.raises(ValueError, match="JSON"):
        append_jsonl(path, {"epoch": math.nan})


def test_tensorboard_that_is_missing_says_what_to_install(tmp_path, monkeypatch):
    assert open_tensorboard(LoggingConfig(output_dir=str(tmp_path))) is None
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", None
    )  # as where it is not installed
    with pytest.raises(RequestError, match="logging.tensorboard: .* pip install tensorboard"):
        open_tensorboard(LoggingConfig(output_dir=str(tmp_path), tensorboard=True))
    assert not list(tmp_path.iterdir())


def test_tensorboard_gets_what_was_measured(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = open_tensorboard(LoggingConfig(output_dir=str(tmp_path), tensorboard=True))
    for epoch, threshold in enumerate([None, 0.5, 0.25], 1):
        add_scalars(board, {"epoch": epoch, "val_acc": 10.0 * epoch, "threshold": threshold})
    (folder,) = (tmp_path / "tensorboard").iterdir()
    events = accumulator.EventAccumulator(str(folder)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("val_acc")] == [
        (1, 10),
        (2, 20),
        (3, 30),
    ]
    assert [(event.step, event.value) for event in events.Scalars("threshold")] == [
        (2, 0.5),
        (3, 0.25),
    ]
