"""Lengths that prompts ask for."""

import datasets
import pytest

from step_trl.token_targets import add_token_targets


ROWS = datasets.Dataset.from_list(
    [
        {
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"What is {number}?"}],
            "solution": str(number),
        }
        for number in range(500)
    ]
)


def test_each_prompt_asks_for_its_own_length():
    rows = add_token_targets(ROWS, 100, 103)
    assert sorted(set(rows["target_tokens"])) == [100, 101, 102, 103]
    for row, before in zip(rows, ROWS, strict=True):
        system, user = row["prompt"]
        assert system == before["prompt"][0] and row["solution"] == before["solution"]
        assert user["content"] == f"{before['prompt'][1]['content']} Think for {row['target_tokens']} tokens."
    assert add_token_targets(ROWS, 100, 103)["target_tokens"] == rows["target_tokens"]
    assert add_token_targets(ROWS, 100, 103, seed=1)["target_tokens"] != rows["target_tokens"]


def test_a_budget_of_an_evaluation():
    rows = add_token_targets(ROWS, 512, 512, at_most=True)
    assert set(rows["target_tokens"]) == {512}
    assert rows[0]["prompt"][-1]["content"] == "What is 0? Think for maximum 512 tokens."


def test_the_range_is_checked():
    with pytest.raises(ValueError, match="lowest, highest: 0 and 5"):
        add_token_targets(ROWS, 0, 5)
