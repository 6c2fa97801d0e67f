"""Save what TRL's checkpoints lack for an exact resume: rollouts still in use, and the order of later epochs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

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
    """Save the rollouts that a trainer has not finished training on, before it writes the checkpoint in `folder`."""
    generate_every = cast("int", cast("GRPOConfig", trainer.args).steps_per_generation) * trainer.num_iterations
    batches = cast("list[MicroBatch] | None", trainer._buffered_inputs)  # the last generation batch
    if trainer._step % generate_every and batches is not None:
        save_rollouts(folder, trainer.accelerator, trainer._step, batches)


def resume_rollouts(trainer: GRPOTrainer, sampler: Sampler | None, folder: Path) -> None:
    """
    Resume a trainer, whose state has been loaded from the checkpoint in `folder`, as if it had not been interrupted.

    Without this, TRL would generate again between two updates on one generation batch, and would be out of step with
    its sampler from then on. Also, each resumed run would start with the order of the first epoch. There is no
    `sampler` with an iterable data set.
    """
    if isinstance(sampler, RepeatSampler) and sampler.shuffle:  # it draws the order of one epoch after another
        for _ in range(int(trainer.state.epoch or 0)):
            torch.randperm(sampler.num_samples, generator=sampler.generator)
    saved = load_rollouts(folder, trainer.accelerator)
    if saved is not None:
        trainer._step, trainer._buffered_inputs = saved  # type: ignore[assignment]  # TRL declares tensors only


def save_rollouts(folder: Path, accelerator: Accelerator, step: int, batches: Sequence[MicroBatch]) -> None:
    """
    Save this process's micro-batches of a generation batch that has not been fully trained on.

    `step` is the number of micro-batches trained on since the start of the run. Batches with images are not saved:
    their rollouts are sampled again, as in TRL.
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
    """Return the `step` and `batches` that [`save_rollouts`] saved, or `None` if there are none to resume with."""
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


def save_method_state(folder: Path, accelerator: Accelerator, state: dict[str, Any] | None) -> None:
    """Save what a method keeps between two generations on this process, if it keeps something."""
    if state is not None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, _state_file(folder, accelerator))


def load_method_state(folder: Path, accelerator: Accelerator) -> dict[str, Any] | None:
    """Return the state that [`save_method_state`] saved, or `None` if this process had none."""
    path = _state_file(folder, accelerator)
    return torch.load(path, weights_only=True) if path.exists() else None


def _file(folder: Path, accelerator: Accelerator) -> Path:
    return folder / f"rollouts_{accelerator.process_index}.safetensors"


def _state_file(folder: Path, accelerator: Accelerator) -> Path:
    return folder / f"method_state_{accelerator.process_index}.pt"
