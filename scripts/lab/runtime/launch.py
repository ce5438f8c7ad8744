"""Which of a run's processes this is, and how to start several."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def launched() -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine) as torchrun sets them; (0, 1, 0) without it."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1 or not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return 0, 1, 0
    return int(os.environ["RANK"]), world, int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))


def launch(script: Path, processes: int, max_restarts: int, arguments: Sequence[str]) -> int:
    """Run `script` in several processes of this machine by torchrun. Returns the exit code of the one that failed
    first; 1 if that one was killed.

    A run that loses a process is started again, up to `max_restarts` times.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in [*logging.root.manager.loggerDict]:  # the processes report by themselves what went wrong
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: its name need not resolve
    options = ["--standalone", f"--nproc-per-node={processes}", f"--max-restarts={max_restarts}"]
    options.append("--")  # or torchrun takes the script's options for its own
    try:
        # torchrun puts a process's rank in place of ${local_rank}, and one dollar sign in place of two
        torchrun.main([*options, *(text.replace("$", "$$") for text in (str(script), *arguments))])
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 1
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
