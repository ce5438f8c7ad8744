"""Forward once: the gradient of the chosen rows against autograd and against a backward by hand;
what the forward drew, updates and tells; and what is refused.
"""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from conftest import BatchNormNet, LayerNormNet, make_config
from lab.machine.devices import Normalise
from lab.machine.distributed import Dist
from lab.method.losses import LOSSES, Loss
from lab.models.forward_once import CannotTrace, ForwardOnce, Rows, difference, filled, row_forward
from train_ast import significance

CPU = torch.device("cpu")
TOTAL = 16  # samples of a batch
CHOSEN = 8
ROWS = torch.tensor([3, 0, 12, 5, 9, 15, 6, 10])


def plain_regnet() -> nn.Module:
    shape = {"depths": [1, 1], "widths": [16, 32], "group_widths": [8, 8], "strides": [2, 2]}
    params = torchvision.models.regnet.BlockParams(
        **shape, bottleneck_multipliers=[1.0, 1.0], se_ratio=0.25
    )
    return torchvision.models.RegNet(params, num_classes=10)


def short_mobilenet() -> nn.Module:
    blocks = [["ds_r1_k3_s1_e1_c8_se0.25_nre"], ["ir_r1_k5_s2_e3_c16_se0.25"]]
    return timm.models.mobilenetv3.MobileNetV3(
        timm.models._efficientnet_builder.decode_arch_def(blocks),
        num_classes=10,
        stem_size=8,
        num_features=32,
        act_layer=nn.Hardswish,
        drop_path_rate=0.2,
    )


def of_timm(name: str, **options) -> nn.Module:
    return timm.create_model(name, num_classes=10, **options)


SMALL = {  # one of every kind, its side
    "resnet": (lambda: of_timm("test_resnet"), 32),
    "mobilenet": (short_mobilenet, 32),
    "efficientnet": (
        lambda: of_timm("test_efficientnet", drop_rate=0.2, drop_path_rate=0.2),
        32,
    ),
    "regnet": (plain_regnet, 32),
    "convnext": (
        lambda: of_timm(
            "convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), drop_path_rate=0.3
        ),
        32,
    ),
    "vit": (
        lambda: of_timm(
            "vit_tiny_patch16_224",
            img_size=32,
            depth=2,
            drop_rate=0.1,
            attn_drop_rate=0.1,
            drop_path_rate=0.2,
        ),
        32,
    ),
    "swin": (
        lambda: of_timm(
            "swin_tiny_patch4_window7_224",
            img_size=32,
            window_size=4,
            embed_dim=16,
            depths=(2,),
            num_heads=(2,),
        ),
        32,
    ),
    "mixer": (
        lambda: timm.models.mlp_mixer.MlpMixer(
            num_classes=10, img_size=32, patch_size=8, num_blocks=2, embed_dim=16
        ),
        32,
    ),
}
WHOLE = {  # as people train them
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 64),
    "mobilenetv3": (lambda: of_timm("mobilenetv3_small_050"), 64),
    "efficientnet_b0": (lambda: torchvision.models.efficientnet_b0(num_classes=10), 64),
    "regnet_y_400mf": (lambda: torchvision.models.regnet_y_400mf(num_classes=10), 64),
    "convnext_tiny": (lambda: of_timm("convnext_tiny", drop_path_rate=0.1), 32),
    "vit_b_16": (
        lambda: torchvision.models.VisionTransformer(32, 16, 12, 12, 768, 3072, 0.1, 0.1, 10),
        32,
    ),
    "swin_tiny": (lambda: of_timm("swin_tiny_patch4_window7_224", img_size=64, window_size=2), 64),
    "mixer_s32": (lambda: of_timm("mixer_s32_224", img_size=64), 64),
}


def make_batch(side: int = 8, seed: int = 0, total: int = TOTAL) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (total, 3, side, side), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 10, (total,), generator=generator)


def make_compute(*overrides: str, dtype: torch.dtype | None = None):
    """(what is computed of each sample, the loss it uses)."""
    training = make_config(*overrides).training
    loss = LOSSES[training.loss](training, 64, 10, CPU, Dist())
    normalise = Normalise([0.5] * 3, [0.25] * 3, CPU, torch.contiguous_format, dtype)
    return row_forward(normalise, lambda logits, labels: significance(logits, labels, 0.5), loss), (
        loss
    )


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in model.parameters()]


def distance(found: list[Tensor | None], expected: list[Tensor | None]) -> float:
    """The relative error of a gradient as one vector."""
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b is not None]
    error = sum((a - b).double().square().sum() for a, b in pairs)
    return (error / sum(b.double().square().sum() for _, b in pairs)).sqrt().item()


