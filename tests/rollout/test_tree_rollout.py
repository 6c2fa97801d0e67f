"""Trees of segments on the testbed's model."""

import pytest

from step_trl import testbed
from step_trl.rollout import DynamicTruncatedRollout, SamplingParams, TreeRollout, path_to
from step_trl.rollout.engines import TransformersEngine


@pytest.fixture(scope="module")
def engine():
    return TransformersEngine(testbed.load_model(), testbed.load_tokenizer())


@pytest.fixture(scope="module")
def prompts(engine):
    rows = testbed.load_dataset("easy").select(range(2))
    return [
        engine.tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        for row in rows
    ]


def test_a_shared_segment_is_sampled_once(engine, prompts):
    before = engine.stats.sampled_tokens
    rollout = TreeRollout(engine, SamplingParams(max_tokens=12), segment_tokens=4)
    (tree,) = rollout.run(prompts[:1], seeds=[0])
    leaves = [node for node, segment in enumerate(tree) if segment.is_leaf]
    assert len(leaves) == 216 and len(tree) == 6 + 36 + 216
    sampled = sum(len(segment.token_ids) for segment in tree)
    assert engine.stats.sampled_tokens - before == rollout.sampled_tokens == sampled == 4 * len(tree)
    assert all(len(path_to(tree, leaf)) == 12 for leaf in leaves)


def test_a_branch_that_ends_is_a_leaf_and_the_last_level_goes_to_the_end(engine, prompts):
    trees = TreeRollout(engine, SamplingParams(max_tokens=300), [2, 3], segment_tokens=100).run(prompts, [3, 4])
    for tree in trees:
        for node, segment in enumerate(tree):
            parent = segment.parent
            assert segment.start == len(path_to(tree, parent)) and parent < node
            children = [child for child, other in enumerate(tree) if other.parent == node]
            level = 0 if parent == -1 else 1
            assert segment.is_leaf == (not children) == (level == 1 or segment.ended)
            assert len(children) in (0, 3)
            assert segment.ended == (segment.token_ids[-1] == engine.tokenizer.eos_token_id)
            end = segment.start + len(segment.token_ids)
            assert segment.ended or end == (300 if segment.is_leaf else 100)
            assert len(segment.logprobs) == len(segment.token_ids) and max(segment.logprobs) <= 0
    assert any(segment.ended and segment.parent >= 0 for tree in trees for segment in tree)


def test_a_seeded_tree_depends_on_its_seed_alone(engine, prompts):
    both = TreeRollout(engine, SamplingParams(max_tokens=40, temperature=2.0), [2, 2], segment_tokens=10).run(
        prompts, [3, 4]
    )
    alone = TreeRollout(engine, SamplingParams(max_tokens=40, temperature=2.0), [2, 2], 10, max_in_flight=1).run(
        prompts[1:], [4]
    )
    assert [segment.token_ids for segment in alone[0]] == [segment.token_ids for segment in both[1]]
    first, second = (segment for segment in both[0] if segment.parent == -1)
    assert first.token_ids != second.token_ids


def test_a_segment_that_fills_the_budget_has_no_children(engine, prompts):
    (tree,) = TreeRollout(engine, SamplingParams(max_tokens=8), [2, 2], segment_tokens=8).run(prompts[:1], [0])
    assert len(tree) == 2 and all(segment.is_leaf and not segment.ended for segment in tree)


def test_a_tree_without_branches_is_a_completion(engine, prompts):
    (tree,) = TreeRollout(engine, SamplingParams(max_tokens=60, temperature=0.0), [1, 1], 20).run(prompts[:1])
    (whole,) = DynamicTruncatedRollout(engine, sampling=SamplingParams(max_tokens=60, temperature=0.0)).run(
        prompts[:1]
    )
    assert path_to(tree, 1) == whole.completion_ids
