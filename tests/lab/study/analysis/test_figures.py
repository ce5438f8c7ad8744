"""The figures: settings told apart and alike in all of them, means over seeds, and what was not
recorded.
"""

import numpy as np
import pytest

from helpers import study_of, write_run, write_sweep
from lab.study.analysis.figures import (
    MODES,
    OTHER,
    choose_styles,
    draw,
    draw_file,
    legend_entries,
    mean_curve,
)
from lab.study.analysis.report import render
from lab.study.analysis.tables import text_table


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
    assert draw(study, "energy", legend=False) is None  # of this CPU nothing is known
    (axes,) = draw(study, "frontier_time", legend=False).axes
    assert axes.lines[0].get_xydata().tolist() == [pytest.approx([31.0, 73 + 1 / 9], rel=1e-3)]


def test_energy_is_drawn_where_there_is_a_gpu_or_the_watts_are_given(tmp_path):
    gpu = {"environment": {"gpu": "NVIDIA H200", "platform": "Linux"}}
    write_run(tmp_path / "gpu", "1", extra=gpu)
    write_run(tmp_path / "given", "1", metrics__gpu_tdp_watts=65.0)
    write_run(tmp_path / "cpu", "1")
    for name in ("gpu", "given"):
        study = study_of(tmp_path / name)
        (axes,) = draw(study, "energy", legend=False).axes  # nothing was measured: one panel
        assert axes.get_ylabel() == "estimated, time x TDP (kJ)"
        assert text_table(study)["kJ (estimate)"].tolist() == ["30"]
    study = study_of(tmp_path / "cpu")
    assert draw(study, "energy", legend=False) is draw(study, "frontier_energy", False) is None
    assert not [column for column in text_table(study) if "kJ" in column]
    assert np.isnan(study.table["est_energy_kj_mean"]).all()


def test_the_dense_frontier_is_drawn_as_the_curve_that_settings_are_compared_with(tmp_path):
    for seed, noise in enumerate((-0.1, 0.0, 0.1)):
        for epochs, percent in ((10, 88.0), (20, 89.5), (40, 90.5)):
            config = {"ast__mode": "dense", "training__epochs": epochs, "training__seed": seed}
            write_run(tmp_path, f"{epochs}{seed}", (1.0, percent + noise), float(epochs), **config)
        write_run(tmp_path, f"s{seed}", (1.0, 90.0 + noise), 26.0, training__seed=seed)
    study = study_of(tmp_path)
    (axes,) = draw(study, "frontier_time", legend=False).axes
    curve = next(line.get_xydata() for line in axes.lines if len(line.get_xydata()) > 10)
    at_26 = np.interp(26.0, *curve.T)
    row = study.table.loc["ast epochs=3"]
    assert row["equal_time"] == pytest.approx(90.0 - at_26, abs=0.002)
    assert np.interp(row["time_to_match_dense_seconds"], *curve.T) == pytest.approx(90.0, abs=0.002)


def test_a_target_that_moves_has_no_line_of_its_own(tmp_path):
    for target in (0.5, "auto", "unseen"):
        write_run(tmp_path, str(target), ast__target_activation=target)
    study = study_of(tmp_path)
    (axes,) = draw(study, "activation", legend=False).axes
    level = [line for line in axes.lines if len(set(line.get_ydata())) == 1]
    assert [line.get_ydata()[0] for line in level if line.get_color() == OTHER] == [0.5]


def test_what_lies_below_the_axis_is_said_and_a_dense_line_is_seen_below_a_sparse_one(tmp_path):
    accuracies = (10.0, 70.0, 80.0, 82.0, 84.0, 85.0, 86.0, 87.0, 88.0, 89.0)
    for name, mode in (("a", "ast"), ("d", "dense")):
        write_run(tmp_path, name, accuracies, ast__mode=mode, training__epochs=10)
    study = study_of(tmp_path)
    axes = draw(study, "accuracy", legend=False).axes[0]
    bottom = axes.get_ylim()[0]
    assert bottom > 10
    assert f"the axis begins at {bottom:.0f} %: some epochs lie below it" in axes.get_xlabel()
    widths = {line.get_color(): line.get_linewidth() for line in axes.lines}
    assert widths[MODES["dense"]] > widths[MODES["ast"]]
    loaded = draw(study, "samples", legend=False).axes[0]
    assert loaded.get_ylim()[1] > 100  # what is loaded, at the top, is not cut


def test_a_legend_names_dense_training_only_where_there_is_some(tmp_path):
    write_run(tmp_path, "a")
    study = study_of(tmp_path)
    labels = [label for label, _ in legend_entries(study, choose_styles(study), "frontier_time")]
    assert labels == ["ast"]
