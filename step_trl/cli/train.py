"""`step-trl train`: train from a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .recipe import parse, read_recipe
from .stages import STAGES


def run_train(arguments: Sequence[str]) -> Path:
    """
    Train from a recipe, and save the model and the trainer state.

    A recipe with `stages` is trained stage by stage, each from the model of the previous one, in folders `stage-1`,
    `stage-2`, ... in its `output_dir`. A finished stage is not trained again, so that an interrupted training resumes.
    If a stage trained an adapter, the next one starts from [`~step_trl.cli.stages.whole_model`].

    `arguments` are `--config RECIPE` and `--FIELD VALUE` pairs. The result is the folder of the trained model.
    """
    recipe, stages, rest = read_recipe(arguments)
    trained: Path | None = None
    for number, stage in enumerate(stages, 1):
        parsed = parse(recipe | stage, rest)
        config = parsed[-1]
        folder = stage_folder(config.output_dir, number, len(stages))
        if len(stages) > 1:
            config.resume_from_checkpoint = "true" if any(folder.glob("checkpoint-*")) else None
        elif not config.resume_from_checkpoint:
            check_output_dir(folder)
        if len(stages) == 1 or not is_done(folder):
            STAGES.get(parsed[0].trainer, STAGES["grpo"])(parsed, trained, folder)
        trained = folder
    return folder


def stage_folder(output_dir: Any, number: int, stages: int) -> Path:
    """Return the folder of a stage, by its number from 1: `output_dir` itself if there is only one stage."""
    folder = Path(str(output_dir))
    return folder if stages == 1 else folder / f"stage-{number}"


def check_output_dir(folder: Path) -> None:
    """Refuse a folder that holds an earlier run."""
    if is_done(folder) or any(folder.glob("checkpoint-*")):
        raise ValueError(
            f"output_dir: {folder} holds an earlier run. Set another folder, or resume it with "
            "--resume_from_checkpoint true."
        )


def is_done(folder: Path) -> bool:
    """Return whether the training in this folder has finished."""
    return (folder / "trainer_state.json").exists()  # written last
