"""A weights folder on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from lab.base.errors import RequestError, one_line
from lab.base.hub import hub_answers
from lab.config.imports import IMPORTS
from lab.models.description import FACTS
from lab.models.weights import WEIGHTS
from lab.outputs.card import CARD

UPLOADED = (WEIGHTS, FACTS, CARD)


def push(folder: str, repository: str) -> str:
    """Upload a weights folder of the lab in one commit, to a repository that is made private where
    there is none. Returns its address.

    Raises RequestError naming --push where the token is missing or the hub refuses.
    """
    missing = [name for name in UPLOADED if not (Path(folder) / name).is_file()]
    if missing:
        raise RequestError(f"--push: {folder}: no {missing[0]} in it; is it the folder of a run?")
    token = os.environ.get("HF_TOKEN")
    if not token:
        raise RequestError("--push: HF_TOKEN is not set; .env.example says where it goes")
    if not hub_answers():
        raise RequestError("--push: the hub does not answer, or HF_HUB_OFFLINE is set")
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = HfApi(token=token)
    try:
        place = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=place.repo_id,
            folder_path=folder,
            allow_patterns=[*UPLOADED, f"{IMPORTS}/*.py"],
            commit_message="Upload weights and model card",
        )
    except Exception as error:  # of a network and a server, in dozens of kinds
        why = one_line(error, 300).replace(token, "***")
        raise RequestError(f"--push: {one_line(repository)}: {why}") from None
    return str(place)
