"""Writing files whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lab.base.errors import RequestError, TrainingFailed, one_line

# how text begins that a spreadsheet takes for a formula
FORMULA = tuple("=+-@\t\r\n")

# what a file system answers that has no locks
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def expand_home(text: str) -> str:
    """A path with the home folder in place of a `~` at its beginning, as a shell has it. Raises
    ValueError where there is no such user.
    """
    path = os.path.expanduser(text)
    if path.startswith("~"):
        user = one_line(text.partition("/")[0], 60)
        raise ValueError(f"{user}: no such user; a folder of that name is ./{user}")
    return path


def user_path(text: str) -> Path:
    """A path of the command line. Raises RequestError where its `~` is of no user."""
    return Path(user_text(text))


def user_text(text: str) -> str:
    """`user_path`, as text that may also be a word."""
    try:
        return expand_home(text)
    except ValueError as error:
        raise RequestError(str(error)) from None


def require_folder(folder: Path, key: str, path: str | Path) -> None:
    """Make `folder`. Raises RequestError naming `key` and `path` where it cannot be made or written
    to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**16))  # a full disk still takes names
    except OSError as error:
        raise RequestError(f"{key}: cannot write to {path}: {error.strerror}") from None


def is_device(path: Path) -> bool:
    """Whether `path` is no file to be replaced: a device, a pipe, or a name for an open file, as
    /dev/stdout is.
    """
    place = os.path.abspath(path)
    special = place.startswith(("/dev/", "/proc/")) and not place.startswith("/dev/shm/")
    return path.exists() and not path.is_dir() and (special or not path.is_file())


def require_appendable(path: Path, key: str) -> None:
    """Raises RequestError naming `key` where no line can be appended to `path`. A device gets an
    empty line to try.
    """
    if not path.exists() and not path.is_symlink():
        require_folder(path.parent, key, path)
        return
    try:
        descriptor = os.open(
            path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o666
        )
        try:
            if is_device(path) and not os.isatty(descriptor):
                os.write(descriptor, b"\n")
        finally:
            os.close(descriptor)
    except OSError as error:
        raise RequestError(f"{key}: cannot write to {path}: {error.strerror}") from None
    if not is_device(path):
        require_folder(path.parent, key, path)


def sibling(path: str, tag: str) -> str:
    """`path` with `tag` before its ending: another file for another run. A device is shared."""
    file = Path(path)
    return path if is_device(file) else str(file.with_name(f"{file.stem}.{tag}{file.suffix}"))


def _acquired(path: Path, **how: Any) -> contextlib.AbstractContextManager:
    """A lock on the file `path`, to be released by `with`. how: options of `FileLock.acquire`.

    The kernel takes it back however the process ends, even where children that it forked live on
    (filelock 3.30). Where the file system has no locks, nothing is held. Raises Timeout where
    another holds it.
    """
    try:
        return FileLock(path).acquire(**how)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return contextlib.nullcontext()


def attempt_lock(path: Path) -> contextlib.AbstractContextManager | None:
    """A lock on the file `path`, which is made, to be released by `with`; None where another
    process holds it.
    """
    try:
        return _acquired(path, blocking=False)
    except Timeout:
        return None


@contextlib.contextmanager
def locked(path: Path, taken: str) -> Iterator[None]:
    """Hold a lock on the file `path`, which is made. Raises RequestError(`taken`) at once where
    another process holds it.
    """
    lock = attempt_lock(path)
    if lock is None:
        raise RequestError(taken)
    with lock:
        yield


@contextlib.contextmanager
def locked_in_turn(path: Path, waits: Callable[[], Any]) -> Iterator[None]:
    """Hold a lock on the file `path`, which is made. Where another process holds it, call `waits`
    once, and wait.
    """
    lock = attempt_lock(path)
    if lock is None:
        waits()
        lock = _acquired(path, poll_interval=0.2)
    with lock:
        yield


def replace_files(writers: Mapping[Path, Callable[[Path], Any]]) -> None:
    """Have each writer make a file beside its path; move all into place once every one is whole and
    on the disk.

    Raises OSError naming the path where the disk does not take a file. Then all paths hold what
    they held before, unless it is the moving itself that fails. What is a device is written to as
    it is.
    """
    devices = {path: write for path, write in writers.items() if is_device(path)}
    writers = {path: write for path, write in writers.items() if path not in devices}
    parts = {path: path.with_name(f"{path.name}.{os.getpid()}.part") for path in writers}
    path = Path()
    try:
        for path, write in devices.items():
            write(path)
            _print_behind(path)
        for path, write in writers.items():
            write(parts[path])
            with parts[path].open("rb+") as file:
                os.fsync(file.fileno())
        for path, part in parts.items():
            os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    for folder in {path.parent for path in writers}:
        sync_folder(folder)


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """`replace_files` for one."""
    replace_files({path: write})


