"""Code of one's own: which files a config imports, their hashes, and what they add to the tables.

An import is written as a file, `path/mine.py`, or as a package, `package.module`. A config that has
been read holds it with the hash of its text, `path/mine.py@0123456789abcdef`: the same code is the
same run, wherever the file lies. A hash that is written must be that of the file.

A file is run once in a process, at the first config that names it (`use`). What it has added to the
tables is there while a config that names it is in use. Nothing that lies beside weights is imported
by itself.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib.abc import SourceLoader
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from lab.base.errors import RequestError, one_line
from lab.base.files import expand_home
from lab.config.tables import Entry, WrongPart, recorded

DIGITS = 16  # of a hash, hexadecimal
IMPORTS = "imports"  # beside weights: a folder with the code that they were trained with


class Import(NamedTuple):
    written: str  # a file or a dotted name
    digest: str | None  # None: not yet known

    @classmethod
    def of(cls, text: str) -> Import:
        found = re.fullmatch(rf"(.+)@([0-9a-f]{{{DIGITS}}})", text, re.DOTALL)
        return cls(text, None) if found is None else cls(*found.groups())

    @property
    def is_file(self) -> bool:
        return self.written.endswith(".py") or "/" in self.written or os.sep in self.written

    @property
    def module(self) -> str:
        return Path(self.written).stem if self.is_file else self.written

    @property
    def identity(self) -> str:
        """What makes it the same in another run: its name and its text, not its place."""
        return f"{self.module}@{self.digest}"

    def __str__(self) -> str:
        return self.written if self.digest is None else f"{self.written}@{self.digest}"


class Loaded(NamedTuple):
    """A file that was run in this process."""

    module: ModuleType
    folder: str  # from which it is imported by its name, as loader workers that are spawned do
    sources: dict[str, bytes]
    entries: list[Entry]


_loaded: dict[str, Loaded] = {}  # by identity
_in_use: dict[str, Loaded] = {}


def identities(imports: Iterable[str]) -> list[str]:
    """The imports of a config without their places, sorted."""
    return sorted(Import.of(text).identity for text in imports)


def resolved(texts: Iterable[str]) -> list[str]:
    """The imports with the hashes of their files, each once.

    Raises ValueError for a file that is not there, one that is not what its written hash says, and
    two of one name. Nothing is run.
    """
    found: dict[str, Import] = {}
    for text in texts:
        asked = Import.of(text)
        each = asked._replace(digest=digest_of(sources_of(asked)))
        if asked.digest not in (None, each.digest):
            raise ValueError(f"{asked.written} has changed: {each.digest} is not {asked.digest}")
        other = found.setdefault(each.module, each)
        if other.digest != each.digest:
            raise ValueError(f"{other.written} and {each.written} have one name; rename a file")
    return [str(each) for each in found.values()]


def place_of(asked: Import) -> tuple[Path, str]:
    """(the file of an import, the folder that Python finds it from). Raises ValueError where there
    is none.
    """
    if asked.is_file:
        path = Path(expand_home(asked.written))
        if not path.is_file():
            raise ValueError(f"{asked.written}: no such file")
        if path.suffix != ".py" or not re.fullmatch(r"\w[\w-]*", path.stem):
            raise ValueError(
                f"{asked.written}: expected a file like mine.py, of letters and digits"
            )
        return path, str(path.absolute().parent)
    first, *rest = asked.written.split(".")
    spec = _top(first)
    if spec is None or not all([first, *rest]):
        raise ValueError(f"{asked.written}: no such package; a file is written mine.py")
    roots = [Path(root) for root in spec.submodule_search_locations or ()]
    paths = [Path(spec.origin)] if spec.origin and not rest else []
    for root in roots:
        base = root.joinpath(*rest)
        paths += [base / "__init__.py", base.with_suffix(".py")]
    path = next((path for path in paths if path.is_file() and path.suffix == ".py"), None)
    if path is None:
        raise ValueError(f"{asked.written}: no such module")
    return path, str((roots[0] if roots else path).absolute().parent)


def _top(name: str) -> ModuleSpec | None:
    """Where a package is, by its first name, which is not imported; also in this folder."""
    try:
        return importlib.util.find_spec(name) or PathFinder.find_spec(name, [os.getcwd()])
    except (ValueError, ImportError):  # no name, or a module without a spec
        return None


def sources_of(asked: Import) -> dict[str, bytes]:
    """By name, the text of a file; of a package all of its files. Raises ValueError where it cannot
    be read.
    """
    path, _ = place_of(asked)
    whole = path.name == "__init__.py"
    files = sorted(path.parent.rglob("*.py")) if whole else [path]
    try:
        root = path.parent.parent if whole else path.parent
        return {file.relative_to(root).as_posix(): file.read_bytes() for file in files}
    except OSError as error:
        raise ValueError(f"{asked.written}: cannot read it: {error.strerror}") from None


def digest_of(sources: Mapping[str, bytes]) -> str:
    """Of a single file the beginning of its SHA-256, as sha256sum gives it."""
    hashes = {name: hashlib.sha256(text).hexdigest() for name, text in sources.items()}
    if len(hashes) == 1:
        return next(iter(hashes.values()))[:DIGITS]
    listed = "".join(f"{digest}  {name}\n" for name, digest in hashes.items())
    return hashlib.sha256(listed.encode()).hexdigest()[:DIGITS]


def use(imports: Sequence[str]) -> None:
    """Have what these imports of a config add to the tables there, and nothing of other files.

    Raises RequestError, one line with file and line number, for an error in a file, a part with a
    wrong signature and a name that is taken.
    """
    wanted = {Import.of(text).identity: Import.of(text) for text in imports}
    for identity in [each for each in _in_use if each not in wanted]:
        _retire(_in_use.pop(identity))
    for identity, asked in wanted.items():
        if identity in _in_use:
            continue
        if identity in _loaded:
            _restore(asked, _loaded[identity])
        else:
            _loaded[identity] = _run(asked)
        _in_use[identity] = _loaded[identity]


def _run(asked: Import) -> Loaded:
    """Run a file, and note what it adds."""
    try:
        path, folder = place_of(asked)
        sources = sources_of(asked)
        if digest_of(sources) != asked.digest:
            raise ValueError(f"{asked.written} has changed since the config was read")
        _require_own_name(asked, path)
    except ValueError as error:
        raise RequestError(f"imports: {error}") from None
    entries: list[Entry] = []
    sys.path.append(folder)
    try:
        with recorded(entries), warnings.catch_warnings():
            # timm's registry takes a name twice, and warns
            warnings.filterwarnings("error", message="Overwriting .* in registry")
            module = _executed(asked, path, sources)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a file may raise anything, SystemExit too
        entries += _timm_entries(asked.module)
        _retire(Loaded(ModuleType(asked.module), folder, sources, entries))
        sys.modules.pop(asked.module, None)
        raise RequestError(_told(error, path)) from None
    return Loaded(module, folder, sources, [*entries, *_timm_entries(asked.module)])


def _timm_entries(module: str) -> list[Entry]:
    """What a module, or a module of a package, has added to timm's registry of networks."""
    registry = getattr(sys.modules.get("timm.models._registry"), "_model_entrypoints", {})
    return [
        Entry(registry, name, build)
        for name, build in registry.items()
        if f"{build.__module__}.".startswith(f"{module}.")
    ]


