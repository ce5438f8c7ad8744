"""Networks of timm's `hf-hub:` and `local-dir:` names: a folder of weights that says what it is."""

from __future__ import annotations

import functools
from pathlib import Path

from lab.base.errors import RequestError, one_line
from lab.base.files import expand_home
from lab.base.hub import no_endless_wait, quick_hub
from lab.config.sections import ModelConfig
from lab.models.description import FACTS
from lab.models.weights import FILES, find_weights

HUB = ("hf-hub", "hf_hub")
FOLDER = "local-dir"


def resolved(config: ModelConfig) -> ModelConfig:
    """The network and the weights that a name with a source means; other names as they are.

    Raises RequestError naming model.name where the source has no description of weights, or where
    model.pretrained does not ask for them.
    """
    kind, colon, place = config.name.partition(":")
    if not colon or kind not in (*HUB, FOLDER):
        return config
    if not config.pretrained:
        raise RequestError(
            f"model.name: {config.name} names weights, which model.pretrained=true starts from"
        )
    folder = _local(place) if kind == FOLDER else _downloaded(place)
    description = find_weights(folder, "model.name").description
    if description is None:
        raise RequestError(f"model.name: {config.name}: no {FACTS} beside the weights")
    return config.model_copy(
        update={
            "name": description.architecture,
            "pretrained": False,
            "weights": folder,
            "small_stem": bool(description.small_stem),
        }
    )


def _local(place: str) -> str:
    try:
        return expand_home(place)
    except ValueError as error:
        raise RequestError(f"model.name: {error}") from None


@functools.cache
def _downloaded(place: str) -> str:
    """The folder where the files of a repository of the hub are kept. place: NAME/REPOSITORY, with
    @revision perhaps.
    """
    from huggingface_hub import HfApi, hf_hub_download

    repository, _, tag = place.partition("@")
    revision = tag or None
    try:
        with no_endless_wait(), quick_hub() as answers:
            folder = Path(hf_hub_download(repository, FACTS, revision=revision)).parent
            there = [path.name for path in folder.iterdir()]
            if answers:
                there = HfApi().list_repo_files(repository, revision=revision)
            name = next((name for name in FILES if name in there), FILES[0])
            hf_hub_download(repository, name, revision=revision)
    except Exception as error:  # of a network, a cache and a server, in dozens of kinds
        why = f"{type(error).__name__}: {one_line(error, 200)}"
        raise RequestError(f"model.name: no weights of hf-hub:{place}: {why}") from None
    return str(folder)
