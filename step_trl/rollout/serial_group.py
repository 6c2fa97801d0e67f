"""Serial groups of S-GRPO (arXiv 2505.07686): early exits from one thought, the shortest first, the full one last."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Sequence

import torch

from ..steps import DelimiterSegmenter
from ..text import THINK_END
from .callbacks import RandomCut
from .dynamic import DynamicTruncatedRollout
from .engines import Engine
from .records import Rollout, SamplingParams


def draw_cuts(thought: int, number: int, seed: int | None) -> list[int]:
    """
    Draw the `number` of lengths, in ascending order, at which a thought of `thought` tokens (at least 1) is cut.

    They are distinct if the thought is long enough.
    """
    lengths, generator = range(1, thought + 1), random.Random(seed)
    drawn = generator.sample(lengths, number) if number <= thought else generator.choices(lengths, k=number)
    return sorted(drawn)


class SerialGroupRollout:
    """
    Samples one full completion per prompt, and answers after cuts in its thought, which S-GRPO's text closes.

    The arguments are those of [`DynamicTruncatedRollout`].
    """

    def __init__(self, engine: Engine, sampling: SamplingParams, max_in_flight: int | None = None):
        self.sampling = sampling
        self.closing_ids: list[int] = engine.tokenizer.encode(RandomCut.closing, add_special_tokens=False)
        self._plain = DynamicTruncatedRollout(engine, sampling=sampling, max_in_flight=max_in_flight)
        self._thoughts = DelimiterSegmenter(engine.tokenizer, end_text=THINK_END)
        if len(self.closing_ids) + 2 > sampling.max_tokens:
            raise ValueError(
                f"max_completion_length: {sampling.max_tokens} leaves no room for a thought, an answer, and the "
                f"{len(self.closing_ids)} tokens between them. Set a larger one."
            )

    def run(
        self, prompts: Sequence[Sequence[int]], num_generations: int, seeds: Sequence[int] | None = None
    ) -> list[Rollout]:
        """
        Sample the completions of each group.

        Args:
            prompts (`Sequence[Sequence[int]]`):
                Token ids of the prompts, each repeated `num_generations` times.
            num_generations (`int`):
                Number of completions per group. One is complete, the others are cut.
            seeds (`Sequence[int]`, *optional*):
                One seed per completion.

        Returns:
            `list[Rollout]`: in the order of `prompts`, and in each group from the shortest thought to the full one.
        """
        groups = [
            {tuple(prompt) for prompt in prompts[start : start + num_generations]}
            for start in range(0, len(prompts), num_generations)
        ]
        if len(prompts) % num_generations or any(len(group) > 1 for group in groups):
            raise ValueError(
                f"prompts: these {len(prompts)} do not form whole groups of num_generations={num_generations}. Repeat "
                "each prompt that many times."
            )
        own_seeds: Sequence[int | None] = [None] * len(prompts) if seeds is None else seeds
        last = slice(num_generations - 1, None, num_generations)
        rollouts: list[Rollout] = []
        for whole, seed in zip(self._plain.run(prompts[last], own_seeds[last]), own_seeds[last], strict=True):
            cuts = draw_cuts(self._longest_cut(whole), num_generations - 1, seed)
            rollouts += [*(self._cut(whole, length) for length in cuts), whole]
        cut = [index for index in range(len(prompts)) if (index + 1) % num_generations]
        answers = self._plain.run(
            [[*rollouts[index].prompt_ids, *rollouts[index].completion_ids] for index in cut],
            [own_seeds[index] for index in cut],
            budgets=[self.sampling.max_tokens - len(rollouts[index].completion_ids) for index in cut],
        )
        for index, answer in zip(cut, answers, strict=True):
            rollout = rollouts[index]
            rollout.completion_ids.extend(answer.completion_ids)
            rollout.logprobs.extend(answer.logprobs)
            rollout.injected.extend(answer.injected)
            rollout.ended, rollout.sampled_tokens = answer.ended, answer.sampled_tokens
        return rollouts

    def _longest_cut(self, whole: Rollout) -> int:
        """Tokens of the thought, at most as many as leave room for the closing text and one token of the answer."""
        ids = torch.tensor([whole.completion_ids])
        thought = int((self._thoughts.step_ids(ids, torch.ones_like(ids)) >= 0).sum())
        return max(1, min(thought, self.sampling.max_tokens - len(self.closing_ids) - 1))

    def _cut(self, whole: Rollout, length: int) -> Rollout:
        """Cut a rollout and close its thought."""
        closing = len(self.closing_ids)
        return Rollout(
            whole.prompt_ids,
            whole.completion_ids[:length] + self.closing_ids,
            whole.logprobs[:length] + array("d", [math.nan] * closing),
            whole.injected[:length] + [True] * closing,
            truncated=True,
        )
