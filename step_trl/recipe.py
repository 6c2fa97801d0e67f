"""Recipes: YAML files of fields, any of which the command line can set."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from trl import ModelConfig, TrlParser

from .trainers import (
    EfficientReasoningConfig,
    EfficientReasoningTrainer,
    SASConfig,
    SASTrainer,
    StepGRPOConfig,
    StepGRPOTrainer,
)


TRAINERS: dict[str, tuple[type[EfficientReasoningTrainer], type[EfficientReasoningConfig]]] = {
    "grpo": (EfficientReasoningTrainer, EfficientReasoningConfig),
    "step_grpo": (StepGRPOTrainer, StepGRPOConfig),
    "sas": (SASTrainer, SASConfig),
}


@dataclass
class TrainArguments:
    """
    What a recipe says besides the fields of the trainer's configuration and of [`~trl.ModelConfig`].

    Args:
        trainer (`str`):
            `"grpo"`, `"step_grpo"` or `"sas"`.
        dataset (`str`):
            Name on the hub, folder or file, as in [`~step_trl.data.load_problems`], or `"testbed"`.
        dataset_name (`str`, *optional*), dataset_split (`str`, *optional*, defaults to `"train"`):
            Configuration and split of the data set.
        prompt_template (`str`, *optional*), system_prompt (`str`, *optional*):
            As in [`~step_trl.data.load_problems`].
        require_end_of_thinking (`bool`, *optional*, defaults to `False`):
            A completion that did not close its thought is wrong, as for SAS in any case.
        token_targets (`list[int]`, *optional*):
            Two numbers, between which a length is drawn for each prompt, which then asks for it; see
            [`~step_trl.budgets.add_token_targets`].
        token_targets_at_most (`bool`, *optional*, defaults to `False`):
            Ask for at most that length.
    """

    trainer: str = field(metadata={"help": "'grpo', 'step_grpo' or 'sas'."})
    dataset: str = field(metadata={"help": "Name on the hub, folder, file, or 'testbed'."})
    dataset_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the data set."})
    prompt_template: str | None = field(default=None, metadata={"help": "User message, with {problem} in it."})
    system_prompt: str | None = field(default=None, metadata={"help": "System message."})
    require_end_of_thinking: bool = field(default=False, metadata={"help": "An open thought is wrong."})
    token_targets: list[int] | None = field(default=None, metadata={"help": "Range of lengths to ask for."})
    token_targets_at_most: bool = field(default=False, metadata={"help": "Ask for at most that length."})


def read_recipe(arguments: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """
    Read the file behind `--config`.

    Args:
        arguments (`Sequence[str]`):
            Of the command line.

    Returns:
        `tuple[dict[str, Any], list[dict[str, Any]], list[str]]`: its fields; the fields of each of its `stages`, which
        are trained one after another, or one empty mapping; and the other arguments.
    """
    rest = list(arguments)
    path = _value_of("--config", rest)
    if path is None:
        return {}, [{}], rest
    if f"--config={path}" in rest:
        rest.remove(f"--config={path}")
    else:
        del rest[rest.index("--config") : rest.index("--config") + 2]
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"config: there is no file {path}. Give a recipe, such as recipes/step_grpo/paper.yaml."
        )
    recipe = yaml.safe_load(Path(path).read_text())
    if not isinstance(recipe, dict):
        raise ValueError(f"config: {path} is no mapping of fields to values.")
    stages = recipe.pop("stages", [{}])
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ValueError(f"stages: {stages!r} is no list of mappings. Give the fields that differ, stage by stage.")
    return recipe, stages, rest


def parse(
    recipe: Mapping[str, Any], arguments: Sequence[str]
) -> tuple[TrainArguments, ModelConfig, EfficientReasoningConfig]:
    """
    Fields of a recipe, and those that are set on the command line.

    Args:
        recipe (`Mapping[str, Any]`):
            Fields.
        arguments (`Sequence[str]`):
            `--FIELD VALUE`s, which win.

    Raises:
        `ValueError`: the trainer is not known, or a field; names the one that is meant.
    """
    name = _value_of("--trainer", arguments) or recipe.get("trainer")
    if "--help" in arguments or "-h" in arguments:
        name = name or "step_grpo"
    if name not in TRAINERS:
        raise ValueError(f"trainer: {name!r} is not known. Set one of {', '.join(TRAINERS)}.")
    kinds: list[Any] = [TrainArguments, ModelConfig, TRAINERS[name][1]]
    known = [one.name for kind in kinds for one in fields(kind) if one.init]
    flags = [text[2:].partition("=")[0].replace("-", "_") for text in arguments if text.startswith("--")]
    for key in [*recipe, *(flag for flag in flags if flag != "help")]:
        if key not in known and not (key.startswith("no_") and key[3:] in known):
            close = difflib.get_close_matches(key, known, n=1)
            raise ValueError(
                f"{key}: no option of trainer {name!r}. " + (f"Did you mean {close[0]}?" if close else "Drop it.")
            )
    parser = TrlParser(kinds)
    parser.set_defaults_with_config(**recipe)
    return parser.parse_args_into_dataclasses(list(arguments))  # type: ignore[return-value]


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    for place, text in enumerate(arguments):
        if text.startswith(f"{flag}="):
            return text.partition("=")[2]
        if text == flag and place + 1 < len(arguments):
            return arguments[place + 1]
    return None
