"""Thoughts that are dropped or skipped (TON, arXiv 2505.16854)."""

import pytest
from datasets import Dataset

from step_trl import testbed
from step_trl.data import reverse_thinking_prompts, thought_dropout, tokenize_examples
from step_trl.thoughts import answer_block, continue_prompt, skipped_thoughts, split_thought, without_thought


COMPLETION = "<think>2 + 2 is 4.</think>\n<answer>4</answer>"
DROPPED = "<think>\n\n</think>\n<answer>4</answer>"


def test_half_of_the_thoughts_are_dropped_whatever_the_order():
    rows = Dataset.from_dict({"completion": [COMPLETION] * 200})
    found = thought_dropout(rows, 0.5, seed=0)["completion"]
    assert set(found) == {COMPLETION, DROPPED}
    dropped = [index for index, text in enumerate(found) if text == DROPPED]
    assert dropped[:8] == [0, 1, 3, 4, 5, 11, 16, 17]
    assert 75 < len(dropped) < 125
    assert thought_dropout(rows.select(range(8)), 0.5, seed=0)["completion"] == found[:8]
    assert thought_dropout(rows, 0.5, seed=1)["completion"] != found
    assert set(thought_dropout(rows, 0.0)["completion"]) == {COMPLETION}
    assert set(thought_dropout(rows, 1.0)["completion"]) == {DROPPED}


def test_the_last_message_loses_its_thought():
    user = {"role": "user", "content": "2 + 2?"}
    rows = Dataset.from_dict({"messages": [[user, {"role": "assistant", "content": COMPLETION}]]})
    (messages,) = thought_dropout(rows, 1.0)["messages"]
    assert messages == [user, {"role": "assistant", "content": DROPPED}]


@pytest.mark.parametrize(
    ("completion", "without"),
    [
        (COMPLETION, DROPPED),
        ("a thought</think>4", "\n\n</think>4"),  # opened in the prompt
        ("Hm. <think>a thought</think>4", "Hm. <think>\n\n</think>4"),
        ("<think>never closed", "<think>never closed"),
        ("4", "4"),
    ],
)
def test_a_completion_without_its_thought(completion, without):
    assert without_thought(completion) == without


def test_the_share_of_skipped_thoughts():
    completions = [f"<think>{thought}</think>4" for thought in ("\n\n", "2+2", "", " ")]
    assert skipped_thoughts(completions) == [True, False, True, True]  # a ratio of 0.75
    assert skipped_thoughts(["\n\n</think>4", "</think>4", "<think>", "4"]) == [True, True, False, False]
    assert skipped_thoughts([[{"role": "assistant", "content": completions[0]}]]) == [True]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"completion": ["x"]}, {"probability": 1.5}, "probability: 1.5 is not between 0 and 1"),
        ({"text": ["x"]}, {}, "dataset: it needs a column 'completion' or 'messages'; columns found: text"),
    ],
)
def test_bad_input_is_named(columns, options, message):
    with pytest.raises(ValueError, match=message):
        thought_dropout(Dataset.from_dict(columns), **options)


def test_a_thought_is_asked_for_that_leads_to_the_answer():
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "What is 2 + 2?"}]], "solution": ["4"]})
    (prompt,) = reverse_thinking_prompts(rows)["prompt"]
    assert "Question: What is 2 + 2?" in prompt[0]["content"] and "Answer: 4" in prompt[0]["content"]


def test_parts_of_a_completion():
    assert split_thought(COMPLETION) == ("2 + 2 is 4.", "\n<answer>4</answer>")
    assert split_thought("opened in the prompt</think>4") == ("opened in the prompt", "4")
    assert split_thought("never closed") == ("never closed", "")
    assert answer_block(COMPLETION) == "4" and answer_block("<answer>4</answer></think>5") is None


@pytest.mark.parametrize(
    ("prompt", "completion", "continued"),
    [
        ("?<think>\n", COMPLETION, "2 + 2 is 4.</think>\n<answer>4</answer>"),
        ("?<think>\n", "<think>\nHm</think>4", "Hm</think>4"),
        ("?<think>\n", "Hm</think>4", "Hm</think>4"),  # sampled after this prompt
        ("?<think>\n", DROPPED, "\n</think>\n<answer>4</answer>"),  # two newline characters between the tags
        ("?<think>\n", "\n\n</think>4", "\n</think>4"),
        ("?", COMPLETION, COMPLETION),
        ("What does <think> mean?", COMPLETION, COMPLETION),
    ],
)
def test_a_completion_goes_on_where_the_prompt_ends(prompt, completion, continued):
    assert continue_prompt(prompt, completion) == continued


def test_examples_keep_their_thoughts_as_tokens():
    """Whatever a chat template does with the thought of a message."""
    tokenizer = testbed.load_tokenizer()
    user = [{"role": "user", "content": "2 + 2?"}]
    prompt = tokenizer.apply_chat_template(user, add_generation_prompt=True, tokenize=False)
    texts = {"completion": [[{"role": "assistant", "content": DROPPED}]], "prompt": [user]}
    for rows in (texts, {"messages": [[*user, {"role": "assistant", "content": DROPPED}]]}):
        (row,) = tokenize_examples(Dataset.from_dict(rows), tokenizer)
        start = row["completion_mask"].index(1)
        assert tokenizer.decode(row["input_ids"][:start]) == prompt
        assert tokenizer.decode(row["input_ids"][start:]) == "\n</think>\n<answer>4</answer><|im_end|>"
        assert row["completion_mask"] == [0] * start + [1] * (len(row["input_ids"]) - start)
