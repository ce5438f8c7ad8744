"""Choosing before loading: the stored significance, who is chosen by it, with which weight, and
what is read.
"""

import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import train_ast
from conftest import LayerNormNet, as_batch, loaded, make_batch, make_config, make_run, trained_on
from helpers import run_digits
from lab.data.loading import EpochPlan, device_batches
from lab.method.doubt import LEFT_OUT
from lab.method.sample_store import SampleStore, Visit
from train_ast import (
    AboveMean,
    Choice,
    Pool,
    Run,
    build_dataloaders,
    significance,
    train,
    train_one_epoch,
)

CPU = torch.device("cpu")
TINY = [
    "model.name=small_conv",
    "dataset.max_train_samples=640",
    "dataset.max_val_samples=32",
    "training.lr=0.02",
]
HISTORY = ["ast.scoring=history", "ast.target_activation=0.5"]
INFOBATCH = ["ast.scoring=history", "ast.rule=infobatch", "ast.entropy_weight=0"]
FIXED = ["ast.kp=0", "ast.ki=0"]  # a threshold that stays
NEVER = math.inf  # the score of a sample never seen


def history_run(samples: int, *overrides: str, way: list[str] = HISTORY) -> Run:
    torch.manual_seed(0)
    config = make_config(*way, *overrides)
    return Run.build(config, LayerNormNet(), CPU, planned_steps=100, samples=samples)


def of_epoch(run: Run, scores: np.ndarray, uniforms: np.ndarray, epoch: float = 0.0) -> Choice:
    """Whom an epoch takes by these stored scores, without a floor; `uniforms` draws by chance."""
    drawn = torch.from_numpy(uniforms)
    pool = Pool(torch.from_numpy(scores.astype(np.float32)), lambda: drawn, epoch)
    return run.selection.take(pool, 0, torch.arange(len(scores)), slice(None))


# ------------------------------------------------------------------------------------ Who is chosen


@pytest.mark.parametrize(
    ("scores", "drawn", "forget_rate", "rows"),
    [
        ([1.0, 3.0, 2.0, 4.0], [0, 0, 0, 0], 0.0, [1, 3]),
        ([1.0, 2.5, 2.0, 4.0], [0, 0, 0, 0], 0.0, [3]),  # over, not at, the threshold
        ([NEVER, 1.0, NEVER, 2.0], [0, 0, 0, 0], 0.0, [0, 2]),  # never seen: always
        ([1.0, 3.0, 2.0, 4.0], [1, 1, 0, 0], 0.0, [0, 1, 3]),  # drawn, whatever the score
        ([1.0, 3.0, 2.0, 4.0], [0, 0, 0, 0], 0.25, [1]),  # the top quarter is left out
        ([1.0, 3.0, 2.0, 4.0], [0, 0, 0, 1], 0.25, [1]),  # and chance does not bring it back
        ([1.0, 3.0, NEVER, 4.0], [0, 0, 0, 0], 0.34, [1, 2]),  # never seen is not hopeless
    ],
)
def test_which_samples_an_epoch_takes(scores, drawn, forget_rate, rows):
    run = history_run(4, *FIXED, "ast.initial_threshold=2.5", f"ast.forget_rate={forget_rate}")
    chosen = of_epoch(run, np.array(scores), np.where(drawn, 0.0, 0.99))
    assert chosen.rows.tolist() == rows
    assert chosen.threshold == 2.5
    assert chosen.weights is None


def test_the_threshold_starts_where_exploration_leaves_the_target():
    """Of 1,000 scores 0 to 999, 100 drawn at random: the top third of the other 900 makes 0.4."""
    rng = np.random.default_rng(0)
    run = history_run(1000, *FIXED, "ast.target_activation=0.4", "training.batch_size=100")
    scores = rng.permutation(1000)
    drawn = np.isin(np.arange(1000), rng.choice(1000, 100, replace=False))
    chosen = of_epoch(run, scores, np.where(drawn, 0.05, 0.5))
    assert chosen.threshold == pytest.approx(np.quantile(scores[~drawn], 2 / 3))
    assert len(chosen.rows) == 400
    assert run.selection.activations == [0.4]
    assert set(np.flatnonzero(drawn)) <= set(chosen.rows.tolist())


