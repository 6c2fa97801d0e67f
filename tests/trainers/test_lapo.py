"""LAPO: the lengths of solutions, how prompts state them, and how stages pass them on."""

import json

import pytest
import torch
from small_runs import TESTBED_RUN, flags

from step_trl import testbed
from step_trl.cli.train import run_train
from step_trl.rewards import lapo_internalization_reward
from step_trl.trainers.lapo import SolutionLengths, state_length
from step_trl.trainers.lapo_config import LENGTHS_FILE


def prompt(text):
    return [{"role": "user", "content": text}]


def test_the_first_stage_keeps_the_last_median():
    lengths = SolutionLengths(unsolved=400, refine=False)
    assert lengths.of("a") == 400
    lengths.record("aaabbb", [10, 30, 90, 5, 6, 7], [1, 1, 0, 0, 0, 0])
    assert (lengths.of("a"), lengths.of("b")) == (20, 400)
    lengths.record("aab", [100, 300, 8], [1, 1, 1])
    assert (lengths.of("a"), lengths.of("b")) == (200, 8)
    lengths.record("a", [1], [0])
    assert lengths.of("a") == 400  # not solved this time (paper, below eq. 3)


def test_the_second_stage_only_shortens(tmp_path):
    (tmp_path / LENGTHS_FILE).write_text(json.dumps({"a": 200}))
    lengths = SolutionLengths(400, True, tmp_path / LENGTHS_FILE)
    lengths.record("aabb", [300, 500, 60, 80], [1, 1, 1, 0])
    assert (lengths.of("a"), lengths.of("b")) == (200, 60)  # b was not solved before
    lengths.record("ab", [150, 1], [1, 0])
    assert (lengths.of("a"), lengths.of("b")) == (150, 60)


def test_a_problem_is_known_by_its_text():
    key = SolutionLengths.key
    assert key(prompt("1 + 1")) == key(prompt(" 1 + 1 ")) != key(prompt("1 + 2"))
    assert key("1 + 1") == key(prompt("1 + 1"))


def test_the_length_is_stated_in_the_opening_of_the_thought():
    tokenizer = testbed.load_tokenizer()
    opened = tokenizer.apply_chat_template(prompt("1 + 1"), add_generation_prompt=True, return_dict=False)
    closed = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    for ids in (opened, closed):
        text = tokenizer.decode(state_length(ids, 77, tokenizer))
        before, _, stated = text.rpartition("<think>")
        assert stated.strip() == "I will answer the question with 77 tokens." and before.endswith("assistant\n")


def test_both_stages(tmp_path, build, easy_problems, tokenizer, monkeypatch):
    first = build("lapo", max_steps=2, save_strategy="steps", save_steps=1)
    first.train()
    output = tmp_path / "lapo"
    found, earlier = (json.loads((folder / LENGTHS_FILE).read_text()) for folder in (output, output / "checkpoint-1"))
    assert found.items() > earlier.items() and all(0 < tokens <= 96 for tokens in found.values())
    assert found.keys() < {SolutionLengths.key(row["prompt"]) for row in easy_problems}

    with pytest.raises(ValueError, match=r"lapo_lengths: there is no file .*Train a model with lapo_stage=.discovery"):
        build("lapo", lapo_stage="internalization")
    known = easy_problems.filter(lambda row: SolutionLengths.key(row["prompt"]) in found)
    second = build(
        "lapo", lapo_stage="internalization", lapo_lengths=str(output / LENGTHS_FILE), train_dataset=known,
        trainer_options={"eval_dataset": known.select(range(1))}, num_generations_eval=1,
    )  # fmt: skip
    records, original = [], second._calculate_rewards

    def recording(rows, prompts, completions, ids):
        matrix = original(rows, prompts, completions, ids)
        records.append((rows, ids, matrix.clone()))
        return matrix

    prompts, tokenize = [], second._tokenize_prompts

    def seeing(rows):
        result = tokenize(rows)
        prompts.append([tokenizer.decode(ids) for ids in result[0]])
        return result

    monkeypatch.setattr(second, "_calculate_rewards", recording)
    monkeypatch.setattr(second, "_tokenize_prompts", seeing)
    second.train()
    (rows, ids, matrix), (texts,) = records[0], prompts
    targets = [found[SolutionLengths.key(row["prompt"])] for row in rows]
    assert [f"with {target} tokens." in text for target, text in zip(targets, texts, strict=True)] == [True] * len(
        rows
    )
    lengths, correct = torch.tensor([len(one) for one in ids]), matrix[:, 0] > 0.5
    expected = lapo_internalization_reward(lengths, correct, torch.tensor(targets))
    torch.testing.assert_close(correct + matrix[:, 1], expected)
    refined = json.loads((output / LENGTHS_FILE).read_text())
    assert all(refined[key] <= tokens for key, tokens in found.items())

    prompts.clear()
    second.evaluate()
    assert "tokens." not in prompts[0][0]  # it has to know by itself
    assert json.loads((output / LENGTHS_FILE).read_text()) == refined


def test_it_goes_on_with_the_lengths_of_its_checkpoint(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("trainer: lapo\nlearning_rate: 0.0\n")
    options = TESTBED_RUN | {"output_dir": tmp_path / "run", "max_completion_length": 96, "save_strategy": "steps"}
    command = ["--config", str(recipe), *flags(options | {"save_steps": 1})]
    run_train([*command, "--dataset_split", "easy"])
    before = json.loads((tmp_path / "run" / "checkpoint-1" / LENGTHS_FILE).read_text())
    run_train([*command, "--dataset_split", "easy", "--max_steps", "2", "--resume_from_checkpoint", "true"])
    after = json.loads((tmp_path / "run" / LENGTHS_FILE).read_text())
    assert before and before.items() < after.items()
