"""
Truncation callbacks: at a step boundary of a running rollout, go on, stop, or ask the model first.

A callback sees a [`Boundary`] and returns a decision: [`GoOn`], [`Exit`], or [`Probe`], which is run on the path
so far and shown to the callback again. It knows token ids and text, no engine and no trainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from .engines import AbandonRule, Generation


THINK_END = "</think>"


@dataclass(frozen=True)
class Boundary:
    """
    A place where a rollout may stop.

    Attributes:
        path_ids (`Sequence[int]`):
            Completion so far, the trigger included.
        trigger_start (`int`):
            Index in `path_ids` of the first token of the trigger.
        remaining (`int`):
            Tokens left of the completion's budget.
        probes (`int`):
            Probes already made in this rollout.
    """

    path_ids: Sequence[int]
    trigger_start: int
    remaining: int
    probes: int


@dataclass(frozen=True)
class GoOn:
    """The thought goes on; with `watch=False` to its end, no further boundary is shown."""

    watch: bool = True


@dataclass(frozen=True)
class Exit:
    """
    The thought ends here.

    Attributes:
        keep_trigger (`bool`):
            Whether the trigger stays in the path.
        closing_ids (`list[int]`):
            Injected after the path to close the thought, before the final answer is sampled. Unused where the kept
            answer of a probe has closed it.
        keep_answer (`bool`):
            Whether the probe's prompt and answer become the completion's answer.
    """

    keep_trigger: bool
    closing_ids: list[int]
    keep_answer: bool = False


@dataclass(frozen=True)
class Probe:
    """
    A tentative answer to induce, by greedy decoding.

    Attributes:
        prompt_ids (`list[int]`):
            Injected after the path.
        max_tokens (`int`):
            Most answer tokens.
        keep_trigger (`bool`):
            Whether the trigger is part of the probe's context.
        stop (`tuple[str, ...]`):
            Strings that end the answer, besides EOS.
        closes_thought (`bool`):
            Whether the prompt closes the thought: the answer is then the completion's last part.
        abandon (`AbandonRule`, *optional*):
            Ends the probe as soon as it can no longer lead to an exit.
        confidence (`Callable[[Generation], float]`, *optional*):
            How sure of the answer the model is, in 0..1, for the record of the probe.
    """

    prompt_ids: list[int]
    max_tokens: int
    keep_trigger: bool
    stop: tuple[str, ...] = ()
    closes_thought: bool = True
    abandon: AbandonRule | None = None
    confidence: Callable[[Generation], float] | None = None


Decision = GoOn | Exit | Probe


class TruncationCallback(Protocol):
    """Decides at the boundaries named by `triggers`."""

    triggers: Sequence[str]

    def at_boundary(self, boundary: Boundary) -> Decision:
        """Called when a trigger word has just been sampled."""
        ...

    def after_probe(self, boundary: Boundary, probe: Probe, answer: Generation) -> Exit | None:
        """Called with the answer of a probe that `at_boundary` asked for; `None` lets the thought go on."""
        ...


def answer_confidence(logprobs: Sequence[float], skip: int = 0) -> float:
    """
    Confidence of a tentative answer: `exp(mean log-probability)` of its tokens (Step-GRPO, eq. 2).

    Args:
        logprobs (`Sequence[float]`):
            Log-probabilities of the answer's tokens, its end token included.
        skip (`int`, *optional*, defaults to `0`):
            Tokens at the start that do not count (the released code skips one).

    Returns:
        `float`: in 0..1; `0.0` where no token counts.
    """
    counted = logprobs[skip:]
    return math.exp(sum(counted) / len(counted)) if counted else 0.0


def confidence_bound(logprobs: Sequence[float], max_tokens: int, skip: int = 0) -> float:
    """
    Highest confidence that an answer beginning with these log-probabilities can still reach.

    The best case is that all `max_tokens` tokens are used and the missing ones have probability 1: any answer adds
    non-positive terms to the sum and divides it by a smaller count.
    """
    return math.exp(sum(logprobs[skip:]) / max(1, max_tokens - skip))


@dataclass
class ConfidenceTruncation:
    """
    Stop when the model is sure of its answer (Step-GRPO section 3.2, after DEER).

    At each trigger an answer is induced; the rollout stops there when the answer's confidence is strictly greater than
    `threshold`. Defaults are the paper's; [`ConfidenceTruncation.released`] lists those of the released code.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Encodes the injected texts, once.
        triggers (`Sequence[str]`):
            Words that open a new semantic step.
        threshold (`float`, *optional*, defaults to `0.95`):
            Delta of the paper.
        answer_prompt (`str`):
            Text that induces an answer. One without `</think>` probes inside the open thought, and the answer then
            ends at `</think>`.
        max_probe_tokens (`int`, *optional*, defaults to `20`):
            Most tokens of an induced answer.
        max_probes (`int`, *optional*):
            Probes per rollout, no limit by default.
        keep_trigger (`bool`, *optional*, defaults to `True`):
            Whether the trigger word stays in the path of a truncated rollout and in the probe's context.
        keep_probe_answer (`bool`, *optional*, defaults to `True`):
            Keep a confident answer as the completion's; otherwise close the thought and sample one anew.
        require_probe_end (`bool`, *optional*, defaults to `False`):
            An answer that does not end within `max_probe_tokens` has confidence 0.
        skip_probe_tokens (`int`, *optional*, defaults to `0`):
            First tokens of the answer that do not count in its confidence.
        exit_margin (`int`, *optional*, defaults to `0`):
            Leave without a probe at a boundary that has at most this many tokens of the budget left.
        early_rejection (`bool`, *optional*, defaults to `True`):
            Abandon a probe as soon as no continuation of it can reach the threshold. Changes no decision.
    """

    tokenizer: PreTrainedTokenizerBase
    triggers: Sequence[str] = ("Wait", "Alternatively")
    threshold: float = 0.95
    answer_prompt: str = f"\n{THINK_END}\n\nThe final answer is"
    max_probe_tokens: int = 20
    max_probes: int | None = None
    keep_trigger: bool = True
    keep_probe_answer: bool = True
    require_probe_end: bool = False
    skip_probe_tokens: int = 0
    exit_margin: int = 0
    early_rejection: bool = True
    closing: str = field(default=f"\n{THINK_END}\n\n", repr=False)

    def __post_init__(self):
        self._prompt_ids = self.tokenizer.encode(self.answer_prompt, add_special_tokens=False)
        self._closing_ids = self.tokenizer.encode(self.closing, add_special_tokens=False)
        self._closes_thought = THINK_END in self.answer_prompt

    @staticmethod
    def released() -> dict:
        """Options of the released Step-GRPO code, where it departs from the paper."""
        return {
            "triggers": ("Wait",),
            "answer_prompt": "\n**Final Answer**\n\\boxed",
            "max_probes": 10,
            "keep_trigger": False,
            "keep_probe_answer": False,
            "require_probe_end": True,
            "skip_probe_tokens": 1,
            "exit_margin": 50,
        }

    def at_boundary(self, boundary: Boundary) -> Decision:
        if len(self._closing_ids) < boundary.remaining <= self.exit_margin:
            return Exit(self.keep_trigger, self._closing_ids)
        if self.max_probes is not None and boundary.probes >= self.max_probes:
            return GoOn(watch=self.exit_margin > 0)
        # Room for the injected text, one answer token and EOS: a probe that cannot end the completion is not made.
        room = boundary.remaining - max(len(self._prompt_ids), len(self._closing_ids)) - 1
        if room < 1:
            return GoOn(watch=False)
        max_tokens = min(self.max_probe_tokens, room)
        return Probe(
            prompt_ids=self._prompt_ids,
            max_tokens=max_tokens,
            keep_trigger=self.keep_trigger,
            stop=() if self._closes_thought else (THINK_END,),
            closes_thought=self._closes_thought,
            abandon=self._abandon_rule(max_tokens) if self.early_rejection else None,
            confidence=self.confidence,
        )

    def after_probe(self, boundary: Boundary, probe: Probe, answer: Generation) -> Exit | None:
        if self.confidence(answer) <= self.threshold:
            return None
        return Exit(self.keep_trigger, self._closing_ids, keep_answer=self.keep_probe_answer)

    def confidence(self, answer: Generation) -> float:
        """Confidence of a finished answer; `0.0` for an abandoned one and, if asked for, for one without an end."""
        if answer.finish_reason == "abandoned" or (self.require_probe_end and answer.finish_reason == "length"):
            return 0.0
        return answer_confidence(answer.logprobs, self.skip_probe_tokens)

    def _abandon_rule(self, max_tokens: int) -> AbandonRule:
        def out_of_reach(token_ids: Sequence[int], logprobs: Sequence[float]) -> bool:
            return confidence_bound(logprobs, max_tokens, self.skip_probe_tokens) <= self.threshold

        return out_of_reach
