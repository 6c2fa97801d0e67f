"""
Check whether the testbed distinguishes the methods: train each for the same number of updates, then evaluate.

    python benchmarks/discrimination.py [--max-steps 40] [--methods grpo_short grpo step_grpo sas] [--seed 0]

Evaluates on the last problems of each set, so that choices based on this table are not made on the demo's problems.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path

import pandas as pd
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from step_trl import SASTrainer, StepGRPOTrainer, testbed
from step_trl.cli.demo import MAX_COMPLETION_LENGTH, TRAINING, evaluate_testbed, sas_config, step_grpo_config
from step_trl.evaluation import summarize
from step_trl.rewards import math_accuracy_reward


OPTIONS = '{"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_completion_length": 40}'
SMALLEST = ("--problems", "1", "--max-steps", "1", "--methods", "grpo", "sas", "--options", OPTIONS)  # for tests


def build_trainer(method: str, model, output_dir: str, **options):
    """Build the trainer of an arm. All arms share the settings in `demo.TRAINING`."""
    shared = {"train_dataset": testbed.load_dataset("train"), "processing_class": testbed.load_tokenizer()}
    if method == "step_grpo":
        return StepGRPOTrainer(model, args=step_grpo_config(output_dir, **options), **shared)
    if method == "sas":
        return SASTrainer(model, args=sas_config(output_dir, **options), **shared)
    length = {"grpo": MAX_COMPLETION_LENGTH, "grpo_short": sas_config(output_dir).max_completion_length}[method]
    config = GRPOConfig(output_dir, **TRAINING | {"max_completion_length": length} | options)
    reward = partial(math_accuracy_reward, require_end_of_thinking=method == "grpo_short")  # SAS's, for its baseline
    return GRPOTrainer(model, reward, args=config, **shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["grpo_short", "grpo", "step_grpo", "sas"])
    parser.add_argument("--max-steps", type=int, default=40)
    parser.add_argument("--problems", type=int, default=128, help="number of problems of each evaluation set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", type=json.loads, default={}, help="fields to change in all configurations (JSON)")
    parser.add_argument("--output", type=Path, help="folder for the log history of each method, as JSON")
    options = parser.parse_args()
    tokenizer = testbed.load_tokenizer()
    problems = range(256 - options.problems, 256)
    samples = {"vanilla": evaluate_testbed(testbed.load_model(), tokenizer, "vanilla", problems)}
    seconds = {}
    for method in options.methods:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            changes = {"max_steps": options.max_steps, "seed": options.seed} | options.options
            trainer = build_trainer(method, testbed.load_model(), str(Path(folder) / method), **changes)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
            trainer.state.save_to_json(str(options.output / f"{method}.json"))
        seconds[method] = time.monotonic() - started
        samples[method] = evaluate_testbed(trainer.model, tokenizer, method, problems)
    tables = {name: summarize(table, samples["vanilla"]) for name, table in samples.items()}
    overall = pd.DataFrame({name: table.loc["overall"] for name, table in tables.items()}).T
    overall["seconds"] = pd.Series(seconds)
    print(pd.concat(tables, names=["model"]).round(3).to_string(), end="\n\n")
    print(overall.round(3).T.to_string())


if __name__ == "__main__":
    main()
