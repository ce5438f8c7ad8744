"""The figures of an evaluation, on logits whose figures are known."""

import matplotlib.figure
import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from conftest import BatchNormNet, make_batch, make_run
from lab.base.errors import RequestError, TrainingFailed
from lab.data.loading import DeviceBatch
from lab.outputs.evaluation import Predictions, draw, measure, require_finite, table, wilson
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
    assert found["classes"]["precision"] == [100, 50, None]
    assert found["classes"]["f1"][:2] == pytest.approx([80, 200 / 3])
    assert found["macro_accuracy"] == pytest.approx(250 / 3)  # of the two that have samples
    assert found["macro_precision"] == 75
    assert found["macro_f1"] == pytest.approx((80 + 200 / 3) / 2)
    assert found["loss"] == pytest.approx(np.log(1 + 2 / np.e) + 0.25, abs=1e-6)


def test_five_classes_have_no_top_five():
    for classes in (3, 5):
        found = figures(np.eye(classes), range(classes))
        assert found["top5_accuracy"] is found["top5_accuracy_interval"] is None
        assert "top-5" not in table(found)
    assert "top-5 accuracy     100.00 %" in table(figures(np.eye(6), range(6)))


def test_intervals_are_wilsons():
    """As statsmodels' proportion_confint gives them, and at the ends."""
    assert wilson(8, 10) == pytest.approx([49.0162, 94.3318], abs=1e-3)
    assert wilson(0, 5) == pytest.approx([0, 43.4482], abs=1e-3)
    assert wilson(5, 5) == pytest.approx([56.5518, 100], abs=1e-3)
    for right, samples in ((8, 10), (0, 5), (5, 5), (1, 1), (399, 1000)):
        theirs = binomtest(right, samples).proportion_ci(method="wilson")
        assert wilson(right, samples) == pytest.approx([100 * each for each in theirs], abs=1e-4)


@pytest.mark.parametrize(("classes", "counted"), [(3, True), (20, True), (21, False), (41, False)])
def test_a_picture_counts_in_its_cells_up_to_twenty_classes(classes, counted, monkeypatch):
    found = measure(
        Predictions(np.eye(classes, dtype=np.float32), np.arange(classes)),
        [f"class {i}" for i in range(classes)],
    )
    texts = []
    saved = matplotlib.figure.Figure.savefig

    def spy(figure, *args, **options):
        texts.extend([text.get_text() for text in axes.texts] for axes in figure.axes)
        return saved(figure, *args, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", spy)
    assert draw(found).startswith(b"\x89PNG")
    cells, _, bars, _ = texts
    assert len(cells) == (classes**2 if counted else 0)
    assert sum(text == "1" for text in cells) == (classes if counted else 0)
    assert bars == [str(classes)]  # all in one bin


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
