"""A language model without a network: the next token is a hash of the context."""

from __future__ import annotations

import asyncio
import hashlib
import math
import random

from step_trl.rollout.engines import Engine, Generation


class ScriptedEngine(Engine):
    """
    An engine whose next token and log-probability depend only on the context, sampled or greedy, not on other calls.

    `pieces` are token ids with weights; `certain` is the chance that a token has a log-probability near 0.
    """

    def __init__(self, tokenizer, pieces: dict[int, float], salt: int = 0, certain: float = 0.8, max_delay: int = 3):
        self.tokenizer = tokenizer
        self.ids, self.weights = list(pieces), list(pieces.values())
        self.salt, self.certain = salt, certain
        self.delays = random.Random(salt)
        self.max_delay = max_delay
        self.running = 0
        self.sampled_tokens = 0

    def next(self, context: list[int]) -> tuple[int, float]:
        digest = hashlib.blake2b(repr((self.salt, context)).encode(), digest_size=8).digest()
        rng = random.Random(digest)
        token = rng.choices(self.ids, self.weights)[0]
        probability = rng.uniform(0.97, 1.0) if rng.random() < self.certain else rng.uniform(0.05, 1.0)
        return token, math.log(probability)

    async def generate(
        self,
        prompt_ids,
        *,
        max_tokens,
        stop=(),
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        seed=None,
        abandon=None,
        ahead=False,
    ) -> Generation:
        assert max_tokens >= 1
        self.running += 1
        try:
            context, token_ids, logprobs = list(prompt_ids), [], []
            while True:
                for _ in range(self.delays.randint(0, self.max_delay)):
                    await asyncio.sleep(0)
                token, logprob = self.next(context)
                self.sampled_tokens += 1
                context.append(token)
                token_ids.append(token)
                logprobs.append(logprob)
                if token == self.tokenizer.eos_token_id:
                    return Generation(token_ids, logprobs, "eos")
                text = self.tokenizer.decode(token_ids)
                if any(word in text for word in stop):
                    return Generation(token_ids, logprobs, "stop")
                if len(token_ids) == max_tokens:
                    return Generation(token_ids, logprobs, "length")
                if abandon is not None and abandon(token_ids, logprobs):
                    return Generation(token_ids, logprobs, "abandoned")
        finally:
            self.running -= 1
