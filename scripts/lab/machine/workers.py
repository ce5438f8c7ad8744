"""The loader workers of a process: how they start, what they send, and how they end.

A worker ignores SIGINT, SIGTERM, SIGUSR1 and SIGUSR2: a terminal and a scheduler send them to the
whole process group, and the main process needs its workers until its step is done. So a worker
cannot be terminated. `end_workers` kills them instead.

A worker's batches go through a queue whose thread drops what it cannot pickle; the main process
would wait for that batch for ever. Here a batch is pickled before it goes into the queue, where an
error reaches the main process.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import math
import mmap
import multiprocessing
import multiprocessing.util
import os
import re
import signal
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, default_collate

from lab.base.errors import RequestError, TrainingFailed, one_line
from lab.base.launch import SIGNALS
from lab.base.streams import forget_unprinted, print_progress

# bytes that the path of a worker's temporary folder may have; that of a socket in it has 107
SOCKET_FOLDER_BYTES = 70

# open files: two pipes and a sentinel, and three tensors of each of its two batches
HANDLES_A_WORKER = 11

# MB of /dev/shm, what Docker gives: a worker that ends without a word has probably filled it
SMALL_SHARED_MEMORY = 64

WORTH_A_LINE = 60.0  # seconds of waiting for a batch, after which a process says so

_iterators: weakref.WeakSet = weakref.WeakSet()  # torch's, those that may have workers

_last_words: mmap.mmap | None = None  # shared with the workers: why one of them gave up


class PickledBatch:
    """A batch as it travels: pickled in the worker, unpickled as itself in the main process."""

    def __init__(self, batch: Any):
        self.data = bytes(ForkingPickler.dumps(batch))

    def __reduce__(self) -> tuple[Callable, tuple[bytes]]:
        return ForkingPickler.loads, (self.data,)


class PickledCollate:
    """A collate function whose batches are a `PickledBatch`."""

    def __init__(self, collate: Callable[[Any], Any]):
        self.collate = collate

    def __call__(self, samples: Any) -> PickledBatch:
        return PickledBatch(self.collate(samples))


@contextlib.contextmanager
def _saying_so() -> Iterator[None]:
    """Where the block waits for data for WORTH_A_LINE seconds, say so, once, and wait on.

    The workers live, and a disk or a network keeps them. That it takes long is no fault: nobody
    knows how long a file may take. So the run goes on when the batch comes, and whoever reads the
    line decides. A timer of our own, because the timeout of DataLoader ends the iteration.
    """
    line = (
        f"waiting for data: no loader worker has sent a batch for {WORTH_A_LINE:.0f} s: "
        f"does the disk answer? a second Ctrl-C ends the run"
    )
    timer = threading.Timer(WORTH_A_LINE, print_progress, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _batches(iterator: Iterator[Any]) -> Iterator[Any]:
    """What `iterator` gives, waited for aloud."""
    done = object()
    while True:
        with _saying_so():
            batch = next(iterator, done)
        if batch is done:
            return
        yield batch


class WorkerLoader(DataLoader):
    """A DataLoader whose workers never outlive the run, and never leave it waiting in silence."""

    def __init__(self, *args: Any, collate_fn: Callable[[Any], Any] | None = None, **options: Any):
        collate_fn = collate_fn or default_collate
        if options.get("num_workers"):
            collate_fn = PickledCollate(collate_fn)
            options["worker_init_fn"] = _begin
        super().__init__(*args, collate_fn=collate_fn, **options)

    def __iter__(self) -> Iterator[Any]:
        """Raises RequestError or TrainingFailed where the workers cannot be started."""
        if not self.num_workers:
            return super().__iter__()
        _prepare(self.num_workers)
        try:
            # torch leaves workers behind where it fails half-way: so try first what each needs
            queues = [multiprocessing.Queue() for _ in range(self.num_workers + 2)]
            del queues
            with _signals_held(), _saying_so():
                iterator = super().__iter__()
        except OSError as error:
            full = "; /dev/shm is full" if error.errno == errno.ENOSPC else ""
            why = f"cannot start {self.num_workers} loader workers: {error.strerror}{full}"
            raise TrainingFailed(f"{why}; lower training.num_workers") from None
        _iterators.add(iterator)
        return _batches(iterator)


@contextlib.contextmanager
def ending_workers() -> Iterator[None]:
    """End the loader workers of this process with the block, however it ends."""
    try:
        yield
    finally:
        end_workers()


def end_workers() -> None:
    """End the loader workers of this process at once, whatever they are at. They have nothing to
    save.

    They are the only daemonic children a run has. torch's handler of SIGCHLD would take their
    deaths for a failure. torch has no public way to end an iterator whose workers may hang: so this
    function and `_end_pinning`, and nothing else, use private names of its iterators.
    """
    handler = None
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and hasattr(signal, "SIGCHLD"):  # elsewhere no handler can be set
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _end_pinning()
    workers = kill_workers()
    for worker in workers:
        worker.join(5)  # a worker that the kernel holds does not hold the run
    for iterator in list(_iterators):
        iterator._shutdown_workers()  # the threads of its queues
    if workers:
        # a thread that ends beside its queue closes pipes that are closed
        _join([each for each in threading.enumerate() if each.name == "QueueFeederThread"])
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)


def _join(threads: Iterable[threading.Thread]) -> None:
    """Wait until they have ended, for a second at most."""
    deadline = time.monotonic() + 1
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def _end_pinning() -> None:
    """End the threads that copy batches to pinned memory. They ask the workers for each, and fail
    where one is dead.

    A worker that hangs may keep its thread from ending: it is waited for a second at most.
    """
    iterators = [
        each
        for each in list(_iterators)
        if hasattr(each, "_pin_memory_thread") and not each._shutdown
    ]
    for iterator in iterators:
        iterator._pin_memory_thread_done_event.set()
        # as torch does, so that the thread wakes up
        iterator._worker_result_queue.put((None, None))
    _join([iterator._pin_memory_thread for iterator in iterators])


def kill_workers() -> list[multiprocessing.process.BaseProcess]:
    """Send the loader workers of this process SIGKILL, and return them."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    for worker in workers:
        worker.kill()
    return workers


