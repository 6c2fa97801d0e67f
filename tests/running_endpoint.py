"""An endpoint on a thread of its own, and clients of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import openai
from aiohttp import web

from step_trl.endpoint import EarlyExitEndpoint, ExitOptions
from step_trl.rollout.engines import VLLMServerEngine


MAX_LENGTH = 1024


@contextmanager
def running(engine: VLLMServerEngine, exits: ExitOptions, **options) -> Iterator[str]:
    """Serve in a thread, and yield the base URL for clients. An engine that is not checked has no server."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="endpoint")
    thread.start()

    def wait(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(60)

    async def start() -> web.AppRunner:
        if not engine.served_models:
            await engine.check()
        app = EarlyExitEndpoint(engine, exits, **options).app
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=256).start()
        return runner

    async def stop(runner: web.AppRunner) -> None:
        await runner.cleanup()
        await loop.shutdown_asyncgens()  # closes the engine's session

    try:
        runner = wait(start())
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        wait(stop(runner))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def without_server(tokenizer) -> VLLMServerEngine:
    """Return an engine whose server would never answer."""
    engine = VLLMServerEngine("http://127.0.0.1:9", tokenizer, retry_window=0.1)
    engine.max_length, engine.served_models = MAX_LENGTH, ["served"]
    return engine


def client(url: str, key: str = "any", **options) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=120, **options)


def together(url: str, call, arguments) -> list:
    """Run `call(client, argument)` for all arguments at once, and return the results."""

    async def run():
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0, timeout=120) as shared:
            return await asyncio.gather(*(call(shared, argument) for argument in arguments))

    return asyncio.run(run())
