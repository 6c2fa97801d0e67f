"""S-GRPO's groups (arXiv 2505.07686): exits from one thought, in the order of their places, and the whole one last."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from ..steps import DelimiterSegmenter
from ..text import THINK_END
from .callbacks import RandomCut
from .dynamic import DynamicTruncatedRollout
from .engines import Engine
from .records import Rollout, SamplingParams


def draw_cuts(thought: int, number: int, seed: int | None) -> list[int]:
    """
    Lengths at which a thought is cut, in ascending order.

    Args:
        thought (`int`):
            Tokens of the thought, at least 1.
        number (`int`):
            Of cuts; they differ where the thought is long enough.
        seed (`int`, *optional*):
            Of the draw.
    """
    lengths, generator = range(1, thought + 1), random.Random(seed)
    drawn = generator.sample(lengths, number) if number <= thought else generator.choices(lengths, k=number)
    return sorted(drawn)


class SerialGroupRollout:
    """
    Samples a whole completion per prompt, and answers from places in its thought.

    Args:
        engine ([`Engine`]):
            Where tokens come from.
        sampling ([`SamplingParams`]):
            Budget and sampling of the policy.
        closing (`str`, *optional*):
            Injected at a cut, closes the thought; S-GRPO's text.
        max_in_flight (`int`, *optional*):
            Most rollouts at once.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: SamplingParams,
        closing: str = RandomCut.closing,
        max_in_flight: int | None = None,
    ):
        self.tokenizer: PreTrainedTokenizerBase = engine.tokenizer
        self.sampling = sampling
        self.closing_ids: list[int] = self.tokenizer.encode(closing, add_special_tokens=False)
        self._plain = DynamicTruncatedRollout(engine, sampling=sampling, max_in_flight=max_in_flight)
        self._thoughts = DelimiterSegmenter(self.tokenizer, end_text=THINK_END)
        if len(self.closing_ids) + 2 > sampling.max_tokens:
            raise ValueError(
                f"max_completion_length: {sampling.max_tokens} leaves no room for a thought, an answer, and the "
                f"{len(self.closing_ids)} tokens between them. Set a larger one."
            )

    def run(
        self, prompts: Sequence[Sequence[int]], num_generations: int, seeds: Sequence[int] | None = None
    ) -> list[Rollout]:
        """
        Sample groups.

        Args:
            prompts (`Sequence[Sequence[int]]`):
                Token ids of the prompts, each `num_generations` times.
            num_generations (`int`):
                Completions of a group: one whole, the others cut.
            seeds (`Sequence[int]`, *optional*):
                One per completion.

        Returns:
            `list[Rollout]`: in the order of `prompts`; of a group, the cut ones from the shortest thought to the
            longest, then the whole one.
        """
        starts = range(0, len(prompts), num_generations)
        groups = [{tuple(prompt) for prompt in prompts[start : start + num_generations]} for start in starts]
        if len(prompts) % num_generations or any(len(group) > 1 for group in groups):
            raise ValueError(
                f"prompts: these {len(prompts)} are no whole groups of num_generations={num_generations}. Give each "
                "prompt that many times."
            )

        def seeds_of(places: Sequence[int]) -> list[int] | None:
            return None if seeds is None else [seeds[place] for place in places]

        whole_places = [start + num_generations - 1 for start in starts]
        rollouts = dict(
            zip(
                whole_places,
                self._plain.run([prompts[place] for place in whole_places], seeds_of(whole_places)),
                strict=True,
            )
        )
        for place in whole_places:
            room = self.sampling.max_tokens - len(self.closing_ids) - 1
            thought = max(1, min(self._thought_length(rollouts[place].completion_ids), room))
            cuts = draw_cuts(thought, num_generations - 1, None if seeds is None else seeds[place])
            for offset, length in enumerate(cuts, 1 - num_generations):
                rollouts[place + offset] = self._cut(rollouts[place], length)
        cut_places = sorted(rollouts.keys() - set(whole_places))
        answers = self._plain.run(
            [[*rollouts[place].prompt_ids, *rollouts[place].completion_ids] for place in cut_places],
            seeds_of(cut_places),
            budgets=[self.sampling.max_tokens - len(rollouts[place].completion_ids) for place in cut_places],
        )
        for place, answer in zip(cut_places, answers, strict=True):
            rollout = rollouts[place]
            rollout.completion_ids.extend(answer.completion_ids)
            rollout.logprobs.extend(answer.logprobs)
            rollout.injected.extend(answer.injected)
            rollout.ended, rollout.sampled_tokens = answer.ended, answer.sampled_tokens
        return [rollouts[place] for place in range(len(prompts))]

    def _cut(self, whole: Rollout, length: int) -> Rollout:
        rollout = Rollout(
            whole.prompt_ids, whole.completion_ids[:length], whole.logprobs[:length], whole.injected[:length]
        )
        rollout.inject(self.closing_ids)
        rollout.truncated = True
        return rollout

    def _thought_length(self, completion_ids: Sequence[int]) -> int:
        ids = torch.tensor([list(completion_ids)])
        return int((self._thoughts.step_ids(ids, torch.ones_like(ids)) >= 0).sum())
