"""A run's weights, used by other commands as a user would: evaluated, asked about pictures, trained
on.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.special import softmax
from sklearn.datasets import load_digits
from timm.models._hub import save_for_hf

import evaluate
from conftest import REPO, make_config
from helpers import folder_config
from lab.config.loading import checkpoint_folder
from lab.data.datasets import DigitsDataset
from lab.data.randomness import label_shifts
from lab.models.building import get_model
from lab.outputs.evaluation import calibration
from lab.study.cli import run_cli
from runs import command, exit_code, forked, program
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


def test_the_commands_work_on_what_a_run_has_left(digits, tmp_path):
    """Evaluated as the run validated, by class too; then another run starts from it, with fewer
    classes to know.
    """
    _, result, weights = digits
    place = ["--output-dir", tmp_path / "found"]
    done = command(["scripts/evaluate.py", "--weights", weights, *DIGITS, *QUICK, *place])
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
    done = command(["scripts/run_experiment.py", *DIGITS, *QUICK, *tuned])
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
        (["--weights", str(bare)], "--config: needed"),
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


def test_a_run_is_named_in_four_ways_and_brings_its_config(digits, tmp_path, capsys):
    """Without --config the validation set is the run's own, and that is said."""
    folder, result, weights = digits
    (path,) = folder.glob("final_results_*.json")
    outs = []
    for run in (weights, weights.parent, path, folder / "latest"):
        code, out, err = asked(capsys, "--weights", run)
        assert (code, err) == (0, f"note: the config is that of the run: {path}\n")
        outs.append(out)
    assert outs == [outs[0]] * 4
    assert accuracy(out) == round(result["best_accuracy"], 2)
    _, out, err = asked(capsys, "--weights", folder / "latest", "dataset.max_val_samples=50")
    assert "of 50 pictures (95 %: " in out
    _, given, _ = asked(capsys, "--weights", weights, *SMOKE)
    assert given == outs[0]
    code, _, err = asked(capsys, "--weights", folder)
    assert (code, err.count("\n")) == (2, 1)
    assert f"its newest run: {folder}/latest" in err


# ---------------------------------------------------------------------------- Files of predictions


def test_a_validation_set_is_predicted_into_a_file(digits, tmp_path, capsys):
    file = tmp_path / "new" / "all.parquet"
    code, out, _ = asked(
        capsys, "--weights", digits[0] / "latest", "--predictions", file, "--logits", "--top", "2"
    )
    assert code == 0
    assert out.endswith(f"predictions: {file}\n")
    table = pd.read_parquet(file)
    assert len(table) == 200
    assert 100 * (table["label"] == table["class_1"]).mean() == digits[1]["best_accuracy"]
    logits = table[[f"logit {digit}" for digit in range(10)]].to_numpy()
    assert (logits.argmax(1) == table["class_1"].astype(int)).all()
    assert table["probability_1"].to_numpy() == pytest.approx(softmax(logits, axis=1).max(1))
    assert table["path"][0].startswith("sample ")
    assert table["problem"].isna().all()


def test_unreadable_pictures_are_rows_and_a_count(digits, drawn, tmp_path, capsys):
    shutil.copytree(drawn, tmp_path / "some")
    (tmp_path / "some" / "03_bad.png").write_bytes(b"none")
    (tmp_path / "some" / "07\nbad, 1.png").write_bytes(b"none")
    images = ["--weights", digits[2], "--images", tmp_path / "some"]
    for form in ("csv", "jsonl"):
        file = tmp_path / f"all.{form}"
        code, out, err = asked(capsys, *images, "--predictions", file)
        assert (code, out.count("\n")) == (1, 40)
        assert err == (f"error: 2 of 42 pictures could not be read; the reasons are in {file}\n")
        read = pd.read_json if form == "jsonl" else pd.read_csv
        table = read(file, **({"lines": True} if form == "jsonl" else {"dtype": {"label": str}}))
        assert list(table["path"]) == sorted(map(str, (tmp_path / "some").iterdir()))
        assert table["problem"].notna().sum() == table["class_1"].isna().sum() == 2
        assert table["label"].isna().all()
    code, _, err = asked(
        capsys, *images, "--predictions", tmp_path / "a.csv", "dataset.max_bad_images=2"
    )
    assert (code, err.count("note: ")) == (0, 2)


