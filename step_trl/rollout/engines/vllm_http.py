"""HTTP to vLLM servers: sessions that live as long as their event loop, and calls that outlast a restart."""

from __future__ import annotations

import asyncio
import logging
import operator
import ssl
import time
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
import msgspec


logger = logging.getLogger(__name__)

_T = TypeVar("_T")
# uvicorn closes connections that were idle for 5 s. Ours end before, so that no call meets one that is being closed.
_KEEPALIVE_SECONDS = 3.0
_FIRST_DELAY, _LONGEST_DELAY = 0.25, 5.0  # seconds between two attempts


def _plain(value: Any) -> Any:
    """Token ids may be in an array, or be numpy's."""
    return value.tolist() if isinstance(value, array) else operator.index(value)


_ENCODER = msgspec.json.Encoder(enc_hook=_plain)


class EngineError(RuntimeError):
    """A server refuses a call, or is not set up as rollouts need it."""


class NotFoundError(EngineError):
    """A server has no such endpoint, or no such model."""


class EngineUnavailableError(EngineError):
    """A server could not be reached for as long as it was waited for."""


class ConnectionLostError(Exception):
    """
    The server is starting, ending or overwhelmed: the call is worth another attempt.

    Attributes:
        opened (`float`, *optional*):
            When the connection was opened, if an earlier attempt did.
    """

    def __init__(self, reason: str, opened: float | None = None):
        super().__init__(reason)
        self.opened = opened


@dataclass(eq=False)
class Server:
    """
    One server.

    Attributes:
        url (`str`):
            Base URL, without `/v1`.
        down_since (`float`, *optional*):
            When a call first failed and none that began later succeeded.
        reason (`str`):
            Why it failed.
        up_since (`float`):
            When it answered again after it last did not.
        restarted_calls (`int`):
            Attempts that failed since.
        weights (`str`, *optional*):
            Folder of the weights that it was last told to load.
        started (`str`, *optional*):
            When the process that loaded them was started, if it says so.
        forgetful (`bool`):
            Whether another process may have taken its place since, with the weights of its start.
    """

    url: str
    down_since: float | None = None
    up_since: float = 0.0
    reason: str = ""
    restarted_calls: int = 0
    weights: str | None = None
    started: str | None = None
    forgetful: bool = False

    def note_failure(self, begun: float, reason: str, window: float) -> None:
        """Of a connection that began at `begun`. One that is read late may report an outage that is over."""
        self.forgetful = self.weights is not None
        if self.down_since is None:
            if begun < self.up_since:
                return
            self.down_since, self.reason, self.restarted_calls = time.monotonic(), reason, 0
            logger.warning("%s does not answer (%s); trying again for up to %.0f s", self.url, reason, window)
        self.restarted_calls += 1

    def note_success(self, begun: float) -> None:
        """Of an attempt that began at `begun`. One that began before the failure says nothing about the time since."""
        if self.down_since is not None and begun >= self.down_since:
            self.up_since = time.monotonic()
            logger.warning(
                "%s answers again after %.1f s (%s); %d attempts were begun anew from their prompts.%s",
                self.url,
                self.up_since - self.down_since,
                self.reason,
                self.restarted_calls,
                " If it was restarted, it has the weights of its start." if self.weights is None else "",
            )
            self.down_since = None


@dataclass(eq=False)
class _Session:
    """What lives as long as an event loop."""

    http: aiohttp.ClientSession
    streams: asyncio.Semaphore


