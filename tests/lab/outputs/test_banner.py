"""What a run says of itself at its start, and of how long it will take."""

import time
from typing import NamedTuple

from conftest import make_config
from helpers import run_digits
from lab.config.sections import TrainingConfig
from lab.machine.clock import Stop
from lab.outputs import banner
from lab.outputs.banner import seconds_left


def test_the_banner_says_what_is_trained_on_what_and_where(tmp_path, capsys):
    """The figures of scikit-learn's digits, and of test_resnet's weights."""
    assert run_digits(tmp_path) == 0
    block = capsys.readouterr().out.partition("device ")[2].partition("\n\n")[0].splitlines()
    rows = {line[:17].strip(): line[17:] for line in block[1:]}
    assert (
        rows["model"]
        == "test_resnet, 0.37 M parameters, 0.0073 GFLOP per picture (forward and backward)"
    )
    assert rows["data"] == "digits, 10 classes, 128 pictures in training, 64 in validation"
    assert rows["schedule"] == "2 epochs of 4 steps of 32 pictures"
    assert rows["mode"] == "ast: target activation 0.25 in epoch 2, scoring=batch, rule=pi"
    assert rows["results"].startswith(f"{tmp_path}, checkpoints in {tmp_path}/checkpoints/")


def test_a_long_run_on_a_cpu_says_so_once(tmp_path, capsys, monkeypatch):
    assert run_digits(tmp_path) == 0
    assert "note: on this CPU" not in capsys.readouterr().out
    monkeypatch.setattr(banner, "LONG_HOURS", 0.0)
    assert run_digits(tmp_path, "training.seed=1") == 0
    first, last = capsys.readouterr().out.split(
        "note: on this CPU all 2 epochs take about 0.0 hours; a GPU, "
    )
    assert "    1/2  " in first
    assert "    2/2  " in last


class Clocked(NamedTuple):
    """A clock as `seconds_left` reads it."""

    training: TrainingConfig
    stop: Stop
    train_seconds: float
    eval_seconds: float
    running: float  # seconds of the epoch that runs

    def training_seconds(self) -> float:
        return self.train_seconds + self.running


def test_the_time_left_goes_by_the_last_epoch_of_each_kind():
    """Ten epochs, the first two dense: 20 s and 10 s long, sparse ones 4 s; half of the fifth is
    done. A validation takes 1 s.
    """
    training = make_config("training.epochs=10").training
    clock = Clocked(training, Stop(), 38.0, 1.0, 2.0)
    history = [20.0, 30.0, 34.0, 38.0]
    left = seconds_left(clock, history, lambda epoch: 2 <= epoch < 9, 4.5)
    assert left == 2 + 4 * 4 + 10 + 6 * 1  # this one, four sparse ones, the dense end, validations
    stop = Stop()
    stop.deadline = time.monotonic() + 7
    capped = clock._replace(stop=stop)
    assert 6 < seconds_left(capped, history, lambda epoch: epoch >= 2, 4.5) <= 7
    by_time = make_config("training.lr_decay=time", "training.max_minutes=2").training
    assert seconds_left(clock._replace(training=by_time), [], bool, 0.1) == 120 - 40
