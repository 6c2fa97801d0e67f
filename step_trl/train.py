"""`step-trl train`: a trainer from a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets
from trl import ModelConfig, get_peft_config, get_quantization_config

from . import testbed
from .budgets import add_token_targets
from .data import load_problems, rewrite_prompts
from .recipe import TRAINERS, TrainArguments, parse, read_recipe
from .trainers import EfficientReasoningConfig, EfficientReasoningTrainer, SASTrainer


TESTBED = "testbed"


def load_rows(arguments: TrainArguments) -> datasets.Dataset:
    """The rows that a recipe trains on."""
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


def model_source(model: ModelConfig) -> str:
    """Folder or name on the hub."""
    if model.model_name_or_path is None:
        raise ValueError("model_name_or_path: there is none. Set a folder, a name on the hub, or 'testbed'.")
    return str(testbed.MODEL_DIR) if model.model_name_or_path == TESTBED else model.model_name_or_path


def build_trainer(
    arguments: TrainArguments, model: ModelConfig, config: EfficientReasoningConfig
) -> EfficientReasoningTrainer:
    """The trainer of a recipe."""
    config.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    } | (config.model_init_kwargs if isinstance(config.model_init_kwargs, dict) else {})
    return TRAINERS[arguments.trainer][0](
        model_source(model),
        SASTrainer.default_reward if arguments.require_end_of_thinking else None,
        args=config,
        train_dataset=load_rows(arguments),
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )


def run_train(arguments: Sequence[str]) -> Path:
    """
    Train as a recipe says, and save model and state.

    A recipe with `stages` is trained stage by stage, each from the model of the one before, in folders `stage-1`,
    `stage-2`, ... below its `output_dir`. What is done is not done again, so that it goes on after a stop.

    Args:
        arguments (`Sequence[str]`):
            `--config RECIPE` and `--FIELD VALUE`s.

    Returns:
        `Path`: folder of the trained model.
    """
    recipe, stages, rest = read_recipe(arguments)
    trained: Path | None = None
    for number, stage in enumerate(stages, 1):
        parsed = parse(recipe | stage, rest)
        _, model, config = parsed
        folder = Path(str(config.output_dir))
        if len(stages) > 1:
            folder = folder / f"stage-{number}"
            config.output_dir = str(folder)
            config.resume_from_checkpoint = "true" if any(folder.glob("checkpoint-*")) else None
            model.model_name_or_path = model.model_name_or_path if trained is None else str(trained)
            trained = folder
            if is_done(folder):
                continue
        elif not config.resume_from_checkpoint:
            check_output_dir(folder)
        trainer = build_trainer(*parsed)
        resume = config.resume_from_checkpoint
        trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
        trainer.save_model()
        trainer.save_state()
        trainer.accelerator.wait_for_everyone()
    return folder


def check_output_dir(folder: Path) -> None:
    """Refuse a folder that holds an earlier run."""
    if is_done(folder) or any(folder.glob("checkpoint-*")):
        raise ValueError(
            f"output_dir: {folder} holds an earlier run. Set another folder, or go on with it by "
            "--resume_from_checkpoint true."
        )


def is_done(folder: Path) -> bool:
    """Whether a training has ended there."""
    return (folder / "trainer_state.json").exists()  # written last
