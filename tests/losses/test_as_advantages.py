"""TRL's `_compute_loss` follows another loss: its gradient is that of the loss with the same normaliser."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from small_runs import SMALL_RUN, every_other
from trl import GRPOConfig, GRPOTrainer

from step_trl import testbed
from step_trl.losses import check_loss_options, loss_as_advantages, nft_loss


LENGTH = 7
RATES = {"correct": torch.tensor([True, False, True, False]), "correct_rate": torch.tensor([0.25, 0.25, 0.5, 0.5])}


def nft(logps, inputs):
    return nft_loss(
        logps, inputs["old_per_token_logps"], inputs["correct"], inputs["correct_rate"], 0.5, omega=2
    )  # with a clamp at which values are not all 0


class Trainer(GRPOTrainer):
    """Trains with NFT's loss."""

    own_loss = None
    loss_inputs = None

    def _compute_loss(self, model, inputs):
        self.loss_inputs = inputs = dict(inputs)
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        inputs, self.loss_inputs = self.loss_inputs, None
        if inputs is not None:
            old = dict(inputs)
            self.own_loss = loss_as_advantages(inputs, logps.detach(), lambda leaf: nft(leaf, old))
        return logps, entropies, aux_loss


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    tokenizer, rows = testbed.load_tokenizer(), testbed.load_dataset("easy")

    def build(**options):
        args = GRPOConfig(
            str(tmp_path_factory.mktemp("run")),
            **SMALL_RUN
            | {"num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 16}
            | options,
            gradient_accumulation_steps=2,
            steps_per_generation=4,
            use_bias_correction_kl=False,
        )
        check_loss_options(args)
        model = testbed.load_model().double()
        trainer = Trainer(model, every_other, args, train_dataset=rows, processing_class=tokenizer)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 2  # set by `train`
        return trainer

    return build


def batch(trainer):
    """Completions of different lengths, with an old policy and a reference that differ from the policy."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, trainer.model.config.vocab_size, (4, 3 + LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < torch.tensor([[7], [4], [1], [6]])).long()
    noise = torch.randn(2, 4, LENGTH, generator=generator, dtype=torch.float64) * 0.3
    with torch.no_grad():
        logps, _, _ = GRPOTrainer._get_per_token_logps_and_entropies(
            trainer, trainer.model, tokens, torch.cat([torch.ones_like(tokens[:, :3]), mask], 1), LENGTH
        )
    return RATES | {
        "prompt_ids": tokens[:, :3],
        "prompt_mask": torch.ones_like(tokens[:, :3]),
        "completion_ids": tokens[:, 3:],
        "completion_mask": mask,
        "old_per_token_logps": logps + noise[0],
        "ref_per_token_logps": logps + noise[1],
        "advantages": torch.full((4,), 1e3, dtype=torch.float64),
        "num_items_in_batch": torch.tensor(50),
        "importance_sampling_ratio": noise[0].exp(),
    }


def normalised(losses, mask, loss_type):
    """TRL's losses for a batch of four in a window of two, with four completions sampled at once."""
    if loss_type == "grpo":
        return ((losses * mask).sum(1) / mask.sum(1)).mean() / 2
    count = {"dapo": 50 * 2 / 4, "dr_grpo": 4 * 16 * 2, "bnpo": mask.sum() * 2}[loss_type]
    return (losses * mask).sum() / count


def gradients(loss, trainer):
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(trainer.model.parameters()))])


def check(trainer, loss_type, correction=False):
    inputs = batch(trainer)
    kept = dict(inputs)
    found = gradients(trainer._compute_loss(trainer.model, inputs), trainer)
    assert inputs.keys() == kept.keys() and all(inputs[name] is kept[name] for name in kept)

    mask = inputs["completion_mask"]
    attention = torch.cat([inputs["prompt_mask"], mask], 1)
    tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, tokens, attention, LENGTH)
    losses = nft(logps, inputs)
    torch.testing.assert_close(trainer.own_loss, losses.detach())
    if correction:
        losses = losses * inputs["importance_sampling_ratio"]
    if trainer.beta:
        difference = inputs["ref_per_token_logps"] - logps
        losses = losses + trainer.beta * (difference.exp() - difference - 1)
    expected = gradients(normalised(losses, mask, loss_type), trainer)
    assert expected.norm() > 1e-3
    assert (found - expected).norm() < 1e-6 * expected.norm()  # the model's norms are float32


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo"])
def test_the_gradient_is_that_of_the_loss(build, loss_type, beta):
    check(build(loss_type=loss_type, beta=beta), loss_type)


def test_the_correction_for_vllm_stays(build):
    trainer = build(loss_type="dapo")
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    check(trainer, "dapo", correction=True)


def test_an_evaluation_has_a_loss_too(build):
    trainer = build(loss_type="dr_grpo")
    trainer.model.eval()
    with torch.no_grad():
        trainer._compute_loss(trainer.model, batch(trainer))
    assert trainer.own_loss.shape == (4, LENGTH) and (trainer.own_loss != 0).any()


def test_advantages_are_minus_the_gradient():
    inputs = {"advantages": torch.ones(1), "old_per_token_logps": torch.ones(1, 2), "other": 1}
    logps = torch.tensor([[-1.0, -2.0]])
    with torch.no_grad():
        loss = loss_as_advantages(inputs, logps, lambda leaf: leaf**2 + leaf.sum() ** 3)
    assert loss.tolist() == [[-26.0, -23.0]] and not loss.requires_grad
    # 2 * logp + 2 tokens * 3 * (-3)^2
    assert inputs["advantages"].tolist() == [[-52.0, -50.0]] and not inputs["advantages"].requires_grad
    assert torch.equal(inputs["old_per_token_logps"], logps) and inputs["other"] == 1
    assert not logps.requires_grad


def test_losses_are_computed_in_float32_at_least():
    inputs = {}
    logps = torch.tensor([[-1.0, -2.0]], dtype=torch.bfloat16)
    loss_as_advantages(inputs, logps, lambda leaf: leaf * 1.001)
    assert inputs["old_per_token_logps"].dtype == torch.bfloat16  # as the policy's, so that ratios are 1
    torch.testing.assert_close(inputs["advantages"], torch.full((1, 2), -1.001))


def test_a_loss_has_one_value_per_token():
    for wrong in (lambda leaf: leaf.mean(), lambda leaf: leaf.sum(1)):
        with pytest.raises(ValueError, match=r"loss: it returned the shape .*\(2, 3\).*each token"):
            loss_as_advantages({}, torch.zeros(2, 3), wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "cispo"}, "loss_type: 'cispo'.*'grpo', 'dapo', 'dr_grpo', 'bnpo'"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level: 'sequence'.*Set 'token'"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold: 0.5 .*use_vllm=True"),
    ],
)
def test_other_options_are_refused(options, message):
    args = {
        "loss_type": "dapo",
        "importance_sampling_level": "token",
        "off_policy_mask_threshold": None,
        "use_vllm": False,
    }
    check_loss_options(SimpleNamespace(**args))
    check_loss_options(SimpleNamespace(**args | {"off_policy_mask_threshold": 0.5, "use_vllm": True}))
    with pytest.raises(ValueError, match=message):
        check_loss_options(SimpleNamespace(**args | options))
