"""What the rollout asks of an engine: one asynchronous method."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

from transformers import PreTrainedTokenizerBase


AbandonRule = Callable[[Sequence[int], Sequence[float]], bool]
# A call made by a task that waits for another task's call comes a few turns of the event loop after the result.
SETTLING_TURNS = 8


@dataclass(frozen=True)
class Generation:
    """
    What one call of an engine sampled.

    Attributes:
        token_ids (`list[int]`):
            Sampled tokens. The EOS token is included when sampled. After a stop string the list ends with the token
            that completes the stop string (its text may go on behind the stop string, as in `"Wait,"`).
        logprobs (`list[float]`):
            Log-probability of each token under the distribution it was sampled from (after temperature, top-k, top-p
            and min-p); for greedy decoding, under the model's own distribution (temperature 1).
        finish_reason (`"eos"`, `"stop"`, `"length"` or `"abandoned"`):
            EOS sampled, a stop string completed, `max_tokens` reached, or ended by `abandon`.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["eos", "stop", "length", "abandoned"]


class Engine(Protocol):
    """
    A source of tokens. Cancelling a call stops its work.

    Attributes:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
    """

    tokenizer: PreTrainedTokenizerBase

    async def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | None = None,
        abandon: AbandonRule | None = None,
        ahead: bool = False,
    ) -> Generation:
        """
        Sample a continuation of `prompt_ids`.

        Args:
            prompt_ids (`Sequence[int]`):
                Prompt and path so far, at least one token.
            max_tokens (`int`):
                Most tokens to sample, at least 1.
            stop (`Sequence[str]`, *optional*):
                Strings that end the call as soon as the text sampled in this call contains one of them.
            temperature (`float`, *optional*, defaults to `1.0`):
                `0.0` decodes greedily.
            top_p (`float`), top_k (`int`, `0` for off), min_p (`float`):
                As in vLLM and transformers.
            seed (`int`, *optional*):
                Makes the call reproducible whatever else runs beside it.
            abandon (`Callable[[Sequence[int], Sequence[float]], bool]`, *optional*):
                Asked with the tokens and log-probabilities so far, after each token (or after each few, where tokens
                arrive in pieces); `True` ends the call with `finish_reason="abandoned"`.
            ahead (`bool`, *optional*, defaults to `False`):
                Announces that, if a stop string ends this call, the next one with `ahead` will most likely go on from
                there with the same sampling. In a rollout ([`Engine.for_rollout`]) an engine may then sample on, and
                answer that call with it, whose own `seed` does not count. Engines may ignore this.
        """
        ...

    @asynccontextmanager
    async def for_rollout(self, prompt_ids: Sequence[int]) -> AsyncIterator[Engine]:
        """
        The engine for all calls of one rollout, which continue `prompt_ids`.

        An engine over several servers keeps them on one server, where completions of one prompt share a prefix cache.
        What was sampled ahead ends with it. Others need not define this.
        """
        yield self


async def let_others_run(turns: int) -> None:
    """For engines in the loop of their callers: a few turns of the event loop."""
    for _ in range(turns):
        await asyncio.sleep(0)


def check_call(prompt_ids: Sequence[int], max_tokens: int, stop: Sequence[str], temperature: float) -> None:
    """Raise `ValueError` for arguments of [`Engine.generate`] that no engine can serve."""
    if len(prompt_ids) < 1:
        raise ValueError("prompt_ids: is empty. Pass at least one token, such as the BOS token.")
    if max_tokens < 1:
        raise ValueError(f"max_tokens: {max_tokens} asks for nothing. Set it to 1 or more.")
    if isinstance(stop, str) or "" in stop:
        raise ValueError(f"stop: {stop!r} is no sequence of non-empty strings. Pass for instance ('Wait',).")
    if temperature < 0:
        raise ValueError(f"temperature: {temperature} is negative. Set it to 0 (greedy) or more.")
