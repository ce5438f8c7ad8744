"""Early learning beside mixed pictures, and `training.noisy_labels`, which goes as far as labels
look wrong.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from conftest import BatchNormNet, LayerNormNet, loaded, make_batch, make_config, trained_on
from lab.base.errors import RequestError
from lab.data.mixing import Mixing
from lab.machine.distributed import Dist
from lab.method.losses import AsFarAsWrong
from train_ast import Run, load_config, train, train_one_epoch

CPU = torch.device("cpu")
MIXED = ("ast.mode=dense", "training.loss=early_learning", "training.weight_average=0.5")
DIGITS = ("model.name=small_conv", "training.batch_size=32", "training.optimizer=adamw")
DIGITS += ("training.lr=0.003", "training.epochs=8", "training.label_smoothing=0.1")
DIGITS += ("dataset.max_train_samples=600", "dataset.max_val_samples=100")


def built(model: torch.nn.Module, *overrides: str) -> Run:
    config = make_config(*overrides)
    return Run.build(config, model, CPU, planned_steps=100, samples=16, classes=10)


@pytest.mark.parametrize("net", [LayerNormNet, BatchNormNet])
@pytest.mark.parametrize(
    ("setting", "mix"),
    [("mixup=0.4", v2.MixUp(alpha=0.4, num_classes=10)), ("cutmix=1", v2.CutMix(num_classes=10))],
)
def test_targets_take_in_unmixed_pictures_and_are_mixed_as_these_are(
    setting, mix, net, monkeypatch
):
    """The gradient is autograd's of cross-entropy + 3 log(1 - <mixed targets, p of the mixture>).
    What the averaged weights predict of each picture by itself is in its target.
    """
    torch.manual_seed(0)
    model = net()
    run = built(model, *MIXED, f"training.{setting}")
    loss = run.network.loss
    before = torch.rand(16, 10).softmax(-1)
    loss.targets.copy_(before)
    with torch.no_grad():  # the average is another network than the one that is trained
        for parameter in run.network.exported.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    reference = copy.deepcopy(model)
    average = copy.deepcopy(run.network.exported).eval()
    images, labels = make_batch()
    at = int((labels != labels.roll(1)).nonzero()[0])

    def mixed_by(seed):
        torch.manual_seed(seed)
        torch.multinomial(torch.ones(1), 1)  # which of the two
        mixed, shares = mix(images.float(), labels)
        return mixed, shares, shares[at, labels[at]]

    # what a seed draws depends on torch's version
    seed = next(seed for seed in range(20) if 0.2 < mixed_by(seed)[2] < 0.8)
    monkeypatch.setattr("lab.data.mixing.as_seed", lambda number: seed)
    trained_on(run, images, labels)

    normalise = run.network.normalise
    seen = average(normalise(images)).softmax(-1).detach()
    targets = 0.7 * before + 0.3 * seen
    torch.testing.assert_close(loss.targets, targets, atol=1e-3, rtol=0)
    mixed, shares, share = mixed_by(seed)
    held = share * targets + (1 - share) * targets.roll(1, 0)
    logits = reference(normalise(mixed))
    regular = torch.log1p(-(held * logits.softmax(-1)).sum(-1))
    (F.cross_entropy(logits, shares, reduction="none") + 3 * regular).mean().backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-3)
    assert run.metrics.ledger.seen == 16
    assert run.metrics.meter.predicted == 16  # unmixed
    run.metrics.ledger.trained = 16
    assert run.metrics.ledger.dense_equivalents() == pytest.approx(16 * (1 + 1 / 3))


def test_a_list_of_suspects_is_made_of_unmixed_pictures():
    """A mixture has no one label, so that its step says nothing of it."""
    run = built(LayerNormNet(), "ast.mode=dense", "training.mixup=1", "training.list_suspects=true")
    run.start_epoch(0, np.arange(16))
    images, labels = make_batch()
    logits = run.network.predictor()(images)
    trained_on(run, images, labels)
    columns = run.selection.store.columns
    assert columns["visits"].tolist() == [1] * 16
    assert torch.equal(columns["given"].long(), labels)
    assert torch.equal(columns["predicted"].long(), logits.argmax(-1))
    assert torch.equal(columns["last_epoch"], torch.zeros(16, dtype=torch.int16))


def test_a_step_is_mixed_with_the_chance_that_is_asked_for():
    training = make_config("training.mixup=1").training
    mixing, other = (Mixing(training, 10, Dist(rank, 2)) for rank in (0, 1))
    taken = [mixing.takes(0.3, 2, step) for step in range(200)]
    assert 45 < sum(taken) < 75
    assert taken == [other.takes(0.3, 2, step) for step in range(200)]
    assert taken != [mixing.takes(0.3, 3, step) for step in range(200)]
    assert mixing.takes(1.0, 0, 0)
    assert not mixing.takes(0.0, 0, 0)


def adaptive(samples: int = 200, smoothing: float = 0.1) -> AsFarAsWrong:
    config = make_config("training.noisy_labels=true", f"training.label_smoothing={smoothing}")
    loss = AsFarAsWrong(config.training, samples, 3, CPU, Dist())
    loss.know_labels(np.arange(samples) % 3)
    return loss


@pytest.mark.parametrize(
    ("wrong", "remedy"), [(0, 0.0), (1, 1 / 3), (2, 1.0), (20, 1.0), (100, 1.0)]
)
def test_the_remedy_follows_the_labels_that_the_surest_predictions_contradict(wrong, remedy):
    """Of 1,000 samples the surest 100; the others are contradicted all the time."""
    loss = adaptive(1000)
    labels = torch.arange(1000) % 3
    seen_as = (labels + 1) % 3
    seen_as[wrong:100] = labels[wrong:100]
    loss.targets.copy_(0.4 * F.one_hot(seen_as, 3))
    loss.targets[:100] *= 2
    loss.start_epoch(0.19)
    assert (loss.remedy, loss.contradicted) == (0.0, None)
    loss.start_epoch(0.2)  # then it comes in over a tenth of the schedule
    assert (loss.remedy, loss.contradicted) == (0.0, wrong / 100)
    loss.start_epoch(0.22)
    assert loss.remedy == pytest.approx(min(remedy, 0.2))
    loss.start_epoch(0.3)
    assert loss.contradicted == wrong / 100
    assert loss.remedy == pytest.approx(remedy)
    assert loss.strength.item() == pytest.approx(remedy)
    again = adaptive(1000)
    again.load_state_dict(loss.state_dict())
    assert again.strength == loss.strength
    loss.know_labels(seen_as.numpy())  # as if all were right
    loss.start_epoch(0.49)
    assert loss.remedy == 0
    loss.load_state_dict(again.state_dict())
    loss.start_epoch(0.5)  # from half of the schedule on it is kept
    assert loss.remedy == again.remedy


def test_samples_that_were_never_seen_and_have_no_label_are_not_asked():
    loss = adaptive(20)
    loss.start_epoch(0.3)
    assert (loss.contradicted, loss.remedy) == (0.0, 0.0)
    labels = np.arange(20) % 3
    labels[0] = -1
    loss.know_labels(labels)
    loss.targets[0] = torch.tensor([0.9, 0.0, 0.0])
    loss.targets[4] = torch.tensor([0.0, 0.8, 0.0])
    loss.start_epoch(0.3)
    assert loss.contradicted == 0.0
    loss.targets[4] = torch.tensor([0.0, 0.0, 0.8])
    loss.start_epoch(0.3)
    assert loss.contradicted == 1.0


@pytest.mark.parametrize("mixed", [False, True])
def test_between_cross_entropy_and_early_learning(mixed):
    """Smoothed cross-entropy where nothing is wrong, early learning without smoothing at last."""
    loss = adaptive()
    logits = torch.randn(6, 3)
    labels = torch.arange(6) % 3
    given = 0.8 * F.one_hot(labels, 3) + 0.2 * F.one_hot(labels.roll(1), 3) if mixed else labels
    rows = torch.rand(6, 3).softmax(-1)
    held = rows if mixed else 0.7 * rows + 0.3 * logits.softmax(-1)
    regular = torch.log1p(-(held * logits.softmax(-1)).sum(-1))
    for remedy in (0.0, 0.25, 1.0):
        loss.apply(remedy)
        losses, _ = loss(logits, given, rows)
        expected = 3 * remedy * regular + F.cross_entropy(
            logits, given, reduction="none", label_smoothing=0.1 * (1 - remedy)
        )
        torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], ["dense", "early_learning", 0.0, 0.25, 0.997, True]),
        (
            ["dataset.random_erasing=0", "training.weight_average=0.9"],
            ["dense", "early_learning", 0.0, 0.0, 0.9, True],
        ),
        (
            ["ast.mode=ast", "ast.forget_rate=auto", "training.list_suspects=false"],
            ["ast", "early_learning", 0.0, 0.25, 0.997, False],
        ),
    ],
)
def test_the_key_sets_what_is_not_given(overrides, expected, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("ast:\ntraining: {noisy_labels: true}\n", encoding="utf-8")
    for config in (
        load_config(file, overrides),
        load_config(None, ["training.noisy_labels=true", *overrides]),
    ):
        training = config.training
        found = [config.ast.mode, training.loss, training.mixup, config.dataset.random_erasing]
        assert [*found, training.weight_average, training.list_suspects] == expected
    assert load_config(None, text=config.model_dump_json()) == config
    off = load_config(file, ["training.noisy_labels=false"])
    assert (off.ast.mode, off.training.loss) == ("ast", "cross_entropy")


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["training.loss=cross_entropy"], "training.loss: cross_entropy keeps no memory by which"),
        (["ast.mode=ast"], "ast.mode: ast chooses wrong labels first"),
        (
            ["ast.mode=ast", "ast.forget_rate=auto", "training.mixup=1"],
            "training.mixup: ast.forget_rate.* remembers each sample",
        ),
    ],
)
def test_what_does_not_suit_the_key_is_refused(overrides, complaint):
    with pytest.raises(RequestError, match=complaint):
        make_config("training.noisy_labels=true", *overrides)


@pytest.mark.parametrize("noise", [0, 0.2])
def test_right_labels_get_cross_entropy_and_wrong_ones_the_remedy(noise, tmp_path, capsys):
    keys = (f"dataset.label_noise={noise}", f"logging.output_dir={tmp_path}")
    config = make_config(*DIGITS, *keys, "training.noisy_labels=true", "training.mixup=1")
    result, _ = train(config)
    history = result["training_history"]
    remedies = history["remedy"]
    assert remedies[:2] == [0, 0]
    if not noise:
        assert max(remedies[2:]) == 0
        assert result["ledger"]["seen"] == 0
        assert max(history["contradicted"][2:]) <= 0.01
    else:
        assert remedies[2] == pytest.approx(0.5)
        assert min(remedies[3:]) == 1
        steps = result["ledger"]["steps"] // 8
        mixing = Mixing(config.training, 10, Dist())
        mixed = sum(mixing.takes(remedies[2], 2, step) for step in range(steps))
        assert 0 < mixed < steps
        assert result["ledger"]["seen"] * 8 * steps == result["ledger"]["trained"] * (
            mixed + 5 * steps
        )
        assert history["energy_savings"][-1] == pytest.approx(-1 / 3)
        assert result["final_accuracy"] > 92
    assert remedies[4:] == [remedies[4]] * 4
    printed = capsys.readouterr().out
    said = "training.noisy_labels: ast.mode=dense, dataset.random_erasing=0.25, training.loss="
    assert printed.count(said) == 1


@pytest.mark.long
def test_compiled_steps_of_both_kinds_move_the_weights_as_eager_ones_do():
    """Some steps are mixed, others not: two graphs, whose results must not be mistaken."""
    moved = {}
    for mode in ("off", "reduce-overhead"):
        torch.manual_seed(0)
        run = built(
            BatchNormNet(),
            *("training.noisy_labels=true", "training.mixup=1", "training.weight_average=0.5"),
            *(f"training.compile={mode}", "training.grad_accum_steps=2"),
        )
        run.start_epoch(0, np.arange(16))
        run.network.loss.know_labels(np.arange(16) % 10)
        run.network.loss.apply(0.5)
        if mode != "off":
            run.warm_up()
        train_one_epoch(run, loaded([make_batch(seed=s) for s in range(12)]), 12)
        assert 0 < run.metrics.ledger.seen < 12 * 16
        state = [*run.network.exported.state_dict().values(), run.network.loss.targets]
        moved[mode] = [tensor.clone() for tensor in state]
    for eager, fast in zip(moved["off"], moved["reduce-overhead"], strict=True):
        torch.testing.assert_close(eager, fast, atol=1e-5, rtol=1e-4)
