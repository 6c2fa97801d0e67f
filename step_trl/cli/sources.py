"""Where the rows and the model of a recipe come from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from transformers import AutoConfig

from .. import testbed
from ..data import load_problems, rewrite_prompts
from ..rollout.engines.adapters import is_adapter
from ..token_targets import add_token_targets


if TYPE_CHECKING:
    from .recipe import TrainArguments


TESTBED = "testbed"


def load_rows(arguments: TrainArguments) -> datasets.Dataset:
    """Return the rows that a recipe trains on."""
    if arguments.dataset == TESTBED:
        rows = testbed.load_dataset(arguments.dataset_split)
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


def model_source(name: str | None) -> str:
    """Return the model's folder or name on the Hub. For `"testbed"`, it is the folder of the testbed model."""
    if name is None:
        raise ValueError("model_name_or_path: not set. Set a folder, a name on the Hub, or 'testbed'.")
    return str(testbed.MODEL_DIR) if name == TESTBED else name


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
