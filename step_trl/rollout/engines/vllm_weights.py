"""Weights of vLLM servers: loaded from a folder, and again by a server that was restarted."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from .vllm_http import EngineError, NotFoundError, Server, VLLMHTTPClient
from .vllm_process import DEVELOPMENT_MODE


logger = logging.getLogger(__name__)


class ServerWeights:
    """
    Loads weights on servers. What a server has loaded is kept with it, in [`Server`].

    Args:
        client ([`VLLMHTTPClient`]):
            The client that sends the orders.
    """

    def __init__(self, client: VLLMHTTPClient):
        self._client = client
        self._restoring: dict[tuple[asyncio.AbstractEventLoop, Server], asyncio.Lock] = {}

    async def load(self, servers: Sequence[Server], folder: str | Path) -> None:
        """Make every server load the files of a folder, and reset its caches. No call may be running."""
        for server in servers:
            server.weights = str(folder)
        await asyncio.gather(*(self._client.retrying(server, partial(self._load, server)) for server in servers))

    async def restore(self, server: Server) -> None:
        """Load the weights again if the server is a new process, once for all calls that wait for them."""
        if not server.may_have_restarted:
            return
        lock = self._restoring.setdefault((asyncio.get_running_loop(), server), asyncio.Lock())
        async with lock:
            if not server.may_have_restarted:  # another call has restored them
                return
            if server.started is not None and await self._start_of(server) == server.started:
                server.may_have_restarted = False
                return
            await self._load(server)
            logger.warning("%s may have been restarted and was told to load %s again", server.url, server.weights)

    async def forget_images(self, servers: Sequence[Server]) -> None:
        """Make every server forget the features of images, which belong to earlier weights. No call may be running."""
        await asyncio.gather(
            *(self._client.retrying(server, partial(self._forget_images, server)) for server in servers)
        )

    async def _load(self, server: Server) -> None:
        started = await self._start_of(server)
        order = {"method": "reload_weights", "kwargs": {"weights_path": server.weights}}
        for path, body in (("/collective_rpc", order), ("/reset_prefix_cache", None)):
            try:
                async with self._client.request(server, "POST", path, body) as response:
                    await response.read()
            except EngineError as error:
                raise EngineError(
                    f"{error} A server has the endpoints that load weights only with {DEVELOPMENT_MODE}"
                ) from None
        await self._forget_images(server)
        server.started, server.may_have_restarted = started, False

    async def _forget_images(self, server: Server) -> None:
        # Weights that are loaded clear the workers' cache but not the scheduler's, and the next image that both had
        # would end the server with "Encoder cache miss". Older versions have neither the cache nor the endpoint.
        with suppress(NotFoundError):
            async with self._client.request(server, "POST", "/reset_encoder_cache") as response:
                await response.read()

    async def _start_of(self, server: Server) -> str | None:
        """Start time of the server's process, from the metrics that the Prometheus client adds to vLLM's."""
        async with self._client.request(server, "GET", "/metrics") as response:
            found = re.search(r"^process_start_time_seconds (\S+)$", await response.text(), re.MULTILINE)
        return found[1] if found else None
