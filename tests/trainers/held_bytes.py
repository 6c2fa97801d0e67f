"""The bytes that a training process holds."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback


def local_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of this process's shards."""
    return sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes for tensor in tensors)


class HeldBytes(TrainerCallback):
    """Records in `held` the bytes after an update, when gradients and optimizer states exist."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.held: dict[str, int] = {}
        trainer.add_callback(self)

    def on_optimizer_step(self, args, state, control, **kwargs):
        parameters = list(self.trainer.model.parameters())
        states = [value for state in self.trainer.optimizer.state.values() for value in state.values()]
        reference = self.trainer.ref_model
        self.held = {
            "weights": local_bytes(parameters),
            "gradients": local_bytes(p.grad for p in parameters if p.grad is not None),
            "Adam states": local_bytes(value for value in states if value.dim() > 0),
            "reference model": 0 if reference is None else local_bytes(reference.parameters()),
        }
