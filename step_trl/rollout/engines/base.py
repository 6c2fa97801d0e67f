"""Interface between rollouts and engines: one asynchronous method."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from transformers import PreTrainedTokenizerBase


AbandonRule = Callable[[Sequence[int], Sequence[float]], bool]
# A task that waits for another task's call makes its own call a few turns of the event loop after the result.
SETTLING_TURNS = 8


@dataclass(frozen=True)
class Generation:
    """
    Tokens sampled by one call of an engine.

    Attributes:
        token_ids (`list[int]`):
            Sampled tokens, including EOS. With a stop string, the last token is the one that completes it, and its
            text may continue, as in `"Wait,"`.
        logprobs (`list[float]`):
            Log-probability of each token under the distribution from which it was sampled (after temperature, top-k,
            top-p and min-p). For greedy decoding, under the distribution of the model at temperature 1.
        finish_reason (`"eos"`, `"stop"`, `"length"` or `"abandoned"`):
            What ended the call: EOS, a stop string, `max_tokens`, or `abandon`.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["eos", "stop", "length", "abandoned"]


@dataclass(frozen=True)
class PromptImages:
    """
    The images of some prompts.

    Attributes:
        images (`Sequence[Sequence[PIL.Image.Image] | None]`):
            The images of each prompt.
        fields (`Mapping[str, Any]`):
            What the processor returns for all of them beside token ids, such as `pixel_values`.
        token_id (`int`):
            The id of the image token, which the prompts have in the places of images.
    """

    images: Sequence[Sequence[Any] | None]
    fields: Mapping[str, Any]
    token_id: int

    @classmethod
    def of(cls, processor: Any, images: Sequence[Sequence[Any] | None], fields: Mapping[str, Any]) -> PromptImages:
        """Return the images of prompts of a vision-language model's processor, which knows the image token."""
        return cls(images, fields, processor.image_token_id)


class Engine(Protocol):
    """A source of tokens with the policy's `tokenizer`. Cancelling a call stops its sampling."""

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
                Maximum number of tokens to sample, at least 1.
            stop (`Sequence[str]`, *optional*):
                Stop strings. The first one in the text sampled by this call ends it.
            temperature (`float`, *optional*, defaults to `1.0`):
                Sampling temperature. `0.0` decodes greedily.
            top_p (`float`), top_k (`int`, `0` for off), min_p (`float`):
                As in vLLM and transformers.
            seed (`int`, *optional*):
                Seed that makes the call reproducible, independently of concurrent calls.
            abandon (`Callable[[Sequence[int], Sequence[float]], bool]`, *optional*):
                Called with the tokens and log-probabilities so far, after each token or each piece of several tokens.
                `True` ends the call with `finish_reason="abandoned"`.
            ahead (`bool`, *optional*, defaults to `False`):
                Hint: if a stop string ends this call, the next call with `ahead` will most likely continue there with
                the same sampling parameters. In a rollout ([`Engine.for_rollout`]) the engine may continue sampling at
                once and use these tokens for that call, ignoring its `seed`.
        """
        ...

    async def logprobs_of(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        """
        Return the model's log-probability of each given token that continues `prompt_ids`, at temperature 1.

        Args:
            prompt_ids (`Sequence[int]`):
                The tokens before, at least one.
            token_ids (`Sequence[int]`):
                The continuation, at least one token. An EOS token is one like any other.

        Raises:
            `ValueError`: If the engine does not support this.
        """
        raise ValueError(
            f"logprobs_of: {type(self).__name__} does not support it. Sample in process or with vLLM, or add this "
            "method to the engine."
        )

    def with_images(self, prompts: Sequence[Sequence[int]], images: PromptImages) -> list[list[int]]:
        """
        Return prompts for this engine in which images have ids of their own. They are valid until the next call.

        Args:
            prompts (`Sequence[Sequence[int]]`):
                Token ids, as the processor returns them.
            images ([`PromptImages`]):
                The images of the prompts.

        Raises:
            `ValueError`: If the engine or its model does not support images.
        """
        raise ValueError(
            f"images: {type(self).__name__} does not support them. Sample in process, or on vLLM servers with "
            "vllm_mode='server'."
        )

    @asynccontextmanager
    async def for_rollout(self, prompt_ids: Sequence[int]) -> AsyncIterator[Engine]:
        """
        Yield the engine for all calls of one rollout, which continue `prompt_ids`.

        An engine over several servers keeps these calls on one server, where completions of one prompt share a prefix
        cache. At the end, tokens that were sampled ahead are dropped. Other engines need not override this.
        """
        yield self


async def let_others_run(turns: int) -> None:
    """Yield to the other tasks of the event loop `turns` times."""
    for _ in range(turns):
        await asyncio.sleep(0)


def check_call(prompt_ids: Sequence[int], max_tokens: int, stop: Sequence[str], temperature: float) -> None:
    """Raise `ValueError` for arguments of [`Engine.generate`] that no engine accepts."""
    if len(prompt_ids) < 1:
        raise ValueError("prompt_ids: is empty. Pass at least one token, such as the BOS token.")
    if max_tokens < 1:
        raise ValueError(f"max_tokens: {max_tokens} samples nothing. Set it to 1 or more.")
    if isinstance(stop, str) or "" in stop:
        raise ValueError(f"stop: {stop!r} is not a sequence of non-empty strings. Pass for example ('Wait',).")
    if temperature < 0:
        raise ValueError(f"temperature: {temperature} is negative. Set it to 0 (greedy) or more.")


def check_length(prompt_length: int, max_tokens: int, max_length: int, limit: str) -> None:
    """Raise `ValueError` if prompt and completion together exceed `max_length`, which is called `limit`."""
    if prompt_length + max_tokens > max_length:
        raise ValueError(
            f"max_tokens: {max_tokens} after a prompt of {prompt_length} tokens exceeds {limit} of {max_length}. Set "
            f"it to at most {max_length - prompt_length}."
        )
