"""
Does TON think where it must? Train it, its cold start alone, and GRPO alone on the visual testbed, then evaluate.

    python benchmarks/think_or_not.py [--output-dir runs/think-or-not] [--seeds 0 1 2] [--updates 40] [--problems 128]

The trainings are those of `recipes/ton/vision.yaml`: the cold start is its first stage, TON its second one, and GRPO
is the second one from the model without a cold start. The output folder keeps models and samples; what it has is not
made again.
"""

from __future__ import annotations

import argparse
import json
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset
from trainings import means_of_seeds, run_recipe

from step_trl.cli.recipe import load_recipe
from step_trl.cli.train import is_done
from step_trl.evaluation import evaluate, load_benchmark
from step_trl.report.tables import to_markdown
from step_trl.testbed import vision
from step_trl.thoughts import skipped_thoughts


RECIPE = Path(__file__).parents[1] / "recipes" / "ton" / "vision.yaml"
OPTIONS = '{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_completion_length": 40}'
SMALLEST = ("--seeds", "0", "--updates", "1", "--examples", "8", "--problems", "1", "--options", OPTIONS)  # for tests
MEASURES = {"accuracy, %": ("correct", 100, 1), "tokens": ("tokens", 1, 0), "skipped, %": ("skipped", 100, 1)}


def train(folder: Path, seed: int, examples: int, updates: int, options: dict[str, Any]) -> dict[str, Path]:
    """Train all arms with one seed, unless this has been done. Returns the folder of each model."""
    recipe = load_recipe(RECIPE) | {"seed": seed, "disable_tqdm": True}
    first, second = recipe.pop("stages")
    stages = [first | {"limit": examples}, second | {"max_steps": updates} | options]
    ton, grpo = folder / f"ton-{seed}", folder / f"grpo-{seed}"
    run_recipe(recipe | {"stages": stages, "output_dir": str(ton)}, folder / f"ton-{seed}.json")
    if not is_done(grpo):
        run_recipe(recipe | stages[1] | {"output_dir": str(grpo)}, folder / f"grpo-{seed}.json")
    return {"GRPO": grpo, "cold start": ton / "stage-1", "TON": ton / "stage-2"}


@cache
def evaluation_sets(problems: int) -> dict[str, Dataset]:
    sets = {split: load_benchmark(f"vision-testbed-{split}") for split in vision.EVALUATION_SPLITS}
    return {split: rows.select(range(min(problems, len(rows)))) for split, rows in sets.items()}


def measure(model: Path, problems: int, save_to: Path) -> pd.DataFrame:
    """Sample a model on all sets, and say of each completion whether its thought is skipped."""
    sets = evaluation_sets(problems)
    samples = evaluate(model, sets, temperature=1.0, top_p=1.0, max_tokens=256, save_to=save_to)
    return samples.assign(skipped=skipped_thoughts(samples["completion"].tolist()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/think-or-not"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--examples", type=int, default=512, help="problems that are sampled for the cold start")
    parser.add_argument("--updates", type=int, default=40, help="updates of GRPO")
    parser.add_argument("--problems", type=int, default=128, help="number of problems of each evaluation set")
    parser.add_argument(
        "--options", type=json.loads, default={}, help="fields of GRPO's configuration to change (JSON)"
    )
    options = parser.parse_args()
    folder = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    parts = [measure(vision.MODEL_DIR, options.problems, folder / "samples-vanilla").assign(arm="vanilla", seed=0)]
    for seed in options.seeds:
        trained = train(folder, seed, options.examples, options.updates, options.options)
        for arm, model in trained.items():
            save_to = folder / f"samples-{arm.replace(' ', '-')}-{seed}"
            parts.append(measure(model, options.problems, save_to).assign(arm=arm, seed=seed))
    print(to_markdown(means_of_seeds(pd.concat(parts), vision.EVALUATION_SPLITS, MEASURES)))


if __name__ == "__main__":
    main()
