"""The figures of an evaluation, on logits whose figures are known."""

import numpy as np
import pytest
import torch

from conftest import BatchNormNet, make_batch, make_run
from lab.base.errors import RequestError, TrainingFailed
from lab.data.loading import DeviceBatch
from lab.outputs.evaluation import Predictions, measure, require_finite
from train_ast import validate

NAMES = [str(number) for number in range(8)]


def figures(logits, labels):
    found = Predictions(np.array(logits, dtype=np.float32), np.array(labels))
    return measure(found, NAMES[: found.logits.shape[1]])


def test_equal_logits_rank_in_the_order_of_their_classes():
    """The first is the prediction, and only the first five are among the first five."""
    found = figures(np.zeros((8, 8)), range(8))
    assert found["accuracy"] == 100 / 8
    assert found["top5_accuracy"] == 500 / 8


def test_ranks_are_those_of_logits_where_probabilities_are_equal():
    """A sure network: the probabilities of all other classes are 0 in float32."""
    logits = np.array([[900, 1, 2, 3, 4, 5, 6, 7]])
    assert figures(logits, [1])["top5_accuracy"] == 0
    assert figures(logits, [4])["top5_accuracy"] == 100


def test_confusion_and_classes_by_hand():
    logits = np.eye(3)[[0, 1, 1, 0]]
    found = figures(logits, [0, 1, 0, 0])
    assert found["confusion"] == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert found["classes"]["samples"] == [3, 1, 0]
    assert found["classes"]["accuracy"] == [200 / 3, 100, None]
    assert found["top5_accuracy"] == 100  # of three classes each is among the first five


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_are_no_prediction(value):
    logits = np.zeros((5, 3), dtype=np.float32)
    require_finite(logits)
    logits[1, 2] = value
    with pytest.raises(RequestError, match="of 1 of 5 pictures the logits are not finite"):
        require_finite(logits)


def batches(*sizes):
    """As the loader of a validation set yields them."""
    for size in sizes:
        images, labels = make_batch(max(1, size))
        yield DeviceBatch(images[:size], labels[:size], torch.arange(size))


class Batches(list):
    """A loader of batches that are there."""

    def __iter__(self):
        return ((*batch.tensors(), []) for batch in list.__iter__(self))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("weight", float("nan")),
        ("weight", float("inf")),
        ("running_mean", float("nan")),
        ("running_mean", -float("inf")),
        ("running_var", float("nan")),
        ("running_var", -1.0),
    ],
)
def test_a_validation_asks_whether_logits_are_finite(where, value):
    """A run whose weights or statistics are not: once it was 10 % right, and exported."""
    run = make_run(BatchNormNet())
    assert validate(run, Batches(batches(16, 0, 5))) is not None
    assert sum(run.metrics.by_class[1]) == 21
    getattr(run.network.model.body[1], where).data[0] = value
    with pytest.raises(TrainingFailed, match=r"the logits of \d+ of 21 pictures are not finite"):
        validate(run, Batches(batches(16, 0, 5)))


def test_a_validation_without_a_picture_is_no_accuracy():
    run = make_run(BatchNormNet())
    with pytest.raises(RequestError, match="no picture of the validation set can be read"):
        validate(run, Batches(batches(0, 0)))
