"""What several tests use: configs of data on the disk, and pictures."""

import io

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


def write_parquet(folder, split, names, labels, image=None):
    """Write <folder>/<split>.parquet of equal pictures; labels are in column `kind`, integers where `names` is None."""
    import datasets

    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (200, 40, 30)).save(buffer, "PNG")
    kind = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    features = datasets.Features({"img": datasets.Image(), "kind": kind})
    rows = {"img": [{"bytes": image or buffer.getvalue(), "path": None}] * len(labels), "kind": labels}
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
