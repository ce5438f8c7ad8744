"""Weights written for others, weights to start from, and what is refused of them."""

import pytest
import safetensors
import timm
import torch

from conftest import make_config
from lab.models import get_model
from lab.network import Network
from lab.runtime.checkpoint import host_copy
from lab.runtime.distributed import Dist
from lab.weights import WeightsFolder

CPU = torch.device("cpu")
NAMES = [str(number) for number in range(7)]
FAMILIES = {  # of different families, each at a size that is quick on a CPU
    "convnext_atto": 64,
    "deit_tiny_distilled_patch16_224": 64,
    "densenet121": 64,
    "dla34": 64,
    "efficientformerv2_s0": 224,
    "efficientnet_b0": 64,
    "ghostnet_050": 64,
    "hrnet_w18_small": 64,
    "levit_128s": 224,
    "mixer_s32_224": 64,
    "mobilenetv3_small_050": 64,
    "mobilevit_xxs": 64,
    "poolformer_s12": 64,
    "regnetx_002": 64,
    "repvgg_a0": 64,
    "resnet18.a1_in1k": 64,
    "swin_tiny_patch4_window7_224": 64,
    "vgg11_bn": 64,
    "vit_tiny_patch16_224.augreg_in21k": 64,
    "xcit_nano_12_p16_224": 64,
}


def exported(folder, name, side, *more):
    """A network with random weights and statistics, written as a run writes its best; its logits for some pictures."""
    config = make_config(f"model.name={name}", f"dataset.image_size={side}", *more)
    torch.manual_seed(1)
    model = get_model(config.model, len(NAMES), side)
    for tensor in model.state_dict().values():
        if tensor.ndim == 1 and tensor.is_floating_point():
            tensor += 0.1 * torch.rand_like(tensor)  # biases, scales and running statistics, no longer 0 and 1
    network = Network(model, config, None, CPU, Dist())
    folder.mkdir(exist_ok=True)
    WeightsFolder(folder / "weights", network.describe(NAMES)).write(host_copy(model.state_dict()), {"epoch": 3})
    return network, folder / "weights"


def same_logits(network, other, side):
    pictures = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    model = network.model.eval()
    with torch.no_grad():
        inputs = network.normalise(pictures)
        return torch.equal(model(inputs), other.eval()(inputs)) and model(inputs).std() > 0


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_timm_reads_them_by_itself(name, tmp_path):
    """With equal logits, the class names, and the pictures prepared as the lab validates."""
    network, folder = exported(tmp_path, name, 32)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert same_logits(network, model, 32)
    assert model.pretrained_cfg["label_names"] == NAMES
    ready = timm.data.resolve_model_data_config(model)
    assert (list(ready["input_size"]), ready["interpolation"]) == ([3, 32, 32], "bilinear")
    assert (ready["crop_pct"], ready["crop_mode"]) == (1.0, "squash")
    assert tuple(ready["mean"]) == network.moments["mean"]
    assert tuple(ready["std"]) == network.moments["std"]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "epoch": "3"}


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_timm_reads_its_families(name, tmp_path):
    network, folder = exported(tmp_path, name, FAMILIES[name])
    assert same_logits(network, timm.create_model(f"local-dir:{folder}", pretrained=True), FAMILIES[name])
