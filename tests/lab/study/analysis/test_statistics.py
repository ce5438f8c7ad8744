"""Intervals, the time to match and the difference at equal time."""

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from conftest import REPO
from helpers import studies_of, study_of, write_run
from lab.study.analysis.statistics import (
    DenseTraining,
    Runs,
    at_equal_time,
    difference_half_width,
    half_width,
    time_to_match,
    wide_gap,
)
from lab.study.analysis.tables import text_table, verdict


@given(st.lists(st.floats(0, 100), min_size=2, max_size=9))
def test_interval_is_students(values):
    low, high = stats.t.interval(
        0.95, len(values) - 1, np.mean(values), max(stats.sem(values), 1e-300)
    )
    assert half_width(np.std(values, ddof=1), len(values)) == pytest.approx(
        (high - low) / 2, abs=1e-9
    )


def test_interval_covers_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(3, 2, (20000, 3))
    half = half_width(draws.std(axis=1, ddof=1), 3)
    assert np.mean(np.abs(draws.mean(axis=1) - 3) < half) == pytest.approx(0.95, abs=0.005)
    assert (
        NormalDist().inv_cdf(0.975) < half_width(1.0, 10**6) * 1000 + 1e-3
    )  # and ends at the normal's
    assert np.isnan(half_width(0.0, 1))


@pytest.mark.filterwarnings("ignore:Precision loss")  # scipy's, for equal values
@given(
    st.lists(st.integers(0, 100), min_size=2, max_size=6),
    st.lists(st.integers(0, 100), min_size=2, max_size=6),
)
def test_interval_of_a_difference_is_welchs(left, right):
    half = difference_half_width(np.std(left, ddof=1), len(left), np.std(right, ddof=1), len(right))
    if np.ptp(left) + np.ptp(right) == 0:
        assert half == 0
    else:
        interval = stats.ttest_ind(left, right, equal_var=False).confidence_interval(0.95)
        assert half == pytest.approx((interval.high - interval.low) / 2)


# ------------------------------------------------------------------------------- Against dense runs

NOISE = np.array([-0.1, 0.0, 0.1])


def runs(name, seconds, accuracy, noise=NOISE):
    return Runs(name, seconds + np.zeros(len(noise)), accuracy + noise)


# equal steps over the logarithm of time: the frontier is a straight line there
DENSE = DenseTraining([runs("20", 20.0, 89.0), runs("40", 40.0, 90.0), runs("80", 80.0, 91.0)])


@pytest.mark.parametrize(("seconds", "percent"), [(20.0, 90.0), (20.0, 89.5), (35.0, 90.7)])
def test_time_to_match_is_the_dense_time_of_the_same_accuracy_between_lengths_too(seconds, percent):
    match = time_to_match(runs("own", seconds, percent), DENSE)
    dense = 40 * 2 ** (percent - 90)
    assert match.dense_seconds == pytest.approx(dense, rel=0.005)
    assert match.ratio == pytest.approx(seconds / dense, rel=0.005)
    assert match.low < match.ratio < match.high


def test_a_setting_that_saves_time_is_one_that_is_better_at_equal_time():
    """One frontier for both figures: the interval ends at 1 where the difference is level with its
    own.
    """
    gap, half = at_equal_time(runs("own", 30.0, 90.0), DENSE)
    level = 90.0 - gap + half
    for more, saves in ((0.002, True), (-0.002, False)):
        own = runs("own", 30.0, level + more)
        gap, half = at_equal_time(own, DENSE)
        assert (gap > half) is saves
        assert (time_to_match(own, DENSE).high < 1) is saves


def test_scatter_of_times_widens_the_intervals():
    steady = runs("own", 30.0, 90.0)
    noisy = Runs("own", 30.0 * np.exp([0.05, -0.05, 0.0]), steady.accuracy)
    along = Runs("own", 30.0 * np.exp([-0.05, 0.0, 0.05]), steady.accuracy)  # later and better
    halves = [at_equal_time(own, DENSE)[1] for own in (noisy, steady, along)]
    assert halves == sorted(halves, reverse=True)
    widths = [np.log(m.high / m.low) for m in (time_to_match(o, DENSE) for o in (noisy, steady))]
    assert widths[0] > widths[1]


