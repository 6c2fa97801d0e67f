"""The loss of Critique-GRPO on refinements."""

import pytest
import torch

from step_trl.losses import reshaped_policy_loss


@pytest.mark.parametrize(
    ("probability", "value", "gradient"),
    [
        (0.001, 0.0099009901, 0.0098029605),
        (0.01, 0.0909090909, 0.0826446281),
        (0.1, 0.5, 0.25),
        (0.5, 0.8333333333, 0.1388888889),
        (0.9, 0.9, 0.09),
        (0.99, 0.9082568807, 0.0833263193),
    ],
)
def test_values_and_gradients_of_a_token(probability, value, gradient):
    logps = torch.tensor([[probability]], dtype=torch.float64).log().requires_grad_()
    loss = reshaped_policy_loss(logps, torch.tensor([-2.0], dtype=torch.float64))
    loss.sum().backward()
    assert loss.item() == pytest.approx(2 * value, abs=1e-9)
    assert logps.grad.item() == pytest.approx(2 * gradient, abs=1e-9)


def test_the_objective_of_two_completions_and_a_refinement():
    """J of the paper, and the released code's loss for a width of 4."""
    ratios = torch.tensor([1.0, 1.1, 0.9], dtype=torch.float64)
    logps = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()
    on_refinement = -reshaped_policy_loss(logps, torch.tensor([2 / 3], dtype=torch.float64)).sum().item()
    on_initial = -ratios.sum().item() / 3  # with a negative advantage, no ratio is clipped
    assert on_initial / 2 + on_refinement == pytest.approx(0.4333333333)
    assert -(on_initial + on_refinement) / 4 == pytest.approx(0.0166666667)


def test_gamma_is_positive():
    with pytest.raises(ValueError, match="gamma: 0 is not positive"):
        reshaped_policy_loss(torch.zeros(1, 1), torch.ones(1), gamma=0)
