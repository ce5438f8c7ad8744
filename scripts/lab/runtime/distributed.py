"""The processes of a run: how they meet, exchange tensors, agree and fail."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from lab.config import Config, checkpoint_folder
from lab.console import print_rank0
from lab.errors import PeerLost, RequestError, one_line
from lab.runtime.launch import launched

CONTACT_SECONDS = 300.0  # how long a process waits for the others before it gives the run up

MEETINGS = count()  # of these processes: a run may follow another, and each has a name of its own in the store


def connect(seconds: float, host: bool = False) -> distributed.Store:
    """The store where the processes of a run meet: torchrun's own, or, with `host`, rank 0's where there is none.

    torchrun keeps its store over restarts, so that each attempt writes under a name of its own. Raises RuntimeError
    where nobody answers within so many seconds.
    """
    address, port, wait = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=seconds)
    torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host = host and not torchruns and launched()[0] == 0
    store = distributed.TCPStore(address, port, is_master=host, timeout=wait, wait_for_workers=False)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if torchruns else "0"
    return distributed.PrefixStore(f"ast-lab/{attempt}", store)


class Failures:
    """Who of a run's processes failed first, and why: kept in the store, so that it is said once."""

    def __init__(self) -> None:
        self.store, self.key = connect(5), "failure"

    def claim(self, code: int, why: str) -> bool:
        """Whether this process is the first one to fail; then `why` is kept for the others."""
        first = self.store.add(f"{self.key}/count", 1) == 1
        if first:
            self.store.set(self.key, json.dumps([code, why]))
        return first

    def reported(self) -> tuple[int, str] | None:
        """(exit code, message) of the process that failed first; None where it said nothing."""
        for _ in range(30):  # it may lose contact before it has said so
            if self.store.check([self.key]):
                return tuple(json.loads(self.store.get(self.key)))
            time.sleep(0.1)
        return None


def claim_failure(code: int, why: str) -> bool:
    """Whether this process, one of several, is the first to fail, and so the one to print why."""
    try:
        return Failures().claim(code, why)
    except (RuntimeError, KeyError):  # no store: rank 0 had it
        return launched()[0] == 0


