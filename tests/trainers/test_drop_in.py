"""Our features in uses of GRPOTrainer that they were not made for."""

import logging
from functools import partial

import pytest
import torch
from loss_records import record_losses
from tiny_vlm import pictures, tiny_vlm
from ways_of_use import CONVERSATIONS, Counter, letters, rows, sampled_elsewhere, with_tools

from step_trl import EfficientReasoningTrainer, SASTrainer, StepGRPOConfig, StepGRPOTrainer, testbed
from step_trl.rewards import math_accuracy_reward
from step_trl.rollout import TokenBudget


FEATURELESS = {"truncated_rollout": False, "step_reward": False, "format_reward": False}


def record_rewards(trainer):
    """Record the gathered rewards of each batch."""
    batches, original = [], trainer._calculate_rewards

    def recording(*args):
        batches.append(original(*args))
        return batches[-1]

    trainer._calculate_rewards = recording
    return batches


def every_other(completions, **kwargs):
    """Score completions alternately as correct and as `None`."""
    return [1.0 if place % 2 else None for place in range(len(completions))]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("step_grpo", {"length_reward": "kimi", "step_baseline": "all"}),
        ("step_grpo", {"advantage_selection": {"failed_step_advantage": 1.0}}),
        ("grpo", {"length_reward": "train_efficiently"}),
        ("sas", {"failed_step_advantage": 1.0}),
        ("seed_grpo", {"alpha": 1.0}),
        ("nft", {}),
    ],
)
def test_what_nobody_scores_is_not_trained_on(build, easy_problems, monkeypatch, caplog, method, options):
    trainer = build(
        method, train_dataset=easy_problems, trainer_options={"reward_funcs": [every_other]}, beta=0.0, **options
    )
    rewards, records = record_rewards(trainer), record_losses(trainer, monkeypatch)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "All reward functions returned None" in caplog.text
    (rewards,) = rewards
    assert rewards[::2].isnan().all() and not rewards[1::2].isnan().any()
    (record,) = records
    unscored = (record["inputs"]["advantages"] == 0) & ~record["inputs"].get("correct", torch.tensor(False))
    assert unscored.sum() >= 4
    assert (record["advantages"][unscored] == 0).all()


def test_the_rewards_of_others_know_what_nobody_scores_as_wrong(build):
    """Lengths of unscored completions are in the group; its correct ones alone make mu."""
    trainer = build("step_grpo", trainer_options={"reward_funcs": [every_other]}, max_completion_length=320)
    rewards = record_rewards(trainer)
    steps = []
    monitored = trainer._log_steps
    trainer._log_steps = lambda local, gathered: (steps.extend(local), monitored(local, gathered))
    trainer.train()
    column = trainer.reward_func_names.index("step_efficiency")
    for first in range(0, len(steps), 4):
        right = [first + 1, first + 3]
        mu = sum(steps[place] for place in right) / 2
        expected = [-0.5 * torch.tanh(torch.tensor((steps[place] - mu) / mu)).item() for place in right]
        assert rewards[0][right, column].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("method", ["step_grpo", "sas"])
def test_an_environments_reward_is_the_correctness(build, method):
    trainer = build(
        method,
        train_dataset=rows(CONVERSATIONS),
        trainer_options={"environment_factory": Counter, "processing_class": with_tools()},
        max_completion_length=8,
        **({"truncated_rollout": False} if method == "step_grpo" else {}),
    )
    rewards = record_rewards(trainer)
    trainer.train()
    added = {"step_grpo": ["step_efficiency", "format_reward"]}.get(method, [])
    assert trainer.reward_func_names == ["Counter", *added]
    assert trainer.status.headline["accuracy"] == "rewards/Counter/mean"
    assert torch.equal(trainer.batch.correct, rewards[0][:, 0] > 0.5) and 0 < trainer.batch.correct.sum() < 8
    weights = {"step_grpo": [0.9, 0.9, 0.1]}.get(method, [1.0])
    assert trainer.reward_weights.tolist() == pytest.approx(weights)


class Other(Counter):
    def get_reward(self) -> float:
        return 1.0


class Silent(Counter):
    get_reward = None


def test_each_environment_says_what_is_correct_of_its_own(build):
    names = ["one", "two"] * 4
    trainer = build(
        "step_grpo",
        train_dataset=rows(CONVERSATIONS[:8], environment=names),
        trainer_options={
            "environment_factory": {"one": Counter, "two": Other},
            "processing_class": with_tools(),
        },
        truncated_rollout=False,
        max_completion_length=8,
    )
    rewards = record_rewards(trainer)
    trainer.train()
    assert trainer.reward_func_names[:2] == ["Counter", "Other"]
    assert trainer.reward_weights.tolist() == pytest.approx([0.9, 0.9, 0.9, 0.1])
    of_other = ~rewards[0][:, 1].isnan()
    assert of_other.any() and trainer.batch.correct[of_other].all()
    assert torch.equal(trainer.batch.correct[~of_other], rewards[0][~of_other, 0] > 0.5)


def test_an_environment_without_a_reward_leaves_math_accuracy(build, easy_problems):
    trainer = build(
        "step_grpo",
        trainer_options={"environment_factory": Silent, "processing_class": with_tools()},
        truncated_rollout=False,
    )
    assert trainer.reward_func_names[0] == "math_accuracy_reward"


