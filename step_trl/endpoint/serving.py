"""Run the endpoint until it is told to end, or until its vLLM server has ended."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Mapping, Sequence

from aiohttp import web
from transformers import GenerationConfig

from ..rollout.engines import VLLMServerEngine
from ..rollout.event_loop import rare_garbage_collections
from .app import EarlyExitEndpoint
from .exits import ExitOptions


_POLL_SECONDS = 0.3  # between looks at the vLLM server
_SHUTDOWN_SECONDS = 1.0  # for running requests, once the endpoint is told to end
_BACKLOG = 1024  # connections that wait to be accepted
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")


def sampling_defaults(model: str) -> dict[str, float]:
    """Return the sampling parameters of a model's generation config, which vLLM uses by default, too."""
    try:
        config = GenerationConfig.from_pretrained(model).to_diff_dict()
    except OSError:  # a model without one
        return {}
    return {name: config[name] for name in _SAMPLING if config.get(name) is not None}


async def serve_endpoint(
    engine: VLLMServerEngine,
    exits: ExitOptions,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    names: Sequence[str] = (),
    defaults: Mapping[str, float] | None = None,
    api_key: str | None = None,
    server_status: Callable[[], int | None] = lambda: None,
    on_ready: Callable[[], None] = lambda: None,
) -> int:
    """
    Check the vLLM server, and serve an [`EarlyExitEndpoint`] before it until Ctrl-C or SIGTERM.

    Args:
        engine, exits, names, api_key:
            As in [`EarlyExitEndpoint`].
        host (`str`, *optional*, defaults to `"127.0.0.1"`), port (`int`, *optional*, defaults to `8000`):
            Address to listen on.
        defaults (`Mapping[str, float]`, *optional*):
            Sampling parameters of requests that do not set them.
        server_status (`Callable[[], int | None]`, *optional*):
            Exit status of the vLLM server, `None` while it runs. The endpoint ends with it.
        on_ready (`Callable[[], None]`, *optional*):
            Called once the endpoint listens.

    Returns:
        `int`: the exit status of the vLLM server if that has ended, otherwise 0.

    Raises:
        [`~step_trl.rollout.engines.EngineError`]: the vLLM server does not suit rollouts.
        `OSError`: the address is in use.
    """
    await engine.check()
    endpoint = EarlyExitEndpoint(engine, exits, names=names, sampling_defaults=defaults, api_key=api_key)
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    runner = web.AppRunner(
        endpoint.app, handle_signals=False, handler_cancellation=True, access_log=None,
        shutdown_timeout=_SHUTDOWN_SECONDS,
    )  # fmt: skip
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, backlog=_BACKLOG).start()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, ended.set)
        on_ready()
        with rare_garbage_collections():
            return await _wait(ended, server_status)
    finally:
        await runner.cleanup()


async def _wait(ended: asyncio.Event, server_status: Callable[[], int | None]) -> int:
    while (status := server_status()) is None:
        try:
            await asyncio.wait_for(ended.wait(), _POLL_SECONDS)
            return 0
        except asyncio.TimeoutError:
            pass
    return status
