"""The batches that a `Trainer` is about to train on, ahead of time."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

from trl import GRPOConfig, GRPOTrainer


Rows = Sequence[dict[str, Any]]  # of a data set, one for each completion


class NextBatch(NamedTuple):
    """The rows of a generation batch, and the update that begins with it, counted from 0."""

    rows: Rows
    update: int


class BatchesAhead:
    """
    Hands a [`~transformers.Trainer`] its batches, in the order of its data loader, and knows those that follow.

    TRL's loader repeats a generation batch for each of the micro-batches that it is for, and TRL generates from the
    first of these. The Trainer only counts what it is handed, so that it saves and resumes as without this.
    """

    def __init__(self, trainer: GRPOTrainer):
        self._trainer = trainer
        self._epoch: Iterator[Rows] | None = None  # the Trainer's iterator over the current epoch
        self._source: Iterator[Rows] = iter(())  # the one that is read, which may have been opened in the epoch before
        self._current: deque[Rows] = deque()  # of this epoch: first those handed out that may still be in use
        self._handed_out = 0
        self._opened: tuple[Any, Iterator[Rows]] | None = None  # the data loader and its iterator over the next epoch
        self._next: deque[Rows] = deque()

    def of_epoch(self, iterator: Iterator[Rows]) -> Iterator[Rows]:
        """Return an iterator over the rest of the epoch that the Trainer would read from `iterator`."""
        if iterator is not self._epoch:
            self._begin(iterator)
        while self._handed_out < len(self._current) or _fetch(self._source, self._current):
            self._handed_out += 1
            yield self._current[self._handed_out - 1]

    def after(self, rows: Rows) -> NextBatch | None:
        """Return the generation batch after `rows`, which the Trainer has been handed; `None` if it is the last."""
        args, state = cast("GRPOConfig", self._trainer.args), self._trainer.state
        ahead = cast("int", args.steps_per_generation) * self._trainer.num_iterations
        while self._handed_out and self._current[0] is not rows:
            self._current.popleft()
            self._handed_out -= 1
        while len(self._current) <= ahead and _fetch(self._source, self._current):
            pass
        if not self._handed_out:
            return None
        # `rows` and the other batches that have been handed out are for the current update, and `later` is -1 or less
        # for one of them.
        per_update = args.gradient_accumulation_steps
        later, position = ahead - self._handed_out, ahead - len(self._current)
        update = state.global_step + 1 + later // per_update
        if position >= 0:  # the next epoch begins with an update of its own
            update = state.global_step + 1 + math.ceil((later - position) / per_update) + position // per_update
        if update >= state.max_steps:
            return None
        found = self._current[ahead] if position < 0 else self._of_next_epoch(position)
        return None if found is None else NextBatch(found, update)

    def _begin(self, iterator: Iterator[Rows]) -> None:
        """Begin an epoch, with what has been read of it if it was opened before."""
        opened = self._opened is not None and self._opened[0] is self._trainer.callback_handler.train_dataloader
        self._source = self._opened[1] if self._opened is not None and opened else iterator
        self._current = self._next if opened else deque()
        self._epoch, self._opened, self._next, self._handed_out = iterator, None, deque(), 0

    def _of_next_epoch(self, position: int) -> Rows | None:
        """Open the next epoch in place of the Trainer, which has not begun to read its own iterator."""
        if self._opened is None:
            loader = cast("Any", self._trainer.callback_handler.train_dataloader)
            if hasattr(loader, "set_epoch"):
                loader.set_epoch(int(self._trainer.state.epoch or 0) + 1)
            self._opened = loader, iter(loader)
        while len(self._next) <= position and _fetch(self._opened[1], self._next):
            pass
        return self._next[position] if position < len(self._next) else None


def _fetch(source: Iterator[Rows], batches: deque[Rows]) -> bool:
    """Read one more batch, if there is one."""
    batch = next(source, None)
    if batch is not None:
        batches.append(batch)
    return batch is not None
