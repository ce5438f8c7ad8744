"""Every command of the README, as a subprocess, in a folder like a fresh clone.

What a command needs and this machine lacks (ImageNet, the hub, a GPU) is replaced by overrides: real pictures made
here, a tiny network, few epochs.
"""

import re
import shlex
import shutil
import subprocess
import sys

import pytest

import runs
from conftest import REPO

README = (REPO / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^(?:.*&& \.venv/bin/)?python (?:-m )?(\S+.*)$", README, re.MULTILINE)
TINY = "model.name=test_resnet dataset.image_size=32 training.epochs=3 ast.warmup_epochs=1 ast.anneal_epochs=1 "
TINY += "training.batch_size=8 training.lr_warmup_epochs=0 dataset.num_classes=3 training.compile=off"
FOLDER = f"{TINY} dataset.train_dir=IMAGES/train dataset.val_dir=IMAGES/val"
PARQUET = f"{TINY} dataset.name=PARQUET dataset.subset=null dataset.revision=null dataset.split_val=test"
FEW = "--epochs 4 dataset.max_train_samples=256"
SWEEP = "scripts/run_sweep.py --configs configs/digits_smoke.yaml --grid ast.mode=ast,random "
SWEEP += "ast.target_activation=0.1,0.25,0.5 --seeds 0 1 2 --output-dir results/sweep"
RESNET = "scripts/run_experiment.py --config configs/imagenet_resnet50_ast.yaml"
ADDED = {
    "scripts/run_experiment.py --config configs/digits_smoke.yaml": "",
    "scripts/run_experiment.py --config configs/digits_smoke.yaml --resume auto": "",  # the one above, finished
    RESNET: FOLDER,
    f"{RESNET} --epochs 50 --target-activation 0.3": "--dry-run",
    "scripts/run_experiment.py --config configs/digits_smoke.yaml ast.mode=dense training.lr=1e-3 --dry-run": "",
    "scripts/run_sweep.py --configs configs/imagenet_resnet50_ast.yaml configs/imagenet_vitb16_ast.yaml": FOLDER,
    "scripts/train_ast.py --config configs/imagenet_resnet50_ast.yaml": FOLDER,
    f"{SWEEP} --dry-run": "",
    f"{SWEEP} --resume": "--grid ast.mode=ast --seeds 0 training.epochs=4 dataset.max_train_samples=256",
    "scripts/run_experiment.py --config configs/digits_smoke.yaml --dense-twin": FEW,
    f"{RESNET} --nproc 8 --max-restarts 3": f"{FOLDER} --nproc 2 --epochs 3 training.device=cpu",
    "scripts/run_experiment.py --config configs/digits_smoke.yaml --nproc 2 training.device=cpu": f"{FEW} --seed 1",
    "scripts/analyze_results.py --results-dir results": "",  # above, the same folder got others too
    "scripts/analyze_results.py --results-dir results --plot --save-dir results/plots": "",
    "scripts/analyze_results.py --results-dir results/sweep --report results/report.html --csv results/table.csv": "",
    "scripts/download_imagenette.py": "",  # finds the folder there; the download has a test of its own
    "scripts/run_experiment.py --config configs/imagenette_hf_ast.yaml --epochs 10": f"{PARQUET} --epochs 3",
    "scripts/benchmark.py steps --model resnet50 --image-size 224 --batch-size 256": "--model test_resnet --classes 10 "
    "--image-size 32 --batch-size 16 --steps 1 --repeats 1 --no-compile",
    "scripts/benchmark.py steps --nproc 2 --batch-size 512 --json results/steps_2.json": "--model test_resnet "
    "--classes 10 --image-size 32 --batch-size 16 --steps 8 --repeats 1 --no-compile --device cpu",
    "scripts/benchmark.py scaling --steps results/steps_2.json --gpus 8 64 512": "",  # of the one above
    "scripts/benchmark.py input --folder data/imagenette2-160/train --image-size 128": "--folder IMAGES/train "
    "--batch-size 8 --steps 2 --repeats 1 --workers 1",
}
FIRST = {command.split()[0]: command for command in reversed(ADDED)}.values()  # of each script, by a fresh interpreter


def test_every_command_is_known_here():
    assert set(COMMANDS) - {"pytest"} == set(ADDED)
    assert "pytest" in COMMANDS


def test_ci_runs_the_readmes_test_command():
    line = re.search(r"^.*pytest$", README, re.MULTILINE)[0]
    found = subprocess.run(
        ["grep", "--max-count=1", "pytest$", "README.md"], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == line
    assert "grep --max-count=1 'pytest$' README.md" in (REPO / ".ci/run").read_text(encoding="utf-8")
    assert line.startswith("python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && ")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone")
    for name in ("scripts", "configs"):
        shutil.copytree(REPO / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "data" / "imagenette2-160").mkdir(parents=True)
    (folder / "results").mkdir()
    return folder


@pytest.mark.parametrize("command", ADDED, ids=lambda command: command.replace("scripts/", "").replace("configs/", ""))
def test_command_works(command, clone, image_folder, parquet_folder):
    added = ADDED[command].replace("IMAGES", str(image_folder)).replace("PARQUET", str(parquet_folder))
    line = [sys.executable, *shlex.split(command), *shlex.split(added)]
    if command in FIRST:
        done = subprocess.run(line, cwd=clone, capture_output=True, text=True, timeout=180)
    else:
        done = runs.command(line[1:], cwd=clone, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    if command == "scripts/run_experiment.py --config configs/digits_smoke.yaml":
        accuracy = float(re.search(r"final (\d+\.\d+) %", done.stdout)[1])
        assert accuracy > 90
        rates = [float(line.split()[5]) for line in done.stdout.splitlines() if re.match(r" +\d+/20 +ast", line)]
        assert max(abs(rate - 0.25) for rate in rates[-5:]) < 0.03
    if "--resume auto" in command:
        assert "resumed from results/checkpoints/" in done.stdout
    if "--plot" in command:
        assert len(list((clone / "results" / "plots").rglob("accuracy.png"))) >= 1  # in each group's folder, if several
        assert len(list((clone / "results" / "plots").rglob("*.png"))) % 8 == 0
