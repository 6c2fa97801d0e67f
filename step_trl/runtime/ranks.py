"""What the processes of a distributed training share: seeds that do not depend on their number, and errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from accelerate.utils import gather_object

from ..rollout.engines import EngineUnavailableError


def rollout_seeds(key: Sequence[int], first: int, count: int) -> list[int]:
    """
    Seeds of `count` completions of a batch over all processes, from the `first` of them on.

    Args:
        key (`Sequence[int]`):
            Non-negative numbers that name the batch, such as the run's seed and the update.
        first (`int`), count (`int`):
            This process's part of the batch.

    Returns:
        `list[int]`: below 2**62.
    """
    return np.random.default_rng(list(key)).integers(2**62, size=first + count)[first:].tolist()


@contextmanager
def failing_together() -> Iterator[None]:
    """
    End a block with an error on every process if it ends with one on any. Every process must come by.

    A process that failed alone would leave the others waiting for it in their next collective operation. The process
    keeps its own error and traceback; the others name it.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    unavailable = isinstance(failure, EngineUnavailableError)
    reports = gather_object([None if failure is None else (unavailable, f"{type(failure).__name__}: {failure}")])
    if failure is not None:
        raise failure
    for rank, report in enumerate(reports):
        if report is not None:
            server_is_away, message = report
            raise (EngineUnavailableError if server_is_away else RuntimeError)(f"Process {rank} failed. {message}")
