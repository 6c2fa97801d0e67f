"""Rollouts that are recorded, verified and paired (VerIPO, arXiv 2505.19000)."""

import inspect
import json

import pandas as pd
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from trl import DPOConfig, DPOTrainer

from step_trl import testbed
from step_trl.preferences import (
    RolloutDPOTrainer,
    RolloutVerifier,
    agree,
    latest_groups,
    preference_pairs,
    read_rollouts,
    repetition,
    summarize_verification,
    thin_easy_prompts,
    tokenize_pairs,
)
from step_trl.preferences.pairs import cut_at_wrong_answer
from step_trl.preferences.records import RolloutRecorder, prompt_key, prompt_of


REPEATED = "so it goes on " * 20


def rollouts(*outputs, group=0):
    """Rollouts of a group: right or not, the value its thought ends with, its length, and other columns."""
    rows = []
    for number, (correct, ends_with, length, others) in enumerate(outputs):
        answer = "4" if correct else "5"
        thought = f"some thought {number} that ends with {ends_with}"
        row = {
            "group": group,
            "prompt": "2 + 2?",
            "images": "",
            "thought": thought,
            "answer": answer,
            "correct": correct,
        }
        row |= {"completion": f"<think>{thought}</think>{answer}", "truncated": False, "thought_tokens": length}
        rows.append(row | others)
    return pd.DataFrame(rows)


V3 = rollouts(
    (True, 4, 900, {}), (True, 7, 700, {}), (False, 5, 1200, {}), (False, 5, 4000, {"thought": REPEATED + "5"})
)


@pytest.mark.parametrize(
    ("text", "share"),
    [("a b c a b c a b c", 0.5), ("the sum is five so the answer is five", 0.0), ("a b c", 0.0), ("", 0.0)],
)
def test_the_share_of_repeated_4_grams(text, share):
    assert repetition(text) == share


def test_the_worked_example_of_four_rollouts():
    """V3 of the specification."""
    verified = RolloutVerifier().verify(V3)
    assert verified["clean"].tolist() == [True, False, False, False]
    assert verified["consistent"].tolist() == [True, False, True, True]
    assert verified["too_long"].tolist() == [False, False, False, True]  # the limit is 1,600
    assert verified["repetitive"].tolist() == [False, False, False, True]
    pairs = preference_pairs(verified)
    assert pairs[["type", "chosen", "rejected"]].values.tolist() == [["accuracy", V3.completion[0], V3.completion[3]]]
    reused = preference_pairs(verified, reuse_chosen=True)
    assert reused[["type", "chosen", "rejected"]].values.tolist()[1:] == [
        ["consistency", V3.completion[0], V3.completion[1]]
    ]
    found = summarize_verification(verified, pairs)
    assert found == {
        "rollouts": 4, "groups": 1, "accuracy": 0.5, "repetition": 0.25, "length violations": 0.25, "clean": 0.25,
        "inconsistency": 0.25, "accuracy pairs": 1, "consistency pairs": 0, "reflection pairs": 0,
    }  # fmt: skip


OUTPUTS = st.lists(
    st.tuples(st.booleans(), st.sampled_from([4, 5, 7]), st.integers(1, 99), st.just({})), min_size=1, max_size=8
)


@given(OUTPUTS, st.booleans())
def test_pairs_prefer_clean_rollouts_and_use_none_twice(outputs, reuse_chosen):
    verified = RolloutVerifier().verify(rollouts(*outputs))
    pairs = preference_pairs(verified, reuse_chosen=reuse_chosen)
    by_text = verified.set_index("completion")
    chosen = by_text.loc[pairs["chosen"]]
    assert len(pairs) <= 2 and pairs["type"].is_unique and chosen["clean"].all()
    for kind, rejected in zip(pairs["type"], pairs["rejected"], strict=True):
        row = by_text.loc[rejected]
        assert (not row["correct"]) if kind == "accuracy" else (row["correct"] and not row["clean"])
    used = [*pairs["rejected"], *(set(pairs["chosen"]) if reuse_chosen else pairs["chosen"])]
    assert len(used) == len(set(used))
    # None is missing: there is a pair whenever there are a clean rollout and a worse one.
    clean, wrong, unclean = verified["clean"], ~verified["correct"], verified["correct"] & ~verified["clean"]
    places = len(verified) if reuse_chosen else clean.sum()
    assert len(pairs) == (min(places, int(wrong.any()) + int(unclean.any())) if clean.any() else 0)


def test_what_a_rejected_rollout_is():
    cut = {"truncated": True}
    outputs = [(True, 4, 10, {}), (True, 4, 8, {}), (False, 5, 15, {}), (False, 5, 12, cut), (True, 7, 9, {})]
    group = rollouts(*outputs)
    pairs = preference_pairs(RolloutVerifier().verify(group))
    # The truncated one before the longer one, and the second shortest clean one for the second pair.
    assert pairs["rejected"].tolist() == [group.completion[3], group.completion[4]]
    assert pairs["chosen"].tolist() == [group.completion[1], group.completion[0]]
    assert pairs["rejected_truncated"].tolist() == [True, False]