def by_autograd(model: nn.Module, compute, batch, rows: Tensor, weights: Tensor) -> list[Tensor]:
    """The gradient of the chosen rows' weighted losses through the whole batch. The network is left
    as it was.
    """
    twin = copy.deepcopy(model)
    (compute(twin, *batch).losses[rows] * weights).sum().backward()
    return gradients(twin)


def by_once(once: ForwardOnce, batch, rows: Tensor, weights: Tensor) -> list[Tensor]:
    once.model.zero_grad()
    once.forward(*batch)
    once.backward(rows, weights)
    return gradients(once.model)


def build(model: nn.Module, side: int = 8, capacity: int = CHOSEN, **options) -> ForwardOnce:
    return ForwardOnce.build(
        model, make_compute()[0], make_batch(side, seed=9), capacity, **options
    )


def check_architecture(make, side: int) -> None:
    """All rows as autograd; some rows too where no row meets another; losses and buffers."""
    torch.manual_seed(0)
    model = make().train()
    compute, _ = make_compute("training.label_smoothing=0.1")
    once = ForwardOnce.build(model, compute, make_batch(side, seed=9), CHOSEN)
    once.prepare(TOTAL)
    batch = make_batch(side)
    order = torch.randperm(TOTAL)
    weights = torch.rand(TOTAL)
    torch.manual_seed(1)
    expected = by_autograd(model, compute, batch, order, weights)
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    told = compute(twin, *batch)
    torch.manual_seed(1)
    assert difference(by_once(once, batch, order, weights), expected) < 1e-5
    assert difference(list(model.buffers()), list(twin.buffers())) < 1e-6
    model.load_state_dict(twin.state_dict())
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return
    torch.manual_seed(1)
    expected = by_autograd(model, compute, batch, ROWS, weights[:CHOSEN])
    torch.manual_seed(1)
    assert torch.allclose(once.forward(*batch).losses, told.losses, atol=1e-6)
    model.zero_grad()
    once.backward(ROWS, weights[:CHOSEN])
    found = gradients(model)
    assert difference(found, expected) < 1e-5  # a sum over pixels, rows of zeros among them
    assert distance(found, expected) < 1e-6


KIN = ["mobilenet", "regnet", "mixer"]  # of others, by what they are built of


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name in KIN)) for name in SMALL]
)
def test_gradients_of_an_architecture_are_autograds(name):
    check_architecture(*SMALL[name])


@pytest.mark.long
@pytest.mark.parametrize("name", WHOLE)
def test_gradients_of_a_whole_architecture_are_autograds(name):
    check_architecture(*WHOLE[name])


