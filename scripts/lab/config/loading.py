"""The config as a whole: how a file and overrides become one, and all that is wrong with them."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml
from pydantic import (
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from lab.base.errors import RequestError, one_line
from lab.base.reading import BAD_YAML, _Dumper, _Loader, parse_config, read_config
from lab.config.imports import identities, resolved
from lab.config.keys import BUILT_IN, all_needs, idle_keys, of_known_parts, spelled
from lab.config.names import wrong_names
from lab.config.sections import NOISY_LABELS, Section
from lab.config.together import Sections, complain, complaints_of, of_built_in, of_sections


class Config(Sections):
    @model_validator(mode="after")
    def _fields_fit_together(self, info: ValidationInfo) -> Config:
        """What no part of a run decides; `load_config` has the rest. Its context is a list that
        takes the complaints.
        """
        if isinstance(info.context, list):
            info.context.extend(of_sections(self))
        else:
            complain(of_sections(self))
        return self

    @model_serializer(mode="wrap")
    def _without_no_imports(self, dump: Callable[[Config], dict[str, Any]]) -> dict[str, Any]:
        dumped = dump(self)
        if not self.imports:
            dumped.pop("imports", None)
        return dumped


SECTIONS: dict[str, type[Section]] = {
    name: info.annotation for name, info in Config.model_fields.items() if name != "imports"
}


def config_keys() -> dict[str, tuple[str, Any]]:
    """Every dotted key with its (description, default)."""
    return {
        f"{section}.{name}": (info.description or "", info.default)
        for section, part in SECTIONS.items()
        for name, info in part.model_fields.items()
    }


def takes_whole_numbers(key: str) -> bool:
    """Whether a dotted key takes whole numbers and no others."""
    section, _, name = key.partition(".")
    kinds = _kinds(SECTIONS[section].model_fields[name].annotation)
    return int in kinds and float not in kinds


def _kinds(annotation: Any) -> set[Any]:
    """The types that a type hint is made of, and the values of a Literal."""
    parts = get_args(annotation)
    return set().union(*map(_kinds, parts)) if parts else {annotation}


SHORT = reprlib.Repr()  # a config may hold far more than its text is long
SHORT.maxstring = SHORT.maxother = 100
GONE = {  # keys of earlier days, and what to do instead
    "ast.leave_out": "is now called ast.forget_rate",
    "ast.explore_weight_cap": "is gone: an explored sample weighs 1",
    "ast.proxy_every": "is gone: a proxy learns from one scored batch in four",
    "ast.proxy_resolution": "is now ast.score_resolution",
    "ast.score_ahead": "is gone: batches are scored ahead wherever that helps",
    "dataset.cache_dir": "is gone: the environment variable HF_HOME says where downloads are kept",
    "training.amp_dtype": "is now training.mixed_precision=bfloat16 or float16",
    "training.compile_scoring": "is gone: training.compile holds for scoring too",
    "training.loss_weight": "is gone: early_learning has the weight of its paper, 3",
    "training.max_nonfinite_steps": "is gone: a loss that is not finite ends the run",
}


def dump_config(config: Config) -> str:
    """The config as YAML; `load_config` reads the same from it."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False)


def takes_text(section: str, name: str) -> tuple[bool, bool]:
    """(whether the values of a key are text, whether it may be null); (False, False) for an unknown
    key.
    """
    part = SECTIONS.get(section)
    info = part and part.model_fields.get(name)
    if not info:
        return False, False
    kinds = _kinds(info.annotation)
    is_text = all(kind in (str, NoneType) or isinstance(kind, str) for kind in kinds)
    return is_text, NoneType in kinds


def parse_override(override: str) -> tuple[str, str, Any]:
    """(section, name, value) of "section.name=value".

    Text is taken as it is written; null is null for a key that may be null. Other values are read
    as in a YAML file. Raises RequestError naming the override where it is malformed.
    """
    key, equals, written = override.partition("=")
    section, dot, name = key.partition(".")
    if key == "imports":
        raise RequestError(f"override {override!r}: write --import {written or 'FILE'}")
    if not (equals and dot and name):
        raise RequestError(f"override {override!r}: expected section.key=value{_nearest(key)}")
    is_text, may_be_null = takes_text(section, name)
    if is_text:
        return section, name, None if may_be_null and written == "null" else written
    try:
        node = yaml.compose(written, Loader=_Loader)
        plain = isinstance(node, yaml.ScalarNode) and node.style is None and node.value == written
        return section, name, yaml.load(written, Loader=_Loader) if plain else written
    except BAD_YAML as error:
        raise RequestError(f"override {override!r}: not a valid value: {one_line(error)}") from None


