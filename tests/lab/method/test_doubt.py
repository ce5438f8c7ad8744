"""Which labels are not kept."""

import numpy as np
import pytest
import torch

from lab.machine.distributed import Dist
from lab.method.doubt import HighestScores, class_bars, doubted

NOBODY = np.zeros(4, bool)


def columns(**changed: list) -> dict[str, np.ndarray]:
    """Four samples of the classes 0 and 1, each predicted as the other one four times, with
    confidence 0.9; the labels have the probabilities .5, .5, .7 and .7.
    """
    known = {
        "given": [0, 0, 1, 1],
        "predicted": [1, 1, 0, 0],
        "streak": [4] * 4,
        "confidence": [0.9] * 4,
    }
    known |= {"loss": -np.log([0.5, 0.5, 0.7, 0.7])} | changed
    kinds = {"given": np.int32, "predicted": np.int32, "streak": np.uint8}
    return {name: np.array(values, kinds.get(name, np.float32)) for name, values in known.items()}


@pytest.mark.parametrize(
    ("changed", "out"),
    [
        ({}, [1, 1, 1, 1]),
        ({"streak": [4, 3, 200, 0]}, [1, 0, 1, 0]),
        (
            {"confidence": [0.71, 0.69, 0.51, 0.49]},
            [1, 0, 1, 0],
        ),  # at least as sure as of the class it sees
        ({"loss": -np.log([0.5, 0.5, 0.99, 0.99])}, [0, 0, 1, 1]),
        (
            {"given": [-1, 0, 1, 1], "predicted": [-1, 1, 0, 0], "streak": [0, 4, 4, 4]},
            [0, 1, 1, 1],
        ),  # one never seen
        (
            {"predicted": [2, 1, 0, 0]},
            [0, 1, 1, 1],
        ),  # no sample of the class it sees: nothing to compare with
    ],
)
def test_a_label_is_doubted_for_a_streak_as_sure_as_its_class(changed, out):
    assert doubted(columns(**changed), NOBODY, 0.5).tolist() == [bool(each) for each in out]


def test_towards_the_end_the_streak_alone_decides():
    unsure = columns(confidence=[0.1] * 4, streak=[4, 3, 200, 0])
    assert not doubted(unsure, NOBODY, 0.74).any()
    assert doubted(unsure, NOBODY, 0.75).tolist() == [True, False, True, False]


def test_who_is_doubted_comes_back_with_the_first_right_prediction_and_not_with_a_higher_bar():
    before = np.array([True, True, False, False])
    later = columns(streak=[1, 0, 1, 0], confidence=[0.1] * 4)
    assert doubted(later, before, 0.5).tolist() == [True, False, False, False]


def test_the_bar_of_a_class_is_the_mean_probability_of_its_labels():
    bars = class_bars(columns(loss=-np.log([0.2, 0.6, 0.7, 0.9]), predicted=[3, 1, 0, 0]))
    assert bars.tolist() == pytest.approx([0.4, 0.8, np.inf, np.inf])


def test_a_store_without_visits_doubts_nobody():
    empty = columns(given=[-1] * 4, predicted=[-1] * 4, streak=[0] * 4, loss=[0.0] * 4)
    assert not doubted(empty, NOBODY, 0.5).any()
    assert not doubted(empty, NOBODY, 0.9).any()


CPU = torch.device("cpu")


def test_small_batches_add_up_to_the_share():
    """.2 of 32 is 6.4: 6 or 7 are left out, in 20 batches exactly .2; the last time counts."""
    doubt = HighestScores(0.2, 640, 0, CPU, Dist())
    assert doubt.forgotten() == 0.0
    assert not doubt.left_out().any()
    generator = torch.Generator().manual_seed(0)
    for epoch in range(2):
        doubt.start_epoch(epoch, np.arange(640), 0.0, None)
        expected = np.zeros(640, bool)
        for indices in torch.randperm(640, generator=generator).split(32):
            scores = torch.rand(32, generator=generator)
            kept = doubt.keep(scores)
            left_out = torch.ones(32, dtype=torch.bool).index_fill(0, kept, False)
            assert 32 - len(kept) in (6, 7)
            assert kept.tolist() == sorted(kept.tolist())
            assert scores[left_out].min() > scores[kept].max()
            doubt.note(left_out, indices, slice(None))
            expected[indices[left_out]] = True
        assert doubt.forgotten() == 0.2
        assert (doubt.left_out() == expected).all()


def test_who_was_never_seen_is_not_doubted():
    doubt = HighestScores(0.5, 4, 0, CPU, Dist())
    assert doubt.keep(torch.tensor([np.inf, 1.0, np.inf, 2.0])).tolist() == [0, 2]
    assert doubt.keep(torch.tensor([np.inf, 1.0, np.inf, np.inf])).tolist() == [0, 2, 3]
    assert doubt.keep(torch.full((4,), np.inf)).tolist() == [0, 1, 2, 3]


def test_a_restored_doubt_goes_on_in_its_epoch():
    one = HighestScores(0.5, 4, 0, CPU, Dist())
    two = HighestScores(0.5, 4, 0, CPU, Dist())
    one.start_epoch(3, np.arange(4), 0.0, None)
    one.note(torch.tensor([True, False]), torch.tensor([0, 1]), slice(None))
    two.load_state_dict(one.state_dict())
    two.note(torch.tensor([True, False]), torch.tensor([2, 3]), slice(None))
    assert two.left_out().tolist() == [True, False, True, False]
    assert two.forgotten() == 0.5


def test_the_highest_scores_are_found_without_a_look_at_them():
    """On `meta`, where a tensor has no values, any read of one raises."""
    doubt = HighestScores(0.25, 32, 0, torch.device("meta"), Dist())
    assert doubt.keep(torch.empty(32, device="meta")).shape == (24,)