def test_a_thought_agrees_with_its_answer_by_its_last_value():
    cases = [
        (r"It is 3, so \boxed{4}. I checked 2 things.", "4", True),
        ("2 + 2 = 4", "5", False),
        ("It is 0.5", "1/2", True),
        ("It is 1,000", "1000", True),
        ("no number", "4", True),
        ("2 + 2 = 4", None, True),
        ("There are 2 shapes, and one is red.", "red", True),  # a number says nothing about a word
        (r"It is \boxed{blue}.", "red", False),
        (r"It is \boxed{\frac{1}{2}}", "0.5", True),
    ]
    thoughts, answers, expected = zip(*cases, strict=True)
    assert agree(thoughts, answers) == list(expected)


def test_an_answer_in_words_is_the_last_of_its_group_that_the_thought_names():
    cases = [
        ("east blue circle, southeast red square. It is Red Square.", "red square", 0, True),
        ("east blue circle, southeast red square. It is blue circle again.", "red square", 0, False),
        ("It is a blue circle.", "blue circle", 0, True),
        ("It is southeast.", "southeast", 1, True),
        ("It was south. Now it is southeast.", "south", 1, False),
        ("It was southeast. Now it is south.", "South", 1, True),
        ("It is a blue circle.", "red square", 2, True),  # no answer of this group is a circle
        ("Two, so it is 3.", "3", 0, True),
        ("It is B, not a circle.", "B", 3, True),  # a letter may be an article
        ("It is B, not a circle.", "A", 3, True),
    ]
    thoughts, answers, groups, expected = zip(*cases, strict=True)
    assert agree(thoughts, answers, groups) == list(expected)
    assert all(agree(thoughts, answers))


def test_a_judge_decides_where_there_is_something_to_judge():
    asked = []

    def judge(thought, answer):
        asked.append((thought, answer))
        return False

    group = rollouts((True, 4, 10, {}), (False, 5, 10, {"answer": None}), (True, 4, 10, {"thought": "\n\n"}))
    assert RolloutVerifier(judge_fn=judge).verify(group)["consistent"].tolist() == [False, True, True]
    assert asked == [(group.thought[0], "4")]


def test_a_thought_that_ends_at_a_wrong_answer_is_rejected():
    completion = "2 + 2 = 5.\n\nWait, 2 + 2 = 4.\n\nWait, 2 + 2 = 4 again.</think>\n\\boxed{4}"
    cut = "2 + 2 = 5.\n\n</think>\n\\boxed{5}"
    assert cut_at_wrong_answer(completion, "4") == cut
    assert cut_at_wrong_answer(completion.replace("5", "4"), "4") is None
    assert cut_at_wrong_answer("2 + 2 = 5. Wait, 4", "4") is None  # it has no answer
    group = rollouts((True, 4, 10, {"completion": completion}))
    verified = RolloutVerifier().verify(group)
    assert preference_pairs(verified).empty
    pairs = preference_pairs(verified, reflection=True)
    assert pairs[["type", "chosen", "rejected"]].values.tolist() == [["reflection", completion, cut]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_repetition": 2.0}, "max_repetition: 2.0 is not a share"),
        ({"max_length_ratio": 0.0}, "max_length_ratio: 0.0 is not positive"),
        ({"max_concurrent": 0}, "max_concurrent: 0 is less than one"),
    ],
)
def test_bad_limits_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RolloutVerifier(**options)


def test_missing_columns_and_rollouts_are_named(tmp_path):
    with pytest.raises(ValueError, match="there is no column thought and answer"):
        RolloutVerifier().verify(V3.drop(columns=["thought", "answer"]))
    with pytest.raises(FileNotFoundError, match=r"rollouts: .* records no rollouts"):
        read_rollouts(tmp_path)


PROMPTS = [[{"role": "user", "content": "2 + 2?"}], "[2, 2]"]


def recorded(folder, verdicts_by_update):
    """Record groups of two rollouts of two prompts for each update."""
    recorder = RolloutRecorder(folder, testbed.load_tokenizer())
    completions = [
        "2 + 2 = 4.\n</think>\n\nThe final answer is \\boxed{4}.",
        "<think>\n\n</think><answer>5</answer>",
    ] * 2
    rows = [{"prompt": prompt, "solution": 4} for prompt in PROMPTS for _ in range(2)]
    for update, verdicts in verdicts_by_update:
        recorder.write(update, recorder.describe(rows, completions, group=[0, 0, 1, 1], correct=verdicts))
    return read_rollouts(folder)


