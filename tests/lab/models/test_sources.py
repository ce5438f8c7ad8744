"""timm's names of folders and of repositories on the hub: network, weights and preparation."""

import shutil

import pytest
import timm
import torch
from huggingface_hub import constants
from timm.models._hub import save_for_hf

from conftest import make_config
from lab.base.errors import RequestError
from lab.models.building import get_model
from lab.models.sources import resolved
from train_ast import train

NAME = "somebody/small"


@pytest.fixture
def saved(tmp_path):
    """A folder as timm writes it: (its path, the network)."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10, global_pool="max")
    save_for_hf(model, tmp_path / "saved", model_config={"label_names": list("abcdefghij")})
    return tmp_path / "saved", model


def in_cache(folder, tmp_path, monkeypatch):
    """The folder as the hub's library keeps it after a download, without a network."""
    place = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, place / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("kind", ["local-dir", "hf-hub"])
def test_a_source_is_network_and_weights(kind, saved, tmp_path, monkeypatch, capsys):
    folder, model = saved
    in_cache(folder, tmp_path, monkeypatch)
    name = f"local-dir:{folder}" if kind == "local-dir" else f"hf-hub:{NAME}"
    config = make_config(f"model.name={name}", "model.pretrained=true")
    found = get_model(config.model, 10, 160)
    assert f"model.name: {92} tensors of " in capsys.readouterr().out
    images = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(found.eval()(images), model.eval()(images))
    other = get_model(config.model, 3, 160)
    assert other.fc.out_features == 3
    assert torch.equal(other.conv1[0].weight, model.conv1[0].weight)


def test_a_run_from_a_folder_is_normalised_as_it_says(saved, tmp_path):
    folder, _ = saved
    more = ["training.epochs=1", "ast.mode=dense", "dataset.max_train_samples=64"]
    more += ["dataset.image_size=16", "dataset.max_val_samples=32"]
    config = make_config(
        f"model.name=local-dir:{folder}",
        "model.pretrained=true",
        "model.freeze=true",
        *more,
        f"logging.output_dir={tmp_path}/out",
    )
    result, path = train(config)
    assert result["config"]["model"]["name"] == f"local-dir:{folder}"
    facts = (path.parent / result["weights"] / "config.json").read_text()
    assert '"architecture": "test_resnet"' in facts
    assert '"global_pool": "max"' in facts
    assert resolved(config.model).weights == str(folder)


def test_what_is_no_source_is_named(saved, tmp_path, monkeypatch):
    folder, _ = saved
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "config.json").unlink()
    for name, pretrained, complaint in (
        (f"local-dir:{folder}", False, "names weights, which model.pretrained=true starts from"),
        (f"local-dir:{tmp_path}/no", True, "no such file; expected a weights folder"),
        (f"local-dir:{bare}", True, "no config.json beside the weights"),
        ("hf-hub:nobody/nothing", True, "no weights of hf-hub:nobody/nothing: "),
        ("gs:nothing", True, "no model 'gs:nothing'"),
    ):
        config = make_config(f"model.name={name}", f"model.pretrained={str(pretrained).lower()}")
        with pytest.raises(RequestError) as caught:
            get_model(config.model, 10, 16)
        assert str(caught.value).startswith("model.name: ")
        assert complaint in str(caught.value)
        assert "\n" not in str(caught.value)
