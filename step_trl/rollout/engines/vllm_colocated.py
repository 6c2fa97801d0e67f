"""
Engine over a vLLM model in this process, as TRL's `vllm_mode="colocate"` creates it.

Requests are added and aborted between two steps of vLLM. A request that a stop string or an `abandon` rule ends is
aborted before the next step, so that no further tokens are sampled for it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from transformers import PreTrainedTokenizerBase

from ..event_loop import gather
from .base import SETTLING_TURNS, AbandonRule, Engine, Generation, check_call, check_length, let_others_run
from .stop_strings import StopStrings
from .vllm_answers import Choice, Sampled, TokenLogprobs


if TYPE_CHECKING:
    from vllm import LLM, RequestOutput
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput


@dataclass(eq=False)
class _Request:
    """One call of `generate`, or one that asks for the log-probability of a token instead of the sampled one's."""

    sampled: Sampled
    abandon: AbandonRule | None
    future: asyncio.Future[Generation]
    asked: int | None = None

    def add(self, output: CompletionOutput) -> Generation | None:
        """Add the tokens of one step. Returns the generation once it is complete."""
        ids = list(output.token_ids)
        steps = cast("list[dict[int, Logprob]]", output.logprobs or [])
        asked = ids if self.asked is None else [self.asked]
        logprobs = TokenLogprobs([step[token_id].logprob for token_id, step in zip(asked, steps)])
        generation = self.sampled.add(Choice(ids, logprobs, output.finish_reason, output.stop_reason))
        if generation is None and self.abandon is not None:
            so_far = self.sampled.token_ids, self.sampled.logprobs
            if self.abandon(*so_far):
                return Generation(*so_far, "abandoned")
        return generation


class VLLMColocatedEngine(Engine):
    """
    Samples on a vLLM model in this process. Rollouts run between its steps.

    With tensor parallelism, all processes would have to add and abort the same requests at the same steps. So the
    model must be in one process.

    Args:
        llm ([`~vllm.LLM`]):
            Model with `logprobs_mode="processed_logprobs"`, as TRL creates it. It must not be used otherwise while
            calls are running.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy. It maps stop strings to tokens, and its EOS token ends a call.

    Example:

    ```python
    >>> llm = LLM(path, logprobs_mode="processed_logprobs", enable_prefix_caching=True)
    >>> engine = VLLMColocatedEngine(llm, tokenizer)
    >>> DynamicTruncatedRollout(engine, [ConfidenceTruncation(tokenizer)]).run([prompt_ids])
    ```
    """

    def __init__(self, llm: LLM, tokenizer: PreTrainedTokenizerBase):
        config = llm.llm_engine.vllm_config
        parts = config.parallel_config.tensor_parallel_size * config.parallel_config.pipeline_parallel_size
        if parts > 1:
            raise ValueError(f"llm: is split over {parts} processes. Use vLLM servers, or tensor_parallel_size=1.")
        if config.model_config.logprobs_mode != "processed_logprobs":
            raise ValueError(
                f"llm: its logprobs_mode is {config.model_config.logprobs_mode!r}, so its log-probabilities are not "
                "those of the sampled distribution. Create it with logprobs_mode='processed_logprobs'."
            )
        self.tokenizer = tokenizer
        self.max_length: int = config.model_config.max_model_len
        self._llm = llm.llm_engine
        # The additional id stands for those that the model has and the tokenizer lacks.
        self._stop_strings = StopStrings(tokenizer, max(tokenizer.get_vocab().values()) + 2)
        self._requests: dict[str, _Request] = {}
        self._ids = (f"rollout-{number}" for number in itertools.count())
        self._worker: asyncio.Task[None] | None = None

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
        check_call(prompt_ids, max_tokens, stop, temperature)
        check_length(len(prompt_ids), max_tokens, self.max_length, "vLLM's max_model_len")
        return await self._answer(
            prompt_ids,
            stop,
            abandon,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=None if seed is None else seed % 2**63,
            logprobs=0,  # of the sampled token only
            stop_token_ids=None if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id],
        )

    async def logprobs_of(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        check_call(prompt_ids, len(token_ids), (), 1.0)
        check_length(len(prompt_ids), len(token_ids), self.max_length, "vLLM's max_model_len")

        async def logprob_of(place: int) -> float:
            path, asked = [*prompt_ids, *token_ids[:place]], token_ids[place]
            answer = await self._answer(path, asked=asked, max_tokens=1, logprob_token_ids=[asked])
            return answer.logprobs[0]

        return await gather(map(logprob_of, range(len(token_ids))))

    async def _answer(
        self,
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        abandon: AbandonRule | None = None,
        asked: int | None = None,
        **sampling: Any,
    ) -> Generation:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(detokenize=False, output_kind=RequestOutputKind.DELTA, **sampling)
        loop, sampled = asyncio.get_running_loop(), Sampled(self._stop_strings, self._stop_strings.index(stop))
        request = _Request(sampled, abandon, loop.create_future(), asked)
        if self._worker is None or self._worker.done() or self._worker.get_loop() is not loop:
            self._end(tuple(self._requests))  # their event loop ended early
            self._worker = loop.create_task(self._work())
        request_id = next(self._ids)
        self._llm.add_request(request_id, {"prompt_token_ids": list(prompt_ids)}, params)
        self._requests[request_id] = request
        try:
            return await request.future
        finally:
            self._end([request_id])

    async def _work(self) -> None:
        """Run steps while there are requests."""
        try:
            await let_others_run(SETTLING_TURNS)
            while self._requests:
                ended = self._step()
                await let_others_run(SETTLING_TURNS if ended else 1)
        except Exception as error:
            for request in self._requests.values():
                if not request.future.done():
                    request.future.set_exception(error)
        finally:
            self._worker = None
            for request in self._requests.values():
                request.future.cancel()

    def _step(self) -> bool:
        """Sample one token of every running request. Returns whether a request finished."""
        ended: list[str] = []
        for output in cast("list[RequestOutput]", self._llm.step()):
            request = self._requests.get(output.request_id)
            generation = None if request is None else request.add(output.outputs[0])
            if request is not None and generation is not None:
                ended.append(output.request_id)
                if not request.future.done():
                    request.future.set_result(generation)
        self._end(ended)
        return bool(ended)

    def _end(self, request_ids: Sequence[str]) -> None:
        """Remove requests. vLLM aborts those that are not complete."""
        known = [request_id for request_id in request_ids if self._requests.pop(request_id, None) is not None]
        if known:
            self._llm.abort_request(known)
