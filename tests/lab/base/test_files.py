"""Locks on files: who holds one, who waits, and what is left of one whose process was killed."""

import errno
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab.base.errors import RequestError
from lab.base.files import locked, locked_in_turn
from runs import exit_code, forked, wait_until


@contextmanager
def held(lock: Path, folder: Path) -> Iterator[int]:
    """Another process that holds `lock`, and has forked a child that sleeps. Yields its id."""

    def work() -> int:
        with locked(lock, ""):
            if os.fork() == 0:
                time.sleep(60)
                os._exit(0)
            (folder / "holds").touch()
            wait_until(lambda: (folder / "enough").exists())
        return 0

    holder = forked(work, folder / "holder")
    wait_until((folder / "holds").exists)
    try:
        (child,) = Path(f"/proc/{holder}/task/{holder}/children").read_text().split()
        yield holder
    finally:
        os.kill(int(child), signal.SIGKILL)


def test_a_lock_is_refused_at_once_and_free_at_once_after_a_kill(tmp_path):
    lock = tmp_path / "lock"
    with held(lock, tmp_path) as holder:
        started = time.monotonic()
        with pytest.raises(RequestError, match="^taken$"), locked(lock, "taken"):
            pass
        assert time.monotonic() - started < 1
        os.kill(holder, signal.SIGKILL)
        assert exit_code(holder) == -signal.SIGKILL
        with locked(lock, "its child lives on"):
            assert lock.exists()
        with locked(lock, "the one before has let it go"):
            pass


def test_whoever_comes_second_says_so_once_and_waits(tmp_path):
    lock = tmp_path / "lock"
    said = []
    with held(lock, tmp_path) as holder:

        def waits() -> None:
            said.append("waiting")
            (tmp_path / "enough").touch()

        with locked_in_turn(lock, waits):
            assert exit_code(holder) == 0
    with locked_in_turn(lock, waits):
        assert said == ["waiting"]


@pytest.mark.parametrize(("number", "goes_on"), [(errno.ENOLCK, True), (errno.EIO, False)])
def test_a_file_system_without_locks_ends_no_run(number, goes_on, tmp_path, monkeypatch):
    def answer(*_) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", answer)
    if goes_on:
        with locked(tmp_path / "lock", ""), locked(tmp_path / "lock", ""):
            return
    with pytest.raises(OSError, match=os.strerror(number)), locked(tmp_path / "lock", ""):
        pass
