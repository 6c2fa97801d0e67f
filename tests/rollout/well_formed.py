"""Checks that hold for every rollout of the testbed model, on any engine."""

import math

from step_trl.rollout import Rollout
from step_trl.steps import TriggerSegmenter


def assert_well_formed(record: Rollout, tokenizer, max_tokens: int, threshold: float = 0.95) -> None:
    ids = record.completion_ids
    assert len(ids) == len(record.logprobs) == len(record.injected)
    assert ids[-1] == tokenizer.eos_token_id or len(ids) == max_tokens
    assert "WaitWait" not in tokenizer.decode(ids)
    assert all(math.isnan(logprob) for logprob, injected in zip(record.logprobs, record.injected) if injected)
    if record.truncated:
        assert record.probes[-1].confidence > threshold
        assert TriggerSegmenter(tokenizer).count(ids) == len(record.probes)
