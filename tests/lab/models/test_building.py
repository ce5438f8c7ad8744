"""Networks: heads, stems, the shared eval view, counted FLOPs."""

import copy

import pytest
import torch
from torch import nn

from conftest import BatchNormNet, make_config
from helpers import run_digits
from lab.base.errors import RequestError
from lab.config.sections import ModelConfig
from lab.models.building import count_flops, eval_view, get_model
from train_ast import Run


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet18", 64), ("resnet50", 64), ("vit_b_16", 32), ("test_resnet", 32), ("test_vit", 32)],
)
def test_head_has_the_classes_of_the_data(name, size):
    model = get_model(ModelConfig(name=name), 7, size)
    with torch.no_grad():
        assert model.eval()(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_small_stem_keeps_the_resolution():
    shapes = {}
    for small in (False, True):
        model = get_model(ModelConfig(name="resnet18", small_stem=small), 10, 32)
        model.layer1.register_forward_hook(
            lambda m, a, out, small=small: shapes.update({small: out.shape[-1]})
        )
        model.eval()(torch.zeros(1, 3, 32, 32))
    assert shapes == {False: 8, True: 32}


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        ({"name": "resnt50"}, 32, "model.name: no model 'resnt50'; did you mean"),
        ({"name": "vit_b_16"}, 30, "model.name: vit_b_16 does not take dataset.image_size=30: "),
        ({"name": "small_conv"}, 4, "model.name: small_conv does not take dataset.image_size=4: "),
        (
            {"name": "small_conv", "pretrained": True},
            32,
            "model.pretrained: there are no published weights of small_conv",
        ),
        ({"name": "small_conv", "weights": "nowhere"}, 32, "model.weights: nowhere: no such file"),
        (
            {"name": "test_resnet", "small_stem": True},
            32,
            "model.small_stem: only for resnet18 and resnet50",
        ),
    ],
)
def test_what_cannot_be_built_is_named(config, size, message):
    with pytest.raises(RequestError, match=message):
        get_model(ModelConfig(**config), 10, size)


def test_eval_view_shares_every_tensor_and_stays_in_eval_mode():
    model = BatchNormNet().train()
    view = eval_view(model)
    for mine, theirs in (
        (model.parameters(), view.parameters()),
        (model.buffers(), view.buffers()),
    ):
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
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(4 * 64, 10, bias=False)
    )
    # two a multiply-add
    convolution = 2 * 27 * 4 * 64
    linear = 2 * 256 * 10
    assert (
        count_flops(model, 8) == 2 * convolution + 3 * linear
    )  # the first layer has no input gradient


def test_a_network_that_takes_no_smaller_images_cannot_score_at_them():
    config = make_config("model.name=vit_b_16", "dataset.image_size=32", "ast.score_resolution=16")
    model = get_model(config.model, 10, 32)
    with pytest.raises(
        RequestError, match=r"ast.score_resolution: vit_b_16 at 16 px: .*Wrong image height"
    ):
        Run.build(config, model, torch.device("cpu"), planned_steps=1)


def test_flops_of_grouped_convolutions_counted_by_hand():
    """A plain convolution, a depthwise one, one of four groups and a transposed one, at 8 px."""
    layers = (
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 16, 3, padding=1, groups=4),
    )
    model = nn.Sequential(*layers, nn.ConvTranspose2d(16, 8, 2, stride=2, groups=2), nn.Flatten())
    first = 2 * 3 * 8 * 64
    depthwise = 2 * 9 * 1 * 8 * 64
    grouped = 2 * 9 * 2 * 16 * 64
    transposed = 2 * 16 * 4 * 4 * 64  # each of 16 x 64 inputs meets 2 x 2 weights of 4 outputs
    assert count_flops(model, 8) == 2 * first + 3 * (depthwise + grouped + transposed)


@pytest.mark.parametrize(
    ("name", "forward"),  # 2 FLOP a multiply-add of the forward, as published
    [
        ("resnet50", 2 * 4.09e9),
        ("mobilenetv3_small_100", 2 * 0.0565e9),
        ("resnext50_32x4d", 2 * 4.26e9),
    ],
)
def test_a_backward_takes_twice_the_flops_of_a_forward(name, forward):
    model = get_model(ModelConfig(name=name), 1000, 224)
    assert count_flops(model, 224) == pytest.approx(3 * forward, rel=0.04)


def test_flops_of_resnet50():
    assert count_flops(get_model(ModelConfig(name="resnet50"), 1000, 224), 224) == pytest.approx(
        24.3e9, rel=0.001
    )


@pytest.mark.parametrize("base_flop", ["null", "1e9"])
@pytest.mark.parametrize(
    ("name", "size", "wanted"),
    [
        ("inception_v3", 32, "; it is made for 299 px"),
        ("vgg11", 16, "; it is made for 224 px"),
        ("halonet26t", 224, "; it is made for 256 px"),
        ("crossvit_tiny_240", 224, "; it is made for 240 px"),
    ],
)
def test_a_network_that_does_not_fit_the_pictures_is_one_line(
    name, size, wanted, base_flop, tmp_path, capsys
):
    request = [
        f"model.name={name}",
        f"dataset.image_size={size}",
        f"metrics.base_flop_per_sample={base_flop}",
    ]
    assert run_digits(tmp_path, *request) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: model.name: {name} does not take dataset.image_size={size}: ")
    assert error.endswith(f"{wanted}\n")
    assert error.count("\n") == 1


def test_published_weights_for_another_size_are_one_line(tmp_path, capsys):
    assert (
        run_digits(
            tmp_path, "model.name=vit_b_16", "model.pretrained=true", "dataset.image_size=96"
        )
        == 2
    )
    error = capsys.readouterr().err
    assert error.startswith("error: model.name: vit_b_16 does not take dataset.image_size=96: ")
    assert error.endswith("; it is made for 224 px\n")


@pytest.mark.parametrize(
    "name", ["levit_128s", "efficientvit_m0", "tiny_vit_5m_224", "efficientformerv2_s0"]
)
def test_scores_come_from_the_attention_biases_of_now(name):
    """After a few steps the evaluator's logits are those of a copy put into eval mode afresh."""
    torch.manual_seed(0)
    size = 32 if name == "levit_128s" else 64
    model = get_model(ModelConfig(name=name), 10, size)
    view = eval_view(model.train())
    images = torch.rand(4, 3, size, size)
    biases = [p for name, p in model.named_parameters() if name.endswith("attention_biases")]
    with torch.no_grad():
        view(images)
        for bias in biases:
            bias.add_(torch.randn(bias.shape))  # what training steps do
    model(images).sum().backward()
    fresh = copy.deepcopy(model).eval()
    with torch.no_grad():
        assert torch.equal(view(images), fresh(images))
    assert biases