def test_an_empty_store_takes_everything():
    run = history_run(1024, "ast.target_activation=0.3")
    rng = np.random.default_rng(0)
    chosen = of_epoch(run, np.full(1024, NEVER), rng.random(1024))
    assert chosen.rows.tolist() == list(range(1024))
    assert math.isfinite(chosen.threshold)
    later = of_epoch(run, rng.exponential(1.0, 1024), rng.random(1024), 1.0)  # it starts anew
    assert len(later.rows) / 1024 == pytest.approx(0.3, abs=0.03)


@settings(max_examples=25)
@given(
    target=st.floats(0.15, 0.7),
    explore=st.floats(0, 0.1),
    sigma=st.floats(0.3, 1.5),
    visited=st.floats(0.1, 0.6),
    seed=st.integers(0, 1000),
)
def test_the_share_stays_at_the_target_while_the_store_drifts(
    target, explore, sigma, visited, seed
):
    """Ten epochs over 8,192 samples, those trained on losing part of their significance: within 2
    points after the first, with one threshold handed from epoch to epoch.
    """
    rng = np.random.default_rng(seed)
    keys = [f"ast.target_activation={target}", f"ast.explore={explore}", "ast.kp=1", "ast.ki=0.2"]
    run = history_run(8192, *keys, "training.batch_size=128")
    store = rng.lognormal(0, sigma, 8192).astype(np.float32)
    shares = []
    for epoch in range(10):
        order = rng.permutation(8192)
        chosen = of_epoch(run, store[order], rng.random(8192), epoch)
        trained = order[chosen.rows.numpy()]
        store[trained] *= rng.uniform(visited, 1.0, len(trained)).astype(np.float32)
        shares.append(len(trained) / 8192)
    assert shares == run.selection.activations
    assert max(abs(share - target) for share in shares[1:]) < 0.02


def test_infobatch_keeps_half_of_those_below_the_mean_at_twice_the_weight():
    rng = np.random.default_rng(0)
    scores = rng.exponential(1.0, 10000).astype(np.float32)
    uniforms = rng.random(10000)
    drawn = uniforms < 0.5
    scores[:5] = NEVER
    pool = Pool(torch.from_numpy(scores), lambda: torch.from_numpy(uniforms), 0.0)
    chosen = AboveMean(make_config(*INFOBATCH)).choose(pool, 0.75)
    mean = scores[5:].mean(dtype=np.float64)
    assert chosen.threshold == pytest.approx(mean)
    assert chosen.rows.tolist() == np.flatnonzero((scores >= mean) | drawn).tolist()
    assert chosen.weights.tolist() == np.where(scores < mean, 2, 1)[chosen.rows].tolist()
    selection = history_run(3, way=INFOBATCH).selection
    selection.weights.copy_(torch.tensor([LEFT_OUT, 1, 2]))
    assert selection.mask().tolist() == [0, 1, 1]
    batch = as_batch(*make_batch(3), torch.tensor([2, 1, 2]))
    assert selection.loss_weights(batch).tolist() == [2.0, 1.0, 2.0]


def test_infobatch_is_dense_in_its_last_eighth(tmp_path):
    config = make_config(
        *INFOBATCH,
        "ast.warmup_epochs=1",
        *TINY,
        "dataset.max_train_samples=160",
        "training.epochs=16",
        f"logging.output_dir={tmp_path}",
    )
    assert [config.is_sparse(epoch) for epoch in range(16)] == [False] + [True] * 13 + [False] * 2
    result, _ = train(config)
    loaded = result["training_history"]["samples_loaded"]
    assert loaded[0] == loaded[14] == loaded[15] > max(loaded[1:14])