@pytest.mark.parametrize("method", ["grpo", "step_grpo", "sas"])
def test_positional_arguments_are_grpo_trainers(build, tokenizer, easy_problems, method):
    args = build(method).args
    trainer_class = {"grpo": EfficientReasoningTrainer, "step_grpo": StepGRPOTrainer, "sas": SASTrainer}[method]
    held_out = easy_problems.select(range(4))
    trainer = trainer_class(testbed.load_model(), None, args, easy_problems, held_out, tokenizer)
    assert trainer.eval_dataset is held_out and trainer.processing_class is tokenizer
    assert trainer.train_dataset is easy_problems


def test_lists_of_the_caller_stay_as_they_are(build):
    reward_funcs, processing_classes = [letters], [None]
    for _ in range(2):
        trainer = build(
            "step_grpo",
            trainer_options={"reward_funcs": reward_funcs, "reward_processing_classes": processing_classes},
            length_reward="kimi",
        )
        assert trainer.reward_func_names == ["letters", "kimi_length_reward", "step_efficiency", "format_reward"]
    assert reward_funcs == [letters] and processing_classes == [None]


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        (FEATURELESS, [1.0]),
        (FEATURELESS | {"format_reward": True}, [0.9, 0.1]),
        (FEATURELESS | {"truncated_rollout": True}, [0.9]),
        (FEATURELESS | {"step_reward": True}, [0.9, 0.9]),
    ],
)
def test_alpha_weighs_the_accuracy_unless_all_is_off(build, options, weights):
    assert build("step_grpo", **options).reward_weights.tolist() == pytest.approx(weights)


def test_a_rollout_function_in_place_of_the_truncated_rollout_is_called_out(build, tokenizer, caplog):
    own = {"rollout_func": sampled_elsewhere, "reward_funcs": letters}
    with caplog.at_level(logging.WARNING):
        trainer = build("step_grpo", train_dataset=rows(), trainer_options=own)
    assert "rollout_func: it samples the completions" in caplog.text
    assert "truncated_rollout=False" in caplog.text
    trainer.train()
    assert trainer.state.log_history[0]["completions/max_length"] == 10  # of the last of 8 rows
    assert "step_grpo/exit_rate" not in trainer.state.log_history[0]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        build("step_grpo", train_dataset=rows(), trainer_options=own, truncated_rollout=False)
    assert "rollout_func" not in caplog.text
    callbacks = {"truncation_callbacks": [TokenBudget(tokenizer, 30)]}
    with pytest.raises(ValueError, match=r"rollout_func: .* truncation_callbacks would have no effect"):
        build("step_grpo", train_dataset=rows(), trainer_options=own | callbacks)
    with pytest.raises(ValueError, match="truncation_callbacks: truncated_rollout=False"):
        build("step_grpo", trainer_options=callbacks, truncated_rollout=False)


@pytest.mark.parametrize(
    "options",
    [
        {"use_transformers_continuous_batching": True},
        {"vllm_structured_outputs_regex": r"\d+", "use_vllm": True},
        {"cache_implementation": "static"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_the_truncated_rollout_would_ignore(tmp_path, options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}: .* set truncated_rollout=False"):
        StepGRPOConfig(str(tmp_path), bf16=False, **options)
    config = StepGRPOConfig(str(tmp_path), bf16=False, truncated_rollout=False, **options)
    assert getattr(config, name) == value


@pytest.mark.parametrize("method", ["grpo", "sas"])
def test_the_same_reward_for_an_open_thought(build, easy_problems, method):
    open_thought, closed = r"2 + 2 is \boxed{4}.", r"2 + 2</think>\boxed{4}"
    for required in (False, True):
        (reward,) = build(method, require_end_of_thinking=required).reward_funcs
        assert reward(completions=[open_thought, closed], solution=["4", "4"]) == [float(not required), 1.0]
    default = build(method)
    assert default.args.require_end_of_thinking is (method == "sas")
    assert default.reward_func_names == ["math_accuracy_reward"]
    with pytest.raises(ValueError, match=r"require_end_of_thinking: .* default reward"):
        build(
            method,
            require_end_of_thinking=method != "sas",
            trainer_options={"reward_funcs": partial(math_accuracy_reward)},
        )


@pytest.mark.parametrize("method", ["grpo", "sas"])
def test_pictures_are_trimmed_with_their_prompts(build, monkeypatch, method):
    """Micro-batches of two rows, so that the prompts of some are shorter than the batch's longest."""
    updates, widths = [], []
    for reduce in (False, True):
        model, processor = tiny_vlm()
        trainer = build(
            method,
            model=model,
            train_dataset=pictures(),
            trainer_options={"processing_class": processor, "reward_funcs": letters},
            reduce_padding=reduce,
            num_generations=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            max_completion_length=16,
            optim="sgd",
            learning_rate=1.0,
        )
        records = record_losses(trainer, monkeypatch)
        trainer.train()
        inputs = [record["inputs"] for record in records]
        for batch in inputs:
            whole = batch["prompt_ids"].size(1) + batch["completion_ids"].size(1)
            assert batch["mm_token_type_ids"].shape == (2, whole)
            image = processor.image_token_id
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
            prompts = torch.arange(whole) < batch["prompt_ids"].size(1)
            assert torch.equal((ids == image) & prompts, batch["mm_token_type_ids"] == 1)
        widths.append(sum(batch["mm_token_type_ids"].size(1) for batch in inputs))
        updates.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert widths[1] < widths[0]
    torch.testing.assert_close(updates[0], updates[1], atol=1e-6, rtol=0)
