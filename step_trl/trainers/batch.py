"""A generation batch on its way through the hooks of a trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator

from ..advantages import moments, whiten
from ..rollout import Rollout
from ..rollout.engines import PromptImages


@dataclass
class Batch:
    """
    The completions of one generation. The base trainer fills it in between the hooks.

    Shapes: `B` is the number of completions of this process, `B_global` that of all processes.

    Attributes:
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's accelerator.
        rows (`Sequence[dict[str, Any]]` of length `B`):
            The row of the data set that each completion belongs to.
        num_generations (`int`):
            The number of completions per group.
        training (`bool`):
            Whether the batch is for training, not for evaluation.
        prompt_ids (`list[list[int]]`):
            The token ids of the prompts, from `sample` on. With tools, those of this turn. After `sample`, those of
            its rollouts.
        images ([`~step_trl.rollout.engines.PromptImages`], *optional*):
            The images of the prompts, from `sample` on, if they have any.
        rollouts (`list[Rollout]`, *optional*):
            The result of `sample`; `None` if TRL generated the completions, and with tools.
        rewards (`list[list[float]]`, *optional*):
            The reward columns `(B, F)` of the completions if `sample` has computed them.
        completions (`list`), completion_ids (`list[list[int]]`):
            The completions of this process, as messages or text, and their token ids, from `reward_columns` on.
        correct (`torch.BoolTensor` of shape `(B_global,)`):
            Which completions are correct, from `reward_columns` on.
        unscorable (`torch.BoolTensor` of shape `(B_global,)`):
            Which completions no reward function has scored, from `reward_columns` on.
        scores (`torch.Tensor` of shape `(B_global,)`):
            The weighted sum of the given reward functions, without `reward_columns`, from there on.
        inputs (`dict[str, Any]`):
            The inputs of the loss, in `credit`; empty before and after. Tensors of shape `(B, ...)` that are added
            here are passed to `before_loss`, split into micro-batches.
        old_logps (`torch.Tensor` of shape `(B, T)`, *optional*):
            The log-probabilities under the policy that sampled, in `credit`, once they have been computed.
    """

    accelerator: Accelerator
    rows: Sequence[dict[str, Any]]
    num_generations: int
    training: bool
    prompt_ids: list[list[int]] = field(default_factory=list)
    images: PromptImages | None = None
    rollouts: list[Rollout] | None = None
    rewards: list[list[float]] | None = None
    completions: list[Any] = field(default_factory=list)
    completion_ids: list[list[int]] = field(default_factory=list)
    correct: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    unscorable: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    scores: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    inputs: dict[str, Any] = field(default_factory=dict)
    old_logps: torch.Tensor | None = None

    @property
    def groups(self) -> torch.Tensor:
        """Return the group id `(B_global,)` of each completion."""
        return torch.arange(len(self.correct), device=self.correct.device) // self.num_generations

    def gather(self, values: Sequence[Any] | torch.Tensor) -> torch.Tensor:
        """Gather the values `(B_global, ...)` of all processes. Every process passes its own `(B, ...)`."""
        return self.accelerator.gather(torch.as_tensor(values, device=self.accelerator.device))

    def local(self, gathered: torch.Tensor) -> torch.Tensor:
        """Return this process's part `(B, ...)` of a gathered tensor."""
        return gathered.chunk(self.accelerator.num_processes)[self.accelerator.process_index]

    def whiten(self, advantages: torch.Tensor) -> torch.Tensor:
        """
        Whiten advantages `(B,)` or `(B, T)` over the tokens in the loss of all processes, so that long completions
        count more.

        Call this only in `credit`, and on every process.
        """
        mask = loss_mask(self.inputs)
        of_tokens = advantages if advantages.ndim == 2 else advantages[:, None].expand_as(mask)
        local = moments(of_tokens, mask)
        return whiten(advantages, self.accelerator.reduce(local, reduction="sum"))

    def exclude(self, mask: torch.Tensor) -> None:
        """
        Leave tokens out of the loss and its normaliser. The policy still attends to them.

        Call this only in `credit`, and on every process.

        Args:
            mask (`torch.BoolTensor` of shape `(B, T)`):
                True for the tokens to leave out.
        """
        self.inputs["tool_mask"] = (~mask).long() * self.inputs.get("tool_mask", 1)
        self.inputs["num_items_in_batch"] = self.accelerator.gather(loss_mask(self.inputs).sum()).sum()


def loss_mask(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Return 1 for the tokens `(B, T)` that are in the loss, as TRL's loss does, and 0 for the others."""
    return inputs["completion_mask"] * inputs.get("tool_mask", 1)
