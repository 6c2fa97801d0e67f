"""The command line that the scripts for both testbeds' models share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any


def run_command(prog: str, description: str | None, recipe_class: Any, pretrain: Callable[[Any, Path], None]) -> None:
    """Train a model with its recipe, a dataclass whose fields `..._updates` are the lengths of its stages."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--seed", type=int, default=recipe_class.seed)
    parser.add_argument("--updates", type=int, help="updates per stage, for a trial run; by default the recipe's")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=False)
    recipe = recipe_class(seed=arguments.seed)
    if arguments.updates is not None:
        stages = [one.name for one in fields(recipe_class) if one.name.endswith("_updates")]
        recipe = replace(recipe, **dict.fromkeys(stages, arguments.updates))
    pretrain(recipe, arguments.output)