def load_config(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    text: str | None = None,
    check: Callable[[Config, Sequence[str]], None] | None = None,
    imports: Sequence[str] = (),
    trains: bool = True,
) -> Config:
    """Read a YAML or JSON config and lay `overrides` ("training.lr=0.05", see `parse_override`)
    over it.

    text: the file's text, where it has been read before. check: raises ValueError for what only
    the lab's tables know (`train_ast.check_config`), and runs the imports before. imports: of
    `--import`, added to the file's own. trains: whether a run is to train: it needs a training set
    and a known network. Raises RequestError, one line naming the file or the override and the key,
    for a file that is missing, empty or no mapping, and for all unknown keys (each with the nearest
    known one) and wrong values at once.
    """
    if text is None:
        text = read_config(path) if path else "{}"
    raw = parse_config(path, text)
    for override in overrides:
        section, name, value = parse_override(override)
        part = raw[section] = {} if raw.get(section) is None else raw[section]
        if isinstance(part, dict):  # otherwise the validation below names the section
            part[name] = value
    raw["imports"] = _all_imports(path, raw.get("imports"), imports)
    _set_implied(raw)
    given = [override.partition("=")[0] for override in overrides]
    raw = {key: {} if value is None else value for key, value in raw.items()}
    config, complaints = _validated(raw, given, trains)
    if not complaints and check is not None:
        complaints = complaints_of(lambda: check(config, given))
    if complaints:
        raise RequestError(_all_of(complaints, overrides, path or "config"))
    return config


def _validated(raw: dict[str, Any], given: Sequence[str], trains: bool) -> tuple[Config, list[str]]:
    """The config of a file's content, and all that is wrong with it. A key with a wrong value has
    its default in it. given: the keys of the command line.
    """
    found: list[str] = []
    together: list[str] = []
    try:
        config = Config.model_validate(raw, context=together)
    except ValidationError as error:
        found += _explain(error)
        config = Config.model_validate(_without(raw, error), context=together)
        config = config.model_copy(update={"imports": raw["imports"] or []})
    found += _unblamed(found, wrong_names(config, trains))
    if not config.imports:
        together += [*_not_read(config, given), *of_built_in(config, trains)]
    if any(complaint.startswith(("ast.mode:", "ast:")) for complaint in found):
        together = []  # most of it depends on the mode
    return config, [*found, *_unblamed(found, together)]


def _without(raw: Mapping[str, Any], error: ValidationError) -> dict[str, Any]:
    """What a file holds, without what pydantic complains of."""
    kept = {key: _texts(part) for key, part in _texts(raw).items()}
    for place in (each["loc"] for each in error.errors()):
        if not place:  # a key of the file is no Unicode
            return {}
        section, *leaf = place
        if leaf and isinstance(kept.get(section), dict):
            kept[section].pop(leaf[0], None)
        else:
            kept.pop(section, None)
    return kept


def _texts(part: Any) -> Any:
    """A mapping without the keys that are no text; anything else as it is."""
    if not isinstance(part, Mapping):
        return part
    return {key: value for key, value in part.items() if isinstance(key, str)}


def _unblamed(before: Sequence[str], complaints: Iterable[str]) -> list[str]:
    """The complaints that speak of no key, or section, that is itself complained of `before`."""
    wrong = {complaint.partition(":")[0] for complaint in before}
    kept = []
    for complaint in complaints:
        keys = re.findall(r"\w+\.\w+", complaint)
        if not wrong & {*keys, *(key.partition(".")[0] for key in keys)}:
            kept.append(complaint)
    return kept


@functools.cache
def default_settings() -> dict[str, str]:
    """The config in which nothing is said, as dotted key to text."""
    return spelled(Config().model_dump())


def _not_read(config: Config, given: Sequence[str]) -> list[str]:
    """A text for each of the keys of a command line that nothing reads."""
    settings = spelled(config.model_dump())
    needs = of_known_parts(all_needs(), settings, BUILT_IN)
    return not_read(given, idle_keys(settings, default_settings(), needs))


def not_read(given: Iterable[str], unread: Mapping[str, str]) -> list[str]:
    """unread: the keys that nothing reads, each with what it would need."""
    return [
        f"{key}: nothing reads it here; it needs {unread[key]}"
        for key in dict.fromkeys(given)
        if key in unread
    ]


def _set_implied(raw: dict[str, Any]) -> None:
    """Give a config's mapping what `training.noisy_labels` sets. What it says already stays."""
    training = raw.get("training")
    if not isinstance(training, dict) or training.get("noisy_labels") is not True:
        return
    for section, values in NOISY_LABELS.items():
        raw[section] = {} if raw.get(section) is None else raw[section]
        if isinstance(raw[section], dict):  # otherwise the validation names the section
            raw[section] = values | raw[section]


def _all_imports(path: str | Path | None, own: Any, more: Sequence[str]) -> Any:
    """The imports of a config's text and those of `--import`, with their hashes. `own` as it is
    where it is no list of texts, which the validation then says.
    """
    if own is not None and not (isinstance(own, list) and all(isinstance(e, str) for e in own)):
        return own
    found: list[str] = []
    for source, texts in ((f"{path or 'config'}: imports", own or []), ("--import", more)):
        try:
            found = resolved([*found, *texts])
        except ValueError as error:
            raise RequestError(f"{source}: {one_line(error)}") from None
    return found


