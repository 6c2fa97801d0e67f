"""Length rewards by their name, in training."""

import inspect

import pytest
import torch

from step_trl import EfficientReasoningConfig, SGRPOConfig, StepGRPOConfig, rewards
from step_trl.rewards.length_rewards import LENGTH_REWARDS
from step_trl.rollout import RandomCut
from step_trl.token_targets import add_token_targets


FUNCTIONS = {
    "kimi": rewards.kimi_length_reward,
    "soft_overlong": rewards.soft_overlong_reward,
    "grpo_lambda": rewards.grpo_lambda_reward,
    "train_efficiently": rewards.train_efficiently_reward,
    "lapo_discovery": rewards.lapo_discovery_reward,
    "l1_exact": rewards.l1_exact_reward,
    "l1_max": rewards.l1_max_reward,
}
OPTIONS = {
    "soft_overlong": {"soft_punish_cache": 100},
    "train_efficiently": {"alpha": 0.4},
    "grpo_lambda": {"top_ratio": 1.0},
}


@pytest.fixture
def record(monkeypatch):
    """`record(trainer)` trains for an update; returns rows, token ids and the matrix of rewards."""

    def record(trainer):
        records, original = [], trainer._calculate_rewards

        def recording(inputs, prompts, completions, ids):
            matrix = original(inputs, prompts, completions, ids)
            records.append((inputs, ids, matrix.clone()))
            return matrix

        monkeypatch.setattr(trainer, "_calculate_rewards", recording)
        trainer.train()
        (only,) = records
        return only

    return record


@pytest.mark.parametrize("name", FUNCTIONS)
def test_correctness_and_term_make_the_reward(build, record, easy_problems, tokenizer, name):
    of_lapo = name == "lapo_discovery"
    trainer = build(
        "lapo" if of_lapo else "grpo",
        **{} if of_lapo else {"length_reward": name},
        length_reward_weight=0.5,
        length_reward_options=OPTIONS.get(name),
        train_dataset=add_token_targets(easy_problems, 50, 150),
        max_completion_length=140,
        temperature=0.8,
    )
    rows, ids, matrix = record(trainer)
    assert trainer.reward_func_names == ["math_accuracy_reward", f"{name}_length_reward"]
    assert trainer.reward_weights.tolist() == [1.0, 0.5]
    correct, term = matrix[:, 0] > 0.5, matrix[:, 1]
    lengths = torch.tensor([len(completion) for completion in ids])
    ended = torch.tensor([completion[-1] == tokenizer.eos_token_id for completion in ids])
    assert 0 < correct.sum() and lengths.unique().numel() > 1
    function = FUNCTIONS[name]
    if name in ("l1_exact", "l1_max"):
        expected = function(lengths, correct, torch.tensor([row["target_tokens"] for row in rows]))
    elif name == "soft_overlong":
        expected = function(lengths, 140, 100)
        assert expected.unique().numel() > 2
    elif name == "train_efficiently":
        assert not ended.all()
        expected = function(lengths, correct, 4, ended, alpha=0.4)
    else:
        expected = function(lengths, correct, 4, **OPTIONS.get(name, {}))
    torch.testing.assert_close(term if name in ("kimi", "soft_overlong") else correct + term, expected)
    assert f"rewards/{name}_length_reward/mean" in trainer.state.log_history[0]


def test_with_step_grpo_it_is_one_more_column(build, record):
    trainer = build("step_grpo", length_reward="kimi", accuracy_weight=0.8)
    _, ids, matrix = record(trainer)
    assert trainer.reward_func_names[1:] == ["kimi_length_reward", "step_efficiency", "format_reward"]
    assert trainer.reward_weights.tolist() == pytest.approx([0.8, 1.0, 0.8, 0.2])
    lengths = torch.tensor([len(completion) for completion in ids])
    torch.testing.assert_close(matrix[:, 1], rewards.kimi_length_reward(lengths, matrix[:, 0] > 0.5, 4))