def test_what_is_recorded_and_read_again(tmp_path):
    found = recorded(tmp_path, [(1, [True] * 4), (1, [False] * 4), (2, [True, True, True, False])])
    assert found["group"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert found["update"].tolist() == [1] * 8 + [2] * 4
    assert found["answer"].tolist()[:2] == ["4", "5"] and found["solution"].tolist()[:2] == ["4", "4"]
    assert found["thought"].tolist()[:2] == ["2 + 2 = 4.\n", "\n\n"]
    assert found["thought_tokens"].tolist()[0] == len(testbed.load_tokenizer().encode("2 + 2 = 4.\n"))
    assert [prompt_of(key) for key in found["prompt"][::2]] == PROMPTS * 3
    last = latest_groups(found)
    assert last["update"].tolist() == [2] * 4 and last["correct"].tolist() == [True, True, True, False]
    # A run that is resumed writes its files again.
    assert len(recorded(tmp_path, [(2, [True] * 4), (3, [True] * 4)])) == 16


def test_most_easy_prompts_are_dropped(tmp_path):
    found = recorded(tmp_path, [(1, [True] * 4), (2, [True, True, True, False])])
    rows = Dataset.from_dict({"prompt": [PROMPTS[0], [{"role": "user", "content": "new"}]], "solution": ["4", "1"]})
    assert thin_easy_prompts(rows, found, keep=0.0)["solution"] == ["1"]
    assert thin_easy_prompts(rows, found, keep=1.0)["solution"] == ["4", "1"]
    prompts = [[{"role": "user", "content": str(number)}] for number in range(200)]
    easy = pd.DataFrame({"prompt": map(prompt_key, prompts), "images": "", "group": range(200), "correct": True})
    kept = thin_easy_prompts(Dataset.from_dict({"prompt": prompts}), easy, seed=1)
    assert 20 < len(kept) < 60
    backwards = thin_easy_prompts(Dataset.from_dict({"prompt": prompts[::-1]}), easy, seed=1)
    assert backwards["prompt"] == kept["prompt"][::-1]
    with pytest.raises(ValueError, match="keep: all 1 prompts are easy"):
        thin_easy_prompts(rows.select([0]), found, keep=0.0)
    with pytest.raises(ValueError, match="keep: 2 is not a probability"):
        thin_easy_prompts(rows, found, keep=2)


PAIR = pd.DataFrame(
    [
        {
            "group": 0,
            "type": "accuracy",
            "prompt": json.dumps(PROMPTS[0]),
            "chosen": "<think>\n2 + 2 = 4.</think>4",
            "rejected": "2 + 2 = 5.",
            "rejected_truncated": True,
        }
    ]
)


def test_pairs_are_tokenized_as_they_were_sampled():
    tokenizer = testbed.load_tokenizer()
    (row,) = tokenize_pairs(PAIR, tokenizer)
    prompt = tokenizer.apply_chat_template(PROMPTS[0], add_generation_prompt=True, tokenize=False)
    assert prompt.endswith("<think>\n") and tokenizer.decode(row["prompt_ids"]) == prompt
    assert tokenizer.decode(row["chosen_ids"]) == "2 + 2 = 4.</think>4<|im_end|>"
    assert tokenizer.decode(row["rejected_ids"]) == "2 + 2 = 5."


def test_dpo_trains_on_these_tokens(tmp_path):
    """V4: the loss is log 2 where the policy is its reference, and that of the formula elsewhere."""
    tokenizer = testbed.load_tokenizer()
    options = {"beta": 0.1, "learning_rate": 1e-3, "per_device_train_batch_size": 1, "max_steps": 2, "bf16": False}
    options |= {"logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    rows = tokenize_pairs(PAIR, tokenizer)
    trainer = RolloutDPOTrainer(
        str(testbed.MODEL_DIR),
        args=DPOConfig(str(tmp_path), **options),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    assert trainer.train_dataset.column_names == rows.column_names
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses, margins = ([entry[name] for entry in logged] for name in ("loss", "rewards/margins"))
    assert losses[0] == pytest.approx(0.6931471806, rel=1e-5) and losses[1] < losses[0]
    assert losses == pytest.approx([dpo_loss(margin) for margin in margins], rel=1e-4)
    assert dpo_loss(0.1 * ((-50 - -52) - (-60 - -58))) == pytest.approx(0.5130152524)


def dpo_loss(margin):
    return -torch.nn.functional.logsigmoid(torch.tensor(margin, dtype=torch.float64)).item()


def test_the_hook_of_trl_s_dpo_trainer():
    """`RolloutDPOTrainer` overrides it."""
    assert list(inspect.signature(DPOTrainer._prepare_dataset).parameters) == [
        "self", "dataset", "processing_class", "args", "dataset_name",
    ]  # fmt: skip
