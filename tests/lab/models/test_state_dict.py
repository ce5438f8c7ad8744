"""Weights that other programs have written: real files of each kind, read to the same logits."""

import argparse
import copy
import os
import pathlib
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from timm.models import load_checkpoint
from timm.models._hub import save_for_hf
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models import get_model as torchvision_model

from conftest import make_config
from lab.base.errors import RequestError
from lab.config.loading import checkpoint_folder
from lab.models.building import get_model
from train_ast import train

SIDE = 32
PICTURES = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))


def trained(name="test_resnet", seed=1, classes=7, **arguments):
    """A network of timm or torchvision whose weights and statistics are no longer those of a fresh
    one.
    """
    torch.manual_seed(seed)
    make = torchvision_model if name == "resnet18" else timm.create_model
    model = make(name, num_classes=classes, **arguments).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 3, SIDE, SIDE)).square().mean().backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def logits(model):
    return model.eval()(PICTURES)


def started(path, name="test_resnet", classes=7, **settings):
    config = make_config(f"model.name={name}", f"model.weights={path}", "dataset.image_size=32")
    return get_model(config.model, classes, SIDE)


def assert_same(model, path, name="test_resnet", tolerance=1e-5):
    found = logits(started(path, name, len(logits(model)[0])))
    assert found.std() > 0.01
    assert (found - logits(model)).abs().max() < tolerance


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def averaged(model, other):
    """The exponential average of two networks by torch's own class, buffers too."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.6), use_buffers=True)
    average.update_parameters(model)
    average.update_parameters(other)
    return average


# -------------------------------------------------------------------------------------- Round trips


@pytest.mark.parametrize("safe", [True, False, "both"])
@pytest.mark.parametrize("arguments", [{}, {"global_pool": "max"}])
def test_a_folder_by_timms_saver(safe, arguments, tmp_path):
    model = trained(**arguments)
    save_for_hf(model, tmp_path / "hub", safe_serialization=safe)
    assert_same(model, tmp_path / "hub")
    theirs = timm.create_model(f"local-dir:{tmp_path}/hub", pretrained=True)
    assert torch.equal(logits(theirs), logits(started(tmp_path / "hub")))


def test_a_resnet18_of_timm_with_another_pool_is_built_as_it_was(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=7, global_pool="max").eval()
    save_for_hf(model, tmp_path / "hub")
    assert_same(model, tmp_path / "hub", "resnet18")


def test_a_checkpoint_of_timms_training(tmp_path, capsys):
    """By its own CheckpointSaver, with arguments, optimizer and average; by its own loader."""
    model = trained()
    ema = ModelEmaV3(model, decay=0.6)
    ema.update(trained(seed=2), step=1)
    arguments = argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("x"), model="test_resnet")
    optimizer = torch.optim.AdamW(model.parameters())
    saver = CheckpointSaver(
        model, optimizer, arguments, model_ema=ema, checkpoint_dir=str(tmp_path)
    )
    saver.save_checkpoint(1, metric=50.0)
    path = tmp_path / "checkpoint-1.pth.tar"
    for use_ema in (True, False):
        theirs = trained(seed=5)
        load_checkpoint(theirs, str(path), use_ema=use_ema, weights_only=False)
        same = (logits(theirs) - logits(started(path))).abs().max() < 1e-5
        assert same == use_ema
    assert "; the average of the weights, state_dict_ema" in capsys.readouterr().out


def test_a_checkpoint_of_torchvisions_reference(tmp_path, capsys):
    """references/classification/train.py, with and without --model-ema."""
    model = trained("resnet18")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    ema = averaged(model, trained("resnet18", seed=2))
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 30).state_dict(),
        "epoch": 4,
        "args": argparse.Namespace(lr=0.1, device=torch.device("cpu"), path=pathlib.Path("y")),
        "scaler": {"scale": 65536.0},
    }
    torch.save(checkpoint, tmp_path / "model_4.pth")
    assert_same(model, tmp_path / "model_4.pth", "resnet18")
    torch.save({**checkpoint, "model_ema": ema.state_dict()}, tmp_path / "ema.pth")
    assert_same(ema, tmp_path / "ema.pth", "resnet18")
    assert "; the average of the weights, model_ema;" in capsys.readouterr().out


class HyperParameters(dict):
    """As Lightning's AttributeDict: a class that a reader need not have."""


