"""What several files of tests use: results files, pictures and data made on the spot, processes."""

import io
import json
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms import v2

import analyze_results
import run_experiment
from conftest import REPO, make_config
from lab.study.analysis.study import Study, compare
from lab.study.cli import run_cli
from lab.study.results import load_runs

ALONE = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29517",
}  # what torchrun may have left; nobody is there


def write_run(
    folder,
    name,
    accuracies=(50.0, 60.0, 70.0),
    seconds=30.0,
    extra=None,
    history=None,
    **settings,
):
    """A results file of the lab's form, `settings` as section__key; `extra` and `history` are more
    of its keys and of its history's.
    """
    config = make_config("ast.warmup_epochs=1", "training.epochs=3").model_dump()
    for key, value in settings.items():
        section, _, leaf = key.partition("__")
        config[section][leaf] = value
    epochs = len(accuracies)
    target = config["ast"]["target_activation"]
    sparse, threshold = (1.0, None) if config["ast"]["mode"] == "dense" else (target, 0.5)
    result = {
        "best_accuracy": max(accuracies),
        "total_time_hours": 0.01,
        "epochs_completed": epochs,
        "training_history": {
            "epoch": list(range(1, epochs + 1)),
            "val_acc": list(accuracies),
            "activation_rate": [1.0] + [sparse] * (epochs - 1),
            "threshold": [None] + [threshold] * (epochs - 1),
            "train_seconds": [seconds * (i + 1) / epochs for i in range(epochs)],
            "est_energy_kj": [seconds * (i + 1) / epochs for i in range(epochs)],
            "est_flops_g": [float(i) for i in range(epochs)],
            **{f"samples_{kind}": [100] * epochs for kind in ("loaded", "scored", "trained")},
            **(history or {}),
        },
        "status": "completed",
        "seed": config["training"]["seed"],
        "final_accuracy": accuracies[-1],
        "train_seconds": seconds,
        "energy_kj": None,
        "config": config,
        "environment": {"python": "3.12", "gpu": None, "platform": "Linux"},
        **(extra or {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"final_results_{name}.json"
    path.write_text(json.dumps(result))
    return path


def write_sweep(folder: Path) -> Path:
    """Three settings with three seeds, one of them dense, one failed run, and a file with hostile
    text.
    """
    for seed in range(3):
        common = {"training__seed": seed}
        write_run(folder, f"a{seed}", (40.0, 60.0, 71 + seed / 3), 20 + seed, **common)
        write_run(
            folder,
            f"b{seed}",
            (40.0, 60.0, 72 + seed / 7),
            21 + seed,
            **common,
            ast__target_activation=0.5,
        )
        write_run(
            folder, f"d{seed}", (40.0, 60.0, 73 + seed / 9), 30 + seed, **common, ast__mode="dense"
        )
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(1)>&\"'$x_{"
    write_run(folder, "h", (40.0, 60.0, 70.0), 25.0, ast__threshold_unit=hostile)
    write_run(folder, "f", extra={"status": "failed", "error": hostile}, training__seed=9)
    return folder


def studies_of(*folders: Path, **options: str) -> dict[str, Study]:
    """By title, a study for each comparison group."""
    return {study.title: study for study in compare(*load_runs(folders), **options)}


def study_of(*folders: Path, **options: str) -> Study:
    """The study of folders whose runs are one comparison group."""
    (study,) = studies_of(*folders, **options).values()
    return study


def analyze(argv: list[str]) -> int:
    """The exit code of the command."""
    return run_cli(lambda: analyze_results.main(argv))


def run_digits(output_dir: Path, *arguments: str) -> int:
    """The exit code of run_experiment.py on a few digits: a dense epoch, then a sparse one."""
    settings = ["training.epochs=2", "ast.warmup_epochs=1", "dataset.max_train_samples=128"]
    settings += [
        "dataset.max_val_samples=64",
        "training.device=cpu",
        f"logging.output_dir={output_dir}",
    ]
    smoke = str(REPO / "configs/digits_smoke.yaml")
    return run_cli(lambda: run_experiment.main(["--config", smoke, *settings, *arguments]))


def processes(word: str) -> list[int]:
    """The ids of the processes with `word` on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"\0{word}\0" in path.read_text():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def folder_config(folder, *overrides):
    paths = [f"dataset.train_dir={folder}/train", f"dataset.val_dir={folder}/val"]
    return make_config(
        "dataset.type=folder", "dataset.image_size=32", "training.batch_size=8", *paths, *overrides
    )


def hf_config(folder, *overrides):
    return make_config(
        "dataset.type=hf", f"dataset.name={folder}", "dataset.split_val=test", *overrides
    )


def pictures(count, side, seed=0):
    """Smooth random pictures: what resizing errors would show on."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 255
    return v2.functional.resize(coarse, [side, side], antialias=True).round().to(torch.uint8)


def smooth_pictures(folder):
    """Replace the noisy pictures of a folder by smooth ones, on which a second resizing shows
    little.
    """
    for i, path in enumerate(sorted(folder.rglob("*.jpg"))):
        pixels = v2.functional.resize(pictures(1, 60, seed=i)[0], [60, 80], antialias=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path, quality=95)


def write_parquet(folder, split, names, labels, image=None):
    """Write <folder>/<split>.parquet of equal pictures; labels are in column `kind`, integers where
    `names` is None.
    """
    import datasets

    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (200, 40, 30)).save(buffer, "PNG")
    kind = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    features = datasets.Features({"img": datasets.Image(), "kind": kind})
    rows = {
        "img": [{"bytes": image or buffer.getvalue(), "path": None}] * len(labels),
        "kind": labels,
    }
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