def test_rows_without_targets_are_refused(build, easy_problems):
    with pytest.raises(ValueError, match=r"train_dataset: length_reward='l1_max' needs a column 'target_tokens'"):
        build("grpo", length_reward="l1_max")
    with pytest.raises(ValueError, match=r"eval_dataset: length_reward='l1_exact'.*add_token_targets"):
        build(
            "grpo",
            length_reward="l1_exact",
            train_dataset=add_token_targets(easy_problems),
            trainer_options={"eval_dataset": easy_problems},
        )


def test_options(tmp_path):
    config = EfficientReasoningConfig(
        str(tmp_path),
        length_reward="train_efficiently",
        length_reward_options='{"alpha": 0.2}',
        use_cpu=True,
        bf16=False,
    )
    assert config.length_options() == {"alpha": 0.2}
    for options, message in (
        ({"length_reward": "short"}, r"length_reward: 'short' is not known\. Set one of kimi, soft_overlong"),
        (
            {"length_reward": "l1_max", "length_reward_options": {"beta": 1}},
            r"length_reward_options: 'l1_max' has no beta\. Set alpha, delta",
        ),
        ({"length_reward_options": {"alpha": 1}}, "length_reward_options: length_reward is not set"),
    ):
        with pytest.raises(ValueError, match=message):
            StepGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_s_grpo(build, record, tokenizer):
    """Exits from one thought, in their order, of which the first right one earns most."""
    trainer = build(
        "s_grpo",
        max_completion_length=300,
    )
    _, ids, matrix = record(trainer)
    assert trainer.reward_func_names == ["math_accuracy_reward", "s_grpo_length_reward"]
    closing = tokenizer.encode(RandomCut.closing, add_special_tokens=False)
    for group in (ids[:4], ids[4:]):
        places = [len(tokenizer.decode(one).partition("Time is limited")[0]) for one in group]
        assert places == sorted(places) and len(group[0]) > len(closing)
    correct = matrix[:, 0] > 0.5
    assert correct.any()
    torch.testing.assert_close(matrix.sum(1), rewards.s_grpo_reward(correct, 4))


def test_s_grpo_needs_its_groups(build, tmp_path):
    base = {"use_cpu": True, "bf16": False}
    with pytest.raises(ValueError, match="truncated_rollout: S-GRPO needs its exits"):
        SGRPOConfig(str(tmp_path), truncated_rollout=False, **base)
    config = SGRPOConfig(str(tmp_path), **base)
    config.per_device_train_batch_size, config.steps_per_generation, config.num_generations = 2, 2, 8
    with pytest.raises(ValueError, match=r"num_generations: 4 completions per process.*whole groups of 8"):
        config._check_whole_groups()  # with more processes, a batch may be whole groups where its parts are not
    for name in ("rollout_func", "truncation_callbacks"):
        with pytest.raises(ValueError, match=f"{name}: S-GRPO samples whole groups itself"):
            build("s_grpo", trainer_options={name: lambda prompts, trainer: None})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"serial_group": True}, r"serial_group: S-GRPO has a trainer of its own\. Use SGRPOTrainer"),
        ({"length_reward": "s_grpo"}, r"length_reward: 's_grpo' has a trainer of its own\. Use SGRPOTrainer"),
        ({"length_reward": "lapo_discovery"}, r"Use LAPOTrainer \(trainer: lapo\) with lapo_stage='discovery'"),
        ({"length_reward": "lapo_internalization"}, "Use LAPOTrainer .* with lapo_stage='internalization'"),
    ],
)
def test_options_that_became_trainers_name_them(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        StepGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


@pytest.mark.parametrize("name", LENGTH_REWARDS)
def test_a_length_reward_is_called_with_arguments_that_it_has(name):
    reward = LENGTH_REWARDS[name]
    parameters = inspect.signature(reward.function).parameters
    assert {*reward.inputs, *reward.options} == parameters.keys()
    assert all(parameters[option].default is not inspect.Parameter.empty for option in reward.options)
