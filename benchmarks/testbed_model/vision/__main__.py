"""Train the visual testbed's model from scratch, see `pretrain.py`."""

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from testbed_model.vision.pretrain import Recipe, pretrain


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/testbed_model/vision", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and its processor")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--updates", type=int, help="updates per stage, for a trial run; by default the recipe's")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=False)
    recipe = Recipe(seed=arguments.seed)
    if arguments.updates is not None:
        stages = [one.name for one in fields(Recipe) if one.name.endswith("_updates")]
        recipe = replace(recipe, **dict.fromkeys(stages, arguments.updates))
    pretrain(recipe, arguments.output)


if __name__ == "__main__":
    main()
