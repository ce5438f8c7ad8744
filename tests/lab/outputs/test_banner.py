"""What a run says of itself at its start, and of how long it will take."""

from helpers import run_digits
from lab.outputs import banner


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
