"""Reading the text of configs: YAML and JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from lab.base.errors import RequestError, one_line


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, with the decimal numbers of YAML 1.2 alone: 010 is ten, and 1e-3 a
    number.

    Text are 0x10, 1_000, 12:30, dates and words such as `off`. No key comes twice.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        if complaint := _key_twice([key.value for key, _ in node.value]):
            raise yaml.constructor.ConstructorError(None, None, complaint, node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_whole(self, node: yaml.ScalarNode) -> int:
        return int(_matching(WHOLE, self.construct_scalar(node)))

    def construct_real(self, node: yaml.ScalarNode) -> float:
        return float(
            _matching(REAL, self.construct_scalar(node))
            .lower()
            .replace(".inf", "inf")
            .replace(".nan", "nan")
        )


WHOLE = re.compile(r"[-+]?[0-9]+")
REAL = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)


def _key_twice(keys: list[Any]) -> str | None:
    """What is wrong with a mapping of these keys; None where each comes once."""
    twice = next((key for key in keys if keys.count(key) > 1), None)
    return f"key {twice!r} stands there twice" if twice else None


def _matching(pattern: re.Pattern, text: str) -> str:
    if not pattern.fullmatch(text):
        raise ValueError(f"not a number: {one_line(text, 80)!r}")
    return text


# the tags that keep YAML 1.1's resolvers, and the letters that these may begin with
KEPT = {"null": "~nN", "merge": "<", "bool": "tTfF"}
NUMBERS = {"int": (WHOLE, list("-+0123456789")), "float": (REAL, list("-+.0123456789"))}
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if KEPT.get(tag.rpartition(":")[2], "").count(first)
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """YAML's safe dumper, which puts text in quotes where `_Loader` would take it for something
    else.
    """


for _name, (_pattern, _firsts) in NUMBERS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern.pattern})$"), _firsts
        )
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_real)

# What a wrong tag such as `!!bool x` raises is of no kind of YAML's own
BAD_YAML = (
    yaml.YAMLError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


def read_config(path: str | Path) -> str:
    """The text of a config file.

    Raises RequestError naming the file where it cannot be read, or where it is empty: a pipe that
    was read before gives nothing, which must not mean all defaults.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path}: cannot read the config: {error.strerror}") from None
    except ValueError as error:
        raise RequestError(f"{path}: not valid YAML or JSON: {one_line(error)}") from None
    if not text.strip():
        raise RequestError(f"{path}: empty; a config of nothing but defaults is {{}}")
    return text


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError where a key comes twice."""
    if complaint := _key_twice([key for key, _ in pairs]):
        raise ValueError(complaint)
    return dict(pairs)


def parse_config(path: str | Path | None, text: str) -> dict[str, Any]:
    """The sections of a config's text. It is JSON where the file's name ends in .json or the text
    is valid JSON.

    Raises RequestError naming the file where it is neither JSON nor YAML, or no mapping.
    """
    raw: Any = None
    try:
        try:
            json.loads(text.removeprefix("\ufeff"))
            is_json = True
        except ValueError:
            is_json = str(path).lower().endswith(".json")
        if is_json:
            raw = json.loads(text.removeprefix("\ufeff"), object_pairs_hook=_pairs)
        else:
            raw = yaml.load(text, Loader=_Loader)
    except BAD_YAML as error:
        raise RequestError(f"{path}: not valid YAML or JSON: {one_line(error)}") from None
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise RequestError(f"{path}: expected a mapping of sections, got {type(raw).__name__}")
    return raw


def spell(value: Any) -> str:
    """A config value as text, 10 and 10.0 alike, without what is no text: half a surrogate pair."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return (
        value.encode("utf-8", "replace").decode() if isinstance(value, str) else json.dumps(value)
    )
