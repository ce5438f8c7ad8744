"""The processes of a run: how they meet, exchange tensors, agree and fail."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from lab.base.console import print_rank0
from lab.base.errors import NobodyThere, PeerLost, RequestError, one_line
from lab.base.launch import launched
from lab.config.sections import TrainingConfig

CONTACT_SECONDS = 300.0  # how long a process waits for the others before it gives the run up
WORTH_A_LINE = 5.0  # seconds of waiting for the others to start, after which it says so
# one run may follow another in the same processes: each meets under a number of its own
MEETINGS = count()


def connect(seconds: float, host: bool = False) -> distributed.Store:
    """The key-value store of a run's processes: torchrun's own, or, with `host`, one that rank 0
    opens.

    torchrun keeps its store over restarts, so each attempt writes under its own prefix. Raises
    RuntimeError where nobody answers within `seconds`.
    """
    address = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    wait = timedelta(seconds=seconds)
    rank = launched()[0]
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host = host and not of_torchrun and rank == 0
    if rank > 0 and not of_torchrun:
        _await_host(address, port, seconds)
    store = distributed.TCPStore(
        address, port, is_master=host, timeout=wait, wait_for_workers=False
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if of_torchrun else "0"
    return distributed.PrefixStore(f"ast-lab/{attempt}", store)


def _await_host(address: str, port: int, seconds: float) -> None:
    """Wait until rank 0 has opened its store. Raises ConnectionError; torch itself would print a
    page of frames.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(
                (address, port), timeout=max(0.1, min(2, deadline - time.monotonic()))
            ).close()
        except OSError as error:
            if time.monotonic() >= deadline:
                raise ConnectionError(
                    f"rank 0 does not answer at {address}:{port} ({one_line(error)})"
                ) from None
            time.sleep(0.1)


def _await_all(store: distributed.Store, world: int) -> None:
    """Wait until all processes of the run are here. Raises RuntimeError; torch itself would print
    more than a line.
    """
    deadline = time.monotonic() + CONTACT_SECONDS
    here = store.add("here", 1)
    while here < world:
        if time.monotonic() >= deadline:
            raise RuntimeError(f"only {here} of WORLD_SIZE={world} have come")
        time.sleep(0.02)
        here = store.add("here", 0)


