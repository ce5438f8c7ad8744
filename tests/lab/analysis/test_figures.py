"""The figures: settings told apart and alike in all of them, means over seeds, and what was not recorded."""

import numpy as np
import pytest

from helpers import study_of, write_run, write_sweep
from lab.analysis.figures import choose_styles, draw, mean_curve
from lab.analysis.report import render


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("sweep"))


def test_thirty_settings_are_told_apart_and_look_alike_in_every_figure(tmp_path):
    for number in range(31):
        write_run(tmp_path, f"{number:02}", (1.0, 2.0, 90 - number), ast__kp=float(number))
    study = study_of(tmp_path)
    styles = choose_styles(study)
    assert len({tuple(style.values()) for style in styles.values()}) == len(styles) == 30
    accuracy, threshold = (draw(study, name, legend=True) for name in ("accuracy", "threshold"))
    lines = [{label: style["color"] for label, style in styles.items()}]
    for figure in (accuracy, threshold):
        (legend,) = figure.legends
        drawn = [line for line in figure.axes[0].get_lines() if len(line.get_xdata()) == 3]
        assert len(drawn) == len(legend.get_texts()) == 30
        lines.append(dict(zip(lines[0], [line.get_color() for line in drawn], strict=True)))
        lines.append(
            {text.get_text(): line.get_color() for text, line in zip(legend.texts, legend.get_lines(), strict=True)}
        )
        figure.draw_without_rendering()
        box = legend.get_window_extent()
        assert box.y0 >= 0  # the legend's thirty lines fit
        assert box.x0 >= figure.axes[0].get_window_extent().x1  # outside
    assert all(each == lines[0] for each in lines)
    assert "the 30 most accurate of 31 settings" in accuracy.get_suptitle()
    assert "Drawn are the 30 most accurate of 31 settings" in render([study])


def test_curves_are_means_over_the_epochs_all_seeds_reached():
    histories = [
        {"epoch": np.array([1.0, 2, 3]), "val_acc": np.array([10.0, 20, 30]), "train_seconds": np.array([1.0, 2, 3])},
        {"epoch": np.array([1.0, 2]), "val_acc": np.array([20.0, np.nan]), "train_seconds": np.array([3.0, 4])},
    ]
    xs, ys = mean_curve(histories, "train_seconds", "val_acc")
    assert xs.tolist() == [2, 3]
    np.testing.assert_array_equal(ys, [[10, 20], [20, np.nan]])
    assert mean_curve(histories, "epoch", "energy_kj") is None
    assert mean_curve([{"val_acc": np.array([5.0])}], "epoch", "val_acc")[0].tolist() == [1]


def test_a_figure_says_what_was_not_recorded(folder):
    study = study_of(folder)
    (axes,) = draw(study, "threshold", legend=False).axes
    assert axes.get_xlabel() == "epoch   (1 settings without it)"  # dense
    (axes,) = draw(study, "energy", legend=False).axes  # nothing measured on this CPU: one panel
    assert axes.get_ylabel() == "estimated, time x TDP (kJ)"
    (axes,) = draw(study, "frontier_time", legend=False).axes
    assert axes.lines[0].get_xydata().tolist() == [[31.0, pytest.approx(73 + 1 / 9)]]
