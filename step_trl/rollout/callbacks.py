"""The truncation callbacks of the package."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass

from transformers import PreTrainedTokenizerBase

from ..text import THINK_END, TRIGGERS
from .engines import AbandonRule, Generation
from .truncation import Boundary, Decision, Exit, GoOn, Probe, TruncationCallback


CLOSING = f"\n{THINK_END}\n\n"


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
class ConfidenceTruncation(TruncationCallback):
    """
    Stop when the model is sure of its answer (Step-GRPO section 3.2, after DEER).

    At each trigger an answer is induced; the rollout stops there when the answer's confidence is strictly greater than
    `threshold`. Defaults are the paper's; [`ConfidenceTruncation.released`] lists those of the released code.

    No rollout exits without room for its answer. Near the end of the budget, an answer that has less room than
    `max_probe_tokens` must end within that room. Where the final answer is sampled after the probe, there is no probe
    unless `max_probe_tokens` are left for that answer.

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
            Leave without a probe at a boundary that has at most this many tokens of the budget left, whatever the
            final answer needs.
        early_rejection (`bool`, *optional*, defaults to `True`):
            Abandon a probe as soon as no continuation of it can reach the threshold. Changes no decision.
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
        elif self.keep_probe_answer:  # the answer in the thought, what closes that, and the final answer
            self._least_room = 2 * self.max_probe_tokens + len(self._closing_ids)
        else:
            self._least_room = self.max_probe_tokens

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
            return self.leave(keep_answer=False)
        if self.max_probes is not None and len(boundary.probes) >= self.max_probes:
            return GoOn(watch=self.exit_margin > 0)
        # What is left for the answer beside the injected text and EOS.
        room = boundary.remaining - max(len(self._prompt_ids), len(self._closing_ids)) - 1
        if room < self._least_room:
            return GoOn(watch=self.exit_margin > 0)
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
        return self.leave(self.keep_probe_answer)

    def leave(self, keep_answer: bool) -> Exit:
        """The exit of this callback, with or without the answer of its probe."""
        return Exit(self.keep_trigger, self._closing_ids, keep_answer)

    def confidence(self, answer: Generation) -> float:
        """Confidence of an answer: `0.0` where it was abandoned or cut off by the budget, or has no required end."""
        cut_off = answer.finish_reason == "length" and len(answer.token_ids) < self.max_probe_tokens
        endless = answer.finish_reason == "length" and self.require_probe_end
        if answer.finish_reason == "abandoned" or cut_off or endless:
            return 0.0
        return answer_confidence(answer.logprobs, self.skip_probe_tokens)

    def _abandon_rule(self, max_tokens: int) -> AbandonRule:
        def out_of_reach(token_ids: Sequence[int], logprobs: Sequence[float]) -> bool:
            return confidence_bound(logprobs, max_tokens, self.skip_probe_tokens) <= self.threshold

        return out_of_reach


@dataclass
class AnswerConsistency(TruncationCallback):
    """
    Stop when the induced answer no longer changes (after Dynasor, arXiv 2412.20993).

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Encodes the injected texts, once, and decodes the answers.
        triggers (`Sequence[str]`):
            Words at which to probe.
        every (`int`, *optional*):
            Probe each time that the thought has grown by this many tokens instead (Dynasor: 32).
        window (`int`, *optional*, defaults to `3`):
            Probes in a row that must agree.
        answer_prompt (`str`):
            Text that induces an answer.
        max_probe_tokens (`int`, *optional*, defaults to `20`):
            Most tokens of an induced answer.
    """

    tokenizer: PreTrainedTokenizerBase
    _: KW_ONLY
    triggers: Sequence[str] = TRIGGERS
    every: int | None = None
    window: int = 3
    answer_prompt: str = ConfidenceTruncation.answer_prompt
    max_probe_tokens: int = 20

    def __post_init__(self):
        for name, least in (("every", 1), ("window", 2), ("max_probe_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: {value} is too small. Set at least {least}.")
        if self.every is not None:
            self.triggers = ()
        # The same probe, of which another thing is asked.
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
        return self._probing.leave(keep_answer=True)


@dataclass
class TokenBudget(TruncationCallback):
    """
    Stop every thought that is `budget` tokens long, and let the model answer from there (budget forcing).

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Encodes `closing`, once.
        budget (`int`):
            Tokens of the thought.
        closing (`str`, *optional*):
            Injected there. It closes the thought.
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
    Stop each thought at a random length, as S-GRPO samples its early exits (arXiv 2505.07686). A thought that ends
    before its cut stays whole.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Encodes `closing`, once.
        shortest (`int`, *optional*, defaults to `1`), longest (`int`, *optional*):
            Range of the length, both included, drawn uniformly; the budget of the completion by default.
        closing (`str`, *optional*):
            Injected at the cut; S-GRPO's text.
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
