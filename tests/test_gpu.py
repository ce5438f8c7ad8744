"""What only a GPU can show: skipped without one. The logic of each path has its own test on a
CPU.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import REPO, loaded, make_config
from lab.config.loading import checkpoint_folder
from lab.config.sections import ModelConfig
from lab.data.images import pad_crop, resize_weights
from lab.data.loading import DeviceBatch, device_batches
from lab.data.randomness import uniform
from lab.engine.checkpoint import load_checkpoint
from lab.machine.devices import configure_backends
from lab.models.building import get_model
from runs import untimed
from train_ast import Run, build_dataloaders, load_config, train, train_one_epoch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("mode", "scoring", "window"),
    [
        ("dense", "batch", 1),
        ("ast", "batch", 2),
        ("ast", "history", 1),
        ("ast", "reused", 1),
        ("ast", "reused", 2),
        ("dense", "noisy labels", 1),
    ],
)
def test_cuda_graphs_train_as_eager_steps_do(mode, scoring, window):
    """ResNet-18 in float32, 24 loop steps from the same weights: every tensor moves the same way by
    the same amount.

    The rate is small because at 0.01 a change of the weights by 1e-7 is one of 9 % after as many
    steps.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 32, 3, 32, 32), dtype=torch.uint8, generator=generator).to(
        GPU
    )
    labels = torch.randint(0, 10, (24, 32), generator=generator).to(GPU)
    ended = {}
    for compile_ in ("off", "reduce-overhead"):
        torch.manual_seed(0)
        settings = [
            f"training.compile={compile_}",
            f"training.grad_accum_steps={window}",
        ]
        settings += [
            "training.device=cuda",
            "training.mixed_precision=false",
            "training.lr=1e-4",
        ]
        settings += [f"ast.scoring={scoring}", f"ast.pack={scoring == 'batch'}"]
        if scoring == "reused":  # the harder 16 of 32
            settings[-2:] = ["ast.reuse_forward=true", "ast.rule=topk", "ast.target_activation=0.5"]
        elif scoring == "noisy labels":  # half of the steps are mixed
            settings[-2:] = ["training.noisy_labels=true", "training.mixup=1"]
            settings.append("training.label_smoothing=0.1")
        else:
            settings.append("ast.kp=1.0")
        size = 16 if scoring == "reused" else 32
        config = make_config(
            f"ast.mode={mode}", f"training.batch_size={size}", "dataset.image_size=32", *settings
        )
        configure_backends(True, GPU)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        model = get_model(ModelConfig(name="resnet18", small_stem=True), 10, 32)
        run = Run.build(config, model, GPU, planned_steps=24, samples=32, classes=10)
        if config.training.noisy_labels:
            run.network.loss.apply(0.5)
        stored = run.selection.store
        if stored is not None:
            run.selection.weights[::3] = 2
        else:
            run.start_epoch(0, np.arange(32))
        start = {name: tensor.double() for name, tensor in model.state_dict().items()}
        run.warm_up()
        train_one_epoch(run, loaded(zip(images, labels, strict=True)), 24)
        ended[compile_] = {
            name: tensor.double() - start[name] for name, tensor in model.state_dict().items()
        }
        ended[compile_ + " activation"] = run.selection.activations
        ended[compile_ + " stored"] = None if stored is None else stored.significance.clone()
        assert run.metrics.ledger.steps >= 2
    assert ended["off activation"] == pytest.approx(ended["reduce-overhead activation"], abs=1 / 16)
    if ended["off stored"] is not None:
        assert torch.allclose(
            ended["off stored"], ended["reduce-overhead stored"], rtol=0.05, atol=0.05
        )
    for name, moved in ended["off"].items():
        assert moved.norm() > 0, name
        assert (ended["reduce-overhead"][name] - moved).norm() < 0.1 * moved.norm(), name


