"""Networks: heads, stems, the shared eval view, counted FLOPs."""

import pytest
import torch
from torch import nn

from conftest import BatchNormNet, make_config
from lab.config import ModelConfig
from lab.errors import RequestError
from lab.models import count_flops, eval_view, get_model
from train_ast import Run


@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", 64), ("resnet50", 64), ("vit_b_16", 32), ("test_resnet", 32), ("test_vit", 32)]
)
def test_head_has_the_classes_of_the_data(name, size):
    model = get_model(ModelConfig(name=name), 7, size)
    with torch.no_grad():
        assert model.eval()(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_small_stem_keeps_the_resolution():
    shapes = {}
    for small in (False, True):
        model = get_model(ModelConfig(name="resnet18", small_stem=small), 10, 32)
        model.layer1.register_forward_hook(lambda m, a, out, small=small: shapes.update({small: out.shape[-1]}))
        model.eval()(torch.zeros(1, 3, 32, 32))
    assert shapes == {False: 8, True: 32}


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        ({"name": "resnt50"}, 32, "model.name: no model 'resnt50'; did you mean"),
        ({"name": "vit_b_16"}, 30, "model.name: vit_b_16 at 30 px"),
        ({"name": "test_resnet", "small_stem": True}, 32, "model.small_stem: only for resnet18 and resnet50"),
    ],
)
def test_what_cannot_be_built_is_named(config, size, message):
    with pytest.raises(RequestError, match=message):
        get_model(ModelConfig(**config), 10, size)


def test_eval_view_shares_every_tensor_and_stays_in_eval_mode():
    model = BatchNormNet().train()
    view = eval_view(model)
    for mine, theirs in ((model.parameters(), view.parameters()), (model.buffers(), view.buffers())):
        assert [id(tensor) for tensor in mine] == [id(tensor) for tensor in theirs]
    assert model.training
    assert not view.training
    assert not any(module.training for module in view.modules())
    with torch.no_grad():
        model.head.bias.fill_(3.0)
        model(torch.rand(4, 3, 8, 8))  # train mode: moves the running statistics both share
    assert torch.equal(view.head.bias, model.head.bias)
    assert torch.equal(view.body[1].running_var, model.body[1].running_var)


def test_flops_of_a_network_counted_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(4 * 64, 10, bias=False))
    convolution, linear = 2 * 27 * 4 * 64, 2 * 256 * 10  # two a multiply-add
    assert count_flops(model, 8) == 2 * convolution + 3 * linear  # the first layer has no input gradient


def test_a_network_that_takes_no_smaller_images_cannot_score_at_them():
    config = make_config("model.name=vit_b_16", "dataset.image_size=32", "ast.score_resolution=16")
    model = get_model(config.model, 10, 32)
    with pytest.raises(RequestError, match=r"ast.score_resolution: vit_b_16 at 16 px: .*Wrong image height"):
        Run.build(config, model, torch.device("cpu"), planned_steps=1)
