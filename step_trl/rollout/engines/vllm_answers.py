"""What vLLM has sampled so far, from whole answers and from pieces, cut exactly where a stop string ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, suppress
from typing import Any, Literal

import aiohttp
import msgspec

from .base import Generation
from .stop_strings import StopStrings
from .vllm_http import ConnectionLostError


_END_SECONDS = 5.0  # from the last token of a stream to its end


class TokenLogprobs(msgspec.Struct):
    """The part that is read of the log-probabilities of a [`Choice`]."""

    token_logprobs: list[float]


class Choice(msgspec.Struct):
    """The part that is read of a choice, or of a piece of one. What is not named here is skipped, not built."""

    token_ids: list[int]
    logprobs: TokenLogprobs
    finish_reason: str | None
    stop_reason: int | str | None

    @property
    def reason(self) -> Literal["eos", "stop", "length"] | None:
        """Why the server ended it, in our words; `None` for a piece with more to come."""
        match self.finish_reason:
            case None | "length":
                return self.finish_reason
            # The EOS token and other stop tokens end a call as "stop" too, without a stop string as the reason.
            case "stop":
                return "stop" if isinstance(self.stop_reason, str) else "eos"
        raise ConnectionLostError(f"finish_reason {self.finish_reason!r}")


class _Answer(msgspec.Struct):
    choices: list[Choice] = []
    error: Any = None


_DECODER = msgspec.json.Decoder(_Answer)


def read_choice(content: bytes) -> Choice:
    """
    The choice of an answer or of an event.

    Raises:
        `ConnectionLostError`: the server reports an error of its own.
    """
    answer = _DECODER.decode(content)
    if answer.error is not None:
        raise ConnectionLostError(f"error in the stream: {answer.error}")
    return answer.choices[0]


async def read_pieces(response: aiohttp.ClientResponse) -> AsyncGenerator[Choice, None]:
    """The pieces of a choice in a stream of server-sent events, as they arrive."""
    rest = b""
    async for data in response.content.iter_any():
        *events, rest = (rest + data).split(b"\n\n")
        for event in events:
            # Others are comments that keep the connection alive, and the end. The end of the body follows that; only a
            # connection that was read to its end is used again.
            if event.startswith(b"data: {"):
                yield read_choice(event[6:])


class Sampled:
    """What one attempt at a call has sampled so far."""

    def __init__(self, stop_strings: StopStrings, stop_set: int):
        self._stop_strings = stop_strings
        self._stop_set = stop_set
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []

    def add(self, choice: Choice) -> Generation | None:
        """Take in a choice of an answer, or the next piece of one. Returns the generation where it is complete."""
        start, reason = len(self.token_ids), choice.reason
        self.token_ids += choice.token_ids
        self.logprobs += choice.logprobs.token_logprobs
        end = self._stop_strings.first_completed(self._stop_set, self.token_ids, start)
        if end is not None and (reason != "eos" or end < len(self.token_ids)):
            del self.token_ids[end:], self.logprobs[end:]
            reason = "stop"
        return None if reason is None else Generation(self.token_ids, self.logprobs, reason)


class SampledAhead:
    """
    A streamed request that goes on behind the stop strings of the calls that take its tokens, one call after another.

    The server knows of no stop strings. What it has sampled behind one waits for the next call.

    Args:
        stop_strings ([`StopStrings`]):
            The tokenizer's.
        streams (`asyncio.Semaphore`):
            Acquired by the first request, and held until [`SampledAhead.end`].
    """

    def __init__(self, stop_strings: StopStrings, streams: asyncio.Semaphore):
        self._stop_strings = stop_strings
        self._streams = streams
        self.opened = 0.0  # when the request began
        self._acquired = False
        self._exit = AsyncExitStack()
        self._pieces: AsyncGenerator[Choice, None] | None = None
        self._sampling: dict[str, Any] = {}
        self._length = 0  # of the prompt and the tokens that were taken
        self._last: list[int] = []  # taken by the last call
        self._left = 0  # of the request's budget
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._reason: Literal["eos", "stop", "length"] | None = None

    def goes_on(self, body: dict[str, Any]) -> bool:
        """Whether a call with this body, but for its stop strings and its seed, is answered by what comes next."""
        path = body["prompt"]
        return (
            self._pieces is not None
            and body["max_tokens"] <= self._left
            and self._sampling_of(body) == self._sampling
            and len(path) == self._length
            and list(path[-len(self._last) :]) == self._last
        )

    async def open(self, request: AbstractAsyncContextManager[aiohttp.ClientResponse], body: dict[str, Any]) -> None:
        """Begin with the answer to a streaming request."""
        if not self._acquired:
            await self._streams.acquire()
            self._acquired = True
        self.opened = time.monotonic()
        response = await self._exit.enter_async_context(request)
        self._pieces = await self._exit.enter_async_context(aclosing(read_pieces(response)))
        self._sampling, self._left = self._sampling_of(body), body["max_tokens"]
        self._length, self._last = len(body["prompt"]), list(body["prompt"])
        self._token_ids, self._logprobs, self._reason = [], [], None

    async def take(self, stop_set: int, max_tokens: int) -> Generation:
        """The next tokens, up to a stop string, to EOS, or to `max_tokens`."""
        searched = 0
        while True:
            count = len(self._token_ids)
            end = self._stop_strings.first_completed(stop_set, self._token_ids, searched)
            if end is not None and end <= max_tokens and not (end == count and self._reason == "eos"):
                return self._hand_out(end, "stop")
            if self._reason is not None and count <= max_tokens:
                return self._hand_out(count, self._reason)
            if count >= max_tokens:
                return self._hand_out(max_tokens, "length")
            searched = count
            await self._read()

    async def close(self) -> None:
        """End the request. One that is not complete is aborted by the server."""
        if self._pieces is not None and self._reason is not None:
            # All tokens are there, but only a connection that was read to its end is used again.
            with suppress(ConnectionLostError, aiohttp.ClientError, asyncio.TimeoutError):
                await asyncio.wait_for(self._read_to_end(self._pieces), _END_SECONDS)
        self._pieces = None
        await self._exit.aclose()

    async def end(self) -> None:
        """Close, for good."""
        try:
            await self.close()
        finally:
            if self._acquired:
                self._streams.release()

    @staticmethod
    async def _read_to_end(pieces: AsyncGenerator[Choice, None]) -> None:
        async for _ in pieces:
            pass

    async def _read(self) -> None:
        piece = await anext(self._pieces, None) if self._pieces is not None else None
        if piece is None:
            raise ConnectionLostError("a stream that broke off")
        self._token_ids += piece.token_ids
        self._logprobs += piece.logprobs.token_logprobs
        self._reason = piece.reason

    def _hand_out(self, end: int, reason: Literal["eos", "stop", "length"]) -> Generation:
        taken = Generation(self._token_ids[:end], self._logprobs[:end], reason)
        del self._token_ids[:end], self._logprobs[:end]
        self._length, self._last = self._length + end, taken.token_ids
        self._left -= end
        return taken

    @staticmethod
    def _sampling_of(body: dict[str, Any]) -> dict[str, Any]:
        return {name: body[name] for name in ("temperature", "top_p", "top_k", "min_p")}
