"""LEADTrainer end to end on the testbed model."""

import pytest
import torch

from step_trl import LEADConfig
from step_trl.advantages import batch_signal, correctness_share, group_advantages, length_efficiency, length_targets


OPTIONS = {"shortest_target": 40, "max_completion_length": 240}


def test_the_loss_sees_both_advantages(build, mixed_problems, credited):
    trainer = build("lead", learning_rate=0.0, train_dataset=mixed_problems, balance_decay=0.5, **OPTIONS)
    batch, inputs, _, after = credited(trainer)
    lengths = inputs["completion_mask"].sum(1).float()
    targets = length_targets(lengths, batch.correct, 4, 40, 240)
    efficiency = length_efficiency(lengths, targets)
    correct = batch.correct.float()
    assert 0 < correct.mean() < 1 and efficiency.std() > 0
    signals = batch_signal(correct, torch.ones_like(batch.correct), 4), batch_signal(efficiency, batch.correct, 4)
    weight = max(0.5 * 0.5 + 0.5 * correctness_share(*signals), 0.3)
    both = weight * group_advantages(correct, 4) + (1 - weight) * group_advantages(efficiency, 4)
    tokens = both.repeat_interleave(lengths.long())  # each token counts
    expected = (both - tokens.mean()) / (tokens.var() + 1e-8).sqrt()
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)
    logs = trainer.state.log_history[0]
    assert logs["lead/balance"] == pytest.approx(weight) and logs["lead/target"] == pytest.approx(
        targets.mean().item()
    )
    assert logs["lead/efficiency"] == pytest.approx(signals[1].mean)


def test_the_balance_is_kept_in_checkpoints(build, mixed_problems):
    options = OPTIONS | {"train_dataset": mixed_problems, "save_strategy": "steps", "save_steps": 1}
    whole = build("lead", max_steps=2, **options)
    whole.train()
    resumed = build("lead", max_steps=2, **options)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-1")
    (before, now) = (trainer.state.log_history[1]["lead/balance"] for trainer in (whole, resumed))
    assert now == pytest.approx(before) and now != whole.state.log_history[0]["lead/balance"]


def test_an_evaluation_has_groups_of_one(build, mixed_problems):
    trainer = build(
        "lead",
        trainer_options={"eval_dataset": mixed_problems.select(range(2))},
        num_generations_eval=1,
        per_device_eval_batch_size=2,
        **OPTIONS | {"max_completion_length": 40},
    )
    assert "eval_reward" in trainer.evaluate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shortest_target": 1000}, "shortest_target: 1000 is not between 1 and the longest target of 512 tokens"),
        ({"shortest_target": 0}, "shortest_target: 0 is not between"),
        ({"shortest_target": 50, "longest_target": 40}, "shortest_target: 50 is not between 1 and .* 40 tokens"),
        ({"shortest_target": 50, "balance_decay": 1.5}, "balance_decay: 1.5 is not between 0 and 1"),
        ({"shortest_target": 50, "scale_rewards": "none"}, "scale_rewards: 'none' has no effect"),
        ({"shortest_target": 50, "length_reward": "kimi"}, "length_reward: 'kimi' has no effect"),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        LEADConfig(str(tmp_path), bf16=False, use_cpu=True, **options)
