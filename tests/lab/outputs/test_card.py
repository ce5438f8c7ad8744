"""The model card of a run, as the hub's own library reads it."""

import json

import PIL.Image
import pytest
import timm
import yaml
from huggingface_hub import ModelCard

from conftest import make_config, save_picture
from helpers import folder_config, hf_config
from lab.config.loading import checkpoint_folder, load_config
from lab.outputs.card import card, quoted
from lab.outputs.evaluation import wilson
from train_ast import train

SMALL = ["model.name=test_resnet", "training.epochs=2", "ast.mode=dense", "training.lr=0.02"]
SMALL += ["training.num_workers=0"]


def carded(config):
    """(the result of a run, its card as the hub's library reads it)."""
    result, _ = train(config)
    return result, ModelCard.load(checkpoint_folder(config) / "weights" / "README.md")


def test_the_card_says_what_the_run_was(image_folder, tmp_path):
    config = folder_config(image_folder, *SMALL, f"logging.output_dir={tmp_path}/out")
    result, found = carded(config)
    data = found.data.to_dict()
    assert data["library_name"] == "timm"
    assert data["pipeline_tag"] == "image-classification"
    assert "license" not in data
    card_file = checkpoint_folder(config) / "weights" / "README.md"
    assert "\n# license: choose one" in card_file.read_text()
    (evaluated,) = found.data.eval_results
    assert evaluated.metric_value == pytest.approx(result["best_accuracy"] / 100, abs=1e-5)
    low, high = wilson(round(result["best_accuracy"] * 9 / 100), 9)
    assert f"{result['best_accuracy']:.2f} % in validation \\(95 %: {low:.2f} to {high:.2f}\\)" in (
        found.text
    )
    assert "24 pictures in training, 9 in validation" in found.text
    assert "passes | 2.0 over the training pictures in 2 epochs: 0.0 saved |" in found.text
    assert "blue, green, red" in found.text
    lines = found.text.partition("```python\n")[2].partition("```")[0]
    lines = lines.replace("FOLDER", str(card_file.parent))
    known = {"timm": timm, "PIL": PIL}
    exec(lines.replace("photo.jpg", str(image_folder / "val" / "red" / "0.jpg")), known)
    assert known["logits"].shape == (1, 3)
    told = found.text.partition("```yaml\n")[2].partition("```")[0]
    again = load_config(None, text=told)
    assert again.model_dump(exclude={"logging"}) == config.model_dump(exclude={"logging"})
    assert str(tmp_path / "out") not in found.text


def test_a_sparse_run_on_a_table_says_what_it_saved(parquet_folder, tmp_path):
    more = ["ast.mode=random", "ast.target_activation=0.5", "training.epochs=4"]
    more += ["ast.warmup_epochs=0", "training.batch_size=12", f"logging.output_dir={tmp_path}/out"]
    _, found = carded(hf_config(parquet_folder, *SMALL[:1], *more, "training.num_workers=0"))
    assert "passes | 2.0 over the training pictures in 4 epochs: 2.0 saved |" in found.text


@pytest.fixture
def hostile(tmp_path):
    names = ["`rm` | <b>x</b>", "---", "a_b*c* [x](http://y)", "![p](q)", "caf\u00e9: # no"]
    for part in ("train", "val"):
        for i, name in enumerate(names):
            folder = tmp_path / "```\n" / part / name.replace("/", "\u2215")
            folder.mkdir(parents=True)
            for k in range(2):
                save_picture(folder / f"{k}.png", (40 * i, 200, 90), 10 * i + k)
    return tmp_path / "```\n"


def test_names_are_no_markup(hostile, tmp_path):
    config = folder_config(hostile, *SMALL, f"logging.output_dir={tmp_path}/out")
    _, found = carded(config)
    front = found.content.split("\n---\n")[0].removeprefix("---\n")
    assert isinstance(yaml.safe_load(front), dict)
    assert "\\`rm\\` \\| \\<b\\>x" in found.text
    assert "<b>x</b>" not in found.text.replace("\\<", "")
    told = found.text.partition("````yaml\n")[2].partition("\n````")[0]
    assert load_config(None, text=told).dataset.train_dir == str(hostile / "train")
    assert quoted("a\nb") == "a b"


def test_a_network_that_timm_does_not_load_has_its_own_recipe(tmp_path):
    more = ["training.epochs=1", "ast.mode=dense", "dataset.max_train_samples=32"]
    result, _ = train(make_config(*SMALL[:1], *more, f"logging.output_dir={tmp_path}/out"))
    folder = next((tmp_path / "out").glob("checkpoints/*/weights"))
    facts = json.loads((folder / "config.json").read_text())
    assert "torchvision" not in card(result, facts)
    for changed in ({"architecture": "vit_b_16"}, {"small_stem": True}):
        assert "torchvision.models.get_model(" in card(result, {**facts, **changed})
    many = {**facts, "label_names": [f"n{i}" for i in range(1000)]}
    assert "n49 and 950 more, in config.json" in card(result, many)