def test_top_k_takes_the_same_number_of_every_batch(tmp_path):
    """The largest scores, whatever the threshold."""
    settings = [
        "ast.rule=topk",
        "ast.pack=true",
        "training.epochs=2",
        f"logging.output_dir={tmp_path}",
    ]
    config = make_config(*settings, *TINY)
    result, _ = train(config)
    assert result["training_history"]["activation_rate"] == [0.25, 0.25]
    ledger = result["ledger"]
    assert ledger["scored"] == ledger["loaded"]
    assert 0 <= ledger["loaded"] // 4 - ledger["trained"] < 16  # what the queue still holds


# -------------------------------------------------------------------------------- Store and weights


def test_a_step_records_the_significance_of_its_own_forward():
    run = history_run(40, "ast.entropy_weight=0.5")
    run.metrics.epoch = 3
    images, labels = make_batch()
    indices = torch.arange(16) * 2 + 5
    with torch.no_grad():
        expected = significance(run.network.model(run.network.normalise(images)), labels, 0.5)
    trained_on(run, images, labels, indices)
    assert torch.equal(run.selection.store.significance[indices], expected)
    assert set(run.selection.store.last_epoch[indices].tolist()) == {3}
    others = torch.ones(40, dtype=torch.bool).index_fill_(0, indices, False)
    assert run.selection.store.significance[others].isinf().all()
    assert (run.selection.store.last_epoch[others] == -1).all()


def test_a_loss_that_is_not_finite_leaves_its_sample_as_never_seen():
    store = SampleStore(4, CPU)
    store.record(
        torch.tensor([0, 1, 2]), Visit(torch.tensor([math.nan, 2.0, math.inf]), *4 * [None]), 0
    )
    assert store.significance.tolist() == [math.inf, 2.0, math.inf, math.inf]


