"""What distributed processes share: seeds that do not depend on the number of processes, and errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from accelerate.utils import gather_object

from ..rollout.engines import EngineUnavailableError


def rollout_seeds(key: Sequence[int], first: int, count: int) -> list[int]:
    """
    Return the seeds of `count` completions of a batch over all processes, starting at index `first`.

    Args:
        key (`Sequence[int]`):
            Non-negative numbers that identify the batch, such as the run's seed and the update.
        first (`int`), count (`int`):
            The index of this process's first completion in the batch, and the number of its completions.

    Returns:
        `list[int]`: The seeds, all below 2**62.
    """
    return np.random.default_rng(list(key)).integers(2**62, size=first + count)[first:].tolist()


@contextmanager
def failing_together() -> Iterator[None]:
    """
    Raise an error in every process if the block raises one in any process. Every process must enter.

    If one process failed alone, the others would deadlock in their next collective operation. The failed process keeps
    its own error and traceback; the errors of the others name it.
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
