"""
Dynamic truncated rollout (Step-GRPO section 3.2): an engine samples completions, and truncation callbacks end them.

Each completion is a coroutine: it samples to the next boundary, asks the callbacks, and continues or exits. While a
probe runs, the thought may continue (speculative probing). A probe that leads to an exit cancels that continuation.
"""

from __future__ import annotations

import asyncio
import copy
from array import array
from collections.abc import Callable, Iterable, Sequence

from ..steps import DelimiterSegmenter, TriggerSegmenter
from ..text import THINK_END
from .engines import Engine, Generation
from .event_loop import InBackground, cancel, gather, rare_garbage_collections, run_to_end
from .records import Rollout, RolloutBuilder, SamplingParams
from .settled import OnTokens, SettledTokens
from .truncation import Boundary, Decision, Exit, GoOn, Outcome, Probe, ProbeRecord, TruncationCallback


class DynamicTruncatedRollout:
    """
    Samples completions that callbacks may truncate.

    Args:
        engine ([`Engine`]):
            Source of tokens.
        callbacks (`Sequence[TruncationCallback]`, *optional*):
            Asked in this order at the boundaries that each of them names. The first one that exits decides. Without
            callbacks, rollouts are plain. A trigger word that spans the position of another callback is not detected.
        sampling ([`SamplingParams`], *optional*):
            Budget and sampling of the policy, by default 512 tokens at temperature 1.
        speculative (`bool`, *optional*, defaults to `True`):
            Continue the thought while its probe runs. This saves waiting and changes no result, except that a
            [`VLLMServerEngine`] that samples ahead draws other tokens for the same seeds.
        max_in_flight (`int`, *optional*):
            Maximum number of concurrent rollouts, by default all. A server that gets more requests than it runs
            concurrently delays probes, and late probes save fewer tokens.

    Attributes:
        sampled_tokens (`int`):
            Tokens that engine calls have returned so far, in all runs, probes included.

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
        self._segmenters: dict[tuple[str, ...], TriggerSegmenter] = {}
        self.segmenters = self._segmenters_of(self.callbacks)
        self.think_end = DelimiterSegmenter(engine.tokenizer, THINK_END)
        self.shared_ids: dict[int, int] = {}  # see RolloutBuilder.build

    def _segmenters_of(self, callbacks: Sequence[TruncationCallback]) -> list[TriggerSegmenter | None]:
        for triggers in {tuple(callback.triggers) for callback in callbacks} - {(), *self._segmenters}:
            self._segmenters[triggers] = TriggerSegmenter(self.engine.tokenizer, triggers)
        return [self._segmenters.get(tuple(callback.triggers)) for callback in callbacks]

    def with_options(
        self, callbacks: Sequence[TruncationCallback], sampling: SamplingParams
    ) -> DynamicTruncatedRollout:
        """
        Return this rollout with other callbacks and another sampling.

        Both share the segmenters of triggers, which take long to build for a large vocabulary.
        """
        other = copy.copy(self)
        other.callbacks, other.sampling, other.sampled_tokens = list(callbacks), sampling, 0
        other.segmenters = self._segmenters_of(other.callbacks)
        return other

    async def sample(
        self,
        prompt_ids: Sequence[int],
        seed: int | None = None,
        budget: int | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Rollout:
        """
        Sample one completion in the running event loop. Cancelling it stops all of its sampling.

        Args:
            prompt_ids (`Sequence[int]`), seed (`int`, *optional*), budget (`int`, *optional*):
                As in [`run`], which samples the same completion.
            on_tokens (`Callable[[list[int]], bool | None]`, *optional*):
                Called with the next tokens of the completion as soon as they are certain to stay in it. Tokens after a
                boundary wait until it is decided. `True` ends the completion with what has been sampled so far.

        Raises:
            [`EngineUnavailableError`]: a call was interrupted after some of its tokens had been passed to `on_tokens`,
                and the engine repeated it with another result.
        """
        budget = self.sampling.max_tokens if budget is None else budget
        return await _RunningRollout(self, prompt_ids, seed, budget, on_tokens).run()

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int | None] | None = None,
        on_rollout: Callable[[int, Rollout], None] | None = None,
        budgets: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """
        Sample one completion per prompt, concurrently.

        Args:
            prompts (`Sequence[Sequence[int]]`):
                Token ids of the prompts. Repeat a prompt to sample several completions of it.
            seeds (`Sequence[int]`, *optional*):
                One seed per prompt. A seeded completion does not depend on the rest of the batch.
            on_rollout (`Callable[[int, Rollout], None]`, *optional*):
                Called with the index of the prompt and the rollout when a rollout ends.
            budgets (`Sequence[int]`, *optional*):
                Maximum number of tokens of each completion, by default `sampling.max_tokens`.

        Returns:
            `list[Rollout]`: in the order of `prompts`.
        """
        return run_to_end(self._gather(prompts, seeds, on_rollout, budgets))

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int | None] | None = None,
        on_rollout: Callable[[int, Rollout], None] | None = None,
    ) -> InBackground[list[Rollout]]:
        """
        Begin to sample one completion per prompt in another thread, which calls `on_rollout`.

        The arguments are those of [`run`]. The engine must be one over servers, as one in process is not made for
        threads.
        """
        return InBackground(self._gather(prompts, seeds, on_rollout, None))

    async def _gather(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int | None] | None,
        on_rollout: Callable[[int, Rollout], None] | None,
        budgets: Sequence[int] | None,
    ) -> list[Rollout]:
        own_seeds = [None] * len(prompts) if seeds is None else seeds
        own_budgets = [self.sampling.max_tokens] * len(prompts) if budgets is None else budgets
        rows = list(zip(prompts, own_seeds, own_budgets, strict=True))
        slots = asyncio.Semaphore(self.max_in_flight or max(1, len(rows)))

        async def run_in_slot(index: int) -> Rollout:
            async with slots:
                rollout = await _RunningRollout(self, *rows[index]).run()
            if on_rollout is not None:
                on_rollout(index, rollout)
            return rollout

        with rare_garbage_collections():
            return await gather(map(run_in_slot, range(len(rows))))


class _BoundaryDetector:
    """Finds the boundaries of one callback in one rollout."""

    def __init__(self, callback: TruncationCallback, segmenter: TriggerSegmenter | None, positions: Iterable[int]):
        self.callback = callback
        self.segmenter = segmenter
        self.positions = iter(positions)
        self.next_position: int | None = 0
        self.num_boundaries = 0
        self.probes: list[ProbeRecord] = []
        self._advance_position(0)

    def detect(self, rollout: RolloutBuilder, new_tokens: int, remaining: int) -> Boundary | None:
        """Return the boundary at the end of the path, if there is one."""
        path_ids = rollout.completion_ids
        trigger_start = self._trigger_start(path_ids, new_tokens)
        at_position = self.next_position == len(path_ids)
        self._advance_position(len(path_ids))
        if trigger_start is None and not at_position:
            return None
        start = len(path_ids) if trigger_start is None else trigger_start
        return Boundary(rollout.prompt_ids, path_ids, start, remaining, self.num_boundaries, self.probes)

    def _advance_position(self, length: int) -> None:
        while self.next_position is not None and self.next_position <= length:
            self.next_position = next(self.positions, None)

    def _trigger_start(self, path_ids: array[int], new_tokens: int) -> int | None:
        """First token of the trigger that ends the path. "await" and "Waiting" stop an engine but are no triggers."""
        if self.segmenter is None:
            return None
        # The trigger lies in the new tokens. The token before them may end in a letter.
        offset = max(0, len(path_ids) - new_tokens - 1)
        triggers = self.segmenter.occurrences(path_ids[offset:])
        return offset + triggers[-1][0] if triggers and offset + triggers[-1][1] == len(path_ids) else None


class _RunningRollout:
    """Samples one rollout: segments of the thought, and at their boundaries the probes and the exit."""

    def __init__(
        self,
        owner: DynamicTruncatedRollout,
        prompt_ids: Sequence[int],
        seed: int | None,
        budget: int,
        on_tokens: OnTokens | None = None,
    ):
        self.owner = owner
        self.engine = owner.engine
        self.prompt = array("q", prompt_ids)
        self.rollout = RolloutBuilder(prompt_ids)
        self.settled = None if on_tokens is None else SettledTokens(self.rollout, on_tokens)
        self.seed = seed
        self.budget = budget
        self.detectors = [
            _BoundaryDetector(callback, segmenter, callback.positions(prompt_ids, budget, seed))
            for callback, segmenter in zip(owner.callbacks, owner.segmenters, strict=True)
        ]

    @property
    def remaining(self) -> int:
        return self.budget - len(self.rollout.completion_ids)

    async def run(self) -> Rollout:
        async with self.owner.engine.for_rollout(self.rollout.prompt_ids) as self.engine:
            self._settle()
            segment: Generation | None = await self._sample()
            while segment is not None:
                self._append(segment)
                if self.rollout.ended or self.remaining == 0 or self._stopped:
                    break
                segment = await self._next_segment(self._detect_boundaries(len(segment.token_ids)))
        if self.settled is not None:
            self.settled.end()
        return self.rollout.build(self.owner.shared_ids)

    @property
    def _stopped(self) -> bool:
        return self.settled is not None and self.settled.stopped

    def _append(self, segment: Generation, greedy: bool = False) -> None:
        (self.rollout if self.settled is None else self.settled).append(segment, greedy)

    def _detect_boundaries(self, new_tokens: int) -> list[tuple[_BoundaryDetector, Boundary]]:
        """Find the boundaries at the end of the path. There are none once the thought has ended."""
        tail = self.rollout.completion_ids[-new_tokens - len(THINK_END) :]
        if self.detectors and self.owner.think_end.boundaries(tail):
            self.detectors = []
        found = [(detector, detector.detect(self.rollout, new_tokens, self.remaining)) for detector in self.detectors]
        return [(detector, boundary) for detector, boundary in found if boundary is not None]

    async def _next_segment(self, boundaries: list[tuple[_BoundaryDetector, Boundary]]) -> Generation | None:
        """Ask the callbacks. Returns the next segment of the thought, or `None` if the rollout has ended."""
        if self.settled is not None and boundaries:
            self.settled.await_decision(min(boundary.trigger_start for _, boundary in boundaries))
        decisions: list[tuple[_BoundaryDetector, Boundary, Decision]] = []
        for detector, boundary in boundaries:
            decision = detector.callback.at_boundary(boundary)
            detector.num_boundaries += 1
            decisions.append((detector, boundary, decision))
            if isinstance(decision, GoOn) and not decision.watch:
                self.detectors.remove(detector)
        # After the loop: the stop strings of the segment must be the same with and without speculation.
        probing = any(isinstance(decision, Probe) for *_, decision in decisions)
        exiting = any(isinstance(decision, Exit) for *_, decision in decisions)
        speculative = self.owner.speculative and probing and not exiting
        following = asyncio.ensure_future(self._sample()) if speculative else None
        try:
            for detector, boundary, decision in decisions:
                if isinstance(decision, Exit):
                    await self._exit(boundary, decision)
                    return None
                if isinstance(decision, Probe):
                    answer = await self._probe(boundary, decision)
                    exit_ = detector.callback.after_probe(boundary, decision, answer)
                    self._record_probe(detector, boundary, decision, answer, exit_)
                    if exit_ is not None:
                        await self._discard(following)
                        await self._exit(boundary, exit_, (decision, answer))
                        return None
            self._settle()
        except BaseException:
            await cancel(following)
            raise
        if self._stopped and following is None:
            return None
        return await (following or self._sample())  # what goes on beside its probe ends with its next tokens

    def _settle(self) -> None:
        """Let go of the tokens that waited for a decision. Only triggers of later boundaries may be cut off."""
        if self.settled is not None:
            self.settled.segmenters = [one.segmenter for one in self.detectors if one.segmenter is not None]
            self.settled.go_on()

    async def _discard(self, following: asyncio.Future[Generation] | None) -> None:
        await cancel(following)
        if self.settled is not None:
            self.settled.discard()
        if following is not None and not following.cancelled() and following.exception() is None:
            self.rollout.discarded_tokens += len(following.result().token_ids)  # it ended before its probe

    async def _probe(self, boundary: Boundary, probe: Probe) -> Generation:
        end = len(boundary.path_ids) if probe.keep_trigger else boundary.trigger_start
        answer = await self.engine.generate(
            self.prompt + self.rollout.completion_ids[:end] + array("q", probe.prompt_ids),
            max_tokens=probe.max_tokens,
            stop=probe.stop,
            temperature=0.0,
            abandon=probe.abandon,
        )
        self._count(answer)
        return answer

    async def _exit(self, boundary: Boundary, exit_: Exit, probed: tuple[Probe, Generation] | None = None) -> None:
        """End the thought at `boundary`: keep the probe's answer, or close the thought and sample an answer."""
        rollout = self.rollout
        rollout.truncated, self.detectors = True, []
        if not exit_.keep_trigger:
            rollout.cut(boundary.trigger_start)
        closing, greedy = exit_.closing_ids, False
        if probed is not None and exit_.keep_answer:
            probe, answer = probed
            rollout.inject(probe.prompt_ids)
            rollout.append(answer, greedy=True)
            if rollout.ended:
                return
            # The rest of an answer longer than its probe is greedy, too. One that `</think>` ended needs no closing.
            greedy = probe.closes_thought
            if probe.closes_thought or answer.finish_reason == "stop":
                closing = []
        elif probed is not None:
            rollout.discarded_tokens += len(probed[1].token_ids)
        rollout.inject(closing[: self.remaining])
        self._settle()
        if self.remaining and not self._stopped:
            self._append(await self._sample(greedy), greedy)

    async def _sample(self, greedy: bool = False) -> Generation:
        """Continue the path up to the next possible boundary."""
        path_ids, sampling = self.rollout.completion_ids, self.owner.sampling
        positions = [detector.next_position for detector in self.detectors if detector.next_position is not None]
        triggers = dict.fromkeys(word for detector in self.detectors for word in detector.callback.triggers)
        segment = await self.engine.generate(
            self.prompt + path_ids,
            max_tokens=min([self.remaining, *(position - len(path_ids) for position in positions)]),
            stop=tuple(triggers),
            temperature=0.0 if greedy else sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            # By position, so that the seed does not depend on earlier calls that were cancelled.
            seed=None if self.seed is None else (self.seed * 1_000_003 + len(path_ids)) % 2**63,
            abandon=None if self.settled is None else self.settled.arrive,
            ahead=self.owner.speculative and (bool(self.owner.callbacks) or self.settled is not None),
        )
        self._count(segment)
        return segment

    def _count(self, generation: Generation) -> None:
        self.rollout.sampled_tokens += len(generation.token_ids)
        self.owner.sampled_tokens += len(generation.token_ids)

    def _record_probe(
        self, detector: _BoundaryDetector, boundary: Boundary, probe: Probe, answer: Generation, exit_: Exit | None
    ) -> None:
        outcome: Outcome = "declined" if exit_ is None else "exit"
        confidence = probe.confidence(answer) if probe.confidence is not None else None
        if answer.finish_reason == "abandoned":
            outcome, confidence = "abandoned", None
        record = ProbeRecord(len(boundary.path_ids), answer.token_ids, answer.logprobs, outcome, confidence)
        detector.probes.append(record)
        self.rollout.probes.append(record)
        if exit_ is None:
            self.rollout.discarded_tokens += len(answer.token_ids)
