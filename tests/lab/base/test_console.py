"""What a run without a terminal prints: a line every minute, and one device read for each."""

import re

from lab.base import console
from lab.base.console import step_bar
from runs import command

FIGURES = {"loss": "0.512", "active": "0.250", "left": "0:01:10"}


def test_a_line_comes_every_minute_and_the_figures_are_read_for_it_alone(monkeypatch, capsys):
    """Over two epochs of 40 s: the line of the second minute falls into the second one."""
    now = 1000.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    monkeypatch.setattr(console, "_line_printed", now)
    read = []

    def facts() -> dict[str, str]:
        read.append(now)
        return FIGURES

    for epoch in (1, 2):
        with step_bar(f"epoch {epoch}/2", 40) as heartbeat:
            for step in range(1, 41):
                now += 1.0
                heartbeat(step, 32, facts)
    assert read == [1040.0, 1060.0, 1080.0]  # an epoch's last step is read as well
    line = "epoch 2/2, step 20/40: loss 0.512, active 0.250, 32 pictures/s, 0:01:10 left\n"
    assert capsys.readouterr().out == line


def test_a_run_says_where_it_is(tmp_path):
    """The real thing, with a line after each step."""
    code = "import lab.base.console as console; console.LINE_SECONDS = 0.0"
    script = tmp_path / "run.py"
    script.write_text(f"{code}\nimport run_experiment, sys\nsys.exit(run_experiment.main())\n")
    quick = ["training.epochs=3", "ast.warmup_epochs=1", "dataset.max_train_samples=128"]
    asked = ["--config", "configs/digits_smoke.yaml", *quick, "--output-dir", tmp_path / "out"]
    done = command([script, *asked, "training.device=cpu"])
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if ", step " in line]
    assert len(lines) == 12
    dense = r"epoch 1/3, step 1/4: loss \d+\.\d+, [\d,]+ pictures/s, \d+:\d\d:\d\d left"
    assert re.fullmatch(dense, lines[0])
    sparse = r"epoch 3/3, step 4/4: loss (\d+\.\d+|-), active \d\.\d+, threshold -?\d+\.\d+, "
    assert re.fullmatch(sparse + r"[\d,]+ pictures/s, 0:00:00 left", lines[-1])
