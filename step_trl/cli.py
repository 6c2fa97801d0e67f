"""The `step-trl` command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `step-trl`."""
    parser = argparse.ArgumentParser(prog="step-trl", description="Efficient-reasoning trainers for TRL.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train Step-GRPO and SAS on the embedded testbed and compare")
    demo.add_argument("--output-dir", type=Path, default=Path("runs/demo"), help="an earlier run there is set aside")
    demo.add_argument("--problems", type=int, default=64, help="problems per evaluation split")
    demo.add_argument("--engine", choices=("transformers", "vllm"), default="transformers", help="of the rollouts")
    demo.add_argument("--max-steps", type=int, default=40, help="updates of each training")
    server = commands.add_parser("serve", help="start a vLLM server for rollouts; further arguments go to vLLM")
    server.add_argument("model", help="folder or name of the model")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on, by default for this machine only")
    server.add_argument("--port", type=int, default=8000)
    server.add_argument("--max-model-len", type=int, help="tokens of prompt and completion together")
    options, further = parser.parse_known_args(arguments)
    if options.command == "serve":
        from .serve import serve

        sys.exit(serve(options.model, options.host, options.port, options.max_model_len, further))
    if further:
        parser.error(f"unrecognized arguments: {' '.join(further)}")
    from .demo import run_demo  # imports torch and TRL, which `--help` does without

    run_demo(options.output_dir, options.problems, options.engine, max_steps=options.max_steps)
