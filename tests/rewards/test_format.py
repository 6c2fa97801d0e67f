"""The format reward, case by case."""

from __future__ import annotations

import pytest

from step_trl.rewards import format_reward, think_answer_accuracy_reward, think_answer_format_reward


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("I add.</think>7", 1.0),
        ("<think>I add.</think>7", 1.0),
        ("\n<think>\nI add.\n</think>\n\n7", 1.0),
        ("I add.", 0.0),
        ("", 0.0),
        ("I add.</think>", 0.0),
        ("I add.</think> \n", 0.0),
        ("</think>7", 0.0),
        ("<think></think>7", 0.0),
        ("<think> \n</think>7", 0.0),
        ("I add.</think>7</think>", 0.0),
        ("I add.</think></think>7", 0.0),
        ("<think><think>I add.</think>7", 0.0),
        ("I add.<think>More.</think>7", 0.0),
        ("I add.</think><think>7", 0.0),
        ("I add <thi</think>nk>7", 1.0),
    ],
)
def test_texts(text, reward):
    assert format_reward([text]) == [reward]
    assert format_reward(completions=[[{"role": "assistant", "content": text}]]) == [reward]


def test_conversations_are_what_the_assistant_wrote():
    completion = [
        {"role": "assistant", "content": "I call a tool."},
        {"role": "tool", "content": "</think>"},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": "It is 7.</think>7"},
    ]
    assert format_reward([completion, completion[:2], []]) == [1.0, 0.0, 0.0]


def test_other_columns_are_let_through():
    assert format_reward(prompts=["?"], completions=["a</think>b"], solution=["b"], trainer_state=None) == [1.0]


FORM = "<think>\n\n</think>\n<answer>4</answer>"


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        (FORM, 1.0, 1.0),
        (FORM + " ", 0.0, 1.0),
        (FORM + "\n", 0.0, 1.0),
        ("<answer>4</answer>", 0.0, 0.0),
        (FORM + "x" + "<answer>5</answer>", 1.0, 0.0),
        ("2 + 2</think><answer>4</answer>", 0.0, 1.0),  # opened in the prompt
        ("<think>a<think>b</think><answer>4</answer>", 1.0, 0.0),
        ("<think>a</think>4", 0.0, 0.0),
        ("<think>a</think><answer>4", 0.0, 0.0),
    ],
)
def test_a_thought_and_an_answer_in_tags(text, strict, lenient):
    assert think_answer_format_reward([text], strict=True) == [strict]
    assert think_answer_format_reward([text]) == [lenient]
    assert think_answer_format_reward(completions=[[{"role": "assistant", "content": text}]]) == [lenient]


@pytest.mark.parametrize(
    ("text", "total"),
    [
        (FORM, 2.0),
        ("It is 2 + 2. The answer is 4", 1.0),  # right, without tags
        (FORM.replace("4", "5"), 1.0),  # well-formed, wrong
        ("It is 5", 0.0),
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_the_reward_of_ton_is_accuracy_and_format(text, total, strict):
    rewards = (
        think_answer_accuracy_reward([text], ["4"], strict=strict),
        think_answer_format_reward([text], strict=strict),
    )
    assert sum(reward for (reward,) in rewards) == total


@pytest.mark.parametrize(
    ("text", "solution", "strict", "lenient"),
    [
        ("<think>a</think><answer>red circle</answer>", "red circle", 1.0, 1.0),
        ("<think>a</think><answer>red</answer>", "blue", 0.0, 0.0),
        ("<think>a</think><answer>0.5</answer>", "1/2", 0.0, 1.0),
        ("<think>a</think><answer>\nred\n</answer>", "red", 0.0, 1.0),  # on several lines
        ("<think>a</think><answer>4</answer><answer>5</answer>", "5", 0.0, 1.0),  # the first, and the last
        ("<think>a</think><answer>4</answer><answer>5</answer>", "4", 1.0, 0.0),
        (r"<think>a</think><answer>It is \boxed{4}.</answer>", "4", 1.0, 1.0),
        ("<think><answer>4</answer></think>5", "4", 1.0, 0.0),  # within the thought
    ],
)
def test_the_answer_block(text, solution, strict, lenient):
    assert think_answer_accuracy_reward([text], [solution], strict=True) == [strict]
    assert think_answer_accuracy_reward([text], [solution]) == [lenient]
    assert think_answer_accuracy_reward([[{"role": "assistant", "content": text}]], [solution]) == [lenient]
