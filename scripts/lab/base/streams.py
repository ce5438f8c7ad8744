"""The standard streams: closed, full or short of characters, they end no command and change no exit
code.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Lossy:
    """A text stream that loses what its file does not take."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            forget_unprinted(self.stream)
            return len(text)

    def flush(self) -> None:
        forget_unprinted(self.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def forget_unprinted(stream: TextIO) -> None:
    """Flush a stream, and drop what a full disk or a closed pipe does not take: it would fail again
    at every flush.
    """
    try:
        stream.flush()
    except (OSError, ValueError):  # ValueError: the stream is closed
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            number = stream.fileno()
            original = os.dup(number)
            os.dup2(nowhere.fileno(), number)
            try:
                stream.flush()
            finally:
                os.dup2(original, number)
                os.close(original)


def print_progress(text: str) -> None:
    """Print a line that is not the command's output. A full disk or a closed pipe loses it, and
    ends nothing.
    """
    try:
        print(text, flush=True)
    except OSError:
        forget_unprinted(sys.stdout)


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Give a command both streams for the length of the block.

    A stream that is closed leads nowhere. One whose encoding lacks a character shows a question
    mark. What stderr does not take is lost. So is what stdout has not taken at the end of the
    block: the interpreter would fail at its exit.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # or the next file that is opened gets the number, and what is printed
            with contextlib.suppress(OSError):
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        for stream in before:
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        sys.stdout = before[0] or nowhere
        sys.stderr = Lossy(before[1] or nowhere)
        try:
            yield
        finally:
            forget_unprinted(sys.stdout)
            forget_unprinted(sys.stderr)
            sys.stdout, sys.stderr = before
