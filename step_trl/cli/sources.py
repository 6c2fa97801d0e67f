"""Where the rows and the model of a recipe come from."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoConfig

from .. import rewards, testbed
from ..data import load_problems, open_source, rewrite_prompts
from ..preferences import read_rollouts, thin_easy_prompts
from ..preferences.records import ROLLOUTS
from ..rollout.engines.adapters import is_adapter
from ..testbed import vision
from ..token_targets import add_token_targets
from .arguments import SamplingArguments, SFTArguments, TrainArguments


TESTBED, VISION_TESTBED = "testbed", "vision-testbed"
MODELS = {TESTBED: testbed.MODEL_DIR, VISION_TESTBED: vision.MODEL_DIR}


def load_rows(arguments: TrainArguments) -> datasets.Dataset:
    """Return the problems of a recipe, the first ones only if it has a limit."""
    rows = _load_problems(arguments)
    limit = arguments.limit if isinstance(arguments, SamplingArguments) else None
    return rows if limit is None else rows.take(min(limit, len(rows)))


def _load_problems(arguments: TrainArguments) -> datasets.Dataset:
    if arguments.dataset in (TESTBED, VISION_TESTBED):
        module = testbed if arguments.dataset == TESTBED else vision
        rows = module.load_dataset(arguments.dataset_split)
        rows = rewrite_prompts(rows, arguments.prompt_template, arguments.system_prompt)
    else:
        rows = load_problems(
            arguments.dataset,
            arguments.dataset_split,
            name=arguments.dataset_name,
            prompt_template=arguments.prompt_template,
            system_prompt=arguments.system_prompt,
        )
    if arguments.token_targets is None:
        return rows
    if len(arguments.token_targets) != 2:
        raise ValueError(f"token_targets: {arguments.token_targets} are not two numbers. Set for example 100 4000.")
    lowest, highest = arguments.token_targets
    return add_token_targets(rows, lowest, highest, at_most=arguments.token_targets_at_most)


def load_examples(arguments: SFTArguments) -> datasets.Dataset:
    """Return the rows of a recipe as published: they have completions."""
    if arguments.dataset in MODELS:
        raise ValueError(
            f"dataset: {arguments.dataset!r} has no completions. Set reverse_thinking, or trainer 'distill'."
        )
    rows = open_source(arguments.dataset, arguments.dataset_split, arguments.dataset_name)
    return rows if arguments.limit is None else rows.take(min(arguments.limit, len(rows)))


def load_reward_funcs(names: Sequence[str] | None) -> list[Callable[..., Any]] | None:
    """Return reward functions by their names in [`~step_trl.rewards`], or by their dotted paths."""
    return None if names is None else [_reward_func(name) for name in names]


def _reward_func(name: str) -> Callable[..., Any]:
    module, _, function = name.rpartition(".")
    if module and (folder := os.getcwd()) not in sys.path:
        sys.path.insert(0, folder)  # as in TRL's script
    try:
        return getattr(importlib.import_module(module) if module else rewards, function)
    except (ImportError, AttributeError) as error:
        known = ", ".join(one for one in rewards.__all__ if one.endswith("_reward"))
        raise ValueError(
            f"reward_funcs: {name} cannot be loaded ({error}). Set a dotted path such as my_rewards.short_answer, or "
            f"one of {known}."
        ) from error


def earlier_rollouts(arguments: TrainArguments, folder: Path) -> Path:
    """
    Return the folder of the training whose rollouts a stage in `folder` uses.

    It is that of the field `rollouts`, or that of the last earlier stage which has recorded some.
    """
    if arguments.rollouts is not None:
        return Path(arguments.rollouts)
    _, _, number = folder.name.rpartition("stage-")
    earlier = [folder.with_name(f"stage-{one}") for one in range(1, int(number) if number.isdigit() else 1)]
    found = [stage for stage in earlier if (stage / ROLLOUTS).is_dir()]
    if not found:
        raise ValueError(
            "rollouts: no earlier stage has recorded rollouts. Set record_rollouts: true in a stage before this one, "
            "or set rollouts to the output_dir of another training."
        )
    return found[-1]


def load_stage_rows(arguments: TrainArguments, folder: Path) -> datasets.Dataset:
    """Return the rows that a stage in `folder` trains on, without most of the easy ones if it says so."""
    rows = load_rows(arguments)
    if arguments.easy_prompts is None:
        return rows
    kept = thin_easy_prompts(rows, read_rollouts(earlier_rollouts(arguments, folder)), arguments.easy_prompts)
    print(f"easy_prompts: {len(kept):,} of {len(rows):,} prompts are kept.")
    return kept


def model_source(name: str | None) -> str:
    """Return the model's folder or name on the Hub. `"testbed"` and `"vision-testbed"` are embedded models."""
    if name is None:
        raise ValueError("model_name_or_path: not set. Set a folder, a name on the Hub, or 'testbed'.")
    return str(MODELS.get(name, name))


def check_model(name: str, **options: Any) -> None:
    """Raise an error that names the model if its configuration cannot be loaded with these options."""
    if is_adapter(name):
        return
    try:
        AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        reason = "it has no readable config.json" if Path(name).is_dir() else str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"model: {name} cannot be loaded: {reason}. Give a folder that a model was saved to, or a name on the Hub."
        ) from error