def seen(run: Run, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Let the store know all samples, as a visit of each leaves it. Returns their scores."""
    weight = run.config.ast.entropy_weight
    with torch.no_grad():
        scores = significance(run.network.model(run.network.normalise(images)), labels, weight)
    run.selection.store.record(torch.arange(len(labels)), Visit(scores, *4 * [None]), 0)
    return scores


def test_an_explored_sample_weighs_one():
    """The gradient over an epoch's choice is that of the plain mean over it."""
    run = history_run(64, "ast.explore=0.25", "training.batch_size=64")
    images, labels = make_batch(64)
    scores = seen(run, images, labels)
    run.start_epoch(0, np.arange(64))
    chosen = torch.from_numpy(np.flatnonzero(run.selection.mask()))
    over = set(scores.topk(len(chosen)).indices.tolist())
    assert not set(chosen.tolist()) <= over  # some are explored
    batch = as_batch(images[chosen], labels[chosen], chosen)
    assert run.selection.loss_weights(batch).tolist() == [1.0] * len(chosen)
    logits = run.network.model(run.network.normalise(batch.images))
    loss = F.cross_entropy(logits, batch.labels)
    expected = torch.autograd.grad(loss, list(run.network.model.parameters()))
    trained_on(run, *batch[:3])
    for parameter, gradient in zip(run.network.model.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-6)


def test_with_the_weights_of_infobatch_the_expected_gradient_is_that_of_the_whole_set():
    """Over 1,500 draws of who below the mean stays, the summed weighted gradient of the chosen
    against that of all 64.
    """
    run = history_run(64, "training.epochs=2000", way=INFOBATCH)
    images, labels = make_batch(64)
    seen(run, images, labels)
    parameter = run.network.model.head.weight

    def gradient(indices: torch.Tensor) -> torch.Tensor:
        parameter.grad = None
        run.trainer.window_samples = 0
        run.trainer.window_divisor = 0
        kept = run.selection.store.significance.clone()
        trained_on(run, images[indices], labels[indices], indices)
        run.selection.store.significance.copy_(kept)
        return parameter.grad * len(indices) / 64

    whole = gradient(torch.arange(64))
    plan = EpochPlan(np.arange(64), 16, 0, lambda epoch: 1.0)
    total = 0.0
    spread = 0.0
    for draw in range(1500):
        plan.start_epoch(draw)
        run.selection.start_epoch(draw, plan.permutation(), run.schedule)
        one = gradient(torch.from_numpy(np.flatnonzero(run.selection.mask())))
        total = total + one
        spread = spread + (one - whole).square()
    error = (total / 1500 - whole).norm()
    chance = (spread.sum() / 1500**2).sqrt()
    assert error < 3 * chance
    assert chance < 0.05 * whole.norm()


def test_a_store_survives_saving_and_loading():
    one = history_run(16)
    two = history_run(16)
    one.selection.store.record(torch.arange(8), Visit(torch.rand(8), *4 * [None]), 4)
    one.selection.weights[3] = 2
    two.selection.load_state_dict(one.selection.state_dict())
    for name, tensor in one.selection.store.state_dict().items():
        assert torch.equal(tensor, two.selection.store.state_dict()[name]), name
    assert torch.equal(one.selection.weights, two.selection.weights)


# ---------------------------------------------------------------------------- What is read, and run


@pytest.mark.parametrize("workers", [0, 2])
def test_no_unchosen_sample_is_loaded(image_folder, workers):
    folders = [
        "dataset.type=folder",
        f"dataset.train_dir={image_folder}/train",
        f"dataset.val_dir={image_folder}/val",
    ]
    config = make_config(
        *HISTORY, *folders, f"training.num_workers={workers}", "training.batch_size=4"
    )
    loader, _, plan, _ = build_dataloaders(config, CPU)
    chosen = np.zeros(24, np.uint8)
    chosen[[1, 2, 5, 8, 13, 17, 21, 23]] = [1, 2, 1, 1, 1, 2, 1, 1]
    for i in set(range(24)) - set(np.flatnonzero(chosen).tolist()):
        loader.dataset.samples[i][0].write_bytes(b"no image: whoever opens this fails")
    plan.start_epoch(3, mask=chosen)
    batches = list(device_batches(loader, CPU))
    assert len(plan) == len(batches) == 2
    assert (
        sorted(torch.cat([batch.indices for batch in batches]).tolist())
        == np.flatnonzero(chosen).tolist()
    )
    for batch in batches:
        assert batch.labels.tolist() == [index // 8 for index in batch.indices.tolist()]


def test_no_file_of_an_unchosen_sample_is_opened(image_folder, tmp_path, monkeypatch):
    """A whole run: as many files are opened as the ledger says samples were loaded."""
    opened = []
    at_end = []
    read = Path.read_bytes
    count_diet = train_ast.count_diet
    monkeypatch.setattr(Path, "read_bytes", lambda path: (opened.append(path), read(path))[1])
    monkeypatch.setattr(
        train_ast, "count_diet", lambda *rest: (at_end.append(len(opened)), count_diet(*rest))[1]
    )
    folders = [
        "dataset.type=folder",
        f"dataset.train_dir={image_folder}/train",
        f"dataset.val_dir={image_folder}/val",
    ]
    settings = [
        *folders,
        "training.num_workers=0",
        "training.batch_size=4",
        "training.epochs=5",
        "ast.warmup_epochs=1",
    ]
    settings += ["model.name=test_resnet", "dataset.image_size=32", "ast.explore=0.1"]
    result, _ = train(make_config(*HISTORY, *settings, f"logging.output_dir={tmp_path / 'out'}"))
    trained = [
        path for path in opened[: at_end[0]] if "train" in path.parts
    ]  # then come those that are shown
    history = result["training_history"]
    assert len(trained) == result["ledger"]["loaded"] == sum(history["samples_loaded"])
    assert history["samples_loaded"][0] == 24
    assert max(history["samples_loaded"][1:]) < 24
    assert history["samples_scored"] == [0] * 5


@pytest.mark.parametrize("cache", ["none", "device"])
def test_a_run_holds_its_target_and_trains_what_it_loads(cache, tmp_path):
    settings = [
        "ast.scoring=history",
        "ast.target_activation=0.4",
        "ast.warmup_epochs=1",
        "ast.anneal_epochs=1",
    ]
    settings += ["ast.kp=1.0", "ast.ki=0.2", "training.epochs=8", f"dataset.cache={cache}"]
    result, _ = train(make_config(*settings, *TINY, f"logging.output_dir={tmp_path}"))
    history = result["training_history"]
    assert history["activation_rate"][0] == history["activation_rate"][-1] == 1
    assert all(abs(rate - 0.4) <= 0.02 for rate in history["activation_rate"][2:-1])
    assert history["samples_loaded"] == history["samples_trained"]
    assert history["threshold"][0] is None
    assert all(value > 0 for value in history["threshold"][1:-1])
    assert history["lr"][-1] < 1e-3  # fully decayed, whatever the choice took
    assert history["energy_savings"][3] == pytest.approx(1 - history["samples_loaded"][3] / 640)


def test_dense_phases_fill_the_store_for_the_first_choice():
    run = history_run(64, "ast.warmup_epochs=1", "training.epochs=3")
    run.start_epoch(0, np.arange(64))
    pairs = loaded([make_batch(16, seed) for seed in range(4)])
    batches = [batch._replace(indices=batch.indices + 16 * i) for i, batch in enumerate(pairs)]
    train_one_epoch(run, batches, 4)
    assert run.selection.store.significance.isfinite().all()
    run.start_epoch(1, np.random.default_rng((0, 1)).permutation(64))
    assert 0 < np.count_nonzero(run.selection.mask()) < 64


@pytest.mark.long
def test_choosing_costs_at_most_50_ns_a_sample():
    """Beyond the shuffle, which every mode makes: at 1e6, 1e7 and 1e8 samples, batches of 512."""
    for size in (10**6, 10**7, 10**8):
        keys = ["ast.target_activation=0.3", "ast.kp=1", "ast.ki=0.2", "training.batch_size=512"]
        selection = history_run(size, *keys).selection
        selection.store.significance.copy_(torch.rand(size))
        order = np.random.default_rng(0).permutation(size)
        started = time.perf_counter()
        selection.choose_epoch(0, order, 0.0)
        nanoseconds = 1e9 * (time.perf_counter() - started) / size
        tensors = [*selection.store.state_dict().values(), selection.weights]
        kept = sum(tensor.nbytes for tensor in tensors) / size
        share = np.count_nonzero(selection.mask()) / size
        print(
            f"{size:>11,} samples: {nanoseconds:.1f} ns and {kept:g} bytes a sample, "
            f"share {share:.4f}"
        )
        assert nanoseconds <= 50
        assert kept <= 8
        assert abs(share - 0.3) < 0.01


def test_infobatch_follows_its_schedule_by_what_it_loads(tmp_path):
    """The rate at an epoch's end tells how far the schedule is: as far as the samples are."""
    config = make_config(
        *INFOBATCH,
        "ast.warmup_epochs=1",
        *TINY,
        "training.epochs=8",
        f"logging.output_dir={tmp_path}",
    )
    result, _ = train(config)
    history = result["training_history"]
    progress = np.arccos(2 * np.array(history["lr"]) / 0.02 - 1) / np.pi
    loaded = np.cumsum(history["samples_loaded"]) / sum(history["samples_loaded"])
    assert np.abs(progress - loaded).max() < 0.06
    assert history["threshold"][1] > 0


def test_top_k_reports_the_lowest_score_it_took(tmp_path):
    run = make_run(LayerNormNet(), "ast.rule=topk", "ast.target_activation=0.25")
    scores = torch.rand(16, generator=torch.Generator().manual_seed(0))
    chosen = run.selection.choose(torch.arange(16), scores, 0.0)
    assert chosen.rows.tolist() == sorted(scores.topk(4).indices.tolist())
    assert run.selection.thresholds == [scores[chosen.rows].min().item()]


# ------------------------------------------------------------------------------------- Equal scores


@pytest.mark.parametrize("zeros", [0.85, 1.0])
@pytest.mark.parametrize("value", [0.0, 1.5])
@pytest.mark.parametrize("start", ["auto", "0.3"])
@pytest.mark.parametrize("unit", ["iqr", "raw"])
def test_the_target_holds_where_scores_are_equal(zeros, value, start, unit):
    """Batch-scored: most or all scores are one number, from the first step or from the eleventh
    on.
    """
    settings = [
        "ast.target_activation=0.25",
        f"ast.initial_threshold={start}",
        f"ast.threshold_unit={unit}",
        "training.batch_size=64",
    ]
    run = make_run(LayerNormNet(), *settings)
    rng = np.random.default_rng(0)
    for _ in range(200):
        scores = np.where(rng.random(64) < zeros, value, value + rng.exponential(1.0, 64)).astype(
            np.float32
        )
        chosen = run.selection.choose(torch.arange(64), torch.from_numpy(scores), 0.0)
        assert len(chosen.rows) >= 2
    assert np.mean(run.selection.activations) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("zeros", [0.85, 1.0])
@pytest.mark.parametrize("value", [0.0, 1.5])
@pytest.mark.parametrize("start", ["auto", "0.3"])
@pytest.mark.parametrize("unit", ["iqr", "raw"])
def test_the_target_holds_where_stored_scores_are_equal(zeros, value, start, unit):
    rng = np.random.default_rng(0)
    keys = ["ast.target_activation=0.25", f"ast.initial_threshold={start}"]
    keys.append(f"ast.threshold_unit={unit}")
    run = history_run(4096, *keys, "training.batch_size=64")
    shares = []
    for epoch in range(5):
        scores = np.where(rng.random(4096) < zeros, value, value + rng.exponential(1.0, 4096))
        chosen = of_epoch(run, scores, rng.random(4096), epoch)
        assert set(np.flatnonzero(scores > value)) <= set(chosen.rows.tolist())
        shares.append(len(chosen.rows) / 4096)
    assert shares == pytest.approx([0.25] * 5, abs=0.02)


def test_who_of_equals_is_taken_repeats_and_changes_with_seed_and_epoch():
    def chosen(seed, epoch):
        selection = make_run(LayerNormNet(), f"training.seed={seed}").selection
        batch = (torch.arange(64), torch.zeros(64), epoch)
        return [selection.choose(*batch).rows.tolist() for _ in range(2)]

    assert chosen(0, 1.0) == chosen(0, 1.5)
    different = [chosen(0, 1.0), chosen(0, 2.0), chosen(1, 1.0)]
    assert all(one != two for i, one in enumerate(different) for two in different[:i])
    assert different[0][0] != different[0][1]


@pytest.mark.parametrize("scoring", ["batch", "history"])
def test_a_target_out_of_reach_is_said_once(scoring, tmp_path, capsys):
    request = [
        "ast.min_threshold=50",
        f"ast.scoring={scoring}",
        *(["ast.explore=0"] if scoring == "history" else []),
        "training.epochs=4",
    ]
    assert run_digits(tmp_path, *request) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "out of reach" in line]
    assert line == (
        "note: ast.target_activation=0.25 is out of reach: only 0.000 of the samples are "
        "above ast.min_threshold=50"
    )
    assert run_digits(tmp_path, f"ast.scoring={scoring}") == 0
    assert "out of reach" not in capsys.readouterr().out
