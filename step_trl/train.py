"""`step-trl train`: a trainer from a recipe, with any field set on the command line."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
import yaml
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from . import testbed
from .budgets import add_token_targets
from .data import load_problems
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
TESTBED = "testbed"


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


def parse(arguments: Sequence[str]) -> tuple[TrainArguments, ModelConfig, EfficientReasoningConfig]:
    """
    Read the recipe behind `--config`, and the fields that are set on the command line.

    Raises:
        `ValueError`: the trainer is not known, or a field; names the one that is meant.
    """
    recipe = _read_recipe(arguments)
    name = _value_of("--trainer", arguments) or recipe.get("trainer")
    if "--help" in arguments or "-h" in arguments:
        name = name or "step_grpo"
    if name not in TRAINERS:
        raise ValueError(f"trainer: {name!r} is not known. Set one of {', '.join(TRAINERS)}.")
    kinds: list[Any] = [TrainArguments, ModelConfig, TRAINERS[name][1]]
    known = [one.name for kind in kinds for one in fields(kind) if one.init]
    flags = [text[2:].partition("=")[0].replace("-", "_") for text in arguments if text.startswith("--")]
    for key in [*(key for key in recipe if key != "env"), *(flag for flag in flags if flag not in ("config", "help"))]:
        if key not in known and not (key.startswith("no_") and key[3:] in known):
            close = difflib.get_close_matches(key, known, n=1)
            raise ValueError(
                f"{key}: no option of trainer {name!r}. " + (f"Did you mean {close[0]}?" if close else "Drop it.")
            )
    return TrlParser(kinds).parse_args_and_config(list(arguments))  # type: ignore[return-value]


def _read_recipe(arguments: Sequence[str]) -> dict[str, Any]:
    path = _value_of("--config", arguments)
    if path is None:
        return {}
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"config: there is no file {path}. Give a recipe, such as recipes/step_grpo/paper.yaml."
        )
    recipe = yaml.safe_load(Path(path).read_text())
    if not isinstance(recipe, dict):
        raise ValueError(f"config: {path} is no mapping of fields to values.")
    return recipe


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    for place, text in enumerate(arguments):
        if text.startswith(f"{flag}="):
            return text.partition("=")[2]
        if text == flag and place + 1 < len(arguments):
            return arguments[place + 1]
    return None


def load_rows(arguments: TrainArguments) -> datasets.Dataset:
    """The rows that a recipe trains on."""
    if arguments.dataset == TESTBED:
        rows = testbed.load_dataset(arguments.dataset_split)
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


def build_trainer(
    arguments: TrainArguments, model: ModelConfig, config: EfficientReasoningConfig
) -> EfficientReasoningTrainer:
    """The trainer of a recipe."""
    folder = Path(str(config.output_dir))
    if not config.resume_from_checkpoint and any([*folder.glob("checkpoint-*"), *folder.glob("*.safetensors")]):
        raise ValueError(
            f"output_dir: {folder} holds an earlier run. Set another folder, or go on with it by "
            "--resume_from_checkpoint true."
        )
    if model.model_name_or_path is None:
        raise ValueError("model_name_or_path: there is none. Set a folder, a name on the hub, or 'testbed'.")
    config.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    } | (config.model_init_kwargs if isinstance(config.model_init_kwargs, dict) else {})
    name = str(testbed.MODEL_DIR) if model.model_name_or_path == TESTBED else model.model_name_or_path
    return TRAINERS[arguments.trainer][0](
        name,
        SASTrainer.default_reward if arguments.require_end_of_thinking else None,
        args=config,
        train_dataset=load_rows(arguments),
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )


def run_train(arguments: Sequence[str]) -> EfficientReasoningTrainer:
    """
    Train as a recipe says, and save model and state.

    Args:
        arguments (`Sequence[str]`):
            `--config RECIPE` and `--FIELD VALUE`s.
    """
    trainer = build_trainer(*parse(arguments))
    resume = trainer.args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_model()
    trainer.save_state()
    return trainer
