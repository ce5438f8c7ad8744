"""Decoding real files, and that crops are those of torchvision."""

import contextlib
import io
import random
import struct
import warnings
from itertools import product

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2

from helpers import folder_config, pictures
from lab.config.loading import load_config
from lab.data.images import (
    Augmentation,
    decode_image,
    erase,
    pad_crop,
    random_crops,
    resize_weights,
)
from lab.data.randomness import UNIFORMS_PER_SAMPLE, uniform
from train_ast import build_datasets


@pytest.mark.parametrize(
    "kind", ["jpeg", "png", "grey", "cmyk", "palette", "bmp", "gif", "webp", "16 bit"]
)
def test_every_kind_of_image_becomes_three_uint8_channels(kind):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[..., 0] = 200
    pixels[..., 1] = 60
    image = Image.fromarray(pixels)
    modes = {"grey": "L", "cmyk": "CMYK", "palette": "P"}
    formats = {
        "jpeg": "JPEG",
        "grey": "JPEG",
        "cmyk": "JPEG",
        "bmp": "BMP",
        "gif": "GIF",
        "webp": "WEBP",
    }
    image = image.convert(modes.get(kind, "RGB"))
    if kind == "16 bit":
        image = Image.fromarray(np.full((20, 30), 51400, np.uint16))
    buffer = io.BytesIO()
    image.save(buffer, formats.get(kind, "PNG"))
    decoded = decode_image(buffer.getvalue())
    assert decoded.dtype == torch.uint8
    assert decoded.shape == (3, 20, 30)
    mean = decoded.float().mean((1, 2)).tolist()
    assert mean == pytest.approx(
        {"grey": [95] * 3, "16 bit": [200] * 3}.get(kind, [200, 60, 0]), abs=12
    )


@pytest.mark.parametrize(
    ("kind", "mode"),
    [*product(["JPEG", "PNG", "TIFF", "WEBP"], ["RGB", "L"]), ("PNG", "I;16"), ("TIFF", "I;16")],
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_data_say(kind, mode, orientation):
    """As Pillow's exif_transpose turns it, and so the `datasets` library."""
    ramp = np.arange(12 * 20, dtype=np.uint16).reshape(12, 20)
    image = (
        Image.fromarray(ramp * 256)
        if mode == "I;16"
        else Image.fromarray(ramp.astype(np.uint8)).convert(mode)
    )
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(
        buffer, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {"quality": 95})
    )
    with Image.open(io.BytesIO(buffer.getvalue())) as opened:
        turned = np.asarray(ImageOps.exif_transpose(opened)).astype(np.int64) // (
            256 if mode == "I;16" else 1
        )
    assert turned.shape[:2] == ((12, 20) if orientation < 5 else (20, 12))
    expected = torch.from_numpy(
        np.broadcast_to(turned.reshape(*turned.shape[:2], -1), (*turned.shape[:2], 3)).copy()
    )
    assert torch.equal(decode_image(buffer.getvalue()).long(), expected.permute(2, 0, 1))


def test_damaged_exif_data_turn_nothing():
    image = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(6, 10))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=b"Exif\0\0II*\0" + b"\xff" * 20)
    assert torch.equal(
        decode_image(buffer.getvalue())[0], torch.from_numpy(np.asarray(image).copy())
    )


def twelve_bit_tiff(values):
    """A grey TIFF of 12 bits a pixel, as microscopes write them: [H, W] of even W, two pixels in
    three bytes.
    """
    pairs = values.reshape(-1, 2).astype(int)
    strip = b"".join(((int(a) << 12) | int(b)).to_bytes(3, "big") for a, b in pairs)
    shorts = {258: 12, 259: 1, 262: 1, 277: 1}
    longs = {256: values.shape[1], 257: values.shape[0], 278: values.shape[0]}
    longs |= {273: 8, 279: len(strip)}
    entries = sorted(
        [(tag, 3, value) for tag, value in shorts.items()] + [(t, 4, v) for t, v in longs.items()]
    )
    table = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return (
        b"II*\0"
        + struct.pack("<I", 8 + len(strip))
        + strip
        + struct.pack("<H", len(entries))
        + table
        + bytes(4)
    )


