"""Run one experiment from a config, with overrides.

    python scripts/run_experiment.py \\
        --config configs/imagenet_resnet50_ast.yaml --epochs 50 \\
        --target-activation 0.3
    python scripts/run_experiment.py --config configs/digits_smoke.yaml \\
        --dense-twin
    python scripts/run_experiment.py \\
        --config configs/imagenet_resnet50_ast.yaml --nproc 8 --resume auto

Exit codes: 0 done; 1 the run failed; 2 the request was wrong; 130, 138, 140
or 143 interrupted and saved, by SIGINT, SIGUSR1, SIGUSR2 or SIGTERM.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.base.console import print_rank0
from lab.base.errors import RequestError
from lab.base.files import sibling, user_text, write_result
from lab.base.launch import forget_launch, launch, launched
from lab.config.grid import as_overrides
from lab.config.loading import Config, checkpoint_folder, dump_config, load_config
from lab.study.cli import (
    OVERRIDES_HELP,
    RESUME_HELP,
    add_import,
    command_parser,
    hand_on,
    option,
    run_cli,
)

if TYPE_CHECKING:
    from lab.machine.clock import Stop

FLAGS = {
    "--epochs": "training.epochs",
    "--target-activation": "ast.target_activation",
    "--lr": "training.lr",
    "--batch-size": "training.batch_size",
    "--seed": "training.seed",
    "--max-minutes": "training.max_minutes",
    "--output-dir": "logging.output_dir",
}

# training.epochs of the baseline over those of the sparse run: its time ends it long before
EPOCHS_FACTOR = 100


def check_config(config: Config, given: Sequence[str] = ()) -> None:
    """`train_ast.check_config`; its import of torch takes seconds, and a config that is unsound by
    itself is refused before.
    """
    from train_ast import check_config as check_parts

    check_parts(config, given)


def time_matched_baseline(config: Config, train_seconds: float) -> Config:
    """The dense twin of `config`: the same but dense, its schedule decayed over exactly
    `train_seconds` of training.
    """
    from train_ast import shares_of

    epochs = EPOCHS_FACTOR * config.training.epochs
    warmup = shares_of(config).until(config.training.lr_warmup_epochs, of_loaded=True)
    training = config.training.model_copy(
        update={
            "lr_decay": "time",
            "max_minutes": train_seconds / 60,
            "epochs": epochs,
            "lr_warmup_epochs": epochs * warmup,
        }
    )
    ast = config.ast.model_copy(update={"mode": "dense"})
    outputs = config.logging
    if outputs.jsonl_path is not None:
        outputs = outputs.model_copy(update={"jsonl_path": sibling(outputs.jsonl_path, "dense")})
    twin = config.model_copy(update={"training": training, "ast": ast, "logging": outputs})
    return Config.model_validate(twin.model_dump())


def train_once(
    config: Config, stop: Stop, resume: str | None = None
) -> tuple[dict[str, Any], Path]:
    """`train_ast.train`; or the results of a run of this config that is finished."""
    from lab.study.finding import finished_run  # here, as NumPy, which help does not need
    from train_ast import train

    done = finished_run(checkpoint_folder(config))
    if done is None:
        return train(config, stop, resume)
    mode = config.ast.mode
    print_rank0(f"note: the {mode} run is there, and is not trained again: {done.path}")
    return done.result, done.path


def execute_with_baseline(config: Config, resume: str | None = None) -> int:
    """Train `config`, then its time-matched baseline. Each of the two results names the other as
    `twin`. What of them is finished is not trained again.

    `resume`: the checkpoint of `config`; the baseline then goes on from its own, if it has one.
    Returns the exit code. Raises RequestError for a config that is dense itself.
    """
    from lab.machine.clock import Stop

    if config.ast.mode == "dense":
        raise RequestError("--dense-twin: ast.mode is dense; a twin is of a sparse or random run")
    stop = Stop()
    stop.watch_signals()
    result, path = train_once(config, stop, resume)
    if result["status"] == "interrupted":
        return 128 + stop.signal
    if result["final_accuracy"] is None:
        print_rank0(
            f"verdict: none: training.max_minutes={config.training.max_minutes:g} left "
            f"no time for an epoch"
        )
        return 0
    stop.deadline = (
        math.inf
    )  # training.max_minutes caps the sparse run; the baseline has its own budget
    twin, twin_path = train_once(
        time_matched_baseline(config, result["train_seconds"]), stop, resume and "auto"
    )
    if twin["status"] == "interrupted":
        return 128 + stop.signal
    if launched()[0] == 0:
        write_result(twin | {"twin": path.name}, twin_path)
        write_result(result | {"twin": twin_path.name}, path)
    print_rank0(verdict(result, twin))
    return 0


def verdict(result: dict[str, Any], twin: dict[str, Any]) -> str:
    """Which of the two has the higher final accuracy, by how many percentage points, and the
    training time of each.

    Nobody wins within 1.96 standard errors of the difference of two shares of the validation
    pictures, nor where the dense steps of the two were not alike (`apart`).
    """
    from lab.study.results import apart, dense_step_ms, read_history, settings_of

    if twin["final_accuracy"] is None:
        return (
            f"verdict: none: no step of the dense twin fitted into "
            f"{result['train_seconds']:.2g} s of training"
        )
    lead = result["final_accuracy"] - twin["final_accuracy"]
    mode = result["config"]["ast"]["mode"]
    shares = [each["final_accuracy"] / 100 for each in (result, twin)]
    pictures = sum(result["classes"]["val_samples"])
    noise = 196 * math.sqrt(sum(share * (1 - share) for share in shares) / pictures)
    winner = f"{mode if lead > 0 else 'dense'} wins by {abs(lead):.2f} points"
    if abs(lead) <= noise:
        winner = (
            f"level: {lead:+.2f} points, and {pictures:,} validation pictures resolve no "
            f"less than {noise:.2f}"
        )
    steps = apart(
        [
            dense_step_ms(read_history(each.get("training_history", {})), settings_of(each))
            for each in (result, twin)
        ]
    )
    if steps is not None:
        winner = (
            f"void: dense steps took {steps[0]:.4g} ms in one run and {steps[1]:.4g} ms in the "
            f"other, so the same time was not the same work"
        )
    texts = [
        f"{each['final_accuracy']:.2f} % in {each['train_seconds']:.1f} s"
        for each in (result, twin)
    ]
    return f"verdict: {winner}: {mode} {texts[0]}, its dense twin {texts[1]} of training"


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser(__doc__, config_help=True)
    parser.add_argument(
        "--config", required=True, type=user_text, metavar="FILE", help="YAML or JSON config"
    )
    for flag, key in FLAGS.items():
        parser.add_argument(flag, dest=key, metavar="VALUE", help=f"short for {key}=VALUE")
    add_import(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved config as YAML and stop"
    )
    parser.add_argument("--resume", type=user_text, metavar="PATH|auto", help=RESUME_HELP)
    parser.add_argument(
        "--nproc",
        type=int,
        default=1,
        metavar="N",
        help="processes, one for each GPU, started by torchrun",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="M",
        help="with --nproc: resume at most M times after a process has died",
    )
    parser.add_argument(
        "--dense-twin",
        action="store_true",
        help="then train densely for the same time, and say which is better",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    args = parser.parse_intermixed_args(argv)
    if args.dry_run or args.nproc > 1 or args.max_restarts:
        forget_launch()
    launched()  # refuses what srun or torchrun has set wrongly, before torch is imported
    flags = as_overrides({key: getattr(args, key) for key in FLAGS.values()}, args.overrides)
    overrides = [*args.overrides, *flags]
    config = load_config(args.config, overrides, check=check_config, imports=args.imports)
    if args.dry_run:
        print(dump_config(config), end="")
        return 0
    if args.nproc < 1 or args.max_restarts < 0:
        raise RequestError("--nproc: at least 1, and --max-restarts: at least 0")
    if args.nproc == 1 and not args.max_restarts:
        from train_ast import execute

        return (execute_with_baseline if args.dense_twin else execute)(config, args.resume)
    resume = args.resume or ("auto" if args.max_restarts else None)
    resuming = [] if resume is None else option("--resume", resume)
    twin = ["--dense-twin"] if args.dense_twin else []
    code = hand_on(config.imports)
    arguments = [*option("--config", args.config), *code, *resuming, *twin, *overrides]
    return launch(Path(__file__), args.nproc, args.max_restarts, arguments)


if __name__ == "__main__":
    sys.exit(run_cli(main))
