"""Parsing of vLLM's responses, whole and streamed, and their exact truncation after stop strings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, suppress
from typing import Any, Literal

import aiohttp
import msgspec

from .base import AbandonRule, Generation
from .stop_strings import StopStrings
from .vllm_http import ConnectionLostError


_END_SECONDS = 5.0  # maximum time from the last token of a stream to its end


class TokenLogprob(msgspec.Struct):
    """The used field of a token in an answer to a request for tokens."""

    logprob: float


class TokenLogprobs(msgspec.Struct):
    """The used fields of a choice's log-probabilities: of a completion, or as `content` of a request for tokens."""

    token_logprobs: list[float] = []
    content: list[TokenLogprob] = []

    def values(self) -> list[float]:
        """Return the log-probability of each token."""
        return self.token_logprobs or [token.logprob for token in self.content]


class Choice(msgspec.Struct):
    """The used fields of a choice or of a streamed piece of one. Other fields are skipped, not built."""

    token_ids: list[int]
    logprobs: TokenLogprobs
    finish_reason: str | None
    stop_reason: int | str | msgspec.UnsetType | None = msgspec.UNSET

    @property
    def reason(self) -> Literal["eos", "stop", "length"] | None:
        """Finish reason in the words of [`Generation`], `None` while there are more pieces."""
        match self.finish_reason:
            case None | "length":
                return self.finish_reason
            # EOS and other stop tokens finish with "stop" too, but without a stop string as the reason.
            case "stop":
                return "stop" if isinstance(self.stop_reason, str) else "eos"
        raise ConnectionLostError(f"finish_reason {self.finish_reason!r}")


class _Answer(msgspec.Struct):
    choices: list[Choice] = []
    error: Any = None


_DECODER = msgspec.json.Decoder(_Answer)


def read_choice(content: bytes, eos_token_id: int | None) -> Choice:
    """Decode the choice of a response or of an event, or raise the error that it reports."""
    answer = _DECODER.decode(content)
    if answer.error is not None:
        raise ConnectionLostError(f"error in the stream: {answer.error}")
    choice = answer.choices[0]
    if choice.stop_reason is msgspec.UNSET:  # answers to requests for tokens do not say what stopped them
        choice.stop_reason = None if choice.token_ids[-1:] == [eos_token_id] else ""
    return choice


def read_logprob(content: bytes, token_id: int) -> float | None:
    """Decode the log-probability of a token that was asked for at the first place; `None` if there is none."""
    (choice,) = msgspec.json.decode(content)["choices"]
    return (choice["logprobs"]["top_logprobs"][0] or {}).get(f"token_id:{token_id}")


async def read_pieces(response: aiohttp.ClientResponse, eos_token_id: int | None) -> AsyncGenerator[Choice, None]:
    """Yield the pieces of a choice from a stream of server-sent events."""
    rest = b""
    async for data in response.content.iter_any():
        *events, rest = (rest + data).split(b"\n\n")
        for event in events:
            # Other events are keep-alive comments and the end marker. The body is read to its end after the marker,
            # because only then is the connection reused.
            if event.startswith(b"data: {"):
                yield read_choice(event[6:], eos_token_id)


class Sampled:
    """Tokens that one attempt at a call has sampled so far."""

    def __init__(self, stop_strings: StopStrings, stop_set: int):
        self._stop_strings = stop_strings
        self._stop_set = stop_set
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []

    def add(self, choice: Choice) -> Generation | None:
        """Add a choice or the next piece of one. Returns the generation once it is complete."""
        start, reason = len(self.token_ids), choice.reason
        self.token_ids += choice.token_ids
        self.logprobs += choice.logprobs.values()
        end = self._stop_strings.first_completed(self._stop_set, self.token_ids, start)
        if end is not None and (reason != "eos" or end < len(self.token_ids)):
            del self.token_ids[end:], self.logprobs[end:]
            reason = "stop"
        return None if reason is None else Generation(self.token_ids, self.logprobs, reason)


class SampledAhead:
    """
    A streamed request that serves successive calls of one rollout and continues after their stop strings.

    The request has no stop strings of its own. Tokens that the server samples after one wait for the next call. The
    first request acquires `streams`, which [`SampledAhead.end`] releases.
    """

    def __init__(self, stop_strings: StopStrings, eos_token_id: int | None, streams: asyncio.Semaphore):
        self._stop_strings = stop_strings
        self._eos_token_id = eos_token_id
        self._streams = streams
        self.opened = 0.0  # start time of the request
        self._acquired = False
        self._exit = AsyncExitStack()
        self._pieces: AsyncGenerator[Choice, None] | None = None
        self._sampling: dict[str, Any] = {}
        self._length = 0  # of the prompt and the tokens taken
        self._last: list[int] = []  # tokens of the last call
        self._left = 0  # remaining tokens of the request
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._reason: Literal["eos", "stop", "length"] | None = None

    def continues(self, body: dict[str, Any]) -> bool:
        """Whether the next tokens of the stream answer a call with this body. Stop strings and seed may differ."""
        path = body["prompt"]
        return (
            self._pieces is not None
            and body["max_tokens"] <= self._left
            and self._sampling_of(body) == self._sampling
            and len(path) == self._length
            and list(path[-len(self._last) :]) == self._last
        )

    async def open(self, request: AbstractAsyncContextManager[aiohttp.ClientResponse], body: dict[str, Any]) -> None:
        """Send a streaming request."""
        if not self._acquired:
            await self._streams.acquire()
            self._acquired = True
        self.opened = time.monotonic()
        response = await self._exit.enter_async_context(request)
        self._pieces = await self._exit.enter_async_context(aclosing(read_pieces(response, self._eos_token_id)))
        self._sampling, self._left = self._sampling_of(body), body["max_tokens"]
        self._length, self._last = len(body["prompt"]), list(body["prompt"])
        self._token_ids, self._logprobs, self._reason = [], [], None

    async def take(self, stop_set: int, max_tokens: int, abandon: AbandonRule | None = None) -> Generation:
        """Return the next tokens, up to a stop string, to EOS, to `max_tokens`, or to where they are abandoned."""
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
            if count and abandon is not None and abandon(self._token_ids, self._logprobs):
                return self._hand_out(count, "abandoned")
            await self._read()

    async def close(self) -> None:
        """Close the request. The server aborts it if it is not complete."""
        if self._pieces is not None and self._reason is not None:
            # All tokens have arrived, but only a connection that is read to its end is reused.
            with suppress(ConnectionLostError, aiohttp.ClientError, asyncio.TimeoutError):
                await asyncio.wait_for(self._read_to_end(self._pieces), _END_SECONDS)
        self._pieces = None
        await self._exit.aclose()

    async def end(self) -> None:
        """Close the request and release the semaphore."""
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
        self._logprobs += piece.logprobs.values()
        self._reason = piece.reason

    def _hand_out(self, end: int, reason: Literal["eos", "stop", "length", "abandoned"]) -> Generation:
        taken = Generation(self._token_ids[:end], self._logprobs[:end], reason)
        del self._token_ids[:end], self._logprobs[:end]
        self._length, self._last = self._length + end, taken.token_ids
        self._left -= end
        return taken

    @staticmethod
    def _sampling_of(body: dict[str, Any]) -> dict[str, Any]:
        return {name: body[name] for name in ("temperature", "top_p", "top_k", "min_p")}
