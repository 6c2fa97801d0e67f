"""
Run `step-trl demo` on a GPU: the testbed model, trained with Step-GRPO and with SAS, and evaluated.

    python benchmarks/gpu/demo.py

Without options, it is what the command runs. The rows are those of its table.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.block import Block, make_parser
from step_trl.cli.demo import TRAINING, run_demo


MODELS = ("vanilla", "step_grpo", "sas")
SMALLEST = ("--problems", "1", "--updates", "1", "--completions", "8", "--max-tokens", "8")  # for tests


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--problems", type=int, default=64, help="problems of each evaluation set")
    parser.add_argument("--updates", type=int, default=TRAINING["max_steps"], help="updates of each training")
    parser.add_argument("--completions", type=int, help="completions of an update, by default those of the demo")
    parser.add_argument("--max-tokens", type=int, help="most tokens of a training's completion, by default the demo's")
    options = parser.parse_args()
    fields: dict[str, Any] = {"max_steps": options.updates}
    if options.completions is not None:
        fields |= {"per_device_train_batch_size": options.completions, "gradient_accumulation_steps": 1}
    if options.max_tokens is not None:
        fields["max_completion_length"] = options.max_tokens
    block = Block("demo", options, {"problems": options.problems} | fields)
    summary: dict[str, Any] = {}

    def row(model: str) -> dict[str, Any]:
        if not summary:
            summary.update(run_demo(options.output_dir / "demo", options.problems, **fields))
        return summary[model] | {"demo, s": summary["seconds"]}

    for model in MODELS:
        block.measure(model, partial(row, model))
    block.finish()


if __name__ == "__main__":
    main()
