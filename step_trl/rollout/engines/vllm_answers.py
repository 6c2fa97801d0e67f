"""What vLLM has sampled so far, from whole answers and from pieces, cut exactly where a stop string ends."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
from typing import Any, Literal

import aiohttp

from .base import Generation
from .stop_strings import StopStrings
from .vllm_http import ConnectionLostError, read_events


def finish_reason(choice: dict[str, Any]) -> Literal["eos", "stop", "length"] | None:
    """Why the server ended a choice, in our words; `None` for a piece with more to come."""
    reason = choice["finish_reason"]
    if reason not in (None, "stop", "length"):
        raise ConnectionLostError(f"finish_reason {reason!r}")
    # The EOS token and other stop tokens end a call as "stop" too, without a stop string as the reason.
    return "eos" if reason == "stop" and not isinstance(choice["stop_reason"], str) else reason


class Sampled:
    """What one attempt at a call has sampled so far."""

    def __init__(self, stop_strings: StopStrings, stop_set: int):
        self._stop_strings = stop_strings
        self._stop_set = stop_set
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []

    def add(self, choice: dict[str, Any]) -> Generation | None:
        """Take in a choice of an answer, or the next piece of one. Returns the generation where it is complete."""
        start, reason = len(self.token_ids), finish_reason(choice)
        self.token_ids += choice["token_ids"]
        self.logprobs += choice["logprobs"]["token_logprobs"]
        end = self._stop_strings.first_completed(self._stop_set, self.token_ids, start)
        if end is not None and (reason != "eos" or end < len(self.token_ids)):
            del self.token_ids[end:], self.logprobs[end:]
            reason = "stop"
        return None if reason is None else Generation(self.token_ids, self.logprobs, reason)


class SampledAhead:
    """
    A streamed request that goes on behind the stop strings of the calls that take its tokens, one call after another.

    The server knows of no stop strings. What it has sampled behind one waits for the next call.
    """

    def __init__(self, stop_strings: StopStrings):
        self._stop_strings = stop_strings
        self._exit = AsyncExitStack()
        self._events: AsyncGenerator[dict[str, Any], None] | None = None
        self._sampling: dict[str, Any] = {}
        self._path_ids: list[int] = []  # of the prompt and the tokens that were taken
        self._left = 0  # of the request's budget
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._reason: Literal["eos", "stop", "length"] | None = None

    def goes_on(self, body: dict[str, Any]) -> bool:
        """Whether the call with this body, but for its stop strings and its seed, is answered by what comes next."""
        return (
            self._events is not None
            and body["max_tokens"] <= self._left
            and self._sampling_of(body) == self._sampling
            and body["prompt"] == self._path_ids
        )

    async def open(self, request: AbstractAsyncContextManager[aiohttp.ClientResponse], body: dict[str, Any]) -> None:
        """Begin with the answer to a streaming request."""
        response = await self._exit.enter_async_context(request)
        self._events = await self._exit.enter_async_context(aclosing(read_events(response)))
        self._sampling, self._path_ids, self._left = self._sampling_of(body), list(body["prompt"]), body["max_tokens"]
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
        if self._events is not None and self._reason is not None:
            async for _ in self._events:
                pass  # only a connection that was read to its end is used again
        self._events = None
        await self._exit.aclose()

    async def _read(self) -> None:
        event = await anext(self._events, None) if self._events is not None else None
        if event is None:
            raise ConnectionLostError("a stream that broke off")
        choice = event["choices"][0]
        self._token_ids += choice["token_ids"]
        self._logprobs += choice["logprobs"]["token_logprobs"]
        self._reason = finish_reason(choice)

    def _hand_out(self, end: int, reason: Literal["eos", "stop", "length"]) -> Generation:
        taken = Generation(self._token_ids[:end], self._logprobs[:end], reason)
        del self._token_ids[:end], self._logprobs[:end]
        self._path_ids += taken.token_ids
        self._left -= end
        return taken

    @staticmethod
    def _sampling_of(body: dict[str, Any]) -> dict[str, Any]:
        return {name: body[name] for name in ("temperature", "top_p", "top_k", "min_p")}
