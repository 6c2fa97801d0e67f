"""
The dynamic truncated rollout (Step-GRPO section 3.2): an engine and a truncation callback make Rollout records.

Each completion is a coroutine of its own: generate up to a trigger, ask the callback, go on or leave. Where the
callback wants a probe, the thought may go on beside it (speculative probing); a probe that says stop cancels the rest.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from ..steps import TriggerSegmenter
from .engines import Engine, Generation
from .truncation import THINK_END, Boundary, Exit, Probe, TruncationCallback


Outcome = Literal["exit", "declined", "abandoned"]


@dataclass(frozen=True)
class SamplingParams:
    """How the policy is sampled; the names are vLLM's. `max_tokens` is the budget of a whole completion."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


@dataclass(frozen=True)
class ProbeRecord:
    """
    One probe: `position` is the length of the path at its boundary; `confidence` is the callback's measure, `None` for
    an abandoned probe and for a callback that does not measure.
    """

    position: int
    token_ids: list[int]
    logprobs: list[float]
    outcome: Outcome
    confidence: float | None


@dataclass
class Rollout:
    """
    One completion and how it came about.

    Attributes:
        prompt_ids (`Sequence[int]`), completion_ids (`list[int]`):
            Token ids. The completion is exactly what the engine sampled plus what was injected; it ends in EOS unless
            the budget ran out.
        logprobs (`list[float]`):
            Sampling log-probability of each completion token, NaN where the token was not sampled from the policy:
            injected tokens and greedily decoded answers.
        injected (`list[bool]`):
            True for the tokens that no engine sampled.
        probes (`list[ProbeRecord]`):
            Probes in order.
        truncated (`bool`):
            Whether a callback ended the thought.
        sampled_tokens (`int`), discarded_tokens (`int`):
            Tokens that engine calls returned for this rollout, probes included; those of them that are not in
            `completion_ids`. Tokens of calls that were cancelled while they ran are in neither.
    """

    prompt_ids: Sequence[int]
    completion_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    injected: list[bool] = field(default_factory=list)
    probes: list[ProbeRecord] = field(default_factory=list)
    truncated: bool = False
    sampled_tokens: int = 0
    discarded_tokens: int = 0

    def append(self, generation: Generation, greedy: bool = False) -> None:
        self.completion_ids += generation.token_ids
        self.logprobs += [math.nan] * len(generation.token_ids) if greedy else generation.logprobs
        self.injected += [False] * len(generation.token_ids)

    def inject(self, token_ids: Sequence[int]) -> None:
        self.completion_ids += token_ids
        self.logprobs += [math.nan] * len(token_ids)
        self.injected += [True] * len(token_ids)

    def cut(self, length: int) -> None:
        """Take back the tokens from `length` on."""
        self.discarded_tokens += len(self.completion_ids) - length
        del self.completion_ids[length:], self.logprobs[length:], self.injected[length:]


