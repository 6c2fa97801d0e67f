"""StepGRPOTrainer end to end on the testbed model."""

import math

import pytest
import torch
from datasets import Dataset
from loss_records import full_logps, record_losses
from trl import GRPOTrainer

from step_trl import StepGRPOConfig, StepGRPOTrainer
from step_trl.rollout import TokenBudget, TruncationCallback
from step_trl.steps import TriggerSegmenter


def record_batches(trainer):
    """Record the outputs of `_generate_and_score_completions`."""
    outputs, original = [], trainer._generate_and_score_completions

    def recording(inputs):
        outputs.append(original(inputs))
        return outputs[-1]

    trainer._generate_and_score_completions = recording
    return outputs


def rewards_by_hand(completion_ids, correct, formatted, tokenizer, group, alpha, beta, baseline="correct"):
    """Compute eq. 3 to 5, one completion at a time."""
    steps = [1 + TriggerSegmenter(tokenizer).count(ids) for ids in completion_ids]
    rewards = []
    for i, k in enumerate(steps):
        members = range(i - i % group, i - i % group + group)
        counted = [steps[j] for j in members if correct[j] or baseline == "all"]
        reward = (1 - alpha) * formatted[i]
        if correct[i]:
            mu = sum(counted) / len(counted)
            reward += alpha * (1 - beta * math.tanh((k - mu) / mu))
        rewards.append(reward)
    return rewards


@pytest.mark.parametrize("baseline", ["correct", "all"])
def test_reward_is_equation_5(build, tokenizer, mixed_problems, baseline):
    trainer = build(
        "step_grpo",
        train_dataset=mixed_problems,
        step_baseline=baseline,
        accuracy_weight=0.8,
        step_penalty=0.4,
        max_completion_length=320,
        per_device_train_batch_size=32,  # enough groups that one has several step counts
    )
    scored = []
    original = trainer._calculate_rewards

    def recording(inputs, prompts, completions, completion_ids_list):
        scored.append((completion_ids_list, original(inputs, prompts, completions, completion_ids_list)))
        return scored[-1][1]

    trainer._calculate_rewards = recording
    trainer.train()
    ids, columns = scored[0]
    assert trainer.reward_func_names == ["math_accuracy_reward", "step_efficiency", "format_reward"]
    assert trainer.reward_weights.tolist() == pytest.approx([0.8, 0.8, 0.2])
    by_hand = rewards_by_hand(ids, columns[:, 0] > 0.5, columns[:, 2].tolist(), tokenizer, 4, 0.8, 0.4, baseline)
    assert (columns @ trainer.reward_weights).tolist() == pytest.approx(by_hand, abs=1e-5)
    assert columns[:, 1].abs().sum() > 0  # not all groups of one step count


def test_metrics(build):
    trainer = build("step_grpo", max_completion_length=200)
    trainer.train()
    logs = trainer.state.log_history[0]
    for name in ("steps/mean", "exit_rate", "probes_per_completion", "probe_tokens", "probes/early_rejected"):
        assert math.isfinite(logs[f"step_grpo/{name}"])
    shares = [value for key, value in logs.items() if key.startswith("step_grpo/confidence/") and "-" in key]
    assert sum(shares) == pytest.approx(1)
    assert 0 < logs["step_grpo/exit_rate"] <= 1
    assert {"reward", "completions/mean_length", "entropy", "frac_reward_zero_std"} <= logs.keys()


def test_every_completion_is_what_it_says(build, tokenizer):
    trainer = build("step_grpo", max_completion_length=200)
    outputs = record_batches(trainer)
    trainer.train()
    output = outputs[0]
    logps, mask = output["sampling_per_token_logps"], output["completion_mask"].bool()
    for ids, row_logps, row_mask in zip(output["completion_ids"], logps, mask, strict=True):
        ids, row_logps = ids[row_mask], row_logps[row_mask]
        assert ids[-1] == tokenizer.eos_token_id or len(ids) == 200
        injected = tokenizer.decode(ids[row_logps.isnan()])
        assert injected == "" or injected.startswith("\n</think>\n\nThe final answer is")
    assert logps[mask].isnan().any()


def test_sampled_logprobs_are_the_training_models(build):
    trainer = build("step_grpo", max_completion_length=200, temperature=0.8, learning_rate=0.0)
    outputs = record_batches(trainer)
    trainer.train()
    output = outputs[0]
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
            torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
            output["completion_ids"].size(1),
        )
    sampled = output["completion_mask"].bool() & ~output["sampling_per_token_logps"].isnan()
    assert sampled.sum() > 300
    torch.testing.assert_close(logps[sampled], output["sampling_per_token_logps"][sampled], atol=2e-4, rtol=0)


def test_injected_tokens_can_be_left_out_of_the_loss(build):
    trainer = build("step_grpo", max_completion_length=200, train_on_injected_tokens=False)
    outputs = record_batches(trainer)
    trainer.train()
    output = outputs[0]
    mask = output["completion_mask"].bool()
    left_out = mask & (output["tool_mask"] == 0)
    assert torch.equal(left_out, mask & output["sampling_per_token_logps"].isnan())
    assert left_out.any()
    assert output["num_items_in_batch"] == (mask & ~left_out).sum()


