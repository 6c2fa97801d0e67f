"""Records of a rollout: how it was sampled, and the completion with all that happened on its way."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from .engines import Generation
from .truncation import ProbeRecord


@dataclass(frozen=True)
class SamplingParams:
    """How the policy is sampled; the names are vLLM's. `max_tokens` is the budget of a whole completion."""

    max_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


@dataclass
class Rollout:
    """
    One completion and how it came about.

    Attributes:
        prompt_ids (`Sequence[int]`), completion_ids (`list[int]`):
            Token ids. The completion is exactly what the engine sampled plus what was injected; it ends in EOS unless
            the budget ran out.
        logprobs (`array` of floats):
            Sampling log-probability of each completion token, NaN where the token was not sampled from the policy:
            injected tokens and greedily decoded answers.
        injected (`list[bool]`):
            True for the tokens that no engine sampled.
        probes (`list[ProbeRecord]`):
            Probes in order.
        truncated (`bool`):
            Whether a callback ended the thought.
        ended (`bool`):
            Whether it ends in EOS, any of the model's; otherwise the budget ran out.
        sampled_tokens (`int`), discarded_tokens (`int`):
            Tokens that engine calls returned for this rollout, probes included; those of them that are not in
            `completion_ids`. Tokens of calls that were cancelled while they ran are in neither.
    """

    prompt_ids: Sequence[int]
    completion_ids: list[int] = field(default_factory=list)
    logprobs: array[float] = field(default_factory=lambda: array("d"))
    injected: list[bool] = field(default_factory=list)
    probes: list[ProbeRecord] = field(default_factory=list)
    truncated: bool = False
    ended: bool = False
    sampled_tokens: int = 0
    discarded_tokens: int = 0

    def append(self, generation: Generation, greedy: bool = False) -> None:
        self.completion_ids.extend(generation.token_ids)
        self.logprobs.extend([math.nan] * len(generation.token_ids) if greedy else generation.logprobs)
        self.injected.extend([False] * len(generation.token_ids))
        self.ended = generation.finish_reason == "eos"

    def inject(self, token_ids: Sequence[int]) -> None:
        self.completion_ids.extend(token_ids)
        self.logprobs.extend([math.nan] * len(token_ids))
        self.injected.extend([True] * len(token_ids))

    def cut(self, length: int) -> None:
        """Take back the tokens from `length` on."""
        self.discarded_tokens += len(self.completion_ids) - length
        del self.completion_ids[length:], self.logprobs[length:], self.injected[length:]
