"""Weights written for others, weights to start from, and what is refused of them."""

import copy
import json

import pytest
import safetensors
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.io import read_image

from conftest import make_config
from helpers import folder_config, pictures
from lab.base.errors import RequestError
from lab.config.loading import checkpoint_folder, run_id
from lab.data.images import Augmentation
from lab.engine.checkpoint import host_copy
from lab.machine.distributed import Dist
from lab.models.building import get_model, synchronised
from lab.models.network import Network
from lab.models.weights import WeightsFolder, input_moments
from lab.outputs.card import BY_TORCHVISION
from train_ast import train

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
    """A network with random weights and statistics, written as a run writes its best; its logits
    for some pictures.
    """
    config = make_config(f"model.name={name}", f"dataset.image_size={side}", *more)
    torch.manual_seed(1)
    model = get_model(config.model, len(NAMES), side)
    for tensor in model.state_dict().values():
        if tensor.ndim == 1 and tensor.is_floating_point():
            tensor += 0.1 * torch.rand_like(
                tensor
            )  # biases, scales and running statistics, no longer 0 and 1
    network = Network(model, config, None, CPU, Dist())
    folder.mkdir(exist_ok=True)
    WeightsFolder(folder / "weights", network.describe(NAMES)).write(
        host_copy(model.state_dict()), {"epoch": 3}
    )
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
        assert file.metadata().keys() == {"format", "epoch", "description"}
        assert file.metadata()["epoch"] == "3"


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_timm_reads_its_families(name, tmp_path):
    network, folder = exported(tmp_path, name, FAMILIES[name])
    assert same_logits(
        network, timm.create_model(f"local-dir:{folder}", pretrained=True), FAMILIES[name]
    )


TORCHVISION = {
    "resnet18": ("resnet18", []),
    "small stem": ("resnet18", ["model.small_stem=true"]),
    "vit_b_16": ("vit_b_16", []),
}


@pytest.mark.parametrize(
    "kind", ["resnet18", "small stem", pytest.param("vit_b_16", marks=pytest.mark.long)]
)
def test_the_lines_of_the_model_card_read_torchvisions(kind, tmp_path):
    name, more = TORCHVISION[kind]
    network, folder = exported(tmp_path, name, 32, *more)
    known = {"json": json, "torch": torch, "torchvision": torchvision, "safetensors": safetensors}
    exec(BY_TORCHVISION.replace("FOLDER", str(folder)), known)
    assert same_logits(network, known["model"], 32)
    if kind == "resnet18":
        assert same_logits(network, timm.create_model(f"local-dir:{folder}", pretrained=True), 32)


def test_a_synchronised_and_channels_last_network_has_the_plain_names(tmp_path):
    network, folder = exported(tmp_path, "test_efficientnet", 32)
    twin = synchronised(copy.deepcopy(network.model)).to(memory_format=torch.channels_last)
    WeightsFolder(folder, network.describe(NAMES)).write(host_copy(twin.state_dict()), {})
    assert same_logits(network, timm.create_model(f"local-dir:{folder}", pretrained=True), 32)


def test_weights_never_lie_beside_the_facts_of_another_run(tmp_path, monkeypatch):
    """The classes have changed since the last run: at no time are old weights beside new names."""
    network, folder = exported(tmp_path, "test_resnet", 32)
    state = network.model.state_dict()
    seen = []
    real = WeightsFolder.write.__globals__["replace_text"]

    def watched(path, text):
        seen.append(sorted(each.name for each in folder.iterdir()))
        real(path, text)

    monkeypatch.setitem(WeightsFolder.write.__globals__, "replace_text", watched)
    again = WeightsFolder(folder, network.describe(NAMES))
    again.write(state, {})
    assert seen == []  # the facts are the same: only the weights are replaced
    WeightsFolder(folder, network.describe(["x", *NAMES[1:]])).write(state, {})
    assert seen == [["config.json"]]


def test_crops_are_described_as_they_are_made(tmp_path):
    """A picture as the lab validates it, and as timm prepares it by the folder's config."""
    network, folder = exported(tmp_path, "test_resnet", 96, "dataset.augment=random_resized_crop")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    picture = pictures(1, 200)[0][:, :150]
    (own,) = Augmentation(network.dataset, train=False)(
        [picture], torch.zeros(1, 23, dtype=torch.float64)
    )
    theirs = prepare(Image.fromarray(picture.permute(1, 2, 0).numpy()))
    assert (network.normalise(own[None])[0] - theirs).abs().mean() < 0.02


# --------------------------------------------------------------------------------------- Weights in

