"""Tables: the parts of a kind by name. A file of one's own adds to them (`lab.config.imports`)."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from lab.config.keys import BUILT_IN

Part = TypeVar("Part")


class WrongPart(Exception):
    """A part, or a name, that a table does not take."""


class Entry(NamedTuple):
    """What a file has added."""

    table: dict[str, Any]  # a Table, or timm's registry of networks
    name: str
    part: Any


_tables: dict[str, Table] = {}  # by config key, those that this process has
_adding: list[Entry] | None = None  # what the file that is being imported has added so far


@contextlib.contextmanager
def recorded(entries: list[Entry]) -> Iterator[None]:
    """Note in `entries` what the block adds to any table; a name that is taken is refused."""
    global _adding
    before = _adding
    _adding = entries
    try:
        yield
    finally:
        _adding = before


class Table(dict[str, Part]):
    """The parts of one kind by name, which is the value of the config `key`.

    `TABLE["name"] = part`, or `@TABLE.register("name")` above it, adds one. Raises WrongPart for a
    part that is not as `like`, and in an imported file for a name that is taken.
    """

    def __init__(
        self,
        key: str,
        like: Any,
        parts: Mapping[str, Part],
        built: bool = True,
        others: tuple[str, ...] = (),
        needs: tuple[str, ...] = (),
        tried: Callable[[Part], str | None] = lambda part: None,
        taken: Callable[[str], bool] = lambda name: False,
    ):
        """like: a class of which parts are subclasses, whose methods can be called like its own; or
        a function that can be called in the same way. built: whether the lab makes objects of the
        class itself. others: names that mean no part. needs: methods that a part must have of its
        own. tried: what is wrong with a part that has been tried out. taken: whether a name means
        something elsewhere.
        """
        super().__init__(parts)
        self.key = key
        self.like = like
        self.built = built
        self.others = others
        self.needs = needs
        self.tried = tried
        self.taken = taken
        _tables[key] = self

    def register(self, name: str) -> Callable[[Part], Part]:
        """A decorator that adds what stands below it."""

        def add(part: Part) -> Part:
            self[name] = part
            return part

        return add

    def __setitem__(self, name: str, part: Part) -> None:
        why = self._misfit(part) or self._failed(part)
        if _adding is not None:
            why = self._bad_name(name) or why
        if why is not None:
            raise WrongPart(f"{self.key} {name!r}: {why}")
        if _adding is not None:
            _adding.append(Entry(self, name, part))
        super().__setitem__(name, part)

    def _bad_name(self, name: Any) -> str | None:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][\w-]*", name):
            return "a name is of letters, digits, _ and -, and begins with a letter"
        if name.lower() in ("null", "none", "true", "false"):
            return "no name: a config reads it as a value"
        return "the name is taken" if name in self or self.taken(name) else None

    def _failed(self, part: Part) -> str | None:
        """What trying it out has shown. A part may be for other numbers of classes than three."""
        try:
            return self.tried(part)
        except (RuntimeError, ValueError, IndexError):
            return None

    def _misfit(self, part: Any) -> str | None:
        like = self.like
        if not isinstance(like, type):
            return uncallable("it", part, like)
        if not (isinstance(part, type) and issubclass(part, like)):
            return f"expected a subclass of {like.__name__}"
        for name in self.needs:
            if _function(getattr(part, name)) is _function(getattr(like, name)):
                return f"it has no method {name} of its own"
        return next(filter(None, (self._odd(part, name) for name in dir(like))), None)

    def _odd(self, part: type, name: str) -> str | None:
        """What is wrong with a method of a class, of which it may have its own."""
        like = getattr(self.like, name)
        called = name in ("__call__", "__init__") if name.startswith("_") else True
        if not called or (name == "__init__" and not self.built) or not inspect.isroutine(like):
            return None
        own = getattr(part, name)
        if _function(own) is _function(like):
            return None
        return uncallable(name, own, like)


def names_of(key: str) -> list[str]:
    """What a config key may name: the built-in parts, until its table is imported."""
    table = _tables.get(key)
    return [*BUILT_IN[key]] if table is None else [*table.others, *table]


def _function(method: Any) -> Any:
    return getattr(method, "__func__", method)


def uncallable(name: str, own: Any, like: Callable) -> str | None:
    """Why `own` cannot be called with as many arguments as `like` takes; None where it can."""
    if not callable(own):
        return f"{name} is no function"
    given = [
        each.name
        for each in inspect.signature(like).parameters.values()
        if each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    try:
        signature = inspect.signature(own)
    except ValueError:  # one that is written in C does not tell
        return None
    try:
        signature.bind(*given)
    except TypeError:
        has = ", ".join(map(str, signature.parameters))
        return f"{name} takes ({has}), expected ({', '.join(given)})"
    return None