class NormedNet(nn.Module):
    """A convolution, BatchNorm, ReLU and a layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 6 * 6, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(images)).relu().flatten(1))


def backward_by_hand(model: NormedNet, images: Tensor, labels: Tensor, rows: Tensor, weights):
    """BatchNorm with the statistics of all rows; what its gradient has along the mean and the
    deviations of `rows` is taken out by least squares, channel by channel.
    """
    pixels = (images.float() - 127.5) / 63.75
    before = F.conv2d(pixels, model.conv.weight)
    mean = before.mean((0, 2, 3), keepdim=True)
    deviation = (before.var((0, 2, 3), unbiased=False, keepdim=True) + model.norm.eps).sqrt()
    shape = (1, -1, 1, 1)
    normed = (before - mean) / deviation
    scaled = normed * model.norm.weight.view(shape) + model.norm.bias.view(shape)
    hidden = scaled.relu().flatten(1)
    known = model.head(hidden).softmax(-1) - F.one_hot(labels, 10)
    output = (known * weights.new_zeros(len(labels)).index_copy(0, rows, weights)[:, None])[rows]
    after = (output @ model.head.weight).view(-1, 4, 6, 6) * (scaled[rows] > 0)
    normed = normed[rows]
    left = torch.empty_like(after)
    for channel in range(after.shape[1]):
        given = after[:, channel].flatten().double()
        along = torch.stack([torch.ones_like(given), normed[:, channel].flatten().double()], 1)
        rest = given - along @ torch.linalg.lstsq(along, given[:, None]).solution[:, 0]
        left[:, channel] = rest.view(after[:, channel].shape).float()
    inner = model.norm.weight.view(shape) / deviation * left
    return [
        nn.grad.conv2d_weight(pixels[rows], model.conv.weight.shape, inner),
        (after * normed).sum((0, 2, 3)),
        after.sum((0, 2, 3)),
        output.T @ hidden[rows],
        output.sum(0),
    ]


def test_batchnorm_has_the_statistics_of_all_rows_and_a_backward_of_the_chosen():
    torch.manual_seed(0)
    model = NormedNet()
    nn.init.normal_(model.norm.weight, 1.0, 0.2)
    once = build(model)
    batch = make_batch()
    weights = torch.rand(CHOSEN)
    with torch.no_grad():
        expected = backward_by_hand(model, *batch, ROWS, weights)
    found = by_once(once, batch, ROWS, weights)
    assert difference(found, expected) < 1e-4
    # BatchNorm takes the norm of the weights before it out: autograd's gradient has no part there
    along = (found[0] * model.conv.weight).sum() / found[0].norm() / model.conv.weight.norm()
    assert abs(along) < 1e-3


@pytest.mark.parametrize("share", [pytest.param(0.5, marks=pytest.mark.long), 0.25])
def test_the_gradient_of_the_hardest_is_near_autograds_through_the_whole_batch(share):
    torch.manual_seed(0)
    model = of_timm("test_resnet")
    compute, _ = make_compute()
    batch = make_batch(32, total=64)
    chosen = int(64 * share)
    once = ForwardOnce.build(model, compute, batch, chosen)
    rows = once.forward(*batch).losses.topk(chosen).indices
    weights = torch.full((chosen,), 1 / chosen)
    exact = by_autograd(model, compute, batch, rows, weights)
    found = by_once(once, batch, rows, weights)
    pairs = [(a.flatten(), b.flatten()) for a, b in zip(found, exact, strict=True)]
    whole = [torch.cat(each) for each in zip(*pairs, strict=True)]
    assert F.cosine_similarity(*whole, dim=0) > 0.85


def test_a_forward_updates_the_running_statistics_once_and_building_never():
    model = BatchNormNet()
    before = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state()
    once = build(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values()))  # noqa: B905
    assert torch.equal(torch.get_rng_state(), states)
    twin = copy.deepcopy(model)
    twin((make_batch()[0].float() - 127.5) / 63.75)
    by_once(once, make_batch(), ROWS, torch.ones(CHOSEN))
    assert model.body[1].num_batches_tracked == 1
    assert difference(list(model.buffers()), list(twin.buffers())) < 1e-6


def test_a_forward_tells_of_every_sample_what_a_step_wants_to_know():
    model = LayerNormNet()
    once = build(model)
    images, labels = make_batch()
    told = once.forward(images, labels)
    with torch.no_grad():
        logits = model((images.float() - 127.5) / 63.75)
    confidence, predicted = logits.softmax(-1).max(-1)
    plain = F.cross_entropy(logits, labels, reduction="none")
    wanted = Rows(
        plain,
        significance(logits, labels, 0.5),
        predicted == labels,
        plain,
        confidence,
        predicted,
        None,
    )
    for found, expected in zip(told, wanted, strict=True):
        assert found is expected is None or torch.allclose(found, expected, atol=1e-5)


def test_the_mask_that_dropped_in_the_forward_is_the_one_of_the_backward():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 10, bias=False))
    once = build(model, capacity=CHOSEN)
    images, labels = make_batch()
    pixels = ((images.float() - 127.5) / 63.75).flatten(1)
    told = once.forward(images, labels)
    once.backward(ROWS, torch.eye(CHOSEN)[0])  # the gradient of one sample: (p - label) x its input
    gradient = model[2].weight.grad
    used = gradient[0] != 0
    dropped = torch.where(used, 2 * pixels[ROWS[0]], 0.0)
    loss = F.cross_entropy(model[2].weight @ dropped, labels[ROWS[0]])
    assert 40 < used.sum() < 150
    assert loss.item() == pytest.approx(told.losses[ROWS[0]].item(), abs=1e-5)


def test_gradients_are_added_to_those_that_are_there():
    model = LayerNormNet()
    once = build(model)
    first = make_batch(seed=1)
    second = make_batch(seed=2)
    weights = torch.rand(CHOSEN)
    alone = [[g.clone() for g in by_once(once, batch, ROWS, weights)] for batch in (first, second)]
    by_once(once, first, ROWS, weights)
    once.forward(*second)
    once.backward(ROWS, weights)
    sums = [a + b for a, b in zip(*alone, strict=True)]
    assert difference(gradients(model), sums) < 1e-6


def test_rows_of_weight_0_add_nothing_where_no_row_meets_another():
    model = LayerNormNet()
    once = build(model)
    rows, weights = filled(ROWS[:5], CHOSEN, TOTAL)
    assert sorted({*rows.tolist()}) == sorted(rows.tolist())
    assert (rows[:5].tolist(), weights.tolist()) == (ROWS[:5].tolist(), [1.0] * 5 + [0.0] * 3)
    found = by_once(once, make_batch(), rows, 7 * weights)
    expected = by_autograd(model, once.compute, make_batch(), ROWS[:5], torch.full((5,), 7.0))
    assert difference(found, expected) < 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_and_the_rows_it_keeps(name):
    model = LayerNormNet()
    compute, loss = make_compute(f"training.loss={name}")
    batch = make_batch()
    if name == "early_learning":
        batch = (*batch, torch.rand(TOTAL, 10) / 10)
    once = ForwardOnce.build(model, compute, batch, CHOSEN)
    told = once.forward(*batch)
    once.backward(ROWS, torch.ones(CHOSEN))
    expected = compute(model, *batch)
    found = gradients(model)
    assert torch.allclose(told.losses, expected.losses, atol=1e-5)
    assert difference(found, by_autograd(model, compute, batch, ROWS, torch.ones(CHOSEN))) < 1e-6
    if type(loss) is not Loss and name == "early_learning":
        assert torch.allclose(told.targets, expected.targets, atol=1e-6)


class Shared(nn.Module):
    """A layer under two names, a weight in two layers, and one that is not trained."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(192, 192)
        self.again = self.first
        self.other = nn.Linear(192, 192)
        self.other.weight = self.first.weight
        self.still = nn.Linear(192, 10)
        self.still.weight.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.first(images.flatten(1)).relu()
        return self.still(self.other(self.again(hidden).relu()))


