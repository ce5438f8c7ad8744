"""Every command of the README, as a subprocess, in a folder like a fresh clone.

What a command needs and this machine lacks (ImageNet, the hub, a GPU) is replaced by overrides:
real pictures made here, a tiny network, few epochs.
"""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

import runs
from conftest import REPO

README = (REPO / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^(?:.*&& \.venv/bin/)?python (?:-m )?(\S+.*)$", README, re.MULTILINE)
TINY = (
    "model.name=test_resnet dataset.image_size=32 training.epochs=3 ast.warmup_epochs=1 "
    "ast.anneal_epochs=1 "
)
TINY += (
    "training.batch_size=8 training.lr_warmup_epochs=0 dataset.num_classes=3 training.compile=off"
)
FOLDER = f"{TINY} dataset.train_dir=IMAGES/train dataset.val_dir=IMAGES/val"
PICTURES = f"{TINY} dataset.train_dir=IMAGES/train"
EVALUATE = "scripts/evaluate.py --weights results/latest"
NEWEST = "--weights results/pictures/latest"
RUN = "scripts/run_experiment.py --config configs"
OWN = "model.name=tiny dataset.type=stripes training.loss=brier ast.measure=el2n ast.rule=trimmed"
FEW = "training.epochs=4 dataset.max_train_samples=64"
ADDED = {
    f"{RUN}/digits_smoke.yaml": "training.epochs=10",
    f"{RUN}/pictures_ast.yaml": f"{PICTURES} --output-dir results/pictures",
    f"{RUN}/pictures_ast.yaml --dense-twin": f"{PICTURES} --output-dir results/twin",
    EVALUATE: NEWEST,
    f"{EVALUATE} --images photo.jpg": f"{NEWEST} --images IMAGES/val",
    # the packages that a .onnx file needs are optional; tests/test_export.py makes one
    "scripts/export.py --weights results/latest --output model.onnx": f"{NEWEST} --output m.pt2",
    f"{EVALUATE} --images photos --predictions predictions.csv": f"{NEWEST} --images IMAGES/val",
    f"{RUN}/imagenet_resnet50_ast.yaml --epochs 50 --target-activation 0.3": f"{FOLDER} --epochs 3",
    "scripts/run_sweep.py --configs configs/digits_smoke.yaml --grid ast.mode=ast,dense,random "
    "--seeds 0 1 2 --output-dir results/sweep": "--grid ast.mode=ast,dense --seeds 0 --one-process "
    "training.epochs=4 dataset.max_train_samples=64",
    "scripts/run_sweep.py --configs configs/digits_smoke.yaml --seeds 0 1 2 3 --jobs 2 "
    "--output-dir results/shared": "--one-process --jobs 1 --seeds 0 training.epochs=2 "
    "ast.warmup_epochs=1",
    # here there is no SLURM: the same by submitit's own executor, and no GPUs
    "scripts/run_sweep.py --configs configs/digits_smoke.yaml --random 8 "
    '"training.lr=log(1e-4,1e-1)" --launcher slurm --gpus 1 --cpus 8 --timeout-min 120 --jobs 4': (
        "--launcher local --gpus training.epochs=2 ast.warmup_epochs=1 --random 1 "
        "'training.lr=log(1e-4,1e-1)' --output-dir results/jobs"
    ),
    "scripts/analyze_results.py --results-dir results/sweep --plot --save-dir results/plots "
    "--report results/report.html": "",
    f"{RUN}/digits_smoke.yaml --import mine.py {OWN}": f"{FEW} --output-dir results/own",
    "scripts/run_sweep.py --configs configs/digits_smoke.yaml --import mine.py --grid "
    "ast.measure=el2n,loss_entropy --seeds 0 1": f"--one-process --seeds 0 {FEW} "
    "--output-dir results/grid",
    f"{EVALUATE} --import mine.py": "--weights results/own/latest",
    "scripts/export.py --weights results/latest --import mine.py --output model.onnx": "--weights "
    "results/own/latest --output own.pt2",
    # finds the folder there; the download has a test of its own
    "scripts/download_imagenette.py": "",
    "scripts/benchmark.py steps --model resnet50 --image-size 224 --batch-size 256": "--model "
    "test_resnet --classes 10 --image-size 16 --batch-size 8 --steps 1 --repeats 1 --no-compile "
    "--only dense random",
}
SMOKE = f"{RUN}/digits_smoke.yaml"


def test_every_command_is_known_here():
    assert set(COMMANDS) - {"pytest"} == set(ADDED)
    assert len(README.splitlines()) <= 200
    assert "pytest" in COMMANDS


def test_ci_runs_the_readmes_test_command():
    line = re.search(r"^.*pytest$", README, re.MULTILINE)[0]
    found = subprocess.run(
        ["grep", "--max-count=1", "pytest$", "README.md"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == line
    assert "grep --max-count=1 'pytest$' README.md" in (REPO / ".ci/run").read_text(
        encoding="utf-8"
    )
    assert line.startswith(
        "python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && "
    )


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone")
    for name in ("scripts", "configs"):
        shutil.copytree(REPO / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "data" / "imagenette2-160").mkdir(parents=True)
    (folder / "results").mkdir()
    (folder / "mine.py").write_text(runs.own_code(), encoding="utf-8")
    return folder


def ended(command, clone, image_folder, fresh):
    """What comes of a command, by a fresh interpreter or by a fork of this one, which has torch."""
    added = ADDED[command].replace("IMAGES", str(image_folder))
    line = [*shlex.split(command), *shlex.split(added)]
    if not fresh:
        return runs.command(line, cwd=clone, timeout=300)
    line.insert(0, sys.executable)
    return subprocess.run(line, cwd=clone, capture_output=True, text=True, timeout=300)


@pytest.mark.long
def test_every_command_works_by_a_fresh_interpreter(clone, image_folder):
    for command in ADDED:
        done = ended(command, clone, image_folder, fresh=True)
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "command", ADDED, ids=lambda command: command.replace("scripts/", "").replace("configs/", "")
)
def test_command_works(command, clone, image_folder):
    done = ended(command, clone, image_folder, fresh=command == SMOKE)
    assert done.returncode == 0, done.stderr[-2000:]
    if command == SMOKE:
        accuracy = float(re.search(r"final (\d+\.\d+) %", done.stdout)[1])
        assert accuracy > 90
        rates = [
            float(line.split()[5])
            for line in done.stdout.splitlines()
            if re.match(r" +\d+/10 +ast", line)
        ]
        assert max(abs(rate - 0.25) for rate in rates[-5:]) < 0.03
    if "--images" in command:
        assert len(done.stdout.splitlines()) == sum(
            path.is_file() for path in (image_folder / "val").rglob("*")
        )
    if "--plot" in command:
        # of energy nothing is known without a GPU
        figures = 8 if torch.cuda.is_available() else 6
        assert len(list((clone / "results" / "plots").glob("*.png"))) == figures
        assert (clone / "results" / "report.html").stat().st_size > 0
