"""Adding to the lab takes one place each: one function or class, and one line of a table."""

import numpy as np
import pytest
import torch

import train_ast
from conftest import make_config
from lab.base.errors import RequestError
from lab.data.datasets import ImageDataset
from lab.method.doubt import LabelDoubt
from train_ast import DOUBTS, RULES, SCORINGS, TARGETS, Choice, Rule, Scores, Target, train

TINY = ["model.name=small_conv", "dataset.image_size=8", "training.batch_size=32"]
TINY += ["training.epochs=2", "dataset.max_train_samples=256", "dataset.max_val_samples=64"]
TINY += ["ast.warmup_epochs=1"]


def margin(logits, labels, entropy_weight):
    """The largest other logit less the label's own."""
    own = logits.gather(1, labels[:, None])
    return (logits.scatter(1, labels[:, None], -torch.inf).amax(1, keepdim=True) - own)[
        :, 0
    ].float()


class ByIndex(Scores):
    """A later sample is worth more; known before anything is loaded."""

    def of_epoch(self, order):
        return torch.from_numpy(order.astype(np.float32))


class EveryOther(Rule):
    """Every second sample of a pool, whatever it scores."""

    def choose(self, pool, target):
        return Choice(torch.arange(0, len(pool.scores), 2), 0.0)


class Falling(Target):
    """Nine tenths, and two tenths less after every epoch."""

    def __init__(self, value):
        super().__init__(0.9)

    def end_epoch(self, evidence, cost):
        self.value -= 0.2


class LowestQuarter(LabelDoubt):
    """Leaves out the quarter of a pool with the lowest scores."""

    def keep(self, scores):
        count = len(scores) // 4
        return scores.sort(descending=True).indices[: len(scores) - count].sort().values


class Stripes(ImageDataset):
    """Horizontal or vertical stripes, 64 pictures to train on and 32 to validate."""

    IN_MEMORY = True

    @classmethod
    def splits(cls, config):
        across = ((torch.arange(16) // 2 % 2) * 200).to(torch.uint8)
        across = across.expand(3, 16, 16).contiguous()
        pictures = [across.mT.contiguous(), across]

        def split(n):
            return cls([(pictures[i % 2], i % 2) for i in range(n)], ["down", "across"])

        return split(64), split(32)


def history_of(tmp_path, *overrides):
    result, _ = train(make_config(*TINY, *overrides, f"logging.output_dir={tmp_path}"))
    return result["training_history"]


def test_a_measure_is_one_function_and_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(train_ast.MEASURES, "margin", margin)
    keys = ["ast.measure=margin", "ast.min_threshold=-100", "ast.initial_threshold=-100"]
    history = history_of(tmp_path, *keys, "ast.kp=0", "ast.ki=0")
    assert history["activation_rate"][1] == 1.0  # no margin is below -100
    keys[2] = "ast.initial_threshold=0"
    history = history_of(tmp_path, *keys, "ast.kp=0", "ast.ki=0")
    # over 0 are the wrongly predicted ones; neither loss nor entropy is ever below it
    assert history["activation_rate"][1] == pytest.approx(1 - history["train_acc"][1] / 100)


@pytest.mark.parametrize("rule", ["pi", "topk", "infobatch"])
@pytest.mark.parametrize("doubt", ["0", "0.2"])
def test_a_scoring_is_one_class_and_one_line(rule, doubt, tmp_path, monkeypatch):
    monkeypatch.setitem(SCORINGS, "by_index", ByIndex)
    keys = ["ast.scoring=by_index", f"ast.rule={rule}", f"ast.forget_rate={doubt}"]
    if rule == "infobatch":
        keys += ["ast.entropy_weight=0", "training.epochs=3"]
    history = history_of(tmp_path, *keys)
    active = {"pi": 0.25, "topk": 0.25, "infobatch": 0.75 - 0.75 * float(doubt)}[rule]
    assert history["activation_rate"][1] == pytest.approx(active, abs=0.06)
    assert history["samples_scored"] == [0] * len(history["epoch"])
    assert history["samples_loaded"][1] < 256
    forgotten = None if doubt == "0" else pytest.approx(0.2, abs=0.005)
    assert history["forgotten"][1] == forgotten


@pytest.mark.parametrize("scoring", ["batch", "proxy", "history"])
@pytest.mark.parametrize("doubt", ["0", "0.25"])
def test_a_rule_is_one_class_and_one_line(scoring, doubt, tmp_path, monkeypatch):
    with pytest.raises(RequestError, match="expected 'pi', 'topk' or 'infobatch', got 'every_oth"):
        make_config("ast.rule=every_other")
    monkeypatch.setitem(RULES, "every_other", EveryOther)
    keys = ["ast.rule=every_other", f"ast.scoring={scoring}", f"ast.forget_rate={doubt}"]
    keys += ["ast.explore=0"] if scoring == "history" else []
    history = history_of(tmp_path, *keys)
    assert history["activation_rate"] == [1.0, (1 - float(doubt)) / 2]
    assert history["samples_trained"] == [256, 128 if doubt == "0" else 96]


@pytest.mark.parametrize(
    ("scoring", "rule"), [("batch", "pi"), ("proxy", "topk"), ("history", "pi")]
)
def test_a_target_is_one_class_and_one_line(scoring, rule, tmp_path, monkeypatch):
    monkeypatch.setitem(TARGETS, "falling", Falling)
    keys = ["ast.target_activation=falling", "training.epochs=4", "ast.kp=1", "ast.ki=0.05"]
    keys = keys if rule == "pi" else keys[:2]
    history = history_of(tmp_path, *keys, f"ast.scoring={scoring}", f"ast.rule={rule}")
    assert history["target"] == [None, *(pytest.approx(t) for t in (0.7, 0.5, 0.3))]
    assert history["activation_rate"][1:] == pytest.approx([0.7, 0.5, 0.3], abs=0.1)


@pytest.mark.parametrize(
    ("scoring", "rule"),
    [("batch", "topk"), ("proxy", "pi"), ("history", "pi"), ("history", "infobatch")],
)
def test_a_doubt_is_one_class_and_one_line(scoring, rule, tmp_path, monkeypatch):
    monkeypatch.setitem(DOUBTS, "lowest", LowestQuarter)
    keys = ["ast.forget_rate=lowest", f"ast.scoring={scoring}", f"ast.rule={rule}"]
    keys += ["ast.explore=0"] if (scoring, rule) in (("history", "pi"), ("history", "topk")) else []
    keys += ["ast.entropy_weight=0", "training.epochs=3"] if rule == "infobatch" else []
    if rule == "infobatch":
        assert history_of(tmp_path, *keys)["activation_rate"][1] <= 0.75
        return
    history = history_of(tmp_path, *keys, "ast.target_activation=1")
    assert history["activation_rate"] == [1.0, 0.75]  # all of those that are left


def test_a_data_set_is_one_class_and_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(train_ast.DATASETS, "stripes", Stripes)
    keys = ["dataset.type=stripes", "dataset.image_size=16", "model.name=test_resnet"]
    keys += ["dataset.augment=none", "ast.mode=dense", "training.epochs=8"]
    # 128 steps: after 16 the running statistics lag behind
    keys += ["training.batch_size=4", "training.lr=0.02"]
    result, _ = train(make_config(*TINY, *keys, f"logging.output_dir={tmp_path}"))
    assert result["ledger"]["loaded"] == 8 * 64
    assert result["best_accuracy"] > 90
