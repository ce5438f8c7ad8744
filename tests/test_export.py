"""Networks as files that other programs run: the same logits, names and preparation beside them."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import export
from helpers import folder_config
from lab.base.errors import TrainingFailed
from lab.config.loading import checkpoint_folder
from lab.models.building import build_model, building_arguments
from lab.models.weights import WeightsFolder, describe, head_names
from lab.outputs import export as exporting
from lab.outputs.predictions import guesses
from lab.outputs.trained import folder_settings, load_trained
from lab.study.cli import run_cli
from lab.study.finding import Found
from train_ast import load_config, train


def needs(*names):
    for name in names:
        pytest.importorskip(name, reason=f"the optional package {name} is not there")


def exported(capsys, *arguments):
    """(exit code, stdout, stderr) of the command, in this process."""
    capsys.readouterr()
    code = run_cli(lambda: export.main([str(each) for each in arguments]))
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


@pytest.fixture
def run(image_folder, tmp_path):
    """A run on a folder of pictures: its output folder, its weights."""
    small = ["model.name=test_resnet", "training.epochs=2", "ast.mode=dense", "training.lr=0.02"]
    small += ["training.num_workers=0", "dataset.augment=none"]
    config = folder_config(image_folder, *small, f"logging.output_dir={tmp_path}/out")
    train(config)
    return tmp_path / "out", checkpoint_folder(config) / "weights"


def shown(path, side):
    """A picture as the metadata says, squash 1: the whole of it, made square. By PIL."""
    with Image.open(path) as image:
        small = image.convert("RGB").resize((side, side), Image.BILINEAR)
    return np.asarray(small, dtype=np.float32).transpose(2, 0, 1)[None] / 255


def test_an_onnx_file_gives_the_same_classes_in_onnxruntime(run, image_folder, tmp_path, capsys):
    """By another program, which knows nothing but the file."""
    needs("onnx", "onnxscript", "onnxruntime")
    import onnxruntime

    file = tmp_path / "new" / "model.onnx"
    code, out, err = exported(capsys, "--weights", run[0] / "latest", "--output", file)
    assert (code, err) == (0, "")
    assert "checked    on 8 pictures, one by one and together: logits of up to " in out
    session = onnxruntime.InferenceSession(file)
    facts = session.get_modelmeta().custom_metadata_map
    classes = json.loads(facts["class_names"])
    prepared = json.loads(facts["preprocessing"])
    assert classes == ["blue", "green", "red"]
    assert (prepared["crop_mode"], prepared["crop_pct"]) == ("squash", 1)
    paths = sorted((image_folder / "val").rglob("*.jpg"))
    trained = load_trained(str(run[1]), settings_of(run[1]), torch.device("cpu"), True)
    for path in paths:
        (logits,) = session.run(None, {"images": shown(path, prepared["size"])})
        own = next(guesses(trained, [path], 1))
        assert classes[logits.argmax()] == own.classes[0][0]
        np.testing.assert_allclose(logits[0], own.logits, atol=0.05)
    batch = np.concatenate([shown(path, 32) for path in paths])
    assert session.run(None, {"images": batch})[0].shape == (9, 3)


def settings_of(weights):
    return load_config(None, (), json.dumps(folder_settings(str(weights))))


def test_a_program_of_torch_export_comes_back_with_its_names(run, image_folder, tmp_path, capsys):
    file = tmp_path / "model.pt2"
    place = ["--weights", run[1], "--output", file]
    code, out, err = exported(capsys, *place, "--images", image_folder / "val" / "red")
    assert (code, err) == (0, "")
    assert "on 3 pictures" in out
    facts = dict.fromkeys(["class_names", "preprocessing", "architecture"], "")
    module = torch.export.load(file, extra_files=facts).module()
    assert json.loads(facts["class_names"]) == ["blue", "green", "red"]
    assert facts["architecture"] == "test_resnet"
    with torch.no_grad():
        for batch in (1, 5):
            assert module(torch.rand(batch, 3, 32, 32)).shape == (batch, 3)


def test_a_missing_package_is_named(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, out, err = exported(capsys, "--weights", run[1], "--output", tmp_path / "m.onnx")
    assert (code, out) == (2, "")
    assert err == (
        "error: --output: a .onnx file needs packages that are not there: "
        "pip install onnx onnxscript\n"
    )
    assert not (tmp_path / "m.onnx").exists()


class Looker(torch.nn.Module):
    """A network whose way depends on what it sees."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images) if images.sum() > 0 else self.model(-images)