@pytest.mark.parametrize("attribute", ["model", "net", "backbone.encoder"])
def test_a_checkpoint_of_lightning(attribute, tmp_path):
    model = trained()
    states = {f"{attribute}.{name}": tensor for name, tensor in model.state_dict().items()}
    checkpoint = {
        "epoch": 3,
        "global_step": 400,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": OrderedDict({**states, "criterion.weight": torch.ones(7)}),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {
            "ModelCheckpoint{'monitor': 'val_acc'}": {
                "best_model_score": torch.tensor(0.9),
                "dirpath": "/tmp",
                "best_k_models": {},
            }
        },
        "optimizer_states": [torch.optim.Adam(model.parameters()).state_dict()],
        "lr_schedulers": [],
        "hparams_name": "hparams",
        "hyper_parameters": HyperParameters(lr=np.float64(0.1), root=pathlib.Path("data")),
    }
    torch.save(checkpoint, tmp_path / "epoch=3.ckpt")
    assert_same(model, tmp_path / "epoch=3.ckpt")


def test_an_averaged_model(tmp_path):
    average = averaged(trained(), trained(seed=2))
    torch.save(average.state_dict(), tmp_path / "swa.pt")
    assert_same(average, tmp_path / "swa.pt")
    save_file(average.state_dict(), tmp_path / "swa.safetensors")
    assert_same(average, tmp_path / "swa.safetensors")


WRAPPED = {
    "plain": lambda model: model,
    "data parallel": nn.DataParallel,
    "ddp": DistributedDataParallel,
    "compiled": torch.compile,
    "compiled, then ddp": lambda model: DistributedDataParallel(torch.compile(model)),
    "ddp, then compiled": lambda model: torch.compile(DistributedDataParallel(model)),
    "average of ddp": lambda model: AveragedModel(DistributedDataParallel(model)),
}


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_networks(kind, ending, tmp_path, process_group):
    model = trained()
    state = {name: t.clone() for name, t in WRAPPED[kind](model).state_dict().items()}
    path = tmp_path / f"wrapped.{ending}"
    save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    assert_same(model, path)


