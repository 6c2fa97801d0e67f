"""When thoughts end: the options of an endpoint, and of a request that overrides them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..checks import check_least
from ..rollout import AnswerConsistency, ConfidenceTruncation, Rollout, TokenBudget, TruncationCallback
from .fields import Fields


_MOST_TOKENS = 2**31 - 1
_MOST_ANSWERS = 1000


@dataclass(frozen=True)
class ExitOptions:
    """
    When the thought of a completion ends. The first option that applies ends it.

    Attributes:
        exit_confidence (`float`, *optional*):
            An answer is induced at each "Wait" and "Alternatively". The thought ends if its confidence, from 0 to 1,
            is greater than this (DEER, see [`~step_trl.rollout.ConfidenceTruncation`]).
        exit_consistency (`int`, *optional*):
            The thought ends once so many induced answers in a row are equal, at least 2 (Dynasor, see
            [`~step_trl.rollout.AnswerConsistency`]).
        thinking_token_budget (`int`, *optional*):
            The thought ends after so many tokens, at least 1 (see [`~step_trl.rollout.TokenBudget`]).

    Raises:
        `ValueError`: names the option that is out of range.
    """

    exit_confidence: float | None = None
    exit_consistency: int | None = None
    thinking_token_budget: int | None = None

    def __post_init__(self):
        if self.exit_confidence is not None and not 0 <= self.exit_confidence <= 1:
            raise ValueError(
                f"exit_confidence: {self.exit_confidence:g} is not between 0 and 1. Set, for example, 0.95."
            )
        check_least(self, exit_consistency=2, thinking_token_budget=1)

    def callbacks(self, tokenizer: PreTrainedTokenizerBase) -> list[TruncationCallback]:
        """Return the callbacks of a rollout with these options, in the order in which they are asked."""
        chosen: list[TruncationCallback] = []
        if self.exit_confidence is not None:
            chosen.append(ConfidenceTruncation(tokenizer, threshold=self.exit_confidence))
        if self.exit_consistency is not None:
            chosen.append(AnswerConsistency(tokenizer, window=self.exit_consistency))
        if self.thinking_token_budget is not None:
            chosen.append(TokenBudget(tokenizer, self.thinking_token_budget))
        return chosen

    def overridden(self, fields: Fields) -> ExitOptions:
        """Return the options of a request, in which a field that is `null` switches one off."""
        given: dict[str, Any] = {
            "exit_confidence": fields.number("exit_confidence", 0, 1),
            "exit_consistency": fields.integer("exit_consistency", 2, _MOST_ANSWERS),
            "thinking_token_budget": fields.integer("thinking_token_budget", 1, _MOST_TOKENS),
        }
        return replace(self, **{name: value for name, value in given.items() if name in fields})

    def describe(self) -> str:
        """Return the options in a line."""
        given = [f"{name} {value:g}" for name, value in vars(self).items() if value is not None]
        return ", ".join(given) or "no early exit"


def exit_report(rollout: Rollout, exits: ExitOptions, max_tokens: int) -> dict[str, Any]:
    """
    Return what can be measured about the early exit of one completion.

    What a model would have thought without the exit cannot be known. `saved_tokens_at_most` is the part of
    `max_tokens` that the completion left unused because its thought ended early, and 0 if it did not.
    """
    report: dict[str, Any] = {
        "exited": rollout.truncated,
        "by": None,
        "confidence": None,
        "position": None,
        "probes": len(rollout.probes),
        "probe_tokens": sum(len(probe.token_ids) for probe in rollout.probes),
        "discarded_tokens": rollout.discarded_tokens,
        "saved_tokens_at_most": 0,
    }
    if rollout.truncated:
        probe = rollout.probes[-1] if rollout.probes and rollout.probes[-1].outcome == "exit" else None
        report["by"] = "thinking_token_budget"
        if probe is not None:
            confidence = probe.confidence or 0.0
            is_confident = exits.exit_confidence is not None and confidence > exits.exit_confidence
            report |= {"by": "exit_confidence" if is_confident else "exit_consistency", "confidence": confidence}
        report["position"] = rollout.injected.index(True) if any(rollout.injected) else len(rollout.completion_ids)
        report["saved_tokens_at_most"] = max_tokens - len(rollout.completion_ids)
    return report
