"""Run several configs one after the other, each in a process of its own.

    python scripts/run_sweep.py --configs configs/imagenet_resnet50_ast.yaml configs/imagenet_vitb16_ast.yaml
    python scripts/run_sweep.py --configs configs/*.yaml training.epochs=5 ast.mode=dense

A run that fails is reported and the rest go on. Writes one line a run, as it ends, to
<output_dir>/sweep_summary_<timestamp>.jsonl. Exit codes: 0 all done; 1 a run failed; 2 the request was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from train_ast import LoggingConfig, RequestError, append_jsonl, load_config, prepare_outputs, run_cli

RUNNER = Path(__file__).with_name("run_experiment.py")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", required=True, nargs="+", metavar="FILE", help="configs, run in this order")
    parser.add_argument("--output-dir", metavar="DIR", help="short for logging.output_dir=DIR in every run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="laid over every config")
    args = parser.parse_intermixed_args(argv)
    configs = [name for name in args.configs if "=" not in name]  # `--configs a.yaml lr=1` takes the override too
    overrides = [name for name in args.configs if "=" in name] + args.overrides
    overrides += [f"logging.output_dir={args.output_dir}"] if args.output_dir else []
    output_dir = summary_folder(configs, overrides)
    prepare_outputs(LoggingConfig(output_dir=str(output_dir)))
    summary = output_dir / f"sweep_summary_{datetime.now():%Y%m%d_%H%M%S}.jsonl"
    rows = []
    for number, config in enumerate(configs, 1):
        print(f"[{number}/{len(configs)}] {config}", flush=True)
        rows.append(run_one(config, overrides))
        append_jsonl(summary, rows[-1])
    print("\n" + "\n".join(describe(row) for row in rows) + f"\nsummary: {summary}")
    return int(any(row["exit_code"] for row in rows))


def summary_folder(configs: Sequence[str], overrides: Sequence[str]) -> Path:
    """The output folder of the first config that can be read; the bad ones are reported when their turn comes."""
    for config in configs:
        with contextlib.suppress(RequestError):
            return Path(load_config(config, overrides).logging.output_dir)
    return Path(LoggingConfig().output_dir)


def run_one(config: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Run one config to its end, its output passed through: the summary line about it."""
    started = time.monotonic()
    command = [sys.executable, str(RUNNER), "--config", config, *overrides]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        errors = bytearray()
        pump = threading.Thread(target=pass_through, args=(process.stderr, sys.stderr.buffer, errors))
        pump.start()
        printed = bytearray()
        pass_through(process.stdout, sys.stdout.buffer, printed)
        pump.join()
    row: dict[str, Any] = {"config": config, "overrides": list(overrides), "exit_code": process.returncode}
    row["duration_seconds"] = round(time.monotonic() - started, 3)
    results = [line for line in printed.decode(errors="replace").splitlines() if line.startswith("results: ")]
    row["results_file"] = results[-1].removeprefix("results: ") if results else None
    if results:
        result = json.loads(Path(row["results_file"]).read_text(encoding="utf-8"))
        row |= {key: result[key] for key in ("status", "best_accuracy", "final_accuracy", "train_seconds", "energy_kj")}
    if process.returncode:
        lines = [line for line in errors.decode(errors="replace").splitlines() if line.strip()]
        row["status"] = row.get("status", "failed")
        row["error"] = lines[-1].strip() if lines else f"ended by signal {-process.returncode}"
    return row


def pass_through(source: BinaryIO, sink: BinaryIO, kept: bytearray) -> None:
    """Copy `source` to `sink` as it comes; the last 64 KiB stay in `kept`."""
    while chunk := source.read1(8192):
        sink.write(chunk)
        sink.flush()
        kept += chunk
        del kept[:-65536]


def describe(row: dict[str, Any]) -> str:
    figures = row["error"] if row["exit_code"] else f"best {row['best_accuracy']:.2f} %"
    return f"{row['status']:<12} {row['duration_seconds']:8.1f} s  {row['config']}  {figures}"


if __name__ == "__main__":
    sys.exit(run_cli(main))