@pytest.mark.parametrize("cache", ["none", "device"])
def test_unreadable_validation_pictures_are_rows_too(cache, tmp_path, image_folder, capsys):
    (image_folder / "val" / "green" / "1.jpg").write_bytes(b"none")
    more = [f"dataset.cache={cache}", "dataset.max_bad_images=2"]
    config, weights, _ = coloured(image_folder, tmp_path, *more)
    file = tmp_path / "all.csv"
    place = ["--weights", weights, "--config", config, "--predictions", file]
    code, _, err = asked(capsys, *place, "dataset.max_bad_images=0")
    assert (code, err) == (
        1,
        f"error: 1 of 9 pictures could not be read; the reasons are in {file}\n",
    )
    table = pd.read_csv(file)
    assert list(table["path"]) == sorted(map(str, (image_folder / "val").rglob("*.jpg")))
    assert list(table["label"].fillna("")) == 3 * ["blue"] + ["green", "", "green"] + 3 * ["red"]
    assert table["problem"][4].startswith("not a readable image")
    assert asked(capsys, *place)[0] == 0


def test_a_split_that_is_no_longer_the_runs_is_said(tmp_path, image_folder, capsys):
    more = ["model.name=test_resnet", "training.epochs=1", "ast.mode=dense"]
    more += ["training.num_workers=0", "training.batch_size=8", "dataset.image_size=32"]
    more += ["dataset.type=folder", f"dataset.train_dir={image_folder}/train"]
    train(make_config(*more, "dataset.val_fraction=0.2", f"logging.output_dir={tmp_path}/out"))
    place = ["--weights", tmp_path / "out" / "latest", "--output-dir", tmp_path]
    code, _, err = asked(capsys, *place)
    assert (code, err.count("note: ")) == (0, 1)
    assert json.loads((tmp_path / "evaluation.json").read_text())["val_split"]["pictures"] == 6
    for path in sorted((image_folder / "train" / "red").iterdir())[:4]:
        path.unlink()
    code, _, err = asked(capsys, *place)
    assert (code, err.count("note: ")) == (0, 2)
    assert "pictures have changed since the run, and it may have seen some" in err


def test_wrong_options_of_predictions_are_one_line(digits, drawn, tmp_path, capsys):
    images = ["--weights", digits[2], "--images", drawn]
    for options, complaint in (
        (["--predictions", tmp_path / "a.txt"], "its name ends in none of .csv, .jsonl, .parquet"),
        (["--logits"], "--logits: only with --predictions"),
        (["--predictions", "/proc/nowhere/a.csv"], "--predictions: cannot write to /proc/nowhere"),
    ):
        code, out, err = asked(capsys, *images, *options)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert complaint in err


def test_wrong_labels_of_the_training_set_are_listed(digits, tmp_path, capsys):
    """Labels that were right in training are wrong now; every picture comes twice."""
    file = tmp_path / "new" / "wrong.csv"
    noise = ["dataset.label_noise=0.2", "training.seed=3", "dataset.repeat=2"]
    weights = ["--weights", digits[0] / "latest"]
    code, out, err = asked(capsys, *weights, "--suspects", file, *noise)
    assert code == 0
    assert "training.list_suspects=true judges them before" in err
    table = pd.read_csv(file)
    assert not table["index"].duplicated().any()
    train_set, _ = DigitsDataset.splits(None)
    wrong = label_shifts(len(train_set), 10, 0.2, 3) > 0
    found = wrong[table["index"]]
    assert found.mean() > 0.8
    assert found.sum() > 0.8 * wrong.sum()
    right = train_set.labels()[table["index"]]
    assert (table["suggested"] == right)[found].mean() > 0.8
    assert f"suspected labels: {file} ({len(table)} of 1,437 samples; estimated wrong: " in out
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for options, complaint in (
        (["--suspects", "a.txt"], "--suspects: a.txt: its name does not end in .csv"),
        (["--suspects", file, "--output-dir", tmp_path], "--suspects: not with --output-dir"),
        (["--suspects", "/proc/nowhere/a.csv"], "--suspects: cannot write to /proc/nowhere"),
    ):
        code, out, err = asked(capsys, *weights, *options)
        assert (code, out) == (2, "")
        assert complaint in err


