"""
The dynamic truncated rollout (Step-GRPO section 3.2): an engine and truncation callbacks make Rollout records.

Each completion is a coroutine of its own: generate up to a boundary, ask the callbacks, go on or leave. Where a
callback wants a probe, the thought may go on beside it (speculative probing); a probe that says stop cancels the rest.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

from ..steps import DelimiterSegmenter, TriggerSegmenter
from ..text import THINK_END
from .engines import Engine, Generation
from .event_loop import cancel, rare_garbage_collections, run_to_end
from .records import Rollout, SamplingParams
from .truncation import Boundary, Decision, Exit, GoOn, Outcome, Probe, ProbeRecord, TruncationCallback
from .watch import Watch


# One object per token id, however often it is in completions.
_TOKEN_IDS: dict[int, int] = {}


class DynamicTruncatedRollout:
    """
    Samples completions that callbacks may cut short.

    Args:
        engine ([`Engine`]):
            Where tokens come from.
        callbacks (`Sequence[TruncationCallback]`, *optional*):
            Asked in this order at the boundaries that each names; the first that says stop decides. Without one,
            rollouts are plain. A trigger word across a position that another callback names is not seen.
        sampling ([`SamplingParams`], *optional*):
            Budget and sampling of the policy; 512 tokens at temperature 1 by default.
        speculative (`bool`, *optional*, defaults to `True`):
            Let the thought go on while its probe runs. The result is the same, only waiting is saved; but a
            [`VLLMServerEngine`] that samples ahead draws other tokens for the same seeds.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The policy's tokenizer, by default that of the engine.
        max_in_flight (`int`, *optional*):
            Most rollouts at once, by default all; others begin as these end. A server that runs fewer requests at once
            than it is sent lets probes wait behind thoughts, and what a late probe would have saved is sampled.

    Attributes:
        sampled_tokens (`int`):
            Tokens that engine calls have returned so far, of all runs, probes included.

    Example:

    ```python
    >>> engine = TransformersEngine(model, tokenizer)
    >>> deer = DynamicTruncatedRollout(engine, [ConfidenceTruncation(tokenizer)], SamplingParams(max_tokens=256))
    >>> rollout = deer.run([prompt_ids])[0]
    >>> tokenizer.decode(rollout.completion_ids), rollout.truncated
    ```
    """

    def __init__(
        self,
        engine: Engine,
        callbacks: Sequence[TruncationCallback] = (),
        sampling: SamplingParams = SamplingParams(),
        speculative: bool = True,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_in_flight: int | None = None,
    ):
        if max_in_flight is not None and max_in_flight < 1:
            raise ValueError(f"max_in_flight: {max_in_flight} lets no rollout begin. Set it to 1 or more, or to None.")
        self.engine = engine
        self.callbacks = list(callbacks)
        self.sampling = sampling
        self.speculative = speculative
        self.max_in_flight = max_in_flight
        self.sampled_tokens = 0
        self.tokenizer = engine.tokenizer if tokenizer is None else tokenizer
        self.segmenters = [
            TriggerSegmenter(self.tokenizer, callback.triggers) if callback.triggers else None
            for callback in self.callbacks
        ]
        self.think_end = DelimiterSegmenter(self.tokenizer, THINK_END)

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int] | None = None,
        on_rollout: Callable[[int, Rollout], None] | None = None,
        budgets: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """
        Sample one completion per prompt, all at once.

        Args:
            prompts (`Sequence[Sequence[int]]`):
                Token ids of the prompts, repeated for several completions of one prompt.
            seeds (`Sequence[int]`, *optional*):
                One per prompt: its completion is then the same in any company.
            on_rollout (`Callable[[int, Rollout], None]`, *optional*):
                Told each rollout as it ends, with the place of its prompt.
            budgets (`Sequence[int]`, *optional*):
                Most tokens of each completion, where they differ; by default `sampling.max_tokens`.

        Returns:
            `list[Rollout]`: in the order of `prompts`.
        """
        with rare_garbage_collections():
            own_seeds = [None] * len(prompts) if seeds is None else seeds
            most = [self.sampling.max_tokens] * len(prompts) if budgets is None else budgets
            return run_to_end(self._gather(prompts, own_seeds, most, on_rollout))

    async def _gather(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int | None],
        budgets: Sequence[int],
        on_rollout: Callable[[int, Rollout], None] | None = None,
    ) -> list[Rollout]:
        slots = asyncio.Semaphore(self.max_in_flight or max(1, len(prompts)))

        async def in_slot(place: int, prompt: Sequence[int], seed: int | None, budget: int) -> Rollout:
            async with slots:
                rollout = await _Path(self, prompt, seed, budget).roll_out()
            if on_rollout is not None:
                on_rollout(place, rollout)
            return rollout

        rows = zip(prompts, seeds, budgets, strict=True)
        tasks = [asyncio.ensure_future(in_slot(place, *row)) for place, row in enumerate(rows)]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            await cancel(*tasks)
            raise


class _Path:
    """
    One rollout in the making.

    Its tokens are in arrays until it ends: Python's garbage collector visits each element of every list, again and
    again, and thousands of rollouts of thousands of tokens are under way at once.
    """

    def __init__(self, owner: DynamicTruncatedRollout, prompt_ids: Sequence[int], seed: int | None, budget: int):
        self.owner = owner
        self.engine = owner.engine
        self.prompt = array("q", prompt_ids)
        self.rollout = rollout = Rollout(prompt_ids, cast("list[int]", array("q")), injected=cast("list", array("b")))
        self.seed = seed
        self.budget = budget
        self.watches = [
            Watch(callback, segmenter, iter(callback.positions(rollout.prompt_ids, budget, seed)))
            for callback, segmenter in zip(owner.callbacks, owner.segmenters, strict=True)
        ]

    @property
    def path(self) -> array[int]:
        return cast("array[int]", self.rollout.completion_ids)

    @property
    def remaining(self) -> int:
        return self.budget - len(self.rollout.completion_ids)

    async def roll_out(self) -> Rollout:
        async with self.owner.engine.for_rollout(self.rollout.prompt_ids) as self.engine:
            segment: Generation | None = await self._sample()
            while segment is not None:
                self.rollout.append(segment)
                if self.rollout.ended or self.remaining == 0:
                    break
                segment = await self._decide(self._boundaries_after(segment))
        self.rollout.completion_ids = [_TOKEN_IDS.setdefault(id_, id_) for id_ in self.rollout.completion_ids]
        self.rollout.injected = list(map(bool, self.rollout.injected))
        return self.rollout

    def _boundaries_after(self, segment: Generation) -> list[tuple[Watch, Boundary]]:
        """Who wants to be asked at the end of the path. Nobody, once the thought has ended."""
        new_tokens = len(segment.token_ids)
        if self.watches and self.owner.think_end.boundaries(
            self.rollout.completion_ids[-new_tokens - len(THINK_END) :]
        ):
            self.watches = []
        asked = [(watch, watch.boundary(self.rollout, new_tokens, self.remaining)) for watch in self.watches]
        return [(watch, boundary) for watch, boundary in asked if boundary is not None]

    async def _decide(self, asked: list[tuple[Watch, Boundary]]) -> Generation | None:
        """Ask the callbacks. Returns the next segment of the thought, or `None` where the rollout ended here."""
        decisions: list[tuple[Watch, Boundary, Decision]] = []
        for watch, boundary in asked:
            decision = watch.callback.at_boundary(boundary)
            watch.number += 1
            decisions.append((watch, boundary, decision))
            if isinstance(decision, GoOn) and not decision.watch:
                self.watches.remove(watch)
        # Only now: what the thought is watched for must not depend on whether it goes on beside a probe.
        probing = any(isinstance(decision, Probe) for *_, decision in decisions)
        leaving = any(isinstance(decision, Exit) for *_, decision in decisions)
        following = (
            asyncio.ensure_future(self._sample()) if self.owner.speculative and probing and not leaving else None
        )
        try:
            for watch, boundary, decision in decisions:
                if isinstance(decision, Exit):
                    await self._leave(boundary, decision)
                    return None
                if isinstance(decision, Probe):
                    answer = await self._induce(boundary, decision)
                    exit_ = watch.callback.after_probe(boundary, decision, answer)
                    self._record(watch, boundary, decision, answer, exit_)
                    if exit_ is not None:
                        await self._discard(following)
                        await self._leave(boundary, exit_, (decision, answer))
                        return None
        except BaseException:
            await cancel(following)
            raise
        return await (following or self._sample())

    async def _discard(self, following: asyncio.Future[Generation] | None) -> None:
        await cancel(following)
        if following is not None and not following.cancelled() and following.exception() is None:
            self.rollout.discarded_tokens += len(following.result().token_ids)  # it was done before its probe

    async def _induce(self, boundary: Boundary, probe: Probe) -> Generation:
        end = len(boundary.path_ids) if probe.keep_trigger else boundary.trigger_start
        answer = await self.engine.generate(
            self.prompt + self.path[:end] + array("q", probe.prompt_ids),
            max_tokens=probe.max_tokens,
            stop=probe.stop,
            temperature=0.0,
            abandon=probe.abandon,
        )
        self._count(answer)
        return answer

    async def _leave(self, boundary: Boundary, exit_: Exit, probed: tuple[Probe, Generation] | None = None) -> None:
        """End the thought at `boundary`: keep the probe's answer, or close the thought and sample one."""
        rollout = self.rollout
        rollout.truncated, self.watches = True, []
        if not exit_.keep_trigger:
            rollout.cut(boundary.trigger_start)
        closing, greedy = exit_.closing_ids, False
        if probed is not None and exit_.keep_answer:
            probe, answer = probed
            rollout.inject(probe.prompt_ids)
            rollout.append(answer, greedy=True)
            if rollout.ended:
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
        """Sample on from the end of the path, up to the next boundary that is watched for."""
        path, sampling = self.path, self.owner.sampling
        positions = [watch.next_position for watch in self.watches if watch.next_position is not None]
        stops = dict.fromkeys(word for watch in self.watches for word in watch.callback.triggers)
        segment = await self.engine.generate(
            self.prompt + path,
            max_tokens=min([self.remaining, *(position - len(path) for position in positions)]),
            stop=tuple(stops),
            temperature=0.0 if greedy else sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            # By position, so that a call has the same seed whatever was called and cancelled before it.
            seed=None if self.seed is None else (self.seed * 1_000_003 + len(path)) % 2**63,
            ahead=self.owner.speculative and bool(self.owner.callbacks),
        )
        self._count(segment)
        return segment

    def _count(self, generation: Generation) -> None:
        self.rollout.sampled_tokens += len(generation.token_ids)
        self.owner.sampled_tokens += len(generation.token_ids)

    def _record(self, watch: Watch, boundary: Boundary, probe: Probe, answer: Generation, exit_: Exit | None) -> None:
        outcome: Outcome = "declined" if exit_ is None else "exit"
        confidence = probe.confidence(answer) if probe.confidence is not None else None
        if answer.finish_reason == "abandoned":
            outcome, confidence = "abandoned", None
        record = ProbeRecord(len(boundary.path_ids), answer.token_ids, answer.logprobs, outcome, confidence)
        watch.probes.append(record)
        self.rollout.probes.append(record)
        if exit_ is None:
            self.rollout.discarded_tokens += len(answer.token_ids)
