"""matplotlib as it comes: without the backend of a notebook and the settings of its user."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lab.base.errors import RequestError, one_line

LOGGER = logging.getLogger("matplotlib")


def import_matplotlib() -> None:
    """Import it, for all that import it later. Raises RequestError where that is not possible."""
    place = Path(importlib.util.find_spec("matplotlib").origin).parent / "mpl-data" / "matplotlibrc"
    before = {name: os.environ.pop(name, None) for name in ("MPLBACKEND", "MATPLOTLIBRC")}
    os.environ["MATPLOTLIBRC"] = str(place)
    LOGGER.setLevel(logging.CRITICAL)  # of folders it cannot write to and fonts it does not find
    try:
        import matplotlib.figure  # noqa: F401
    except Exception as error:  # a settings file in the working directory comes before all others
        raise RequestError(
            f"matplotlibrc: matplotlib cannot start: {one_line(error, 200)}"
        ) from None
    finally:
        del os.environ["MATPLOTLIBRC"]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextlib.contextmanager
def plain_style(settings: Mapping[str, Any]) -> Iterator[None]:
    """matplotlib's defaults and these `settings`, for the length of the block. A missing glyph is
    no warning.
    """
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield
