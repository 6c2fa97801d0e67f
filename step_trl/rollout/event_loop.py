"""Running asynchronous code from synchronous code, in scripts and notebooks, and cancelling tasks."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Coroutine, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar


_T = TypeVar("_T")
_OBJECTS_PER_COLLECTION = 50_000  # Python's default is 700


def run_to_end(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """
    Run a coroutine as `asyncio.run` does, on a separate thread if a loop is already running (as in a notebook).

    Ctrl-C or a notebook's stop button cancels the coroutine and waits for its clean-up.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    background = InBackground(coroutine)
    try:
        return background.result()
    except KeyboardInterrupt:
        background.cancel()
        raise


class InBackground(Generic[_T]):
    """A coroutine that runs in a thread of its own, with its own event loop, from now on."""

    def __init__(self, coroutine: Coroutine[Any, Any, _T]):
        self._begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task]] = Future()
        executor = ThreadPoolExecutor(max_workers=1)
        self._ended = executor.submit(asyncio.run, self._cancellable(coroutine))
        executor.shutdown(wait=False)  # its thread ends with the coroutine

    async def _cancellable(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        task = asyncio.current_task()
        assert task is not None
        self._begun.set_result((asyncio.get_running_loop(), task))
        return await coroutine

    def result(self) -> _T:
        """Wait for the coroutine's result, or raise its error."""
        return self._ended.result()

    def cancel(self) -> None:
        """Cancel the coroutine if it is running, and wait for its clean-up."""
        loop, task = self._begun.result()
        with suppress(RuntimeError):  # the loop is closed: the coroutine has ended
            loop.call_soon_threadsafe(task.cancel)
        wait([self._ended])


@contextmanager
def rare_garbage_collections() -> Iterator[None]:
    """
    Make Python's garbage collector run less often.

    Thousands of coroutines create objects quickly and leave almost no cycles. With the default threshold, a third of
    their time would go into garbage collection (`benchmarks/client.py`).
    """
    first, *others = gc.get_threshold()
    gc.set_threshold(first and max(first, _OBJECTS_PER_COLLECTION), *others)  # 0 disables it, and stays
    try:
        yield
    finally:
        gc.set_threshold(first, *others)


async def cancel(*tasks: asyncio.Future | None) -> None:
    """Cancel the tasks and wait until they have stopped."""
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


async def gather(coroutines: Iterable[Awaitable[_T]]) -> list[_T]:
    """Run coroutines concurrently and return their results. If one fails or the caller is cancelled, stop all."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        await cancel(*tasks)
        raise