@contextlib.contextmanager
def _saying_so(rank: int, world: int) -> Iterator[None]:
    """Where the others do not come within WORTH_A_LINE seconds, say that this process waits, and
    what to do.
    """
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    hint = "start the others, or unset RANK and WORLD_SIZE to train in one process"
    line = (
        f"rank {rank} waits for the other {world - 1} of WORLD_SIZE={world} processes at "
        f"{place}: {hint}"
    )
    timer = threading.Timer(WORTH_A_LINE, lambda: print(line, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    except ConnectionError as error:
        raise NobodyThere(f"{one_line(error)}; {hint}") from None
    finally:
        timer.cancel()


class Failures:
    """Which of a run's processes failed first, and why: kept in the store, so that it is printed
    once.
    """

    def __init__(self) -> None:
        self.store = connect(5)
        self.key = "failure"

    def claim(self, code: int, why: str) -> bool:
        """Whether this process is the first to fail. If so, `why` is kept for the others."""
        first = self.store.add(f"{self.key}/count", 1) == 1
        if first:
            self.store.set(self.key, json.dumps([code, why]))
        return first

    def reported(self) -> tuple[int, str] | None:
        """(exit code, message) of the process that failed first; None where it left no message."""
        for _ in range(30):  # contact may be lost before the message is there
            if self.store.check([self.key]):
                return tuple(json.loads(self.store.get(self.key)))
            time.sleep(0.1)
        return None


def claim_failure(code: int, why: str) -> bool:
    """Whether this process, one of several, is the first to fail, and so the one to print why."""
    try:
        return Failures().claim(code, why)
    except (RuntimeError, KeyError, OSError):  # the store is gone: rank 0 had it
        return launched()[0] == 0


def vote_interval(world: int) -> int:
    """Steps between two votes on stopping (`Clock.vote`): 1 up to 15 processes, then world / 8,
    since the time of an all-gather grows with their number.
    """
    return max(1, world // 8)


class Dist:
    """The processes that work on a run together, and this one's rank among them. A single process
    does nothing here.

    What the host decides goes through gloo and never waits for the device. Gradients, scores and
    samples stay on the device (NCCL on GPUs). Every method is collective (all ranks call it, in the
    same order) but `shard_edges`, `shard`, `local_choice` and `balancing_moves`. Raises PeerLost
    where another process has ended or does not answer for CONTACT_SECONDS.
    """

    def __init__(self, rank: int = 0, world: int = 1):
        self.rank = rank
        self.world = world
        # for all-gathers that run beside other collectives: in torch 2.6 gloo can hang with both on
        # one group
        self.side_group: distributed.ProcessGroup | None = None

    @classmethod
    def join(cls, device: torch.device) -> Dist:
        """Meet the other processes that torchrun has started."""
        rank, world, _ = launched()
        dist = cls(rank, world)
        if world > 1 and not distributed.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            wait = timedelta(seconds=CONTACT_SECONDS)
            with _saying_so(rank, world), dist._contact():
                store = distributed.PrefixStore(
                    str(next(MEETINGS)), connect(CONTACT_SECONDS, host=True)
                )
                _await_all(store, world)
                distributed.init_process_group(
                    backend, store=store, rank=rank, world_size=world, timeout=wait
                )
                dist.side_group = distributed.new_group(timeout=wait, backend="gloo")
        return dist

    def leave(self) -> None:
        """Close the connections once all ranks are here.

        torch 2.6 joins gloo's threads while it holds the GIL, and a thread needs the GIL to free
        its last tensors: the short sleep gives it the time.
        """
        if self.world > 1:
            self.all_gather([0])
            self.side_group = None
            time.sleep(0.1)
            distributed.destroy_process_group()

    @contextlib.contextmanager
    def _contact(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if "DataLoader worker" in str(error):
                # raised by torch's handler of SIGCHLD, wherever this process is
                raise
            with contextlib.suppress(RuntimeError, KeyError, OSError):
                if (report := Failures().reported()) is not None:
                    raise PeerLost(report[1], report[0]) from None
            why = re.sub(r"\[[^]]*]:?(\d+: )? *", "", one_line(error))[:120]
            raise PeerLost(
                f"another process of the run has ended or does not answer: {why}"
            ) from None

    def shard_edges(self, n: int) -> list[int]:
        """Where each rank's shard of n things begins, and n. Shards differ in length by one at
        most.
        """
        return [n * rank // self.world for rank in range(self.world + 1)]

    def shard(self, things: Any) -> Any:
        """This rank's shard of an array, tensor or list."""
        edges = self.shard_edges(len(things))
        return things[edges[self.rank] : edges[self.rank + 1]]

    def local_choice(self, chosen: Tensor, n: int) -> tuple[Tensor, list[int]]:
        """Of indices chosen out of n, int64, ascending: (those in this rank's shard, counted from
        its start; how many each rank has).
        """
        if self.world == 1:
            return chosen, [len(chosen)]
        edges = torch.tensor(self.shard_edges(n))
        cuts = torch.searchsorted(chosen, edges).tolist()
        here = chosen[cuts[self.rank] : cuts[self.rank + 1]] - edges[self.rank]
        return here, np.diff(cuts).tolist()

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by the sum over all ranks."""
        if self.world > 1:
            with self._contact():
                distributed.all_reduce(tensor)
        return tensor

    def all_max(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by the maximum over all ranks, element by element."""
        if self.world > 1:
            with self._contact():
                distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return tensor

    def all_gather(self, values: Sequence[float]) -> np.ndarray:
        """Every rank's numbers, float64 [world, n]."""
        return self.all_gather_async(values)()

    def all_gather_async(self, values: Sequence[float]) -> Callable[[], np.ndarray]:
        """Start an `all_gather` and go on. Returns a function that waits for the numbers."""
        row = torch.tensor([float(value) for value in values], dtype=torch.float64)
        if self.world == 1:
            return lambda: row.numpy()[None]
        rows = [torch.empty_like(row) for _ in range(self.world)]
        with self._contact():
            work = distributed.all_gather(rows, row, async_op=True, group=self.side_group)

        def wait() -> np.ndarray:
            with self._contact():
                work.wait()
            return torch.stack(rows).numpy()

        return wait

    def all_gather_objects(self, thing: Any) -> list[Any]:
        """Every rank's `thing`. It is pickled: for what happens once an epoch."""
        things = [thing] * self.world
        if self.world > 1:
            with self._contact():
                distributed.all_gather_object(things, thing)
        return things

    def gather_objects(self, thing: Any) -> list[Any] | None:
        """Every rank's `thing` on rank 0, None on the others. It is pickled."""
        if self.world == 1:
            return [thing]
        things = [None] * self.world if self.rank == 0 else None
        with self._contact():
            distributed.gather_object(thing, things)
        return things

    def broadcast(self, thing: Any) -> Any:
        """Rank 0's `thing`."""
        return self.all_gather_objects(thing if self.rank == 0 else None)[0]

    def require_same(self, complaint: str, thing: Any) -> None:
        """Raises RequestError on every rank, naming one that differs from rank 0, unless all have
        the same `thing`.
        """
        things = self.all_gather_objects(thing)
        if differing := [rank for rank, each in enumerate(things) if each != things[0]]:
            raise RequestError(f"{complaint}, rank {differing[0]} other than rank 0")

    def all_gather_columns(self, rows: Tensor, size: int) -> Tensor:
        """Every rank's [rows, n] side by side, [rows, world * size]. Where n < size the rest is
        -inf.
        """
        if self.world == 1:
            return rows
        rows = F.pad(rows, (0, size - rows.shape[1]), value=-math.inf).contiguous()
        parts = [torch.empty_like(rows) for _ in range(self.world)]
        with self._contact():
            distributed.all_gather(parts, rows)
        return torch.cat(parts, 1)

    def all_to_all(self, tensor: Tensor, moves: np.ndarray) -> Tensor:
        """Send rows of this rank's `tensor` to the others. Returns what they sent, in the order of
        the ranks.

        moves: int [world, world], how many rows each rank (first index) sends to each (second). The
        first `moves[rank, 0]` rows of this rank go to rank 0, the next ones to rank 1, and so on.
        """
        gets = moves[:, self.rank].tolist()
        sends = moves[self.rank].tolist()
        received = tensor.new_empty(sum(gets), *tensor.shape[1:])
        with self._contact():
            distributed.all_to_all_single(received, tensor.contiguous(), gets, sends)
        return received

    def balancing_moves(
        self, counts: Sequence[int], shares: Sequence[int] | None = None
    ) -> np.ndarray | None:
        """The moves (see `all_to_all`) after which each rank has its number of `shares`; None where
        nothing moves.

        counts: how many each rank has now. shares: by default equal ones, differing by one at most.
        Only the surplus moves.
        """
        shares = np.diff(self.shard_edges(sum(counts))) if shares is None else np.asarray(shares)
        staying = np.minimum(counts, shares)
        if (staying == shares).all():
            return None
        # what leaves the ranks up to each, and what reaches them; at the last rank both are equal
        surplus = np.cumsum(np.asarray(counts) - staying)
        lacking = np.cumsum(shares - staying)
        begin = np.maximum.outer(surplus - (counts - staying), lacking - (shares - staying))
        return np.diag(staying) + np.maximum(0, np.minimum.outer(surplus, lacking) - begin)

    def balance(self, counts: Sequence[int], tensors: Iterable[Tensor]) -> list[Tensor]:
        """Spread the samples of a training step evenly over the ranks. counts: how many each rank
        has.

        No rank gets a single sample while others have more, because BatchNorm cannot normalise one:
        then fewer ranks train, and the others have none.
        """
        if self.world == 1:
            return list(tensors)
        total = sum(counts)
        training = min(self.world, max(1, total // 2))
        shares = np.zeros(self.world, dtype=int)
        shares[:training] = np.diff([total * rank // training for rank in range(training + 1)])
        moves = self.balancing_moves(counts, shares)
        if moves is None:
            return list(tensors)
        return [self.all_to_all(tensor, moves) for tensor in tensors]


def meet(training: TrainingConfig, device: torch.device, request: Any) -> Dist:
    """Join the processes of this run. Raises RequestError where they do not fit together.

    request: what all must have been given alike, the config as plain data.
    """
    _, world, _ = launched()
    if training.batch_size % world:
        raise RequestError(
            f"training.batch_size: {training.batch_size} is no multiple of {world} processes"
        )
    if world > 1 and training.sync_batchnorm and device.type == "cpu":
        raise RequestError(
            "training.sync_batchnorm: several processes need GPUs for it, torch has none "
            "for the CPU"
        )
    dist = Dist.join(device)
    if world > 1:
        dist.require_same("the processes were given different configs", request)
        share = training.batch_size // world
        print_rank0(
            f"{world} processes, {share} samples a step each of "
            f"training.batch_size={training.batch_size}"
        )
    return dist


def average_running_statistics(floats: Sequence[Tensor], dist: Dist) -> list[tuple[Tensor, Tensor]]:
    """Give every rank the mean over ranks of BatchNorm's running statistics, float32 buffers.
    Returns (buffer, its own value before).
    """
    if dist.world == 1 or not floats:
        return []
    before = [buffer.clone() for buffer in floats]
    flat = dist.all_sum(torch.cat([buffer.flatten() for buffer in floats])) / dist.world
    for buffer, part in zip(floats, flat.split([buffer.numel() for buffer in floats]), strict=True):
        buffer.copy_(part.view_as(buffer))
    return list(zip(floats, before, strict=True))


def merge_gradients(
    parameters: Sequence[nn.Parameter], samples: int, divisor: int, dist: Dist
) -> None:
    """Make every rank's gradient the mean over the samples of all ranks, in one all-reduce.

    Each rank holds the gradient of its summed loss over `divisor`; a rank without samples adds
    nothing.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    # as they lie in memory, channels_last or not: autograd gives a gradient its parameter's strides
    # on every rank
    gradients = [p.grad.as_strided((p.numel(),), (1,)) for p in parameters]
    count = torch.full((1,), float(samples), device=gradients[0].device)
    flat = torch.cat([*gradients, count])
    merged = flat[:-1].mul_(divisor)
    total = dist.all_sum(flat)[-1]
    torch._foreach_copy_(gradients, merged.div_(total).split([len(g) for g in gradients]))