def test_a_layer_under_two_names_and_a_weight_that_is_not_trained():
    torch.manual_seed(0)
    model = Shared()
    once = build(model)
    weights = torch.rand(CHOSEN)
    found = by_once(once, make_batch(), ROWS, weights)
    expected = by_autograd(model, once.compute, make_batch(), ROWS, weights)
    assert model.still.weight.grad is None
    assert difference(found, expected) < 1e-6


class Inside(nn.Module):
    """The rows are the second dimension, and folded behind another one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(24, 24)
        self.head = nn.Linear(192, 10)

    def forward(self, images: Tensor) -> Tensor:
        parts = images.reshape(len(images), 8, 24).transpose(0, 1)
        hidden = self.layer(parts.reshape(-1, 24)).tanh()
        hidden = self.layer(hidden).view(8, len(images), 24).transpose(0, 1)
        return self.head(hidden.flatten(1).sigmoid())


def test_rows_that_are_folded_behind_another_dimension():
    torch.manual_seed(0)
    model = Inside()
    once = build(model)
    weights = torch.rand(CHOSEN)
    expected = by_autograd(model, once.compute, make_batch(), ROWS, weights)
    assert difference(by_once(once, make_batch(), ROWS, weights), expected) < 1e-6
    outers = {layout.outer for node in once.cut if (layout := once.layouts[node]) is not None}
    assert 8 in outers


def test_autocast_and_channels_last():
    """As far from the gradient in float32 as autograd under autocast is."""
    torch.manual_seed(0)
    model = plain_regnet().to(memory_format=torch.channels_last).train()
    compute, _ = make_compute(dtype=torch.bfloat16)
    once = ForwardOnce.build(model, compute, make_batch(32, seed=9), CHOSEN)
    once.prepare(TOTAL)
    order = torch.randperm(TOTAL)
    weights = torch.rand(TOTAL)
    batch = make_batch(32)
    exact = by_autograd(model, make_compute()[0], batch, order, weights)
    expected = by_autograd(model, compute, batch, order, weights)
    found = by_once(once, batch, order, weights)
    assert difference(found, exact) < 1.2 * difference(expected, exact) < 0.2
    assert all(g.stride() == p.stride() for g, p in zip(found, model.parameters(), strict=True))
    low = [n.meta["val"].dtype for n in once.cut if once.layouts[n] is not None]
    assert low.count(torch.bfloat16) > 0.8 * len(low)


def test_an_activation_is_made_again_rather_than_saved():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.GELU(), nn.Linear(64, 10))
    names = [node.name for node in build(model).cut]
    assert "addmm" in names
    assert not [name for name in names if "gelu" in name]


# ---------------------------------------------------------------------------------------- Refusals


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(24, 10, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        return self.lstm(images.flatten(2).reshape(-1, 8, 24))[0][:, -1]


class Looking(LayerNormNet):
    """Its depth depends on what it sees."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images if images.mean() > 0 else -images)


