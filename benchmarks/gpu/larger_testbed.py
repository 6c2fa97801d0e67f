"""
Train a larger testbed from scratch, then with GRPO, Step-GRPO and SAS, and evaluate the models.

    python benchmarks/gpu/larger_testbed.py            # the same command goes on where it stopped

The model has about 35 times as many parameters as the package's, and its problems have up to 10 numbers (`chains.py`).
The pre-training takes `--pretrain-minutes`, whatever the GPU (`pretraining.py`). Pre-training and trainings stop when
`--minutes` are over and resume from their checkpoints. SAS trains with completions of about the mean length of the
pre-trained model, as in the demo. Models and checkpoints stay in `larger/` in the output folder.
"""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.block import Block, OutOfTime, make_parser
from gpu.chains import evaluation_sets, training_set
from gpu.pretraining import CONTEXT, Pretraining, Recipe
from step_trl.cli.demo import EVALUATION, TRAINING
from step_trl.cli.train import is_done
from step_trl.evaluation import evaluate, summarize
from step_trl.trainers import METHODS


PRETRAINED = "pretrained"
COMPARED = ("grpo", "step_grpo", "sas")
MAX_COMPLETION_LENGTH = CONTEXT // 2
TRAINING_PROBLEMS = 4096
SMALLEST = (
    *("--hidden-size", "32", "--layers", "1", "--heads", "2", "--batch-tokens", "1024", "--drawn-at-once", "8"),
    *("--tokenizer-texts", "100", "--workers", "0", "--pretrain-minutes", "0.02", "--methods", "sas"),
    *("--updates", "1", "--problems", "1", "--max-tokens", "8"),
)  # for tests


class StopInTime(TrainerCallback):
    """Ends a training with a checkpoint after the update in which the time is over."""

    def __init__(self, deadline: float):
        self.deadline = deadline

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() > self.deadline and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


def train(method: str, model: Path, folder: Path, deadline: float, **options: Any) -> None:
    """Train with a method, or resume it, unless it is done. Raises `OutOfTime` after a checkpoint."""
    if is_done(folder):
        return
    trainer_class, config_class = METHODS[method]
    on_gpu = torch.cuda.is_available()
    placed = {"bf16": on_gpu, "use_cpu": not on_gpu, "save_total_limit": 1}
    trainer = trainer_class(
        str(model),
        args=config_class(str(folder), **TRAINING | placed | options),
        train_dataset=training_set(TRAINING_PROBLEMS),
    )
    trainer.add_callback(StopInTime(deadline))
    checkpoint = get_last_checkpoint(str(folder)) if folder.exists() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.state.global_step < trainer.state.max_steps:
        raise OutOfTime
    trainer.save_model()
    trainer.save_state()  # written last: a folder with it is done


def measure(model: Path, samples: Path, problems: int, max_tokens: int) -> pd.DataFrame:
    """Sample a model on the evaluation sets. Samples that exist are not sampled again."""
    return evaluate(
        model, evaluation_sets(problems), save_to=samples, max_in_flight=128, **EVALUATION | {"max_tokens": max_tokens}
    )


def row_of(samples: pd.DataFrame, vanilla: pd.DataFrame) -> dict[str, Any]:
    """Return accuracy and tokens of each set, and overall also steps, CR and AES."""
    table = summarize(samples, vanilla)
    row = {
        f"{name}, {measure}": float(table.loc[name, measure])
        for name in table.index
        for measure in ("accuracy", "tokens")
    }
    return row | {measure: float(table.loc["overall", measure]) for measure in ("steps", "cr", "aes")}


class LargerTestbed:
    """The rows of the block: the pre-trained model, and those that the methods have trained from it."""

    def __init__(self, block: Block, options: Any, recipe: Recipe):
        self.block, self.options = block, options
        self.folder: Path = options.output_dir / "larger"
        self.pretraining = Pretraining(recipe, self.folder / PRETRAINED)

    def samples(self, name: str, model: Path) -> pd.DataFrame:
        return measure(model, self.folder / f"samples-{name}", self.options.problems, self.options.max_tokens)

    def vanilla(self) -> pd.DataFrame:
        return self.samples(PRETRAINED, self.pretraining.model_dir)

    def pretrain(self) -> dict[str, Any]:
        if not self.pretraining.run(self.block.seconds_left):
            raise OutOfTime
        vanilla = self.vanilla()
        return row_of(vanilla, vanilla)

    def train(self, method: str) -> dict[str, Any]:
        if not self.pretraining.done:
            raise OutOfTime
        vanilla, folder, length = self.vanilla(), self.folder / method, self.options.max_tokens
        if method == "sas":
            length = min(length, round(vanilla["tokens"].mean()))
        train(
            method, self.pretraining.model_dir, folder, self.block.deadline, max_completion_length=length,
            max_steps=self.options.updates, learning_rate=self.options.learning_rate,
        )  # fmt: skip
        return row_of(self.samples(method, folder), vanilla)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--pretrain-minutes", type=float, default=6.0, help="of all calls together")
    for name in ("hidden_size", "layers", "heads", "batch_tokens", "drawn_at_once", "tokenizer_texts"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Recipe, name))
    workers = max(0, min(12, (os.cpu_count() or 1) - 3))
    parser.add_argument("--workers", type=int, default=workers, help="processes that write traces")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(COMPARED))
    parser.add_argument("--updates", type=int, default=24, help="updates of each method, of 64 completions")
    parser.add_argument("--learning-rate", type=float, default=5e-5, help="of the methods")
    parser.add_argument("--problems", type=int, default=64, help="problems of each evaluation set")
    parser.add_argument("--max-tokens", type=int, default=MAX_COMPLETION_LENGTH, help="most tokens of a completion")
    options = parser.parse_args()
    recipe = Recipe(
        60 * options.pretrain_minutes,
        **{name: getattr(options, name) for name in ("hidden_size", "layers", "heads", "batch_tokens")},
        **{name: getattr(options, name) for name in ("drawn_at_once", "tokenizer_texts", "workers")},
    )
    shared = (
        "pretrain_minutes",
        "hidden_size",
        "layers",
        "heads",
        "updates",
        "learning_rate",
        "problems",
        "max_tokens",
    )
    block = Block("larger_testbed", options, {name: getattr(options, name) for name in shared})
    larger = LargerTestbed(block, options, recipe)
    if PRETRAINED in block.rows and not larger.pretraining.done:
        raise SystemExit(f"--output-dir: the model of the rows in {options.output_dir} is gone. Set another folder.")
    block.measure(PRETRAINED, larger.pretrain)
    for method in options.methods:
        block.measure(method, partial(larger.train, method))
    block.finish()


if __name__ == "__main__":
    main()
