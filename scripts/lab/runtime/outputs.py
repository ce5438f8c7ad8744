"""What a run writes: results, log, TensorBoard."""

from __future__ import annotations

import os
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import Any

from lab.config import LoggingConfig
from lab.errors import RequestError
from lab.files import require_folder, write_result


def open_tensorboard(outputs: LoggingConfig) -> Any | None:
    """torch's SummaryWriter into a folder of its own, None where none is asked for.

    Raises RequestError, saying what to install, where the package is missing.
    """
    if not outputs.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RequestError("logging.tensorboard: needs a package that is not there: pip install tensorboard") from None
    return SummaryWriter(Path(outputs.output_dir) / "tensorboard" / f"{datetime.now():%Y%m%d_%H%M%S}_{os.getpid()}")


def add_scalars(board: Any, row: dict[str, Any]) -> None:
    """The epoch's row of the history to TensorBoard, what was measured of it."""
    for key, value in row.items():
        if value is not None:
            board.add_scalar(key, value, row["epoch"])
    board.flush()


def save_results(result: dict[str, Any], output_dir: str | Path) -> Path:
    """Write final_results_<timestamp>.json whole or not at all, under a name nobody has taken.

    Raises TrainingFailed where the disk does not take it.
    """
    stamp, whole = datetime.now().strftime("%Y%m%d_%H%M%S"), Path(output_dir) / f"final_results.{os.getpid()}"
    write_result(result, whole)
    for tail in chain([""], (f"_{n}" for n in count(1))):
        path = Path(output_dir) / f"final_results_{stamp}{tail}.json"
        try:
            os.link(whole, path)  # claims the name and fills the file in one
        except OSError as error:
            if isinstance(error, FileExistsError) or path.exists():
                continue
            os.replace(whole, path)  # a file system without hard links
        break
    whole.unlink(missing_ok=True)
    return path


def prepare_outputs(outputs: LoggingConfig) -> None:
    """Make the output folders. Raises RequestError where nothing could be written at the end."""
    require_folder(Path(outputs.output_dir), "logging.output_dir", outputs.output_dir)
    if outputs.jsonl_path is not None:
        require_folder(Path(outputs.jsonl_path).parent, "logging.jsonl_path", outputs.jsonl_path)
