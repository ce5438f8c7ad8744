"""Networks by name, and what shapes alone tell of them."""

from __future__ import annotations

import contextlib
import copy
import difflib
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any

import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from lab.base.console import print_rank0
from lab.base.errors import RequestError, one_line
from lab.base.hub import no_endless_wait, quick_hub
from lab.config.sections import ModelConfig
from lab.config.tables import Table
from lab.models.sources import resolved
from lab.models.weights import find_weights, head_names, heads_of, how_to_import, load_weights

TORCHVISION_MODELS = ("resnet18", "resnet50", "vit_b_16")


# Networks that this process has built and tried: a tenth of a second for each of the short runs of
# a sweep in one process.
FITTING: set[tuple[Any, ...]] = set()


def get_model(config: ModelConfig, num_classes: int, image_size: int) -> nn.Module:
    """Build the network with a head for `num_classes`, with the weights that it starts from.

    Raises RequestError as `build_model` does, and for weights that do not fit.
    """
    key = "model.weights" if config.weights is not None else "model.name"
    config = resolved(config)
    model = build_model(config, num_classes, image_size)
    if config.weights is not None:
        print_rank0(load_weights(model, config, image_size, key).line)
    return model


def build_model(config: ModelConfig, num_classes: int, image_size: int) -> nn.Module:
    """Build the network with a head for `num_classes`, and with what else the description of its
    weights says.

    Raises RequestError for an unknown name, an image size the network cannot take (tried on shapes
    alone), weights that cannot be fetched, and a small stem on anything but a torchvision ResNet.
    """
    if config.small_stem and config.name not in ("resnet18", "resnet50"):
        raise RequestError(
            f"model.small_stem: only for resnet18 and resnet50, not for {config.name}"
        )
    if config.pretrained and config.name in MODELS and config.name not in TORCHVISION_MODELS:
        raise RequestError(f"model.pretrained: there are no published weights of {config.name}")
    arguments = building_arguments(config, image_size)
    plain = arguments.keys() <= {"image_size"}
    build = MODELS.get(config.name) if plain else None
    try:
        with no_endless_wait():
            if build is None:
                model = _timm_model(config, num_classes, **arguments)
            else:
                model = build(config, num_classes, image_size)
    except OSError as error:  # URLError and the hub's errors are OSErrors
        if build is not None and not config.pretrained:
            raise RequestError(_misfit(config, image_size, error)) from None
        hint = "check the network or set model.pretrained=false"
        raise RequestError(
            f"model.pretrained: no weights of {config.name}: {one_line(error)}; {hint}"
        ) from None
    except RequestError:
        raise
    except Exception as error:  # a network may raise anything on what it was not written for
        raise RequestError(_misfit(config, image_size, error)) from None
    tried = config.model_dump_json(), image_size, repr(arguments), build
    if tried in FITTING:
        return model
    try:
        forward_shapes(model, image_size)
    except Exception as error:  # a layer may raise anything on a size that it was not written for
        raise RequestError(_misfit(config, image_size, error)) from None
    FITTING.add(tried)
    return model


def building_arguments(config: ModelConfig, image_size: int) -> dict[str, Any]:
    """What a network is built with beside its number of classes: what its weights were built with,
    where their description says so, and the side of its pictures, pixels, where it takes one size
    alone.
    """
    arguments = {}
    if config.weights is not None:
        description = find_weights(config.weights, of=config.name).description
        if description is not None and description.name == config.name.partition(".")[0]:
            arguments = description.arguments()
    if config.name == "vit_b_16":
        return {**arguments, "image_size": image_size}
    if config.name in MODELS and not arguments:
        return {}
    import timm  # a second to import, so only where it is needed

    published = timm.get_pretrained_cfg(config.name)
    if "img_size" in arguments or (published and published.fixed_input_size):
        arguments["img_size"] = image_size
    return arguments


def _misfit(config: ModelConfig, image_size: int, error: Exception) -> str:
    """Why a network cannot be had for pictures of a size, and which size it is made for, where that
    is known.
    """
    size = made_for(config)
    hint = "" if size in (None, image_size) else f"; it is made for {size} px"
    return (
        f"model.name: {config.name} does not take dataset.image_size={image_size}: "
        f"{one_line(error)[:200]}{hint}"
    )


def made_for(config: ModelConfig) -> int | None:
    """The side of the pictures that a network's published weights were trained on, pixels; None
    where nobody says.
    """
    if config.name in TORCHVISION_MODELS:
        weights = torchvision.models.get_model_weights(config.name).DEFAULT
        return weights.transforms().crop_size[0] if config.name == "vit_b_16" else None
    import timm

    published = timm.get_pretrained_cfg(config.name, allow_unregistered=True)
    return published.input_size[-1] if published is not None else None


def torchvision_model(config: ModelConfig, num_classes: int, image_size: int) -> nn.Module:
    """The network of the `model` section with a head for `num_classes`, for pictures float32
    [batch, 3, image_size, image_size] that are normalised; its weights are drawn by torch's seed.
    """
    is_vit = config.name == "vit_b_16"
    size = {"image_size": image_size} if is_vit else {}
    model = torchvision.models.get_model(
        config.name, weights="DEFAULT" if config.pretrained else None, **size
    )
    if is_vit:
        model.heads.head = nn.Linear(model.heads.head.in_features, num_classes)
        return model
    model.fc = nn.Linear(model.fc.in_features, num_classes)
    if config.small_stem:  # He et al. 2016, section 4.2: CIFAR-sized images keep their resolution
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    return model


