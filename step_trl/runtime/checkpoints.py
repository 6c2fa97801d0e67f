"""What TRL's checkpoints lack for an exact resume: rollouts that are still in use, and the order of later epochs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import Sampler
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

from .micro_batches import MicroBatch


logger = logging.getLogger(__name__)


def save_unused_rollouts(trainer: GRPOTrainer, folder: Path) -> None:
    """Save the rollouts of which a trainer still has some to train on, before the checkpoint in `folder` is made."""
    generate_every = cast("int", cast("GRPOConfig", trainer.args).steps_per_generation) * trainer.num_iterations
    batches = cast("list[MicroBatch] | None", trainer._buffered_inputs)  # of the last generation
    if trainer._step % generate_every and batches is not None:
        save_rollouts(folder, trainer.accelerator, trainer._step, batches)


def resume_rollouts(trainer: GRPOTrainer, sampler: Sampler | None, folder: Path) -> None:
    """
    Resume a trainer as if it had not been interrupted.

    Without this, TRL would generate anew between two updates of one generation, and would be out of step with its
    sampler from then on; and each resumed run would start with the order of the first epoch.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer, whose state is that of the checkpoint.
        sampler (`torch.utils.data.Sampler`, *optional*):
            The trainer's sampler; there is none with an iterable data set.
        folder (`Path`):
            The checkpoint.
    """
    if isinstance(sampler, RepeatSampler):
        skip_epochs(sampler, int(trainer.state.epoch or 0))
    saved = load_rollouts(folder, trainer.accelerator)
    if saved is not None:
        trainer._step, trainer._buffered_inputs = saved  # type: ignore[assignment]  # TRL declares tensors only


def save_rollouts(folder: Path, accelerator: Accelerator, step: int, batches: Sequence[MicroBatch]) -> None:
    """
    Save the micro-batches of a generation of which some are still to be trained on.

    Args:
        folder (`Path`):
            Of the checkpoint.
        accelerator ([`~accelerate.Accelerator`]):
            Knows the processes, each of which saves its own.
        step (`int`):
            Micro-batches that were trained on since the start of the run.
        batches (`Sequence[dict]`):
            Tensors of each micro-batch. Those of images are not saved: their rollouts are sampled anew, as TRL does.
    """
    if not all(torch.is_tensor(value) for batch in batches for value in batch.values()):
        return
    tensors = {
        f"{number}.{name}": value.detach().contiguous().clone()
        for number, batch in enumerate(batches)
        for name, value in batch.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, _file(folder, accelerator), {"step": str(step), "processes": str(accelerator.num_processes)})


def load_rollouts(folder: Path, accelerator: Accelerator) -> tuple[int, list[MicroBatch]] | None:
    """What [`save_rollouts`] was given as `step` and `batches`, or `None` where there is nothing to go on with."""
    path = _file(folder, accelerator)
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        if int(metadata["processes"]) != accelerator.num_processes:
            logger.warning(
                "%s holds rollouts of %s processes. Now there are %d, so rollouts are sampled anew.",
                path,
                metadata["processes"],
                accelerator.num_processes,
            )
            return None
        batches: dict[int, MicroBatch] = {}
        for key in file.keys():
            number, _, name = key.partition(".")
            batches.setdefault(int(number), {})[name] = file.get_tensor(key).to(accelerator.device)
    return int(metadata["step"]), [batches[number] for number in sorted(batches)]


def skip_epochs(sampler: RepeatSampler, epochs: int) -> None:
    """Draw the orders of the epochs before, of which a sampler draws one after the other."""
    if sampler.shuffle:
        for _ in range(epochs):
            torch.randperm(sampler.num_samples, generator=sampler.generator)


def _file(folder: Path, accelerator: Accelerator) -> Path:
    return folder / f"rollouts_{accelerator.process_index}.safetensors"