# --------------------------------------------------------------------- Weights that are not as told


def variant(weights, folder, facts=None, tensors=None):
    """A copy of a weights folder with changed facts and tensors. They are functions that change
    what they get.
    """
    shutil.copytree(weights, folder)
    if facts is not None:
        text = json.loads((folder / "config.json").read_text())
        facts(text)
        (folder / "config.json").write_text(json.dumps(text))
    if tensors is not None:
        state = load_file(folder / "model.safetensors")
        tensors(state)
        save_file(state, folder / "model.safetensors")
    return folder


def asked(capsys, *arguments):
    """(exit code, stdout, stderr) of the command, in this process."""
    capsys.readouterr()
    code = run_cli(lambda: evaluate.main([str(each) for each in arguments]))
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def accuracy(out):
    return float(re.search(r"^accuracy +([\d.]+) %", out, re.MULTILINE)[1])


SMOKE = ["--config", str(REPO / "configs/digits_smoke.yaml"), *QUICK]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Forty digits as files, <number>_<label>.png."""
    folder = tmp_path_factory.mktemp("drawn")
    pixels, labels = load_digits(return_X_y=True)
    for i in range(40):
        grey = (pixels[i].reshape(8, 8) * (255 / 16)).round().astype(np.uint8)
        Image.fromarray(grey).save(folder / f"{i:02}_{labels[i]}.png")
    return folder


def test_an_override_leaves_what_the_folder_says_of_pictures(digits, drawn, capsys):
    """Any override without --config once put the defaults in place of size and crop."""
    plain = asked(capsys, "--weights", digits[2], "--images", drawn)
    assert plain[0] == 0
    assert plain[2] == ""
    assert asked(capsys, "--weights", digits[2], "--images", drawn, "training.device=cpu") == plain
    after = ["training.device=cpu", "training.batch_size=7", "--images", drawn, "--top", "3"]
    code, out, err = asked(capsys, "--weights", digits[2], *after)
    assert (code, err) == (0, "")
    assert re.sub(r"\d\.\d %", "", out) == re.sub(r"\d\.\d %", "", plain[1])
    code, _, err = asked(capsys, "--weights", digits[2], "--images", drawn, "dataset.image_size=40")
    assert code == 0
    assert "note: pictures are shown as 40 px, squash 1, bilinear, and the weights are for" in err
    code, out, err = asked(capsys, "--weights", digits[2], "--images", drawn, "model.name=resnet50")
    assert (code, out) == (0, plain[1])
    assert err == "note: model.name is not used: the network is the one of --weights\n"


def drop(*names):
    return lambda state: [state.pop(name) for name in names]


def scale(name, factor):
    return lambda state: state.update({name: state[name] * factor})


def set_facts(**changes):
    return lambda facts: facts.update(changes)


def set_prepared(**changes):
    return lambda facts: facts["pretrained_cfg"].update(changes)


TEN = [str(number) for number in range(10)]
NOT_WHOLE = {
    "no head": (None, drop("fc.weight", "fc.bias"), "fc.weight is missing"),
    "no bias": (None, drop("fc.bias"), "fc.bias is missing"),
    "a name too few": (set_facts(label_names=TEN[:9]), None, "num_classes is 10, and label_names"),
    "a class too few": (set_facts(label_names=TEN[:9], num_classes=9), None, "fc.weight is [10, "),
    "a class too many": (set_facts(label_names=None, num_classes=11), None, "fc.weight is [10, "),
    "a name twice": (set_facts(label_names=[*TEN[:9], "0"]), None, "'0' comes 2 times"),
    "no classes": (set_facts(label_names=None, num_classes=0), None, "0 classes: there is nothing"),
    "no count": (set_facts(label_names=None, num_classes=None), None, "0 classes: there is"),
    "one class": (set_facts(label_names=["x"], num_classes=1), None, "1 classes: there is nothing"),
    "nan": (
        None,
        scale("conv1.0.weight", float("nan")),
        "conv1.0.weight holds values that are not",
    ),
    "infinite": (None, scale("fc.bias", float("inf")), "fc.bias holds values that are not finite"),
    "variance": (None, scale("bn1.running_var", -1), "bn1.running_var holds variances below 0"),
    "mean": (None, scale("bn1.running_mean", float("inf")), "bn1.running_mean holds values"),
    "overflow": (None, scale("bn1.weight", 3e38), "the logits are not finite"),
    "std of zeros": (set_prepared(std=[0, 0, 0]), None, "pretrained_cfg.std.0: Input should be"),
    "std of NaN": (set_prepared(std=[float("nan")] * 3), None, "pretrained_cfg.std.0"),
    "grey levels to 255": (set_prepared(mean=[123.7, 116.3, 103.5]), None, "pretrained_cfg.mean.0"),
    "grey pictures": (set_prepared(input_size=[1, 16, 16]), None, "pretrained_cfg.input_size.0"),
    "oblong": (set_prepared(input_size=[3, 16, 32]), None, "[3, 16, 32] is not square"),
    "huge": (set_prepared(input_size=[3, 10**7, 10**7]), None, "pretrained_cfg.input_size.1"),
    "unknown crop": (set_prepared(crop_mode="tiles"), None, "pretrained_cfg.crop_mode"),
    "another network": (set_facts(architecture="resnet18"), None, "not of model.name=resnet18: "),
    "no network": (set_facts(architecture="resnet1"), None, "no model 'resnet1'"),
    "a number": (set_facts(architecture=18), None, "architecture: Input should be a valid string"),
    "another file": (set_facts(model_args={"checkpoint_path": "x"}), None, "model_args.checkpoint"),
    "odd arguments": (set_facts(model_args={"depth": "x"}), None, "does not take dataset.image_"),
}


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("kind", NOT_WHOLE)
def test_weights_that_are_not_whole_are_refused(kind, images, digits, drawn, tmp_path, capsys):
    facts, tensors, complaint = NOT_WHOLE[kind]
    folder = variant(digits[2], tmp_path / "weights", facts, tensors)
    code, out, err = asked(capsys, "--weights", folder, *(["--images", drawn] if images else SMOKE))
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert line.startswith("error: --weights: ")
    assert complaint in line


def test_a_description_that_is_not_the_own_is_named(digits, tmp_path, capsys):
    folder = variant(digits[2], tmp_path / "mixed", set_facts(label_names=TEN[::-1]))
    code, _, err = asked(capsys, "--weights", folder, *SMOKE)
    assert (code, err) == (0, "note: config.json is not the one that was written with them\n")
    rewritten = tmp_path / "rewritten"
    shutil.copytree(digits[2], rewritten)
    text = json.loads((rewritten / "config.json").read_text())
    (rewritten / "config.json").write_text(json.dumps(text, sort_keys=True))
    assert asked(capsys, "--weights", rewritten, *SMOKE)[2] == ""


def test_pictures_of_another_size_than_the_weights_are_named(digits, capsys):
    code, out, err = asked(capsys, "--weights", digits[2], *SMOKE)
    assert (code, err) == (0, "")
    code, other, err = asked(capsys, "--weights", digits[2], *SMOKE, "dataset.image_size=24")
    assert code == 0
    assert re.fullmatch(r"note: pictures are shown as 24 px, .*, and the weights are for .*\n", err)
    assert accuracy(other) != accuracy(out)


@pytest.mark.parametrize(
    ("kind", "redirection"),
    [
        pytest.param("evaluation", "| true", marks=pytest.mark.long),
        pytest.param("predictions", ">/dev/full", marks=pytest.mark.long),
        pytest.param("evaluation", ">/dev/full", marks=pytest.mark.long),
        pytest.param("evaluation", ">&-", marks=pytest.mark.long),
        pytest.param("predictions", "| true", marks=pytest.mark.long),
        pytest.param("predictions", ">&-", marks=pytest.mark.long),
    ],
)
def test_files_come_before_a_table_that_nobody_takes(kind, redirection, digits, drawn, tmp_path):
    """A pipe that closes early, and a full one."""
    rest = SMOKE if kind == "evaluation" else ["--images", drawn]
    words = [sys.executable, "scripts/evaluate.py", "--weights", digits[2], *rest]
    line = shlex.join([*map(str, words), "--output-dir", str(tmp_path)])
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{line} {redirection}"],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (tmp_path / f"{kind}.json").exists(), done.stderr
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("kind", ["evaluation", "predictions"])
def test_files_come_before_a_table_that_a_full_disk_does_not_take(kind, digits, drawn, tmp_path):
    """As the test before, in a fork; there are the other streams."""
    rest = SMOKE if kind == "evaluation" else ["--images", drawn]
    request = ["scripts/evaluate.py", "--weights", digits[2], *rest, "--output-dir", tmp_path]
    errors = tmp_path / "errors"
    code = exit_code(forked(program(request), Path("/dev/full"), errors))
    assert (tmp_path / f"{kind}.json").exists(), errors.read_text()
    assert (code, errors.read_text()) == (0, "")


def test_predictions_are_written_where_that_is_asked_for(digits, drawn, tmp_path, capsys):
    place = ["--output-dir", tmp_path / "found", "--top", "2"]
    code, out, _ = asked(capsys, "--weights", digits[2], "--images", drawn, *place)
    assert code == 0
    found = json.loads((tmp_path / "found" / "predictions.json").read_text())["pictures"]
    assert len(found) == out.count("\n") == 40
    for row, line in zip(found, out.splitlines(), strict=True):
        best, share = row["classes"][0]
        assert line.startswith(f"{row['path']}: {best} {100 * share:.1f} %, ")
        assert row["problem"] is None
    code, _, err = asked(capsys, "--weights", digits[2], *SMOKE, "--top", "2")
    assert (code, err) == (2, "error: --top: only with --images or --predictions\n")


def test_one_bad_picture_does_not_hide_the_others(digits, drawn, tmp_path, capsys):
    shutil.copytree(drawn, tmp_path / "some")
    (tmp_path / "some" / "03_bad.png").write_bytes(b"none")
    (tmp_path / "some" / "07\nbad.png").write_bytes(b"none")
    images = ["--weights", digits[2], "--images", tmp_path / "some"]
    code, out, err = asked(capsys, *images)
    assert (code, out.count("\n"), err.count("\n")) == (2, 40, 1)
    assert "03_bad.png: not a readable image" in err
    assert err.endswith(" (and 1 more)\n")
    code, out, err = asked(capsys, *images, "dataset.max_bad_images=2")
    assert (code, out.count("\n"), err.count("\n")) == (0, 40, 2)
    assert "07 bad.png: not a readable image" in err
    asked(capsys, *images, "dataset.max_bad_images=2", "--output-dir", tmp_path)
    found = json.loads((tmp_path / "predictions.json").read_text())["pictures"]
    assert [row["path"].rpartition("/")[2] for row in found if row["problem"]] == [
        "03_bad.png",
        "07\nbad.png",
    ]


def test_folders_are_followed_as_in_training(digits, drawn, tmp_path, capsys):
    """Links are; what a Mac leaves, and hidden folders, are not; endings are named."""
    (tmp_path / "linked").symlink_to(drawn)
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "more").symlink_to(drawn)
    (inside / "loop").symlink_to(inside)
    (inside / ".hidden").mkdir()
    (inside / "__MACOSX").mkdir()
    for name in (".hidden/1.png", "__MACOSX/2.png", "._3.png", "photo.HEIC", "notes.txt", "b.txt"):
        (inside / name).write_bytes(b"none")
    for folder in (tmp_path / "linked", inside):
        code, out, err = asked(capsys, "--weights", digits[2], "--images", folder)
        assert (code, out.count("\n")) == (0, 40)
    assert err == (
        f"note: --images: {inside}: skipped: files of other types 3 (.txt 2, .heic 1), "
        "folders of an operating system 1, folders reached twice 1, hidden folders 1, "
        "resource forks of a Mac (._*) 1; .heic: pictures that are not read; "
        "convert them to JPEG\n"
    )


def test_a_name_with_a_line_break_keeps_its_line(digits, drawn, tmp_path, capsys):
    name = tmp_path / "a\nb  c.png"
    shutil.copy(next(drawn.iterdir()), name)
    shutil.copy(name, tmp_path / "two  spaces.png")
    code, out, _ = asked(capsys, "--weights", digits[2], "--images", tmp_path)
    assert (code, out.count("\n")) == (0, 2)
    assert "a b c.png: " in out
    assert "two  spaces.png: " in out


def test_the_home_folder_is_meant_by_its_sign(digits, drawn, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(digits[2], tmp_path / "w")
    shutil.copytree(drawn, tmp_path / "p")
    shutil.copy(REPO / "configs/digits_smoke.yaml", tmp_path / "c.yaml")
    options = ["--weights=~/w", "--images", "~/p", "--config", "~/c.yaml", "--output-dir=~/o"]
    assert asked(capsys, *options)[0] == 0
    assert (tmp_path / "o" / "predictions.json").exists()
    assert not (tmp_path / "~").exists()
    code, _, err = asked(capsys, "--weights=~nobody_here/w", "--images", "~/p")
    assert (code, err.count("\n")) == (2, 1)
    assert "~nobody_here: no such user" in err


# ---------------------------------------------------------------------------------- Validation sets

COLOURED = ["model.name=test_resnet", "training.epochs=1", "ast.mode=dense"]
COLOURED += ["training.num_workers=0", "dataset.augment=random_resized_crop", "training.lr=0.02"]


def coloured(folder, tmp_path, *more):
    """A run on a folder of pictures: (its config as a file, its weights, its result)."""
    config = folder_config(folder, *COLOURED, *more, f"logging.output_dir={tmp_path}/out")
    result, _ = train(config)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    return tmp_path / "config.json", checkpoint_folder(config) / "weights", result


@pytest.mark.parametrize("cache", ["none", "device", "disk"])
def test_a_bad_validation_picture_is_left_out_and_named(cache, tmp_path, image_folder, capsys):
    """Not counted, and no other one counted twice in its place; in training as here."""
    (image_folder / "val" / "green" / "1.jpg").write_bytes(b"none")
    more = [f"dataset.cache={cache}", "dataset.max_bad_images=2"]
    more += [] if cache == "none" else [f"dataset.cache_folder={tmp_path}/cache"]
    config, weights, result = coloured(image_folder, tmp_path, *more)
    assert result["classes"]["val_samples"] == [3, 2, 3]
    assert len(result["bad_images"]) == 1
    place = ["--weights", weights, "--config", config, "--output-dir", tmp_path / "ev"]
    code, out, _ = asked(capsys, *place)
    assert code == 0
    found = json.loads((tmp_path / "ev" / "evaluation.json").read_text())
    assert found["classes"]["samples"] == [3, 2, 3]
    assert found["accuracy"] == result["best_accuracy"]
    (bad,) = found["bad_images"]
    assert bad.startswith(f"{image_folder}/val/green/1.jpg: not a readable image")
    assert f"left out           {bad}\n" in out
    code, _, err = asked(capsys, *place, "dataset.max_bad_images=0")
    assert (code, err.count("\n")) == (2, 1)
    assert "green/1.jpg: not a readable image" in err


def test_a_whole_batch_of_bad_pictures_and_a_whole_set(tmp_path, image_folder, capsys):
    config, weights, _ = coloured(image_folder, tmp_path)
    for path in (image_folder / "val").rglob("*.jpg"):
        if path.parent.name != "red":
            path.write_bytes(b"none")
    place = ["--weights", weights, "--config", config, "training.batch_size=3"]
    code, out, _ = asked(capsys, *place, "dataset.max_bad_images=9")
    assert code == 0
    assert "of 3 pictures" in out
    for path in (image_folder / "val" / "red").iterdir():
        path.write_bytes(b"none")
    code, _, err = asked(capsys, *place, "dataset.max_bad_images=9")
    assert (code, err) == (2, "error: dataset: no picture of the validation set can be read\n")


def test_the_training_set_need_not_be_there(tmp_path, image_folder, capsys):
    config, weights, result = coloured(image_folder, tmp_path)
    shutil.rmtree(image_folder / "train")
    code, out, err = asked(capsys, "--weights", weights, "--config", config)
    assert (code, err) == (0, "")
    assert f"{result['best_accuracy']:6.2f} %  of 9 pictures" in out
    keys = ["dataset.type=folder", f"dataset.val_dir={image_folder}/val", "dataset.image_size=32"]
    keys += ["dataset.augment=random_resized_crop", "training.num_workers=0"]
    (tmp_path / "empty.yaml").write_text("{}")
    code, alone, err = asked(
        capsys, "--weights", weights, "--config", tmp_path / "empty.yaml", *keys
    )
    assert (code, alone, err) == (0, out, "")


def test_classes_are_one_whatever_the_form_of_their_letters(tmp_path, image_folder, capsys):
    """A Mac writes é in two characters; the weights, the training and the validation set may each
    have another form.
    """
    composed = "caf\u00e9"
    apart = "cafe\u0301"
    (image_folder / "train" / "green").rename(image_folder / "train" / composed)
    (image_folder / "val" / "green").rename(image_folder / "val" / apart)
    config, weights, result = coloured(image_folder, tmp_path)
    assert result["classes"]["name"] == ["blue", composed, "red"]
    assert result["classes"]["val_samples"] == [3, 3, 3]
    folder = variant(weights, tmp_path / "w", set_facts(label_names=["blue", apart, "red"]))
    code, out, _ = asked(capsys, "--weights", folder, "--config", config)
    assert (code, "of 9 pictures" in out) == (0, True)


# -------------------------------------------------------------------------------- Folders by others


@pytest.mark.parametrize("more", [{}, {"crop_pct": 0.5, "interpolation": "nearest"}])
@pytest.mark.parametrize("pool", ["avg", "max"])
def test_a_folder_by_timm_is_asked_as_timm_asks_it(pool, more, tmp_path, image_folder, capsys):
    """Network and pictures as timm's own loader and transform make them."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3, global_pool=pool).eval()
    names = {"label_names": ["blue", "green", "red"]}
    save_for_hf(model, tmp_path / "hub", model_config=names, data_config=more)
    prepare = timm.data.create_transform(
        **timm.data.resolve_data_config(more, pretrained_cfg=model.pretrained_cfg)
    )
    paths = sorted((image_folder / "val").rglob("*.jpg"))
    place = ["--weights", tmp_path / "hub", "--images", *paths, "--output-dir", tmp_path]
    code, _, err = asked(capsys, *place)
    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "predictions.json").read_text())["pictures"]
    for path, row in zip(paths, found, strict=True):
        with Image.open(path) as image, torch.no_grad():
            expected = model(prepare(image.convert("RGB"))[None]).softmax(-1)[0]
        shares = dict(map(tuple, row["classes"]))
        for name, share in zip(names["label_names"], expected.tolist(), strict=True):
            assert shares[name] == pytest.approx(share, abs=1e-5)


def test_a_description_of_something_else_beside_a_file_is_left_alone(digits, tmp_path, capsys):
    """A config.json of another program beside a .pth once stopped loading it."""
    torch.save(load_file(digits[2] / "model.safetensors"), tmp_path / "mine.pth")
    start = ["model.name=test_resnet", f"model.weights={tmp_path}/mine.pth"]
    for text, remark in (
        ('{"model_type": "bert"}', "describes no weights and is not used"),
        ("no JSON", "describes no weights and is not used"),
        ((digits[2] / "config.json").read_text().replace("test_resnet", "test_vit"), "test_vit"),
    ):
        (tmp_path / "config.json").write_text(text)
        capsys.readouterr()
        get_model(make_config(*start).model, 10, 16)
        out = capsys.readouterr().out
        assert remark in out
        assert "pictures are normalised as ImageNet's" in out
    code, _, err = asked(capsys, "--weights", tmp_path / "mine.pth", *SMOKE)
    assert (code, err.count("\n")) == (2, 1)


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
