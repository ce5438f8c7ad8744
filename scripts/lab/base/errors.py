"""What can go wrong, as exceptions that a command shows as one line."""

from __future__ import annotations


class RequestError(Exception):
    """The request cannot be fulfilled: one line, exit code 2."""


class TrainingFailed(Exception):
    """The run itself failed: one line, exit code 1."""


class PeerLost(TrainingFailed):
    """Another process of the run has ended or does not answer. `code`: its exit code, if it
    reported one.
    """

    def __init__(self, why: str, code: int = 1):
        super().__init__(why)
        self.code = code


class NobodyThere(TrainingFailed):
    """The other processes of the run were never met, so none of them says why: each process
    does.
    """


def one_line(text: object, limit: int = 1000) -> str:
    """`text` as one printable line of at most `limit` characters; an exception without a message
    gives its class.

    Safe for text out of a file: lone surrogates and control characters become question marks.
    """
    line = " ".join(str(text).split()).encode("utf-8", "replace").decode()
    if not line and isinstance(text, BaseException):
        line = type(text).__name__
    line = "".join(character if character.isprintable() else "?" for character in line)
    return line if len(line) <= limit else line[: limit - 1] + "…"
