"""SASTrainer end to end on the testbed model."""

import logging
import math
import re

import pytest
import torch
from loss_records import full_logps, record_losses
from transformers import TrainerState

from step_trl import SASConfig, StepGRPOTrainer
from step_trl.advantages import select_step_advantages
from step_trl.runtime.signal_warnings import SignalWarnings
from step_trl.steps import DelimiterSegmenter, Segmenter


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "options", [{}, {"failed_step_advantage": 1.0}, {"granularity": "token", "selection": "correct"}]
)
def test_the_loss_sees_selected_advantages(build, mixed_problems, tokenizer, monkeypatch, options):
    trainer = build("sas", learning_rate=0.0, max_completion_length=240, train_dataset=mixed_problems, **options)
    records = record_losses(trainer, monkeypatch)
    trainer.train()
    inputs, selected = records[0]["inputs"], records[0]["advantages"]
    step_ids = DelimiterSegmenter(tokenizer, end_text="</think>").step_ids(
        inputs["completion_ids"], inputs["completion_mask"]
    )
    assert torch.equal(inputs["step_ids"], step_ids)
    assert 0 < inputs["correct"].sum() < len(inputs["correct"])
    expected = select_step_advantages(
        inputs["advantages"], full_logps(trainer, inputs), step_ids, inputs["correct"], **trainer.args.options()
    )
    assert selected.shape == inputs["completion_ids"].shape
    torch.testing.assert_close(selected, expected)
    assert (selected != inputs["advantages"].unsqueeze(1)).any()
    answer = (step_ids == -1) & inputs["completion_mask"].bool()
    assert torch.equal(selected[answer], inputs["advantages"].unsqueeze(1).expand_as(selected)[answer])


def test_correct_means_after_a_closed_thought(build, mixed_problems, monkeypatch):
    """TRL's advantage is positive for the right ones of a mixed group, and those are the correct ones."""
    trainer = build("sas", learning_rate=0.0, max_completion_length=240, train_dataset=mixed_problems)
    records = record_losses(trainer, monkeypatch)
    trainer.train()
    inputs = records[0]["inputs"]
    mixed = inputs["advantages"] != 0
    assert mixed.any()
    assert torch.equal(inputs["correct"][mixed], inputs["advantages"][mixed] > 0)


def test_there_is_no_second_forward_pass(build):
    counts = {}
    for method in ("sas", "step_grpo"):
        options = {} if method == "sas" else {"truncated_rollout": False}
        trainer = build(method, gradient_accumulation_steps=2, per_device_train_batch_size=4, **options)
        calls, original = [], trainer._get_per_token_logps_and_entropies
        trainer._get_per_token_logps_and_entropies = lambda *a, o=original, c=calls, **k: c.append(1) or o(*a, **k)
        trainer.train()
        counts[method] = len(calls)
    assert counts == {"sas": 2, "step_grpo": 2}


def test_old_logps_measure_confidence_where_trl_has_them(build, mixed_problems, monkeypatch):
    trainer = build(
        "sas",
        num_iterations=2,
        max_steps=2,
        learning_rate=1e-2,
        max_completion_length=240,
        train_dataset=mixed_problems,
    )
    records = record_losses(trainer, monkeypatch)
    trainer.train()
    first, second = records
    assert torch.equal(first["inputs"]["old_per_token_logps"], second["inputs"]["old_per_token_logps"])
    assert torch.equal(first["advantages"], second["advantages"])  # although the policy has moved


@pytest.mark.parametrize(("failed_step_advantage", "changed", "unchanged"), [
    (0.0, "zeroed", "rewarded"), (1.0, "rewarded", "zeroed"),
])  # fmt: skip
def test_metrics(build, mixed_problems, failed_step_advantage, changed, unchanged):
    trainer = build(
        "sas",
        max_completion_length=240,
        train_dataset=mixed_problems,
        failed_step_advantage=failed_step_advantage,
    )
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["sas/steps/mean"] > 1
    assert 0 < logs["sas/tokens_zeroed/correct"] < 1
    assert 0 < logs[f"sas/tokens_{changed}/failed"] <= 1
    assert logs[f"sas/tokens_{unchanged}/failed"] == 0
    assert logs["sas/confidence/kept"] <= 0
    assert {"reward", "completions/mean_length", "entropy"} <= logs.keys()


