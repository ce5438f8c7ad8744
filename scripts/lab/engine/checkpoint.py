"""Checkpoints: written whole, verified, refused where they do not fit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lab.base.errors import RequestError, TrainingFailed, one_line
from lab.base.files import locked, replace_file, require_folder
from lab.config.imports import identities
from lab.config.loading import Config, checkpoint_folder, config_keys, run_id
from lab.machine.devices import synchronize

FORMAT = 8  # of the state: a state a part of the run, and one of each process's own
MAY_CHANGE = (
    "training.epochs",
    "training.max_minutes",
    "training.num_workers",
    "training.early_stop_patience",
    "dataset.worker_timeout",
)
MAGIC = b"AST-LAB checkpoint, sha256: "
CAPPED = (
    "capped.json"  # beside the checkpoint: the logged line of an epoch that a time cap cut short
)


def file_digest(path: Path, size: int) -> bytes:
    """SHA-256 of the first `size` bytes of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(min(2**20, size)):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest().encode()


def save_checkpoint(state: dict[str, Any], path: Path, best: bool = False) -> None:
    """Write `state` to `path`, whole or not at all, followed by its SHA-256. The best also goes to
    best.pt beside it.

    Raises OSError where the disk does not take it; `path` then holds what it held before.
    """

    def write(part: Path) -> None:
        with part.open("wb") as file:
            torch.save(state, file)
        digest = file_digest(part, part.stat().st_size)
        with part.open("ab") as file:
            file.write(MAGIC + digest)

    def link(part: Path) -> None:
        try:
            os.link(path, part)  # costs nothing, and nobody writes into a checkpoint
        except OSError:
            shutil.copyfile(path, part)

    replace_file(path, write)
    if best:
        replace_file(path.with_name("best.pt"), link)


