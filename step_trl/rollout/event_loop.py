"""Running asynchronous code from synchronous code, in scripts and notebooks, and cancelling tasks."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Coroutine, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar


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
    begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task]] = Future()

    async def cancellable() -> _T:
        task = asyncio.current_task()
        assert task is not None
        begun.set_result((asyncio.get_running_loop(), task))
        return await coroutine

    with ThreadPoolExecutor(max_workers=1) as executor:
        result = executor.submit(asyncio.run, cancellable())
        try:
            return result.result()
        except KeyboardInterrupt:
            loop, task = begun.result()
            loop.call_soon_threadsafe(task.cancel)
            raise


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