@contextlib.contextmanager
def beside_results() -> Iterator[None]:
    """Write what belongs to a results file that is there already. Raises TrainingFailed where the
    disk does not take it.
    """
    try:
        yield
    except OSError as error:
        why = error.strerror or one_line(error)
        raise TrainingFailed(
            f"{error.filename}: cannot write, the results beside it are whole: {why}"
        ) from None


def no_formula(value: Any) -> Any:
    """A cell of a CSV. Text that a spreadsheet would take for a formula gets an apostrophe before
    it.
    """
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def replace_text(path: Path, text: str) -> None:
    """Make `path` hold `text`, whole or not at all. Raises OSError naming the path."""
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def output_path(text: str) -> Path:
    """`user_path`; `-` is the standard output."""
    return Path("/dev/stdout") if text == "-" else user_path(text)


def write_outputs(outputs: Mapping[Path, tuple[str, bytes]]) -> None:
    """Write what a command was asked for, each file whole and all of them or none. Folders are
    made.

    `outputs`: by path, the option that asked for it and the content. Raises RequestError naming
    option and path.
    """
    for path, (option, _) in outputs.items():
        if not is_device(path):
            require_folder(path.parent, option, path)
        if path.is_dir():
            raise RequestError(f"{option}: cannot write to {path}: it is a folder")
    try:
        replace_files(
            {
                path: partial(Path.write_bytes, data=content)
                for path, (_, content) in outputs.items()
            }
        )
    except OSError as error:
        option, _ = outputs[Path(error.filename)]
        raise RequestError(
            f"{option}: cannot write to {error.filename}: {error.strerror}"
        ) from None


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk, where the system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_result(result: Mapping[str, Any], path: Path) -> None:
    """Replace a results file, whole or not at all. Raises TrainingFailed where the disk does not
    take it.
    """
    try:
        replace_text(path, json.dumps(result, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        behind = f"; {result['error']}" if "error" in result else ""
        raise TrainingFailed(
            f"{path}: cannot write the results: {error.strerror}{behind}"
        ) from None


def append_jsonl(path: str | Path, row: Mapping[str, Any]) -> None:
    """Append a line and flush it to the disk. Raises OSError naming the file where the disk does
    not take all of it; nothing of the line then stays.
    """
    line = (json.dumps(row, allow_nan=False) + "\n").encode()
    if is_device(Path(path)):
        with open(path, "wb") as device:
            device.write(line)
        return
    with open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            while line:  # a disk that fills up takes a part
                line = line[file.write(line) :]
            os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise OSError(error.errno, error.strerror, str(path)) from None


def align_jsonl(path: Path, history: Mapping[str, Sequence], capped: Path | None = None) -> None:
    """Make the log of a resumed run hold each epoch of `history` exactly once.

    Torn lines go, lost ones come back, and lines from beyond the checkpoint go. So does the line in
    the file `capped`, if there is one: that of an epoch which a time cap cut short. Lines of other
    runs in the same file stay. A device cannot be put in order.
    """
    if is_device(path):
        return
    gone = _text_of(capped)
    lines = [
        line
        for line in _text_of(path).splitlines(keepends=True)
        if line.endswith("\n") and line != gone
    ]
    wanted = [
        json.dumps(dict(zip(history, row, strict=True))) + "\n"
        for row in zip(*history.values(), strict=True)
    ]
    # this run's lines begin where its first epoch was last written, and end where another run's do
    starts = [i for i, line in enumerate(lines) if wanted and line == wanted[0]]
    start = starts[-1] if starts else len(lines)
    later = [i for i in range(start + 1, len(lines)) if lines[i].startswith('{"epoch": 1,')]
    end = later[0] if later else len(lines)
    lines[start:end] = wanted
    replace_text(path, "".join(lines))


def _text_of(path: Path | None) -> str:
    """What a file holds; nothing where there is none."""
    if path is None or not path.exists():
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def _print_behind(path: Path) -> None:
    """Where `path` is the file that standard output goes to, print from its end on: the open file
    has a place of its own, and would write over what was just written.
    """
    with contextlib.suppress(OSError, ValueError):
        descriptor = sys.stdout.fileno()
        if os.path.samestat(os.stat(path), os.fstat(descriptor)):
            os.lseek(descriptor, 0, os.SEEK_END)
