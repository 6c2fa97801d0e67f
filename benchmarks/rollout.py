"""
Truncated rollouts on a vLLM server: what probes cost, what exits save, and what rounds in lock-step would take.

    python benchmarks/rollout.py                              # starts a server on the testbed model
    python benchmarks/rollout.py --in-flight 16 --rounds 3 --threads 1
    python benchmarks/rollout.py --url http://127.0.0.1:8000  # of `step-trl serve` on the testbed model, used by nobody else

Every contender samples the same prompts with the same seeds at temperature 1, problems of the training split eight times
each, and starts from an empty prefix cache. Rounds are interleaved, so that a busy machine slows all of them alike; the
tables show medians, and ratios to A are taken within each round. The first round does not count: in it the completions
of C are compared with those of C' and D, which make the same decisions.

All that was sampled is what the server counted, cancelled work included. "thought" is what of it became part of a
completion, "probe" the answers of probes, "discarded" the rest: segments that ran beside a probe which said stop, and
what the server sampled on before it knew that a call had ended.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import httpx
import pandas as pd

from step_trl.rollout import ConfidenceTruncation, DynamicTruncatedRollout, Rollout, SamplingParams
from step_trl.rollout.engines import Generation, VLLMServerEngine
from step_trl.rollout.truncation import THINK_END, Boundary, GoOn, Probe, ProbeRecord
from step_trl.serve import VLLMServer
from step_trl.steps import DelimiterSegmenter, TriggerSegmenter
from step_trl.testbed import MODEL_DIR, load_dataset, load_tokenizer


GROUP_SIZE = 8  # completions of one prompt
CONTENDERS = {
    "A": "plain",
    "B": "exits off, speculative",
    "C": "exits on, speculative",
    "C'": "exits on, pausing",
    "D": "exits on, lock-step, full probes",
}
Contender = Callable[[Sequence[Sequence[int]], Sequence[int]], list[Rollout]]  # prompts and seeds


class LockStepRollout:
    """
    Rounds, as DEER and the released code of Step-GRPO have them.

    All running rollouts sample to their next trigger; when the last one is there, all are probed, to the end of each
    probe; then the confident ones leave with their answer and the others go on in the next round.
    """

    def __init__(self, engine: VLLMServerEngine, callback: ConfidenceTruncation, max_tokens: int):
        self.engine = engine
        self.callback = callback
        self.max_tokens = max_tokens
        self.triggers = TriggerSegmenter(engine.tokenizer, callback.triggers)
        self.think_end = DelimiterSegmenter(engine.tokenizer, THINK_END)

    def run(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Rollout]:
        return asyncio.run(self._rounds(prompts, seeds))

    async def _rounds(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Rollout]:
        rollouts = [Rollout(prompt) for prompt in prompts]
        running = list(zip(rollouts, seeds))
        while running:
            probes = await asyncio.gather(*(self._to_next_probe(rollout, seed) for rollout, seed in running))
            paused = [(*own, *asked) for own, asked in zip(running, probes) if asked is not None]
            answers = await asyncio.gather(*(self._induce(*asked) for *_, asked in map(_split, paused)))
            running = [
                (rollout, seed)
                for (rollout, seed, boundary, probe), answer in zip(paused, answers)
                if not self._leaves(rollout, boundary, probe, answer)
            ]
        eos = self.engine.tokenizer.eos_token_id
        unfinished = [rollout for rollout in rollouts if rollout.truncated and rollout.completion_ids[-1] != eos]
        await asyncio.gather(*map(self._finish_answer, unfinished))
        return rollouts
