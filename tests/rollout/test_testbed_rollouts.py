"""Truncated rollouts of the testbed model on the in-process engine: the fast ways equal the plain pausing one."""

from functools import cache

import pytest
from rollout.well_formed import assert_well_formed

from step_trl import testbed
from step_trl.rollout import ConfidenceTruncation, DynamicTruncatedRollout, SamplingParams
from step_trl.rollout.engines import TransformersEngine


NUMBER = 100


@pytest.fixture(scope="module")
def tokenizer():
    return testbed.load_tokenizer()


@pytest.fixture(scope="module")
def run(tokenizer):
    engine = TransformersEngine(testbed.load_model(), tokenizer)
    problems = testbed.load_dataset("train").select(range(NUMBER))["prompt"]
    prompts = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in problems]

    @cache
    def run(speculative, max_tokens=256, **options):
        callback = ConfidenceTruncation(tokenizer, **options)
        engine.drop_prefix_cache()
        rollout = DynamicTruncatedRollout(engine, [callback], SamplingParams(max_tokens), speculative)
        return rollout.run(prompts, seeds=range(NUMBER))

    return run


def test_speculation_and_early_rejection_change_no_token(run):
    plain = run(speculative=False, early_rejection=False)
    fast = run(speculative=True, early_rejection=True)
    differences = sum(a.completion_ids != b.completion_ids for a, b in zip(plain, fast, strict=True))
    assert len(plain) == NUMBER
    assert differences == 0
    outcomes = [probe.outcome for record in fast for probe in record.probes]
    assert outcomes.count("exit") > 25 and outcomes.count("abandoned") > 10
    wasted = [
        sum(len(p.token_ids) for r in records for p in r.probes if p.outcome != "exit") for records in (plain, fast)
    ]
    assert wasted[1] < wasted[0]


def test_every_rollout_is_well_formed(run, tokenizer):
    for record in run(speculative=True, early_rejection=True):
        assert_well_formed(record, tokenizer, max_tokens=256)


@pytest.mark.parametrize("speculative", [False, True])
def test_every_exit_has_its_whole_answer(run, tokenizer, speculative):
    exits = [record for record in run(speculative, max_tokens=64) if record.truncated]
    assert len(exits) > 10
    for record in exits:
        assert record.ended and record.completion_ids[-1] == tokenizer.eos_token_id
        assert "\\boxed{" in tokenizer.decode(record.completion_ids[record.injected.index(True) :])
