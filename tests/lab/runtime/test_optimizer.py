"""What is decayed."""

import pytest
import torch

from lab.models import get_model
from lab.runtime.optimizer import build_optimizer
from lab.sections import ModelConfig, TrainingConfig


@pytest.mark.parametrize(
    ("name", "excepted"),
    [
        ("vit_b_16", {"class_token", "encoder.pos_embedding"}),
        ("test_vit", {"cls_token", "pos_embed"}),
        ("swin_tiny_patch4_window7_224", "relative_position_bias_table"),
        ("resnet18", set()),
    ],
)
def test_norms_biases_and_embeddings_are_not_decayed(name, excepted):
    model = get_model(ModelConfig(name=name), 10, 32)
    decayed, free = build_optimizer(model, TrainingConfig(weight_decay=0.1), torch.device("cpu")).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    large = {names[id(parameter)] for parameter in free["params"] if parameter.ndim > 1}
    assert all(excepted in each for each in large) if isinstance(excepted, str) else large == excepted
    assert bool(large) == bool(excepted)
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
