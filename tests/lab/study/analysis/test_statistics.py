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
    RESAMPLES,
    DenseTraining,
    Runs,
    at_equal_time,
    difference_half_width,
    half_width,
    time_to_match,
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


DENSE = DenseTraining([runs("20", 20.0, 89.0), runs("40", 40.0, 90.0), runs("60", 60.0, 91.0)])


def test_time_to_match_is_that_of_the_shortest_dense_setting_that_is_not_worse():
    match = time_to_match(runs("own", 20.0, 90.0), DENSE)
    assert (match.ratio, match.low, match.high, match.against) == (0.5, 0.5, 0.5, "40")
    scattered = Runs("own", np.array([19.6, 20.0, 20.4]), 90.0 + NOISE)
    match = time_to_match(scattered, DENSE)
    assert match == time_to_match(scattered, DENSE)  # the draws are the same every time
    low, high = np.quantile(scattered.draws[1:, 0] / 40, [0.025, 0.975])
    assert (match.ratio, match.low, match.high) == (0.5, low, high)
    assert len(scattered.draws) == 1 + RESAMPLES
    student = half_width(0.4, 3) / 40  # the dense time does not scatter: the interval of a mean
    assert (low, high) == (
        pytest.approx(0.5 - student, abs=0.005),
        pytest.approx(0.5 + student, abs=0.005),
    )
    assert time_to_match(DENSE.settings[1], DENSE).ratio == 1


def test_interval_of_the_time_to_match_covers_as_often_as_it_says():
    """Dense training gains 1.2 points by doubling its time; the setting is as accurate as 40 s of
    it, in 27 s.
    """
    dice = np.random.default_rng(0)
    inside = []
    for _ in range(300):
        dense = DenseTraining(
            [
                Runs(
                    str(time),
                    dice.normal(time, time / 200, 3),
                    dice.normal(90 + 1.2 * np.log2(time / 40), 0.15, 3),
                )
                for time in (20.0, 40.0, 60.0)
            ]
        )
        match = time_to_match(Runs("own", dice.normal(27, 0.1, 3), dice.normal(90, 0.15, 3)), dense)
        if not match.bound:
            inside.append(match.low < 27 / 40 < match.high)
    assert len(inside) > 200
    assert np.mean(inside) > 0.95


def test_beyond_the_dense_settings_the_ratio_is_a_bound():
    above = time_to_match(runs("own", 20.0, 93.0), DENSE)
    below = time_to_match(runs("own", 20.0, 88.0), DENSE)
    assert (above.bound, above.ratio, below.bound, below.ratio) == ("<", 20 / 60, ">", 1.0)
    assert np.isnan([above.low, above.high, below.low, below.high]).all()


def test_what_the_seeds_do_not_resolve_is_not_said():
    def bound(own, dense=DENSE):
        return time_to_match(own, dense).bound

    assert bound(runs("own", 20.0, 90.0, NOISE[:1])) == "not resolved"  # one seed
    single = DenseTraining([runs("20", 20.0, 89.0, NOISE[:1])])
    assert bound(runs("own", 20.0, 90.0), single) == "not resolved"
    flat = DenseTraining(
        [runs("10", 10.0, 80.0), runs("20", 20.0, 90.0, 2 * NOISE), runs("40", 40.0, 90.1)]
    )
    assert (
        bound(runs("own", 20.0, 90.35), flat) == "not resolved"
    )  # 20 or 40: the resamples do not agree
    assert (
        bound(runs("own", 20.0, 90.0), DenseTraining([runs("only", 20.0, 90.0)])) == "not resolved"
    )
    assert bound(runs("own", 15.0, 89.5), DENSE) == "not resolved"  # better than 20, worse than 40
    assert (
        time_to_match(runs("own", 20.0, 90.0), DenseTraining([])).bound == ""
    )  # nothing to compare with


def test_a_dense_setting_that_a_shorter_one_beats_is_no_measure():
    bad = DenseTraining([*DENSE.settings, runs("bad", 50.0, 70.0)])
    assert [each.name for each in bad.tested] == ["20", "40", "60"]
    assert at_equal_time(runs("own", 50.0, 91.0), bad)[0] == pytest.approx(0.5)


def test_difference_at_equal_time_carries_the_variances_over():
    gap, half = at_equal_time(runs("own", 30.0, 90.0), DENSE)
    assert gap == pytest.approx(0.5)
    parts = (
        np.array([1.0, 0.25, 0.25]) * 0.01 / 3
    )  # of the setting, and of its two neighbours at half weight
    freedom = parts.sum() ** 2 / (parts**2 / 2).sum()
    assert half == pytest.approx(stats.t.ppf(0.975, freedom) * np.sqrt(parts.sum()))
    gap, half = at_equal_time(
        runs("own", 40.0, 90.5), DENSE
    )  # at a dense setting: Welch's interval
    assert (gap, half) == (pytest.approx(0.5), pytest.approx(difference_half_width(0.1, 3, 0.1, 3)))
    assert np.isnan(at_equal_time(runs("own", 19.0, 90.0), DENSE)).all()
    assert np.isnan(at_equal_time(runs("own", 62.0, 90.0), DENSE)).all()
    assert at_equal_time(runs("own", 60.6, 91.0), DENSE)[0] == pytest.approx(
        0
    )  # a twin's time: 1 % longer
    assert np.isnan(at_equal_time(runs("own", 30.0, 90.0), DenseTraining([]))).all()
    single = DenseTraining([*DENSE.settings, runs("80", 80.0, 92.0, NOISE[1:2])])
    assert at_equal_time(runs("own", 30.0, 90.0), single) == at_equal_time(
        runs("own", 30.0, 90.0), DENSE
    )
    gap, half = at_equal_time(runs("own", 70.0, 92.0), single)
    assert gap == pytest.approx(0.5)
    assert np.isnan(half)


def test_interval_at_equal_time_covers_as_often_as_it_says():
    dice = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        dense = DenseTraining(
            [
                Runs(str(time), np.full(4, time), dice.normal(accuracy, 0.2, 4))
                for time, accuracy in ((20.0, 89.0), (40.0, 92.0))
            ]
        )
        gap, half = at_equal_time(Runs("own", np.full(4, 30.0), dice.normal(90.5, 0.3, 4)), dense)
        inside += abs(gap) < half
    assert inside / 2000 == pytest.approx(0.95, abs=0.015)


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
    assert (
        "It beats dense epochs=40 by 1.39 ± 0.48 points. It beats dense training of every length"
        in verdict(noise)
    )
    cells = text_table(noise).set_index("setting")["time to match"]
    assert cells[ours] == "< 1.05"
    assert (
        cells[ours.replace("50", "25")] == "not resolved"
    )  # 20 and 40 dense epochs are alike there
    assert (
        cells["random target_activation=0.8 anneal_epochs=0 epochs=50"] == "not resolved"
    )  # one dense time is odd
    cells = text_table(clean).set_index("setting")["time to match"]
    assert (
        cells["ast scoring=history rule=infobatch entropy_weight=0 epochs=56"]
        == "0.97 (0.93 to 1.01)"
    )
    ours = "ast scoring=history rule=pi entropy_weight=1 epochs=88"
    assert f"{ours} shows no significant difference to dense epochs=60: " in verdict(clean)
    assert "It beats dense training of the same time by 0.23 ± 0.21 points." in verdict(clean)
