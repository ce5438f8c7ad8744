"""Whether the names in a config mean anything, told before torch is imported."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from lab.config.keys import NAMES
from lab.config.tables import names_of
from lab.config.together import Sections

# How the text of timm gives names: those to suggest, and older ones that it knows too
NETWORK = r"^@register_model\n(?:@.*\n)*def (\w+)\(|^ {4}['\"](\w+)['\"] ?:\s+['\"][\w.]+['\"]"
OPTIMIZER = r"\bname='(\w+)'|(?:^ +|register_alias\()'(\w+)',"
GONE_VALUES = {  # names of earlier days, and what to do instead
    ("ast.target_activation", "unseen"): "unseen is gone: auto judges by pictures kept out",
}


def wrong_names(config: Sections, trains: bool) -> Iterator[str]:
    """A text for each name that no table knows. A file that the config imports may add any.

    trains: whether the network of the config is used.
    """
    if config.imports:
        return
    for key in NAMES:
        section, _, leaf = key.partition(".")
        value = getattr(getattr(config, section), leaf)
        if isinstance(value, str):  # a target and a doubt may be a number
            yield from unknown(key, value, names_of(key))
    if trains and config.model.weights is None:  # code beside weights may have it
        yield from unknown_network("model.name", config.model.name)
    if config.ast.mode == "ast" and config.ast.scoring == "proxy":
        yield from unknown_network("ast.proxy_model", config.ast.proxy_model)
    key = "training.optimizer"
    yield from _not_of_timm(key, config.training.optimizer, names_of(key), "optim", OPTIMIZER)


def unknown(key: str, value: str, known: Iterable[str]) -> Iterator[str]:
    """What is wrong with the value of a key, if it is not among the known ones."""
    if value not in (names := list(known)):
        expected = " or ".join(filter(None, [", ".join(map(repr, names[:-1])), repr(names[-1])]))
        complaint = GONE_VALUES.get((key, value), f"expected {expected}, got {value!r}")
        yield f"{key}: {complaint}"


def unknown_network(key: str, name: str) -> Iterator[str]:
    """What is wrong with the name of a network, if neither the lab nor timm has it. A source of
    weights (hf-hub:NAME) is taken as it is.
    """
    timm = sys.modules.get("timm")  # where it is imported, somebody may have added to it
    if ":" in name or (timm is not None and timm.is_model(name)):
        return
    own = names_of("model.name")
    yield from _not_of_timm(key, name.partition(".")[0], own, "models", NETWORK, "model ")


def _not_of_timm(
    key: str, name: str, own: Iterable[str], package: str, pattern: str, kind: str = ""
) -> Iterator[str]:
    own = list(own)
    if name in own:
        return
    names = in_timm(package, pattern)
    shown = [found for found, _ in names if found]
    older = [found for _, found in names if found]
    if shown and name not in (*shown, *older):  # none: the files of this timm are not as they were
        near = difflib.get_close_matches(name, [*shown, *own], 1, 0.0)
        yield f"{key}: no {kind}{name!r}; did you mean {near[0]}?"


@functools.cache
def in_timm(package: str, pattern: str) -> list[tuple[str, str]]:
    """The names in the text of a package of timm; to ask timm itself would import torch."""
    found = importlib.util.find_spec("timm")
    if found is None or found.origin is None:
        return []
    names = []
    for path in sorted((Path(found.origin).parent / package).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        names += re.findall(pattern, text, re.MULTILINE)
    return names