def test_evaluation_is_not_truncated(build, easy_problems):
    trainer = build(
        "step_grpo",
        per_device_eval_batch_size=8,
        max_completion_length=64,
        trainer_options={"eval_dataset": easy_problems.select(range(2))},
        num_generations_eval=2,
    )
    metrics = trainer.evaluate()
    assert "eval_step_grpo/exit_rate" not in metrics
    assert "eval_step_grpo/steps/mean" in metrics


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"num_iterations": 2, "max_steps": 2, "beta": 0.01},
        {"steps_per_generation": 2, "max_steps": 2},
        {"mask_truncated_completions": True, "max_completion_length": 40},
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
        {"truncated_rollout": False, "step_reward": False, "format_reward": False},
        {"speculative_probing": False, "early_rejection": False},
        {"advantage_selection": {"selection_ratio": 0.5}},
    ],
    ids=lambda options: "+".join(options),
)
def test_trains_with(build, options):
    trainer = build("step_grpo", **options)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses and all(map(math.isfinite, losses))
    if options.get("max_completion_length", 96) >= 96:
        assert any(not torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


def test_released_variant_trains(build):
    trainer = build("step_grpo", max_completion_length=200, variant="released")
    trainer.train()
    assert trainer.state.log_history[0]["step_grpo/probes_per_completion"] > 0


def test_truncation_callbacks_replace_the_confidence(build, tokenizer):
    callback = TokenBudget(tokenizer, 30)
    trainer = build("step_grpo", max_completion_length=200, trainer_options={"truncation_callbacks": [callback]})
    outputs = record_batches(trainer)
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["step_grpo/exit_rate"] > 0.5 and logs["step_grpo/probes_per_completion"] == 0
    first_injected = outputs[0]["sampling_per_token_logps"].isnan().int().argmax(dim=1)
    assert set(first_injected.tolist()) <= {0, 30}  # 0: nothing was injected


def test_an_error_in_a_callback_fails_the_step_as_itself(build):
    class Broken(TruncationCallback):
        triggers = ("Wait",)

        def at_boundary(self, boundary):
            raise ZeroDivisionError("in the user's callback")

    trainer = build("step_grpo", max_completion_length=200, trainer_options={"truncation_callbacks": [Broken()]})
    with pytest.raises(ZeroDivisionError, match="in the user's callback") as failure:
        trainer.train()
    assert failure.traceback[-1].name == "at_boundary"


def test_plain_prompts_and_own_rewards(build, tokenizer):
    prompt = "<|im_start|>user\nCalculate 12 + 13.<|im_end|>\n<|im_start|>assistant\n<think>\n"

    def has_25(completions, **kwargs):
        return [1.0 if "{25}" in text else 0.0 for text in completions]

    def short(completions, **kwargs):
        return [-len(text) / 1000 for text in completions]

    trainer = build(
        "step_grpo",
        train_dataset=Dataset.from_dict({"prompt": [prompt] * 8}),
        trainer_options={"reward_funcs": [has_25, short]},
        reward_weights=[1.0, 0.5],
        max_completion_length=200,
    )
    trainer.train()
    assert trainer.reward_func_names == ["has_25", "short", "step_efficiency", "format_reward"]
    assert trainer.reward_weights.tolist() == pytest.approx([0.9, 0.5, 0.9, 0.1])
    assert trainer.state.log_history[0]["rewards/has_25/mean"] > 0


def test_same_seed_same_run(build):
    runs = []
    for _ in range(2):
        trainer = build("step_grpo", max_steps=2, max_completion_length=200)
        trainer.train()
        runs.append([(e["loss"], e["reward"], e["num_tokens"]) for e in trainer.state.log_history if "loss" in e])
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confidence_threshold": 0.0}, "confidence_threshold: 0.0 is outside"),
        ({"confidence_threshold": 1.5}, "confidence_threshold: 1.5 is outside"),
        ({"accuracy_weight": -1}, "accuracy_weight: -1 is outside"),
        ({"triggers": []}, "triggers: "),
        ({"triggers": "Wait"}, "triggers: 'Wait' is not a list"),
        ({"triggers": ["Wait", ""]}, "triggers: "),
        ({"max_probe_tokens": 0}, "max_probe_tokens: 0"),
        ({"max_probes": 0}, "max_probes: 0"),
        ({"max_rollouts_in_flight": 0}, "max_rollouts_in_flight: 0"),
        ({"skip_probe_tokens": 20}, "skip_probe_tokens: 20"),
        ({"step_baseline": "median"}, "step_baseline: 'median'"),
        ({"step_penalty": -0.1}, "step_penalty: -0.1"),
        ({"repetition_penalty": 1.1}, "repetition_penalty: 1.1 is not supported"),
        ({"generation_kwargs": {"num_beams": 2}}, "generation_kwargs: "),
        ({"use_vllm": True, "vllm_enable_sleep_mode": True}, "vllm_enable_sleep_mode: True is not supported"),
        ({"use_vllm": True, "vllm_tensor_parallel_size": 2}, "vllm_tensor_parallel_size: 2 is not supported"),
        ({"advantage_selection": {"selection_ratio": 2.0}}, "selection_ratio: 2.0"),
        ({"advantage_selection": {}, "loss_type": "vespo"}, "loss_type: 'vespo'"),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        StepGRPOConfig(str(tmp_path), bf16=False, **options)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"question": ["1 + 1"], "solution": ["2"]}, "train_dataset: it needs a column 'prompt'.*question, solution"),
        ({"prompt": ["1 + 1"]}, "train_dataset: the default reward needs a column 'solution'"),
        ({"prompt": ["7 " * 1000], "solution": ["2"]}, "train_dataset: the prompt of row 0 has .* does not fit"),
    ],
)
def test_bad_rows_fail_before_the_parent_is_set_up(build, monkeypatch, rows, message):
    def fail(*args, **kwargs):
        raise AssertionError("the parent's __init__ was reached")

    monkeypatch.setattr(GRPOTrainer, "__init__", fail)
    with pytest.raises(ValueError, match=message):
        build("step_grpo", train_dataset=Dataset.from_dict(rows))


