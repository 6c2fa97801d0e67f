"""A TCP proxy that breaks chosen connections to a real server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Literal
from urllib.parse import urlsplit


Fate = Literal["forward", "stall", "cut"]
END_OF_STREAM = b"data: [DONE]"


class FaultyProxy:
    """
    Forwards connections to a server, on a thread of its own.

    Args:
        url (`str`):
            Of the server.
        fate (`Callable[[int, bytes], Fate]`, *optional*):
            Asked for each piece of an answer to a completion request, with its number, from 1, and the piece:
            it is forwarded, or the connection forwards nothing more for good, or is cut. The end of a stream is a
            piece of its own, whether or not it arrived together with the last tokens. Other answers pass.

    Attributes:
        url (`str`):
            Of the proxy.
        fates (`list[tuple[int, Fate]]`):
            What was done to which request, but for forwarding.
    """

    def __init__(self, url: str, fate: Callable[[int, bytes], Fate] = lambda number, piece: "forward"):
        self._target = urlsplit(url)
        self._fate = fate
        self._completions = 0
        self._port = 0
        self._connections: set[asyncio.Task] = set()
        self.fates: list[tuple[int, Fate]] = []

    def __enter__(self) -> FaultyProxy:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")
        self._thread.start()
        self.come_back()
        return self

    def __exit__(self, *_: object) -> None:
        self.go_away()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def go_away(self) -> None:
        """Refuse new connections and close existing ones, so that the server seems dead."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)

    def come_back(self) -> None:
        """Accept connections again, on the same port."""
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)

    async def _listen(self) -> None:
        self._listener = await asyncio.start_server(self._connected, "127.0.0.1", self._port)
        self._port = self._listener.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._listener.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        to_server: asyncio.StreamWriter | None = None
        pumps: list[asyncio.Task] = []
        try:
            server, to_server = await asyncio.open_connection(self._target.hostname, self._target.port)
            number = [0]  # of the completion request that this connection carries, 0 for another request
            pumps = [
                asyncio.ensure_future(self._pass_requests(client, to_server, number)),
                asyncio.ensure_future(self._pass_answers(server, to_client, number)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        except (OSError, asyncio.CancelledError):
            pass  # the server is not there, or the proxy ends
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for writer in (to_client, to_server):
                if writer is not None:
                    writer.transport.abort()
            self._connections.discard(task)

    async def _pass_requests(
        self, client: asyncio.StreamReader, to_server: asyncio.StreamWriter, number: list[int]
    ) -> None:
        while piece := await client.read(2**16):
            if piece.startswith(b"POST /v1/completions"):
                self._completions += 1
                number[0] = self._completions
            elif piece.startswith((b"GET ", b"POST ")):
                number[0] = 0
            to_server.write(piece)
            await to_server.drain()

    async def _pass_answers(
        self, server: asyncio.StreamReader, to_client: asyncio.StreamWriter, number: list[int]
    ) -> None:
        while received := await server.read(2**16):
            before, end, after = received.partition(END_OF_STREAM)
            for piece in filter(None, (before, end + after)):
                fate: Fate = self._fate(number[0], piece) if number[0] else "forward"
                if fate != "forward":
                    self.fates.append((number[0], fate))
                if fate == "cut":
                    return
                if fate == "stall":
                    await asyncio.Event().wait()  # until the client gives up
                to_client.write(piece)
                await to_client.drain()
