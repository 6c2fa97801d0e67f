"""S-GRPO's groups on the testbed model."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_trl import testbed
from step_trl.rollout import DynamicTruncatedRollout, RandomCut, SamplingParams, SerialGroupRollout
from step_trl.rollout.engines import TransformersEngine
from step_trl.rollout.serial_group import draw_cuts


SAMPLING = SamplingParams(max_tokens=300)


@pytest.fixture(scope="module")
def engine():
    return TransformersEngine(testbed.load_model(), testbed.load_tokenizer())


@pytest.fixture(scope="module")
def prompts(engine):
    rows = testbed.load_dataset("easy").select(range(6))["prompt"]
    return engine.tokenizer.apply_chat_template(list(rows), add_generation_prompt=True, return_dict=False)


@given(st.integers(1, 50), st.integers(0, 60), st.integers())
def test_cuts_are_in_order_and_differ_where_they_can(thought, number, seed):
    cuts = draw_cuts(thought, number, seed)
    assert cuts == sorted(cuts) and len(cuts) == number and cuts == draw_cuts(thought, number, seed)
    assert all(1 <= cut <= thought for cut in cuts)
    assert number > thought or len(set(cuts)) == number


def test_a_group_is_exits_from_one_thought(engine, prompts):
    tokenizer = engine.tokenizer
    repeated = [prompt for prompt in prompts for _ in range(4)]
    seeds = list(range(100, 100 + len(repeated)))
    rollouts = SerialGroupRollout(engine, SAMPLING).run(repeated, 4, seeds)
    plain = DynamicTruncatedRollout(engine, sampling=SAMPLING).run(prompts, seeds[3::4])
    closing = tokenizer.encode(RandomCut.closing, add_special_tokens=False)
    cut_lengths = set()
    for group, alone in zip((rollouts[i : i + 4] for i in range(0, len(rollouts), 4)), plain, strict=True):
        *exits, whole = group
        assert whole.completion_ids == alone.completion_ids and not whole.truncated
        lengths = []
        for exit in exits:
            length = exit.injected.index(True)
            lengths.append(length)
            path, answer = exit.completion_ids[:length], exit.completion_ids[length + len(closing) :]
            assert path == whole.completion_ids[:length]
            assert exit.logprobs[:length] == whole.logprobs[:length]
            assert exit.completion_ids[length : length + len(closing)] == closing
            assert [math.isnan(value) for value in exit.logprobs] == exit.injected
            assert sum(exit.injected) == len(closing)
            assert exit.truncated and exit.sampled_tokens == len(answer) > 0 and exit.discarded_tokens == 0
            assert len(exit.completion_ids) <= 300
            assert exit.completion_ids[-1] == tokenizer.eos_token_id or len(exit.completion_ids) == 300
            assert "</think>" not in tokenizer.decode(path)
        assert lengths == sorted(lengths)
        cut_lengths.update(lengths)
    assert len(cut_lengths) > 10
    again = SerialGroupRollout(engine, SAMPLING).run(repeated, 4, seeds)
    assert [rollout.completion_ids for rollout in again] == [rollout.completion_ids for rollout in rollouts]


def test_an_open_thought_leaves_room_for_an_answer(engine, prompts):
    closing = len(engine.tokenizer.encode(RandomCut.closing, add_special_tokens=False))
    rollouts = SerialGroupRollout(engine, SamplingParams(max_tokens=closing + 12)).run(
        [prompts[0]] * 30, 30, list(range(30))
    )
    *exits, whole = rollouts
    assert len(whole.completion_ids) == closing + 12
    assert all(sum(exit.injected) == closing and not exit.injected[-1] for exit in exits)
    assert max(len(exit.completion_ids) for exit in exits) == closing + 12
    assert sum(exit.discarded_tokens for exit in exits) == 0  # no answer is longer than its budget


def test_a_budget_may_be_all_of_the_context(engine, prompts):
    context = engine.model.config.max_position_embeddings
    budget = context - len(prompts[0])
    rollouts = SerialGroupRollout(engine, SamplingParams(max_tokens=budget)).run([prompts[0]] * 4, 4, [5, 6, 7, 8])
    assert all(len(rollout.completion_ids) <= budget for rollout in rollouts)


def test_what_is_refused(engine, prompts):
    with pytest.raises(ValueError, match="prompts: these 3 do not form whole groups of num_generations=2"):
        SerialGroupRollout(engine, SAMPLING).run(prompts[:1] * 3, 2)
    with pytest.raises(ValueError, match="prompts: these 4"):
        SerialGroupRollout(engine, SAMPLING).run(prompts[:2] * 2, 2)
    with pytest.raises(ValueError, match="max_completion_length: 5 leaves no room"):
        SerialGroupRollout(engine, SamplingParams(max_tokens=5))