@pytest.mark.parametrize(
    "options",
    [{"loss_type": name} for name in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo")]
    + [
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"importance_sampling_level": "sequence"},
        {"beta": 0.01},
        {"steps_per_generation": 2, "max_steps": 2},
        {"top_entropy_quantile": 0.5},
        {"criterion": "random"},
        {"selection_bug_compatible": True},
        {"mask_truncated_completions": True},
    ],
    ids=lambda options: "+".join(f"{k}={v}" for k, v in options.items()),
)
def test_trains_with(build, options):
    if options == {"loss_type": "cispo"}:
        options = {"loss_type": "cispo", "epsilon_high": 3.0}
    trainer = build("sas", **options)
    trainer.train()
    assert losses(trainer) and all(map(math.isfinite, losses(trainer)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection_ratio": 0.0}, "selection_ratio: 0.0 is not between"),
        ({"selection_ratio": 1.0}, "selection_ratio: 1.0 is not between"),
        ({"step_delimiter": ""}, "step_delimiter: "),
        ({"selection": "all"}, "selection: 'all'"),
        ({"criterion": "entropy"}, "criterion: 'entropy'"),
        ({"granularity": "word"}, "granularity: 'word'"),
        ({"loss_type": "vespo"}, "loss_type: 'vespo'"),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        SASConfig(str(tmp_path), bf16=False, **options)


def test_runs_without_signal_are_called_out_once(build, caplog):
    trainer = build("sas", max_completion_length=8, max_steps=2)
    with caplog.at_level(logging.WARNING, logger="step_trl"):
        trainer.train()
    messages = [record.message for record in caplog.records]
    assert sum("Nearly all completions were clipped" in message for message in messages) == 1
    assert sum("equal rewards" in message for message in messages) == 1


def test_missing_triggers_are_called_out(build, caplog):
    trainer = build("step_grpo", triggers=["Hmm"], max_steps=1)
    with caplog.at_level(logging.WARNING, logger="step_trl"):
        trainer.train()
    assert any("No trigger word" in record.message for record in caplog.records)
    assert any(isinstance(callback, SignalWarnings) for callback in trainer.callback_handler.callbacks)


def test_a_model_that_learns_to_do_without_triggers_is_no_symptom(caplog):
    callback, state = SignalWarnings(StepGRPOTrainer.symptoms), TrainerState(is_world_process_zero=True)
    with caplog.at_level(logging.WARNING, logger="step_trl"):
        for steps in (2.5, 1.4, 1.0, 1.0):
            callback.on_log(None, state, None, logs={"step_grpo/steps/mean": steps})
    assert not caplog.records


def test_a_segmenter_of_ones_own(build, tokenizer, monkeypatch):
    """Steps are sentences here. In Step-GRPO, they count as trigger words do."""
    sentences = Segmenter(tokenizer, re.compile(rb"[.?]\s+"), end_text="</think>")
    trainer = build("sas", trainer_options={"segmenter": sentences})
    records = record_losses(trainer, monkeypatch)
    trainer.train()
    for record in records:
        inputs = record["inputs"]
        expected = sentences.step_ids(inputs["completion_ids"], inputs["completion_mask"])
        assert expected.max() > 0 and torch.equal(inputs["step_ids"], expected)
    trainer = build("step_grpo", trainer_options={"segmenter": sentences})
    trainer.train()
    completions = [messages[0]["content"] for messages in trainer._logs["completion"]]
    counts = [1 + len(re.findall(r"[.?]\s+", text)) for text in completions]
    assert trainer.state.log_history[0]["step_grpo/steps/mean"] == pytest.approx(sum(counts) / len(counts))
