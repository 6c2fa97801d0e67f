"""Stages other than a method: fine-tuning on examples, and what they share with methods."""

import json
import re

import pandas as pd
import pytest
from datasets import Dataset
from safetensors.torch import load_file
from small_runs import SMALL_RUN, TESTBED_RUN

from step_trl import testbed
from step_trl.cli import train
from step_trl.cli.dry_run.plan import print_plan
from step_trl.cli.sft import with_thoughts
from step_trl.preferences import read_rollouts


EXAMPLE = "<think>\nTwo and two are four.\n</think>\n<answer>4</answer>"
MODEL = {name: TESTBED_RUN[name] for name in ("model_name_or_path", "dtype")}


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe, and return its arguments."""

    def write(**fields):
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(SMALL_RUN | MODEL | {"output_dir": str(tmp_path / "run")} | fields))
        return ["--config", str(path)]

    return write


@pytest.fixture
def examples(tmp_path):
    file = tmp_path / "examples.jsonl"
    user = {"role": "user", "content": "What is 2 + 2?"}
    row = {"messages": [user, {"role": "assistant", "content": EXAMPLE}]}
    file.write_text(f"{json.dumps(row)}\n" * 4)
    return str(file)


def test_fine_tuning_on_examples(recipe, examples, tmp_path, capsys):
    options = {
        "max_steps": 30,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
    }
    given = recipe(trainer="sft", dataset=examples, thought_dropout=1.0, **options)
    assert print_plan(given) == 0
    assert "4 examples of at most" in " ".join(capsys.readouterr().out.split())
    folder = train.run_train(given)
    model, tokenizer = testbed.load_model(), testbed.load_tokenizer()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    prompt = [{"role": "user", "content": "What is 2 + 2?"}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    learned = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(learned, skip_special_tokens=True) == "\n</think>\n<answer>4</answer>"


def test_thoughts_that_lead_to_known_answers():
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "?"}]] * 4, "solution": list("1234")})
    said = ["<think>Hm.</think> So two. ", "Three.", "cut off", "<think>Hm.</think>\n"]
    samples = pd.DataFrame({"problem": list("1230"), "completion": said})
    samples["finish_reason"] = ["eos", "eos", "length", "eos"]
    examples = with_thoughts(rows, samples)
    assert [messages[0]["content"] for messages in examples["completion"]] == [
        "<think>So two.</think>\n<answer>2</answer>",
        "<think>Three.</think>\n<answer>3</answer>",
    ]
    with pytest.raises(ValueError, match="reverse_thinking: none of the sampled thoughts is complete"):
        with_thoughts(rows, samples[2:])


def test_rewards_by_name_and_by_path(recipe, tmp_path, monkeypatch):
    """They are logged in their own columns, and rollouts are recorded with them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text("def odd(completions, **_):\n    return [0.5] * len(completions)\n")
    names = ["think_answer_accuracy_reward", "my_rewards.odd"]
    options = {"trainer": "grpo", "reward_funcs": names, "record_rollouts": True}
    folder = train.run_train(recipe(**TESTBED_RUN | options))
    (logged, *_) = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert logged["rewards/odd/mean"] == 0.5 and "rewards/think_answer_accuracy_reward/mean" in logged
    rollouts = read_rollouts(folder)
    assert len(rollouts) == 10 and rollouts["group"].value_counts().tolist() == [5, 5]
    assert (rollouts["reward"] == rollouts["correct"] + 0.5).all() and rollouts["truncated"].any()
    found = json.loads((folder / "verification.json").read_text())
    assert found["rollouts"] == 10 and found["length violations"] == rollouts["truncated"].mean()
    assert (rollouts["tokens"] <= 32).all() and rollouts["update"].unique().tolist() == [1]


FIRST = {"trainer": "grpo"} | TESTBED_RUN
PAIRS = {"trainer": "dpo"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (FIRST | {"reward_funcs": ["short"]}, "reward_funcs: short cannot be loaded .* one of .*format_reward"),
        (FIRST | {"reward_funcs": ["nowhere.short"]}, "reward_funcs: nowhere.short cannot be loaded"),
        (FIRST | {"easy_prompts": 0.2}, "rollouts: no earlier stage has recorded rollouts"),
        (FIRST | {"easy_prompts": 2.0}, "easy_prompts: 2.0 is not a probability"),
        (FIRST | {"easy_prompts": 0.2, "rollouts": "nowhere"}, "rollouts: nowhere records no rollouts"),
        (PAIRS, "rollouts: no earlier stage has recorded rollouts"),
        (PAIRS | {"rollouts": "nowhere"}, "rollouts: nowhere records no rollouts"),
        (PAIRS | {"judge_url": "http://127.0.0.1:9"}, "judge_url, judge_model: only one of them is set"),
        ({"trainer": "sft", "dataset": "testbed"}, "dataset: 'testbed' has no completions. Set reverse_thinking"),
        ({"trainer": "sft", "dataset": "testbed", "thought_dropout": -1.0}, "thought_dropout: -1.0 is not"),
    ],
)
def test_what_is_refused(recipe, fields, message, capsys):
    given = recipe(**fields)
    assert print_plan(given) == 1
    assert re.search(message, " ".join(capsys.readouterr().out.split()))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.run_train(given)
