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
import struct
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

# of a worker, shared with the main process: since when it has been at a sample, time.monotonic()
# seconds, 0 where it is at none; its process; the sample's name
PLACE = struct.Struct("dq496s")
_places: mmap.mmap | None = None  # in the main process, of the workers that start next
_place: memoryview | None = None  # in a worker, its own
STATES = {"T": ", stopped", "t": ", stopped", "D": ", in the kernel, for a disk"}  # of a process


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
        _leave_place()
        return PickledBatch(self.collate(samples))


def note_place(name: Callable[[int], str], index: int) -> None:
    """In a loader worker, keep that it begins to read the sample `name(index)`: where it hangs, the
    main process says so.
    """
    if _place is not None:
        PLACE.pack_into(_place, 0, time.monotonic(), os.getpid(), os.fsencode(name(index)))


def _leave_place() -> None:
    """The sample was read. Its name stays."""
    if _place is not None:
        _place[:8] = bytes(8)


def _why_nothing_comes(places: mmap.mmap, seconds: float) -> str:
    """Which worker keeps the run waiting, as far as can be told: the one that has been at a sample
    for longest, or one that is stopped.
    """
    line = f"dataset.worker_timeout: no loader worker has sent a batch for {seconds:g} s"
    found = []
    for at in range(0, len(places), PLACE.size):
        since, process, name = PLACE.unpack_from(places, at)
        state = _state_of(process)
        age = time.monotonic() - since if since else 0.0
        found.append((bool(state), age, process, state, os.fsdecode(name.rstrip(b"\0"))))
    _, age, process, state, name = max(found)
    if process:
        did = f"has been at it for {age:.0f} s" if age else "has read it"
        line += f"; {name or 'no sample yet'}: process {process}{state}, {did}"
    return f"{line}; does the disk answer? --resume auto goes on from the last checkpoint"


def _state_of(process: int) -> str:
    """What keeps a process from running, in words; nothing where it may run."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(errors="replace")
    except OSError:
        return ""
    return STATES.get(text.rpartition(")")[2].split()[0], "")


class _Watch:
    """Watches over a wait for the workers: it says so once after WORTH_A_LINE seconds, and after
    so many `seconds` it ends the wait, where the time-out of DataLoader cannot: a worker that is
    stopped answers for no batch that it has sent.

    Until then nobody knows how long a file may take, and whoever reads the line decides. Time is
    waited for in halves: where the whole run was stopped meanwhile, the first one ends at once.
    """

    def __init__(self, places: mmap.mmap, seconds: float):
        self.places = places
        self.seconds = seconds
        self.over = threading.Event()
        self.why: str | None = None  # the wait was ended

    def __enter__(self) -> None:
        threading.Thread(target=self._watch, daemon=True, name="watch over workers").start()

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self.over.set()
        if isinstance(error, RuntimeError) and _timed_out(error):
            self.why = self.why or _why_nothing_comes(self.places, self.seconds)
        if self.why is not None and isinstance(error, Exception):
            raise TrainingFailed(self.why) from None

    def _watch(self) -> None:
        first = min(WORTH_A_LINE, self.seconds / 2)
        if self.over.wait(first):
            return
        if first == WORTH_A_LINE:
            print_progress(
                f"waiting for data: no loader worker has sent a batch for {WORTH_A_LINE:.0f} s: "
                f"does the disk answer? a second Ctrl-C ends the run"
            )
        # a little later than the time-outs of DataLoader, which need nobody to be killed
        rest = self.seconds - first + 0.5
        if self.over.wait(min(rest, threading.TIMEOUT_MAX)):
            return
        self.why = _why_nothing_comes(self.places, self.seconds)
        kill_workers()


def _batches(iterator: Iterator[Any], places: mmap.mmap, seconds: float) -> Iterator[Any]:
    """What `iterator` gives. Raises TrainingFailed where nothing comes for so many seconds."""
    done = object()
    while True:
        with _Watch(places, seconds):
            batch = _next(iterator, done)
        if batch is done:
            return
        yield batch


def _next(iterator: Iterator[Any], done: object) -> Any:
    """The next batch, or `done` at the end, in two attempts of half the time each: see `_Watch`."""
    try:
        return next(iterator, done)
    except RuntimeError as error:
        if not _timed_out(error):
            raise
    return next(iterator, done)


def _timed_out(error: RuntimeError) -> bool:
    return str(error).startswith("DataLoader timed out")


class WorkerLoader(DataLoader):
    """A DataLoader whose workers never outlive the run, and never leave it waiting in silence."""

    def __init__(
        self,
        *args: Any,
        collate_fn: Callable[[Any], Any] | None = None,
        worker_timeout: float = math.inf,
        **options: Any,
    ):
        """worker_timeout: seconds without a batch after which iterating raises TrainingFailed."""
        collate_fn = collate_fn or default_collate
        self.worker_timeout = worker_timeout
        self.places: mmap.mmap | None = None  # of the workers, one after the other
        if options.get("num_workers"):
            collate_fn = PickledCollate(collate_fn)
            options["worker_init_fn"] = _begin
            if worker_timeout < math.inf:
                options["timeout"] = worker_timeout / 2  # see `_Watch`
        super().__init__(*args, collate_fn=collate_fn, **options)

    def __iter__(self) -> Iterator[Any]:
        """Raises RequestError or TrainingFailed where the workers cannot be started."""
        global _places
        if not self.num_workers:
            return super().__iter__()
        _prepare(self.num_workers)
        if self.places is None:
            self.places = mmap.mmap(-1, PLACE.size * self.num_workers)
        _places = self.places
        try:
            # torch leaves workers behind where it fails half-way: so try first what each needs
            queues = [multiprocessing.Queue() for _ in range(self.num_workers + 2)]
            del queues
            with _signals_held(), _Watch(self.places, self.worker_timeout):
                iterator = super().__iter__()
        except OSError as error:
            full = "; /dev/shm is full" if error.errno == errno.ENOSPC else ""
            why = f"cannot start {self.num_workers} loader workers: {error.strerror}{full}"
            raise TrainingFailed(f"{why}; lower training.num_workers") from None
        _iterators.add(iterator)
        return _batches(iterator, self.places, self.worker_timeout)


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
    function, `_end_pinning` and `kill_workers`, and nothing else, use private names of its
    iterators.
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
    """Send the loader workers of this process SIGKILL, and return them.

    A worker may die while it asks its iterator's event whether to end, and then keeps the lock of
    that event. So the iterators get another one, which nobody holds.
    """
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    for worker in workers:
        worker.kill()
    for iterator in list(_iterators):
        iterator._workers_done_event = multiprocessing.Event()
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


def _begin(number: int) -> None:
    """What worker number `number` does first."""
    global _place
    if _places is not None:
        _place = memoryview(_places)[PLACE.size * number : PLACE.size * (number + 1)]
        PLACE.pack_into(_place, 0, 0.0, os.getpid(), b"")
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
