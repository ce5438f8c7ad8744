"""Servers: the Hugging Face hub is asked once whether it is there, so that nothing is tried again
and again in vain, and none is waited for without end.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Iterator

ANSWER_SECONDS = 4.0
SILENCE_SECONDS = 30.0  # that a server may say nothing while something is downloaded


@contextlib.contextmanager
def no_endless_wait() -> Iterator[None]:
    """In the block, a server that says nothing for SILENCE_SECONDS is a TimeoutError: torch.hub and
    torchvision set no limit.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def hub_answers() -> bool:
    """Whether the hub answers within ANSWER_SECONDS; False where HF_HUB_OFFLINE forbids to ask."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(Exception):  # a network fails in dozens of ways
            get_session().head(constants.ENDPOINT, timeout=ANSWER_SECONDS)
            answered.set()

    if constants.HF_HUB_OFFLINE:
        return False
    # in a thread, because looking up the address may take far longer
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER_SECONDS)
    return answered.is_set()


@contextlib.contextmanager
def quick_hub() -> Iterator[bool]:
    """Whether the hub answers. Where it does not, the block has what was downloaded before, and
    fails at once without.

    The libraries would otherwise try for half a minute, and print a line each time.
    """
    import datasets
    from huggingface_hub import constants

    # what they say becomes part of our one line
    for name in ("datasets", "huggingface_hub", "timm"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    flags = [(module, name) for module in (constants, datasets.config) for name in names]
    before = [
        (module, flag, getattr(module, flag)) for module, flag in flags if hasattr(module, flag)
    ]
    answers = hub_answers()
    try:
        if not answers:
            for module, flag, _ in before:
                setattr(module, flag, True)
        yield answers
    finally:
        for module, flag, value in before:
            setattr(module, flag, value)