def test_twelve_and_sixteen_bits_keep_their_range():
    values = np.array([[0, 1023, 2048, 4095]])
    assert decode_image(twelve_bit_tiff(values))[0].tolist() == [[0, 63, 128, 255]]
    for kind in ("PNG", "TIFF", "PPM"):
        buffer = io.BytesIO()
        Image.fromarray((values * 16).astype(np.uint16)).save(buffer, kind)
        assert decode_image(buffer.getvalue())[0].tolist() == [[0, 63, 128, 255]]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_grey_levels_without_a_known_range_are_refused(kind):
    buffer = io.BytesIO()
    Image.fromarray((np.arange(24).reshape(4, 6) * 1000).astype(kind)).save(buffer, "TIFF")
    with pytest.raises(
        ValueError,
        match="grey levels, whose black and white are not known; convert it to 8 or 16 bits",
    ):
        decode_image(buffer.getvalue())


def test_rubbish_is_a_value_error():
    for data in (b"", b"no image", b"\xff\xd8\xff\xe0" + bytes(50)):
        with pytest.raises(ValueError, match="not a readable image"):
            decode_image(data)


def test_a_picture_is_augmented_by_its_uniforms_alone(image_folder):
    train, _ = build_datasets(
        folder_config(image_folder, "dataset.augment=random_resized_crop").dataset
    )
    uniforms = uniform(0, 0, torch.arange(3), UNIFORMS_PER_SAMPLE).numpy()
    first = train[(5, uniforms[0])][0]
    before = torch.get_rng_state()
    assert not torch.equal(train[(5, uniforms[1])][0], first)
    assert torch.equal(train[(5, uniforms[0])][0], first)
    assert torch.equal(torch.get_rng_state(), before)


HUB = ["dataset.type=hf", "dataset.name=x"]


@pytest.mark.parametrize(
    ("overrides", "crops", "moves"),
    [
        ([*HUB, "dataset.image_size=32"], False, True),
        ([*HUB, "dataset.image_size=224"], True, True),
        (["dataset.type=digits"], False, False),
        (["dataset.type=digits", "dataset.augment=pad_crop"], False, True),
    ],
)
def test_augmentation_by_size_and_dataset(overrides, crops, moves):
    config = load_config(None, overrides).dataset
    assert (Augmentation(config, train=True).crops, Augmentation(config, train=True).random) == (
        crops,
        moves,
    )
    assert not Augmentation(config, train=False).random


@pytest.mark.parametrize("train", [True, False])
def test_a_streamed_crop_is_torchvisions(train):
    """The stated box, cut and resized; for validation the same picture as torchvision's resize and
    centre crop.
    """
    augmentation = Augmentation(
        load_config(None, ["dataset.image_size=72", "dataset.augment=random_resized_crop"]).dataset,
        train,
    )
    image = v2.functional.resize(pictures(1, 90)[0], [120, 200], antialias=True)
    uniforms = uniform(0, 1, torch.arange(8), UNIFORMS_PER_SAMPLE)
    sides = torch.tensor([[120.0, 200.0]], dtype=torch.float64)
    boxes, mirrors = augmentation.boxes(uniforms, torch.full((8,), 0.6, dtype=torch.float64), sides)
    for row, box, mirror in zip(uniforms, boxes.int().tolist(), mirrors, strict=True):
        expected = v2.functional.resized_crop(image, *box, [72, 72], antialias=True)
        if not train:
            expected = v2.functional.center_crop(
                v2.functional.resize(image, 82, antialias=True), [72, 72]
            )
        expected = v2.functional.horizontal_flip(expected) if mirror else expected
        assert (augmentation([image], row[None])[0].int() - expected.int()).abs().max() <= (
            1 if train else 12
        )
        assert (augmentation([image], row[None])[0].float() - expected.float()).abs().mean() < (
            0.5 if train else 4
        )  # half a pixel
    assert mirrors.any() == train


