"""Which edges are handed out, and when the others are dropped."""

import pickle

import pytest

from step_trl.rollout.replay import Edge, EdgeReplay


def edges(number, iteration):
    return [Edge([1], [index], [-0.5], False, 0.1, [0.5], {"solution": "4"}, iteration) for index in range(number)]


@pytest.mark.parametrize(("later", "left"), [(7, 8), (8, 0)])
def test_edges_that_were_not_used_stay_for_a_while(later, left):
    replay = EdgeReplay()
    replay.add("question", edges(40, 0))
    first = replay.draw(0, number=64)
    assert len(first) == 32 and len(replay) == 8
    second = replay.draw(later, number=64)
    assert len(second) == left and len(replay) == 0
    drawn = [edge.token_ids[0] for edge in first + second]
    assert len(set(drawn)) == len(drawn)


def test_the_latest_questions_come_first_and_the_choice_is_random():
    replay = EdgeReplay(per_question=4)
    replay.add("old", edges(10, 0))
    replay.add("new", edges(10, 1))
    drawn = replay.draw(1, number=6)
    assert [edge.iteration for edge in drawn] == [1] * 4 + [0] * 2
    assert [edge.token_ids for edge in drawn[:4]] != [[0], [1], [2], [3]]
    assert len(replay) == 14


def test_a_resumed_store_hands_out_the_same():
    replay, resumed = EdgeReplay(per_question=3, seed=7), EdgeReplay(per_question=3, seed=7)
    replay.add((1, 2), edges(9, 0))
    replay.draw(0, 3)
    resumed.load_state_dict(pickle.loads(pickle.dumps(replay.state_dict())))
    assert resumed.draw(1, 3) == replay.draw(1, 3)
