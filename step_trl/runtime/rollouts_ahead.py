"""
Overlap of rollouts and updates: while a batch is trained on, vLLM servers sample the next one.

    servers   sample 1 | sample 2 .......... | sample 3 .......... |
    trainer            | score 1, train on 1 | score 2, train on 2 |
              ^ weights                      ^ weights

Weights are sent between two batches, so that each completion is sampled with one version of them. A batch is sampled
with those from before the updates that it overlaps. TRL corrects for the difference by importance sampling.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from accelerate.utils import gather_object
from transformers import ProcessorMixin
from trl import GRPOConfig, GRPOTrainer

from ..monitor import RunStatus
from ..rollout import DynamicTruncatedRollout, Rollout, TruncationCallback
from ..rollout.event_loop import InBackground
from .ranks import failing_together


logger = logging.getLogger(__name__)


@dataclass
class Request:
    """
    What this process asks the servers for.

    Two requests are equal if their completions come from the same distribution: a batch that was sampled ahead is only
    used for an equal request.
    """

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[int] | None
    callbacks: Sequence[TruncationCallback] = ()
    speculative: bool = False

    def __post_init__(self):
        self.callbacks = list(self.callbacks)


class RolloutsAhead:
    """
    At most one batch that is sampled in the background.

    Processes wait for each other only in their main threads: each must call [`start`], [`take`] and [`settle`] in the
    same order. In the background, a process requests its own completions and nothing else.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer, whose current update tells how old weights are.

    Attributes:
        staleness (`int`):
            The number of updates between the weights that sampled the last batch and its own first update.
    """

    def __init__(self, trainer: GRPOTrainer):
        self._trainer = trainer
        self._request: Request | None = None
        self._running: InBackground[list[Rollout]] | None = None
        self._sampled_at = 0
        self.staleness = 0

    def start(self, request: Request, rollout: DynamicTruncatedRollout, status: RunStatus) -> None:
        """Begin to sample a batch. The servers must have the current weights."""
        self.cancel()
        self._request, self._sampled_at = request, self._trainer.state.global_step
        note = status.follow(rollout, len(request.prompts), from_background=True)
        self._running = rollout.start(request.prompts, request.seeds, note)

    def take(self, request: Request) -> list[Rollout] | None:
        """
        Wait for the batch in the background, and return it if it is what every process asks for.

        An error of the background is raised in all processes.
        """
        running, self._running = self._running, None
        self.staleness = 0
        if running is None:
            return None
        try:
            with failing_together():
                rollouts = running.result()
        except BaseException:
            running.cancel()
            raise
        if not all(gather_object([self._request == request])):
            logger.warning(
                "rollouts_ahead: the prompts, seeds or callbacks of a batch are not those with which it was sampled "
                "ahead. It is sampled again."
            )
            return None
        self.staleness = self._trainer.state.global_step - self._sampled_at
        return rollouts

    def settle(self) -> None:
        """Wait until no server is sampling for any process: weights must not change within a batch."""
        if self._running is not None:
            with failing_together():
                self._running.result()

    def cancel(self) -> None:
        """Stop the sampling in the background, if there is any. Nothing is left running on the servers."""
        running, self._running = self._running, None
        if running is not None:
            running.cancel()


def check_rollouts_ahead(trainer: GRPOTrainer, weight_sync_check_every: int) -> None:
    """Refuse what cannot be sampled ahead: several turns, images, and batches that are all compared."""
    for name, given, cause in (
        ("rollout_func", trainer.rollout_func is not None, "it samples by itself"),
        ("environment_factory", trainer.environment_factories is not None, "environments answer in several turns"),
        ("tools", bool(trainer.tools), "tools are called in several turns"),
        ("processing_class", isinstance(trainer.processing_class, ProcessorMixin), "it is multimodal"),
    ):
        if given:
            raise ValueError(f"{name}: {cause}, which rollouts_ahead=1 does not support. Set rollouts_ahead=0.")
    args = cast("GRPOConfig", trainer.args)
    updates = cast("int", args.steps_per_generation) * trainer.num_iterations / args.gradient_accumulation_steps
    if 0 < weight_sync_check_every <= updates:
        raise ValueError(
            f"weight_sync_check_every: {weight_sync_check_every} compares every batch with the policy, so that none "
            f"could be sampled ahead. Set a number above {updates:g}, or 0 to never compare."
        )