@pytest.mark.parametrize(("padding", "mode"), [("black", "constant"), ("reflect", "reflect")])
def test_a_shifted_picture_is_padded_and_cropped(padding, mode):
    """Streamed and cached alike, as torchvision pads and crops."""
    keys = ["dataset.image_size=32", "dataset.augment=pad_crop", f"dataset.padding={padding}"]
    augmentation = Augmentation(load_config(None, keys).dataset, train=True)
    image = pictures(1, 32)[0]
    padded = v2.functional.pad(image, [4, 4, 4, 4], padding_mode=mode)
    seen = set()
    for row in uniform(0, 0, torch.arange(400), UNIFORMS_PER_SAMPLE):
        boxes, mirror = augmentation.boxes(row[None], torch.ones(1), torch.full((1, 2), 32.0))
        top, left, height, width = boxes[0].int().tolist()
        expected = v2.functional.crop(padded, top + 4, left + 4, height, width)
        expected = v2.functional.horizontal_flip(expected) if mirror else expected
        assert torch.equal(augmentation([image], row[None])[0], expected)
        assert torch.equal(pad_crop(image[None], boxes, mirror, augmentation.reflects)[0], expected)
        seen |= {top, left + 100, 1000 + int(mirror)}
    assert seen == {*range(-4, 5), *range(96, 105), 1000, 1001}


@pytest.mark.parametrize("size", [24, 40, 48, 64])
def test_the_weights_of_an_axis_resize_as_torchvision_does(size):
    images = pictures(5, 48).float()
    weights = resize_weights(size, 48, torch.device("cpu"))
    expected = v2.functional.resize(images, [size, size], antialias=True)
    assert (weights @ images @ weights.mT - expected).abs().max() < 1e-3
    assert torch.allclose(weights.sum(1), torch.ones(size))


@pytest.mark.parametrize(("reflects", "mode"), [(False, "constant"), (True, "reflect")])
def test_shifting_a_batch_is_padding_and_cropping_each(reflects, mode):
    images = pictures(6, 32)
    tops = torch.tensor([-4, -1, 0, 2, 4, 3])
    lefts = torch.tensor([0, 4, -4, 1, -2, 3])
    boxes = torch.stack([tops, lefts, torch.full((6,), 32), torch.full((6,), 32)], 1)
    mirror = torch.tensor([False, True] * 3)
    padded = v2.functional.pad(images, [4, 4, 4, 4], padding_mode=mode)
    for i, got in enumerate(pad_crop(images, boxes.double(), mirror, reflects)):
        expected = v2.functional.crop(padded[i], int(tops[i]) + 4, int(lefts[i]) + 4, 32, 32)
        assert torch.equal(got, v2.functional.horizontal_flip(expected) if mirror[i] else expected)


def test_random_crops_have_torchvisions_distribution():
    uniforms = uniform(0, 0, torch.arange(20000), 22)
    for height, width in ((300, 400), (100, 400), (640, 200)):
        aspects = torch.full((20000,), height / width, dtype=torch.float64)
        top, left, tall, wide = (random_crops(uniforms, aspects, torch.full((1, 2), 512.0)) / 512).T
        assert min(top.min(), left.min()) >= 0
        assert max((top + tall).max(), (left + wide).max()) <= 1
        torch.manual_seed(0)
        params = [
            v2.RandomResizedCrop(8).make_params([torch.empty(3, height, width)])
            for _ in range(4000)
        ]
        for name, ours, theirs in (
            ("height", tall, [p["height"] / height for p in params]),
            ("width", wide, [p["width"] / width for p in params]),
            ("top", top, [p["top"] / height for p in params]),
            ("left", left, [p["left"] / width for p in params]),
        ):
            quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
            theirs = torch.tensor(theirs, dtype=torch.float64)
            assert torch.allclose(
                ours.quantile(quantiles), theirs.quantile(quantiles), atol=0.04
            ), name