MOST_SHOWN = 5  # complaints about one config


def _all_of(complaints: Sequence[str], overrides: Sequence[str], path: str | Path) -> str:
    """Complaints as one line, each after the override or the file that it is about."""
    texts = []
    source = None
    for complaint in complaints[:MOST_SHOWN]:
        found = _blamed(complaint, overrides) or path
        texts.append(complaint if found == source else f"{found}: {complaint}")
        source = found
    more = len(complaints) - MOST_SHOWN
    return "; also ".join([*texts, *([f"{more} more"] if more > 0 else [])])


def _blamed(complaint: str, overrides: Sequence[str]) -> str | None:
    """The override that a complaint is about: the last one of the key it begins with, or of one
    that it names.
    """
    first = complaint.partition(":")[0]
    keys = [override.partition("=")[0] for override in overrides]
    named = [first in (key, key.partition(".")[0]) for key in keys]
    if not any(named):
        named = [
            re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", complaint) is not None
            for key in keys
        ]
    found = [override for override, is_named in zip(overrides, named, strict=True) if is_named]
    return f"override {one_line(repr(found[-1]), 200)}" if found else None


def _explain(error: ValidationError) -> list[str]:
    """Pydantic's complaints, a line for each key: what was expected, or the nearest key."""
    by_key: dict[tuple, list] = {}
    for each in error.errors():
        by_key.setdefault(each["loc"][:2], []).append(each)
    return [_explain_key(found) for found in by_key.values()]


def _explain_key(wrong: Sequence[Mapping[str, Any]]) -> str:
    """wrong: pydantic's complaints about one key."""
    first = wrong[0]
    if first["type"] == "value_error":
        return one_line(first["ctx"]["error"])
    key = ".".join(str(part)[:100] for part in first["loc"][:2])
    if key in GONE:
        return f"{key}: {GONE[key]}"
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key{_nearest(key)}"
    hint = (
        "; in quotes it is text"
        if first["type"] == "string_type" and not isinstance(first["input"], dict | list)
        else ""
    )
    expected = " or ".join(
        e["msg"].replace("Input should be ", "").replace("Input should", "") for e in wrong
    )
    return (
        f"{key}: expected {one_line(expected)}, got "
        f"{one_line(SHORT.repr(first['input']))[:80]}{hint}"
    )


USUAL_NAMES = {  # what others call a key of ours
    "amp": "mixed_precision",
    "arch": "name",
    "bs": "batch_size",
    "data_dir": "train_dir",
    "decay": "weight_decay",
    "learning_rate": "lr",
    "num_epochs": "epochs",
    "path": "train_dir",
    "root": "train_dir",
    "scheduler": "lr_schedule",
    "wd": "weight_decay",
    "workers": "num_workers",
}


def _leaves(keys: Iterable[str]) -> dict[str, str]:
    """Keys by their last part, and by its usual other names."""
    leaves = {key.rpartition(".")[2]: key for key in keys}
    return {n: leaves[own] for n, own in USUAL_NAMES.items() if own in leaves} | leaves


def _nearest(key: str) -> str:
    """A hint at the known key that `key` is close to; one of the same section comes first."""
    key = key[:100].replace("-", "_")
    section, _, leaf = key.rpartition(".")
    known = [*config_keys(), *Config.model_fields]
    leaves = _leaves(known)
    own = _leaves(name for name in config_keys() if name.startswith(f"{section}."))
    near = [own[leaf]] if leaf in own else []
    worded = [name for name in own if f"_{leaf}_" in f"_{name}_"]  # it is a word of these
    near = near or [own[name] for name in sorted(worded, key=len)[:1]]
    near = near or [own[name] for name in difflib.get_close_matches(leaf, own, 1, 0.6)]
    near = near or difflib.get_close_matches(key, known, 1, 0.75)
    near = near or [leaves[name] for name in difflib.get_close_matches(leaf, leaves, 1, 0.6)]
    near = near or difflib.get_close_matches(key, known, 1, 0.0)
    return f"; did you mean {near[0]}?" if near else ""


# What changes no figure of a run: where its files lie, how many processes read its pictures, and
# how long it waits for them.
NO_FIGURE = {
    "logging": True,
    "dataset": {"cache_folder", "worker_timeout"},
    "training": {"num_workers"},
}


def run_id(config: Config) -> str:
    """Which run a config is: a hash of what differs from the defaults, the seed included, without
    what changes no figure. Of imports the names and the texts count, not where they lie.

    A results file's `config` gives the same hash once it is read as a Config.
    """
    dumped = config.model_dump(exclude=NO_FIGURE, exclude_defaults=True)
    differing = {section: values for section, values in dumped.items() if values}
    if config.imports:
        differing["imports"] = identities(config.imports)
    canonical = json.dumps(differing, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def checkpoint_folder(config: Config) -> Path:
    return Path(config.logging.output_dir) / "checkpoints" / run_id(config)
