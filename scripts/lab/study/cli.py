"""What the commands share: how they end, common options, the help on config keys."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import partial

from dotenv import find_dotenv, load_dotenv

from lab.base.errors import NobodyThere, RequestError, TrainingFailed, one_line
from lab.base.files import user_path, user_text
from lab.base.launch import launched
from lab.base.streams import standard_streams
from lab.config.grid import take_overrides
from lab.config.keys import all_needs
from lab.config.loading import config_keys, load_config


def run_cli(main: Callable[[], int]) -> int:
    """Run a script's `main` and return the exit code of the process.

    A wrong request is one line on stderr and code 2. A failed run, or a disk that does not take
    what a command was asked to print, is code 1. A reader who has seen enough (`| head`) is no
    error.
    """
    with standard_streams():
        return _run(main)


def refuse_early(parse: Callable[[], argparse.Namespace]) -> None:
    """End the process where its request is wrong, as far as that shows without torch.

    A script calls it before it imports torch, which takes seconds. A config that is a pipe is left
    for later: it cannot be read twice.
    """

    def request() -> int:
        args = parse()
        launched()
        path = getattr(args, "config", None)
        if path is not None and (os.path.isfile(path) or not os.path.exists(path)):
            load_config(path, args.overrides, imports=args.imports)
        return 0

    if code := run_cli(request):
        sys.exit(code)


def _run(main: Callable[[], int]) -> int:
    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # its retries would bury the one line
    code = 0
    failed = None
    try:
        read_env()
        code = main()
        sys.stdout.flush()
    except (RequestError, TrainingFailed) as error:
        failure = (
            2 if isinstance(error, RequestError) else getattr(error, "code", 1),
            one_line(error),
        )
        failed = error
    except BrokenPipeError:
        return code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if (why := _known(error)) is None:
            raise
        failure = 1, why
    else:
        return code
    if isinstance(failed, NobodyThere) or _reports(*failure):
        print(f"error: {failure[1]}", file=sys.stderr)
    return failure[0]


def read_env() -> None:
    """Take over what a `.env` file sets. Raises RequestError naming a file that cannot be read."""
    path = find_dotenv()
    try:
        if path:
            load_dotenv(path)
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise RequestError(f"{path}: not lines of NAME=value in UTF-8: {one_line(error)}") from None


def _known(error: Exception) -> str | None:
    """An error that nothing expected, in one line; None where it is a mistake in the code."""
    if "torch" in sys.modules:  # or it is no run's
        from lab.machine.clock import explained

        known = explained(error)
        return None if known is error else one_line(known)
    if isinstance(error, OSError):
        return f"{error.filename or 'standard output'}: {error.strerror or one_line(error)}"
    return "out of memory" if isinstance(error, MemoryError) else None


def _reports(code: int, why: str) -> bool:
    """Whether this process prints the error. Of several processes it is the first to fail."""
    try:
        if launched()[1] == 1:
            return True
    except RequestError:  # it is the error, and all tasks of srun have it
        return os.environ.get("SLURM_PROCID", "0") == "0" or "RANK" in os.environ
    from lab.machine.distributed import claim_failure  # imports torch, which a table does not need

    return claim_failure(code, why)


HELP_WIDTH = 80  # characters: a terminal's
OVERRIDES_HELP = (
    "any config key, as ast.pack=true. Text is taken as written, with its quotes; null means no "
    "value"
)
WEIGHTS_HELP = "a weights folder, the run's folder, a results file, or latest in a results folder"
RESUME_HELP = "go on from a checkpoint; auto: from this config's own, if there is one"


IMPORT_HELP = "your own code: mine.py or package.module"


def add_import(parser: argparse.ArgumentParser) -> None:
    """The option --import, once for each file."""
    how = {"action": "append", "default": [], "dest": "imports", "type": user_text}
    parser.add_argument("--import", metavar="FILE", help=IMPORT_HELP, **how)


def take_pictures(args: argparse.Namespace) -> None:
    """Turn the words of --images into paths; the overrides among them go to the others. Raises
    RequestError naming a path that is not there.
    """
    take_overrides(args, "images")
    args.images = [user_path(text) for text in args.images]
    for path in args.images:
        if not path.exists():
            raise RequestError(f"--images: {path}: no such file or folder")


def hand_on(imports: Sequence[str]) -> list[str]:
    """The imports of a config as arguments of another command, which needs the same texts."""
    return [word for text in imports for word in option("--import", text)]


def option(name: str, value: str) -> list[str]:
    """An option as arguments of another command. Its value may begin like an option."""
    return [f"{name}={value}"] if value.startswith("-") else [name, value]


class ConfigHelp(argparse.Action):
    """Print every config key and leave, as `--help` does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(options_help())
        parser.exit()


def command_parser(description: str | None, config_help: bool = False) -> argparse.ArgumentParser:
    """A parser that keeps the line breaks of `description`. `config_help`: with --help-config, for
    all config keys.
    """
    form = partial(argparse.RawDescriptionHelpFormatter, width=HELP_WIDTH, max_help_position=30)
    parser = argparse.ArgumentParser(description=description, formatter_class=form)
    if config_help:
        text = "show all config keys with their units and defaults"
        parser.add_argument("--help-config", nargs=0, action=ConfigHelp, help=text)
    return parser


def training_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of `train_ast.py`."""
    parser = command_parser(
        "Train one config. run_experiment.py does the same and has more flags.", config_help=True
    )
    parser.add_argument(
        "--config", required=True, type=user_text, metavar="FILE", help="YAML or JSON config"
    )
    add_import(parser)
    parser.add_argument("--resume", type=user_text, metavar="PATH|auto", help=RESUME_HELP)
    parser.add_argument(
        "--prepare-only", action="store_true", help="build or check the files of dataset.cache=disk"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example training.lr=0.05"
    )
    return parser.parse_intermixed_args(argv)


def options_help() -> str:
    """Every config key with its default, what it needs and its meaning, for --help-config."""
    lines = [
        "Config keys. In a YAML or JSON file they stand below their section, on the",
        "command line as section.key=value. There, text is taken as it is written, and",
        'null means no value. The word null itself goes into a file, as "null".',
        "",
        "imports (default none)",
        "      a list of your own code, path/mine.py or package.module, to be run first.",
        "      On the command line: --import",
    ]
    needs = all_needs()
    section = ""
    for key, (description, default) in config_keys().items():
        if key.partition(".")[0] != section:
            section = key.partition(".")[0]
            lines.append(f"\n{section}")
        lines.append(f"  {key} (default {'null' if default is None else str(default).lower()})")
        readers = [f"{other}={' or '.join(v)}" for other, v in needs.get(key, {}).items()]
        told = f"{description}. Read with {' and '.join(readers)}" if readers else description
        lines += textwrap.wrap(
            told,
            HELP_WIDTH,
            initial_indent=" " * 6,
            subsequent_indent=" " * 6,
            break_on_hyphens=False,
        )
    return "\n".join(lines)
