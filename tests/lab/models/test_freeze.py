"""A linear probe: the head alone learns, on the features of trained weights."""

import pytest
import torch
from safetensors.torch import load_file

from conftest import make_config
from lab.base.errors import RequestError
from lab.config.loading import checkpoint_folder
from train_ast import train

SMALL = ["dataset.image_size=16", "training.epochs=2", "ast.warmup_epochs=1"]
SMALL += ["dataset.max_train_samples=128", "dataset.max_val_samples=64", "training.lr=0.02"]


def weights_after(config):
    train(config)
    folder = checkpoint_folder(config) / "weights"
    return folder, load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_frozen_trunk_stays_as_it_was(name, tmp_path):
    side = ["dataset.image_size=32"] if name != "test_resnet" else []
    base = [f"model.name={name}", *SMALL, *side, f"logging.output_dir={tmp_path}"]
    folder, before = weights_after(make_config(*base))
    probe = [f"model.weights={folder}", "model.freeze=true", "training.weight_average=0.5"]
    _, after = weights_after(make_config(*base, *probe, "training.seed=1"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    head = {"test_resnet": "fc", "test_vit": "head"}[name]
    assert changed == {f"{head}.weight", f"{head}.bias"}


def test_a_probe_costs_no_backward_of_its_trunk_and_goes_on_after_an_end(tmp_path):
    base = ["model.name=test_resnet", *SMALL, f"logging.output_dir={tmp_path}"]
    base[1:1] = ["metrics.base_flop_per_sample=null"]
    full, _ = train(make_config(*base))
    folder = checkpoint_folder(make_config(*base)) / "weights"
    config = make_config(*base, f"model.weights={folder}", "model.freeze=true")
    probe, _ = train(config)
    again, _ = train(config, resume="auto")
    assert again["training_history"]["train_loss"] == probe["training_history"]["train_loss"]
    assert probe["base_flop_per_sample"] < 0.4 * full["base_flop_per_sample"]


def test_a_network_without_a_known_head_is_named(tmp_path):
    base = ["model.name=small_conv", *SMALL, f"logging.output_dir={tmp_path}"]
    folder, _ = weights_after(make_config(*base))
    with pytest.raises(RequestError, match="model.freeze: small_conv does not say which part of"):
        train(make_config(*base, f"model.weights={folder}", "model.freeze=true"))