@pytest.mark.parametrize("policy", ["rand_augment", "trivial_augment"])
def test_a_policy_is_torchvisions_by_the_samples_own_number(policy):
    """Whatever the pictures beside it, and without a trace in torch's generator."""
    keys = ["dataset.image_size=32", f"dataset.augment_policy={policy}"]
    config = load_config(None, keys).dataset
    images = list(pictures(6, 32))
    augmentation = Augmentation(config, train=True)
    uniforms = uniform(0, 3, torch.arange(6), UNIFORMS_PER_SAMPLE)
    state = torch.get_rng_state()
    together = augmentation(images, uniforms)
    alone = [augmentation([images[i]], uniforms[i : i + 1])[0] for i in (5, 3, 1)]
    assert all(torch.equal(together[i], each) for i, each in zip((5, 3, 1), alone, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    bilinear = v2.InterpolationMode.BILINEAR
    kinds = {"rand_augment": v2.RandAugment(2, 9), "trivial_augment": v2.TrivialAugmentWide()}
    kind = type(kinds[policy])(interpolation=bilinear)
    for image, row, got in zip(images, uniforms, together, strict=True):
        torch.manual_seed(int(row[23] * 2**53))
        assert torch.equal(kind(image), got)
    assert sum(not torch.equal(*pair) for pair in zip(images, together, strict=True)) >= 3
    unchanged = Augmentation(config, train=False)(images, uniforms)
    assert all(torch.equal(*pair) for pair in zip(images, unchanged, strict=True))


def test_random_erasing_has_timms_distribution_and_covers_with_the_mean_colour():
    config = load_config(None, ["dataset.image_size=64", "dataset.random_erasing=0.4"]).dataset
    augmentation = Augmentation(config, train=True)
    uniforms = uniform(0, 0, torch.arange(4000), UNIFORMS_PER_SAMPLE)
    boxes = augmentation.erasures(uniforms)
    erased = boxes[:, 2] > 0
    assert erased.float().mean().item() == pytest.approx(0.4, abs=0.03)
    boxes = boxes[erased]
    assert boxes[:, :2].min() >= 0
    assert (boxes[:, :2] + boxes[:, 2:]).max() <= 64
    theirs = timm.data.random_erasing.RandomErasing(1.0, device="cpu")
    random_state = random.getstate()
    random.seed(0)
    holes = theirs(torch.ones(1500, 3, 64, 64))[:, 0] == 0
    random.setstate(random_state)
    expected = torch.stack(
        [holes.any(2).sum(1), holes.any(1).sum(1), holes.sum((1, 2))], 1
    ).double()
    got = torch.stack([boxes[:, 2], boxes[:, 3], boxes[:, 2] * boxes[:, 3]], 1)
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    assert torch.allclose(
        got.quantile(quantiles, 0), expected.quantile(quantiles, 0), rtol=0.1, atol=2
    )
    image = torch.full((2, 3, 64, 64), 7, dtype=torch.uint8)
    changed = erase(
        image, torch.tensor([[5.0, 8.0, 20.0, 30.0], [0.0, 0.0, 0.0, 0.0]]), augmentation.grey
    )
    assert changed[0, :, 5:25, 8:38].float().mean((1, 2)).tolist() == [124, 116, 104]
    assert (changed[0] != 7).sum() == 3 * 20 * 30
    assert torch.equal(changed[1], image[1])


KINDS = {
    "4:2:0": {},
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "progressive": {"progressive": True},
}


@pytest.mark.parametrize("kind", [*KINDS, "grey", "CMYK"])
def test_jpegs_are_decoded_as_torchvision_and_pillow_decode_them(kind):
    """Bit for bit: all three use libjpeg-turbo. torchvision is asked as long as it has a
    decoder.
    """
    for photo in load_sample_images().images:
        image = Image.fromarray(
            photo[:201, :333]
        )  # odd sides: half-resolution colours end within a block
        image = image.convert({"grey": "L", "CMYK": "CMYK"}.get(kind, "RGB"))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=88, **KINDS.get(kind, {}))
        ours = decode_image(buffer.getvalue())
        expected = v2.functional.pil_to_tensor(
            Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")
        )
        assert torch.equal(ours, expected)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.suppress(AttributeError):
                data = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
                theirs = torchvision.io.decode_image(data, torchvision.io.ImageReadMode.RGB)
                assert kind == "CMYK" or torch.equal(
                    ours, theirs
                )  # torchvision converts CMYK in its own way
