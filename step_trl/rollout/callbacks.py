"""Truncation callbacks: confidence, consistency of answers, a token budget, random cuts."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial

from transformers import PreTrainedTokenizerBase

from ..checks import check_least
from ..text import THINK_END, TRIGGERS
from .engines import Generation
from .truncation import Boundary, Decision, Exit, GoOn, Probe, TruncationCallback


CLOSING = f"\n{THINK_END}\n\n"


def answer_confidence(logprobs: Sequence[float], skip: int = 0) -> float:
    """
    Compute the confidence of a tentative answer: `exp(mean log-probability)` of its tokens (Step-GRPO, eq. 2).

    The end token counts, the first `skip` tokens do not (the released code skips one). 0 if no token counts.
    """
    counted = logprobs[skip:]
    return math.exp(sum(counted) / len(counted)) if counted else 0.0


def confidence_bound(logprobs: Sequence[float], max_tokens: int, skip: int = 0) -> float:
    """
    Compute the highest confidence that an answer beginning with these log-probabilities can reach.

    Best is an answer of `max_tokens` tokens whose missing ones have probability 1: a real answer adds non-positive
    terms to the sum and divides it by the same or a smaller count.
    """
    return math.exp(sum(logprobs[skip:]) / max(1, max_tokens - skip))


@dataclass
class ConfidenceTruncation(TruncationCallback):
    """
    Exit when the model is confident of its answer (Step-GRPO section 3.2, after DEER).

    An answer is induced at each trigger. The rollout exits if the confidence of that answer is strictly greater than
    `threshold`. Defaults are those of the paper, [`ConfidenceTruncation.released`] returns those of the released code.

    A rollout exits only with room for its answer. Near the end of the budget, an answer with less room than
    `max_probe_tokens` must end within that room. If the final answer is sampled after the probe, a probe needs
    `max_probe_tokens` more for it.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer for the injected texts.
        triggers (`Sequence[str]`):
            Words that open a semantic step.
        threshold (`float`, *optional*, defaults to `0.95`):
            Delta of the paper.
        answer_prompt (`str`):
            Text that induces an answer. Without `</think>` it probes inside the open thought, and the answer ends at
            `</think>`.
        max_probe_tokens (`int`, *optional*, defaults to `20`), max_probes (`int`, *optional*):
            Maximum number of tokens of an induced answer, and of probes per rollout (by default no limit).
        keep_trigger (`bool`, *optional*, defaults to `True`):
            Whether the trigger stays in the path of a truncated rollout and in the probe's context.
        keep_probe_answer (`bool`, *optional*, defaults to `True`):
            Whether a confident answer is kept as the answer of the completion. Otherwise the thought is closed and the
            answer is sampled again.
        require_probe_end (`bool`, *optional*, defaults to `False`):
            Whether an answer that does not end within `max_probe_tokens` has confidence 0.
        skip_probe_tokens (`int`, *optional*, defaults to `0`):
            Number of leading answer tokens that do not count in the confidence.
        exit_margin (`int`, *optional*, defaults to `0`):
            Exit without a probe at boundaries with at most this many remaining tokens, whatever the final answer
            needs.
        early_rejection (`bool`, *optional*, defaults to `True`):
            Whether to abandon a probe once no continuation of it can reach the threshold. This changes no decision.
        closing (`str`, *optional*):
            Text that closes the thought.
    """

    tokenizer: PreTrainedTokenizerBase
    _: KW_ONLY
    triggers: Sequence[str] = TRIGGERS
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
    closing: str = CLOSING

    def __post_init__(self):
        self._prompt_ids = self.tokenizer.encode(self.answer_prompt, add_special_tokens=False)
        self._closing_ids = self.tokenizer.encode(self.closing, add_special_tokens=False)
        self._closes_thought = THINK_END in self.answer_prompt
        if self.keep_probe_answer and self._closes_thought:
            self._least_room = 1
        elif self.keep_probe_answer:  # the answer in the thought, the closing text, and the final answer
            self._least_room = 2 * self.max_probe_tokens + len(self._closing_ids)
        else:
            self._least_room = self.max_probe_tokens

    @staticmethod
    def released() -> dict:
        """Return the options in which the released code of Step-GRPO differs from the paper."""
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
            return self.exit(keep_answer=False)
        # Remaining tokens for the answer, without the injected text and EOS.
        room = boundary.remaining - max(len(self._prompt_ids), len(self._closing_ids)) - 1
        if len(boundary.probes) == self.max_probes or room < self._least_room:
            return GoOn(watch=self.exit_margin > 0)
        max_tokens = min(self.max_probe_tokens, room)
        return Probe(
            prompt_ids=self._prompt_ids,
            max_tokens=max_tokens,
            keep_trigger=self.keep_trigger,
            stop=() if self._closes_thought else (THINK_END,),
            closes_thought=self._closes_thought,
            abandon=partial(self._is_out_of_reach, max_tokens) if self.early_rejection else None,
            confidence=self.confidence,
        )

    def after_probe(self, boundary: Boundary, probe: Probe, answer: Generation) -> Exit | None:
        if self.confidence(answer) <= self.threshold:
            return None
        return self.exit(self.keep_probe_answer)

    def exit(self, keep_answer: bool) -> Exit:
        """Return the exit of this callback, with or without the answer of its probe."""
        return Exit(self.keep_trigger, self._closing_ids, keep_answer)

    def confidence(self, answer: Generation) -> float:
        """Return the confidence of an answer, 0 if it was abandoned, cut by the budget, or lacks a required end."""
        cut_off = answer.finish_reason == "length" and len(answer.token_ids) < self.max_probe_tokens
        endless = answer.finish_reason == "length" and self.require_probe_end
        if answer.finish_reason == "abandoned" or cut_off or endless:
            return 0.0
        return answer_confidence(answer.logprobs, self.skip_probe_tokens)

    def _is_out_of_reach(self, max_tokens: int, token_ids: Sequence[int], logprobs: Sequence[float]) -> bool:
        return confidence_bound(logprobs, max_tokens, self.skip_probe_tokens) <= self.threshold


@dataclass
class AnswerConsistency(TruncationCallback):
    """
    Exit when the induced answer no longer changes (after Dynasor, arXiv 2412.20993).

    Args:
        tokenizer, triggers, answer_prompt, max_probe_tokens:
            As in [`ConfidenceTruncation`].
        every (`int`, *optional*):
            Probe at this interval of tokens instead of at triggers (Dynasor: 32).
        window (`int`, *optional*, defaults to `3`):
            Number of consecutive probes that must agree.
    """

    tokenizer: PreTrainedTokenizerBase
    _: KW_ONLY
    triggers: Sequence[str] = TRIGGERS
    every: int | None = None
    window: int = 3
    answer_prompt: str = ConfidenceTruncation.answer_prompt
    max_probe_tokens: int = 20

    def __post_init__(self):
        check_least(self, every=1, window=2, max_probe_tokens=1)
        if self.every is not None:
            self.triggers = ()
        # Makes the probes. The decision on their answers is ours.
        self._probing = ConfidenceTruncation(
            self.tokenizer,
            triggers=self.triggers,
            answer_prompt=self.answer_prompt,
            max_probe_tokens=self.max_probe_tokens,
            early_rejection=False,
        )

    def positions(self, prompt_ids: Sequence[int], max_tokens: int, seed: int | None) -> Iterable[int]:
        return () if self.every is None else range(self.every, max_tokens, self.every)

    def at_boundary(self, boundary: Boundary) -> Decision:
        return self._probing.at_boundary(boundary)

    def after_probe(self, boundary: Boundary, probe: Probe, answer: Generation) -> Exit | None:
        last = [*(record.token_ids for record in boundary.probes[1 - self.window :]), answer.token_ids]
        answers = {text.strip() for text in self.tokenizer.batch_decode(last, skip_special_tokens=True)}
        if len(last) < self.window or len(answers) > 1 or "" in answers or answer.finish_reason == "length":
            return None
        return self._probing.exit(keep_answer=True)


@dataclass
class TokenBudget(TruncationCallback):
    """
    End every thought after `budget` tokens, at least 1, and let the model answer (budget forcing).

    `closing` is the text that closes the thought, encoded by `tokenizer`.
    """

    tokenizer: PreTrainedTokenizerBase
    budget: int
    closing: str = CLOSING

    def __post_init__(self):
        if self.budget < 1:
            raise ValueError(f"budget: {self.budget} leaves no thought. Set at least 1 token.")
        self._closing_ids = _encode_closing(self.tokenizer, self.closing)

    def positions(self, prompt_ids: Sequence[int], max_tokens: int, seed: int | None) -> Iterable[int]:
        return (self.budget,)

    def at_boundary(self, boundary: Boundary) -> Decision:
        return Exit(keep_trigger=True, closing_ids=self._closing_ids)


@dataclass
class RandomCut(TruncationCallback):
    """
    End each thought at a random length, as the early exits of S-GRPO do (arXiv 2505.07686). Shorter thoughts are not
    changed.

    The length is drawn uniformly from `shortest` to `longest`, both included, by default up to the budget of the
    completion. `closing` is the text that closes the thought, by default S-GRPO's.
    """

    tokenizer: PreTrainedTokenizerBase
    shortest: int = 1
    longest: int | None = None
    closing: str = f"Time is limited, stop thinking and start answering.{CLOSING}"

    def __post_init__(self):
        if not 1 <= self.shortest <= (self.longest or self.shortest):
            raise ValueError(
                f"shortest, longest: no length is between {self.shortest} and {self.longest}. Set 1 <= shortest <= "
                "longest."
            )
        self._closing_ids = _encode_closing(self.tokenizer, self.closing)

    def positions(self, prompt_ids: Sequence[int], max_tokens: int, seed: int | None) -> Iterable[int]:
        longest = max_tokens if self.longest is None else min(self.longest, max_tokens)
        return (random.Random(seed).randint(min(self.shortest, longest), longest),)

    def at_boundary(self, boundary: Boundary) -> Decision:
        return Exit(keep_trigger=True, closing_ids=self._closing_ids)


def _encode_closing(tokenizer: PreTrainedTokenizerBase, closing: str) -> list[int]:
    if THINK_END not in closing:
        raise ValueError(f"closing: {closing!r} leaves the thought open. End it with {CLOSING!r}.")
    return tokenizer.encode(closing, add_special_tokens=False)