def test_a_proxys_step_is_one_cuda_graph_and_learns_as_the_eager_one(monkeypatch):
    """Scores and weights after six steps of it, in float32, at a lower resolution."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    skips = torch._dynamo.utils.counters["inductor"]
    skips.clear()
    ended = {}
    for compile_ in ("off", "reduce-overhead"):
        torch.manual_seed(0)
        keys = ["ast.scoring=proxy", "ast.pack=true", "ast.score_resolution=24"]
        keys += ["training.device=cuda", "training.mixed_precision=false"]
        config = make_config(
            *keys, f"training.compile={compile_}", "training.batch_size=64", "dataset.image_size=32"
        )
        model = get_model(ModelConfig(name="resnet18", small_stem=True), 10, 32)
        configure_backends(True, GPU)
        torch.set_float32_matmul_precision("highest")
        run = Run.build(config, model, GPU, planned_steps=24, samples=64)
        run.start_epoch(0, np.arange(64))
        run.warm_up()
        proxy = run.selection.scores.proxy
        start = proxy.optimizer.weights.clone()
        scores = []
        for number in range(24):
            generator = torch.Generator().manual_seed(number)
            size = (64, 3, 32, 32)
            images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).to(GPU)
            labels = torch.randint(0, 10, (64,), generator=generator).to(GPU)
            batch = DeviceBatch(images, labels, torch.arange(64, device=GPU))
            run.selection.scores.observe(batch, 0.1)
            with torch.no_grad():
                scores.append(run.selection.scores.of_batch(batch)[0].clone())
        ended[compile_] = (torch.cat(scores), proxy.optimizer.weights - start)
    assert not skips["cudagraph_skips"]
    (eager, moved), (graphed, ours) = ended.values()
    assert torch.allclose(eager, graphed, rtol=0.02, atol=0.02)
    assert moved.norm() > 0
    assert (ours - moved).norm() < 0.1 * moved.norm()


def test_streamed_and_resident_batches_reach_the_gpu_as_they_are(image_folder):
    paths = [f"dataset.train_dir={image_folder}/train", f"dataset.val_dir={image_folder}/val"]
    for cache, size in (("none", 32), ("device", 32), ("device", 72), ("disk", 32), ("disk", 72)):
        where = [f"dataset.cache={cache}", f"dataset.image_size={size}"]
        if cache != "none":
            where.append(f"dataset.cache_folder={image_folder}/cache")
        config = make_config("dataset.type=folder", *paths, *where)
        ends = []
        for device in (torch.device("cpu"), GPU):
            train, _, _, _ = build_dataloaders(config, device)
            ends.append(
                [
                    (images.cpu(), labels.cpu())
                    for images, labels, *_ in device_batches(train, device)
                ]
            )
        for (images, labels), (others, others_labels) in zip(*ends, strict=True):
            assert torch.equal(labels, others_labels)
            assert (images.int() - others.int()).abs().max() <= (
                1 if size == 72 else 0
            )  # float16 weights


@pytest.mark.parametrize("size", [32, 72])
def test_views_from_a_file_are_those_of_the_device_bit_for_bit(size, image_folder):
    paths = [f"dataset.train_dir={image_folder}/train", f"dataset.val_dir={image_folder}/val"]
    found = []
    for number, cache in enumerate(("disk", "device")):
        where = [
            f"dataset.cache_folder={image_folder}/cache{number}",
            f"dataset.cache={cache}",
        ]  # device: no file
        config = make_config("dataset.type=folder", f"dataset.image_size={size}", *paths, *where)
        loader, _, plan, _ = build_dataloaders(config, GPU)
        plan.start_epoch(2)
        found.append([images.cpu() for images, *_ in device_batches(loader, GPU)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("size", "augment"), [(72, "random_resized_crop"), (32, "pad_crop"), (32, "none")]
)
def test_a_slow_gpu_gets_every_batch_from_the_same_few_pieces_of_memory(
    size, augment, image_folder
):
    """Each batch is asked for while the GPU is behind by several: no piece is filled before it has
    been used.
    """
    paths = [f"dataset.train_dir={image_folder}/train", f"dataset.val_dir={image_folder}/val"]
    keys = [
        "dataset.type=folder",
        f"dataset.image_size={size}",
        f"dataset.augment={augment}",
        "training.batch_size=2",
    ]
    found = {}
    pieces = []
    for cache in ("device", "disk"):
        where = [f"dataset.cache_folder={image_folder}/cache", f"dataset.cache={cache}"]
        loader, _, plan, _ = build_dataloaders(make_config(*paths, *keys, *where), GPU)
        found[cache] = []
        for epoch in (0, 1, 2, 2):
            plan.start_epoch(epoch)
            for batch in device_batches(loader, GPU):
                found[cache].append(batch.images)
                torch.cuda._sleep(10**7)
            if cache == "disk":
                assert all(slot.host.is_pinned() and slot.device.is_cuda for slot in loader.idle[0])
                pieces.append(
                    [(slot.host.data_ptr(), slot.device.data_ptr()) for slot in loader.idle[0]]
                )
    assert len(found["disk"]) == 48
    assert all(torch.equal(*pair) for pair in zip(*found.values(), strict=True))
    assert pieces[2] == pieces[3]  # the earlier epochs may have had smaller batches


@pytest.mark.parametrize("size", [32, 72])
def test_histories_from_a_file_are_those_of_the_device(size, image_folder, tmp_path, monkeypatch):
    """Three epochs by history, with kernels that repeat themselves: whole results, weights' folder
    and times aside.
    """
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        ended = []
        for cache in ("disk", "device"):
            keys = [
                f"dataset.train_dir={image_folder}/train",
                f"dataset.val_dir={image_folder}/val",
            ]
            keys += ["dataset.type=folder", f"dataset.image_size={size}", f"dataset.cache={cache}"]
            keys += [
                f"dataset.cache_folder={tmp_path}/{cache}",
                f"logging.output_dir={tmp_path}/out_{cache}",
            ]
            keys += [
                "model.name=resnet18",
                "training.epochs=3",
                "training.batch_size=8",
                "training.device=cuda",
            ]
            keys += ["ast.scoring=history", "ast.target_activation=0.5", "ast.warmup_epochs=1"]
            ended.append(untimed(train(make_config(*keys))[0]) | {"weights": None})
        assert ended[0] == ended[1]
    finally:
        torch.use_deterministic_algorithms(False)


def test_draws_and_crops_are_the_cpus():
    indices = torch.arange(1000)
    assert torch.equal(uniform(3, 5, indices, 23), uniform(3, 5, indices.to(GPU), 23).cpu())
    images = torch.randint(
        0, 256, (8, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    boxes = torch.tensor([[3.0, -5.0, 64.0, 64.0]]).expand(8, -1)
    mirror = torch.arange(8) % 2 == 0
    for reflects in (False, True):
        ours = pad_crop(images.to(GPU), boxes.to(GPU), mirror.to(GPU), reflects).cpu()
        assert torch.equal(ours, pad_crop(images, boxes, mirror, reflects))
    weights = resize_weights(48, 64, GPU).float().cpu()
    assert torch.allclose(weights, resize_weights(48, 64, torch.device("cpu")), atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "way",
    [
        ["ast.mode=dense", "dataset.cache=none"],
        ["ast.target_activation=0.5", "dataset.cache=none"],
        ["ast.scoring=history", "ast.target_activation=0.5", "dataset.cache=device"],
    ],
)
def test_two_gpus_with_synchronised_batchnorm_train_as_one_does(way, tmp_path, monkeypatch):
    """Digits in float32, 2 dense and 2 further epochs: BatchNorm's weights and statistics move as
    on one GPU.

    The rate is small for the reason above. From weights that differ by 1e-6, moves then differ by
    0.07 (one sample chosen for another); with statistics of each rank's own samples by 0.27 and
    more.
    """
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    preset = REPO / "configs" / "digits_smoke.yaml"
    ended = {}
    for processes in (1, 2):
        overrides = [
            "training.device=cuda",
            "training.mixed_precision=false",
            "training.sync_batchnorm=true",
        ]
        overrides += [
            "training.optimizer=sgd",
            "training.lr=3e-5",
            "training.epochs=4",
            "ast.warmup_epochs=2",
        ]
        overrides += [
            *way,
            "ast.pack=false",
            "training.num_workers=0",
            f"logging.output_dir={tmp_path}/{processes}",
        ]
        request = ["--config", preset, "--nproc", str(processes), *overrides]
        line = [sys.executable, "scripts/run_experiment.py", *map(str, request)]
        done = subprocess.run(line, cwd=REPO, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        config = load_config(preset, overrides)
        ended[processes] = load_checkpoint(checkpoint_folder(config) / "last.pt", config)
    one, two = (state["network"]["model"] for state in ended.values())
    assert (
        ended[2]["ranks"][0]["metrics"]["ledger"]["steps"]
        == ended[1]["ranks"][0]["metrics"]["ledger"]["steps"]
    )
    for name, tensor in one.items():
        if tensor.dim() == 1:  # BatchNorm's, which begin as ones and zeros
            moved = tensor - float(name.endswith(("weight", "running_var")))
            assert (two[name] - tensor).norm() <= 0.15 * moved.norm().clamp(min=1e-3), name
