"""DLERTrainer end to end on the testbed model."""

import pytest
import torch

from step_trl import DLERConfig


def expected_advantages(batch, inputs, stop_factor, bonus):
    """The advantages, computed completion by completion."""
    lengths = inputs["completion_mask"].sum(1).tolist()
    ended = [ids[-1] == 2 for ids in batch.completion_ids]
    rewards = [s * (1 if e else stop_factor) for s, e in zip(batch.scores.tolist(), ended, strict=True)]
    groups = [rewards[start : start + 4] for start in range(0, len(rewards), 4)]
    centred = [reward - sum(group) / 4 for group in groups for reward in group]
    kept = [len(set(group)) > 1 for group in groups for _ in group]
    tokens = torch.tensor([c for c, n, k in zip(centred, lengths, kept, strict=True) if k for _ in range(n)])
    found = (torch.tensor(centred) - tokens.mean()) / (tokens.var() + 1e-8).sqrt()
    return found + bonus * (torch.tensor(rewards) >= 1), torch.tensor(kept), rewards


def test_the_loss_sees_rewards_that_are_normalised_over_the_batch(build, mixed_problems, credited, tokenizer):
    trainer = build("dler", learning_rate=0.0, train_dataset=mixed_problems, max_completion_length=200)
    batch, inputs, _, after = credited(trainer)
    assert tokenizer.eos_token_id == 2
    expected, kept, rewards = expected_advantages(batch, inputs, 0.1, 0.1)
    assert len(set(rewards)) > 1
    torch.testing.assert_close(after[kept], expected[kept], rtol=1e-4, atol=1e-5)
    in_loss = inputs["completion_mask"] * batch_mask(inputs)
    assert (in_loss.sum(1) > 0).tolist() == kept.tolist()
    logs = trainer.state.log_history[0]
    assert logs["dler/dropped_groups"] == pytest.approx(1 - kept.float().mean().item())
    assert logs["dler/cut_off"] == pytest.approx(logs["completions/clipped_ratio"])
    assert trainer.args.epsilon_high == 0.28 and trainer.args.delta == 10


def batch_mask(inputs):
    return inputs.get("tool_mask", torch.ones_like(inputs["completion_mask"]))


def test_a_completion_that_was_cut_off_keeps_a_tenth_of_its_reward(build, mixed_problems, credited):
    """All completions are cut off, and half of them are right nevertheless."""

    def every_other(completions, **_):
        return [float(place % 2) for place in range(len(completions))]

    trainer = build(
        "dler", train_dataset=mixed_problems, max_completion_length=8, correct_bonus=0.5,
        trainer_options={"reward_funcs": every_other},
    )  # fmt: skip
    _, _, _, after = credited(trainer)
    assert trainer.state.log_history[0]["dler/cut_off"] == 1
    assert after.tolist() == pytest.approx([-after[1].item(), after[1].item()] * 4)  # no bonus for a reward of 0.1
    assert after[1] > 0.9


def test_without_dropping_all_groups_are_in_the_loss(build, mixed_problems, credited):
    trainer = build("dler", train_dataset=mixed_problems, max_completion_length=8, drop_equal_groups=False)
    _, inputs, _, after = credited(trainer)  # no answer is right
    assert batch_mask(inputs).all() and after.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_factor": 1.5}, "stop_factor: 1.5 is not between 0 and 1"),
        ({"correct_bonus": -0.1}, "correct_bonus: -0.1 is negative"),
        ({"scale_rewards": "batch"}, "scale_rewards: 'batch' has no effect"),
        ({"length_reward": "kimi"}, "length_reward: 'kimi' has no effect"),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DLERConfig(str(tmp_path), bf16=False, use_cpu=True, **options)
