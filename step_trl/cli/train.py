"""`step-trl train`: a trainer from a recipe."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..files import atomic_write
from ..rollout.engines.adapters import is_adapter, merge_adapter
from ..trainers import EfficientReasoningConfig, EfficientReasoningTrainer
from ..trainers.lapo import FILE as LAPO_FILE
from .distill import distill
from .recipe import (
    TRAINERS,
    TrainArguments,
    is_distillation,
    parse,
    read_recipe,
    resume_from,
    set_model_init_kwargs,
)
from .sources import check_model, load_rows, model_source


def build_trainer(
    arguments: TrainArguments, model: ModelConfig, config: EfficientReasoningConfig
) -> EfficientReasoningTrainer:
    """The trainer of a recipe."""
    set_model_init_kwargs(config, model)
    source = model_source(model.model_name_or_path)
    check_model(source, revision=model.model_revision, trust_remote_code=config.trust_remote_code)
    return TRAINERS[arguments.trainer][0](
        source,
        args=config,
        train_dataset=load_rows(arguments),
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )


def run_train(arguments: Sequence[str]) -> Path:
    """
    Train as a recipe says, and save model and state.

    A recipe with `stages` is trained stage by stage, each from the model of the one before, in folders `stage-1`,
    `stage-2`, ... below its `output_dir`. What is done is not done again, so that it goes on after a stop. Where a
    stage trained an adapter, the next one starts from [`whole_model`].

    Args:
        arguments (`Sequence[str]`):
            `--config RECIPE` and `--FIELD VALUE`s.

    Returns:
        `Path`: folder of the trained model.
    """
    recipe, stages, rest = read_recipe(arguments)
    if is_distillation(recipe, stages, rest):
        distillation, model, config = parse(recipe, rest)
        distill(distillation, model, config)
        return Path(config.output_dir)
    trained: Path | None = None
    for number, stage in enumerate(stages, 1):
        parsed = parse(recipe | stage, rest)
        _, model, config = parsed
        folder = Path(str(config.output_dir))
        if len(stages) > 1:
            folder = folder / f"stage-{number}"
            config.output_dir = str(folder)
            config.resume_from_checkpoint = "true" if any(folder.glob("checkpoint-*")) else None
            before, trained = trained, folder
            if is_done(folder):
                continue
            if before is not None:
                model.model_name_or_path = str(whole_model(before, model, config.trust_remote_code))
        elif not config.resume_from_checkpoint:
            check_output_dir(folder)
        trainer = build_trainer(*parsed)
        trainer.train(resume_from_checkpoint=resume_from(config))
        trainer.save_model()
        trainer.save_state()
        trainer.accelerator.wait_for_everyone()
    return folder


def whole_model(folder: Path, model: ModelConfig, trust_remote_code: bool = False) -> Path:
    """
    What a stage starts from: the folder of the stage before, or `merged` in it if that one trained an adapter.

    Args:
        folder (`Path`):
            Of the stage before. The first process merges its adapter into the model under it, if that was not done.
        model ([`~trl.ModelConfig`]):
            Revision of that model, and type of the merged weights.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            As in [`~trl.GRPOConfig`].
    """
    if not is_adapter(folder):
        return folder
    merged = folder / "merged"
    state = PartialState()
    if state.is_main_process and not merged.exists():
        with atomic_write(merged) as partial:
            merge_adapter(folder, partial, trust_remote_code, revision=model.model_revision, dtype=model.dtype)
            if (folder / LAPO_FILE).exists():
                shutil.copy(folder / LAPO_FILE, partial)
    state.wait_for_everyone()
    return merged


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
