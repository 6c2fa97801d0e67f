"""HTTP client for vLLM servers: one session per event loop, and retries that survive a restart of the server."""

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

from ...retry import RetryWindow


logger = logging.getLogger(__name__)

_T = TypeVar("_T")
# uvicorn closes connections after 5 idle seconds. Ours close earlier, so that no call uses one that is being closed.
_KEEPALIVE_SECONDS = 3.0


def _plain(value: Any) -> Any:
    """Convert arrays of token ids, and token ids of numpy."""
    return value.tolist() if isinstance(value, array) else operator.index(value)


_ENCODER = msgspec.json.Encoder(enc_hook=_plain)


class EngineError(RuntimeError):
    """A server refuses a call, or its configuration does not suit rollouts."""


class NotFoundError(EngineError):
    """A server lacks an endpoint or a model."""


class EngineUnavailableError(EngineError):
    """A server did not answer within the retry window."""


class ConnectionLostError(Exception):
    """
    The server is starting, stopping or overloaded: the call is worth another attempt.

    `opened` is the time at which an earlier call opened the connection, if one did.
    """

    def __init__(self, reason: str, opened: float | None = None):
        super().__init__(reason)
        self.opened = opened


@dataclass(eq=False)
class Server:
    """Address and state of one server. Times are those of `time.monotonic`."""

    url: str  # without `/v1`
    down_since: float | None = None  # the first failure since the last success
    reason: str = ""  # of that failure
    up_since: float = 0.0  # the last recovery
    restarted_calls: int = 0  # failed attempts in the current outage
    weights: str | None = None  # folder that the server loaded last
    started: str | None = None  # start time of the process that loaded them, if the server reports it
    may_have_restarted: bool = False  # a new process may have replaced that one, with the weights from its start

    def note_failure(self, begun: float, reason: str, window: float) -> None:
        """Note the failure of a connection that was opened at `begun`. The outage may already be over."""
        self.may_have_restarted = self.weights is not None
        if self.down_since is None:
            if begun < self.up_since:
                return
            self.down_since, self.reason, self.restarted_calls = time.monotonic(), reason, 0
            logger.warning("%s does not answer (%s); trying again for up to %.0f s", self.url, reason, window)
        self.restarted_calls += 1

    def note_success(self, begun: float) -> None:
        """Note the success of an attempt that began at `begun`. It proves nothing if the outage began later."""
        if self.down_since is not None and begun >= self.down_since:
            self.up_since = time.monotonic()
            logger.warning(
                "%s answers again after %.1f s (%s); %d attempts were restarted from their prompts.%s",
                self.url,
                self.up_since - self.down_since,
                self.reason,
                self.restarted_calls,
                " If it was restarted, it has the weights from its start." if self.weights is None else "",
            )
            self.down_since = None


@dataclass(eq=False)
class _Session:
    """Resources of one event loop."""

    http: aiohttp.ClientSession
    streams: asyncio.Semaphore


class VLLMHTTPClient:
    """
    Sends requests, with one `aiohttp` session per event loop, for a [`VLLMServerEngine`] with these arguments.

    `remedy` says how to start a server that does not answer. A session closes when its loop shuts down its
    asynchronous generators, as `asyncio.run` does at its end.
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
        remedy: Callable[[Server], str],
    ):
        self.retry_window = retry_window
        self._remedy = remedy
        self.ssl = ssl.create_default_context(cafile=verify) if isinstance(verify, str) else verify
        self._api_key = api_key
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout, sock_read=read_timeout)
        self._max_connections = max_connections
        # Stored with the generator that keeps it open, which must not be collected while the loop runs.
        self._sessions: dict[asyncio.AbstractEventLoop, tuple[_Session, AsyncGenerator]] = {}

    async def retrying(self, server: Server, attempt: Callable[[], Awaitable[_T]]) -> _T:
        """
        Attempt a whole call until an attempt succeeds or `retry_window` is over.

        Raises [`EngineUnavailableError`] with the remedy then, and [`EngineError`] if the server refused the call.
        """
        window = RetryWindow(self.retry_window)
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
                reason = self._describe(error)
                if not window.note_failure():
                    raise EngineUnavailableError(
                        f"{server.url} did not answer: {window}, the last one ended with {reason}. "
                        f"{self._remedy(server)}"
                    ) from None
                opened = error.opened if isinstance(error, ConnectionLostError) else None
                server.note_failure(begun if opened is None else opened, reason, self.retry_window)
                await window.wait()
            else:
                server.note_success(begun)
                return result

    async def get(self, server: Server, path: str, body: dict[str, Any] | None = None) -> str:
        """Return the answer to a question, which is asked again if it fails. One with a body is a POST request."""

        async def answer() -> str:
            async with self.request(server, "GET" if body is None else "POST", path, body) as response:
                return await response.text()

        return await self.retrying(server, answer)

    @asynccontextmanager
    async def request(
        self, server: Server, method: str, path: str, body: dict[str, Any] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send one request. The server aborts it if the context ends before the response was read to its end."""
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
        Return the semaphore that a rollout holds while it has a stream open beside its other calls.

        If all connections were streams, the rollouts that read them would deadlock waiting for a connection.
        """
        return (await self._session()).streams

    async def _session(self) -> _Session:
        loop = asyncio.get_running_loop()
        if loop not in self._sessions:
            keeper = self._keep_session(loop)
            # Runs to its yield without waiting, so that concurrent calls share one session.
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
