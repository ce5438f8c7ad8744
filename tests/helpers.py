"""What several tests use: configs of data on the disk, and pictures."""

import torch
from PIL import Image
from torchvision.transforms import v2

from conftest import make_config


def folder_config(folder, *overrides):
    paths = [f"dataset.train_dir={folder}/train", f"dataset.val_dir={folder}/val"]
    return make_config("dataset.type=folder", "dataset.image_size=32", "training.batch_size=8", *paths, *overrides)


def hf_config(folder, *overrides):
    return make_config("dataset.type=hf", f"dataset.name={folder}", "dataset.split_val=test", *overrides)


def pictures(count, side, seed=0):
    """Smooth random pictures: what resizing errors would show on."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 255
    return v2.functional.resize(coarse, [side, side], antialias=True).round().to(torch.uint8)


def smooth_pictures(folder):
    """Replace the noisy pictures of a folder by smooth ones, on which a second resizing shows little."""
    for i, path in enumerate(sorted(folder.rglob("*.jpg"))):
        pixels = v2.functional.resize(pictures(1, 60, seed=i)[0], [60, 80], antialias=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path, quality=95)
