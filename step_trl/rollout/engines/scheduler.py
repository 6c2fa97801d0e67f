"""Continuous batching of the in-process engine: which requests run, and when they end."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .base import AbandonRule, Generation
from .row_table import RowTable
from .stop_strings import StopStrings


@dataclass
class EngineStats:
    """Work of an engine since its creation."""

    forwards: int = 0  # forward passes of the model
    prefilled_tokens: int = 0  # prompt tokens that were computed
    reused_tokens: int = 0  # prompt tokens that were found in the cache
    sampled_tokens: int = 0


@dataclass(eq=False, kw_only=True)
class Request:
    """
    One call of `generate`; `stop` is the index of its set in the [`StopStrings`]. With `forced` tokens, it is one of
    `logprobs_of`, and nothing is sampled.
    """

    prompt: np.ndarray
    max_tokens: int
    stop: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    abandon: AbandonRule | None = None
    future: asyncio.Future[Generation]
    forced: np.ndarray | None = None


class Scheduler:
    """
    Moves requests from the waiting queue to the rows, and out of them when they are finished or cancelled.

    At most `max_batch_size` requests run. `eos` (V,) flags the tokens that end a request.
    """

    def __init__(
        self, rows: RowTable, max_batch_size: int, stop_strings: StopStrings, eos: np.ndarray, stats: EngineStats
    ):
        self.rows = rows
        self.max_batch_size = max_batch_size
        self.stop_strings = stop_strings
        self.eos = eos
        self.stats = stats
        self.waiting: deque[Request] = deque()

    def schedule(self) -> bool:
        """Start waiting requests in order of arrival. Returns whether any was started."""
        rows, started = self.rows, False
        for request in tuple(self.waiting):
            if rows.num_active == self.max_batch_size:
                break
            if not request.future.done():
                source, shared, coming = rows.longest_prefix(request.prompt)
                if 2 * coming > len(request.prompt) - shared:
                    continue  # a running request is computing most of the missing prefix
                self._start(request, source, shared)
                started = True
            # Last, so that `abort` finds the request in the queue or in the rows even if memory runs out.
            self.waiting.remove(request)
        rows.compact()
        if rows.num_active:
            rows.reserve(int(rows.state["known"][: rows.num_active].max()) + 1)  # for the next token
        return started

    def _start(self, request: Request, source: int, shared: int) -> None:
        slot = self.rows.place(request, request.prompt, source, shared)
        state = self.rows.state[slot]
        state["limit"] = len(request.prompt) + request.max_tokens
        for name in ("stop", "temperature", "top_k", "top_p", "min_p", "seed"):
            state[name] = getattr(request, name)
        state["watched"], state["forced"] = request.abandon is not None, request.forced is not None
        if request.forced is not None:
            self.rows.reserve(len(request.prompt) + request.max_tokens)
            self.rows.tokens[slot, len(request.prompt) :][: request.max_tokens] = request.forced
        self.stats.reused_tokens += shared
        self.stats.prefilled_tokens += len(request.prompt) - shared

    def release_cancelled(self) -> None:
        """Free the rows of cancelled requests."""
        for slot, request in enumerate(self.rows.requests):
            if request is not None and request.future.done():
                self.rows.release(slot)

    def postprocess(self, ids: np.ndarray, logprobs: np.ndarray) -> bool:
        """Append one sampled token to each sequence and finish requests. Returns whether any was finished."""
        rows = self.rows
        state = rows.state[: rows.num_active]
        slots = np.flatnonzero(state["cached"] == state["known"])  # the others are still prefilling
        ids, logprobs, position = ids[slots], logprobs[slots], state["known"][slots]
        if np.isnan(logprobs).any():
            raise RuntimeError("The model returned logits that are not finite. Check its weights and its precision.")
        rows.tokens[slots, position] = ids
        rows.logprobs[slots, position] = logprobs
        state["known"][slots] += 1
        self.stats.sampled_tokens += int((~state["forced"][slots]).sum())
        may_end = self.eos[ids] | (position + 1 == state["limit"][slots]) | state["watched"][slots]
        may_end |= self.stop_strings.candidates[state["stop"][slots], ids]
        finished = [self._finish(slot) for slot in slots[may_end].tolist()]
        return any(finished)

    def _finish(self, slot: int) -> bool:
        """Resolve and release a request if it is complete. Returns whether it was."""
        rows = self.rows
        request, state = rows.requests[slot], rows.state[slot]
        if request.future.done():  # cancelled by the abandon rule of another request
            return False
        sampled = slice(int(state["start"]), int(state["known"]))
        token_ids, logprobs = rows.tokens[slot, sampled].tolist(), rows.logprobs[slot, sampled].tolist()
        try:
            reason = self._finish_reason(request, token_ids, logprobs)
        except Exception as error:  # the caller's abandon rule failed, which must not end other requests
            request.future.set_exception(error)
        else:
            if reason is None:
                return False
            request.future.set_result(Generation(token_ids, logprobs, reason))
        rows.release(slot)
        return True

    def _finish_reason(
        self, request: Request, token_ids: list[int], logprobs: list[float]
    ) -> Literal["eos", "stop", "length", "abandoned"] | None:
        if self.eos[token_ids[-1]] and request.forced is None:
            return "eos"
        if self.stop_strings.completed(request.stop, token_ids):
            return "stop"
        if len(token_ids) == request.max_tokens:
            return "length"
        if request.abandon is not None and request.abandon(token_ids, logprobs):
            return "abandoned"
        return None

    def abort(self, error: Exception | None = None) -> None:
        """Fail all requests with `error`, or cancel them, and clear the rows. No effect if there are none."""
        requests = [request for request in (*self.rows.requests, *self.waiting) if request is not None]
        for request in requests:
            if request.future.done() or request.future.get_loop().is_closed():
                continue
            if error is None:
                request.future.cancel()
            else:
                request.future.set_exception(error)
        if requests:
            self.waiting.clear()
            self.rows.clear()
