"""The format reward, case by case."""

from __future__ import annotations

import pytest

from step_trl.rewards import format_reward, think_answer_format_reward


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