def test_a_config_of_another_class_is_refused(tokenizer, easy_problems, tmp_path):
    from step_trl import SASConfig, testbed

    with pytest.raises(TypeError, match="SASConfig is not a StepGRPOConfig"):
        StepGRPOTrainer(testbed.load_model(), args=SASConfig(str(tmp_path), bf16=False), train_dataset=easy_problems)


def test_config_survives_the_command_line(tmp_path):
    from trl import TrlParser

    (config,) = TrlParser(StepGRPOConfig).parse_args_and_config(
        ["--output_dir", str(tmp_path), "--bf16", "False", "--triggers", "Wait", "Hmm",
         "--confidence_threshold", "0.9", "--advantage_selection", '{"selection_ratio": 0.4}'],
    )  # fmt: skip
    assert config.triggers == ("Wait", "Hmm")
    assert config.confidence_threshold == 0.9
    assert config.advantage_selection == {"selection_ratio": 0.4}


def test_the_kl_term_is_over_sampled_tokens(build, monkeypatch):
    """Where nothing was sampled there is nothing to estimate, and exp(reference - policy) may be anything."""
    trainer = build("step_grpo", max_completion_length=200, beta=0.1, learning_rate=0.0)
    with torch.no_grad():
        for parameter in trainer.ref_model.parameters():
            parameter.mul_(1.1)
    records = record_losses(trainer, monkeypatch)
    trainer.train()
    kl, tokens = 0.0, 0
    for record in records:
        inputs, before, reference = record["inputs"], record["inputs"]["ref_per_token_logps"], record["reference"]
        mask = inputs["completion_mask"].bool()
        unsampled = mask & inputs["sampling_per_token_logps"].isnan()
        assert unsampled.any()
        logps = full_logps(trainer, inputs)
        torch.testing.assert_close(reference[unsampled], logps[unsampled])
        sampled = mask & ~unsampled
        assert torch.equal(reference[sampled], before[sampled])
        difference = (before - logps)[sampled]
        kl += (difference.exp() - difference - 1).sum().item()
        tokens += mask.sum().item()
    assert kl > 0
    assert trainer.state.log_history[0]["kl"] == pytest.approx(kl / tokens, rel=1e-3)


def test_with_selection_injected_tokens_keep_their_advantage(build, monkeypatch):
    trainer = build("step_grpo", max_completion_length=200, advantage_selection={"selection_ratio": 0.5})
    records = record_losses(trainer, monkeypatch)
    trainer.train()
    changed = 0
    for record in records:
        inputs, before = record["inputs"], record["inputs"]["advantages"]
        injected = inputs["completion_mask"].bool() & inputs["sampling_per_token_logps"].isnan()
        assert injected.any() and (inputs["step_ids"][injected] == -1).all()
        assert torch.equal(record["advantages"][injected], before[:, None].expand_as(injected)[injected])
        changed += (record["advantages"] != before[:, None]).sum().item()
    assert changed > 0


def test_with_selection_long_correct_completions_keep_their_blame(build, monkeypatch):
    """SAS's rule for correct completions withholds credit. Completions with a negative advantage have none."""
    trainer = build("step_grpo", max_completion_length=200, advantage_selection={"selection_ratio": 0.5})
    records = record_losses(trainer, monkeypatch)
    trainer.train()
    blamed = selected = 0
    for record in records:
        inputs, after = record["inputs"], record["advantages"]
        before = inputs["advantages"][:, None].expand_as(after)
        thought = inputs["completion_mask"].bool()
        low = inputs["correct"] & (inputs["advantages"] < -0.01)
        assert torch.equal(after[low], before[low])
        blamed += int(low.sum())
        praised = (inputs["correct"] & (inputs["advantages"] > 0.01))[:, None] & thought
        selected += int((after[praised] != before[praised]).sum())
    assert blamed > 0 and selected > 0
