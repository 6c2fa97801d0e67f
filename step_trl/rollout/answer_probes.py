"""How certain a policy is of an answer at places in its thoughts, and how probable the right one is there (SPAE)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..text import last_boxed
from .callbacks import answer_confidence
from .engines import Engine
from .event_loop import gather, run_to_end


@dataclass(frozen=True)
class ProbedThought:
    """
    A completion, the places in it to probe, and its right answer.

    Attributes:
        prompt_ids (`Sequence[int]`), completion_ids (`Sequence[int]`):
            The token ids.
        cuts (`Sequence[int]`):
            The number of tokens of the completion that are kept before each probe.
        answer_prompt_ids (`Sequence[int]`), answer_ids (`Sequence[int]`):
            What induces an answer, and the right answer, as from [`forced_answer`].
        seed (`int`, *optional*):
            Makes the probes reproducible.
    """

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    cuts: Sequence[int]
    answer_prompt_ids: Sequence[int]
    answer_ids: Sequence[int]
    seed: int | None = None


def forced_answer(
    tokenizer: PreTrainedTokenizerBase, answer_prompt: str, solution: str, most: int | None = None
) -> tuple[list[int], list[int]]:
    r"""
    Return the tokens of a text that induces an answer, and those of a solution's answer after it.

    They are tokenized together, as the policy has learned to write them: if a token has the end of the text and the
    beginning of the answer, it belongs to the answer. The answer is what the solution has in its last box, or all of
    it; only its first `most` tokens count.

    Example:
    ```python
    >>> forced_answer(tokenizer, "\\boxed{", "The sum is \\boxed{42}.")  # tokens of "\\boxed{" and of "42"
    ```
    """
    answer = (last_boxed(solution) or solution).strip()
    alone = tokenizer.encode(answer_prompt, add_special_tokens=False)
    both = tokenizer.encode(answer_prompt + answer, add_special_tokens=False)
    pairs = zip(alone, both, strict=False)
    shared = next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(alone), len(both)))
    return both[:shared], both[shared:][:most]


class AnswerProbes:
    """
    Induces answers in the midst of thoughts, and measures them.

    Args:
        engine ([`Engine`]):
            The engine of the policy.
        samples (`int`, *optional*, defaults to `5`):
            How many answers are sampled at each place.
        max_tokens (`int`, *optional*, defaults to `10`), temperature (`float`, *optional*, defaults to `0.6`):
            Their maximum number of tokens, and the temperature.
        stop (`str`, *optional*):
            The text that ends an answer.

    Attributes:
        sampled_tokens (`int`):
            The number of tokens that have been sampled.
    """

    def __init__(
        self,
        engine: Engine,
        samples: int = 5,
        max_tokens: int = 10,
        temperature: float = 0.6,
        stop: str | None = None,
    ):
        self.engine = engine
        self.samples = samples
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.stop = () if stop is None else (stop,)
        self.sampled_tokens = 0

    def run(self, thoughts: Sequence[ProbedThought]) -> list[list[tuple[float, float]]]:
        """
        Return accuracy and confidence, both from 0 to 1, at each cut of each thought.

        The accuracy is the mean probability of the right answer's tokens, each after those before it, at temperature
        1. The confidence is the mean over sampled answers of `exp(-entropy)`, where the entropy is estimated by what
        was sampled: the mean of `-log p` over the answer's tokens, under the distribution that they are sampled from.
        """
        return run_to_end(gather(map(self._probe, thoughts)))

    async def _probe(self, thought: ProbedThought) -> list[tuple[float, float]]:
        async with self.engine.for_rollout(thought.prompt_ids) as engine:
            # One place after the other: the next one continues what an engine has just cached, and few paths are
            # held at once.
            return [await self._probe_at(engine, thought, cut) for cut in thought.cuts]

    async def _probe_at(self, engine: Engine, thought: ProbedThought, cut: int) -> tuple[float, float]:
        path = [*thought.prompt_ids, *thought.completion_ids[:cut], *thought.answer_prompt_ids]
        first = None if thought.seed is None else thought.seed + cut * self.samples
        seeds = [None if first is None else (first + number) % 2**63 for number in range(self.samples)]
        accuracy, *confidences = await gather(
            [
                self._accuracy(engine, path, thought.answer_ids),
                *(self._confidence(engine, path, seed) for seed in seeds),
            ]
        )
        return accuracy, sum(confidences) / self.samples

    async def _accuracy(self, engine: Engine, path: Sequence[int], answer_ids: Sequence[int]) -> float:
        return sum(map(math.exp, await engine.logprobs_of(path, answer_ids))) / len(answer_ids)

    async def _confidence(self, engine: Engine, path: Sequence[int], seed: int | None) -> float:
        answer = await engine.generate(
            path, max_tokens=self.max_tokens, stop=self.stop, temperature=self.temperature, seed=seed
        )
        self.sampled_tokens += len(answer.token_ids)
        return answer_confidence(answer.logprobs)