def asking_interval(world: int) -> int:
    """After how many steps so many processes ask each other whether to go on (`Run.agree`): up to 15 after each."""
    return max(1, world // 8)


class Dist:
    """The processes that work on a run together, and this one's rank among them; one alone does nothing here.

    What the host decides on goes through gloo and never waits for the device; gradients, scores and samples stay on
    the device (NCCL on GPUs). Every method but `edges`, `part`, `own_part` and `evening` is collective: all ranks call
    it, in the same order. Raises PeerLost where another process has ended or does not answer for CONTACT_SECONDS.
    """

    def __init__(self, rank: int = 0, world: int = 1):
        self.rank, self.world = rank, world
        # connections for what goes on beside other collectives; in torch 2.6 gloo can hang with both on the same
        self.beside: distributed.ProcessGroup | None = None

    @classmethod
    def join(cls, device: torch.device) -> Dist:
        """Meet the other processes that torchrun has started."""
        rank, world, _ = launched()
        dist = cls(rank, world)
        if world > 1 and not distributed.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            with dist._contact():
                distributed.init_process_group(
                    backend,
                    store=distributed.PrefixStore(str(next(MEETINGS)), connect(CONTACT_SECONDS, host=True)),
                    rank=rank,
                    world_size=world,
                    timeout=timedelta(seconds=CONTACT_SECONDS),
                )
                dist.beside = distributed.new_group(timeout=timedelta(seconds=CONTACT_SECONDS), backend="gloo")
        return dist

    def leave(self) -> None:
        """Close the connections, once all ranks are here.

        torch 2.6 joins gloo's threads while it holds the GIL, which a thread wants to let go of its last tensors: they
        get the time for it.
        """
        if self.world > 1:
            self.gather([0])
            self.beside = None
            time.sleep(0.1)
            distributed.destroy_process_group()

    @contextlib.contextmanager
    def _contact(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if "DataLoader worker" in str(error):  # raised by the handler of a signal, wherever this process is
                raise
            with contextlib.suppress(RuntimeError, KeyError):
                if (report := Failures().reported()) is not None:
                    raise PeerLost(report[1], report[0]) from None
            why = re.sub(r"\[[^]]*]:?(\d+: )? *", "", one_line(error))[:120]
            raise PeerLost(f"another process of the run has ended or does not answer: {why}") from None

    def edges(self, n: int) -> list[int]:
        """Where each rank's part of n things begins, and n: the parts differ by one at most."""
        return [n * rank // self.world for rank in range(self.world + 1)]

    def part(self, things: Any) -> Any:
        """This rank's part of an array, tensor or list."""
        edges = self.edges(len(things))
        return things[edges[self.rank] : edges[self.rank + 1]]

    def own_part(self, chosen: Tensor, n: int) -> tuple[Tensor, list[int]]:
        """Of the chosen, int64, ascending, out of n: (those in this rank's part, counted from its start; how many
        each rank has)."""
        edges = torch.tensor(self.edges(n))
        cuts = torch.searchsorted(chosen, edges).tolist()
        return chosen[cuts[self.rank] : cuts[self.rank + 1]] - edges[self.rank], np.diff(cuts).tolist()

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by the sum of all ranks'."""
        if self.world > 1:
            with self._contact():
                distributed.all_reduce(tensor)
        return tensor

    def all_max(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by the largest of all ranks', element by element."""
        if self.world > 1:
            with self._contact():
                distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return tensor

    def gather(self, values: Sequence[float]) -> np.ndarray:
        """Every rank's numbers, float64 [world, n]."""
        return self.gather_later(values)()

    def gather_later(self, values: Sequence[float]) -> Callable[[], np.ndarray]:
        """Start to `gather`, and go on. Returns what waits for the numbers."""
        own = torch.tensor([float(value) for value in values], dtype=torch.float64)
        if self.world == 1:
            return lambda: own.numpy()[None]
        rows = [torch.empty_like(own) for _ in range(self.world)]
        with self._contact():
            work = distributed.all_gather(rows, own, async_op=True, group=self.beside)

        def wait() -> np.ndarray:
            with self._contact():
                work.wait()
            return torch.stack(rows).numpy()

        return wait

    def gather_objects(self, thing: Any) -> list[Any]:
        """Every rank's `thing`, for what is asked once an epoch."""
        things = [thing] * self.world
        if self.world > 1:
            with self._contact():
                distributed.all_gather_object(things, thing)
        return things

    def first(self, thing: Any) -> Any:
        """Rank 0's `thing`."""
        return self.gather_objects(thing if self.rank == 0 else None)[0]

    def require_same(self, complaint: str, thing: Any) -> None:
        """Raises RequestError on every rank, naming one that differs from rank 0, unless all have the same `thing`."""
        things = self.gather_objects(thing)
        if differing := [rank for rank, each in enumerate(things) if each != things[0]]:
            raise RequestError(f"{complaint}, rank {differing[0]} other than rank 0")

    def join_columns(self, facts: Tensor, size: int) -> Tensor:
        """[rows, n] of every rank beside each other, [rows, world * size]; n < size is filled up with -inf."""
        if self.world == 1:
            return facts
        facts = F.pad(facts, (0, size - facts.shape[1]), value=-math.inf).contiguous()
        parts = [torch.empty_like(facts) for _ in range(self.world)]
        with self._contact():
            distributed.all_gather(parts, facts)
        return torch.cat(parts, 1)

    def exchange(self, tensor: Tensor, moves: np.ndarray) -> Tensor:
        """Send rows of this rank's `tensor` to the others, and get theirs, in the order of the ranks.

        moves: int [world, world], how many rows each rank (first index) has for each (second). The first
        `moves[rank, 0]` of this rank's rows go to rank 0, the next ones to rank 1, and so on.
        """
        gets, sends = moves[:, self.rank].tolist(), moves[self.rank].tolist()
        received = tensor.new_empty(sum(gets), *tensor.shape[1:])
        with self._contact():
            distributed.all_to_all_single(received, tensor.contiguous(), gets, sends)
        return received

    def evening(self, counts: Sequence[int]) -> np.ndarray | None:
        """The moves (see `exchange`) after which all ranks have as many samples, or one more: from those that have more
        than their part to those that have less. `counts`: how many each has. None where nothing has to move."""
        shares = np.diff(self.edges(sum(counts)))
        kept = np.minimum(counts, shares)
        if (kept == shares).all():
            return None
        over, under = (np.cumsum(each - kept) for each in (np.asarray(counts), shares))  # both end at the same sum
        first = np.maximum.outer(over - (counts - kept), under - (shares - kept))
        return np.diag(kept) + np.maximum(0, np.minimum.outer(over, under) - first)

    def even_out(self, counts: Sequence[int], *tensors: Tensor) -> tuple[Tensor, ...]:
        """Spread samples evenly over the ranks, each of which has its number of `counts`."""
        moves = None if self.world == 1 else self.evening(counts)
        return tensors if moves is None else tuple(self.exchange(tensor, moves) for tensor in tensors)


def meet(config: Config, device: torch.device) -> Dist:
    """Join the processes of this run, where there are several. Raises RequestError where they do not fit together."""
    _, world, _ = launched()
    if config.training.batch_size % world:
        raise RequestError(f"training.batch_size: {config.training.batch_size} is no multiple of {world} processes")
    if world > 1 and config.training.sync_batchnorm and device.type == "cpu":
        raise RequestError("training.sync_batchnorm: several processes need GPUs for it, torch has none for the CPU")
    dist = Dist.join(device)
    if world > 1:
        whole = config.model_dump(exclude={"logging"})
        dist.require_same("the processes were given different configs", [whole, str(checkpoint_folder(config))])
        share = config.training.batch_size // world
        print_rank0(
            f"{world} processes, {share} samples a step each of training.batch_size={config.training.batch_size}"
        )
    return dist
