"""Run one experiment from a config, with overrides.

    python scripts/run_experiment.py --config configs/imagenet_resnet50_ast.yaml
    python scripts/run_experiment.py --config configs/imagenet_resnet50_ast.yaml --epochs 50 --target-activation 0.3
    python scripts/run_experiment.py --config configs/digits_smoke.yaml training.lr=0.001 ast.mode=dense --dry-run

Exit codes: 0 done; 1 the run failed; 2 the request was wrong; 130 or 143 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import yaml
from train_ast import execute, load_config, options_help, run_cli

FLAGS = {
    "--epochs": "training.epochs",
    "--target-activation": "ast.target_activation",
    "--lr": "training.lr",
    "--batch-size": "training.batch_size",
    "--seed": "training.seed",
    "--max-minutes": "training.max_minutes",
    "--output-dir": "logging.output_dir",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="config keys:\n" + options_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML or JSON config")
    for flag, key in FLAGS.items():
        parser.add_argument(flag, dest=key, metavar="VALUE", help=f"short for {key}=VALUE")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config as YAML and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any config key, for example ast.pack=true")
    args = parser.parse_intermixed_args(argv)
    flags = [f"{key}={value}" for key in FLAGS.values() if (value := getattr(args, key)) is not None]
    config = load_config(args.config, [*args.overrides, *flags])
    if args.dry_run:
        print(yaml.safe_dump(config.model_dump(), sort_keys=False), end="")
        return 0
    return execute(config)


if __name__ == "__main__":
    sys.exit(run_cli(main))