class Mixed(LayerNormNet):
    """Every sample is mixed with another one."""

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.body(images)
        return self.head(hidden + hidden.flip(0).sigmoid() ** 2)


class Halves(LayerNormNet):
    """The first half of the batch is treated otherwise."""

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.body(images)
        half = len(hidden) // 2
        return self.head(torch.cat([hidden[:half].sigmoid() ** 2, hidden[half:].tanh() ** 2]))


class Counting(LayerNormNet):
    """A layer more for a larger batch."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images if len(images) < TOTAL else images.tanh())


class Replacing(LayerNormNet):
    """It counts its steps by a new buffer each."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.steps = self.steps + 1
        return super().forward(images)


class Synchronised(BatchNormNet):
    def __init__(self):
        super().__init__()
        self.body[1] = nn.SyncBatchNorm(8)


REFUSED = {
    Recurrent: "LSTM is traced step by step",
    Looking: "its code decides by the values that it computes",
    Mixed: "its traced gradient is off by",
    Halves: r"has shape \(8, 24\) for 16 samples and \(4, 24\) for 8",
    Counting: "what it computes depends on the number of samples",
    Replacing: "its traced buffer is off by",
    Synchronised: "SyncBatchNorm",
}


@pytest.mark.parametrize("network", REFUSED)
def test_what_cannot_be_traced_is_refused_in_one_line(network):
    with pytest.raises(CannotTrace, match=REFUSED[network]) as refusal:
        build(network())
    assert "\n" not in str(refusal.value)


def test_too_many_rows_and_too_slow_a_trace_are_refused():
    with pytest.raises(CannotTrace, match="17 rows of a batch of 16"):
        build(LayerNormNet(), capacity=17)
    with pytest.raises(CannotTrace, match="takes too long"):
        build(LayerNormNet(), seconds=0.0)


def test_what_was_frozen_and_changed_is_refused():
    model = LayerNormNet()
    once = build(model)
    batch = make_batch()
    model.body[2].eval()
    with pytest.raises(RuntimeError, match="train or eval mode changed"):
        once.forward(*batch)
    model.train()
    model.head.bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"head.bias: .* requires_grad changed"):
        once.forward(*batch)
    model.head.bias.requires_grad_(True)
    with pytest.raises(ValueError, match="not of the shapes"):
        once.forward(batch[0][:4], batch[1][:4])


def test_replaced_weights_are_used():
    model = LayerNormNet()
    once = build(model)
    others = {key: value + 0.1 for key, value in model.state_dict().items()}
    model.load_state_dict(others, assign=True)
    weights = torch.rand(CHOSEN)
    expected = by_autograd(model, once.compute, make_batch(), ROWS, weights)
    assert difference(by_once(once, make_batch(), ROWS, weights), expected) < 1e-6


def test_a_backward_needs_a_forward_of_its_own_and_a_prepared_number_of_rows():
    once = build(LayerNormNet())
    weights = torch.ones(CHOSEN)
    with pytest.raises(RuntimeError, match="needs a forward before it"):
        once.backward(ROWS, weights)
    once.forward(*make_batch())
    with pytest.raises(ValueError, match="a backward of 3 rows was not prepared"):
        once.backward(ROWS[:3], weights[:3])
    once.backward(ROWS, weights)
    with pytest.raises(RuntimeError, match="needs a forward before it"):
        once.backward(ROWS, weights)


# ---------------------------------------------------------------------------------------- Compiled


@pytest.mark.long
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ["resnet", "regnet", "mixer"])  # which draw no masks
def test_compiled_gradients_are_those_of_the_graphs(name, dtype, mode):
    torch.manual_seed(0)
    make, side = SMALL[name]
    model = make().train()
    compute, _ = make_compute(dtype=dtype)
    inputs = make_batch(side, seed=9)
    weights = torch.rand(CHOSEN)
    eager = ForwardOnce.build(model, compute, inputs, CHOSEN)
    state = copy.deepcopy(model.state_dict())
    expected = [g.clone() for g in by_once(eager, make_batch(side), ROWS, weights)]
    buffers = [buffer.clone() for buffer in model.buffers()]
    model.load_state_dict(state)
    fast = ForwardOnce.build(model, compute, inputs, CHOSEN, mode)
    found = by_once(fast, make_batch(side), ROWS, weights)
    assert difference(found, expected) < (1e-4 if dtype is None else 0.1)
    assert difference(list(model.buffers()), buffers) < (1e-5 if dtype is None else 0.02)