class VLLMHTTPClient:
    """
    Sends requests, one `aiohttp` session per event loop.

    A session is closed when its loop shuts its asynchronous generators down, which `asyncio.run` does at its end.

    Args:
        api_key (`str`, *optional*):
            Sent as bearer token; never shown.
        verify (`bool`, `str` or `ssl.SSLContext`):
            Whether certificates are checked, or a file with the authorities to trust, or a context.
        connect_timeout (`float`), read_timeout (`float`):
            Seconds to connect, and between two pieces of an answer; an answer that is not streamed is one piece.
        retry_window (`float`):
            Seconds from the first failure of a call until it is given up.
        max_connections (`int`):
            Most connections at once; further calls wait for one. Half of them are for streams that other calls may
            have to end before them, see [`VLLMHTTPClient.streams`].
    """

    def __init__(
        self,
        *,
        api_key: str | None,
        verify: bool | str | ssl.SSLContext,
        connect_timeout: float,
        read_timeout: float,
        retry_window: float,
        max_connections: int,
    ):
        self.retry_window = retry_window
        self.ssl = ssl.create_default_context(cafile=verify) if isinstance(verify, str) else verify
        self._api_key = api_key
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout, sock_read=read_timeout)
        self._max_connections = max_connections
        # The generator that keeps a session is stored with it: it must not be collected while its loop runs.
        self._sessions: dict[asyncio.AbstractEventLoop, tuple[_Session, AsyncGenerator]] = {}

    async def retrying(self, server: Server, attempt: Callable[[], Awaitable[_T]], remedy: Callable[[], str]) -> _T:
        """
        Make attempts at a whole call until one succeeds or `retry_window` is over.

        Raises:
            `EngineUnavailableError`: no attempt succeeded; says what was tried, and `remedy`.
            `EngineError`: the server refused the call.
        """
        delay, attempts, failed_at = _FIRST_DELAY, 0, 0.0
        while True:
            begun = time.monotonic()
            try:
                result = await attempt()
            except aiohttp.ClientSSLError as error:
                raise EngineError(
                    f"verify: no secure connection to {server.url} ({self._describe(error)}). Set `verify` to a file "
                    "with the authority that signed the server's certificate."
                ) from None
            except (ConnectionLostError, aiohttp.ClientError, asyncio.TimeoutError) as error:
                now, reason = time.monotonic(), self._describe(error)
                attempts += 1
                if attempts == 1:
                    failed_at = now
                left = failed_at + self.retry_window - now
                if left <= 0:
                    raise EngineUnavailableError(
                        f"{server.url} did not answer: {attempts} attempts in {now - failed_at:.0f} s "
                        f"(retry_window={self.retry_window:g}), the last one ended with {reason}. {remedy()}"
                    ) from None
                opened = error.opened if isinstance(error, ConnectionLostError) else None
                server.note_failure(begun if opened is None else opened, reason, self.retry_window)
                await asyncio.sleep(min(delay, left))
                delay = min(2 * delay, _LONGEST_DELAY)
            else:
                server.note_success(begun)
                return result

    @asynccontextmanager
    async def request(
        self, server: Server, method: str, path: str, body: dict[str, Any] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One request. Left before its answer was read to the end, the connection is closed: the server gives up."""
        session = (await self._session()).http
        data = None if body is None else _ENCODER.encode(body)
        async with session.request(method, server.url + path, data=data, allow_redirects=False) as response:
            if response.status >= 300:
                await self._raise_for(server, path, response)
            yield response

    async def _raise_for(self, server: Server, path: str, response: aiohttp.ClientResponse) -> None:
        text = self._hide_key((await response.text(errors="replace"))[:1000])
        if response.status >= 500:
            raise ConnectionLostError(f"status {response.status}: {text}")
        if response.status in (401, 403):
            given = "the one given" if self._api_key else "none was given"
            raise EngineError(
                f"api_key: {server.url} refuses the call (status {response.status}; {given}). Set `api_key` to the "
                "server's VLLM_API_KEY or --api-key."
            )
        error = NotFoundError if response.status == 404 else EngineError
        raise error(f"{server.url}{path} refuses the call (status {response.status}): {text}")

    async def streams(self) -> asyncio.Semaphore:
        """
        To be held by a rollout while it has a stream open beside its other calls.

        A stream that is not read comes to no end. Were all connections streams, the calls after which they are read on
        would wait for one forever.
        """
        return (await self._session()).streams

    async def _session(self) -> _Session:
        loop = asyncio.get_running_loop()
        if loop not in self._sessions:
            keeper = self._keep_session(loop)
            # Runs to its yield without waiting, so that calls that begin together get one session.
            self._sessions[loop] = await anext(keeper), keeper
        return self._sessions[loop][0]

    async def _keep_session(self, loop: asyncio.AbstractEventLoop) -> AsyncGenerator[_Session, None]:
        headers = {"Content-Type": "application/json"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        connector = aiohttp.TCPConnector(
            limit=self._max_connections, ssl=self.ssl, keepalive_timeout=_KEEPALIVE_SECONDS
        )
        async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=self._timeout) as http:
            try:
                yield _Session(http, asyncio.Semaphore(self._max_connections // 2))
            finally:
                del self._sessions[loop]

    def _describe(self, error: BaseException) -> str:
        return self._hide_key(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)

    def _hide_key(self, text: str) -> str:
        return text.replace(self._api_key, "***") if self._api_key else text