def _require_own_name(asked: Import, path: Path) -> None:
    """Raises ValueError where another module has the name of a file: a loader worker that is
    spawned imports by name.
    """
    if not asked.is_file:
        return
    spec = None if asked.module in sys.modules else importlib.util.find_spec(asked.module)
    other = None if spec is None else spec.origin  # None: a mere folder, which comes last
    same = other is not None and os.path.isfile(other) and _alike(Path(other), path)
    if asked.module in sys.modules or (other is not None and not same):
        raise ValueError(f"{asked.written}: another module is called {asked.module}; rename it")


def _alike(path: Path, other: Path) -> bool:
    """Whether it is the file, or a copy, which is as good."""
    return path.read_bytes() == other.read_bytes()


def _executed(asked: Import, path: Path, sources: Mapping[str, bytes]) -> ModuleType:
    if not asked.is_file:
        for name in [n for n in sys.modules if f"{n}.".startswith(f"{asked.module}.")]:
            del sys.modules[name]  # of an earlier text
        importlib.invalidate_caches()
        return importlib.import_module(asked.module)
    loader = _Hashed(str(path.absolute()), sources[path.name])
    spec = importlib.util.spec_from_file_location(asked.module, path.absolute(), loader=loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[asked.module] = module
    loader.exec_module(module)
    return module


class _Hashed(SourceLoader):
    """Runs the bytes that were hashed, whatever the file or a cache of compiled code holds now."""

    def __init__(self, path: str, text: bytes):
        self.path = path
        self.text = text

    def get_filename(self, fullname: str) -> str:
        return self.path

    def get_data(self, path: str) -> bytes:
        return self.text


def _told(error: BaseException, path: Path) -> str:
    """One line on an error: the last place in the file, or in one beside it, and the reason."""
    folder = f"{path.absolute().parent}{os.sep}"
    frames = traceback.extract_tb(error.__traceback__)
    places = [(each.filename, each.lineno) for each in frames if each.filename.startswith(folder)]
    why = one_line(error, 300)
    if not isinstance(error, WrongPart):
        why = f"{type(error).__name__}: {why}"
    if isinstance(error, SyntaxError) and error.filename:
        places = [(error.filename, error.lineno)]
        why = f"{type(error).__name__}: {one_line(error.msg, 300)}"
    name, line = places[-1] if places else (path.absolute(), None)
    shown = path if Path(name) == path.absolute() else os.path.relpath(name)
    return f"{shown}: {why}" if line is None else f"{shown}:{line}: {why}"


def _retire(loaded: Loaded) -> None:
    """Take what a file has added out of the tables."""
    for table, name, part in loaded.entries:
        if table.get(name) is part:
            del table[name]
    if sys.modules.get(loaded.module.__name__) is loaded.module:
        del sys.modules[loaded.module.__name__]
    if loaded.folder in sys.path:
        sys.path.reverse()  # the last one is its own
        sys.path.remove(loaded.folder)
        sys.path.reverse()


def _restore(asked: Import, loaded: Loaded) -> None:
    """Put what a file has added back into the tables."""
    for table, name, _ in loaded.entries:
        if name in table:
            key = getattr(table, "key", "model.name")
            raise RequestError(f"{asked.written}: {key} {name!r}: the name is taken")
    for table, name, part in loaded.entries:
        dict.__setitem__(table, name, part)
    sys.modules[loaded.module.__name__] = loaded.module
    sys.path.append(loaded.folder)


def options_beside(weights: Path) -> str:
    """The options that import the code in a weights folder; where that is gone, with FILE in its
    place.
    """
    files = sorted((weights / IMPORTS).glob("*.py")) or [Path("FILE")]
    return " ".join(f"--import {one_line(file)}" for file in files)


def changed_code(before: Iterable[str], now: Iterable[str]) -> list[str]:
    """A line for each import whose text is another one than that of the same name before."""
    old = dict(each.split("@", 1) for each in identities(before))
    new = dict(each.split("@", 1) for each in identities(now))
    return [
        f"{name} has changed since: its hash was {old[name]} and is {new[name]}"
        for name in old
        if name in new and old[name] != new[name]
    ]


def origin(key: str, name: Any) -> str | None:
    """The identity of the import that adds a name to the table of a config key, of networks also to
    timm's; None for the lab's own.
    """
    for identity, loaded in _in_use.items():
        added = [(getattr(each.table, "key", "model.name"), each.name) for each in loaded.entries]
        if (key, name) in added:
            return identity
    return None


def kept(imports: Sequence[str]) -> dict[str, bytes]:
    """By name, the texts of the imports, to be kept beside weights and in results."""
    found = [_in_use[Import.of(text).identity] for text in imports]
    return {name: text for each in found for name, text in each.sources.items()}