def test_beyond_the_dense_settings_the_ratio_is_a_bound():
    above = time_to_match(runs("own", 20.0, 93.0), DENSE)
    below = time_to_match(runs("own", 20.0, 88.0), DENSE)
    assert (above.bound, below.bound) == ("<", ">")
    assert (above.ratio, below.ratio) == (pytest.approx(20 / 80), pytest.approx(1.0))
    assert np.isnan([above.low, above.high, below.low, below.high]).all()
    at_the_end = time_to_match(runs("own", 40.0, 91.0), DENSE)
    assert (at_the_end.bound, at_the_end.low_cut, at_the_end.high_cut) == ("", True, False)
    assert at_the_end.low == pytest.approx(0.5)
    assert at_the_end.ratio == pytest.approx(0.5, rel=0.01)


def test_what_the_seeds_do_not_resolve_is_not_said():
    def bound(own, dense=DENSE):
        return time_to_match(own, dense).bound

    assert bound(runs("own", 20.0, 90.0, NOISE[:1])) == "not resolved"  # one seed
    single = DenseTraining([runs("20", 20.0, 89.0, NOISE[:1])])
    assert bound(runs("own", 20.0, 90.0), single) == "not resolved"
    flat = DenseTraining(
        [runs("10", 10.0, 80.0), runs("20", 20.0, 90.0, 2 * NOISE), runs("40", 40.0, 90.1)]
    )
    assert bound(runs("own", 20.0, 90.1), flat) == "not resolved"  # 20 or 40: they are alike
    assert bound(runs("own", 20.0, 90.0, 20 * NOISE)) == "not resolved"  # seeds far apart
    only = DenseTraining([runs("only", 20.0, 90.0)])
    assert bound(runs("own", 20.0, 90.0), only) == "not resolved"
    assert bound(runs("own", 20.0, 90.0), DenseTraining([])) == ""  # nothing to compare with


def test_a_dense_setting_that_a_shorter_one_beats_is_no_measure():
    bad = DenseTraining([*DENSE.settings, runs("bad", 50.0, 70.0)])
    assert [each.name for each in bad.tested.points] == ["20", "40", "80"]
    assert at_equal_time(runs("own", 50.0, 91.0), bad) == at_equal_time(
        runs("own", 50.0, 91.0), DENSE
    )
    # dense training that may stop early is as good later as it was
    longer = DenseTraining([*DENSE.settings, runs("worse", 160.0, 85.0)])
    gap, half = at_equal_time(runs("own", 120.0, 91.0), longer)
    assert abs(gap) < 0.1
    assert half > 0
    assert np.isnan(at_equal_time(runs("own", 120.0, 91.0), DENSE)).all()
    twice = DenseTraining([*DENSE.settings, runs("40 again", 41.0, 90.05)])  # one length
    assert [each.name for each in twice.tested.points] == ["20", "40 again", "80"]


def test_at_a_single_dense_setting_the_difference_has_welchs_interval():
    """As a dense twin's: its time is that of its sparse run."""
    only = DenseTraining([runs("only", 40.0, 90.0, 2 * NOISE)])
    gap, half = at_equal_time(runs("own", 40.2, 90.5), only)
    assert gap == pytest.approx(0.5)
    assert half == pytest.approx(difference_half_width(0.1, 3, 0.2, 3))
    assert np.isnan(at_equal_time(runs("own", 41.0, 90.5), only)).all()
    assert np.isnan(at_equal_time(runs("own", 40.0, 90.5), DenseTraining([]))).all()


def test_dense_settings_of_one_seed_are_used_where_the_others_do_not_reach():
    more = DenseTraining([*DENSE.settings, runs("160", 160.0, 92.0, NOISE[1:2])])
    inside, beyond = runs("own", 30.0, 90.0), runs("own", 120.0, 92.0)
    assert at_equal_time(inside, more) == at_equal_time(inside, DENSE)
    gap, half = at_equal_time(beyond, more)
    assert gap == pytest.approx(92 - 90 - np.log2(3), abs=0.02)
    assert np.isnan(half)


def test_from_three_dense_lengths_on_each_scatter_is_drawn_to_the_mean_of_all():
    loud = [runs("20", 20.0, 89.0), runs("40", 40.0, 90.0, 4 * NOISE), runs("80", 80.0, 91.0)]
    variances, freedoms = DenseTraining(loud).tested.scatter
    # of a run .01, .16 and .01, their mean .06; two degrees of freedom each, and two more
    assert variances * 3 == pytest.approx([0.035, 0.11, 0.035])
    assert freedoms.tolist() == [4, 4, 4]
    variances, freedoms = DenseTraining(loud[:2]).tested.scatter
    assert variances * 3 == pytest.approx([0.01, 0.16])
    assert freedoms.tolist() == [2, 2]


