"""The small network that scores for a large one: what it learns, and that a step of it is one
graph.
"""

import torch
import torch.nn.functional as F

from conftest import BatchNormNet, as_batch, make_batch, make_run
from lab.config.sections import ModelConfig
from lab.models.building import get_model
from lab.models.proxy import EVERY, LR, Proxy
from train_ast import significance


def proxy_of(*overrides: str) -> Proxy:
    return make_run(BatchNormNet(), "ast.scoring=proxy", *overrides).selection.scores.proxy


def plain_copy(proxy: Proxy) -> torch.nn.Module:
    """The same network with the same weights, in training mode."""
    model = get_model(ModelConfig(name="small_conv"), 10, 8)
    model.load_state_dict(proxy.model.state_dict(), strict=False)  # no running averages
    return model.train()


def test_it_learns_as_autograd_and_pytorchs_adamw_do_and_scores_by_the_weights_before():
    proxy = proxy_of("training.label_smoothing=0.1", "ast.entropy_weight=0.5")
    model = plain_copy(proxy)
    start = proxy.optimizer.weights.clone()
    adamw = torch.optim.AdamW(model.parameters())
    for number in range(2 * EVERY + 1):
        images, labels = make_batch(seed=number)
        lr_share = 1 / (1 + number)
        scores = proxy.learn(as_batch(images, labels), lr_share)
        assert (scores is None) == (number % EVERY > 0)
        if scores is None:
            continue
        logits = model(proxy.network.normalise(images))
        adamw.zero_grad()
        F.cross_entropy(logits, labels, label_smoothing=0.1).backward()
        adamw.param_groups[0]["lr"] = LR * lr_share
        adamw.step()
        assert torch.allclose(scores[0], significance(logits.detach(), labels, 0.5), atol=1e-6)
        assert torch.equal(scores[1], (logits.argmax(-1) == labels).float())
    learned = torch.cat([each.detach().flatten() for each in model.parameters()])
    assert torch.allclose(proxy.optimizer.weights, learned, atol=1e-6)
    assert (learned - start).abs().max() > LR
    with torch.no_grad():  # the weights that it scores with are those that it learned
        expected = significance(model(proxy.network.normalise(images)), labels, 0.5)
        assert torch.allclose(proxy.scores(images, labels)[0], expected, atol=1e-6)


def test_picture_score_gradient_and_step_are_one_graph():
    """Nothing breaks it, so that CUDA graphs replay all of it at once."""
    images, labels = make_batch()
    images = images.repeat_interleave(2, 2).repeat_interleave(2, 3)  # 16 px, scored at 8
    ended = []
    for compiles in (False, True):
        torch.manual_seed(0)
        proxy = proxy_of("dataset.image_size=16", "ast.score_resolution=8")
        if compiles:
            proxy.step = torch.compile(proxy._step, backend="aot_eager", fullgraph=True)
        scores = proxy.learn(as_batch(images, labels), 1.0)
        ended.append([scores, proxy.optimizer.weights, proxy.optimizer.mean])
    for ours, whole in zip(*ended, strict=True):
        assert torch.allclose(ours, whole, atol=1e-6)