def load_checkpoint(path: Path, config: Config) -> dict[str, Any]:
    """What `save_checkpoint` wrote, tensors on the host. No code in it is run (`weights_only`).

    Raises RequestError for a file that cannot be read, is damaged or of another format, or belongs
    to another config. The last names the keys that differ; those of MAY_CHANGE and logging may, and
    the text of an import (`changed_code`).
    """
    try:
        size = path.stat().st_size - len(MAGIC) - 64
        with path.open("rb") as file:
            file.seek(max(size, 0))
            whole = size > 0 and file.read() == MAGIC + file_digest(path, size)
        if not whole:
            raise RequestError(
                f"{path}: damaged, or no checkpoint of this lab; best.pt beside it may be whole"
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state.get("format") != FORMAT:
            raise RequestError(
                f"{path}: a checkpoint of another version of the lab; start the run afresh"
            )
        saved = Config.model_validate(state["config"]).model_dump()
    except OSError as error:
        raise RequestError(
            f"{path}: cannot read the checkpoint: {error.strerror or one_line(error)}"
        ) from None
    except RequestError:
        raise
    except Exception as error:  # the pickle machine raises almost anything on what it refuses
        raise RequestError(f"{path}: no checkpoint of this lab: {one_line(error)[:200]}") from None
    asked = config.model_dump()
    keys = [
        key for key in config_keys() if key not in MAY_CHANGE and not key.startswith("logging.")
    ]
    before, now = (
        [each.partition("@")[0] for each in identities(one.get("imports", []))]
        for one in (saved, asked)
    )
    if before != now:
        raise RequestError(f"{path}: a checkpoint with other imports: {before} there, {now} here")
    values = [
        (key, *(each[key.split(".")[0]][key.split(".")[1]] for each in (saved, asked)))
        for key in keys
    ]
    if differing := [
        f"{key} ({old} there, {new} asked for)" for key, old, new in values if old != new
    ]:
        raise RequestError(f"{path}: a checkpoint of another config: {', '.join(differing)}")
    return state


def host_copy(state: Any) -> Any:
    """A copy on the host of nested dicts, lists and tensors; from a GPU it is there once the GPU is
    synchronised.
    """
    if isinstance(state, Tensor):
        copied = torch.empty_like(state, device="cpu", pin_memory=state.is_cuda)
        return copied.copy_(state.detach(), non_blocking=True)
    if isinstance(state, dict):
        return {key: host_copy(value) for key, value in state.items()}
    return [host_copy(value) for value in state] if isinstance(state, list | tuple) else state


class Checkpoints:
    """Writes a run's checkpoints in a thread, one at a time, while the training goes on."""

    def __init__(self, folder: Path):
        """Raises RequestError where `folder` cannot be made or written to."""
        self.folder = folder
        self.last = folder / "last.pt"
        self.capped = folder / CAPPED
        require_folder(folder, "logging.output_dir", folder)
        for left in folder.glob("*.part"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.pending: list[Future] = []
        self.saved = time.monotonic()

    def require_space(self, size: int, weights: int = 0) -> None:
        """Raises RequestError where the disk has no room for three files of `size` bytes (last,
        best and the next) and two of the `weights` alone (the best and the next).
        """
        there = sum(
            file.stat().st_size
            for file in [*self.folder.glob("*.pt"), *self.folder.glob("*/*.safetensors")]
        )
        needed = 3 * size + 2 * weights - there
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            room = f"{needed / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free there"
            raise RequestError(f"logging.output_dir: the checkpoints in {self.folder} need {room}")

    def save(self, state: dict[str, Any], device: torch.device, best: bool = False) -> None:
        """Copy `state` and write it in the background. Raises TrainingFailed where the one before
        was not written.
        """
        self.wait()
        copied = host_copy(state)
        synchronize(device)
        self.pending.append(self.writer.submit(save_checkpoint, copied, self.last, best))
        self.then(self.capped.unlink, True)
        self.saved = time.monotonic()

    def then(self, write: Callable, *arguments: Any) -> None:
        """Call `write` once what was saved is on the disk: a log never knows more than the
        checkpoint.
        """
        self.pending.append(self.writer.submit(write, *arguments))

    def wait(self) -> None:
        """Wait until what was saved is on the disk. Raises TrainingFailed where the disk does not
        take it.
        """
        pending = self.pending
        self.pending = []
        try:
            for each in pending:
                each.result()
        except (
            OSError,
            RuntimeError,
        ) as error:  # torch's writer says "unexpected pos", having met what the disk said
            met = error if isinstance(error, OSError) else error.__context__
            why = getattr(met, "strerror", None) or one_line(error)
            path = getattr(met, "filename", None) or self.last
            raise TrainingFailed(
                f"{path}: cannot write, the checkpoint before is whole: {why}"
            ) from None

    def close(self) -> None:
        """Wait until the disk has taken or refused what was saved. Nothing can be saved
        afterwards.
        """
        self.writer.shutdown()


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep the checkpoint `folder` to this process. If nothing came of the run, the folder goes
    again.

    Raises RequestError where another process has it, or where it cannot be made or written to.
    """
    made = not folder.exists()
    lock = folder / "lock"
    require_folder(folder, "logging.output_dir", folder)
    todo = "wait for it to end, or set another logging.output_dir"
    with locked(lock, f"{folder}: another process is running this config into it; {todo}"):
        try:
            yield
        finally:
            if made:
                _remove_unused(folder, lock)


def _remove_unused(folder: Path, lock: Path) -> None:
    with contextlib.suppress(OSError):
        if [*folder.iterdir()] == [lock]:
            lock.unlink(), folder.rmdir(), folder.parent.rmdir()


def find_checkpoint(config: Config, resume: str | None) -> Path | None:
    """The file that `--resume` means: a path, a folder's last.pt, or with `auto` the config's own;
    None: none.
    """
    if resume is None:
        return None
    path = checkpoint_folder(config) if resume == "auto" else Path(resume)
    path = path / "last.pt" if resume == "auto" or path.is_dir() else path
    return path if resume != "auto" or path.exists() else None


def folders_of_other_code(config: Config) -> list[Path]:
    """The checkpoint folders of the same config with another text of its imports."""
    found = []
    for path in checkpoint_folder(config).parent.glob("*/last.pt") if config.imports else ():
        try:
            facts = json.loads((path.parent / "weights" / "config.json").read_text("utf-8"))
            other = config.model_copy(update={"imports": list(facts["imports"])})
            if run_id(other) == path.parent.name:
                found.append(path.parent)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue  # it has no weights, or no code
    return found


def state_bytes(model: nn.Module, copies: int) -> int:
    """About how large a checkpoint is: weights and buffers, and `copies` of each weight in the
    optimizer.
    """
    sizes = {True: 0, False: 0}
    for tensor in model.state_dict(keep_vars=True).values():
        sizes[tensor.requires_grad] += tensor.nbytes
    return (1 + copies) * sizes[True] + sizes[False]
