"""The model card of a weights folder: README.md, whose front matter the Hugging Face hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lab.base.errors import one_line
from lab.base.files import beside_results, replace_text
from lab.base.reading import _Dumper
from lab.config.loading import Config
from lab.models.description import FACTS
from lab.outputs.evaluation import interval, wilson

CARD = "README.md"
SHOWN = 50  # classes that are named
LICENCE = "# license: choose one, https://huggingface.co/docs/hub/repositories-licenses"
BY_TIMM = """model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
# or, once it is on the hub: "hf-hub:NAME/REPOSITORY"
prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(prepare(PIL.Image.open("photo.jpg").convert("RGB"))[None])"""
BY_TORCHVISION = """facts = json.load(open("FOLDER/config.json"))
model = torchvision.models.get_model(
    facts["architecture"], num_classes=facts["num_classes"], **facts["model_args"]
)
if facts["small_stem"]:
    model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = torch.nn.Identity()
model.load_state_dict(safetensors.torch.load_file("FOLDER/model.safetensors"))
model.eval()  # pictures as facts["pretrained_cfg"] says"""

BY_LAB = """# the network is code of its own, a copy of which is in FOLDER/imports: read it first
# python scripts/evaluate.py --weights FOLDER --images photo.jpg --import FOLDER/imports/..."""


def write_card(folder: Path, result: Mapping[str, Any]) -> None:
    """Write the card of a run's weights beside them. Raises TrainingFailed where the disk does not
    take it.
    """
    with beside_results():
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        replace_text(folder / CARD, card(result, facts))


def card(result: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The text of a card. No name in it is taken for markup. facts: of config.json."""
    config = Config.model_validate(result["config"])
    samples = sum(result["classes"]["val_samples"])
    ends = wilson(round(result["best_accuracy"] * samples / 100), samples)
    dataset = config.dataset
    title = f"{facts['architecture']}, {len(facts['label_names']):,} classes"
    whole = sum(result["times_trained"]["histogram"])
    epochs = result["epochs_completed"]
    passes = result["ledger"]["trained"] / max(1, whole)
    rows = {
        "data": f"{data_of(config)}, {whole:,} pictures in training, {samples:,} in validation",
        "accuracy": f"{result['best_accuracy']:.2f} % in validation ({interval(ends)}), epoch "
        f"{result['best_epoch']} of {epochs}, the best one",
        "passes": f"{passes:.1f} over the training pictures in {epochs} epochs: "
        f"{epochs - passes:.1f} saved",
        "pictures": f"{dataset.image_size} px, prepared as {FACTS} says",
        "seed": str(config.training.seed),
    }
    front = front_matter(result, config, title)
    table = "\n".join(f"| {name} | {quoted(value)} |" for name, value in rows.items())
    return (
        f"---\n{front}{LICENCE}\n---\n\n# {quoted(title)}\n\n| | |\n| --- | --- |\n{table}\n\n"
        f"The epoch was chosen by this accuracy, which is therefore a little high.\n\n"
        f"## Classes\n\n{named(facts['label_names'])}\n\n"
        f"## Use\n\n{block('python', usage(facts))}\n\n"
        f"## Training\n\n{block('yaml', settings(config))}\n\n"
        f"{block('bash', 'python scripts/run_experiment.py --config FILE')}\n\n"
        f"FILE holds the lines above it; every other key has its default.\n"
    )


def front_matter(result: Mapping[str, Any], config: Config, title: str) -> str:
    """YAML, as the hub expects it, the licence left out."""
    from huggingface_hub import EvalResult, ModelCardData

    name = data_of(config)
    on_hub = config.dataset.type == "hf" and not Path(config.dataset.name).exists()
    found = EvalResult(
        task_type="image-classification",
        dataset_type=config.dataset.name if on_hub else config.dataset.type,
        dataset_name=name,
        metric_type="accuracy",
        metric_value=round(result["best_accuracy"] / 100, 6),
    )
    data = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "adaptive-sparse-training"],
        datasets=[config.dataset.name] if on_hub else None,
        metrics=["accuracy"],
        model_name=one_line(title),
        eval_results=[found],
    )
    return data.to_yaml() + "\n"


def data_of(config: Config) -> str:
    dataset = config.dataset
    place = {"folder": dataset.train_dir, "hf": dataset.name, "csv": dataset.name}
    return one_line(place.get(dataset.type) or dataset.type)


def usage(facts: Mapping[str, Any]) -> str:
    """How other programs load the weights: timm where it has the network, else torchvision."""
    if facts.get("own_model"):
        return BY_LAB
    by_timm = not facts["small_stem"] and facts["architecture"] != "vit_b_16"
    return BY_TIMM if by_timm else BY_TORCHVISION


def settings(config: Config) -> str:
    """What differs from the defaults, as a config file, without where things are written."""
    differing = config.model_dump(exclude={"logging"}, exclude_defaults=True)
    filled = {section: values for section, values in differing.items() if values}
    return yaml.dump(filled, Dumper=_Dumper, sort_keys=False).rstrip()


def named(classes: Sequence[str]) -> str:
    names = ", ".join(quoted(name) for name in classes[:SHOWN])
    more = len(classes) - SHOWN
    return f"{names} and {more:,} more, in {FACTS}" if more > 0 else names


def quoted(text: str) -> str:
    """Text as Markdown shows it, on one line."""
    marks = "\\`*_{}[]<>()#|!~&$"
    return "".join(f"\\{each}" if each in marks else each for each in one_line(text))


def block(language: str, text: str) -> str:
    """A block of code, fenced by more backticks than are in it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"