def test_a_network_of_which_parts_are_compiled(tmp_path):
    model = trained()
    expected = copy.deepcopy(model)
    model.layer2 = torch.compile(model.layer2)
    assert any("layer2._orig_mod" in name for name in model.state_dict())
    torch.save(model.state_dict(), tmp_path / "parts.pt")
    assert_same(expected, tmp_path / "parts.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_other_precisions(dtype, ending, tmp_path):
    model = trained().to(dtype)
    path = tmp_path / f"half.{ending}"
    state = model.state_dict()
    save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    assert_same(model.float(), path)


def test_weights_without_counters_and_from_before_torch_1_6(tmp_path):
    model = trained()
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if "num_batches_tracked" not in name
    }
    save_file(state, tmp_path / "bare.safetensors")
    assert_same(model, tmp_path / "bare.safetensors")
    torch.save(model.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same(model, tmp_path / "old.pth")


NESTS = {
    "checkpoint.model": lambda state: {"checkpoint": {"model": state, "step": 3}},
    "a wrapper of a wrapper": lambda state: {"state": {"module": {"state_dict": state}}},
    "model_state_dict": lambda state: {"epoch": 1, "model_state_dict": state},
    "a dict with attributes": lambda state: HyperParameters(net=state),
}


@pytest.mark.parametrize("kind", NESTS)
def test_nested_dicts(kind, tmp_path):
    model = trained()
    torch.save(NESTS[kind](model.state_dict()), tmp_path / "nested.pt")
    assert_same(model, tmp_path / "nested.pt")


# ------------------------------------------------------------------------ Averages and several sets


def test_the_average_of_a_run_is_taken_from_its_checkpoint(tmp_path, capsys):
    """What was validated: with training.weight_average a checkpoint holds both."""
    config = make_config(
        *("model.name=test_resnet", "dataset.image_size=16", "training.batch_size=64"),
        *("training.epochs=1", "ast.mode=dense", "dataset.max_val_samples=64"),
        *("dataset.max_train_samples=128", "training.weight_average=0.9"),
        f"logging.output_dir={tmp_path}",
    )
    train(config)
    folder = checkpoint_folder(config)
    capsys.readouterr()
    start = make_config("model.name=test_resnet", f"model.weights={folder}/best.pt")
    state = get_model(start.model, 10, 16).state_dict()
    expected = load_file(folder / "weights" / "model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert "; the average of the weights, averaged\n" in capsys.readouterr().out


AVERAGES = [
    "ema",
    "model_ema",
    "state_dict_ema",
    "EMA",
    "swa_model",
    "averaged_model",
    "ema_params",
]


@pytest.mark.parametrize("key", AVERAGES)
def test_an_average_goes_before_what_it_is_of(key, tmp_path, capsys):
    model = trained()
    average = trained(seed=2)
    torch.save({"model": model.state_dict(), key: average.state_dict()}, tmp_path / "two.pt")
    assert_same(average, tmp_path / "two.pt")
    assert f"; the average of the weights, {key};" in capsys.readouterr().out


def test_an_average_in_one_dict_with_what_it_is_of(tmp_path):
    """As ema_pytorch lays them out."""
    state = {f"online_model.{k}": v for k, v in trained().state_dict().items()}
    average = trained(seed=2)
    state |= {f"ema_model.{k}": v for k, v in average.state_dict().items()}
    torch.save({**state, "initted": torch.tensor(True), "step": torch.tensor(3)}, tmp_path / "e.pt")
    assert_same(average, tmp_path / "e.pt")


def test_an_average_without_names_is_named_and_left_aside(tmp_path, capsys):
    model = trained()
    shadows = {"decay": 0.9, "shadow_params": [p.detach() for p in model.parameters()]}
    torch.save({"model": model.state_dict(), "ema": shadows}, tmp_path / "shadow.pt")
    assert_same(model, tmp_path / "shadow.pt")
    assert (
        "its average, ema.shadow_params, does not fit and is left aside" in capsys.readouterr().out
    )


def test_an_average_without_statistics_is_refused(tmp_path):
    model = trained()
    average = {name: p.detach() for name, p in trained(seed=2).named_parameters()}
    torch.save({"model": model.state_dict(), "ema": average}, tmp_path / "part.pt")
    with pytest.raises(RequestError, match="running_mean is missing"):
        started(tmp_path / "part.pt")


def test_two_that_fit_are_refused_or_named(tmp_path, capsys):
    one, other = trained().state_dict(), trained(seed=2).state_dict()
    torch.save({"student": one, "teacher": other}, tmp_path / "two.pt")
    with pytest.raises(RequestError, match="'student' and 'teacher' both fit, and differ"):
        started(tmp_path / "two.pt")
    torch.save({"student": one, "twin": copy.deepcopy(one)}, tmp_path / "alike.pt")
    started(tmp_path / "alike.pt")
    torch.save({"state_dict": one, "best": other}, tmp_path / "usual.pt")
    assert_same(trained(), tmp_path / "usual.pt")
    assert "; left aside: best;" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ Refused


def altered(path, change):
    state = trained().state_dict()
    change(state)
    torch.save(state, path)
    return path


CHANGES = {
    "holds values that are not finite": lambda s: s["layer1.0.conv1.weight"].fill_(float("nan")),
    "bn1.running_mean holds values that are not finite": lambda s: s["bn1.running_mean"].fill_(
        float("inf")
    ),
    "bn1.running_var holds variances below 0": lambda s: s["bn1.running_var"].fill_(-1),
    "fc.weight holds int8": lambda s: s.update({"fc.weight": s["fc.weight"].to(torch.int8)}),
    "fc.bias holds bool": lambda s: s.update({"fc.bias": s["fc.bias"] > 0}),
    "fc.bias holds complex64": lambda s: s.update({"fc.bias": s["fc.bias"].to(torch.complex64)}),
    "fc.weight holds float8_e4m3fn": lambda s: s.update(
        {"fc.weight": s["fc.weight"].to(torch.float8_e4m3fn)}
    ),
    "fc.weight is sparse, quantised or without values": lambda s: s.update(
        {"fc.weight": s["fc.weight"].to_sparse()}
    ),
    "fc.bias holds values that are not finite": lambda s: s.update(
        {"fc.bias": s["fc.bias"].double() + 1e300}
    ),
    "fc.bias is missing": lambda s: s.pop("fc.bias"),
    "bn1.weight is missing": lambda s: s.pop("bn1.weight"),
    "extra.weight is no part of the network": lambda s: s.update({"extra.weight": torch.ones(3)}),
}


@pytest.mark.parametrize("complaint", CHANGES)
def test_what_is_not_sound_is_refused_and_named(complaint, tmp_path):
    path = altered(tmp_path / "bad.pt", CHANGES[complaint])
    with pytest.raises(RequestError, match=complaint) as caught:
        started(path)
    assert str(caught.value).startswith(f"model.weights: {path}: ")
    assert "\n" not in str(caught.value)


def test_no_code_of_a_file_is_run(tmp_path):
    """An object whose unpickling would leave a file, beside weights that are read all the same."""

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    model = trained()
    torch.save({"model": model.state_dict(), "args": Hostile()}, tmp_path / "hostile.pt")
    assert_same(model, tmp_path / "hostile.pt")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "hostile.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # where its code is run


def test_a_vit_of_another_size_says_which(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=7, img_size=64)
    torch.save(model.state_dict(), tmp_path / "vit.pt")
    hint = "they are for pictures of 64 px: set dataset.image_size=64$"
    with pytest.raises(RequestError, match=hint):
        started(tmp_path / "vit.pt", "test_vit")
    save_for_hf(model, tmp_path / "hub")
    with pytest.raises(RequestError, match=hint):
        started(tmp_path / "hub", "test_vit")
