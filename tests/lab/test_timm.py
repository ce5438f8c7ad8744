"""Any timm model: names of every family train and validate at a size they take, or are refused in
one line.
"""

import pytest
import timm
import torch

from conftest import make_config
from lab.base.errors import RequestError
from lab.config.sections import ModelConfig
from lab.machine.devices import Normalise
from lab.machine.distributed import Dist
from lab.method.losses import Loss
from lab.models.building import get_model
from lab.models.forward_once import CannotTrace, ForwardOnce, row_forward
from train_ast import train

NAMES = """
    beit_base_patch16_224 caformer_s18 cait_xxs24_224 coat_lite_tiny coat_mini convit_tiny
    convmixer_768_32 cpubone_nano crossvit_tiny_240 cs3darknet_focus_s csatv2 cspnext_tiny
    davit_tiny deit_tiny_distilled_patch16_224 deit_tiny_patch16_224 densenet121 dla46x_c dpn68
    eca_halonext26ts edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvim_m1
    efficientvit_b0 efficientvit_m0 ese_vovnet19b_slim eva02_tiny_patch14_224 fasternet_t0
    fastvit_s12 fbnetc_100 focalnet_tiny_lrf gcvit_xxtiny gemma4_vit_167m ghostnet_050
    ghostnetv2_100 gmlp_s16_224 halonet26t hardcorenas_a hgnetv2_b0 hiera_tiny_224 hieradet_small
    hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4
    lcnetv2_small legacy_seresnet18 legacy_xception levit_128s levit_conv_128s lowformer_b0
    mixer_s32_224 mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs mobilevitv2_050 mvitv2_tiny
    naflexvit_base_patch16_siglip nasnetalarge nest_tiny nextvit_small nf_resnet26 pit_ti_224
    pit_xs_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050
    repvit_m0_9 res2net50_14w_8s resnest14d resnet10t resnetv2_18 rexnet_100 samvit_base_patch16_224
    selecsls42 sequencer2d_s shvit_s1 skresnet18 skresnet34 starnet_s050 swiftformer_xs
    swin_s3_tiny_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256 test_byobnet test_convnext
    test_efficientnet test_mambaout test_maxvit test_nfnet test_resnet test_vit test_vit_relpos
    tiny_vit_5m_224 tnt_s_patch16_224 tresnet_m twins_pcpvt_small twins_svt_small vgg11
    visformer_tiny vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224
    xception41 xcit_nano_12_p8_224
# the smallest of each of timm's modules, and some more; not deepseek_vit, whose smallest has 412M
# weights
""".split()
REFUSED = {}  # what the refusal says, by name


def side_of(name: str) -> int:
    """Pixels that a name is made for, or 224 where these would be many."""
    published = timm.get_pretrained_cfg(name)
    return published.input_size[-1] if published and published.input_size[-1] <= 256 else 224


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_timm_model_takes_a_step_and_validates_or_is_refused_in_one_line(name, tmp_path):
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    keys = [
        f"model.name={name}",
        f"dataset.image_size={side_of(name)}",
        "ast.mode=dense",
        "training.epochs=1",
    ]
    keys += ["training.batch_size=2", "dataset.max_train_samples=2", "dataset.max_val_samples=2"]
    try:
        result, _ = train(make_config(*keys, f"logging.output_dir={tmp_path}"))
    except RequestError as error:
        refusal = str(error)
    else:
        refusal = None
        assert (result["status"], result["ledger"]["steps"]) == ("completed", 1)
        assert 0 <= result["final_accuracy"] <= 100
    assert (refusal is None) == (name not in REFUSED)
    assert refusal is None or (REFUSED[name] in refusal and "\n" not in refusal)


def smallest(name: str) -> tuple[torch.nn.Module, int]:
    """The network for the smallest pictures of some sizes that it takes, and their side."""
    for side in (64, 128):
        try:
            return get_model(ModelConfig(name=name), 10, side), side
        except RequestError:
            continue
    return get_model(ModelConfig(name=name), 10, side_of(name)), side_of(name)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_timm_model_forwards_once_or_says_in_one_line_why_not(name):
    """Run with -s: a line a name. What forwards once was compared with autograd on the way."""
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    torch.manual_seed(0)
    model, side = smallest(name)
    device = torch.device("cpu")
    normalise = Normalise([0.5] * 3, [0.25] * 3, device, torch.contiguous_format, None)
    loss = Loss(make_config().training, 4, 10, device, Dist())
    compute = row_forward(normalise, lambda *given: loss.of_batch(*given)[1], loss)
    images = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8)
    family = type(model).__module__.split(".")[-1]
    verdict = "forward once"
    try:
        ForwardOnce.build(model.train(), compute, (images, torch.arange(4)), 2)
    except CannotTrace as refusal:
        verdict = f"two passes: {refusal}"
    print(f"{family} {name}: {verdict}")
    assert "\n" not in verdict
    assert not verdict.endswith(": ")
