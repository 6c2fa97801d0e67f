"""Errors that end all processes of a distributed training together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import gather_object

from ..rollout.engines import EngineUnavailableError


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
