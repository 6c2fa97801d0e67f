"""
Do models learn as well from rollouts that are one update old? Train with `rollouts_ahead` 0 and 1, and compare.

    python benchmarks/learning_ahead.py [--output-dir runs/learning-ahead] [--methods grpo] [--seeds 0 1 2]

The trainings are those of `recipes/testbed.yaml`, with rollouts on a vLLM server that all of them share; by default,
this script starts one. Models are evaluated as in the study. The output folder gets the picture, and keeps models and
samples; what it has is not made again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from study.run import evaluate_model
from trainings import means_of_seeds, run_recipe

from step_trl.cli.recipe import load_recipe
from step_trl.cli.train import is_done
from step_trl.report import plot_training, read_history
from step_trl.report.figures import STYLE
from step_trl.report.tables import to_markdown
from step_trl.rollout.engines import VLLMServer
from step_trl.testbed import EVALUATION_SPLITS, MODEL_DIR
from step_trl.trainers import METHODS


RECIPE = Path(__file__).parents[1] / "recipes" / "testbed.yaml"
OPTIONS = '{"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_completion_length": 24}'
SMALLEST = ("--seeds", "0", "--updates", "2", "--problems", "1", "--samples", "1", "--options", OPTIONS)  # for tests
MEASURES = {"accuracy, %": ("correct", 100, 1), "tokens": ("tokens", 1, 0)}
CURVES = {
    "rewards/math_accuracy_reward/mean": "accuracy of rollouts",
    "completions/mean_length": "tokens per rollout",
    "sampling/importance_sampling_ratio/mean": "importance ratio",
}


def train(method: str, ahead: int, seed: int, url: str, args: argparse.Namespace) -> Path:
    """Train with one seed, unless this has been done. Returns the folder of the model."""
    output = args.output_dir / f"{method}-{ahead}" / str(seed)
    if not is_done(output):
        servers = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url, "weight_sync": "disk"}
        own = {"trainer": method, "rollouts_ahead": ahead, "seed": seed, "max_steps": args.updates}
        recipe = load_recipe(RECIPE) | servers | own | {"output_dir": str(output), "disable_tqdm": True}
        output.parent.mkdir(parents=True, exist_ok=True)
        run_recipe(recipe | args.options, output.with_suffix(".json"))
    return output


def draw(models: Mapping[tuple[str, int], Path]) -> Figure:
    """Draw the means over seeds of what the trainings logged. `models` are folders by name and seed."""
    histories = {}
    for name in dict.fromkeys(name for name, _ in models):
        logs = [pd.DataFrame(read_history(folder)) for (own, _), folder in models.items() if own == name]
        histories[name] = pd.concat(logs).groupby("step", as_index=False)[[*CURVES]].mean().to_dict("records")
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        plot_training(axes, histories, key, label)
    figure.axes[0].legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="URL of an idle server on the testbed model; by default, this script starts one")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/learning-ahead"))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["grpo"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--problems", type=int, default=128, help="number of problems of each evaluation set")
    parser.add_argument("--samples", type=int, default=4, help="number of samples of each problem")
    parser.add_argument("--options", type=json.loads, default={}, help="fields to change in the recipe (JSON)")
    args = parser.parse_args()
    models, parts = {}, []
    server = VLLMServer(MODEL_DIR, max_model_len=1024, log_file="/dev/null") if args.url is None else None
    with server or nullcontext():
        for seed in args.seeds:
            for method, ahead in product(args.methods, (0, 1)):
                name = f"{method}, rollouts_ahead={ahead}"
                print(f"{name}, seed {seed}", flush=True)
                models[name, seed] = train(method, ahead, seed, args.url or server.url, args)
    for (name, seed), model in models.items():
        samples = evaluate_model(
            model, model.with_name(f"{seed}-samples"), args.samples, problems=range(args.problems)
        )
        parts.append(samples.assign(arm=name, seed=seed))
    print(to_markdown(means_of_seeds(pd.concat(parts), EVALUATION_SPLITS, MEASURES)))
    with matplotlib.rc_context(STYLE):
        draw(models).savefig(args.output_dir / "learning_ahead.png")


if __name__ == "__main__":
    main()
