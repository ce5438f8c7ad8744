"""Whose label is suspected: what visits say, copies, the share, and a list by one prediction."""

import math

import numpy as np
import pytest
import torch

from lab.machine.distributed import Dist
from lab.method.sample_store import SampleStore, Visit
from lab.outputs.suspects import Judged
from runs import ranks

CPU = torch.device("cpu")


def visited(store: SampleStore, indices, given, predicted, confidence, likely, fair=True):
    """A visit of each of the samples. likely: the probabilities of their labels."""
    numbers = (torch.tensor(each) for each in (confidence, predicted, given))
    losses = -torch.tensor(likely).log()
    store.record(torch.tensor(indices), Visit(losses, losses, *numbers), 0, fair)


def judged(store: SampleStore, size: int | None = None, out: tuple[int, ...] = ()) -> Judged:
    columns = store.on_host()
    samples = len(columns["visits"])
    return Judged.of_visits(columns, np.isin(np.arange(samples), out), size or samples)


def test_visits_are_added_up_and_the_likelier_class_is_suggested():
    store = SampleStore(5, CPU, labels=True)
    visited(store, [0, 1, 2], [0, 0, 0], [1, 0, 2], [0.9, 0.8, 0.6], [0.05, 0.8, 0.3])
    visited(store, [0, 1, 2], [0, 0, 0], [1, 1, 0], [0.7, 0.6, 0.5], [0.25, 0.4, 0.5])
    found = judged(store, out=(0, 1))
    assert found.indices.tolist() == [0, 1, 2]  # the others were never seen
    assert found.suggested.tolist() == [1, 1, 2]
    assert found.given_likely.tolist() == pytest.approx([0.15, 0.6, 0.4])
    assert found.suggested_likely.tolist() == pytest.approx([0.8, 0.3, 0.3])
    assert found.suspected().tolist() == [0]
    assert found.left_out.tolist() == [True, True, False]


def test_only_visits_count_at_which_the_label_was_not_learned_by_heart():
    store = SampleStore(2, CPU, labels=True)
    visited(store, [0, 1], [0, 0], [1, 1], [0.9, 0.9], [0.1, 0.1])
    for _ in range(9):
        visited(store, [0, 1], [0, 0], [0, 0], [0.99, 0.99], [0.99, 0.99], fair=False)
    assert judged(store).suspected().tolist() == [0, 1]
    visited(store, [1], [0], [0], [0.99], [0.99])
    assert judged(store).suspected().tolist() == [0]


def test_a_visit_without_a_finite_loss_counts_for_nothing():
    store = SampleStore(1, CPU, labels=True)
    visited(store, [0], [0], [1], [0.9], [0.1])
    visited(store, [0], [0], [0], [math.nan], [math.nan])
    found = judged(store)
    assert found.given_likely.tolist() == pytest.approx([0.1])
    assert found.suggested_likely.tolist() == pytest.approx([0.9])


def test_the_rival_is_the_class_most_predicted_and_no_order_hides_a_majority():
    generator = np.random.default_rng(0)
    for _ in range(20):
        predictions = generator.permutation([3] * 6 + [1, 2, 4, 5])
        store = SampleStore(1, CPU, labels=True)
        for each in predictions:
            visited(store, [0], [0], [int(each)], [0.5], [0.2])
        found = judged(store)
        assert found.suggested.tolist() == [3]
        # what it had before it won for good is forgotten
        assert 0.1 - 1e-6 <= found.suggested_likely[0] <= 0.3 + 1e-6


def test_copies_of_a_picture_are_one_row():
    """Picture 1 of 3 has the copies 1, 4 and 7; the third of them alone says otherwise."""
    store = SampleStore(9, CPU, labels=True)
    visited(store, [1, 4, 7], [0, 0, 0], [2, 2, 0], [0.9, 0.6, 0.5], [0.1, 0.3, 0.5])
    visited(store, [0, 5], [1, 1], [1, 1], [0.9, 0.9], [0.9, 0.9])
    found = judged(store, size=3, out=(1, 4, 5))
    assert found.indices.tolist() == [0, 1, 2]
    assert found.given_likely[1] == pytest.approx(0.3)
    assert found.suggested_likely[1] == pytest.approx(0.5)
    assert found.suspected().tolist() == [1]
    assert found.left_out.tolist() == [False, False, True]  # copy 7 is trained on


def test_the_share_is_of_those_suspected_and_its_interval_of_the_undecided_too():
    n = 1000
    given = np.full(n, 0.1)
    other = np.full(n, 0.02)
    other[:100] = 0.5  # wrong for sure
    other[100:130] = 0.15  # rather wrong
    other[130:150] = 0.05  # rather right
    labels = np.zeros(n, dtype=int)
    found = Judged(np.arange(n), labels, labels + 1, given, other, labels > 0)
    share = found.share()
    assert share.estimate == pytest.approx(13)
    assert 8 < share.low < 10
    assert 15 < share.high < 18
    assert str(share).startswith("13.0 % (95 %: 8.3 to 17.")
    assert found.share(error=5.0).low == pytest.approx(share.low - 5)
    assert found.share(error=50.0) == share._replace(low=0.0)  # it may all be its own mistakes
    assert found._replace(given=labels[:0]).share() is None


def test_one_prediction_suggests_the_likeliest_other_class():
    logits = np.log([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]).astype(np.float32)
    found = Judged.of_logits(logits, np.array([0, 1, 0]), np.array([7, 8, 9]))
    assert found.suggested.tolist() == [1, 0, 2]
    assert found.given_likely.tolist() == pytest.approx([0.7, 0.2, 0.1])
    assert found.suggested_likely.tolist() == pytest.approx([0.2, 0.7, 0.6])
    assert found.indices[found.suspected()].tolist() == [8, 9]


def test_processes_judge_together(tmp_path):
    def work(rank):
        store = SampleStore(5, CPU, Dist.join(CPU), labels=True)
        part = [[0, 3], [1, 4]][rank]
        visited(store, part, [0, 0], [1, 2], [0.9, 0.8], [0.1, 0.2])
        store.merge()
        visited(store, part, [0, 0], [0, 0], [0.9, 0.9], [0.9, 0.9], fair=False)
        return judged(store)

    one, two = ranks(2, work, tmp_path).results()
    assert all(map(np.array_equal, one, two))
    assert one.indices.tolist() == [0, 1, 3, 4]
    assert one.suggested.tolist() == [1, 1, 2, 2]
    assert one.given_likely.tolist() == pytest.approx([0.1, 0.1, 0.2, 0.2])
