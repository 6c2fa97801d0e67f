"""The status of a training, compared with a real rollout."""

import time

import pytest
from transformers import TrainerState

from step_trl import testbed
from step_trl.monitor import RunStatus
from step_trl.monitor.status import short_number, short_time
from step_trl.rollout import ConfidenceTruncation, DynamicTruncatedRollout, SamplingParams
from step_trl.rollout.engines import TransformersEngine


HEADLINE = {"tokens": "completions/mean_length", "reward": "reward"}


def test_rollouts_are_counted_as_they_end():
    tokenizer = testbed.load_tokenizer()
    prompts = tokenizer.apply_chat_template(
        list(testbed.load_dataset("easy").select(range(6))["prompt"]), add_generation_prompt=True, return_dict=False
    )
    engine = TransformersEngine(testbed.load_model(), tokenizer)
    rollout = DynamicTruncatedRollout(engine, [ConfidenceTruncation(tokenizer)], SamplingParams(256))
    rollout.run(prompts[:1])  # an earlier one does not count
    status, seen = RunStatus("Step-GRPO", HEADLINE), []
    status.listeners.append(lambda: seen.append((status.ended, status.tokens_per_second)))
    assert status.tokens_per_second == 0
    began = time.monotonic()
    with status.following(rollout, len(prompts)) as note:
        records = rollout.run(prompts, seeds=range(6), on_rollout=note)
    seconds = time.monotonic() - began
    assert [ended for ended, _ in seen] == [1, 2, 3, 4, 5, 6] and all(speed > 0 for _, speed in seen)
    assert status.exits == sum(record.truncated for record in records) > 0
    speed = status.tokens_per_second
    assert speed == pytest.approx(sum(record.sampled_tokens for record in records) / seconds, rel=0.05)
    time.sleep(0.05)
    assert status.tokens_per_second == speed  # that of the last rollouts


def test_time_left_and_metrics(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    status, state = RunStatus("SAS", HEADLINE), TrainerState(max_steps=10, global_step=4)  # a run that goes on
    status.on_train_begin(None, state, None)
    assert status.seconds_left is None and (status.update, status.updates) == (4, 10)
    for update in (5, 6):
        now[0] += 30
        state.global_step = update
        status.on_step_end(None, state, None)
    assert status.seconds_left == 120
    status.on_log(None, state, None, logs={"reward": 0.5, "loss": 1.0, "completions/mean_length": None})
    assert status.headline_values() == {"reward": 0.5}
    status.on_log(None, state, None, logs={"train_runtime": 3.0})
    assert status.headline_values() == {"reward": 0.5}
    assert status.headline_values({"eval_reward": 0.25}, "eval_") == {"reward": 0.25}


def test_short_forms():
    assert [short_time(value) for value in (None, 5.4, 65, 3723)] == ["?", "0:05", "1:05", "1:02:03"]
    assert [short_number(value) for value in (0.71899, -3.5, 12.52, 1024.4)] == ["0.719", "-3.500", "12.5", "1,024"]