class DynamicTruncatedRollout:
    """
    Samples completions that a callback may cut short.

    Args:
        engine ([`Engine`]):
            Where tokens come from.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        callback ([`TruncationCallback`], *optional*):
            Decides at its triggers; without one, rollouts are plain.
        sampling ([`SamplingParams`]):
            Budget and sampling of the policy.
        speculative (`bool`, *optional*, defaults to `True`):
            Let the thought go on while its probe runs. The result is the same, only waiting is saved.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        callback: TruncationCallback | None,
        sampling: SamplingParams,
        speculative: bool = True,
    ):
        self.engine = engine
        self.tokenizer = tokenizer
        self.callback = callback
        self.sampling = sampling
        self.speculative = speculative
        self.segmenter = TriggerSegmenter(tokenizer, callback.triggers) if callback is not None else None

    def run(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None = None) -> list[Rollout]:
        """
        Sample one completion per prompt, all at once.

        Args:
            prompts (`Sequence[Sequence[int]]`):
                Token ids of the prompts, repeated for several completions of one prompt.
            seeds (`Sequence[int]`, *optional*):
                One per prompt: its completion is then the same in any company, speculative or not.

        Returns:
            `list[Rollout]`: in the order of `prompts`.
        """
        return _run_to_end(self._gather(prompts, seeds if seeds is not None else [None] * len(prompts)))

    async def _gather(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int | None]) -> list[Rollout]:
        tasks = [
            asyncio.ensure_future(_Path(self, Rollout(prompt), seed).roll_out())
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            await _cancel(*tasks)
            raise


class _Path:
    """One rollout in the making."""

    def __init__(self, owner: DynamicTruncatedRollout, rollout: Rollout, seed: int | None):
        self.owner = owner
        self.callback = owner.callback
        self.engine = owner.engine.for_prompt(rollout.prompt_ids)
        self.rollout = rollout
        self.seed = seed
        self.watched = True

    @property
    def remaining(self) -> int:
        return self.owner.sampling.max_tokens - len(self.rollout.completion_ids)

    async def roll_out(self) -> Rollout:
        segment = await self._sample()
        while True:
            self.rollout.append(segment)
            if segment.finish_reason != "stop" or self.remaining == 0:
                return self.rollout
            boundary = self._boundary_after(segment)
            following = await (self._sample() if boundary is None else self._decide(boundary))
            if following is None:
                return self.rollout
            segment = following

    async def _decide(self, boundary: Boundary) -> Generation | None:
        """Ask the callback. Returns the next segment of the thought, or `None` where the rollout ended here."""
        assert self.callback is not None  # without one, nothing stops at a trigger
        decision = self.callback.at_boundary(boundary)
        if isinstance(decision, Probe):
            return await self._probe(self.callback, boundary, decision)
        if isinstance(decision, Exit):
            await self._leave(boundary, decision)
            return None
        self.watched = decision.watch
        return await self._sample()

    def _boundary_after(self, segment: Generation) -> Boundary | None:
        """The boundary that ends the path, or `None`: "await" and "Waiting" stop an engine but are no triggers."""
        if THINK_END in self.owner.tokenizer.decode(segment.token_ids):
            self.watched = False
            return None
        path = self.rollout.completion_ids
        # The trigger lies in the segment; the token before tells whether a letter stands in front of it.
        offset = max(0, len(path) - len(segment.token_ids) - 1)
        window = path[offset:]
        segmenter = self.owner.segmenter
        triggers = [] if segmenter is None else segmenter.occurrences(window)
        if not triggers or triggers[-1][1] != len(window):
            return None
        return Boundary(path, offset + triggers[-1][0], self.remaining, len(self.rollout.probes))

    async def _probe(self, callback: TruncationCallback, boundary: Boundary, probe: Probe) -> Generation | None:
        """Induce an answer, the thought going on beside it if speculative. Returns as `_decide`."""
        following = asyncio.ensure_future(self._sample()) if self.owner.speculative else None
        try:
            answer = await self._induce(boundary, probe)
            exit_ = callback.after_probe(boundary, probe, answer)
        except BaseException:
            await _cancel(following)
            raise
        self._record(boundary, probe, answer, exit_)
        if exit_ is None:
            return await (following or self._sample())
        await _cancel(following)
        if following is not None and not following.cancelled() and following.exception() is None:
            self.rollout.discarded_tokens += len(following.result().token_ids)  # it was done before its probe
        await self._leave(boundary, exit_, (probe, answer))
        return None

    async def _induce(self, boundary: Boundary, probe: Probe) -> Generation:
        end = len(boundary.path_ids) if probe.keep_trigger else boundary.trigger_start
        answer = await self.engine.generate(
            [*self.rollout.prompt_ids, *boundary.path_ids[:end], *probe.prompt_ids],
            max_tokens=probe.max_tokens,
            stop=probe.stop,
            temperature=0.0,
            abandon=probe.abandon,
        )
        self.rollout.sampled_tokens += len(answer.token_ids)
        return answer

    async def _leave(self, boundary: Boundary, exit_: Exit, probed: tuple[Probe, Generation] | None = None) -> None:
        """End the thought at `boundary`: keep the probe's answer, or close the thought and sample one."""
        rollout = self.rollout
        rollout.truncated, self.watched = True, False
        if not exit_.keep_trigger:
            rollout.cut(boundary.trigger_start)
        closing, greedy = exit_.closing_ids, False
        if probed is not None and exit_.keep_answer:
            probe, answer = probed
            rollout.inject(probe.prompt_ids)
            rollout.append(answer, greedy=True)
            if answer.finish_reason == "eos":
                return
            # An answer longer than the probe goes on as it began; one that ended at `</think>` needs no closing.
            greedy = probe.closes_thought
            if probe.closes_thought or answer.finish_reason == "stop":
                closing = []
        elif probed is not None:
            rollout.discarded_tokens += len(probed[1].token_ids)
        rollout.inject(closing[: self.remaining])
        if self.remaining:
            rollout.append(await self._sample(greedy), greedy)

    async def _sample(self, greedy: bool = False) -> Generation:
        """Sample on from the end of the path, up to the next trigger while the thought is watched."""
        path, sampling = self.rollout.completion_ids, self.owner.sampling
        segment = await self.engine.generate(
            [*self.rollout.prompt_ids, *path],
            max_tokens=self.remaining,
            stop=tuple(self.callback.triggers) if self.callback is not None and self.watched else (),
            temperature=0.0 if greedy else sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            # By position, so that a call has the same seed whatever was called and cancelled before it.
            seed=None if self.seed is None else (self.seed * 1_000_003 + len(path)) % 2**63,
        )
        self.rollout.sampled_tokens += len(segment.token_ids)
        return segment

    def _record(self, boundary: Boundary, probe: Probe, answer: Generation, exit_: Exit | None) -> None:
        outcome: Outcome = "declined" if exit_ is None else "exit"
        confidence = probe.confidence(answer) if probe.confidence is not None else None
        if answer.finish_reason == "abandoned":
            outcome, confidence = "abandoned", None
        self.rollout.probes.append(
            ProbeRecord(len(boundary.path_ids), answer.token_ids, answer.logprobs, outcome, confidence)
        )
        if exit_ is None:
            self.rollout.discarded_tokens += len(answer.token_ids)


async def _cancel(*tasks: asyncio.Future | None) -> None:
    """Cancel the tasks and wait until each has stopped."""
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


def _run_to_end(coroutine: Coroutine[Any, Any, list[Rollout]]) -> list[Rollout]:
    """`asyncio.run`, also where a loop runs already (a notebook's): then on a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(asyncio.run, coroutine).result()
