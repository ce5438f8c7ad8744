"""A run's weights, used by other commands as a user would: evaluated, asked about pictures, trained
on.
"""

import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import evaluate
from conftest import REPO
from helpers import folder_config
from lab.config.loading import checkpoint_folder
from lab.outputs.evaluation import calibration
from lab.study.cli import run_cli
from train_ast import train

DIGITS = ["--config", "configs/digits_smoke.yaml"]
QUICK = [
    "training.epochs=2",
    "ast.warmup_epochs=1",
    "dataset.max_val_samples=200",
    "training.device=cpu",
]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run on digits by the command: (its output folder, its result, its weights folder)."""
    folder = tmp_path_factory.mktemp("digits")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import run_experiment

    config = str(REPO / "configs/digits_smoke.yaml")
    assert (
        run_cli(
            lambda: run_experiment.main(["--config", config, *QUICK, "--output-dir", str(folder)])
        )
        == 0
    )
    (path,) = folder.glob("final_results_*.json")
    result = json.loads(path.read_text())
    return folder, result, folder / result["weights"]


def test_the_commands_work_on_what_a_run_has_left(digits, tmp_path, script):
    """Evaluated as the run validated, by class too; then another run starts from it, with fewer
    classes to know.
    """
    _, result, weights = digits
    done = script(
        "evaluate", "--weights", weights, *DIGITS, *QUICK, "--output-dir", tmp_path / "found"
    )
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads((tmp_path / "found" / "evaluation.json").read_text())
    assert figures["accuracy"] == result["best_accuracy"]
    if result["best_epoch"] == 2:
        assert figures["classes"]["accuracy"] == result["classes"]["val_acc"]
        assert figures["classes"]["samples"] == result["classes"]["val_samples"]
    assert f"accuracy           {result['best_accuracy']:6.2f} %  of 200 pictures" in done.stdout
    confusion = np.array(figures["confusion"])
    assert confusion.sum() == 200
    assert 100 * confusion.trace() / 200 == figures["accuracy"] <= figures["top5_accuracy"] <= 100
    assert 0 < figures["calibration_error"] < 0.5
    with Image.open(tmp_path / "found" / "evaluation.png") as image:
        assert len(set(image.convert("L").tobytes())) > 20
    tuned = [
        "--output-dir",
        tmp_path / "tuned",
        f"model.weights={weights}",
        "training.epochs=2",
        "training.lr=1e-6",
    ]
    tuned += ["dataset.max_train_samples=64"]
    done = script("run_experiment", *DIGITS, *QUICK, *tuned)
    assert done.returncode == 0, done.stderr
    assert f"model.weights: {92} tensors of {weights}/model.safetensors\n" in done.stdout
    (path,) = (tmp_path / "tuned").glob("final_results_*.json")
    assert json.loads(path.read_text())["final_accuracy"] > result["best_accuracy"] - 3


def test_pictures_of_digits_are_named(digits, tmp_path, capsys):
    pixels, labels = load_digits(return_X_y=True)
    for i in range(30):
        name = tmp_path / "some" / f"{i:02}_{labels[i]}.png"
        name.parent.mkdir(exist_ok=True)
        Image.fromarray((pixels[i].reshape(8, 8) * (255 / 16)).round().astype(np.uint8)).save(name)
    (tmp_path / "some" / "notes.txt").write_text("no picture")
    alone = tmp_path / "some" / f"00_{labels[0]}.png"
    asked = ["--weights", digits[2], "--images", tmp_path / "some", alone, "--top", 2]
    assert run_cli(lambda: evaluate.main([str(each) for each in asked])) == 0
    printed = capsys.readouterr().out
    lines = re.findall(r"^(.*)_(\d)\.png: (\d) (\d+\.\d) %, \d \d+\.\d %$", printed, re.MULTILINE)
    assert len(lines) == printed.count("\n") == 31
    assert lines[0] == lines[30]
    assert sum(own == predicted for _, own, predicted, _ in lines) > 22


@pytest.mark.parametrize("cache", ["none", "device"])
def test_folders_are_validated_as_in_the_run(cache, tmp_path, image_folder, capsys):
    """Crops of pictures, cached or not; then with the validation classes in another place, and
    fewer of them.
    """
    more = [
        "model.name=test_resnet",
        "training.epochs=2",
        "ast.mode=dense",
        "training.num_workers=0",
    ]
    more += [f"dataset.cache={cache}", "dataset.augment=random_resized_crop", "training.lr=0.02"]
    config = folder_config(image_folder, *more, f"logging.output_dir={tmp_path}/out")
    result, _ = train(config)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    weights = str(checkpoint_folder(config) / "weights")
    asked = [
        "--weights",
        weights,
        "--config",
        str(tmp_path / "config.json"),
        "--output-dir",
        str(tmp_path / "ev"),
    ]
    assert run_cli(lambda: evaluate.main(asked)) == 0
    assert (
        json.loads((tmp_path / "ev" / "evaluation.json").read_text())["accuracy"]
        == result["best_accuracy"]
    )
    for part in ("train", "val"):
        shutil.rmtree(image_folder / part / "blue")
    assert run_cli(lambda: evaluate.main(asked)) == 0
    found = json.loads((tmp_path / "ev" / "evaluation.json").read_text())
    assert found["classes"]["samples"] == [0, 3, 3]
    os.rename(image_folder / "train" / "red", image_folder / "train" / "yellow")
    os.rename(image_folder / "val" / "red", image_folder / "val" / "yellow")
    capsys.readouterr()
    assert run_cli(lambda: evaluate.main(asked)) == 2
    assert (
        capsys.readouterr().err
        == "error: --weights: class 'yellow' of the data is not among its classes\n"
    )


def test_what_is_wrong_is_one_line(digits, tmp_path, capsys):
    _, _, weights = digits
    config = ["--config", str(REPO / "configs/digits_smoke.yaml"), *QUICK]
    bare = tmp_path / "bare"
    damaged = tmp_path / "damaged"
    for folder in (bare, damaged):
        shutil.copytree(weights, folder)
    (bare / "config.json").unlink()
    (damaged / "model.safetensors").write_bytes(b"\0" * 100)
    (tmp_path / "x.png").write_bytes(b"none")
    cases = [
        (["--weights", str(weights)], "--config: needed"),
        (["--weights", str(tmp_path / "no"), *config], "--weights: "),
        (["--weights", str(bare), *config], "no config.json in it"),
        (["--weights", str(damaged), *config], "damaged, or no safetensors file"),
        (["--weights", str(weights), "--images", str(tmp_path / "no.png")], "--images: "),
        (["--weights", str(weights), "--images", str(tmp_path / "x.png")], "not a readable image"),
        (["--weights", str(weights), "--images", str(tmp_path / "damaged")], "no pictures in it"),
        (
            ["--weights", str(weights), "--config", str(tmp_path / "no.yaml")],
            "cannot read the config",
        ),
        (
            ["--weights", str(weights), *config, "--output-dir", "/proc/nowhere"],
            "--output-dir: cannot write",
        ),
    ]
    for arguments, complaint in cases:
        code = run_cli(lambda arguments=arguments: evaluate.main(arguments))
        error = capsys.readouterr().err
        assert (code, error.count("\n")) == (2, 1), error
        assert complaint in error


def test_calibration_is_guos():
    """Two bins by hand; a network that is as sure as it is right has none."""
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    correct = np.array([1, 1, 1, 0, 1, 0], dtype=bool)
    error, bins = calibration(confidence, correct)
    assert error == pytest.approx(4 / 6 * 0.2 + 2 / 6 * 0.05)
    assert [row["samples"] for row in bins] == [2, 4]
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.1, 1, 100_000)
    assert calibration(sure, rng.uniform(size=len(sure)) < sure)[0] < 0.01
    assert calibration(np.array([1.0, 1.0]), np.array([True, True]))[0] == 0
