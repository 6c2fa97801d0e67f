"""Records of a rollout: its sampling parameters, and the completion with its probes."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from .engines import Generation
from .truncation import ProbeRecord


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of the policy, named as in vLLM. `max_tokens` is the budget of a whole completion."""

    max_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


@dataclass
class Rollout:
    """
    One completion and the record of its sampling.

    Attributes:
        prompt_ids (`Sequence[int]`), completion_ids (`list[int]`):
            Token ids. The completion is exactly the sampled tokens plus the injected ones.
        logprobs (`array` of floats):
            Sampling log-probability of each completion token. NaN for tokens that were not sampled from the policy:
            injected tokens and greedily decoded answers.
        injected (`list[bool]`):
            True for tokens that no engine sampled.
        probes (`list[ProbeRecord]`):
            Probes in order.
        truncated (`bool`):
            Whether a callback ended the thought.
        ended (`bool`):
            Whether the completion ends in one of the model's EOS tokens. Otherwise the budget ran out.
        sampled_tokens (`int`):
            Tokens that engine calls returned for this rollout, probes included and cancelled calls not.
        discarded_tokens (`int`):
            Sampled tokens that are not in `completion_ids`.
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


class RolloutBuilder:
    """
    A [`Rollout`] in the making.

    Tokens are kept in arrays until [`RolloutBuilder.build`], because Python's garbage collector visits every element
    of every list, again and again, and thousands of rollouts of thousands of tokens grow at once.
    """

    def __init__(self, prompt_ids: Sequence[int]):
        self.prompt_ids = prompt_ids
        self.completion_ids = array("q")
        self.logprobs = array("d")
        self.injected = array("b")
        self.probes: list[ProbeRecord] = []
        self.truncated = self.ended = False
        self.sampled_tokens = self.discarded_tokens = 0

    def append(self, generation: Generation, greedy: bool = False) -> None:
        """Append sampled tokens. Greedily decoded ones have no sampling log-probability."""
        logprobs = [math.nan] * len(generation.token_ids) if greedy else generation.logprobs
        self._extend(generation.token_ids, logprobs, injected=False)
        self.ended = generation.finish_reason == "eos"

    def inject(self, token_ids: Sequence[int]) -> None:
        """Append tokens that no engine sampled."""
        self._extend(token_ids, [math.nan] * len(token_ids), injected=True)

    def cut(self, length: int) -> None:
        """Discard the tokens from position `length` on."""
        self.discarded_tokens += len(self.completion_ids) - length
        del self.completion_ids[length:], self.logprobs[length:], self.injected[length:]

    def build(self, shared_ids: dict[int, int]) -> Rollout:
        """
        Build the record. Completions built with the same `shared_ids` share one object per token id, which saves a
        gigabyte for 40 million tokens.
        """
        completion_ids = [shared_ids.setdefault(id_, id_) for id_ in self.completion_ids]
        lists = {"completion_ids": completion_ids, "injected": list(map(bool, self.injected))}
        return Rollout(**{**vars(self), **lists})

    def _extend(self, token_ids: Sequence[int], logprobs: Sequence[float], injected: bool) -> None:
        self.completion_ids.extend(token_ids)
        self.logprobs.extend(logprobs)
        self.injected.extend([injected] * len(token_ids))