SMALL = [
    "model.name=test_resnet",
    "dataset.image_size=16",
    "training.batch_size=64",
    "training.optimizer=adamw",
]
SMALL += ["training.lr=0.003", "training.epochs=2", "ast.mode=dense", "dataset.max_val_samples=64"]
SMALL += ["dataset.max_train_samples=128"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run on digits: (its config, its result)."""
    config = make_config(*SMALL, f"logging.output_dir={tmp_path_factory.mktemp('digits')}")
    return config, train(config)[0]


def folder_of(config):
    return checkpoint_folder(config) / "weights"


def start(path, *more, classes=10):
    """A network that starts from a path, in the state in which training would begin."""
    config = make_config(
        "model.name=test_resnet", "dataset.image_size=16", f"model.weights={path}", *more
    )
    return get_model(config.model, classes, 16)


def test_a_run_starts_from_a_folder_a_file_or_a_state_dict(digits, tmp_path, capsys):
    config, _ = digits
    folder = folder_of(config)
    expected = load_file(folder / "model.safetensors")
    torch.save(
        {f"module.{name}": tensor for name, tensor in expected.items()}, tmp_path / "plain.pt"
    )
    save_file(expected, tmp_path / "alone.safetensors")
    best = checkpoint_folder(config) / "best.pt"
    for path in (
        folder,
        folder / "model.safetensors",
        tmp_path / "alone.safetensors",
        tmp_path / "plain.pt",
        best,
    ):
        state = start(path).state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
        out = capsys.readouterr().out
        assert out.startswith(f"model.weights: {len(expected)} tensors of ")
        assert "not loaded" not in out


def test_the_best_epoch_is_what_was_written(digits):
    config, result = digits
    assert result["weights"] == str(folder_of(config).relative_to(config.logging.output_dir))
    with safetensors.safe_open(folder_of(config) / "model.safetensors", "pt") as file:
        assert file.metadata()["epoch"] == str(result["best_epoch"])
    state = torch.load(checkpoint_folder(config) / "best.pt", weights_only=True)["model"]
    assert all(
        torch.equal(state[k], t)
        for k, t in load_file(folder_of(config) / "model.safetensors").items()
    )


def test_the_head_is_new_where_the_classes_are_others_in_number(digits, capsys):
    config, _ = digits
    model = start(folder_of(config), classes=3)
    out = capsys.readouterr().out
    assert out.endswith(
        "; not loaded: fc.weight, fc.bias: the head is new, for another number of classes\n"
    )
    assert model.fc.weight.shape[0] == 3
    expected = load_file(folder_of(config) / "model.safetensors")
    state = model.state_dict()
    assert all(
        torch.equal(state[name], tensor)
        for name, tensor in expected.items()
        if not name.startswith("fc.")
    )


def test_where_a_run_starts_is_part_of_which_run_it_is(digits):
    assert run_id(make_config(*SMALL, f"model.weights={folder_of(digits[0])}")) != run_id(
        make_config(*SMALL)
    )


def test_what_cannot_be_loaded_is_one_line(digits, tmp_path):
    folder = folder_of(digits[0])
    (tmp_path / "torn.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04 and so on")
    torch.save({"model": {"a": 1}}, tmp_path / "numbers.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")  # a pickle that would run code
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("[1]")
    (tmp_path / "odd" / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()
    )
    cases = {
        tmp_path / "missing": "no such file",
        tmp_path: "no such file",
        tmp_path / "torn.safetensors": "damaged, or no safetensors file",
        tmp_path / "torn.pt": "damaged",
        tmp_path / "numbers.pt": "no state_dict",
        tmp_path / "module.pt": "holds more than tensors",
        tmp_path / "odd": "no description of weights",
    }
    for path, complaint in cases.items():
        with pytest.raises(RequestError, match=rf"^model\.weights: .*{complaint}"):
            start(path)
    with pytest.raises(
        RequestError,
        match=r"not of model\.name=resnet18: they are of test_resnet; .* \(and \d+ more\)$",
    ):
        start(folder, "model.name=resnet18")
    with pytest.raises(RequestError, match=r"model\.weights: with model\.pretrained=true"):
        make_config(f"model.weights={folder}", "model.pretrained=true")


# ------------------------------------------------------------------------------------ Normalisation


def moments(*overrides):
    config = make_config("dataset.image_size=32", *overrides)
    model = get_model(config.model, 10, 32)
    return input_moments(config.model, model)["mean"]


def test_weights_bring_their_normalisation_along(tmp_path):
    network, folder = exported(tmp_path, "test_efficientnet", 32)
    facts = json.loads((folder / "config.json").read_text())
    facts["pretrained_cfg"]["mean"] = [0.1, 0.2, 0.3]
    (folder / "config.json").write_text(json.dumps(facts))
    config = make_config("model.name=test_efficientnet", f"model.weights={folder}")
    assert input_moments(config.model, network.model)["mean"] == (0.1, 0.2, 0.3)
    for name in (
        "test_vit",
        "resnet18",
    ):  # random weights do not take what is published with test_vit's name
        assert moments(f"model.name={name}") == (0.485, 0.456, 0.406)
    with pytest.raises(RequestError, match=r"dataset\.normalise: measured is for random weights"):
        make_config(f"model.weights={folder}", "dataset.normalise=measured")


def test_measured_is_of_the_training_pictures(tmp_path, image_folder):
    """The moments are those of the pixels, the run trains with them, and they go into the
    folder.
    """
    means = [
        read_image(str(path)).double().mean((1, 2)) / 255
        for path in sorted(image_folder.glob("train/*/*.jpg"))
    ]
    tiny = [
        "model.name=test_resnet",
        "training.epochs=1",
        "ast.mode=dense",
        f"logging.output_dir={tmp_path}",
    ]
    config = folder_config(
        image_folder, *tiny, "dataset.normalise=measured", "training.num_workers=0"
    )
    train(config)
    written = json.loads((folder_of(config) / "config.json").read_text())["pretrained_cfg"]
    assert written["mean"] == pytest.approx(torch.stack(means).mean(0).tolist(), abs=1e-4)
