"""The figures: settings told apart and alike in all of them, means over seeds, and what was not
recorded.
"""

import numpy as np
import pytest

from helpers import study_of, write_run, write_sweep
from lab.study.analysis.figures import MODES, OTHER, choose_styles, draw, draw_file, mean_curve
from lab.study.analysis.report import render


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("sweep"))


def test_a_handful_of_settings_is_labelled_and_looks_alike_in_every_figure(tmp_path):
    """The most accurate of each mode, the baseline, then the most accurate sparse ones; the others
    are grey.
    """
    for number in range(12):
        write_run(tmp_path, f"a{number:02}", (1.0, 2.0, 90 - number), ast__kp=float(number))
        write_run(
            tmp_path,
            f"r{number:02}",
            (1.0, 2.0, 70 - number),
            ast__mode="random",
            training__epochs=number + 3,
        )
        write_run(
            tmp_path,
            f"d{number:02}",
            (1.0, 2.0, 80 - number),
            ast__mode="dense",
            training__epochs=number + 3,
        )
    study = study_of(tmp_path)
    styles = choose_styles(study)
    assert len({tuple(style.values()) for style in styles.values()}) == len(styles) == 6
    assert list(styles) == [
        *(f"ast kp={number} epochs=3" for number in range(4)),
        "dense epochs=3",
        "random epochs=3",
    ]
    assert len({style["color"] for style in styles.values()}) == 3
    for name in ("accuracy", "threshold"):
        figure = draw(study, name, legend=True)
        (legend,) = figure.legends
        drawn = [line for line in figure.axes[0].get_lines() if line.get_color() != OTHER]
        own = [
            style["color"]
            for style in styles.values()
            if name == "accuracy" or style["color"] != MODES["dense"]
        ]
        assert [line.get_color() for line in drawn] == own
        texts = [" ".join(text.get_text().split()) for text in legend.get_texts()]
        assert texts == [
            *(f"ast kp={number}" for number in range(4)),
            "dense epochs=3",
            "random epochs=3",
            "30 other settings",
        ]
        figure.draw_without_rendering()
        box = legend.get_window_extent()
        assert box.y0 >= 0
        assert box.x0 >= figure.axes[0].get_window_extent().x1  # outside
    assert "6 of 36 settings are labelled" in " ".join(render([study]).split())


def test_bars_are_intervals_within_the_possible_and_the_file_is_byte_stable(tmp_path):
    for seed, (many, two, close) in enumerate(
        zip((1.0, 2.0, 9.0), (40.0, 42.0, None), (99.0, 99.5, 100.0), strict=True)
    ):
        write_run(tmp_path, f"a{seed}", (1.0, many), 10.0 + 9 * seed, training__seed=seed)
        write_run(tmp_path, f"c{seed}", (1.0, close), 30.0, training__seed=seed, ast__mode="random")
        if two is not None:
            write_run(
                tmp_path,
                f"b{seed}",
                (1.0, two),
                20.0 + seed,
                training__seed=seed,
                ast__mode="dense",
            )
    study = study_of(tmp_path)
    (axes,) = draw(study, "frontier_time", legend=False).axes
    ends = [path.vertices for lines in axes.collections for path in lines.get_paths()]
    assert min(end.min() for end in ends) == 0.0
    assert max(end[:, 1].max() for end in ends) == 100.0
    assert any(np.allclose(end[:, 1], [40.0, 42.0]) for end in ends)  # of two seeds, their range
    for kind in ("png", "svg"):
        assert draw_file(study, "frontier_time", kind) == draw_file(
            study_of(tmp_path), "frontier_time", kind
        )


def test_a_panel_that_says_nothing_is_left_out(tmp_path):
    write_run(tmp_path, "1", ast__mode="dense")
    write_run(tmp_path, "2", seconds=60.0, ast__mode="dense", training__epochs=6)
    study = study_of(tmp_path)
    assert draw(study, "activation", legend=False) is draw(study, "threshold", legend=False) is None
    assert "Threshold" not in render([study])


def test_curves_are_means_over_the_epochs_all_seeds_reached():
    histories = [
        {
            "epoch": np.array([1.0, 2, 3]),
            "val_acc": np.array([10.0, 20, 30]),
            "train_seconds": np.array([1.0, 2, 3]),
        },
        {
            "epoch": np.array([1.0, 2]),
            "val_acc": np.array([20.0, np.nan]),
            "train_seconds": np.array([3.0, 4]),
        },
    ]
    xs, ys = mean_curve(histories, "train_seconds", "val_acc")
    assert xs.tolist() == [2, 3]
    np.testing.assert_array_equal(ys, [[10, 20], [20, np.nan]])
    assert mean_curve(histories, "epoch", "energy_kj") is None
    assert mean_curve([{"val_acc": np.array([5.0])}], "epoch", "val_acc")[0].tolist() == [1]


def test_a_figure_says_what_was_not_recorded(folder):
    study = study_of(folder)
    (axes,) = draw(study, "threshold", legend=False).axes
    assert axes.get_xlabel() == "epoch   (1 setting without it)"  # dense
    (axes,) = draw(study, "energy", legend=False).axes  # nothing measured on this CPU: one panel
    assert axes.get_ylabel() == "estimated, time x TDP (kJ)"
    (axes,) = draw(study, "frontier_time", legend=False).axes
    assert axes.lines[0].get_xydata().tolist() == [[31.0, pytest.approx(73 + 1 / 9)]]
