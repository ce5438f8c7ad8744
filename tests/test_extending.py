"""Adding to the lab takes one place each: a measure of significance, a rule of selection, a data
set.
"""

import pytest
import torch

import train_ast
from conftest import make_config
from lab.base.errors import RequestError
from lab.data.datasets import ImageDataset
from train_ast import BatchThreshold, train

TINY = [
    "model.name=test_resnet",
    "dataset.image_size=16",
    "training.batch_size=32",
    "training.epochs=2",
]
TINY += ["dataset.max_train_samples=256", "dataset.max_val_samples=64", "ast.warmup_epochs=1"]


def margin(logits, labels, entropy_weight):
    """The largest other logit less the label's own."""
    own = logits.gather(1, labels[:, None])
    return (logits.scatter(1, labels[:, None], -torch.inf).amax(1, keepdim=True) - own)[
        :, 0
    ].float()


class EveryOther(BatchThreshold):
    """Every second sample of a batch, whatever it scores."""

    def choose(self, scores):
        self.activations.append(0.5)
        self.thresholds.append(0.0)
        return torch.arange(0, len(scores), 2)


class Stripes(ImageDataset):
    """Horizontal or vertical stripes, 64 pictures to train on and 32 to validate."""

    IN_MEMORY = True

    @classmethod
    def splits(cls, config):
        across = ((torch.arange(16) // 2 % 2) * 200).to(torch.uint8).expand(3, 16, 16).contiguous()
        pictures = [across.mT.contiguous(), across]
        return tuple(
            cls([(pictures[i % 2], i % 2) for i in range(n)], ["down", "across"]) for n in (64, 32)
        )


def test_a_measure_is_one_function_and_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(train_ast.MEASURES, "margin", margin)
    seen = []
    monkeypatch.setattr(
        BatchThreshold, "choose", lambda rule, scores: (seen.append(scores), real(rule, scores))[1]
    )
    train(
        make_config(
            *TINY, "ast.measure=margin", "ast.min_threshold=-100", f"logging.output_dir={tmp_path}"
        )
    )
    assert min(scores.min().item() for scores in seen) < 0  # neither loss nor entropy ever is


real = BatchThreshold.choose


def test_a_rule_is_one_class_and_one_line(tmp_path, monkeypatch):
    with pytest.raises(
        RequestError, match="ast.rule: expected 'pi', 'topk' or 'infobatch', got 'every_other'"
    ):
        make_config("ast.rule=every_other")
    monkeypatch.setitem(train_ast.SELECTIONS, ("ast", "batch", "every_other"), EveryOther)
    result, _ = train(make_config(*TINY, "ast.rule=every_other", f"logging.output_dir={tmp_path}"))
    assert result["training_history"]["samples_trained"] == [256, 128]
    assert result["training_history"]["activation_rate"] == [1.0, 0.5]


def test_a_data_set_is_one_class_and_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(train_ast.DATASETS, "stripes", Stripes)
    keys = ["dataset.type=stripes", "dataset.augment=none", "ast.mode=dense", "training.epochs=8"]
    keys += [
        "training.batch_size=4",
        "training.lr=0.02",
    ]  # 128 steps: after 16 the running statistics lag behind
    result, _ = train(make_config(*TINY, *keys, f"logging.output_dir={tmp_path}"))
    assert result["ledger"]["loaded"] == 8 * 64
    assert result["best_accuracy"] > 90
