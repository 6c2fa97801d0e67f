"""
Measure the seconds and the peak memory of an update of GRPO, Step-GRPO and SAS, beside the dry run's estimate.

    python benchmarks/gpu/step_memory.py
    python benchmarks/gpu/step_memory.py --models 1.7B --methods sas --length 2048

The models have the shapes of real ones and random weights, which never end a completion: each has the full length. The
trainers sample in process, and have their own defaults apart from the batch. Seconds are those of the last update, and
the peak is that of the whole training without what was allocated before it. The estimate is what `step-trl train
--dry-run` prints for the same recipe.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from study.phases import PhaseTimer

from gpu.block import SHAPES, Block, begin_peak, build_model, gib, make_parser, peak_memory, synchronize
from step_trl import testbed
from step_trl.cli.dry_run.checks import workload
from step_trl.cli.dry_run.layout import Layout
from step_trl.cli.dry_run.memory import MemoryEstimate, estimate_memory
from step_trl.cli.dry_run.plan import run_checks
from step_trl.cli.dry_run.stage_plan import StagePlan
from step_trl.cli.recipe import parse
from step_trl.cli.stages import build_trainer
from step_trl.trainers import METHODS


COMPARED = ("grpo", "step_grpo", "sas")
GROUP = 4  # completions of each prompt
SMALLEST = ("--models", "toy", "--methods", "step_grpo", "--completions", "4", "--micro-batch", "4", "--length", "8",
            "--updates", "1")  # for tests  # fmt: skip


class SynchronizedTimer(PhaseTimer):
    """Lets a GPU finish an update before its seconds are read. What a phase returns depends on its GPU work anyway."""

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize()
        super().on_step_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        super().on_step_end(args, state, control, **kwargs)


def save_model(name: str, folder: Path) -> Path:
    """Save a model with random weights and the testbed's tokenizer, for a recipe to name it."""
    if not folder.exists():
        build_model(name, "bfloat16").save_pretrained(folder)
        testbed.load_tokenizer().save_pretrained(folder)
    return folder


def make_recipe(method: str, model: Path, options: Any) -> dict[str, Any]:
    """Return the recipe of a training."""
    on_gpu = torch.cuda.is_available()
    return {
        "trainer": method, "model_name_or_path": str(model), "dtype": "bfloat16", "bf16": on_gpu,
        "use_cpu": not on_gpu, "dataset": "testbed", "output_dir": str(model.parent / f"{model.name}-{method}"),
        "per_device_train_batch_size": options.micro_batch, "num_generations": GROUP,
        "gradient_accumulation_steps": options.completions // options.micro_batch,
        "max_completion_length": options.length, "max_steps": options.updates, "save_strategy": "no",
        "logging_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip


def estimate(recipe: dict[str, Any]) -> MemoryEstimate:
    """Return the dry run's estimate for a recipe."""
    plan = StagePlan(recipe, [], Layout.of())
    run_checks(plan)
    if plan.failures:
        raise ValueError("\n".join(plan.failures))
    return estimate_memory(plan.model_config, workload(plan))


def train(name: str, method: str, folder: Path, options: Any) -> dict[str, Any]:
    """Train for a few updates, and return the seconds of the last one and the peak."""
    recipe = make_recipe(method, save_model(name, folder / name), options)
    estimated = estimate(recipe)
    begin_peak()
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    trainer = build_trainer(*parse(recipe, []))
    timer = SynchronizedTimer(trainer)
    trainer.train()
    peak, seconds = peak_memory(), timer.seconds[-1]
    own_peak = None if peak is None else peak - before
    return {
        "update, s": sum(seconds.values()),
        "generation, s": seconds["generation"],
        "peak, GiB": gib(own_peak),
        "estimate, GiB": gib(estimated.total),
        "estimated peak": estimated.peak,
        "estimate / peak": None if own_peak is None else estimated.total / own_peak,
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=["0.6B", "1.7B"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(COMPARED))
    parser.add_argument("--completions", type=int, default=32, help="completions per update")
    parser.add_argument("--micro-batch", type=int, default=8, help="completions per forward pass of an update")
    parser.add_argument("--length", type=int, default=512, help="tokens of a completion")
    parser.add_argument("--updates", type=int, default=2, help="updates of a training, of which the last counts")
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in ("completions", "micro_batch", "length", "updates")}
    block = Block("step_memory", options, sizes)
    folder = Path(tempfile.mkdtemp())  # the weights of 1.7B take 3 GiB: not among the results
    try:
        for name in options.models:
            for method in options.methods:
                block.measure(f"{name}, {method}", partial(train, name, method, folder, options))
    finally:
        shutil.rmtree(folder)
    block.finish()


if __name__ == "__main__":
    main()
