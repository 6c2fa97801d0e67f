"""`probability_mask`: tokens that the policy was certain of are left out of the loss, in every trainer."""

import math

import pytest
import torch
from loss_records import full_logps, record_losses


@pytest.mark.parametrize(
    ("method", "options"),
    [("grpo", {}), ("grpo", {"num_iterations": 2, "max_steps": 2}), ("step_grpo", {"max_completion_length": 240})],
    ids=["own forward pass", "old log-probabilities", "with injected tokens"],
)
def test_certain_tokens_leave_the_loss_and_its_normaliser(build, monkeypatch, method, options):
    trainer = build(method, probability_mask=0.9, learning_rate=0.0, loss_type="dapo", **options)
    records = record_losses(trainer, monkeypatch)
    trainer.train()
    for record in records:
        inputs = record["inputs"]
        mask = inputs["completion_mask"].bool()
        logps = full_logps(trainer, inputs)
        clear = (logps - math.log(0.9)).abs() > 1e-4  # rounding may move a token over the threshold
        kept = inputs["tool_mask"].bool() & mask
        assert torch.equal(kept[clear], (mask & (logps < math.log(0.9)))[clear])
        assert 0 < kept.sum() < mask.sum()
        assert inputs["num_items_in_batch"] == kept.sum()


@pytest.mark.parametrize("value", [0.0, 1.0, -0.5])
def test_a_threshold_is_a_probability(build, value):
    with pytest.raises(ValueError, match=f"probability_mask: {value} is not between 0 and 1"):
        build("grpo", probability_mask=value)
