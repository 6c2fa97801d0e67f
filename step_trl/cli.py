"""The `step-trl` command."""

from __future__ import annotations

import argparse
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `step-trl`."""
    parser = argparse.ArgumentParser(prog="step-trl", description="Efficient-reasoning trainers for TRL.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train Step-GRPO and SAS on the embedded testbed and compare")
    demo.add_argument("--output-dir", type=Path, default=Path("runs/demo"), help="an earlier run there is set aside")
    demo.add_argument("--problems", type=int, default=64, help="problems per evaluation split")
    demo.add_argument("--max-steps", type=int, default=40, help="updates of each training")
    options = parser.parse_args(arguments)
    from .demo import run_demo  # imports torch and TRL, which `--help` does without

    run_demo(options.output_dir, options.problems, max_steps=options.max_steps)