def test_a_network_that_cannot_be_traced_is_named_and_nothing_is_written(
    run, tmp_path, capsys, monkeypatch
):
    load = export.load

    def looking(*given):
        trained = load(*given)
        trained.network.model = Looker(trained.network.model)
        return trained

    monkeypatch.setattr(export, "load", looking)
    code, out, err = exported(capsys, "--weights", run[1], "--output", tmp_path / "m.pt2")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: --weights: test_resnet cannot be traced by torch.export: ")
    assert not list(tmp_path.glob("m.pt2*"))


def test_a_file_that_computes_something_else_is_not_written(run, image_folder, capsys):
    trained = export.load(Found(str(run[1])))
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    right = exporting.WithNormalisation(trained)
    found = exporting.compared(trained, images, right)
    assert 0 <= found.largest < 1e-4 * found.of
    for wrong in (
        lambda pixels: right(pixels) + 0.1,
        lambda pixels: right(pixels.flip(1)),
        lambda pixels: right(pixels) * float("nan"),
        lambda pixels: right(pixels) + 0.1 * (len(pixels) == 1),
        lambda pixels: right(pixels) * (1 + 2e-3),
    ):
        with pytest.raises(TrainingFailed, match="the exported network differs from the trained"):
            exporting.compared(trained, images, wrong)


def test_wrong_requests_are_one_line(run, image_folder, tmp_path, capsys):
    weights = ["--weights", run[1]]
    file = ["--output", tmp_path / "m.pt2"]
    (tmp_path / "bad.png").write_bytes(b"none")
    for options, complaint in (
        ([*weights, "--output", "m.pkl"], "--output: m.pkl: its name ends in none of .onnx, .pt2"),
        ([*weights, *file, "--images", tmp_path / "no.png"], "no such file or folder"),
        ([*weights, *file, "--images", tmp_path / "bad.png"], "bad.png: not a readable image"),
        ([*weights, "--output", "/proc/no/m.pt2"], "--output: cannot write to /proc/no/m.pt2"),
        (["--weights", tmp_path / "no", *file], "--weights: "),
        ([*weights, *file, f"dataset.val_dir={tmp_path}/no"], "dataset.val_dir: "),
    ):
        code, out, err = exported(capsys, *options)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert complaint in err
    assert not list(tmp_path.glob("m.p*"))


FAMILIES = {  # by name, the side of the pictures, pixels
    "resnet18": 64,
    "resnet50": 64,
    "vit_b_16": 64,
    "convnext_atto": 64,
    "swin_tiny_patch4_window7_224": 224,
    "efficientnet_b0": 64,
    "mobilenetv3_small_050": 64,
    "mixer_s32_224": 224,
}


def weights_of(name, side, folder):
    """A weights folder of a network that starts at random, its BatchNorm's averages moved and its
    head large enough to tell pictures apart.
    """
    config = load_config(None, [f"model.name={name}", f"dataset.image_size={side}"])
    torch.manual_seed(0)
    model = build_model(config.model, 5, side)
    with torch.no_grad():
        model.train()(torch.rand(4, 3, side, side))
        for key in head_names(model):
            model.get_parameter(key).normal_(std=0.5)
    moments = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    arguments = building_arguments(config.model, side)
    names = ["a", "b", "c", "d", "e"]
    facts = describe(config.model, config.dataset, model, names, moments, arguments)
    folder.parent.mkdir(parents=True, exist_ok=True)
    WeightsFolder(folder, facts).write(model.state_dict(), {})
    return folder


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("test_vit", ".onnx"),
        *(
            pytest.param(name, form, marks=pytest.mark.long)
            for name in FAMILIES
            for form in exporting.FORMS
        ),
    ],
)
def test_every_family_of_networks_is_exported(name, form, tmp_path, capsys, image_folder):
    if form == ".onnx":
        needs("onnx", "onnxscript", "onnxruntime")
    weights = weights_of(name, FAMILIES.get(name, 32), tmp_path / "weights")
    place = ["--weights", weights, "--output", tmp_path / f"m{form}"]
    code, out, err = exported(capsys, *place, "--images", image_folder / "val")
    assert (code, err) == (0, "")
    print(f"{name} {form}: {out.splitlines()[-1]}")
