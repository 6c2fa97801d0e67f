"""NFTTrainer end to end on the testbed model."""

import pytest
import torch
from loss_records import full_logps, record_losses
from small_runs import every_other

from step_trl import EfficientReasoningTrainer, NFTConfig
from step_trl.losses import nft_loss


UPDATE = {"optim": "sgd", "learning_rate": 1.0, "max_completion_length": 200, "lr_scheduler_type": "constant"}


class WithPopulationDeviation(EfficientReasoningTrainer):
    """GRPO as in its paper: the standard deviation is the population's, and nothing is added to it."""

    def credit(self, batch, advantages):
        rewards = batch.local(batch.correct).float().view(-1, 4)
        deviation = rewards.std(1, keepdim=True, correction=0)
        return torch.where(deviation > 0, (rewards - rewards.mean(1, keepdim=True)) / deviation, 0).flatten()


def moved(trainer):
    """Return the change of the weights by a training."""
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    return torch.cat([(new - old).flatten() for old, new in zip(before, trainer.model.parameters(), strict=True)])


@pytest.mark.parametrize("omega", [1, 2])
def test_where_the_policy_has_not_moved_it_is_grpo(build, mixed_problems, omega):
    nft = moved(build("nft", omega=omega, train_dataset=mixed_problems, **UPDATE))
    grpo = build("grpo", loss_type="dr_grpo", scale_rewards="none", train_dataset=mixed_problems, **UPDATE)
    if omega == 2:
        grpo.__class__ = WithPopulationDeviation
    grpo = moved(grpo)
    assert grpo.abs().max() > 1e-3
    torch.testing.assert_close(nft, grpo, atol=1e-6, rtol=0)


def test_in_later_updates_it_is_its_own_loss(build, mixed_problems, monkeypatch):
    """The second update's gradient is that of `nft_loss` on the log-probabilities of a policy that has moved."""
    trainer = build("nft", num_iterations=2, max_steps=2, train_dataset=mixed_problems, beta=0.0, **UPDATE)
    records, gradients = record_losses(trainer, monkeypatch), []
    original = trainer.before_loss

    def recording(inputs, logps):
        old = inputs["old_per_token_logps"]
        original(inputs, logps)
        leaf = full_logps(trainer, inputs).requires_grad_()
        loss = nft_loss(leaf, old, inputs["correct"], inputs["correct_rate"], mask=inputs["completion_mask"])
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        gradients.append(gradient)
        assert torch.equal(inputs["old_per_token_logps"], logps)

    trainer.before_loss = recording
    trainer.train()
    for record, gradient in zip(records, gradients, strict=True):
        torch.testing.assert_close(record["advantages"], -gradient, atol=1e-5, rtol=1e-4)
    first, second = trainer.state.log_history[:2]
    assert first["nft/ratio_neg_mean"] == pytest.approx(1, abs=1e-4)
    assert abs(second["nft/ratio_neg_mean"] - 1) > 1e-3 and second["nft/loss"] != 0
    assert 0 < second["nft/kept_groups"] <= 1 and 0 <= second["nft/neg_clamped_frac"] <= 1


def test_rft_leaves_failed_completions_out(build, mixed_problems, monkeypatch):
    trainer = build("nft", negative_weight=0.0, train_dataset=mixed_problems, **UPDATE)
    records = record_losses(trainer, monkeypatch)
    trainer.train()
    (record,) = records
    correct = record["inputs"]["correct"]
    assert 0 < correct.sum() < len(correct)
    assert (record["advantages"][~correct] == 0).all() and (record["advantages"][correct] > 0).any()


@pytest.mark.parametrize("options", [{"sequence_level": True}, {"probability_mask": 0.9}, {"length": 8}])
def test_trains_with(build, options):
    options = {"max_completion_length": options["length"]} if "length" in options else options
    trainer = build("nft", trainer_options={"reward_funcs": [every_other]}, **options)
    trainer.train()
    assert trainer.state.log_history[0]["nft/kept_groups"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clamp_negative": 0.0}, "clamp_negative: 0.0 is not positive"),
        ({"negative_weight": -1.0}, "negative_weight: -1.0 is negative. Set 0.0 for RFT"),
        ({"omega": 3}, "omega: 3 is not known"),
        ({"length_reward": "kimi"}, "length_reward: 'kimi' would have no effect"),
        ({"loss_type": "cispo"}, "loss_type: 'cispo'"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level: 'sequence'"),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        NFTConfig(str(tmp_path), bf16=False, use_cpu=True, **options)
