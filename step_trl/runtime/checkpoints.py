"""What checkpoints lack to go on as if nothing had happened: rollouts in use, and the order of later epochs."""

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

from .micro_batches import Batch


logger = logging.getLogger(__name__)


class ResumableTrainer(GRPOTrainer):
    """
    Goes on from a checkpoint as if there had been no stop.

    TRL would sample anew in the midst of a generation's updates, and be out of step with its sampler from then on; and
    begin again with the order of the first epoch.
    """

    args: GRPOConfig
    _buffered_inputs: list[Batch] | None  # type: ignore[assignment]  # TRL's: micro-batches of the last generation
    _train_sampler: Sampler | None = None  # none with an iterable data set

    def _get_train_sampler(self, dataset=None):
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _save_checkpoint(self, model, trial):
        generate_every = cast("int", self.args.steps_per_generation) * self.num_iterations
        if self._step % generate_every and self._buffered_inputs is not None:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            save_rollouts(folder, self.accelerator, self._step, self._buffered_inputs)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if isinstance(self._train_sampler, RepeatSampler):
            skip_epochs(self._train_sampler, int(self.state.epoch or 0))
        saved = load_rollouts(Path(checkpoint), self.accelerator)
        if saved is not None:
            self._step, self._buffered_inputs = saved


def save_rollouts(folder: Path, accelerator: Accelerator, step: int, batches: Sequence[Batch]) -> None:
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


def load_rollouts(folder: Path, accelerator: Accelerator) -> tuple[int, list[Batch]] | None:
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
        batches: dict[int, Batch] = {}
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
