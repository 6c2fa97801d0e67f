"""The stages of a recipe: functions that train a model from another one. [`STAGES`] lists them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..files import atomic_write
from ..preferences import RolloutVerifier, latest_groups, read_rollouts
from ..rollout.engines.adapters import is_adapter, merge_adapter
from ..trainers import METHODS, EfficientReasoningConfig, EfficientReasoningTrainer
from .arguments import TrainArguments
from .distill import distill
from .fine_tuning import train_and_save
from .prefer import prefer, report_verification
from .recipe import DISTILL, DPO, SFT, set_model_init_kwargs
from .sft import fine_tune_on_examples
from .sources import check_model, earlier_rollouts, load_reward_funcs, load_stage_rows, model_source


Parsed = tuple[Any, ...]  # what `recipe.parse` returns for a stage
Stage = Callable[[Parsed, Path | None, Path], Path]


def build_trainer(
    arguments: TrainArguments, model: ModelConfig, config: EfficientReasoningConfig
) -> EfficientReasoningTrainer:
    """Build the trainer of a recipe."""
    set_model_init_kwargs(config, model)
    source = model_source(model.model_name_or_path)
    check_model(source, revision=model.model_revision, trust_remote_code=config.trust_remote_code)
    return METHODS[arguments.trainer][0](
        source,
        load_reward_funcs(arguments.reward_funcs),
        args=config,
        train_dataset=load_stage_rows(arguments, Path(str(config.output_dir))),
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )


def train_method(recipe: Parsed, model: Path | None, folder: Path) -> Path:
    """
    Train with one of [`~step_trl.trainers.METHODS`], and save the model and the trainer state.

    If rollouts are recorded, what a [`~step_trl.preferences.RolloutVerifier`] finds in the last ones of each prompt is
    written to `verification.json`.
    """
    _, options, config = recipe
    start_from(model, options, config.trust_remote_code)
    config.output_dir = str(folder)
    trainer = build_trainer(*recipe)
    train_and_save(trainer)
    if config.record_rollouts and trainer.accelerator.is_main_process:
        report_verification(RolloutVerifier().verify(latest_groups(read_rollouts(folder))), folder)
    trainer.accelerator.wait_for_everyone()
    return folder


def train_other(train: Callable[..., Any], recipe: Parsed, model: Path | None, folder: Path) -> Path:
    """Train with a function of the parsed recipe: one of those that [`STAGES`] names."""
    _, options, config = recipe
    start_from(model, options, config.trust_remote_code)
    config.output_dir = str(folder)
    train(*recipe)
    return folder


# Maps the kind of a stage to the function that trains its model. The function takes the parsed recipe, the model of
# the previous stage (`None` for the recipe's own) and the folder to save to, and returns that folder. The kind is the
# recipe's `trainer`, or `"grpo"` for any method.
STAGES: dict[str, Stage] = {
    "grpo": train_method,
    DISTILL: lambda *stage: train_other(distill, *stage),
    SFT: lambda *stage: train_other(fine_tune_on_examples, *stage),
    DPO: lambda recipe, model, folder: train_other(
        partial(prefer, earlier_rollouts(recipe[0], folder)), recipe, model, folder
    ),
}


def start_from(model: Path | None, options: ModelConfig, trust_remote_code: bool) -> None:
    """Set the model of a stage to that of the previous stage, if there is one."""
    if model is not None:
        options.model_name_or_path = str(whole_model(model, options, trust_remote_code))


def whole_model(folder: Path, model: ModelConfig, trust_remote_code: bool) -> Path:
    """
    Return the folder of a model that a stage can start from.

    It is `folder`, that of the previous stage, or `merged` in it if that stage trained an adapter. The first process
    merges the adapter, if this was not done yet, into the base model at the revision and in the dtype of `model`.
    """
    if not is_adapter(folder):
        return folder
    merged = folder / "merged"
    state = PartialState()
    if state.is_main_process and not merged.exists():
        with atomic_write(merged) as partial:
            merge_adapter(folder, partial, trust_remote_code, revision=model.model_revision, dtype=model.dtype)
            for trainer, _ in METHODS.values():
                for file in trainer.model_files:
                    if (folder / file).exists():
                        shutil.copy(folder / file, partial)
    state.wait_for_everyone()
    return merged