def test_the_best_of_several_needs_a_wider_interval():
    own = runs("own", 30.0, 90.0)
    halves = [at_equal_time(own, DENSE, count)[1] for count in (1, 4, 8)]
    assert halves == sorted(halves)
    widths = [np.log(m.high / m.low) for m in (time_to_match(own, DENSE, k) for k in (1, 2))]
    assert widths[0] < widths[1]
    four = difference_half_width(0.2, 5, 0.1, 3, 4)
    freedom = (0.04 / 5 + 0.01 / 3) ** 2 / ((0.04 / 5) ** 2 / 4 + (0.01 / 3) ** 2 / 2)
    assert four == pytest.approx(stats.t.ppf(1 - 0.025 / 4, freedom) * np.sqrt(0.04 / 5 + 0.01 / 3))


def test_lengths_a_factor_two_apart_are_a_wide_gap():
    assert [each.name for each in wide_gap(30.0, DENSE)] == ["20", "40"]
    assert wide_gap(40.2, DENSE) is None  # at a length
    assert wide_gap(10.0, DENSE) is None
    near = DenseTraining([runs("20", 20.0, 89.0), runs("30", 30.0, 89.6), runs("45", 45.0, 90.2)])
    assert wide_gap(25.0, near) is None


def test_flat_frontiers_in_the_table_and_the_verdict(tmp_path):
    """Real files: the dense runs of 20 and 40 epochs are alike, and ours lies between them."""
    for seed, noise in enumerate(NOISE):
        for epochs, seconds, accuracy in (
            (10, 10.0, 80.0),
            (20, 20.0, 90 + 2 * noise),
            (40, 40.0, 90.1 + noise),
        ):
            write_run(
                tmp_path,
                f"d{epochs}{seed}",
                (1.0, accuracy),
                seconds,
                ast__mode="dense",
                training__epochs=epochs,
                training__seed=seed,
            )
        write_run(tmp_path, f"s{seed}", (1.0, 90.35 + noise), 20.0, training__seed=seed)
    study = study_of(tmp_path)
    row = text_table(study).set_index("setting").loc["ast epochs=3"]
    assert row["time to match"] == "not resolved"
    assert "Whether it saves training time is not resolved" in verdict(study)
    assert (row["difference"], row["at equal time"][:5]) == ("+0.25 ± 0.23", "+0.35")


def test_the_published_study():
    folder = REPO / "results/published/cifar10_study_h100"
    studies = studies_of(*(folder / name for name in ("clean", "noise", "redundant", "twin")))
    assert list(studies) == [
        "hf:.gpu/cifar10, resnet18",
        "hf:.gpu/cifar10, resnet18, label_noise=0.2",
        "hf:.gpu/cifar10, resnet18, max_train_samples=12500 repeat=4",
    ]
    clean, noise, redundant = studies.values()
    assert [study.baseline for study in studies.values()] == [
        "dense epochs=60",
        "dense epochs=40",
        "dense epochs=40",
    ]
    assert (
        clean.table["n"].sum() == 22
    )  # the pair of twin/ is clean data; its sparse run is there again, newer
    assert "dense twin" in clean.table.index
    assert (noise.table["n"].sum(), redundant.table["n"].sum()) == (23, 12)
    alone = study_of(folder / "noise")
    assert text_table(alone).equals(text_table(noise))  # a group says the same alone
    ours = "ast target_activation=0.8 explore=0.05 anneal_epochs=0 epochs=50"
    assert noise.table.index[0] == ours
    assert f"{ours} has the highest final accuracy: 87.50 ± 0.55 % (3 seeds)." in verdict(noise)
    # best of six; and a dense run of 20 epochs had slow steps
    assert "It beats dense epochs=40 by 1.39 ± 0.84 points. It is not compared" in verdict(noise)
    row = text_table(noise).set_index("setting").loc[ours]
    assert (row["at equal time"], row["time to match"]) == ("void", "void: 7.095 and 8.087 ms")
    assert row["difference"] == "+1.39 ± 0.48"
    ours = "ast scoring=history rule=pi entropy_weight=1 epochs=88"
    assert f"{ours} shows no significant difference to dense epochs=60: " in verdict(clean)
    assert "It shows no significant difference to dense training of the same time:" in verdict(
        clean
    )
    assert any("a factor 2.0 apart" in text and "28 epochs" in text for text in clean.warnings)