def small_conv(
    config: ModelConfig, num_classes: int, image_size: int, width: int = 40
) -> nn.Module:
    """A network of our own, to score for larger ones: four 3x3 convolutions with BatchNorm, for
    pictures from 8 px on.

    At 32 px it has 3.6 % of the FLOP of a ResNet-18 with a small stem. It has no published weights.
    """

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]

    widths = [3, width, 2 * width, 4 * width, 4 * width]
    layers = []
    for inputs, outputs in pairwise(widths):
        layers += [*block(inputs, outputs), nn.MaxPool2d(2)]
    layers[-1] = nn.AdaptiveMaxPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1], num_classes))


def _timm_model(config: ModelConfig, num_classes: int, **arguments: Any) -> nn.Module:
    import timm

    if not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name, [*timm.list_models(), *MODELS], 1, 0.0)
        raise RequestError(
            f"model.name: no model {config.name!r}; did you mean {near[0]}?{_own_code(config)}"
        )
    with quick_hub() if config.pretrained else contextlib.nullcontext():
        return timm.create_model(
            config.name, pretrained=config.pretrained, num_classes=num_classes, **arguments
        )


def _own_code(config: ModelConfig) -> str:
    """How to name the code that lies beside weights, where there is some: it is not run by
    itself.
    """
    if config.weights is None:
        return ""
    source = find_weights(config.weights)
    imports = source.description.imports if source.description else []
    return how_to_import(imports, source.path.parent) if imports else ""


def is_timm_model(name: str) -> bool:
    import timm

    return timm.is_model(name)


MODELS = Table(
    "model.name",
    torchvision_model,
    {**dict.fromkeys(TORCHVISION_MODELS, torchvision_model), "small_conv": small_conv},
    taken=is_timm_model,
)  # the others are timm's, where its own `register_model` adds to them


def eval_view(model: nn.Module, batch_statistics: bool = False) -> nn.Module:
    """A second module tree over the same parameters and buffers, in eval mode.

    Scoring then neither toggles the mode nor copies weights. What modules compute from weights once
    for all of eval mode, and forget in `train`, is forgotten before every forward: here the weights
    change without a change of mode. batch_statistics: BatchNorm normalises by the batch at hand,
    and its running averages are left alone.
    """
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    view = copy.deepcopy(model, shared).eval()
    for module in view.modules():
        if batch_statistics and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean = module.running_var = None
        if hasattr(
            module, "attention_bias_cache"
        ):  # timm: LeViT, EfficientFormer, EfficientViT, TinyViT
            module.register_forward_pre_hook(_forget_biases)
    return view


def _forget_biases(module: nn.Module, _: Any) -> None:
    module.attention_bias_cache = {}


def freeze_trunk(model: nn.Module, name: str) -> None:
    """Leave gradients to the head alone. Raises RequestError where the network does not say which
    part that is.
    """
    head = head_names(model)
    if not head:
        raise RequestError(f"model.freeze: {name} does not say which part of it is its head")
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name in head)


def hold_trunk(model: nn.Module) -> None:
    """Let all but the head compute as in validation: BatchNorm's averages stay, nothing drops."""
    model.eval()
    for head in heads_of(model):
        head.train()


def synchronised(model: nn.Module) -> nn.Module:
    """The model with every BatchNorm over the samples of all ranks. timm's keep their built-in
    activation.
    """
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(model)


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of the model without memory for its weights: its forward computes shapes alone."""
    parameters = {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()
    }
    buffers = {id(buffer): buffer.detach().to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, parameters | buffers).to("meta")


def forward_shapes(
    model: nn.Module, side: int, samples: int = 2, training: bool = True
) -> torch.Size:
    """Forward so many pictures of `side` px, on shapes alone where the model can. Returns the
    logits' shape. Raises what a layer raises.
    """
    try:
        return (
            on_meta(model).train(training)(torch.empty(samples, 3, side, side, device="meta")).shape
        )
    except NotImplementedError:  # it looks at values
        with torch.no_grad():
            return (
                copy.deepcopy(model)
                .cpu()
                .train(training)(torch.zeros(samples, 3, side, side))
                .shape
            )


def takes_one_sample(model: nn.Module, side: int) -> bool:
    """Whether the model can train on a single sample: BatchNorm cannot where it leaves a single
    pixel.
    """
    try:
        forward_shapes(model, side, samples=1)
    except ValueError as error:
        return "more than 1 value per channel" not in str(error)
    return True


def convolution_backward_flops(
    gradient: Sequence[int],
    images: Sequence[int],
    weight: Sequence[int],
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    wanted: Sequence[bool],
    **_: Any,
) -> int:
    """FLOP of a convolution's backward, from shapes: those of its forward for each of the two
    gradients `wanted`.

    torch's own formula takes every convolution for one with a single group.
    """
    return conv_flop_count(images, weight, gradient, transposed) * sum(wanted[:2])


def count_flops(model: nn.Module, image_size: int) -> float:
    """Forward + backward FLOP of one sample, two a multiply-add, counted on shapes alone
    (torch.utils.flop_counter).
    """
    twin = on_meta(model).train()
    formulas = {torch.ops.aten.convolution_backward: convolution_backward_flops}
    with FlopCounterMode(
        display=False, custom_mapping=formulas
    ) as counter:  # two samples: BatchNorm refuses one
        twin(torch.empty(2, 3, image_size, image_size, device="meta")).sum().backward()
    return counter.get_total_flops() / 2


def check_resolution(model: nn.Module, config: ModelConfig, resolution: int) -> None:
    """Raises RequestError where the network takes no images of `resolution` px to score; tried on
    shapes alone.
    """
    try:
        forward_shapes(model, resolution, samples=1, training=False)
    except Exception as error:  # a layer may raise anything on a size that it was not written for
        why = one_line(error)[:200]
        raise RequestError(
            f"ast.score_resolution: {config.name} at {resolution} px: {why}"
        ) from None