def worker_error(error: BaseException) -> str | None:
    """What went wrong in a loader worker, where `error` comes from one: its type and message
    without a traceback.
    """
    wrapped = re.match(r"Caught \w+ in (DataLoader worker process|pin memory thread)", str(error))
    if wrapped:
        return one_line(str(error).strip().splitlines()[-1])
    lost = isinstance(error, ConnectionError | EOFError) or "DataLoader worker" in str(error)
    why = b"" if _last_words is None else _last_words[:].rstrip(b"\0")
    if lost and why:
        return one_line(why.decode(errors="replace"))
    megabytes = _shared_megabytes()
    if "exited unexpectedly" in str(error) and megabytes <= SMALL_SHARED_MEMORY:
        # torch 2.6 says no more
        return f"{one_line(error)}, perhaps by a Bus error: /dev/shm has {megabytes:.0f} MB"
    return None


def _shared_megabytes() -> float:
    """The size of /dev/shm; infinite where there is none."""
    try:
        facts = os.statvfs("/dev/shm")
    except (OSError, AttributeError):
        return math.inf
    return facts.f_blocks * facts.f_frsize / 2**20


def _prepare(workers: int) -> None:
    """What so many workers need before they start. Raises RequestError where this process cannot
    have it.
    """
    global _last_words
    if _last_words is None:
        _last_words = mmap.mmap(-1, 512)
    _last_words[:] = bytes(len(_last_words))
    _require_handles(workers)
    _require_socket_folder()
    forget_unprinted(sys.stdout)  # to start a process is to flush it
    # the last to be registered runs first: before the hook of multiprocessing, which joins the
    # workers
    atexit.unregister(end_workers)
    atexit.register(end_workers)


def _require_handles(workers: int) -> None:
    folder = Path("/dev/fd")
    if not folder.is_dir():
        return
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir(folder)) + HANDLES_A_WORKER * workers
    if limit != resource.RLIM_INFINITY and needed > limit:
        why = (
            f"{workers} loader workers need about {needed} open files, and `ulimit -n` "
            f"allows {limit}"
        )
        raise RequestError(f"training.num_workers: {why}")


def _require_socket_folder() -> None:
    """Make the temporary folder that the workers share for their sockets: a short one where TMPDIR
    is too long.
    """
    chosen = tempfile.tempdir
    try:
        if os.name == "posix" and len(os.fsencode(tempfile.gettempdir())) > SOCKET_FOLDER_BYTES:
            tempfile.tempdir = "/tmp"
        made = multiprocessing.util.get_temp_dir()
    except OSError as error:
        folder = tempfile.tempdir or os.environ.get("TMPDIR", "/tmp")
        raise RequestError(
            f"TMPDIR: the loader workers need a folder in {folder}: {error.strerror}"
        ) from None
    finally:
        tempfile.tempdir = chosen
    if os.name == "posix" and len(os.fsencode(made)) > SOCKET_FOLDER_BYTES + 14:
        raise RequestError(f"TMPDIR: too long a path for the sockets of loader workers: {made}")


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Hold the SIGNALS back while workers start: until one ignores them it has the run's own
    handler.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(_: int) -> None:
    """What a worker does first."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    # the thread that hands over a batch calls it, and would go on without an end
    sys.excepthook = _give_up


def _give_up(_: type[BaseException], error: BaseException, *__: Any) -> None:
    """End this worker, and leave the reason to the main process."""
    if _last_words is not None:
        room = len(_last_words)
        why = f"{type(error).__name__}: {one_line(error)}".encode()
        _last_words[:] = why[:room].ljust(room, b"\0")
    os._exit(1)
